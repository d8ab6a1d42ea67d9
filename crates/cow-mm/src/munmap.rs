//! munmap and mprotect: ranges go, ranges change.
//!
//! Source: munmap(2), mprotect(2); Linux `mm/vma.c` (`do_vmi_munmap`), `mm/mprotect.c` (`do_mprotect_pkey`,
//! `mprotect_fixup`).

use kmem_hal::{Access, PAGE_SIZE, Page, PageRange, VirtAddr};

use crate::env::Env;
use crate::errno::Errno;
use crate::flags::{Prot, VmFlags};
use crate::mmap::is_accounted;
use crate::space::{AddressSpace, State};
use crate::vma::Vma;
use crate::vma_edit::{STORES_TO_CLEAR, STORES_TO_MODIFY};

impl<'m, E: Env> AddressSpace<'m, E> {
    /// Unmaps whole pages; holes are fine.
    ///
    /// Context: task context; as [`Mm::close`](crate::Mm::close) where the last mapping of a file goes.
    ///
    /// # Errors
    ///
    /// [`Errno::EINVAL`] for an unaligned address, no length, or a range beyond the user addresses; [`Errno::ENOMEM`] where a split would pass
    /// the limit on mappings or finds no memory. Nothing changes then.
    ///
    /// [`Errno::EPERM`] where something in the range is [sealed](Self::mseal), and [`Errno::EINVAL`] where a part of what the kernel put there
    /// ([`map_special`](Self::map_special)) is: the mapping that the range begins in is cut there, unless it is that one, as in Linux
    /// (docs/spec/partial-effects.md).
    #[doc(alias = "do_munmap")]
    pub fn munmap(&self, address: u64, length: u64) -> Result<(), Errno> {
        let mut state = self.lock();
        self.munmap_locked(&mut state, address, length)
    }

    pub(crate) fn munmap_locked(
        &self,
        state: &mut State<'m, E>,
        address: u64,
        length: u64,
    ) -> Result<(), Errno> {
        let range = self.checked_range(address, length)?;
        self.unmap_range(state, range)
    }

    /// The pages of a range of bytes in user space (`EINVAL` where there are none).
    fn checked_range(&self, address: u64, length: u64) -> Result<PageRange, Errno> {
        let task_size = self.layout().task_size;
        if address > task_size || length > task_size - address {
            return Err(Errno::EINVAL);
        }
        self.user_range(address, length.div_ceil(PAGE_SIZE))
            .ok_or(Errno::EINVAL)
    }

    pub(crate) fn unmap_range(
        &self,
        state: &mut State<'m, E>,
        range: PageRange,
    ) -> Result<(), Errno> {
        let Some(first) = state.vmas.at_or_after(range.first()) else {
            return Ok(());
        };
        if first.range.first() > range.last() {
            return Ok(());
        }
        state.check_clear(range)?;
        let mut edit = state.vmas.edit_with(STORES_TO_CLEAR)?;
        self.own_ends(range)?;
        edit.clear(range, || self.zap(range));
        Ok(())
    }

    /// Changes what whole pages may be used for.
    ///
    /// Where a later part of the range fails, the parts before it stay changed, as in Linux
    /// (docs/spec/partial-effects.md).
    ///
    /// # Errors
    ///
    /// [`Errno::EINVAL`] for an unaligned address, bits that are no protection, [`Prot::GROWSDOWN`] where no stack is, and another
    /// protection for a part of what the kernel put there; [`Errno::ENOMEM`] where a page is not mapped, no memory is left, or there are too many mappings; [`Errno::EACCES`] where the file's mode forbids it;
    /// [`Errno::EPERM`] for what is [sealed](Self::mseal).
    pub fn mprotect(&self, address: u64, length: u64, prot: Prot) -> Result<(), Errno> {
        self.protect(address, length, prot, None)
    }

    pub(crate) fn protect(
        &self,
        address: u64,
        length: u64,
        prot: Prot,
        key: Option<i32>,
    ) -> Result<(), Errno> {
        let grows = prot & (Prot::GROWSDOWN | Prot::GROWSUP);
        let prot = prot.difference(grows);
        let both = grows == Prot::GROWSDOWN | Prot::GROWSUP;
        if both || !address.is_multiple_of(PAGE_SIZE) {
            return Err(Errno::EINVAL);
        }
        if length == 0 {
            return Ok(());
        }
        let pages = length.div_ceil(PAGE_SIZE);
        let end = pages.checked_mul(PAGE_SIZE);
        let end = end.and_then(|bytes| address.checked_add(bytes));
        end.ok_or(Errno::ENOMEM)?;
        if !(Prot::ACCESS | Prot::SEM).contains(prot) {
            return Err(Errno::EINVAL);
        }
        let range = self.user_range(address, pages);
        let mut state = self.lock();
        let key = Self::checked_key(state.keys, key)?;
        let range = grown(&state, range.ok_or(Errno::ENOMEM)?, grows)?;
        let mut at = range.first();
        loop {
            let vma = state.vmas.get(at).ok_or(Errno::ENOMEM)?;
            let last = vma.range.last().min(range.last());
            let part = PageRange::new(at, last).ok_or(Errno::EINVAL)?;
            if self.protect_part(&mut state, &vma, part, prot, key)? {
                self.copy_locked(&mut state, part);
            }
            match last.checked_add(1) {
                Some(next) if next <= range.last() => at = next,
                _ => return Ok(()),
            }
        }
    }

