//! mlock, mlockall and their opposites: memory that stays.
//!
//! ```text
//!   may lock at all? ── no ──> EPERM        within the limit (locked already counts once)? ── no ──> ENOMEM
//!        │ yes                                   │ yes
//!        └───────────────────────────────────────┴──> flag the mappings, up to the first hole ──> bring the pages in
//! ```
//!
//! Flags come first, pages afterwards and without the lock: what cannot be brought in is an error of the call, and the
//! mappings stay locked (docs/spec/partial-effects.md).
//!
//! Source: mlock(2); Linux `mm/mlock.c` (`do_mlock`, `apply_vma_lock_flags`, `apply_mlockall_flags`, `mlock_fixup`).

use bitflags::bitflags;
use kmem_hal::{PAGE_SIZE, Page, PageRange, VirtAddr};

use crate::env::Env;
use crate::errno::Errno;
use crate::flags::VmFlags;
use crate::madvise::Populate;
use crate::mutants::mutant;
use crate::space::{AddressSpace, State};
use crate::vma::Vma;

bitflags! {
    /// How a range is locked: `MLOCK_*`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct LockFlags: u32 {
        /// Pages come when they are touched, and stay from then on.
        const ONFAULT = 1;
    }
}

bitflags! {
    /// What `mlockall` locks: `MCL_*`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct LockAll: u32 {
        /// What is mapped now.
        const CURRENT = 1;
        /// What will be mapped.
        const FUTURE = 2;
        /// Pages come when they are touched, and stay from then on.
        const ONFAULT = 4;
    }
}

impl<'m, E: Env> AddressSpace<'m, E> {
    /// Keeps a range in memory, and brings it in.
    ///
    /// # Errors
    ///
    /// [`Errno::EPERM`] where the process may lock nothing; [`Errno::ENOMEM`] beyond its limit, where there was a hole, or a page
    /// that cannot be accessed; [`Errno::EINVAL`] for a length that wraps; [`Errno::EAGAIN`] where no memory is left.
    pub fn mlock(&self, address: u64, length: u64) -> Result<(), Errno> {
        self.mlock2(address, length, LockFlags::empty())
    }

    /// [`mlock`](Self::mlock), with flags.
    ///
    /// # Errors
    ///
    /// As there, and [`Errno::EINVAL`] for flags that are none.
    pub fn mlock2(&self, address: u64, length: u64, flags: LockFlags) -> Result<(), Errno> {
        if !LockFlags::all().contains(flags) {
            return Err(Errno::EINVAL);
        }
        let mut locked = VmFlags::LOCKED;
        locked.set(VmFlags::LOCKONFAULT, flags.contains(LockFlags::ONFAULT));
        let (start, length) = whole_pages(address, length);
        {
            let mut state = self.lock();
            if !state.may_lock() {
                return Err(Errno::EPERM);
            }
            let pages = length / PAGE_SIZE;
            if !state.may_lock_more(pages, locked) {
                let again = self
                    .user_range(start, pages)
                    .map_or(0, |range| state.vmas.counters_in(range).locked);
                if !state.may_lock_more(pages.saturating_sub(again), locked) {
                    return Err(Errno::ENOMEM);
                }
            }
            self.set_locked(&mut state, start, length, locked)?;
        }
        self.populate(start, length, Populate::AsMapped)
            .map_err(|error| match error {
                // What POSIX wants to hear (`__mlock_posix_error_return`).
                Errno::ENOMEM => Errno::EAGAIN,
                _ => Errno::ENOMEM,
            })
    }

    /// Lets a range go that `mlock` keeps.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`] where there was a hole: what is before it was let go; [`Errno::EINVAL`] for a length that wraps.
    pub fn munlock(&self, address: u64, length: u64) -> Result<(), Errno> {
        let (start, length) = whole_pages(address, length);
        self.set_locked(&mut self.lock(), start, length, VmFlags::empty())
    }

