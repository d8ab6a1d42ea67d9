//! The search without a way back, which nearly every `mmap` needs: one descent, one leaf.

use kmem_hal::{ObjectAlloc, Page, PageRange};

use super::GapRequest;
use crate::node::{Leaf, Node, from_word, saturate};
use crate::path::HEIGHT_MASK;
use crate::stock::Sharing;
use crate::tree::RangeTree;
use crate::value::Value;

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> RangeTree<V, A, S, W> {
    /// [`find_gap_up`](Self::find_gap_up) without a way back: `None` where the first gap that is large enough by the
    /// records does not serve, because the limits clip it or the alignment wastes it.
    #[inline]
    pub(super) fn greedy_up(&self, request: &GapRequest) -> Option<PageRange> {
        let root = self.root_word();
        let mut node = from_word::<W>(root)?;
        let from = request.limits.first().number();
        let need = request.at_least;
        let small = saturate(need);
        let mut low = 0;
        for _ in 1..root & HEIGHT_MASK {
            // SAFETY: nobody edits while `&self` of this tree is out, so the nodes stay.
            let inner = unsafe { node.as_ref() };
            // Below the limit only in the first child, as a rule.
            let first = if low < from && inner.last_of(0, u64::MAX) < from {
                inner.child_for(from)
            } else {
                0
            };
            let slot = inner.first_with_gap(first, small)?;
            low = inner.first_of(slot, low);
            node = inner.child(slot)?;
        }
        // SAFETY: as above.
        let leaf = unsafe { node.as_ref() }.leaf();
        let start = if low < from {
            leaf.first_at_or_after(from)
        } else {
            0
        };
        if start == leaf.count() {
            return None;
        }
        let end = request.limits.last().number() + 1;
        let serves = |free: u64, above: u64| {
            let above = above.min(end);
            if above.saturating_sub(free) < need {
                return None;
            }
            // SAFETY: `need` is not 0, so the gap has a page; its ends are pages.
            request.place_low(unsafe { PageRange::from_numbers_unchecked(free, above - 1) })
        };
        // The gap below the first range that counts; none where the limit lies inside that range.
        let (free, first) = (low.max(from), leaf.range(start).0);
        if first > free
            && let Some(place) = serves(free, first)
        {
            return Some(place);
        }
        let mut gaps = leaf.gaps_up(start, need);
        gaps.find_map(|(free, above)| serves(free, above))
    }

    /// [`find_gap_down`](Self::find_gap_down) without a way back, as [`greedy_up`](Self::greedy_up).
    #[inline]
    pub(super) fn greedy_down(&self, request: &GapRequest) -> Option<PageRange> {
        if let Some(place) = self.above_all(request, false) {
            return Some(place);
        }
        let root = self.root_word();
        let mut node = from_word::<W>(root)?;
        let to = request.limits.last().number();
        let small = saturate(request.at_least);
        // The pages above the last range were seen to: what is below is clipped only by a limit below its end.
        let mut at_limit = to + 1 < self.top();
        let mut low = 0;
        for _ in 1..root & HEIGHT_MASK {
            // SAFETY: nobody edits while `&self` of this tree is out, so the nodes stay.
            let inner = unsafe { node.as_ref() };
            let last = if at_limit {
                inner.child_for(to)
            } else {
                Node::<W>::CHILDREN - 1
            };
            let slot = inner.last_with_gap(last + 1, small)?;
            at_limit &= slot == last;
            low = inner.first_of(slot, low);
            node = inner.child(slot)?;
        }
        // SAFETY: as above.
        let leaf = unsafe { node.as_ref() }.leaf();
        let stop = if at_limit {
            leaf.rank(to)
        } else {
            leaf.count()
        };
        Self::highest(request, leaf, stop, low)
    }

    /// A place in the free pages above the last range.
    #[inline(always)]
    fn above_all(&self, request: &GapRequest, up: bool) -> Option<PageRange> {
        let last = request.limits.last();
        if last.number() < self.top() {
            return None;
        }
        let free = PageRange::new(
            Page::from_number(self.top()).max(request.limits.first()),
            last,
        )?;
        if free.count() < request.at_least {
            None
        } else if up {
            request.place_low(free)
        } else {
            request.place_high(free)
        }
    }

    /// The highest place in the gaps below and between the ranges `.. stop` of a leaf that begins at `low`, and above the
    /// last of them.
    #[inline(always)]
    fn highest(
        request: &GapRequest,
        leaf: Leaf<'_, W>,
        stop: usize,
        low: u64,
    ) -> Option<PageRange> {
        let (from, to) = (
            request.limits.first().number(),
            request.limits.last().number(),
        );
        let need = request.at_least;
        let serves = |free: u64, end: u64| {
            let free = free.max(from);
            if end.saturating_sub(free) < need {
                return None;
            }
            // SAFETY: `need` is not 0, so the gap has a page; its ends are pages.
            request.place_high(unsafe { PageRange::from_numbers_unchecked(free, end - 1) })
        };
        let above = if stop < leaf.count() {
            leaf.range(stop).0
        } else {
            leaf.end() + 1
        };
        let mut end = above.min(to + 1);
        if let Some(slot) = stop.checked_sub(1) {
            // The gap above the last range that counts; none where the limit lies inside that range.
            let last = leaf.range(slot).1;
            if end > last
                && let Some(place) = serves(last + 1, end)
            {
                return Some(place);
            }
            let mut gaps = leaf.gaps_down(stop, need);
            if let Some(place) = gaps.find_map(|(free, end)| serves(free, end)) {
                return Some(place);
            }
            end = end.min(leaf.range(0).0);
        }
        if end > low { serves(low, end) } else { None }
    }
}