    /// Locked memory that may be written gets its own copies now, not by faults.
    #[inline(never)]
    fn copy_locked(&self, state: &mut State<'m, E>, part: PageRange) {
        for page in part.iter() {
            let _ = self.fault_locked(state, page.start(), Access::Write);
        }
    }

    /// Changes a part of one mapping; whether it is locked memory that may be written now.
    #[inline(never)]
    fn protect_part(
        &self,
        state: &mut State<'m, E>,
        vma: &Vma,
        part: PageRange,
        prot: Prot,
        key: Option<u8>,
    ) -> Result<bool, Errno> {
        let mut flags = vma.flags.difference(VmFlags::ACCESS) | VmFlags::from_prot(prot);
        flags = flags.with_key(key.unwrap_or(vma.flags.key()));
        if !may_have(vma.flags, prot) {
            return Err(Errno::EACCES);
        }
        if vma.flags.contains(VmFlags::SEALED) {
            return Err(Errno::EPERM);
        }
        if flags == vma.flags {
            return Ok(false);
        }
        let mut charge = 0;
        if flags.contains(VmFlags::WRITE) {
            // What turns into data must stay within the limit on data.
            let pages = part.count();
            if !state.may_expand(pages, flags) && state.may_expand(pages, vma.flags) {
                return Err(Errno::ENOMEM);
            }
            let counted = VmFlags::ACCOUNT | VmFlags::WRITE | VmFlags::SHARED | VmFlags::NORESERVE;
            if !vma.flags.intersects(counted) {
                debug_assert!(is_accounted(flags));
                flags |= VmFlags::ACCOUNT;
                charge = pages;
            }
        } else if vma.flags.contains(VmFlags::ACCOUNT) && vma.is_anonymous() && vma.anon.is_none() {
            flags -= VmFlags::ACCOUNT;
        }
        let room = state.room();
        let mut edit = state.vmas.edit_with(STORES_TO_MODIFY)?;
        edit.charge(charge, &state.limits)?;
        self.own_range(part)?;
        edit.modify(part, room, |new| new.flags = flags)?;
        drop(edit);
        self.restrict(part, flags);
        let copies = VmFlags::WRITE | VmFlags::SHARED | VmFlags::LOCKED_MASK;
        // What is locked on fault waits for those.
        Ok(vma.flags & copies == VmFlags::LOCKED && flags.contains(VmFlags::WRITE))
    }

    /// The part of `[address, address + length)` that a call over several mappings works on.
    pub(crate) fn advised_range(
        &self,
        address: u64,
        length: u64,
    ) -> Result<Option<PageRange>, Errno> {
        let first = Page::starting_at(VirtAddr::new(address)).ok_or(Errno::EINVAL)?;
        if length == 0 {
            return Ok(None);
        }
        let bytes = length
            .checked_next_multiple_of(PAGE_SIZE)
            .ok_or(Errno::EINVAL)?;
        address.checked_add(bytes).ok_or(Errno::EINVAL)?;
        PageRange::with_count(first, bytes / PAGE_SIZE)
            .map(Some)
            .ok_or(Errno::EINVAL)
    }
}

/// The range that `PROT_GROWSDOWN` and `PROT_GROWSUP` mean: from or to the end of a mapping that grows so.
fn grown<E: Env>(state: &State<'_, E>, range: PageRange, grows: Prot) -> Result<PageRange, Errno> {
    if grows.is_empty() {
        return Ok(range);
    }
    let found = state.vmas.at_or_after(range.first());
    let vma = found.filter(|vma| vma.range.first() <= range.last());
    let vma = vma.ok_or(Errno::ENOMEM)?;
    if grows == Prot::GROWSUP {
        // None grows up.
        return Err(match vma.range.contains(range.first()) {
            true => Errno::EINVAL,
            false => Errno::ENOMEM,
        });
    }
    let stack = vma.flags.contains(VmFlags::GROWSDOWN);
    let whole = PageRange::new(vma.range.first(), range.last());
    whole.filter(|_| stack).ok_or(Errno::EINVAL)
}

/// Whether the mapping may be given these rights at all (`VM_MAY*`).
fn may_have(flags: VmFlags, prot: Prot) -> bool {
    (!prot.contains(Prot::READ) || flags.contains(VmFlags::MAYREAD))
        && (!prot.contains(Prot::WRITE) || flags.contains(VmFlags::MAYWRITE))
        && (!prot.contains(Prot::EXEC) || flags.contains(VmFlags::MAYEXEC))
}
