//! madvise: advice over ranges.
//!
//! Each walks the mappings of a range in order. A hole is remembered, the rest is done, and the call answers ENOMEM.
//!
//! Source: madvise(2); Linux `mm/madvise.c`.

use kmem_hal::{PAGE_SIZE, PageRange};

use crate::env::Env;
use crate::errno::Errno;
use crate::flags::{Advice, VmFlags};
use crate::merge::Candidate;
use crate::seal::is_sealed_against;
use crate::space::{AddressSpace, State};
use crate::vma::Vma;

impl<'m, E: Env> AddressSpace<'m, E> {
    /// Tells the kernel how a range will be used.
    ///
    /// [`Advice::missing_effect`] says which advice is accepted without its full effect.
    ///
    /// # Errors
    ///
    /// [`Errno::EINVAL`] for an unaligned address, a length that wraps, or advice that the mapping cannot take;
    /// [`Errno::ENOMEM`] where there was a hole: the advice was applied to the rest; [`Errno::EAGAIN`] where
    /// no memory is left for a change of mappings, or there are too many of them; [`Errno::EPERM`] for advice that needs a capability, or
    /// would take away what is [sealed](Self::mseal).
    #[doc(alias = "do_madvise")]
    pub fn madvise(&self, address: u64, length: u64, advice: Advice) -> Result<(), Errno> {
        let Some(range) = self.advised_range(address, length)? else {
            return Ok(());
        };
        match advice {
            Advice::PopulateRead => {
                return self.populate(address, range.count() * PAGE_SIZE, Populate::Read);
            }
            Advice::PopulateWrite => {
                return self.populate(address, range.count() * PAGE_SIZE, Populate::Write);
            }
            // No caller of kmem's has a capability: a kernel whose caller has it does this itself.
            Advice::HwPoison | Advice::SoftOffline => return Err(Errno::EPERM),
            _ => {}
        }
        let mut accepted = None;
        let outcome = {
            let mut state = self.lock();
            self.for_each_part(&mut state, range, |state, vma, part| {
                self.advise_part(state, vma, part, advice)?;
                accepted = PageRange::new(range.first(), part.last());
                Ok(())
            })
        };
        let done = match accepted {
            Some(accepted) => self.advise_pages(accepted, advice),
            None => Ok(()),
        };
        outcome.and(done)
    }

