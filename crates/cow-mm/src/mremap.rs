//! mremap: a mapping shrinks, grows, or moves.
//!
//! ```text
//!   new < old   unmap the tail
//!   new = old   nothing, unless it must move
//!   new > old   room behind? grow in place. MAYMOVE? move. else ENOMEM
//!   FIXED       unmap the target first (it stays unmapped if the rest fails), then move, mapping by mapping; holes do not move
//!   DONTUNMAP   the old range stays mapped: the limits on size count what is moved once more, mapping by mapping
//! ```
//!
//! Source: mremap(2); Linux 6.17 and later `mm/mremap.c` (several VMAs can be moved at once).

use kmem_hal::{PAGE_SIZE, Page, PageRange, VirtAddr};

use crate::env::Env;
use crate::errno::Errno;
use crate::flags::{RemapFlags, VmFlags};
use crate::madvise::Populate;
use crate::merge::Candidate;
use crate::mutants::mutant;
use crate::place::Placement;
use crate::space::{AddressSpace, State};
use crate::vma::{AnonLink, Vma};

/// The arguments of an mremap call after its checks; lengths in whole pages, as bytes.
#[derive(Clone, Copy)]
struct Remap {
    address: u64,
    old: u64,
    new: u64,
    /// Where it must go (`FIXED`).
    target: Option<u64>,
    /// Where it would go best: `DONTUNMAP` without `FIXED`.
    hint: u64,
    flags: RemapFlags,
}

impl<'m, E: Env> AddressSpace<'m, E> {
    /// Changes a mapping's length, and moves it where it must or may; gives its address.
    ///
    /// `new_address` counts only with `FIXED` or `DONTUNMAP`. With `FIXED`, what is at the target is unmapped even if the
    /// call fails later, as in Linux (docs/spec/partial-effects.md).
    ///
    /// Context: task context; as [`Mm::close`](crate::Mm::close) where the last mapping of a file goes.
    ///
    /// # Errors
    ///
    /// Those of mremap(2), checked in Linux's order.
    #[doc(alias = "do_mremap")]
    pub fn mremap(
        &self,
        address: u64,
        old_length: u64,
        new_length: u64,
        flags: RemapFlags,
        new_address: u64,
    ) -> Result<u64, Errno> {
        let align = |length: u64| length.checked_next_multiple_of(PAGE_SIZE).unwrap_or(0);
        let fixed = flags.intersects(RemapFlags::FIXED | RemapFlags::DONTUNMAP);
        let remap = Remap {
            address,
            old: align(old_length),
            new: align(new_length),
            target: flags.contains(RemapFlags::FIXED).then_some(new_address),
            hint: new_address,
            flags,
        };
        let (start, locked) = self.remap_without_pages(&remap, fixed)?;
        if locked && remap.new > remap.old {
            // As in Linux, a page that cannot be had now is no error.
            let _ = self.populate(start + remap.old, remap.new - remap.old, Populate::AsMapped);
        }
        Ok(start)
    }

    /// Changes the mapping; gives where it is, and whether what it grew by is locked. Not inlined, as `mmap_without_pages`.
    #[inline(never)]
    fn remap_without_pages(&self, remap: &Remap, fixed: bool) -> Result<(u64, bool), Errno> {
        let mut state = self.lock();
        self.check_remap(&state, remap, fixed, remap.hint)?;
        let is_locked = |vma: &Vma| vma.flags.contains(VmFlags::LOCKED);
        if fixed {
            let start = self.remap_to(&mut state, remap)?;
            let moved = state.vmas.get(Page::containing(VirtAddr::new(start)));
            return Ok((start, moved.as_ref().is_some_and(is_locked)));
        }
        let vma = self.remapped_vma(&state, remap)?;
        let address = remap.address;
        if remap.new < remap.old {
            self.munmap_locked(&mut state, address + remap.new, remap.old - remap.new)?;
        }
        if remap.new <= remap.old {
            return Ok((address, false));
        }
        let start = self.grow(&mut state, &vma, remap)?;
        Ok((start, is_locked(&vma)))
    }

    fn check_remap(
        &self,
        state: &State<'m, E>,
        remap: &Remap,
        fixed: bool,
        new_address: u64,
    ) -> Result<(), Errno> {
        let task_size = self.layout().task_size;
        if remap.flags.bits() & !RemapFlags::all().bits() != 0
            || !remap.address.is_multiple_of(PAGE_SIZE)
            || remap.new == 0
            || remap.new > task_size
        {
            return Err(Errno::EINVAL);
        }
        if !fixed {
            return Ok(());
        }
        let (from, to) = (remap.address, new_address);
        let overlaps = to < from.saturating_add(remap.old) && from < to.saturating_add(remap.new);
        if new_address > task_size - remap.new
            || !new_address.is_multiple_of(PAGE_SIZE)
            || !remap.flags.contains(RemapFlags::MAYMOVE)
            || remap.flags.contains(RemapFlags::DONTUNMAP) && remap.old != remap.new
            || overlaps
        {
            return Err(Errno::EINVAL);
        }
        if state.vmas.len() + 2 >= state.limits.mappings.saturating_sub(3) {
            return Err(Errno::ENOMEM);
        }
        Ok(())
    }

