//! The leaf: how ranges are packed into words, found, put in and taken out.

use super::{Node, Raw, UNUSED};

/// How many bits of a key may hold the length. The first that fits is taken.
const WIDTHS: [u32; 8] = [28, 32, 24, 20, 16, 12, 40, 52];

const BASE_BITS: u32 = 52;
const BASE_MASK: u64 = (1 << BASE_BITS) - 1;
const COUNT_SHIFT: u32 = BASE_BITS + 6;

/// The base and the width of a leaf's keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Coding {
    base: u64,
    width: u32,
}

impl Coding {
    /// A coding for `ranges` (ascending, not empty) in a leaf whose pages begin at `low`; `None` if none fits all.
    pub(crate) fn choose(low: u64, ranges: &[Raw]) -> Option<Self> {
        let mut longest = 0;
        for raw in ranges {
            longest = longest.max(raw.last - raw.first);
        }
        let (first, top) = (ranges.first()?.first, ranges.last()?.first);
        // From the lowest page of the leaf if that fits, so that a later range below the present ones does too.
        for base in [low.min(first), first] {
            for width in WIDTHS {
                let coding = Self { base, width };
                if coding.fits_length(longest) && top - base <= coding.reach() {
                    return Some(coding);
                }
            }
        }
        None
    }

    /// The largest distance from the base; one less than the bits allow, so that no key is all ones.
    #[inline(always)]
    fn reach(self) -> u64 {
        (u64::MAX >> self.width) - 1
    }

    #[inline(always)]
    fn length_mask(self) -> u64 {
        (1 << self.width) - 1
    }

    #[inline(always)]
    fn fits_length(self, pages_less_one: u64) -> bool {
        pages_less_one <= self.length_mask()
    }

    #[inline(always)]
    fn key(self, first: u64, last: u64) -> u64 {
        (first - self.base) << self.width | (last - first)
    }

    /// First and last page of a key.
    #[inline(always)]
    fn range(self, key: u64) -> (u64, u64) {
        let first = self.base + (key >> self.width);
        (first, first + (key & self.length_mask()))
    }

    /// The largest key of a range that begins at or below `page`; `None` below the base.
    #[inline(always)]
    fn probe(self, page: u64) -> Option<u64> {
        let distance = page.checked_sub(self.base)?;
        Some(if distance > self.reach() {
            UNUSED - 1
        } else {
            distance << self.width | self.length_mask()
        })
    }
}

/// A leaf as it is read: the node and its decoded header.
#[derive(Clone, Copy)]
pub(crate) struct Leaf<'a, const W: usize> {
    node: &'a Node<W>,
    coding: Coding,
    count: usize,
}

impl<const W: usize> Node<W> {
    const HEADER: usize = Self::RANGES;
    const VALUES: usize = Self::RANGES + 1;

    /// Views the node, which is a leaf.
    #[inline(always)]
    pub(crate) fn leaf(&self) -> Leaf<'_, W> {
        let header = self.leaf_word(Self::HEADER);
        Leaf {
            node: self,
            coding: Coding {
                base: header & BASE_MASK,
                width: (header >> BASE_BITS) as u32 & 63,
            },
            count: (header >> COUNT_SHIFT) as usize,
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
        self.set_header(coding, ranges.len());
        self.set_link(0);
    }

    fn set_header(&self, coding: Coding, count: usize) {
        let header =
            coding.base | u64::from(coding.width) << BASE_BITS | (count as u64) << COUNT_SHIFT;
        self.set_word(Self::HEADER, header);
    }
}

impl<'a, const W: usize> Leaf<'a, W> {
    /// How many ranges.
    #[inline(always)]
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// First and last page of range `slot`.
    #[inline(always)]
    pub(crate) fn range(&self, slot: usize) -> (u64, u64) {
        self.coding.range(self.node.leaf_word(slot))
    }

    /// The value's word of range `slot`.
    #[inline(always)]
    pub(crate) fn value(&self, slot: usize) -> u64 {
        self.node.leaf_word(Node::<W>::VALUES + slot)
    }

    /// Range `slot` with its value.
    #[inline(always)]
    pub(crate) fn raw(&self, slot: usize) -> Raw {
        let (first, last) = self.range(slot);
        Raw {
            first,
            last,
            value: self.value(slot),
        }
    }

    /// Range `slot`, whose pages are known, with its value.
    #[inline(always)]
    pub(crate) fn raw_of(&self, slot: usize, (first, last): (u64, u64)) -> Raw {
        Raw {
            first,
            last,
            value: self.value(slot),
        }
    }

