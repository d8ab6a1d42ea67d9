//! The search of every gap that is large enough by the records, until one serves: with a predicate, badly aligned, or
//! clipped by the limits.
//!
//! It keeps the way from the root, and at each level which children are still to be looked into.

use core::mem::MaybeUninit;

use kmem_hal::{ObjectAlloc, Page, PageRange};

use super::{Gap, GapRequest, Usable};
use crate::edit::entry;
use crate::node::{Leaf, Node, NodePtr, from_word, saturate};
use crate::path::{HEIGHT_MASK, MAX_HEIGHT};
use crate::stock::Sharing;
use crate::tree::RangeTree;
use crate::value::Value;

/// A search under way.
pub(super) struct Search<'s, 'u, V> {
    pub(super) request: &'s GapRequest,
    pub(super) usable: Option<Usable<'u, V>>,
    pub(super) up: bool,
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> RangeTree<V, A, S, W> {
    pub(super) fn search(&self, mut search: Search<'_, '_, V>) -> Option<PageRange> {
        let root = self.root_word();
        let Some(node) = from_word::<W>(root) else {
            return search.consider(self, (0, Page::MAX.number()), None);
        };
        let above = (self.top(), Page::MAX.number());
        if !search.up
            && above.0 <= above.1
            && let Some(place) = search.consider(self, above, None)
        {
            return Some(place);
        }
        if let Some(place) = self.search_below(&mut search, root, node) {
            return Some(place);
        }
        if search.up && above.0 <= above.1 {
            return search.consider(self, above, None);
        }
        None
    }

    /// Searches the gaps below and between the ranges.
    fn search_below(
        &self,
        search: &mut Search<'_, '_, V>,
        root: u64,
        node: NodePtr<W>,
    ) -> Option<PageRange> {
        let limits = search.request.limits;
        let need = saturate(search.request.at_least);
        let top = (root & HEIGHT_MASK) as usize - 1;
        if top == 0 {
            // SAFETY: nobody edits while `&self` of this tree is out, so the nodes stay.
            let leaf = unsafe { node.as_ref() }.leaf();
            return search.leaf(self, leaf, 0);
        }
        // The way down: a node, the pages it answers for, and its children still to look into.
        let mut way = [const { MaybeUninit::<Step<W>>::uninit() }; MAX_HEIGHT];
        let mut level = top;
        let mut step = Step {
            node,
            low: 0,
            high: Page::MAX.number(),
            next: if search.up { 0 } else { Node::<W>::CHILDREN },
        };
        loop {
            // SAFETY: as above, here and below.
            let inner = unsafe { step.node.as_ref() };
            let found = if search.up {
                inner.first_with_gap(step.next, need)
            } else {
                inner.last_with_gap(step.next, need)
            };
            let Some(slot) = found else {
                if level == top {
                    return None;
                }
                level += 1;
                // SAFETY: every level above the present one was written on the way down.
                step = unsafe { way[level].assume_init() };
                continue;
            };
            step.next = slot + usize::from(search.up);
            let low = inner.first_of(slot, step.low);
            let high = inner.last_of(slot, step.high);
            if high < limits.first().number() || low > limits.last().number() {
                // Outside of the limits. At each level a search meets at most the other children of one node.
                continue;
            }
            let child = inner.child(slot)?;
            // SAFETY: as above.
            let below = unsafe { child.as_ref() };
            if level > 1 {
                way[level].write(step);
                level -= 1;
                step = Step {
                    node: child,
                    low,
                    high,
                    next: if search.up { 0 } else { Node::<W>::CHILDREN },
                };
            } else if let Some(place) = search.leaf(self, below.leaf(), low) {
                return Some(place);
            }
        }
    }
}

/// A node on the way of a search.
#[derive(Clone, Copy)]
struct Step<const W: usize> {
    node: NodePtr<W>,
    low: u64,
    high: u64,
    /// Upwards the lowest child still to look into; downwards the one above the highest.
    next: usize,
}

impl<V: Value> Search<'_, '_, V> {
    /// Looks at the gaps below and between the ranges of a leaf that begins at `low`.
    #[inline]
    fn leaf<A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize>(
        &mut self,
        tree: &RangeTree<V, A, S, W>,
        leaf: Leaf<'_, W>,
        low: u64,
    ) -> Option<PageRange> {
        let need = self.request.at_least;
        if self.up {
            let mut free = low;
            for (slot, raw) in leaf.raws(0, leaf.count()).enumerate() {
                if raw.first - free >= need
                    && let Some(place) =
                        self.consider(tree, (free, raw.first - 1), Some((leaf, slot)))
                {
                    return Some(place);
                }
                free = raw.last + 1;
            }
        } else {
            let mut end = leaf.end();
            for slot in (0..leaf.count()).rev() {
                let raw = leaf.raw(slot);
                if end > raw.last
                    && end - raw.last > need
                    && let Some(place) =
                        self.consider(tree, (raw.last + 1, end - 1), Some((leaf, slot + 1)))
                {
                    return Some(place);
                }
                end = raw.first;
            }
            if end - low >= need {
                return self.consider(tree, (low, end - 1), Some((leaf, 0)));
            }
        }
        None
    }

    /// Places the request in the gap `first ..= last` if it fits. `beside` is a leaf, and the position of the range right above the gap in it: a
    /// predicate is told of the leaf's ranges beside the gap without another descent.
    fn consider<A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize>(
        &mut self,
        tree: &RangeTree<V, A, S, W>,
        (first, last): (u64, u64),
        beside: Option<(Leaf<'_, W>, usize)>,
    ) -> Option<PageRange> {
        let limits = self.request.limits;
        let clipped = PageRange::new(
            Page::from_number(first).max(limits.first()),
            Page::from_number(last).min(limits.last()),
        )?;
        if clipped.count() < self.request.at_least {
            return None;
        }
        let free = match &mut self.usable {
            None => clipped,
            Some(usable) => {
                let is_whole = |page: Page, end| page.number() == end;
                let at = |position: Option<usize>| {
                    let (leaf, position) = (beside?.0, position?);
                    (position < leaf.count()).then(|| entry(leaf.raw(position)))
                };
                let above = beside.map(|(_, above)| above);
                let below = above.and_then(|above| above.checked_sub(1));
                let gap = Gap {
                    range: clipped,
                    below: clipped
                        .first()
                        .checked_sub(1)
                        .filter(|_| is_whole(clipped.first(), first))
                        .and_then(|page| at(below).or_else(|| tree.get(page))),
                    above: clipped
                        .last()
                        .checked_add(1)
                        .filter(|_| is_whole(clipped.last(), last))
                        .and_then(|page| at(above).or_else(|| tree.get(page))),
                };
                let free = usable(&gap)?.intersection(clipped)?;
                if free.count() < self.request.at_least {
                    return None;
                }
                free
            }
        };
        if self.up {
            self.request.place_low(free)
        } else {
            self.request.place_high(free)
        }
    }
}
