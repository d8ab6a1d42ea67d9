//! The leaf: how its ranges are found, put in and taken out.

use core::hint::select_unpredictable;

use super::coding::Coding;
use super::order::{Order, bits};
use super::{Node, Raw, UNUSED, count_above};

const BASE_BITS: u32 = 52;
const BASE_MASK: u64 = (1 << BASE_BITS) - 1;
const COUNT_SHIFT: u32 = BASE_BITS + 6;

/// A leaf as it is read: the node and its decoded header.
///
/// Ranges are named by their positions, ascending. The methods that change a leaf are for its one writer; the number of
/// ranges and their order are changed in this view and written to the node by [`save`](Self::save).
#[derive(Clone, Copy)]
pub(crate) struct Leaf<'a, const W: usize> {
    node: &'a Node<W>,
    /// Word [`HEADER`](Node::HEADER): base, width and count, which are decoded beside it.
    header: u64,
    coding: Coding,
    count: usize,
    order: Order,
}

/// One range more in a header.
const ONE: u64 = 1 << COUNT_SHIFT;

impl<const W: usize> Node<W> {
    const HEADER: usize = Self::RANGES;
    const VALUES: usize = Self::RANGES + 1;
    /// The order of a leaf of a tree that is shared.
    pub(crate) const SORTED: Order = Order::sorted(Self::RANGES);

    /// Views the node, which is a leaf. For its writer, and for all where nobody edits.
    #[inline(always)]
    pub(crate) fn leaf(&self) -> Leaf<'_, W> {
        Leaf {
            order: Order(self.leaf_word(Self::LINK)),
            ..self.sorted_leaf()
        }
    }

    /// Views the node, which is a leaf of a tree that is shared, where ranges lie in order (`N6`).
    #[inline(always)]
    pub(crate) fn sorted_leaf(&self) -> Leaf<'_, W> {
        let header = self.leaf_word(Self::HEADER);
        Leaf {
            node: self,
            header,
            coding: Coding {
                base: header & BASE_MASK,
                width: (header >> BASE_BITS) as u32 & 63,
            },
            count: (header >> COUNT_SHIFT) as usize,
            order: Node::<W>::SORTED,
        }
    }

    /// Writes a leaf into a node that no reader can reach.
    pub(crate) fn write_leaf(&self, coding: Coding, ranges: &[Raw]) {
        for slot in 0..Self::RANGES {
            match ranges.get(slot) {
                Some(raw) => {
                    self.set_word(slot, coding.key(raw.first, raw.last));
                    self.set_word(Self::VALUES + slot, raw.value);
                }
                None => self.set_word(slot, UNUSED),
            }
        }
        let count = ranges.len();
        let header = coding.base | u64::from(coding.width) << BASE_BITS | (count as u64 * ONE);
        Leaf {
            node: self,
            header,
            coding,
            count,
            order: Node::<W>::SORTED,
        }
        .save();
    }
}

impl<'a, const W: usize> Leaf<'a, W> {
    /// How many ranges.
    #[inline(always)]
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Which slot each range has.
    #[inline(always)]
    pub(crate) fn order(&self) -> Order {
        self.order
    }

    #[inline(always)]
    fn key(&self, position: usize) -> u64 {
        self.node.leaf_word(self.order.slot(position))
    }

    /// First and last page of the range at `position`.
    #[inline(always)]
    pub(crate) fn range(&self, position: usize) -> (u64, u64) {
        self.coding.range(self.key(position))
    }

    /// The word of the value of the range at `position`.
    #[inline(always)]
    pub(crate) fn value(&self, position: usize) -> u64 {
        self.node
            .leaf_word(Node::<W>::VALUES + self.order.slot(position))
    }

    /// The range at `position` with its value.
    #[inline(always)]
    pub(crate) fn raw(&self, position: usize) -> Raw {
        self.raw_of(position, self.range(position))
    }

