//! Changes of a space's VMAs that cannot fail: ranges that are added, cut, changed and taken away, and merged as Linux merges.
//!
//! ```text
//!   VmaSet::edit ── memory for the worst case ──> Edit ── split, add, modify, clear ──> dropped: charges settled
//!        └─ ENOMEM: nothing has changed
//! ```
//!
//! Each step write-locks the VMAs that it changes, and a new one before the tree leads to it (`I4` of the set).
//!
//! Invariants
//! - `E1`: an edit makes at most [`STOCK`] VMAs and [`STORES`] stores, or those that it was asked for, whatever it merges and cuts.
//! - `E2`: which neighbours a range joins is `merge.rs`'s to say; here is how they become one.
//!
//! Source: Linux `mm/vma.c` (`vma_merge_new_range`, `vma_modify`, `split_vma`, `vms_clear_ptes`).

use kmem_hal::{Page, PageRange};
use kmem_vma_tree::{Reserved, Shared, SpaceSeq};

use crate::counters::Ledger;
use crate::env::Env;
use crate::errno::Errno;
use crate::flags::VmFlags;
use crate::handle::Handle;
use crate::limits::Limits;
use crate::merge::{Candidate, joins};
use crate::mm::Mm;
use crate::mutants::mutant;
use crate::vma::{Label, Vma};
use crate::vma_memory::{VmaMemory, VmaStock};
use crate::vma_set::{Found, GraceOf, NodesOf, VmaId, discard, hold, read, start_write};

/// VMAs that an edit may need: two splits and a new one.
pub(crate) const STOCK: usize = 3;
/// Stores that any edit may need.
pub(crate) const STORES: usize = 8;
/// Stores of [`Edit::insert`], and of an [`Edit::add`] that merges on both sides.
pub(crate) const STORES_TO_ADD: usize = 2;
/// Stores of [`Edit::clear`]: two splits and an erasure.
pub(crate) const STORES_TO_CLEAR: usize = 3;
/// Stores of [`Edit::modify`]: what is given away is reshaped, and merged on both sides.
pub(crate) const STORES_TO_MODIFY: usize = 4;

/// Changes to a set that cannot fail.
pub(crate) struct Edit<'t, 'm, E: Env> {
    pub mm: &'m Mm<'m, E>,
    pub seq: &'m SpaceSeq,
    pub tree: Reserved<'t, Handle, NodesOf<'m, E>, Shared<GraceOf<'m, E>>>,
    pub stock: &'t mut VmaStock,
    pub ledger: &'t mut Ledger,
}

impl<E: Env> Drop for Edit<'_, '_, E> {
    fn drop(&mut self) {
        self.ledger.settle(self.mm.commit());
    }
}

impl<E: Env> Edit<'_, '_, E> {
    fn find(&self, page: Page) -> Option<Found> {
        read(self.tree.get(page)?.value)
    }

    /// Write-locks a VMA, before it is changed or the tree says something else of its pages (`I4`).
    fn lock(&self, id: VmaId) {
        start_write(self.mm, self.seq, Handle::of_vma(id.0));
    }

    /// Write-locks what lies in a range: from here on no fault is at work there, nor puts a page there, before the call ends.
    pub fn lock_range(&mut self, range: PageRange) {
        for entry in self.tree.range(range) {
            start_write(self.mm, self.seq, entry.value);
        }
    }

    /// Says that a range is a VMA's, or nobody's. VMAs that end by this are write-locked.
    // Not inlined, as some others here: a caller's stack is that of its deepest call, and the copies of VMAs that are gone by then are not on it.
    #[inline(never)]
    fn put(&mut self, range: PageRange, id: Option<VmaId>) {
        let (mm, seq, stock, ledger) = (self.mm, self.seq, &mut *self.stock, &mut *self.ledger);
        let kept = id.map(|id| Handle::of_vma(id.0));
        self.tree.store(range, kept, &mut |entry| {
            // A piece of the VMA itself, or of one that another call of the edit cut, is no VMA that ends.
            let ends = read(entry.value).is_some_and(|(_, vma)| vma.range == entry.range);
            if kept != Some(entry.value) && ends {
                debug_assert!(
                    entry.value.vma().is_none_or(|memory| {
                        // SAFETY: `I1`.
                        unsafe { VmaMemory::lock_of(memory) }.is_write_locked(seq)
                    }),
                    "a VMA ends that is not locked"
                );
                discard(mm, stock, ledger, entry.value);
            }
        });
    }

    /// Promises `pages` more for the change that follows; an edit that ends without it takes the promise back.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`] beyond what may be promised.
    pub fn charge(&mut self, pages: u64, limits: &Limits) -> Result<(), Errno> {
        let total = self.ledger.counters.total;
        self.mm.commit().charge(pages, total, limits.is_admin)?;
        self.ledger.note_charge(pages);
        Ok(())
    }