    /// The one mapping that the call is about (`check_prep_vma`).
    ///
    /// A call that shrinks it in place, or does nothing to it, may go past its end.
    fn remapped_vma(&self, state: &State<'m, E>, remap: &Remap) -> Result<Vma, Errno> {
        let page = Page::containing(VirtAddr::new(remap.address));
        let vma = state.vmas.get(page).ok_or(Errno::EFAULT)?;
        if vma.flags.contains(VmFlags::SEALED) {
            return Err(Errno::EPERM);
        }
        let moves = remap
            .flags
            .intersects(RemapFlags::FIXED | RemapFlags::DONTUNMAP);
        if remap.new <= remap.old && !moves {
            return Ok(vma);
        }
        if remap.old == 0 && !vma.flags.intersects(VmFlags::SHARED | VmFlags::MAYSHARE) {
            return Err(Errno::EINVAL);
        }
        if remap.flags.contains(RemapFlags::DONTUNMAP) && vma.flags.intersects(VmFlags::SPECIAL) {
            return Err(Errno::EINVAL);
        }
        let room = vma.range.last().start().as_u64() + PAGE_SIZE - remap.address;
        if remap.old > room {
            return Err(Errno::EFAULT);
        }
        if remap.new == remap.old {
            return Ok(vma);
        }
        if vma.flags.intersects(VmFlags::SPECIAL) && !mutant!("device-mapping-grows") {
            return Err(Errno::EFAULT);
        }
        let pages = (remap.new - remap.old) / PAGE_SIZE;
        if !state.may_lock_more(pages, vma.flags) {
            return Err(Errno::EAGAIN);
        }
        if !state.may_expand(pages, vma.flags) {
            return Err(Errno::ENOMEM);
        }
        Ok(vma)
    }

    /// Grows in place where the mapping ends at the old length and there is room behind it; else moves.
    fn grow(&self, state: &mut State<'m, E>, vma: &Vma, remap: &Remap) -> Result<u64, Errno> {
        let end = vma.range.last().start().as_u64() + PAGE_SIZE;
        let added = remap.new - remap.old;
        let behind = self.user_range(end, added / PAGE_SIZE);
        let fits = |range: &PageRange| {
            end.checked_add(added)
                .is_some_and(|end| end <= self.layout().task_size)
                && range.last() <= self.layout().search.last()
                && state.vmas.is_free(*range)
        };
        if remap.address + remap.old == end
            && remap.old > 0
            && let Some(range) = behind.filter(fits)
        {
            let mut tail = Candidate::from(vma);
            tail.offset = vma.object_page(vma.range.last()) + 1;
            // What a mapping grows by was not inherited, whatever the mapping was (`vma_merge_extend`).
            let own = |anon| AnonLink {
                singular: true,
                ..anon
            };
            tail.anon = tail.anon.map(own);
            let mut edit = state.vmas.edit()?;
            if vma.flags.contains(VmFlags::ACCOUNT) {
                edit.charge(range.count(), &state.limits)?;
            }
            edit.add(range, tail, true);
            return Ok(remap.address);
        }
        if !remap.flags.contains(RemapFlags::MAYMOVE) {
            return Err(Errno::ENOMEM);
        }
        let target = self.place_moved(state, vma, remap.new, 0)?;
        self.move_part(state, vma, remap.address, remap.old, target, false)?;
        Ok(target.start().as_u64())
    }

