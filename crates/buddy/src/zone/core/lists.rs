//! Which blocks have a run of which order: the hint bitmaps, and the summaries that they follow.
//!
//! ```text
//!   words of a block --summary--> 8 bytes --orders--> a bit for each order --> hints[set][order] has the block
//! ```
//!
//! Orders below 9 are listed by block, orders 7 and 8 of long blocks apart. A wholly free block is on the list of order 9, or, where its pair is wholly free too, the pair
//! is on that of order 10 by its even block (`I3` of [`super`]).

use super::super::bitmap;
use super::super::bits::{self, BLOCK_ORDER, EACH, WHOLE, WORDS};
use super::super::kind::MigrateType;
use super::super::segment::Segment;
use super::{BITMAPS, Core, Found, LONG, LONG_ORDERS, ROWS};

impl Core {
    pub(super) fn hints(&mut self, set: usize, row: usize) -> &mut [u64] {
        let words = self.shape.words();
        let start = (set * ROWS + row) * words;
        &mut self.hints[start..start + words]
    }

    pub(super) fn hint_set(&mut self, set: usize, row: usize, block: usize) {
        let shape = self.shape;
        self.present[set] |= 1 << row;
        bitmap::set(self.hints(set, row), &shape, block);
    }

    pub(super) fn hint_clear(&mut self, set: usize, row: usize, block: usize) {
        let shape = self.shape;
        if bitmap::clear(self.hints(set, row), &shape, block) {
            self.present[set] &= !(1 << row);
        }
    }

    pub(super) fn hint_next(&self, set: usize, row: usize, from: usize) -> Option<usize> {
        let words = self.shape.words();
        let start = (set * ROWS + row) * words;
        bitmap::next(&self.hints[start..start + words], &self.shape, from)
    }

    /// Whether a block was broken up for orders 7 and 8, and serves only these.
    pub(super) fn is_long(&self, block: usize) -> bool {
        let first = BITMAPS * self.shape.words();
        self.hints[first + block / 64] >> (block % 64) & 1 != 0
    }

    /// Free frames of a block that are runs of orders 7 and 8 of a long block, by its words.
    pub fn long_in(&self, block: usize) -> u64 {
        if !self.is_long(block) {
            return 0;
        }
        let words = &self.words[block * WORDS..(block + 1) * WORDS];
        let whole = words
            .iter()
            .enumerate()
            .fold(0, |whole, (at, &word)| whole | u8::from(word == !0) << at);
        LONG_ORDERS
            .map(|order| u64::from(bits::maximal_words(whole, order).count_ones()) << order)
            .sum()
    }

    /// The row that lists a block's runs of an order below 9.
    pub(super) fn row_of(&self, block: usize, order: usize) -> usize {
        if LONG_ORDERS.contains(&order) && self.is_long(block) {
            order + LONG
        } else {
            order
        }
    }

    /// Makes a block long or short; its runs of orders 7 and 8 change their row.
    fn set_long(&mut self, block: usize, long: bool) {
        if self.is_long(block) == long {
            return;
        }
        let orders = bits::orders(self.summaries_of(block));
        let set = self.type_of(block).hint_set();
        for order in LONG_ORDERS.filter(|order| orders >> order & 1 != 0) {
            if let Some(set) = set {
                let (from, to) = if long {
                    (order, order + LONG)
                } else {
                    (order + LONG, order)
                };
                self.hint_clear(set, from, block);
                self.hint_set(set, to, block);
            }
        }
        let first = BITMAPS * self.shape.words();
        self.hints[first + block / 64] ^= 1 << (block % 64);
    }

    /// A block of `order` is about to be taken out of a run: who breaks a whole block says what it is for, and whoever takes less
    /// than order 7 out of a long block makes it short.
    pub(super) fn settle_use(&mut self, found: &Found, order: usize) {
        let long = LONG_ORDERS.contains(&order);
        if order < BLOCK_ORDER && (found.order >= BLOCK_ORDER || !long) {
            self.set_long(found.block, long);
        }
    }

    /// The pair with which `block`, were it whole, would make an order-10 run.
    pub(super) fn whole_pair(&self, segment: &Segment, block: usize) -> Option<usize> {
        let pair = segment.pair_of(block)?;
        let (mine, other) = (self.type_of(block), self.type_of(pair));
        let listed = mine.hint_set().is_some() && other.hint_set().is_some();
        let mixable = (mine == MigrateType::Cma) == (other == MigrateType::Cma);
        (listed && mixable && self.is_whole(pair)).then_some(pair)
    }