    #[inline(never)]
    fn write(&mut self, id: VmaId, vma: &Vma) {
        self.lock(id);
        // SAFETY: M2: write-locked, and the set is borrowed exclusively by the edit.
        let before = unsafe {
            let before = VmaMemory::read(id.0);
            VmaMemory::write(id.0, *vma);
            before
        };
        self.ledger.counters.add(vma);
        let Some(before) = before else { return };
        self.ledger.counters.remove(&before);
        if before.label != vma.label {
            if let Label::Named(name) = vma.label {
                self.mm.names().get(name);
            }
            if let Label::Named(name) = before.label {
                self.mm.names().put(name);
            }
        }
    }

    /// Adds a VMA where nothing is.
    #[inline(never)]
    pub fn insert(&mut self, vma: Vma) {
        let Some(memory) = self.stock.take() else {
            unreachable!("an edit makes at most {STOCK} VMAs")
        };
        let id = VmaId(memory);
        // Before the tree leads to it: what is still mapped in its range is not its own.
        self.lock(id);
        // SAFETY: M2: write-locked, and no tree leads to it.
        unsafe { VmaMemory::write(memory, vma) };
        self.ledger.counters.add(&vma);
        hold(self.mm, &vma, self.ledger);
        self.put(vma.range, Some(id));
    }

    /// As [`split`](Self::split), where a cut takes one of the mappings that there is room for.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`] where there is none; [`Errno::EINVAL`] for what the kernel put there.
    #[doc(alias = "split_vma")]
    fn split_within(&mut self, page: Page, room: &mut usize) -> Result<(), Errno> {
        let found = self.find(page);
        if let Some((_, vma)) = found.filter(|(_, vma)| vma.range.first() < page) {
            match room.checked_sub(1) {
                Some(left) => *room = left,
                None if mutant!("cut-beyond-the-limit") => {}
                None => return Err(Errno::ENOMEM),
            }
            if vma.is_kernels() {
                return Err(Errno::EINVAL);
            }
            self.split(page);
        }
        Ok(())
    }

    /// Cuts the VMA that covers `page` so that one begins there.
    #[inline(never)]
    pub fn split(&mut self, page: Page) {
        let Some((id, vma)) = self.find(page) else {
            return;
        };
        let Some(last_below) = page
            .checked_sub(1)
            .filter(|below| vma.range.contains(*below))
        else {
            return;
        };
        let (Some(below), Some(above)) = (
            PageRange::new(vma.range.first(), last_below),
            PageRange::new(page, vma.range.last()),
        ) else {
            return;
        };
        self.write(id, &vma.part(below));
        self.insert(vma.part(above));
    }

    /// Cuts what crosses an edge of the range.
    pub fn split_around(&mut self, range: PageRange) {
        self.split(range.first());
        if let Some(after) = range.last().checked_add(1) {
            self.split(after);
        }
    }

    /// Removes everything in the range, cutting what sticks out. `empty` takes the pages away, and their translations from every
    /// processor: while the mappings are locked and hold their objects still, so that no object ends whose memory somebody reaches.
    #[doc(alias = "unmap_region")]
    pub fn clear(&mut self, range: PageRange, empty: impl FnOnce()) {
        self.split_around(range);
        let mut any = false;
        for entry in self.tree.range(range) {
            start_write(self.mm, self.seq, entry.value);
            any = true;
        }
        if any {
            empty();
            self.put(range, None);
        }
    }

    /// Gives a VMA another range and, with it, other contents; the range may only take free pages.
    #[inline(never)]
    fn reshape(&mut self, id: VmaId, old: PageRange, vma: &Vma) {
        let range = vma.range;
        self.write(id, vma);
        for gone in difference(old, range).into_iter().flatten() {
            self.put(gone, None);
        }
        self.put(range, Some(id));
    }

    /// Lets the VMA at `page` begin lower: a stack grew. The pages below it are free.
    pub fn grow_down(&mut self, page: Page, range: PageRange) {
        if let Some((id, mut vma)) = self.find(page) {
            let old = vma.range;
            let added = old.first().number() - range.first().number();
            vma.offset = vma.offset.wrapping_sub(added);
            vma.range = range;
            self.reshape(id, old, &vma);
        }
    }

    /// Adds a range where nothing is, merged with its neighbours as Linux merges; `right` allows the one after.
    #[doc(alias = "vma_merge_new_range")]
    pub fn add(&mut self, range: PageRange, new: Candidate, right: bool) {
        match self.joined(range, &new, None, right) {
            (None, None) => self.insert(new.over(range)),
            (previous, next) => self.merge(range, &new, previous, next),
        }
    }

    /// Gives a part of one VMA other flags, merged with the VMA's neighbours or cut out of it as Linux does.
    ///
    /// `range` lies in one VMA. There may be `room` VMAs more.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`] where there is no room for a cut; one that there was room for stays, as in Linux. [`Errno::EINVAL`] for a part of what
    /// the kernel put there.
    #[doc(alias = "vma_modify_flags")]
    pub fn modify(
        &mut self,
        range: PageRange,
        mut room: usize,
        change: impl FnOnce(&mut Candidate),
    ) -> Result<(), Errno> {
        let Some((id, mut new)) = self.candidate(range) else {
            return Ok(());
        };
        change(&mut new);
        match self.joined(range, &new, Some(id), true) {
            (None, None) => {
                self.split_within(range.first(), &mut room)?;
                if let Some(after) = range.last().checked_add(1) {
                    self.split_within(after, &mut room)?;
                }
                self.relabel(range.first(), &new);
            }
            (previous, next) => {
                self.give_away(id, range);
                self.merge(range, &new, previous, next);
            }
        }
        Ok(())
    }