    /// The range at `position`, whose pages are known, with its value.
    #[inline(always)]
    pub(crate) fn raw_of(&self, position: usize, (first, last): (u64, u64)) -> Raw {
        Raw {
            first,
            last,
            value: self.value(position),
        }
    }

    /// Whether every range lies in the slot of its position, as in a leaf that was written whole.
    #[inline(always)]
    pub(crate) fn is_sorted(&self) -> bool {
        self.order == Node::<W>::SORTED
    }

    /// The range in `slot` with its value.
    #[inline(always)]
    pub(crate) fn raw_in(&self, slot: usize) -> Raw {
        let (first, last) = self.coding.range(self.node.leaf_word(slot));
        Raw {
            first,
            last,
            value: self.node.leaf_word(Node::<W>::VALUES + slot),
        }
    }

    /// The slots of the ranges, ascending.
    #[inline(always)]
    pub(crate) fn slots(&self) -> impl Iterator<Item = usize> + use<W> {
        let mut order = self.order.0;
        (0..self.count).map(move |_| {
            let slot = (order & 15) as usize;
            order >>= 4;
            slot
        })
    }

    /// The ranges from position `from` up to (not including) `to`, which is not below, ascending.
    #[inline(always)]
    pub(crate) fn raws(&self, from: usize, to: usize) -> impl Iterator<Item = Raw> + use<'a, W> {
        let leaf = *self;
        // A nibble that is no slot ends it.
        let mut order = (self.order.0 | (15 << bits(to))) >> bits(from);
        core::iter::from_fn(move || {
            let slot = (order & 15) as usize;
            if slot == 15 {
                return None;
            }
            order >>= 4;
            Some(leaf.raw_in(slot))
        })
    }

    /// How many ranges begin at or below `page`. No branch depends on a key.
    #[inline(always)]
    pub(crate) fn rank(&self, page: u64) -> usize {
        let Some(probe) = self.coding.turned_probe(page) else {
            return 0;
        };
        // All keys at once, wherever they lie: no load waits for another, and the sums hardly do.
        let third = Node::<W>::RANGES.div_ceil(3);
        let mut above = [0; 3];
        for slot in 0..Node::<W>::RANGES {
            let sum = &mut above[slot / third];
            *sum = count_above(*sum, self.node.leaf_word(slot), probe);
        }
        Node::<W>::RANGES - (above[0] + above[1] + above[2]) as usize
    }

    /// The position of the first range whose last page is at or above `page`; `count` if there is none.
    #[inline(always)]
    pub(crate) fn first_at_or_after(&self, page: u64) -> usize {
        let rank = self.rank(page);
        if rank > 0 && self.range(rank - 1).1 >= page {
            rank - 1
        } else {
            rank
        }
    }

    /// The range that covers `page`.
    #[inline(always)]
    pub(crate) fn find(&self, page: u64) -> Option<Raw> {
        let position = self.rank(page).checked_sub(1)?;
        let raw = self.raw(position);
        (page <= raw.last).then_some(raw)
    }

    /// The largest gap below the first range, from `low` on, and between ranges.
    pub(crate) fn largest_gap(&self, low: u64) -> u64 {
        let (shift, mask) = (self.coding.width, self.coding.length_mask());
        // Distances from the base do. That of the page below `low` may lie below it, and wraps.
        let mut last = low.wrapping_sub(self.coding.base).wrapping_sub(1);
        // One more than the pages of a gap.
        let mut largest = 1;
        let mut order = self.order.0;
        for _ in 0..self.count {
            let key = self.node.leaf_word((order & 15) as usize);
            order >>= 4;
            let first = key >> shift;
            largest = largest.max(first.wrapping_sub(last));
            last = first + (key & mask);
        }
        largest - 1
    }

    /// The last page of the leaf's last range.
    #[inline(always)]
    pub(crate) fn end(&self) -> u64 {
        // N1: a leaf is not empty.
        self.range(self.count.saturating_sub(1)).1
    }

    /// The gaps of at least `need` pages between ranges from position `from` on, ascending: the first free page, and the page
    /// after the last.
    #[inline(always)]
    pub(crate) fn gaps_up(
        &self,
        from: usize,
        need: u64,
    ) -> impl Iterator<Item = (u64, u64)> + use<'a, W> {
        let leaf = *self;
        let step = self.coding.step_over(need);
        // A nibble that is no slot ends it.
        let mut order = (self.order.0 | (15 << bits(self.count))) >> bits(from + 1);
        let mut key = self.key(from);
        core::iter::from_fn(move || {
            loop {
                let slot = (order & 15) as usize;
                if slot == 15 {
                    return None;
                }
                order >>= 4;
                let below = core::mem::replace(&mut key, leaf.node.leaf_word(slot));
                if key - below > step
                    && let Some(gap) = leaf.coding.gap(below, key, need)
                {
                    return Some(gap);
                }
            }
        })
    }

    /// The gaps of at least `need` pages between ranges below position `to` (not 0), descending, as [`gaps_up`](Self::gaps_up).
    #[inline(always)]
    pub(crate) fn gaps_down(
        &self,
        to: usize,
        need: u64,
    ) -> impl Iterator<Item = (u64, u64)> + use<'a, W> {
        let leaf = *self;
        let step = self.coding.step_over(need);
        // The nibble on top is the next; one that is no slot ends it.
        let mut order = ((self.order.0 << 4 | 15) << (60 - bits(to))) << 4;
        let mut key = self.key(to - 1);
        core::iter::from_fn(move || {
            loop {
                let slot = (order >> 60) as usize;
                if slot == 15 {
                    return None;
                }
                order <<= 4;
                let above = core::mem::replace(&mut key, leaf.node.leaf_word(slot));
                if above - key > step
                    && let Some(gap) = leaf.coding.gap(key, above, need)
                {
                    return Some(gap);
                }
            }
        })
    }

    /// The positions `from .. to` of the ranges that have a page in `first ..= last`; both that of the next range above if
    /// none has. `rank` is that of `first`.
    #[inline(always)]
    pub(crate) fn touched(&self, rank: usize, first: u64, last: u64) -> (usize, usize) {
        let covers = rank > 0 && self.range(rank - 1).1 >= first;
        let from = rank - usize::from(covers);
        let mut to = rank;
        // Most edits touch one range or none.
        while to < self.count && self.range(to).0 <= last {
            to += 1;
        }
        (from, to)
    }

    /// The node.
    #[inline(always)]
    pub(crate) fn node(&self) -> &'a Node<W> {
        self.node
    }

    /// Whether a range can be written into this leaf.
    #[inline(always)]
    pub(crate) fn fits(&self, first: u64, last: u64) -> bool {
        // Below the base the distance wraps, and is above every reach.
        first.wrapping_sub(self.coding.base) <= self.coding.reach()
            && self.coding.fits_length(last - first)
    }

    /// Whether a range of this leaf's can be so long.
    #[inline(always)]
    pub(crate) fn fits_pages(&self, pages_less_one: u64) -> bool {
        self.coding.fits_length(pages_less_one)
    }

    /// Whether a range that begins with `first` and is a part of one of this leaf's can be written into it.
    #[inline(always)]
    pub(crate) fn fits_part(&self, first: u64) -> bool {
        first - self.coding.base <= self.coding.reach()
    }

    /// Makes room for a range at `position`, which is to be written. There is a free slot.
    #[inline(always)]
    pub(crate) fn open(&mut self, position: usize) {
        debug_assert!(position <= self.count && self.count < Node::<W>::RANGES);
        self.count += 1;
        self.header += ONE;
        self.order.open(position, Node::<W>::RANGES);
    }

    /// Takes the range at `position` out. Its slot is to be written with [`set_unused`](Self::set_unused).
    #[inline(always)]
    pub(crate) fn close(&mut self, position: usize) -> usize {
        debug_assert!(position < self.count);
        self.count -= 1;
        self.header -= ONE;
        self.order.close(position, Node::<W>::RANGES)
    }

    /// Marks a slot that has no range any more.
    #[inline(always)]
    pub(crate) fn set_unused(&self, slot: usize) {
        self.node.set_word(slot, UNUSED);
    }

    /// The slot of the range at `position`.
    #[inline(always)]
    pub(crate) fn slot(&self, position: usize) -> usize {
        self.order.slot(position)
    }

    /// Writes the pages of the range in `slot`, which fit.
    #[inline(always)]
    pub(crate) fn set_range(&self, slot: usize, first: u64, last: u64) {
        self.node.set_word(slot, self.coding.key(first, last));
    }

    /// Takes `pages` pages, but not all, from the end of the range in `slot`.
    #[inline(always)]
    pub(crate) fn shorten(&self, slot: usize, pages: u64) {
        self.node.set_word(slot, self.node.leaf_word(slot) - pages);
    }

    /// Adds `pages` pages, which fit, to the end of the range in `slot`.
    #[inline(always)]
    pub(crate) fn lengthen(&self, slot: usize, pages: u64) {
        self.node.set_word(slot, self.node.leaf_word(slot) + pages);
    }

    /// Writes the word of the value of the range in `slot`.
    #[inline(always)]
    pub(crate) fn set_value(&self, slot: usize, value: u64) {
        self.node.set_word(Node::<W>::VALUES + slot, value);
    }

    /// Writes how many ranges there are, and their order, to the node.
    #[inline(always)]
    pub(crate) fn save(&self) {
        self.node.set_word(Node::<W>::HEADER, self.header);
        self.node.set_word(Node::<W>::LINK, self.order.0);
    }

    /// Writes the leaf into `target`, which no reader can reach, with every range in the slot of its position (`N6`).
    ///
    /// A range at a position that was just opened means nothing there, and is to be written.
    #[inline(always)]
    pub(crate) fn sorted_into<'b>(&self, target: &'b Node<W>) -> Leaf<'b, W> {
        let mut order = self.order.0;
        for position in 0..Node::<W>::RANGES {
            let slot = (order & 15) as usize;
            order >>= 4;
            let key = self.node.leaf_word(slot);
            let used = position < self.count;
            target.set_word(position, select_unpredictable(used, key, UNUSED));
            let value = self.node.leaf_word(Node::<W>::VALUES + slot);
            target.set_word(Node::<W>::VALUES + position, value);
        }
        let sorted = Leaf {
            node: target,
            order: Node::<W>::SORTED,
            ..*self
        };
        sorted.save();
        sorted
    }

    /// Moves the ranges from `position` on into `upper`, in order, and gives both leaves. Not under readers.
    pub(crate) fn split_into<'b>(self, position: usize, upper: &'b Node<W>) -> (Self, Leaf<'b, W>) {
        for slot in 0..Node::<W>::RANGES {
            let from = position + slot;
            if from < self.count {
                let old = self.slot(from);
                upper.set_word(slot, self.node.leaf_word(old));
                let value = self.node.leaf_word(Node::<W>::VALUES + old);
                upper.set_word(Node::<W>::VALUES + slot, value);
                self.set_unused(old);
            } else {
                upper.set_word(slot, UNUSED);
            }
        }
        let count = self.count - position;
        let above = Leaf {
            node: upper,
            header: self.header - position as u64 * ONE,
            count,
            order: Node::<W>::SORTED,
            ..self
        };
        // The nibbles from the number of ranges on are the free slots already.
        let below = Leaf {
            header: self.header - count as u64 * ONE,
            count: position,
            ..self
        };
        above.save();
        below.save();
        (below, above)
    }

    /// Puts every range into the slot of its position (`N6`). The node is one that no reader can reach.
    pub(crate) fn sort(&self) {
        if !self.is_sorted() {
            let old = Node::blank();
            old.copy_from(self.node);
            let _ = old.leaf().sorted_into(self.node);
        }
    }
}