    /// Takes a whole block off the lists of orders 9 and 10 (`I3`).
    pub(super) fn unlist_whole(&mut self, segment: &Segment, block: usize) {
        let Some(set) = self.type_of(block).hint_set() else {
            return;
        };
        match self.whole_pair(segment, block) {
            None => self.hint_clear(set, 9, block),
            Some(pair) => {
                let even = block.min(pair);
                if let Some(set) = self.type_of(even).hint_set() {
                    self.hint_clear(set, 10, even);
                }
                if let Some(set) = self.type_of(pair).hint_set() {
                    self.hint_set(set, 9, pair);
                }
            }
        }
    }

    /// Puts a whole block on the lists of orders 9 and 10 (`I3`).
    pub(super) fn list_whole(&mut self, segment: &Segment, block: usize) {
        let Some(set) = self.type_of(block).hint_set() else {
            return;
        };
        match self.whole_pair(segment, block) {
            None => self.hint_set(set, 9, block),
            Some(pair) => {
                let even = block.min(pair);
                if let Some(set) = self.type_of(pair).hint_set() {
                    self.hint_clear(set, 9, pair);
                }
                if let Some(set) = self.type_of(even).hint_set() {
                    self.hint_set(set, 10, even);
                }
            }
        }
    }

    /// Makes the summaries of `block` be `after` and the hints follow.
    pub(super) fn set_summaries(&mut self, segment: &Segment, block: usize, after: u64) {
        let before = self.summaries_of(block);
        if before == after {
            return;
        }
        if before == WHOLE {
            self.unlist_whole(segment, block);
        }
        self.put_summaries(block, after);
        if let Some(set) = self.type_of(block).hint_set() {
            let (old, new) = if (before ^ after) & WHOLE == 0 {
                (bits::short_orders(before), bits::short_orders(after))
            } else {
                (bits::orders(before), bits::orders(after))
            };
            let mut changed = (old ^ new) & 0x1ff;
            while changed != 0 {
                let order = changed.trailing_zeros() as usize;
                changed &= changed - 1;
                let row = self.row_of(block, order);
                if new >> order & 1 != 0 {
                    self.hint_set(set, row, block);
                } else {
                    self.hint_clear(set, row, block);
                }
            }
        }
        if after == WHOLE {
            self.list_whole(segment, block);
        }
    }

    /// Writes one word of a block and lets summaries and hints follow.
    pub(super) fn set_word(&mut self, segment: &Segment, block: usize, word: usize, value: u64) {
        self.words[block * WORDS + word] = value;
        let shift = 8 * word;
        let before = self.summaries_of(block);
        let old = (before >> shift) as u8 & 0x7f;
        let new = bits::summary(value);
        let mut changed = old ^ new;
        let others = before & !(0xff << shift);
        let after = others | u64::from(new) << shift;
        if changed >> 6 != 0 {
            // A whole word came or went: orders 6 and above may change.
            return self.set_summaries(segment, block, after);
        }
        self.put_summaries(block, after);
        let Some(set) = self.type_of(block).hint_set() else {
            return;
        };
        while changed != 0 {
            let order = changed.trailing_zeros() as usize;
            changed &= changed - 1;
            // The hint changes only where no other word has a run of that order.
            if others & EACH << order == 0 {
                if new >> order & 1 != 0 {
                    self.hint_set(set, order, block);
                } else {
                    self.hint_clear(set, order, block);
                }
            }
        }
    }

    /// Sets or clears the bits of frames `offset..offset + count` of a block, `count` a multiple of 64 from a
    /// multiple of 64.
    pub(super) fn set_words(
        &mut self,
        segment: &Segment,
        block: usize,
        first: usize,
        count: usize,
        free: bool,
    ) {
        let value = if free { !0 } else { 0 };
        self.words[block * WORDS + first..block * WORDS + first + count].fill(value);
        let byte = u64::from(bits::summary(value));
        let mut after = self.summaries_of(block);
        for word in first..first + count {
            after = after & !(0xff << (8 * word)) | byte << (8 * word);
        }
        self.set_summaries(segment, block, after);
    }
}