    /// The VMA that has a range, and what the range would be as a VMA of its own.
    #[inline(never)]
    fn candidate(&self, range: PageRange) -> Option<(VmaId, Candidate)> {
        let (id, vma) = self.find(range.first())?;
        Some((id, Candidate::from(&vma.part(range))))
    }

    /// Gives the VMA at `page` the flags and the label of `new`.
    #[inline(never)]
    fn relabel(&mut self, page: Page, new: &Candidate) {
        if let Some((id, mut vma)) = self.find(page) {
            (vma.flags, vma.label) = (new.flags, new.label);
            self.write(id, &vma);
        }
    }

    /// The neighbours that a range joins, were it a VMA like `new`: none of them is `but`, and there is one after it only where `right` says so.
    #[inline(never)]
    fn joined(
        &self,
        range: PageRange,
        new: &Candidate,
        but: Option<VmaId>,
        right: bool,
    ) -> (Option<VmaId>, Option<VmaId>) {
        let other = |page: Option<Page>| {
            let found = page.and_then(|page| self.find(page));
            found.filter(|(id, _)| Some(*id) != but)
        };
        let previous = other(range.first().checked_sub(1));
        let next = other(range.last().checked_add(1).filter(|_| right));
        let vma = |found: &Option<Found>| found.map(|(_, vma)| vma);
        let joins = joins(
            new,
            range.count(),
            vma(&previous).as_ref(),
            vma(&next).as_ref(),
        );
        let id = |found: Option<Found>| found.map(|(id, _)| id);
        (
            id(previous).filter(|_| joins.left),
            id(next).filter(|_| joins.right),
        )
    }

    /// Lets a free range become part of the neighbours that it joins; there is at least one.
    fn merge(
        &mut self,
        range: PageRange,
        new: &Candidate,
        previous: Option<VmaId>,
        next: Option<VmaId>,
    ) {
        let Some(id) = previous.or(next) else {
            return;
        };
        let Some((old, gone, vma)) = self.merged(range, new, previous, next) else {
            return;
        };
        if let (Some(next), Some(gone)) = (next, gone) {
            self.lock(next);
            self.put(gone, None);
        }
        self.reshape(id, old, &vma);
    }

    /// What becomes of the neighbours that a range joins: the range of the one that is kept, that of the one that ends, and the VMA
    /// that comes of them.
    #[inline(never)]
    fn merged(
        &self,
        range: PageRange,
        new: &Candidate,
        previous: Option<VmaId>,
        next: Option<VmaId>,
    ) -> Option<(PageRange, Option<PageRange>, Vma)> {
        let previous = previous.and_then(|id| read(Handle::of_vma(id.0)));
        let next = next.and_then(|id| read(Handle::of_vma(id.0)));
        let (_, kept) = previous.or(next)?;
        let gone = match (previous, next) {
            (Some(_), Some((_, next))) => Some(next.range),
            _ => None,
        };
        let range = next.map_or(range, |(_, next)| range.hull(next.range));
        let others = next.map_or(new.flags, |(_, next)| new.flags | next.flags);
        let flags = kept.flags | others & VmFlags::STICKY;
        let anon = kept
            .anon
            .or(new.anon)
            .or(next.and_then(|(_, next)| next.anon));
        let (range, offset) = match previous {
            Some(_) => (kept.range.hull(range), kept.offset),
            None => (range, new.offset),
        };
        let vma = Vma {
            range,
            offset,
            anon,
            flags,
            ..kept
        };
        Some((kept.range, gone, vma))
    }

    /// Takes an end of a VMA, or all of it, away from it.
    #[inline(never)]
    fn give_away(&mut self, id: VmaId, range: PageRange) {
        let Some((_, vma)) = read(Handle::of_vma(id.0)) else {
            return;
        };
        match difference(vma.range, range) {
            [None, None] => {
                self.lock(id);
                self.put(vma.range, None);
            }
            [Some(rest), _] | [_, Some(rest)] => self.reshape(id, vma.range, &vma.part(rest)),
        }
    }
}

/// The parts of `of` below and above `without`.
fn difference(of: PageRange, without: PageRange) -> [Option<PageRange>; 2] {
    let below = without
        .first()
        .checked_sub(1)
        .and_then(|last| PageRange::new(of.first(), last.min(of.last())))
        .filter(|_| of.first() < without.first());
    let above = without
        .last()
        .checked_add(1)
        .and_then(|first| PageRange::new(first.max(of.first()), of.last()))
        .filter(|_| of.last() > without.last());
    [below, above]
}