    /// Keeps all that is mapped in memory, all that will be mapped, or both.
    ///
    /// A page that cannot be brought in is no error, as in Linux.
    ///
    /// # Errors
    ///
    /// [`Errno::EINVAL`] for flags that say neither `CURRENT` nor `FUTURE`; [`Errno::EPERM`] where the process may lock nothing;
    /// [`Errno::ENOMEM`] where what is mapped now passes the limit.
    pub fn mlockall(&self, flags: LockAll) -> Result<(), Errno> {
        let known = LockAll::all().contains(flags);
        if !known || !flags.intersects(LockAll::CURRENT | LockAll::FUTURE) {
            return Err(Errno::EINVAL);
        }
        {
            let mut state = self.lock();
            if !state.may_lock() {
                return Err(Errno::EPERM);
            }
            let fits = state.limits.may_lock_all
                || state.vmas.counters().total <= state.limits.locked / PAGE_SIZE;
            if flags.contains(LockAll::CURRENT) && !fits {
                return Err(Errno::ENOMEM);
            }
            self.lock_all(&mut state, flags)?;
        }
        if flags.contains(LockAll::CURRENT) {
            self.populate_all();
        }
        Ok(())
    }

    /// Lets everything go that `mlock` and `mlockall` keep.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`] where a change finds no memory; what comes before it was let go.
    pub fn munlockall(&self) -> Result<(), Errno> {
        self.lock_all(&mut self.lock(), LockAll::empty())
    }

    fn lock_all(&self, state: &mut State<'m, E>, flags: LockAll) -> Result<(), Errno> {
        let mut locked = VmFlags::LOCKED;
        locked.set(VmFlags::LOCKONFAULT, flags.contains(LockAll::ONFAULT));
        let chosen = |all| match flags.contains(all) {
            true => locked,
            false => VmFlags::empty(),
        };
        state.default_flags =
            state.default_flags.difference(VmFlags::LOCKED_MASK) | chosen(LockAll::FUTURE);
        if flags == LockAll::FUTURE || flags == LockAll::FUTURE | LockAll::ONFAULT {
            // What is mapped already stays as it is.
            return Ok(());
        }
        let mut at = Some(Page::ZERO);
        while let Some(vma) = at.and_then(|at| state.vmas.at_or_after(at)) {
            set_lock_flags(state, &vma, vma.range, chosen(LockAll::CURRENT))?;
            at = vma.range.last().checked_add(1);
        }
        Ok(())
    }

    /// Flags the mappings of a range as locked, or not, up to the first hole.
    fn set_locked(
        &self,
        state: &mut State<'m, E>,
        start: u64,
        length: u64,
        flags: VmFlags,
    ) -> Result<(), Errno> {
        if length == 0 {
            return Ok(());
        }
        start.checked_add(length).ok_or(Errno::EINVAL)?;
        let range = self
            .user_range(start, length / PAGE_SIZE)
            .ok_or(Errno::ENOMEM)?;
        self.for_each_part_up_to_a_hole(state, range, |state, vma, part| {
            set_lock_flags(state, vma, part, flags)
        })
    }

    /// Brings in all that is mapped and may be.
    fn populate_all(&self) {
        let mut at = VirtAddr::new(0);
        while let Some(vma) = self.find_vma(at) {
            let start = vma.range.start().as_u64();
            let length = vma.range.count() * PAGE_SIZE;
            let _ = self.populate(start, length, Populate::AsMapped);
            at = VirtAddr::new(start + length);
        }
    }
}

/// Changes the lock flags of a part of a mapping; mappings of what is no ordinary memory, or may go at any time, have none (`mlock_fixup`).
fn set_lock_flags<E: Env>(
    state: &mut State<'_, E>,
    vma: &Vma,
    part: PageRange,
    flags: VmFlags,
) -> Result<(), Errno> {
    let flags = vma.flags.difference(VmFlags::LOCKED_MASK) | flags;
    let never = VmFlags::SPECIAL | VmFlags::DROPPABLE;
    let never = vma.flags.intersects(never) && !mutant!("device-memory-is-locked");
    if flags != vma.flags && !never {
        let room = state.room();
        let mut edit = state.vmas.edit()?;
        edit.modify(part, room, |new| new.flags = flags)?;
    }
    Ok(())
}

/// The whole pages that a range touches; a length that wraps is whatever is left of it, as in Linux.
fn whole_pages(address: u64, length: u64) -> (u64, u64) {
    let start = address & !(PAGE_SIZE - 1);
    let length = length.wrapping_add(address - start);
    (start, length.wrapping_add(PAGE_SIZE - 1) & !(PAGE_SIZE - 1))
}