    #[inline(never)]
    fn advise_part(
        &self,
        state: &mut State<'m, E>,
        vma: &Vma,
        part: PageRange,
        advice: Advice,
    ) -> Result<(), Errno> {
        if is_sealed_against(vma, advice) {
            return Err(Errno::EPERM);
        }
        let special = vma.flags.intersects(VmFlags::SPECIAL);
        let droppable = vma.flags.contains(VmFlags::DROPPABLE);
        let locked = vma.flags.contains(VmFlags::LOCKED);
        let (on, off) = match advice {
            Advice::Free => {
                if locked || !vma.is_memory() || !vma.is_anonymous() || vma.is_kernels() {
                    return Err(Errno::EINVAL);
                }
                self.free_lazily(part);
                return Ok(());
            }
            Advice::DontNeed | Advice::DontNeedLocked => {
                if !vma.is_memory() || locked && advice == Advice::DontNeed {
                    return Err(Errno::EINVAL);
                }
                return match vma.is_kernels() {
                    true => Ok(()),
                    false => self.empty(state, part).map_err(|_| Errno::EAGAIN),
                };
            }
            Advice::GuardInstall => return self.install_guards(state, vma, part),
            Advice::GuardRemove => return self.remove_guards(state, vma, part),
            Advice::Cold | Advice::PageOut => {
                return match locked || !vma.is_memory() {
                    true => Err(Errno::EINVAL),
                    false => Ok(()),
                };
            }
            Advice::Remove => return self.check_remove(vma),
            // As from a Linux without transparent huge pages.
            Advice::Collapse => return Err(Errno::EINVAL),
            Advice::WillNeed
            | Advice::PopulateRead
            | Advice::PopulateWrite
            | Advice::HwPoison
            | Advice::SoftOffline => return Ok(()),
            Advice::Normal => (VmFlags::empty(), VmFlags::SEQ_READ | VmFlags::RAND_READ),
            Advice::Random => (VmFlags::RAND_READ, VmFlags::SEQ_READ),
            Advice::Sequential => (VmFlags::SEQ_READ, VmFlags::RAND_READ),
            Advice::DontFork => (VmFlags::DONTCOPY, VmFlags::empty()),
            Advice::DoFork if !vma.is_memory() => return Err(Errno::EINVAL),
            Advice::DoFork => (VmFlags::empty(), VmFlags::DONTCOPY),
            Advice::WipeOnFork if !vma.is_anonymous() || vma.is_shared() => {
                return Err(Errno::EINVAL);
            }
            Advice::WipeOnFork => (VmFlags::WIPEONFORK, VmFlags::empty()),
            Advice::KeepOnFork if droppable => return Err(Errno::EINVAL),
            Advice::KeepOnFork => (VmFlags::empty(), VmFlags::WIPEONFORK),
            Advice::DontDump => (VmFlags::DONTDUMP, VmFlags::empty()),
            Advice::DoDump if special || droppable => return Err(Errno::EINVAL),
            Advice::DoDump => (VmFlags::empty(), VmFlags::DONTDUMP),
            // What is shared anyway, or goes anyway, is passed over (`vma_ksm_compatible`).
            Advice::Mergeable if special || droppable || vma.flags.contains(VmFlags::MAYSHARE) => {
                return Ok(());
            }
            Advice::Mergeable => (VmFlags::MERGEABLE, VmFlags::empty()),
            Advice::Unmergeable => (VmFlags::empty(), VmFlags::MERGEABLE),
            Advice::HugePage => (VmFlags::HUGEPAGE, VmFlags::NOHUGEPAGE),
            Advice::NoHugePage => (VmFlags::NOHUGEPAGE, VmFlags::HUGEPAGE),
        };
        self.set_flags(state, vma, part, on, off)
    }

    #[inline(never)]
    fn set_flags(
        &self,
        state: &mut State<'m, E>,
        vma: &Vma,
        part: PageRange,
        on: VmFlags,
        off: VmFlags,
    ) -> Result<(), Errno> {
        let flags = (vma.flags | on).difference(off);
        if flags != vma.flags {
            modify_as_advised(state, part, |new| new.flags = flags)?;
        }
        Ok(())
    }

    /// Whether the pages of a mapping may be taken from everybody who maps them (`madvise_remove`).
    fn check_remove(&self, vma: &Vma) -> Result<(), Errno> {
        if vma.flags.contains(VmFlags::LOCKED) {
            return Err(Errno::EINVAL);
        }
        let file = vma.file.ok_or(Errno::EINVAL)?;
        if !Self::may_remove(vma) {
            return Err(Errno::EACCES);
        }
        if self.mm().device(file).is_some() {
            return Err(Errno::ENODEV);
        }
        if !self.mm().info(file).is_shared_memory {
            // No provider of kmem's can punch a hole into its file.
            return Err(Errno::EOPNOTSUPP);
        }
        Ok(())
    }

    pub(crate) fn may_remove(vma: &Vma) -> bool {
        let needed = VmFlags::SHARED | VmFlags::MAYWRITE;
        vma.flags.contains(needed) && !vma.flags.contains(VmFlags::LOCKED)
    }

