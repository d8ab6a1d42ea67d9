//! The edit that stays in one leaf: what nearly every `mmap`, `munmap` and `mprotect` is.
//!
//! ```text
//!   old        [aa] . [bbbbbbbb] . [cc]          from = 1, to = 2: the ranges that the cut touches
//!                        └cut┘
//!   new        [aa] . [bb] x [bb] . [cc]         lower rest, new range (if any), upper rest take their places
//!                   ^            ^
//!                  low          high             only gaps between these two pages change
//! ```
//!
//! No range moves: the order of the leaf is turned and the words that change are written. Gap records above are looked at
//! only where the gaps beside the cut are among the largest. A tree that is shared does the same in a copy of the leaf.

use kmem_hal::{AllocError, ObjectAlloc, Page};

use super::{Cut, entry, show};
use crate::node::{Leaf, Node, NodePtr, Raw, saturate};
use crate::path::Path;
use crate::plant::Plant;
use crate::stock::Sharing;
use crate::tree::RangeTree;
use crate::value::{Entry, Value};

/// Free pages of a leaf: between two ranges, below the first, or above the tree's last.
pub(crate) struct Hole {
    /// The position of the range above; the number of ranges where there is none.
    pub(crate) at: usize,
    /// The first free page.
    pub(crate) low: u64,
    /// The page after the last free one.
    pub(crate) end: u64,
    /// Above it is no range in the tree, and so it is on no record (`E2`).
    is_top: bool,
}

impl Hole {
    /// The hole below position `at` of the path's leaf, if the range `first ..= last` lies in it.
    #[inline(always)]
    pub(crate) fn find<const W: usize>(
        path: &Path<W>,
        leaf: &Leaf<'_, W>,
        at: usize,
        (first, last): (u64, u64),
    ) -> Option<Self> {
        let low = free_below(path, leaf, at);
        let is_top = at >= leaf.count();
        let end = if !is_top {
            leaf.range(at).0
        } else if path.is_last() && at == leaf.count() {
            Page::LIMIT
        } else {
            // E1: above the last range the next leaf begins.
            return None;
        };
        (low <= first && last < end).then_some(Self {
            at,
            low,
            end,
            is_top,
        })
    }

    /// The same hole where it lies below position `at` of another leaf.
    pub(crate) fn moved(&self, at: usize) -> Self {
        Self { at, ..*self }
    }

    /// The hole that the last edit left, if the range `first ..= last` lies in it: then nobody need search.
    #[inline(always)]
    pub(crate) fn left_by_last_edit<const W: usize>(
        path: &Path<W>,
        leaf: &Leaf<'_, W>,
        pages: (u64, u64),
    ) -> Option<Self> {
        if path.hole == 0 {
            return None;
        }
        Self::find(path, leaf, path.hole, pages)
    }
}

