//! Sealed mappings: what a program has promised not to change any more, so that nobody can make it.
//!
//! | call | in a sealed mapping |
//! |---|---|
//! | `munmap`, `mmap` over it, `brk` below it, `mremap` of it or onto it | EPERM |
//! | `mprotect`, `pkey_mprotect` | EPERM |
//! | `MADV_DONTNEED`, `FREE`, `REMOVE`, `DONTFORK`, `WIPEONFORK`, `GUARD_INSTALL` | EPERM for anonymous memory that may not be written |
//! | the others, accesses, fork, exit | as ever; a child's are sealed too |
//!
//! Nothing takes a seal away. A mapping with one merges with none that has none.
//!
//! Source: mseal(2); Linux `mm/mseal.c`, and 6.17 and later `mm/madvise.c` (`can_madvise_modify`).

use kmem_hal::PageRange;

use crate::elf::Class;
use crate::env::Env;
use crate::errno::Errno;
use crate::flags::{Advice, VmFlags};
use crate::space::{AddressSpace, State};
use crate::vma::Vma;

impl<E: Env> AddressSpace<'_, E> {
    /// Seals whole pages: from now on nobody unmaps, moves or protects them otherwise.
    ///
    /// # Errors
    ///
    /// [`Errno::EINVAL`] for flags (there are none), an unaligned address and a length that wraps; [`Errno::ENOMEM`] where a page is not
    /// mapped: nothing was sealed; or where a mapping cannot be cut: those before it are sealed. [`Errno::ENOSYS`] in a space of
    /// 32 bits, whose kernel has no such call.
    ///
    /// # Examples
    ///
    /// See `tests/seals.rs` of the crate.
    #[doc(alias = "do_mseal")]
    pub fn mseal(&self, address: u64, length: u64, flags: u64) -> Result<(), Errno> {
        if self.class() == Class::Elf32 {
            return Err(Errno::ENOSYS);
        }
        if flags != 0 {
            return Err(Errno::EINVAL);
        }
        let Some(range) = self.advised_range(address, length)? else {
            return Ok(());
        };
        let mut state = self.lock();
        let mut next = Some(range.first());
        while let Some(page) = next.filter(|page| *page <= range.last()) {
            let vma = state.vmas.get(page).ok_or(Errno::ENOMEM)?;
            next = vma.range.last().checked_add(1);
        }
        self.for_each_part_up_to_a_hole(&mut state, range, |state, vma, part| {
            if vma.flags.contains(VmFlags::SEALED) {
                return Ok(());
            }
            let room = state.room();
            let mut edit = state.vmas.edit()?;
            edit.modify(part, room, |new| new.flags |= VmFlags::SEALED)
        })
    }
}

impl<E: Env> State<'_, E> {
    /// Whether everything in a range may go: nothing is sealed, and nothing stays in part that is whole or not there. If something may not,
    /// the mapping that the range begins in is cut there, unless that is it: as far as Linux comes before it finds out.
    ///
    /// # Errors
    ///
    /// [`Errno::EPERM`] for what is sealed; [`Errno::EINVAL`] for a part of what the kernel put there.
    #[doc(alias = "may_split")]
    pub(crate) fn check_all_may_go(&mut self, range: PageRange) -> Result<(), Errno> {
        let refused = |vma: Vma| match vma.flags.contains(VmFlags::SEALED) {
            true => Some(Errno::EPERM),
            false => (!vma.may_cut(range)).then_some(Errno::EINVAL),
        };
        let mut at = Some(range.first());
        while let Some(vma) = at.and_then(|at| self.vmas.at_or_after(at)) {
            if vma.range.first() > range.last() {
                break;
            }
            if let Some(error) = refused(vma) {
                if vma.range.first() > range.first()
                    && let Ok(mut edit) = self.vmas.edit()
                {
                    edit.split(range.first());
                }
                return Err(error);
            }
            at = vma.range.last().checked_add(1);
        }
        Ok(())
    }
}

/// Whether a seal keeps advice from a mapping: what takes contents away that the program itself could not overwrite.
pub(crate) fn is_sealed_against(vma: &Vma, advice: Advice) -> bool {
    let discards = matches!(
        advice,
        Advice::Free
            | Advice::DontNeed
            | Advice::DontNeedLocked
            | Advice::Remove
            | Advice::DontFork
            | Advice::WipeOnFork
            | Advice::GuardInstall
    );
    // Linux's `[vdso]` has operations of its own, and is no anonymous memory (`vma_is_anonymous`).
    let anonymous = vma.is_anonymous() && !vma.is_kernels();
    let own = anonymous && !vma.flags.contains(VmFlags::WRITE);
    discards && own && vma.flags.contains(VmFlags::SEALED)
}
