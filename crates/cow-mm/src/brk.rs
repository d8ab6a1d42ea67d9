//! brk: the heap's end.
//!
//! Source: brk(2); Linux `mm/mmap.c` (`brk`), `mm/vma.c` (`do_brk_flags`: the heap joins only what is before it).

use kmem_hal::{PAGE_SIZE, PageRange};

use crate::env::Env;
use crate::flags::VmFlags;
use crate::merge::Candidate;
use crate::space::{AddressSpace, Brk, State};
use crate::vma::Label;
use crate::vma_set::STORES_TO_ADD;

impl<'m, E: Env> AddressSpace<'m, E> {
    /// Says where the heap begins, empty: what exec does behind the image's data.
    pub fn set_heap(&self, start: u64) {
        self.lock().brk = Brk { start, end: start };
    }

    /// Moves the break to `end`; gives where it is afterwards: where it was, if it could not be moved.
    #[doc(alias = "sys_brk")]
    pub fn brk(&self, end: u64) -> u64 {
        let mut state = self.lock();
        let before = state.brk;
        if end < before.start || end > self.layout().task_size {
            return before.end;
        }
        let (old, new) = (
            before.end.next_multiple_of(PAGE_SIZE),
            end.next_multiple_of(PAGE_SIZE),
        );
        let moved = if new < old {
            self.munmap_locked(&mut state, new, old - new).is_ok()
        } else {
            new == old || self.grow_heap(&mut state, old, new)
        };
        if moved {
            state.brk.end = end;
        }
        state.brk.end
    }

    fn grow_heap(&self, state: &mut State<'m, E>, old: u64, new: u64) -> bool {
        let Some(range) = self.user_range(old, (new - old) / PAGE_SIZE) else {
            return false;
        };
        let next = state.vmas.at_or_after(range.first());
        let blocked = next.is_some_and(|vma| {
            vma.range.first().number().saturating_sub(vma.guard_below()) <= range.last().number()
        });
        let heap = new - state.brk.start.min(new);
        let flags = heap_flags();
        if blocked || heap > state.limits.data || !self.may_expand(state, range.count(), flags) {
            return false;
        }
        let offset = range.first().number();
        let heap = Candidate {
            flags,
            offset,
            file: None,
            anon: None,
            label: Label::None,
        };
        let first = old <= state.brk.start.next_multiple_of(PAGE_SIZE);
        match state.vmas.edit_with(STORES_TO_ADD) {
            Ok(mut edit) if first => edit.insert(candidate_vma(range, heap)),
            Ok(mut edit) => edit.add(range, heap, false),
            Err(_) => return false,
        }
        true
    }
}

/// The heap's own first page never joins the data before it, though flags may match.
fn candidate_vma(range: PageRange, heap: Candidate) -> crate::vma::Vma {
    crate::vma::Vma {
        range,
        flags: heap.flags,
        offset: heap.offset,
        file: heap.file,
        anon: heap.anon,
        label: heap.label,
    }
}

/// What a heap is: private, readable, writable, counted.
pub(crate) fn heap_flags() -> VmFlags {
    VmFlags::READ
        | VmFlags::WRITE
        | VmFlags::MAYREAD
        | VmFlags::MAYWRITE
        | VmFlags::MAYEXEC
        | VmFlags::ACCOUNT
}