/// The first page that is free below position `at` of the path's leaf, if any is: the one after the range below.
#[inline(always)]
pub(super) fn free_below<const W: usize>(path: &Path<W>, leaf: &Leaf<'_, W>, at: usize) -> u64 {
    match at.checked_sub(1) {
        Some(below) => leaf.range(below).1 + 1,
        None => path.low(),
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> RangeTree<V, A, S, W> {
    /// Makes the pages of `cut` what it says, where the way to its first page is known.
    ///
    /// The most common edits come first: a range that lies inside another one, a range in a hole, and a whole range that goes
    /// from between two others. There only one gap changes, and no boundary.
    #[inline(always)]
    pub(crate) fn splice_at(
        &self,
        path: &mut Path<W>,
        cut: &Cut,
        removed: &mut dyn FnMut(Entry<V>),
    ) -> Result<(), AllocError> {
        let old = self.leaf_of(path);
        let leaf = old.leaf();
        let pages = (cut.first, cut.last);
        if let Some(value) = cut.value
            && let Some(hole) = Hole::left_by_last_edit(path, &leaf, pages)
            && self.has_room(&leaf, pages)
        {
            return self.insert(path, &hole, pages, value);
        }
        let rank = leaf.rank(cut.first);
        if let Some(at) = rank.checked_sub(1) {
            let (first, last) = leaf.range(at);
            if cut.last <= last {
                let raw = leaf.raw_of(at, (first, last));
                if first < cut.first && cut.last < last {
                    let pieces = 1 + usize::from(cut.value.is_some());
                    if leaf.count() + pieces <= Node::<W>::RANGES && leaf.fits_part(cut.last + 1) {
                        return self.punch(path, old, (at, raw), cut, removed);
                    }
                } else if (first, last) == pages && cut.value.is_none() {
                    if rank < leaf.count()
                        && (leaf.count() > Node::<W>::LEAF_LOW || path.height() == 1)
                    {
                        let gap = leaf.range(rank).0 - free_below(path, &leaf, at);
                        return self.take_out(path, old, (at, raw), gap, removed);
                    }
                } else if cut.value.is_none() {
                    if self.trim(path, old, (at, raw), cut, removed)? {
                        return Ok(());
                    }
                } else if self.overlay(path, (at, raw), cut, removed)? {
                    return Ok(());
                }
            }
        }
        if let Some(hole) = Hole::find(path, &leaf, rank, pages) {
            let Some(value) = cut.value else {
                return Ok(());
            };
            if self.has_room(&leaf, pages) {
                return self.insert(path, &hole, pages, value);
            }
            let done = if leaf.fits(cut.first, cut.last) {
                self.insert_split(path, &hole, pages, value)?
            } else {
                self.insert_apart(path, &hole, pages, value)?
            };
            if done {
                return Ok(());
            }
        }
        self.splice_ranked(path, cut, rank, removed)
    }

    /// Whether one more range can be written into the leaf.
    #[inline(always)]
    pub(crate) fn has_room(&self, leaf: &Leaf<'_, W>, (first, last): (u64, u64)) -> bool {
        leaf.count() < Node::<W>::RANGES && leaf.fits(first, last)
    }

    /// Puts a range into a hole of the path's leaf. There is room.
    #[inline(always)]
    pub(crate) fn insert(
        &self,
        path: &mut Path<W>,
        hole: &Hole,
        (first, last): (u64, u64),
        value: u64,
    ) -> Result<(), AllocError> {
        let old = self.leaf_of(path);
        let (mut leaf, target) = self.writable(old)?;
        leaf.open(hole.at);
        let leaf = self.settled(leaf, target);
        let slot = leaf.slot(hole.at);
        leaf.set_range(slot, first, last);
        leaf.set_value(slot, value);
        self.replaced(path, target);
        path.hole = 0;
        self.count_edit(1, 0);
        self.hole_filled(path, hole, (first, last));
        self.shown(|| ());
        Ok(())
    }

    /// Takes the range at a position out from below another, where `gap` pages are free afterwards.
    #[inline(always)]
    fn take_out(
        &self,
        path: &mut Path<W>,
        old: &Node<W>,
        (at, raw): (usize, Raw),
        gap: u64,
        removed: &mut dyn FnMut(Entry<V>),
    ) -> Result<(), AllocError> {
        let (mut leaf, target) = self.writable(old)?;
        if !self.copies() {
            removed(entry(raw));
        }
        self.close(&mut leaf, at);
        let _ = self.settled(leaf, target);
        self.replaced(path, target);
        path.hole = at;
        self.count_edit(0, 1);
        self.gap_changed(path, 0, gap);
        self.shown(|| removed(entry(raw)));
        Ok(())
    }

    /// Puts what `cut` says into the middle of a range.
    #[inline(always)]
    fn punch(
        &self,
        path: &mut Path<W>,
        old: &Node<W>,
        (at, raw): (usize, Raw),
        cut: &Cut,
        removed: &mut dyn FnMut(Entry<V>),
    ) -> Result<(), AllocError> {
        let whole = V::from_word(raw.value);
        let gone = entry(Raw {
            first: cut.first,
            last: cut.last,
            value: whole.split(cut.first - raw.first).to_word(),
        });
        let above = whole.split(cut.last + 1 - raw.first);
        let (mut leaf, target) = self.writable(old)?;
        if !self.copies() {
            removed(gone);
        }
        let upper = at + 1;
        leaf.open(upper);
        if cut.value.is_some() {
            leaf.open(upper);
        }
        let leaf = self.settled(leaf, target);
        leaf.shorten(leaf.slot(at), raw.last + 1 - cut.first);
        let mut slot = leaf.slot(upper);
        if let Some(value) = cut.value {
            leaf.set_range(slot, cut.first, cut.last);
            leaf.set_value(slot, value);
            slot = leaf.slot(upper + 1);
        }
        leaf.set_range(slot, cut.last + 1, raw.last);
        leaf.set_value(slot, above.to_word());
        self.replaced(path, target);
        if cut.value.is_none() {
            path.hole = upper;
            self.count_edit(2, 1);
            self.gap_changed(path, 0, cut.last + 1 - cut.first);
        } else {
            path.hole = 0;
            self.count_edit(3, 1);
        }
        self.shown(|| removed(gone));
        Ok(())
    }

    /// Takes the pages of `cut` from an end of the range at a position, which is longer; `false`, and nothing has changed, where
    /// that is the leaf's end, or what is left cannot be written.
    #[inline(always)]
    fn trim(
        &self,
        path: &mut Path<W>,
        old: &Node<W>,
        (at, raw): (usize, Raw),
        cut: &Cut,
        removed: &mut dyn FnMut(Entry<V>),
    ) -> Result<bool, AllocError> {
        let leaf = old.leaf();
        let is_upper = raw.first < cut.first;
        let gap = if is_upper {
            if at + 1 == leaf.count() {
                return Ok(false);
            }
            leaf.range(at + 1).0 - cut.first
        } else {
            if !leaf.fits_part(cut.last + 1) {
                return Ok(false);
            }
            cut.last + 1 - free_below(path, &leaf, at)
        };
        let cut_at = if is_upper { cut.first } else { cut.last + 1 };
        let upper = V::from_word(raw.value).split(cut_at - raw.first).to_word();
        let gone = entry(Raw {
            first: cut.first,
            last: cut.last,
            value: if is_upper { upper } else { raw.value },
        });
        let (leaf, target) = self.writable(old)?;
        if !self.copies() {
            removed(gone);
        }
        let leaf = self.as_it_was(leaf, target);
        let slot = leaf.slot(at);
        if is_upper {
            leaf.shorten(slot, raw.last + 1 - cut.first);
        } else {
            leaf.set_range(slot, cut.last + 1, raw.last);
            leaf.set_value(slot, upper);
        }
        self.replaced(path, target);
        path.hole = at + usize::from(is_upper);
        self.count_edit(1, 1);
        self.gap_changed(path, 0, gap);
        self.shown(|| removed(gone));
        Ok(true)
    }

    /// Puts the value of `cut` over a part of the range at a position, or over all of it; `false`, and nothing has changed, where
    /// there is no room for the pieces.
    ///
    /// No hole and no boundary changes.
    #[inline(never)]
    pub(crate) fn overlay(
        &self,
        path: &mut Path<W>,
        (at, raw): (usize, Raw),
        cut: &Cut,
        removed: &mut dyn FnMut(Entry<V>),
    ) -> Result<bool, AllocError> {
        let old = self.leaf_of(path);
        let Some(value) = cut.value else {
            return Ok(false);
        };
        let (has_lower, has_upper) = (raw.first < cut.first, cut.last < raw.last);
        let more = usize::from(has_lower) + usize::from(has_upper);
        let leaf = old.leaf();
        let starts = if has_upper { cut.last + 1 } else { cut.first };
        if leaf.count() + more > Node::<W>::RANGES || !leaf.fits_part(starts) {
            return Ok(false);
        }
        let (mut leaf, target) = self.writable(old)?;
        if !self.copies() {
            show(raw, cut, removed);
        }
        for _ in 0..more {
            leaf.open(at + 1);
        }
        let leaf = self.settled(leaf, target);
        let mut slot = leaf.slot(at);
        if has_lower {
            // Its value stays where it is.
            leaf.set_range(slot, raw.first, cut.first - 1);
            slot = leaf.slot(at + 1);
        }
        leaf.set_range(slot, cut.first, cut.last);
        leaf.set_value(slot, value);
        if has_upper {
            let slot = leaf.slot(at + more);
            let rest = V::from_word(raw.value).split(cut.last + 1 - raw.first);
            leaf.set_range(slot, cut.last + 1, raw.last);
            leaf.set_value(slot, rest.to_word());
        }
        self.replaced(path, target);
        path.hole = 0;
        self.count_edit(1 + more, 1);
        self.shown(|| show(raw, cut, removed));
        Ok(true)
    }

    /// Moves the boundary between the touching ranges at `at` and above it: `cut` is one of them whole and a part of the other. `false`,
    /// and nothing has changed, where it is not so.
    ///
    /// No hole changes and no boundary of the leaf: that is what `mprotect` does to the end of a library's data.
    #[inline(never)]
    pub(crate) fn shift(
        &self,
        path: &mut Path<W>,
        at: usize,
        cut: &Cut,
        removed: &mut dyn FnMut(Entry<V>),
    ) -> Result<bool, AllocError> {
        let old = self.leaf_of(path);
        let leaf = old.leaf();
        let (below, above) = (leaf.raw(at), leaf.raw(at + 1));
        let Some(value) = cut.value else {
            return Ok(false);
        };
        let grown = Raw {
            first: cut.first,
            last: cut.last,
            value,
        };
        let ranges = if cut.first == below.first && above.first <= cut.last && cut.last < above.last
        {
            let rest = V::from_word(above.value).split(cut.last + 1 - above.first);
            let rest = Raw {
                first: cut.last + 1,
                last: above.last,
                value: rest.to_word(),
            };
            [grown, rest]
        } else if cut.last == above.last && below.first < cut.first && cut.first <= below.last {
            let last = cut.first - 1;
            [Raw { last, ..below }, grown]
        } else {
            return Ok(false);
        };
        let touch = below.last + 1 == above.first;
        if !(touch && leaf.fits(cut.first, cut.last) && leaf.fits_part(ranges[1].first)) {
            return Ok(false);
        }
        let shows = |removed: &mut dyn FnMut(Entry<V>)| {
            show(below, cut, removed);
            show(above, cut, removed);
        };
        let (leaf, target) = self.writable(old)?;
        if !self.copies() {
            shows(removed);
        }
        let leaf = self.as_it_was(leaf, target);
        for (at, raw) in [at, at + 1].into_iter().zip(ranges) {
            let slot = leaf.slot(at);
            leaf.set_range(slot, raw.first, raw.last);
            leaf.set_value(slot, raw.value);
        }
        self.replaced(path, target);
        path.hole = 0;
        self.count_edit(2, 2);
        self.shown(|| shows(removed));
        Ok(true)
    }

    /// Lets the range at `at`, which is beside a hole, grow by `pages` into it: it becomes `grown`. The range fits.
    #[inline(always)]
    pub(crate) fn fill(
        &self,
        path: &mut Path<W>,
        at: usize,
        grown: Raw,
        (hole, pages): (&Hole, (u64, u64)),
    ) -> Result<(), AllocError> {
        let old = self.leaf_of(path);
        let (leaf, target) = self.writable(old)?;
        let leaf = self.as_it_was(leaf, target);
        let slot = leaf.slot(at);
        leaf.set_range(slot, grown.first, grown.last);
        leaf.set_value(slot, grown.value);
        self.replaced(path, target);
        path.hole = 0;
        self.count_edit(1, 1);
        self.hole_filled(path, hole, pages);
        self.shown(|| ());
        Ok(())
    }

    /// Makes the ranges on both sides of a hole one, which is `grown`. Its length fits.
    #[inline(always)]
    pub(crate) fn heal(
        &self,
        path: &mut Path<W>,
        hole: &Hole,
        grown: Raw,
    ) -> Result<(), AllocError> {
        let old = self.leaf_of(path);
        let (mut leaf, target) = self.writable(old)?;
        self.close(&mut leaf, hole.at);
        let leaf = self.settled(leaf, target);
        let slot = leaf.slot(hole.at - 1);
        leaf.lengthen(slot, grown.last + 1 - hole.low);
        leaf.set_value(slot, grown.value);
        self.replaced(path, target);
        path.hole = 0;
        self.count_edit(1, 2);
        self.gap_changed(path, hole.end - hole.low, 0);
        self.shown(|| ());
        Ok(())
    }

    /// The path's leaf, to be replaced or written.
    #[inline(always)]
    pub(super) fn leaf_of(&self, path: &Path<W>) -> &Node<W> {
        // SAFETY: E3, E4: the path's nodes are alive, and a leaf that is taken out is kept until its ranges were shown.
        unsafe { path.pointer(0).as_ref() }
    }

    /// The leaf as an edit begins, and the node to write it into: its own, or another where readers may look at it.
    ///
    /// An edit opens and closes positions of the leaf, has it [`settled`](Self::settled), and then writes ranges and values.
    #[inline(always)]
    pub(super) fn writable<'n>(
        &self,
        old: &'n Node<W>,
    ) -> Result<(Leaf<'n, W>, &'n Node<W>), AllocError> {
        let leaf = old.leaf();
        if !self.copies() {
            return Ok((leaf, old));
        }
        let target = self.stock.take(&self.alloc)?;
        // SAFETY: the node is ours until it is published, and alive while it is in the tree.
        Ok((leaf, unsafe { target.as_ref() }))
    }

    /// Takes the range at `position` out of a leaf that is not settled yet.
    #[inline(always)]
    pub(super) fn close(&self, leaf: &mut Leaf<'_, W>, position: usize) {
        let slot = leaf.close(position);
        if !self.copies() {
            leaf.set_unused(slot);
        }
    }

    /// The leaf in the node to write it into, with the positions that it was given; a copy is put in order (`N6`).
    #[inline(always)]
    pub(super) fn settled<'n>(&self, leaf: Leaf<'n, W>, target: &'n Node<W>) -> Leaf<'n, W> {
        if self.copies() {
            return leaf.sorted_into(target);
        }
        leaf.save();
        leaf
    }

    /// [`settled`](Self::settled) where no position was opened or closed.
    #[inline(always)]
    fn as_it_was<'n>(&self, leaf: Leaf<'n, W>, target: &'n Node<W>) -> Leaf<'n, W> {
        if self.copies() {
            return leaf.sorted_into(target);
        }
        leaf
    }

    /// Whether leaves are edited in copies, since readers may look at them.
    #[inline(always)]
    pub(super) fn copies(&self) -> bool {
        S::SHARED && !self.planted.is(Plant::InPlace)
    }

    /// Publishes what was written into a copy, and retires what it is a copy of.
    #[inline(always)]
    pub(super) fn replaced(&self, path: &mut Path<W>, target: &Node<W>) {
        if self.copies() {
            let (old, new) = (path.pointer(0), NodePtr::from(target));
            self.publish(path, 1, new);
            path.replace_leaf(new);
            self.retire(old);
        }
    }

    /// Ends an edit whose books are kept (`E5`): shows what was removed with `shows`, where a copy was edited. Where nothing was copied
    /// that was done before anything changed.
    ///
    /// Nodes are given back afterwards: till then the old leaf is as it was.
    #[inline(always)]
    pub(super) fn shown(&self, shows: impl FnOnce()) {
        if self.copies() {
            shows();
            self.stock.trim(&self.alloc);
        }
    }

    /// Records what is left of a hole after `first ..= last` in it was filled.
    #[inline(always)]
    fn hole_filled(&self, path: &Path<W>, hole: &Hole, (first, last): (u64, u64)) {
        let below = first - hole.low;
        if hole.is_top {
            self.set_top(last + 1);
            self.gap_changed(path, 0, below);
        } else {
            let above = hole.end - last - 1;
            self.gap_changed(path, hole.end - hole.low, below.max(above));
        }
    }

    /// Records that a gap of `old` pages in the path's leaf has become smaller ones, of which `new` is the largest, or
    /// that there is a new one (`E2`).
    #[inline(always)]
    pub(super) fn gap_changed(&self, path: &Path<W>, old: u64, new: u64) {
        if path.height() > 1 {
            let recorded = u64::from(path.recorded_gap());
            if new > recorded {
                path.record_gap(1, saturate(new));
            } else if new < recorded && old >= recorded {
                self.measure_gap(path);
            }
        }
    }

    /// The largest gap of the path's leaf went: what is the largest now?
    #[inline(never)]
    pub(super) fn measure_gap(&self, path: &Path<W>) {
        let gap = path.leaf().largest_gap(path.low());
        path.record_gap(1, saturate(gap));
    }
}