    /// How many ranges begin at or below `page`. No branch depends on a key.
    #[inline(always)]
    pub(crate) fn rank(&self, page: u64) -> usize {
        let Some(probe) = self.coding.probe(page) else {
            return 0;
        };
        // As in an inner node.
        let step = Node::<W>::RANGES.div_ceil(2);
        let half = usize::from(self.node.leaf_word(step - 1) <= probe) * step;
        let mut at = half;
        for next in 0..Node::<W>::RANGES - step {
            at += usize::from(self.node.leaf_word(half + next) <= probe);
        }
        at
    }

    /// The first range whose last page is at or above `page`; `count` if there is none.
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
        let slot = self.rank(page).checked_sub(1)?;
        let raw = self.raw(slot);
        (page <= raw.last).then_some(raw)
    }

    /// The largest gap below the first range, from `low` on, and between ranges.
    pub(crate) fn largest_gap(&self, low: u64) -> u64 {
        let mut free = low;
        let mut largest = 0;
        for slot in 0..self.count {
            let (first, last) = self.range(slot);
            largest = largest.max(first - free);
            free = last + 1;
        }
        largest
    }

    /// The last page of the leaf's last range.
    #[inline(always)]
    pub(crate) fn end(&self) -> u64 {
        // N1: a leaf is not empty.
        self.range(self.count.saturating_sub(1)).1
    }

    /// Whether both pages lie between the leaf's first and last page.
    #[inline(always)]
    pub(crate) fn spans(&self, first: u64, last: u64) -> bool {
        self.range(0).0 <= first && last <= self.end()
    }

    /// The lowest of the ranges `slots` with a gap of at least `need` pages right below it; the range below that is in the
    /// leaf too.
    #[inline(always)]
    pub(crate) fn gap_below_up(&self, slots: core::ops::Range<usize>, need: u64) -> Option<usize> {
        let (shift, mask) = (self.coding.width, self.coding.length_mask());
        // Distances from the base do: no need to decode.
        let key = self.node.leaf_word(slots.start.checked_sub(1)?);
        let mut end = (key >> shift) + (key & mask);
        for slot in slots {
            let key = self.node.leaf_word(slot);
            let first = key >> shift;
            if first - end > need {
                return Some(slot);
            }
            end = first + (key & mask);
        }
        None
    }

    /// The highest of the ranges `slots` with a gap of at least `need` pages right below it; the range below that is in
    /// the leaf too.
    #[inline(always)]
    pub(crate) fn gap_below_down(
        &self,
        slots: core::ops::Range<usize>,
        need: u64,
    ) -> Option<usize> {
        let (shift, mask) = (self.coding.width, self.coding.length_mask());
        if slots.is_empty() {
            return None;
        }
        let mut above = self.node.leaf_word(slots.end - 1) >> shift;
        for slot in slots.rev() {
            let key = self.node.leaf_word(slot - 1);
            let first = key >> shift;
            if above - first - (key & mask) > need {
                return Some(slot);
            }
            above = first;
        }
        None
    }

    /// The ranges `from .. to` that have a page in `first ..= last`; both the place of the next range above if none has.
    /// `rank` is that of `first`.
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

    /// Whether a range that begins with `first` and is a part of one of this leaf's can be written into it.
    #[inline(always)]
    pub(crate) fn fits_part(&self, first: u64) -> bool {
        first - self.coding.base <= self.coding.reach()
    }

    /// Moves the ranges from slot `to` on so that they begin at slot `end`, and counts them.
    ///
    /// Only for a node that no reader can reach, as the setters below. There is room.
    #[inline(always)]
    pub(crate) fn make_room(&self, end: usize, to: usize) {
        let (node, values) = (self.node, Node::<W>::VALUES);
        if end == to {
            return;
        }
        let count = self.count + end - to;
        if end > to {
            let up = end - to;
            for slot in (to..self.count).rev() {
                node.set_word(slot + up, node.word(slot));
                node.set_word(values + slot + up, node.word(values + slot));
            }
        } else {
            let down = to - end;
            for slot in to..self.count {
                node.set_word(slot - down, node.word(slot));
                node.set_word(values + slot - down, node.word(values + slot));
            }
            for slot in count..self.count {
                node.set_word(slot, UNUSED);
            }
        }
        node.set_header(self.coding, count);
    }

    /// Writes the range of `slot`, which fits.
    #[inline(always)]
    pub(crate) fn set_range(&self, slot: usize, first: u64, last: u64) {
        self.node.set_word(slot, self.coding.key(first, last));
    }

    /// Writes the value's word of range `slot`.
    #[inline(always)]
    pub(crate) fn set_value(&self, slot: usize, value: u64) {
        self.node.set_word(Node::<W>::VALUES + slot, value);
    }
}
