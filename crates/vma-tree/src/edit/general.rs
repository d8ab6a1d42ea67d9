//! The edit of one leaf that is none of the common ones: several ranges, the leaf's ends, too many ranges or too few.
//!
//! What it cannot write into the leaf it has split ([`split`](super::split)) or rebuilt ([`rebuild`](super::rebuild)).

use kmem_hal::{AllocError, ObjectAlloc};

use super::leaf::free_below;
use super::{Cut, Pieces, show};
use crate::node::{Node, Raw};
use crate::path::Path;
use crate::stock::Sharing;
use crate::tree::RangeTree;
use crate::value::{Entry, Value};

/// What became of an edit within one leaf.
enum Rewritten {
    Done,
    /// The leaf was split for it: it is to be made in the half that the path leads to now.
    Split,
    /// Nothing: the leaf cannot hold what would become of it, or would hold too little.
    Not,
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> RangeTree<V, A, S, W> {
    /// [`splice_at`](Self::splice_at) for the rest of the cases: `rank` ranges begin at or below the cut's first page.
    #[inline(never)]
    pub(super) fn splice_ranked(
        &self,
        path: &mut Path<W>,
        cut: &Cut,
        mut rank: usize,
        removed: &mut dyn FnMut(Entry<V>),
    ) -> Result<(), AllocError> {
        loop {
            let touched = path.leaf().touched(rank, cut.first, cut.last);
            if self.edit_at(path, cut, touched, removed)? {
                return Ok(());
            }
            // In half of the leaf.
            rank = path.leaf().rank(cut.first);
        }
    }

    /// Makes the pages of `cut`, which touches the ranges `from .. to` of the path's leaf first, what it says; `false` where the
    /// leaf was split for it, and the edit is to be made in the half that the path leads to now.
    #[inline(always)]
    fn edit_at(
        &self,
        path: &mut Path<W>,
        cut: &Cut,
        (from, to): (usize, usize),
        removed: &mut dyn FnMut(Entry<V>),
    ) -> Result<bool, AllocError> {
        let leaf = path.leaf();
        // E1: the pages between the last range of a leaf and its boundary are none, but in the tree's last leaf.
        if to == leaf.count() && cut.last > leaf.end() && !path.is_last() {
            if self.grow_over_end(path, from, cut, removed) {
                return Ok(true);
            }
            self.splice_across(path, from, cut, removed)?;
            return Ok(true);
        }
        self.edit_leaf(path, cut, (from, to), removed)
    }

    /// The same where the cut touches the ranges `from .. to` of the path's leaf and no other.
    #[inline(always)]
    fn edit_leaf(
        &self,
        path: &mut Path<W>,
        cut: &Cut,
        touched: (usize, usize),
        removed: &mut dyn FnMut(Entry<V>),
    ) -> Result<bool, AllocError> {
        match self.rewrite_leaf(path, cut, touched, removed)? {
            Rewritten::Done => Ok(true),
            Rewritten::Split => Ok(false),
            Rewritten::Not => {
                self.rebuild_leaf(path, cut, touched, removed)?;
                Ok(true)
            }
        }
    }

    /// [`edit_leaf`](Self::edit_leaf) within the leaf, or a half of it.
    ///
    /// A call of its own, so that what reaches beyond the leaf does not keep its stack.
    #[inline(never)]
    fn rewrite_leaf(
        &self,
        path: &mut Path<W>,
        cut: &Cut,
        (from, to): (usize, usize),
        removed: &mut dyn FnMut(Entry<V>),
    ) -> Result<Rewritten, AllocError> {
        let old = self.leaf_of(path);
        let leaf = old.leaf();
        let touched = to - from;
        // The lowest and the highest range that is touched, and the largest gap between those that are.
        let (mut lowest, mut highest, mut old_gap) = ((u64::MAX, 0), (u64::MAX, 0), 0);
        if touched > 0 {
            lowest = leaf.range(from);
            highest = lowest;
            for slot in from + 1..to {
                let next = leaf.range(slot);
                old_gap = old_gap.max(next.0 - highest.1 - 1);
                highest = next;
            }
        }
        let has_lower = touched > 0 && lowest.0 < cut.first;
        let has_upper = touched > 0 && highest.1 > cut.last;
        let has_middle = cut.value.is_some();
        let pieces = usize::from(has_lower) + usize::from(has_middle) + usize::from(has_upper);
        if touched + pieces == 0 {
            return Ok(Rewritten::Done);
        }
        let count = leaf.count() + pieces - touched;
        let enough = pieces >= touched || count >= Node::<W>::LEAF_LOW || path.height() == 1;
        let codes = (!has_middle || leaf.fits(cut.first, cut.last))
            && (!has_upper || leaf.fits_part(cut.last + 1));
        if !(enough && codes && count.wrapping_sub(1) < Node::<W>::RANGES) {
            if codes && count > Node::<W>::RANGES && self.split(path, cut, (from, to))? {
                return Ok(Rewritten::Split);
            }
            return Ok(Rewritten::Not);
        }
        // The pages between which gaps change, and the gaps there. A rest keeps the gap beside it as it is.
        let mut new_gap = 0;
        let mut low = cut.first;
        if !has_lower {
            low = free_below(path, &leaf, from);
            let end = if touched > 0 { lowest.0 } else { cut.first };
            old_gap = old_gap.max(end - low);
        }
        let mut high = cut.last + 1;
        let (mut lowered, mut top) = (None, None);
        if !has_upper {
            let end = if touched > 0 { highest.1 } else { cut.last } + 1;
            if to < leaf.count() {
                high = leaf.range(to).0;
                old_gap = old_gap.max(high - end);
            } else {
                // The boundary above the leaf is the end of its last range (E1), and no gap lies above that (E2).
                high = if has_middle { cut.last + 1 } else { low };
                if path.is_last() {
                    top = Some(high);
                } else if high < end {
                    lowered = Some((high - 1, end));
                }
            }
        }
        if touched == 0 && to < leaf.count() {
            old_gap = high - low;
        }
        if has_middle {
            new_gap = new_gap.max(cut.first - low).max(high - cut.last - 1);
        } else {
            new_gap = high - low;
        }
        let (mut settling, target) = self.writable(old)?;
        let shows = |removed: &mut dyn FnMut(Entry<V>)| {
            for raw in leaf.raws(from, to) {
                show(raw, cut, removed);
            }
        };
        if !self.copies() {
            shows(removed);
        }
        let upper_value = if has_upper {
            V::from_word(leaf.value(to - 1))
                .split(cut.last + 1 - highest.0)
                .to_word()
        } else {
            0
        };
        let mut at = from + usize::from(has_lower);
        for _ in touched..pieces {
            settling.open(at);
        }
        for _ in pieces..touched {
            self.close(&mut settling, at);
        }
        let settled = self.settled(settling, target);
        if has_lower {
            // Its value stays where it is.
            settled.set_range(settled.slot(from), lowest.0, cut.first - 1);
        }
        if let Some(value) = cut.value {
            let slot = settled.slot(at);
            settled.set_range(slot, cut.first, cut.last);
            settled.set_value(slot, value);
            at += 1;
        }
        if has_upper {
            let slot = settled.slot(at);
            settled.set_range(slot, cut.last + 1, highest.1);
            settled.set_value(slot, upper_value);
        }
        self.replaced(path, target);
        path.hole = if has_middle {
            0
        } else {
            from + usize::from(has_lower)
        };
        self.count_edit(pieces, touched);
        if let Some(top) = top {
            self.set_top(top);
        }
        self.gap_changed(path, old_gap, new_gap);
        if let Some(boundary) = lowered {
            self.lower(path, boundary);
        }
        self.shown(|| shows(removed));
        Ok(Rewritten::Done)
    }

    /// [`edit_leaf`](Self::edit_leaf), to its end.
    #[inline(never)]
    pub(crate) fn edit_merged(
        &self,
        path: &mut Path<W>,
        cut: &Cut,
        touched: (usize, usize),
        removed: &mut dyn FnMut(Entry<V>),
    ) -> Result<(), AllocError> {
        if self.edit_leaf(path, cut, touched, removed)? {
            return Ok(());
        }
        let rank = path.leaf().rank(cut.first);
        self.splice_ranked(path, cut, rank, removed)
    }

    /// Moves the boundary above the path's leaf down to `last`; `above`, the page above the old one, is the next leaf's.
    #[inline(never)]
    fn lower(&self, path: &mut Path<W>, (last, above): (u64, u64)) {
        self.move_boundary(path, 1, last);
        path.set_high(last);
        self.refresh_gap(above);
    }

    /// [`split_leaf`](Self::split_leaf), out of line.
    #[inline(never)]
    fn split(
        &self,
        path: &mut Path<W>,
        cut: &Cut,
        touched: (usize, usize),
    ) -> Result<bool, AllocError> {
        Ok(self.split_leaf(path, cut.first, touched)?.is_some())
    }

    /// The same edit where the leaf cannot hold what becomes of it, or would hold too little.
    #[inline(never)]
    fn rebuild_leaf(
        &self,
        path: &mut Path<W>,
        cut: &Cut,
        (from, to): (usize, usize),
        removed: &mut dyn FnMut(Entry<V>),
    ) -> Result<(), AllocError> {
        let pieces = Self::pieces(path, from, (path, to), cut);
        let path = core::mem::replace(path, Path::unset());
        self.rebuild((&path, from), (&path, to), &pieces, cut, removed)
    }

    /// Lets the last range of the path's leaf, at `from`, grow over the leaf's end into the hole there, which is the next leaf's: a heap
    /// does that again and again. `false`, and nothing has changed, where `cut` is no such edit.
    ///
    /// Not under readers, who would see the range in one moment and its new pages in another.
    #[inline(never)]
    fn grow_over_end(
        &self,
        path: &mut Path<W>,
        from: usize,
        cut: &Cut,
        removed: &mut dyn FnMut(Entry<V>),
    ) -> bool {
        let leaf = path.leaf();
        let Some(value) = cut.value else {
            return false;
        };
        if S::SHARED || from + 1 != leaf.count() || !leaf.fits(cut.first, cut.last) {
            return false;
        }
        let old = leaf.raw(from);
        // SAFETY: E3: nobody else edits; nodes in the tree are alive (K1).
        let next = unsafe { Path::<W>::new(self.root_word(), path.high() + 1) };
        let is_free = next.is_some_and(|next| cut.last < next.leaf().range(0).0);
        if old.first != cut.first || !is_free {
            return false;
        }
        show(old, cut, removed);
        let slot = leaf.slot(from);
        leaf.set_range(slot, cut.first, cut.last);
        leaf.set_value(slot, value);
        // E1: the boundary is the end of the last range; the hole above it is the next leaf's.
        self.move_boundary(path, 1, cut.last);
        path.set_high(cut.last);
        path.hole = 0;
        self.count_edit(1, 1);
        self.refresh_gap(cut.last + 1);
        true
    }

    /// The edit of a cut that ends beyond the leaf in which it begins.
    #[inline(never)]
    fn splice_across(
        &self,
        path: &mut Path<W>,
        from: usize,
        cut: &Cut,
        removed: &mut dyn FnMut(Entry<V>),
    ) -> Result<(), AllocError> {
        let mut right = Path::unset();
        // SAFETY: E3: nobody else edits; nodes in the tree are alive (K1).
        if !unsafe { right.find(self.root_word(), cut.last) } {
            return Ok(());
        }
        let to = right.leaf().rank(cut.last);
        let pieces = Self::pieces(path, from, (&right, to), cut);
        let left = core::mem::replace(path, Path::unset());
        self.rebuild((&left, from), (&right, to), &pieces, cut, removed)
    }

    /// What takes the place of the ranges from slot `from` of the left leaf up to (not including) `to` of the right one.
    fn pieces(left: &Path<W>, from: usize, (right, to): (&Path<W>, usize), cut: &Cut) -> Pieces {
        let mut pieces = Pieces::new();
        if from < left.leaf().count() {
            let raw = left.leaf().raw(from);
            if raw.first < cut.first {
                pieces.push(Raw {
                    last: cut.first - 1,
                    ..raw
                });
            }
        }
        if let Some(value) = cut.value {
            pieces.push(Raw {
                first: cut.first,
                last: cut.last,
                value,
            });
        }
        if let Some(at) = to.checked_sub(1) {
            let raw = right.leaf().raw(at);
            if raw.last > cut.last {
                pieces.push(Raw {
                    first: cut.last + 1,
                    last: raw.last,
                    value: V::from_word(raw.value)
                        .split(cut.last + 1 - raw.first)
                        .to_word(),
                });
            }
        }
        pieces
    }
}