    /// Gives advice about several ranges: `process_madvise`, for this process or another one; gives how many bytes of them were
    /// advised.
    ///
    /// # Errors
    ///
    /// That of the first range if nothing was done; a later range that fails ends the call with what was done before.
    #[doc(alias = "process_madvise")]
    pub fn madvise_ranges(&self, ranges: &[(u64, u64)], advice: Advice) -> Result<u64, Errno> {
        let mut done = 0;
        for (address, length) in ranges {
            match self.madvise(*address, *length, advice) {
                Ok(()) => done += length,
                Err(error) if done == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    /// Calls `f` with each mapping's part of the range; ENOMEM at the first hole.
    pub(crate) fn for_each_part_up_to_a_hole(
        &self,
        state: &mut State<'m, E>,
        range: PageRange,
        mut f: impl FnMut(&mut State<'m, E>, &Vma, PageRange) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let mut at = range.first();
        self.for_each_part(state, range, |state, vma, part| {
            if part.first() != at {
                return Err(Errno::ENOMEM);
            }
            at = part.last().checked_add(1).unwrap_or(at);
            f(state, vma, part)
        })
    }

    /// Calls `f` with each mapping's part of the range; holes make the whole answer ENOMEM in the end.
    pub(crate) fn for_each_part(
        &self,
        state: &mut State<'m, E>,
        range: PageRange,
        mut f: impl FnMut(&mut State<'m, E>, &Vma, PageRange) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let mut at = range.first();
        let mut hole = false;
        while let Some(vma) = state
            .vmas
            .at_or_after(at)
            .filter(|vma| vma.range.first() <= range.last())
        {
            hole |= vma.range.first() > at;
            let first = at.max(vma.range.first());
            let last = vma.range.last().min(range.last());
            let Some(part) = PageRange::new(first, last) else {
                break;
            };
            f(state, &vma, part)?;
            match last.checked_add(1) {
                Some(next) if next <= range.last() => at = next,
                _ => return if hole { Err(Errno::ENOMEM) } else { Ok(()) },
            }
        }
        Err(Errno::ENOMEM)
    }

    /// Faults a range in ahead of use, as `how` says.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`] where a page is not mapped or no memory is left; [`Errno::EFAULT`] where a page cannot be
    /// brought in; [`Errno::EINVAL`] where a page may not be accessed so.
    #[inline(never)]
    pub(crate) fn populate(&self, address: u64, length: u64, how: Populate) -> Result<(), Errno> {
        let Some(range) = self.advised_range(address, length)? else {
            return Ok(());
        };
        let mut next = Some(range.first());
        while let Some(page) = next.filter(|page| *page <= range.last()) {
            let vma = self.vma_at(page.start()).ok_or(Errno::ENOMEM)?;
            if how == Populate::AsMapped && vma.flags.contains(VmFlags::LOCKONFAULT) {
                next = vma.range.last().checked_add(1);
                continue;
            }
            if !vma.is_memory() {
                // Passed over, or no business of this advice.
                if how != Populate::AsMapped {
                    return Err(Errno::EINVAL);
                }
                next = vma.range.last().checked_add(1);
                continue;
            }
            next = page.checked_add(1);
            let write = match how {
                Populate::Read => false,
                Populate::Write => true,
                Populate::AsMapped => vma.flags.contains(VmFlags::WRITE) && !vma.is_shared(),
            };
            let wanted = if write {
                VmFlags::WRITE
            } else {
                VmFlags::ACCESS
            };
            if !vma.flags.intersects(wanted) {
                return Err(Errno::EINVAL);
            }
            self.bring_in(page.start(), write)?;
        }
        Ok(())
    }
}

/// Changes a part of a mapping as advice says: what there is no room for may be tried again, as in Linux (`madvise_vma_behavior`).
///
/// # Errors
///
/// [`Errno::EAGAIN`] where no memory is left, or there are too many mappings; [`Errno::EINVAL`] for a part of what the kernel put there.
pub(crate) fn modify_as_advised<E: Env>(
    state: &mut State<'_, E>,
    part: PageRange,
    change: impl FnOnce(&mut Candidate),
) -> Result<(), Errno> {
    let room = state.room();
    let done = match state.vmas.edit() {
        Ok(mut edit) => edit.modify(part, room, change),
        Err(error) => Err(error),
    };
    done.map_err(|error| match error {
        Errno::ENOMEM => Errno::EAGAIN,
        error => error,
    })
}

/// With what accesses pages are brought in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Populate {
    /// By reading.
    Read,
    /// By writing.
    Write,
    /// By writing where the process writes its own copies, else by reading: what locked memory is brought in with
    /// (`populate_vma_page_range`).
    AsMapped,
}