    /// Moves to an address that the caller names (or, for `DONTUNMAP` without one, that is chosen).
    fn remap_to(&self, state: &mut State<'m, E>, remap: &Remap) -> Result<u64, Errno> {
        let keep = remap.flags.contains(RemapFlags::DONTUNMAP);
        let Some(target) = remap.target else {
            let vma = self.remapped_vma(state, remap)?;
            // The old range stays: the space grows by all of it.
            if !state.may_expand(remap.old / PAGE_SIZE, vma.flags) {
                return Err(Errno::ENOMEM);
            }
            let range = self.place_moved(state, &vma, remap.new, remap.hint)?;
            self.move_part(state, &vma, remap.address, remap.old, range, keep)?;
            return Ok(range.start().as_u64());
        };
        // Several mappings can be moved at once, as long as none changes its length.
        let several = remap.old == remap.new;
        // What shrinks is cut first, and then what is left moves.
        let shrunk = Remap {
            old: remap.old.min(remap.new),
            ..*remap
        };
        let page = |address: u64| Page::containing(VirtAddr::new(address));
        let first = match several {
            true => state
                .vmas
                .at_or_after(page(remap.address))
                .filter(|vma| vma.range.first().start().as_u64() < remap.address + remap.old)
                .ok_or(Errno::EFAULT)?,
            false => self.remapped_vma(state, &shrunk)?,
        };
        if first.range.first() > page(remap.address) {
            return Err(Errno::EFAULT);
        }
        if !several {
            self.munmap_locked(state, target, remap.new)?;
        }
        if remap.new < remap.old {
            self.munmap_locked(state, remap.address + remap.new, remap.old - remap.new)?;
        }
        if !several {
            let vma = self.remapped_vma(state, &shrunk)?;
            let range = self.target_range(target, remap.new)?;
            self.move_part(
                state,
                &vma,
                remap.address,
                remap.old.min(remap.new),
                range,
                keep,
            )?;
            return Ok(target);
        }
        let mut at = remap.address;
        let end = remap.address + remap.old;
        while let Some(vma) = state
            .vmas
            .at_or_after(page(at))
            .filter(|vma| vma.range.first().start().as_u64() < end)
        {
            let from = at.max(vma.range.first().start().as_u64());
            let until = end.min(vma.range.last().start().as_u64() + PAGE_SIZE);
            if vma.flags.contains(VmFlags::SEALED) {
                return Err(Errno::EPERM);
            }
            if keep && vma.flags.intersects(VmFlags::SPECIAL) {
                return Err(Errno::EINVAL);
            }
            // Holes are not moved: what is mapped at their place stays.
            let to = target + (from - remap.address);
            self.munmap_locked(state, to, until - from)?;
            // What was at the target is gone already, so it makes room; of the old range nothing will go.
            if keep && !state.may_expand((until - from) / PAGE_SIZE, vma.flags) {
                return Err(Errno::ENOMEM);
            }
            let range = self.target_range(to, until - from)?;
            self.move_part(state, &vma, from, until - from, range, keep)?;
            at = until;
            if at >= end {
                break;
            }
        }
        Ok(target)
    }

    /// Where a mapping goes that the caller named no place for.
    fn place_moved(
        &self,
        state: &State<'m, E>,
        vma: &Vma,
        length: u64,
        hint: u64,
    ) -> Result<PageRange, Errno> {
        let placement = Placement {
            hint,
            pages: length / PAGE_SIZE,
            low: false,
            huge_align: vma.is_anonymous(),
        };
        let range = state.place(self.layout(), &placement);
        range.ok_or(Errno::ENOMEM)
    }

    /// The pages of a target that the caller named (`vrm_set_new_addr`).
    fn target_range(&self, target: u64, length: u64) -> Result<PageRange, Errno> {
        let range = self.user_range(target, length / PAGE_SIZE);
        let range = range.ok_or(Errno::EINVAL)?;
        match self.layout().is_too_low(range.first()) {
            true => Err(Errno::EPERM),
            false => Ok(range),
        }
    }

    /// Moves `old` bytes at `address` of a mapping to the free range `target`, which may be longer.
    #[doc(alias = "move_vma")]
    fn move_part(
        &self,
        state: &mut State<'m, E>,
        vma: &Vma,
        address: u64,
        old: u64,
        target: PageRange,
        keep: bool,
    ) -> Result<(), Errno> {
        // What a move may cut (`prep_move_vma`).
        if state.room() <= 3 {
            return Err(Errno::ENOMEM);
        }
        let from = self.user_range(address, old / PAGE_SIZE);
        if from.is_some_and(|from| !vma.may_cut(from)) {
            return Err(Errno::EINVAL);
        }
        let first = Page::containing(VirtAddr::new(address));
        let mut new = Candidate {
            offset: vma.object_page(first),
            ..Candidate::from(vma)
        };
        if vma.is_anonymous() && vma.anon.is_none() {
            // Memory that was never written may forget where it was made, and so merge at its new place.
            new.offset = target.first().number();
        }
        let mut edit = state.vmas.edit()?;
        if vma.flags.contains(VmFlags::ACCOUNT) {
            let gone = if keep { 0 } else { old / PAGE_SIZE };
            edit.charge(target.count() - gone, &state.limits)?;
        }
        if let Some(from) = from {
            let moved = PageRange::with_count(target.first(), from.count()).ok_or(Errno::EINVAL)?;
            // Else a fault may put a page where the leaves are gone already, and nobody looks for it there again.
            edit.lock_range(from);
            self.move_leaves(from, moved)?;
        }
        edit.add(target, new, true);
        if let Some(from) = from.filter(|_| !keep) {
            // The pages are at the target already; this takes the mapping itself away.
            edit.clear(from, || {});
        }
        drop(edit);
        if keep {
            // What stays holds no pages: nothing to lock, and if all of it was moved, no reverse map (`dontunmap_complete`).
            let all = from == Some(vma.range);
            state.vmas.update(first, |vma| {
                vma.flags -= VmFlags::LOCKED_MASK;
                if all {
                    vma.anon = None;
                }
            });
        }
        Ok(())
    }
}
