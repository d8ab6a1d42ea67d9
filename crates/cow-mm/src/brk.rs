//! brk: the heap's end.
//!
//! Source: brk(2); Linux `mm/mmap.c` (`brk`), `mm/vma.c` (`do_brk_flags`: the heap joins only what is before it).

use kmem_hal::{PAGE_SIZE, Page, VirtAddr};

use crate::env::Env;
use crate::flags::VmFlags;
use crate::madvise::Populate;
use crate::merge::Candidate;
use crate::space::{AddressSpace, Brk, State};
use crate::vma::Label;
use crate::vma_edit::STORES_TO_ADD;

impl<'m, E: Env> AddressSpace<'m, E> {
    /// Says where the heap begins, empty: what exec does behind the image's data. Beyond user space nothing grows there.
    pub fn set_heap(&self, start: u64) {
        let mut state = self.lock();
        state.brk = Brk { start, end: start };
    }

    /// Moves the break to `end`; gives where it is afterwards: where it was, if it could not be moved.
    #[doc(alias = "sys_brk")]
    pub fn brk(&self, end: u64) -> u64 {
        let (now, missing) = self.move_break(end);
        if let Some((start, length)) = missing {
            // As in Linux, a page that cannot be had now is no error.
            let _ = self.populate(start, length, Populate::AsMapped);
        }
        now
    }

    /// Moves the break; gives where it is afterwards, and the first byte and the length of what has to be brought in. Not inlined, as
    /// `mmap_without_pages`.
    #[inline(never)]
    fn move_break(&self, end: u64) -> (u64, Option<(u64, u64)>) {
        let mut state = self.lock();
        let before = state.brk;
        // The image's own data counts as the heap does.
        let (data_start, data_end) = state.segments.data;
        let data = end
            .wrapping_sub(before.start)
            .saturating_add(data_end.saturating_sub(data_start));
        // A space without a heap (`set_heap`) has no break to move.
        if before.start == 0
            || end < before.start
            || end > self.layout().task_size
            || data > state.limits.data
        {
            return (before.end, None);
        }
        let (old, new) = (
            before.end.next_multiple_of(PAGE_SIZE),
            end.next_multiple_of(PAGE_SIZE),
        );
        let moved = if new < old {
            self.shrink_heap(&mut state, new, old)
        } else {
            new == old || self.grow_heap(&mut state, old, new)
        };
        if moved {
            state.brk.end = end;
        }
        let locked = state.default_flags.contains(VmFlags::LOCKED);
        let missing = (moved && new > old && locked).then(|| (old, new - old));
        (state.brk.end, missing)
    }

    /// Takes the heap's last pages away; not where the program has unmapped all of them itself.
    fn shrink_heap(&self, state: &mut State<'m, E>, new: u64, old: u64) -> bool {
        let page = |address| Page::containing(VirtAddr::new(address));
        let found = state.vmas.at_or_after(page(new));
        found.is_some_and(|vma| vma.range.first() < page(old))
            && self.munmap_locked(state, new, old - new).is_ok()
    }

    fn grow_heap(&self, state: &mut State<'m, E>, old: u64, new: u64) -> bool {
        let Some(range) = self.user_range(old, (new - old) / PAGE_SIZE) else {
            return false;
        };
        let next = state.vmas.at_or_after(range.first());
        let blocked = next.is_some_and(|vma| {
            // A page stays free between the heap and what follows.
            vma.range.first().number().saturating_sub(vma.guard_below())
                <= range.last().number() + 1
        });
        let flags = heap_flags() | state.default_flags;
        if blocked
            || !state.may_lock_more(range.count(), flags)
            || !state.may_expand(range.count(), flags)
            || state.vmas.len() > state.limits.mappings
        {
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
        let first = old <= state.brk.start;
        let Ok(mut edit) = state.vmas.edit_with(STORES_TO_ADD) else {
            return false;
        };
        if edit.charge(range.count(), &state.limits).is_err() {
            return false;
        }
        if first {
            // What ends where the heap begins is not joined, though flags may match; what has the page that it begins in is.
            edit.insert(heap.over(range));
        } else {
            edit.add(range, heap, false);
        }
        true
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
