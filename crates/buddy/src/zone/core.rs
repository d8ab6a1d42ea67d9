//! The free bits of a zone and everything derived from them: what the zone's lock guards.
//!
//! ```text
//!   request of order k, type t
//!      hints[set of t][j], j = k..=10      the first block that has a maximal run of the smallest order j >= k
//!            |
//!      summaries[block]                    which of its words
//!            |
//!      words[8 * block ..]                 which frames: the lower 2^k of the run are given; the rest stays free
//! ```
//!
//! The words are the truth. The summaries and hints follow, at once where frames are taken, later where single frames or short
//! runs are freed: such a free sets its bits and marks the word *stale*, which costs a few instructions. A search brings the
//! lowest stale blocks up to date first, and all of them before it says that there is no run, so that under the lock a search
//! that finds nothing has proved that no run exists.
//!
//! Invariants
//! - `I1`: a set bit is a free frame of a segment; bits outside segments are never set.
//! - `I2`: `summaries[b]` byte w is `bits::summary(words[8 b + w])`, or has its stale bit and is the summary of the word at an
//!   earlier time, since when frames of it were only freed.
//! - `I3`: `hints[s][j]` has bit b exactly if block b's type is in set s and it has a maximal run of order j by its summaries,
//!   where orders 9 and 10 are: wholly free without or with a wholly free pair of compatible type (bit of the even block).
//! - `I4`: `free` is the number of set bits.
//! - `I5`: the last hint bitmap has the bit of every block that has a stale word (and may have others').
//!
//! Costs: a take changes words of one block, their summary bytes, and the hints of the orders that appear or vanish in
//! the block; a give of order <= 5 a word and a stale bit. A find is one bitmap search an order. Stale blocks are brought up to date
//! once for all frees since the last time, at most [`STEP`] of them while the lock is held.

use kmem_hal::sync::{AtomicU8, Ordering};

use super::bitmap::{self, Shape};
use super::bits::{self, BLOCK_FRAMES, BLOCK_ORDER, EACH, ORDERS, STALE, TOP, WHOLE, WORDS};
use super::kind::{MigrateType, UNMANAGED};
use super::segment::{self, Segment};

/// Stale blocks that a search brings up to date before it begins.
pub(crate) const FEW: usize = 64;
/// Stale blocks that are brought up to date under one lock before a refusal.
pub(crate) const STEP: usize = 512;
/// Bitmaps: the hints of both sets, and the stale blocks.
const BITMAPS: usize = 2 * ORDERS + 1;
/// The set whose only bitmap is that of the stale blocks.
const STALE_SET: usize = 2;

/// Why a block was not taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GiveError {
    /// All frames are free already.
    Free,
    /// Some frames are free already: a wrong order, or a double free of a part.
    PartlyFree,
}

/// Where taken blocks go.
pub(crate) trait Give {
    /// Takes one block by its first frame's number.
    fn one(&mut self, first: u64);
    /// Takes `count` blocks of `order` that follow each other.
    fn run(&mut self, first: u64, count: usize, order: usize);
}

/// The frames of `word` that are taken: the first `most` pieces of `order` in its maximal runs of `run` (6 is all of it), below
/// `limit`; each is handed to `give`. `base` is the word's first frame.
#[inline]
fn take_word(
    word: u64,
    (run, order): (usize, usize),
    base: u64,
    limit: u64,
    most: usize,
    give: &mut impl Give,
) -> u64 {
    // How many blocks from `first` on may be taken.
    let allowed = |first: u64, left: usize, pieces: usize| -> usize {
        let below = usize::try_from(limit.saturating_sub(first) >> order).unwrap_or(usize::MAX);
        left.min(pieces).min(below)
    };
    let mut taken = 0;
    let mut left = most;
    let mut starts = bits::maximal(word, run);
    if run == order {
        while starts != 0 {
            let start = starts.trailing_zeros();
            starts &= starts - 1;
            let first = base + u64::from(start);
            if allowed(first, left, 1) == 0 {
                break;
            }
            taken |= bits::run_mask(start, order);
            give.one(first);
            left -= 1;
        }
        return taken;
    }
    while starts != 0 {
        let start = starts.trailing_zeros();
        starts &= starts - 1;
        let first = base + u64::from(start);
        let pieces = 1 << (run - order);
        let count = allowed(first, left, pieces);
        if count == 0 {
            break;
        }
        give.run(first, count, order);
        let frames = (count as u32) << order;
        taken |= (!0 >> (64 - frames)) << start;
        left -= count;
        if count < pieces {
            break;
        }
    }
    taken
}

/// The locked part of a zone.
pub(crate) struct Core {
    pub segments: &'static [Segment],
    pub words: &'static mut [u64],
    pub summaries: &'static mut [u64],
    /// Written under the lock; read by frees without it, as a hint which cache to use.
    pub types: &'static [AtomicU8],
    /// Both sets, all orders, one after the other.
    pub hints: &'static mut [u64],
    pub shape: Shape,
    /// For each set the orders whose bitmap is not empty, a bit each; then whether blocks are stale.
    pub present: [u16; 3],
    /// Page blocks that changed their type for a request of another, since the zone last looked.
    pub stolen: u64,
    pub free: u64,
    /// Free frames in blocks of type `Cma`, of which movable requests alone may count.
    pub free_cma: u64,
}

/// A run to be taken: in `block`, from frame `offset` of it, maximal of order `order`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    pub block: usize,
    pub offset: u32,
    pub order: usize,
}

impl Core {
    /// Words of hints for `blocks` blocks.
    pub const fn hint_words(blocks: usize) -> usize {
        BITMAPS * Shape::new(blocks).words()
    }

    /// Notes that a block has frames that are not the allocator's: frees into it are checked more closely.
    pub fn set_unmanaged(&mut self, block: usize, flag: bool) {
        let byte = self.types[block].load(Ordering::Relaxed) & !UNMANAGED;
        let byte = byte | if flag { UNMANAGED } else { 0 };
        self.types[block].store(byte, Ordering::Relaxed);
    }

    pub fn type_of(&self, block: usize) -> MigrateType {
        MigrateType::from_byte(self.types[block].load(Ordering::Relaxed))
    }

    fn hints(&mut self, set: usize, order: usize) -> &mut [u64] {
        let words = self.shape.words();
        let start = (set * ORDERS + order) * words;
        &mut self.hints[start..start + words]
    }

    fn hint_set(&mut self, set: usize, order: usize, block: usize) {
        let shape = self.shape;
        self.present[set] |= 1 << order;
        bitmap::set(self.hints(set, order), &shape, block);
    }

    fn hint_clear(&mut self, set: usize, order: usize, block: usize) {
        let shape = self.shape;
        if bitmap::clear(self.hints(set, order), &shape, block) {
            self.present[set] &= !(1 << order);
        }
    }

    fn hint_next(&self, set: usize, order: usize, from: usize) -> Option<usize> {
        let words = self.shape.words();
        let start = (set * ORDERS + order) * words;
        bitmap::next(&self.hints[start..start + words], &self.shape, from)
    }

    /// Notes that frames of a word were freed and nothing else was done about it.
    #[inline]
    fn set_stale(&mut self, block: usize, word: usize) {
        let before = self.summaries[block];
        self.summaries[block] = before | 0x80 << (8 * word);
        if before & STALE == 0 {
            self.hint_set(STALE_SET, 0, block);
        }
    }

    /// Brings the summaries and hints of a block up to date.
    fn refresh_block(&mut self, block: usize) {
        let before = self.summaries[block];
        let mut stale = before & STALE;
        if stale == 0 {
            return;
        }
        let Some(segment) = segment::of_block(self.segments, block) else {
            return;
        };
        let mut after = before & !STALE;
        self.summaries[block] = after;
        while stale != 0 {
            let word = stale.trailing_zeros() as usize / 8;
            stale &= stale - 1;
            let byte = u64::from(bits::summary(self.words[block * WORDS + word % WORDS]));
            after = after & !(0xff << (8 * word)) | byte << (8 * word);
        }
        self.set_summaries(segment, block, after);
    }

    /// Brings the lowest `most` stale blocks up to date; whether others are left.
    #[inline]
    pub fn refresh(&mut self, most: usize) -> bool {
        let mut from = 0;
        let mut done = 0;
        while self.present[STALE_SET] != 0 && done < most {
            let Some(block) = self.hint_next(STALE_SET, 0, from) else {
                break;
            };
            self.hint_clear(STALE_SET, 0, block);
            self.refresh_block(block);
            from = block + 1;
            done += 1;
        }
        self.present[STALE_SET] != 0
    }

    /// Whether all of a block is free by its words.
    pub fn is_free_block(&self, block: usize) -> bool {
        self.words[block * WORDS..(block + 1) * WORDS]
            .iter()
            .all(|&word| word == !0)
    }

    fn is_whole(&self, block: usize) -> bool {
        self.summaries[block] == WHOLE
    }

    /// The pair with which `block`, were it whole, would make an order-10 run.
    fn whole_pair(&self, segment: &Segment, block: usize) -> Option<usize> {
        let pair = segment.pair_of(block)?;
        let (mine, other) = (self.type_of(block), self.type_of(pair));
        let listed = mine.hint_set().is_some() && other.hint_set().is_some();
        let mixable = (mine == MigrateType::Cma) == (other == MigrateType::Cma);
        (listed && mixable && self.is_whole(pair)).then_some(pair)
    }

    /// Takes a whole block off the lists of orders 9 and 10 (`I3`).
    fn unlist_whole(&mut self, segment: &Segment, block: usize) {
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
    fn list_whole(&mut self, segment: &Segment, block: usize) {
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
    fn set_summaries(&mut self, segment: &Segment, block: usize, after: u64) {
        let before = self.summaries[block];
        if before == after {
            return;
        }
        if before == WHOLE {
            self.unlist_whole(segment, block);
        }
        self.summaries[block] = after;
        if let Some(set) = self.type_of(block).hint_set() {
            let (old, new) = (bits::orders(before), bits::orders(after));
            let mut changed = (old ^ new) & 0x1ff;
            while changed != 0 {
                let order = changed.trailing_zeros() as usize;
                changed &= changed - 1;
                if new >> order & 1 != 0 {
                    self.hint_set(set, order, block);
                } else {
                    self.hint_clear(set, order, block);
                }
            }
        }
        if after == WHOLE {
            self.list_whole(segment, block);
        }
    }

    /// Writes one word of a block and lets summaries and hints follow.
    fn set_word(&mut self, segment: &Segment, block: usize, word: usize, value: u64) {
        self.words[block * WORDS + word] = value;
        let shift = 8 * word;
        let before = self.summaries[block];
        let old = (before >> shift) as u8 & 0x7f;
        let new = bits::summary(value);
        let mut changed = old ^ new;
        let others = before & !(0xff << shift);
        let after = others | u64::from(new) << shift;
        if changed >> 6 != 0 {
            // A whole word came or went: orders 6 and above may change.
            return self.set_summaries(segment, block, after);
        }
        self.summaries[block] = after;
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
    fn set_words(
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
        let mut after = self.summaries[block];
        for word in first..first + count {
            after = after & !(0xff << (8 * word)) | byte << (8 * word);
        }
        self.set_summaries(segment, block, after);
    }

    fn account(&mut self, block: usize, frames: u64, freed: bool) {
        let cma = self.type_of(block) == MigrateType::Cma;
        if freed {
            self.free += frames;
            self.free_cma += if cma { frames } else { 0 };
        } else {
            self.free -= frames;
            self.free_cma -= if cma { frames } else { 0 };
        }
    }

    /// Marks `2^order` frames from `offset` of `block` free or taken; they are the opposite now.
    fn mark(&mut self, segment: &Segment, block: usize, offset: u32, order: usize, free: bool) {
        match order {
            0..=6 => {
                let word = offset as usize / 64;
                let mask = bits::run_mask(offset % 64, order);
                let now = self.words[block * WORDS + word];
                let value = if free { now | mask } else { now & !mask };
                self.set_word(segment, block, word, value);
                self.account(block, 1 << order, free);
            }
            7..=9 => {
                let count = 1 << (order - 6);
                self.set_words(segment, block, offset as usize / 64, count, free);
                self.account(block, 1 << order, free);
            }
            _ => {
                for half in [block, block + 1] {
                    self.set_words(segment, half, 0, WORDS, free);
                    self.account(half, BLOCK_FRAMES, free);
                }
            }
        }
    }

    /// The lowest maximal run of order `order` in `block`, which has one.
    fn locate(&self, block: usize, order: usize) -> u32 {
        if order >= BLOCK_ORDER {
            return 0;
        }
        let summaries = self.summaries[block];
        if order >= 6 {
            let starts = bits::maximal_words(bits::whole_words(summaries), order);
            return starts.trailing_zeros() * 64;
        }
        let having = summaries & (EACH << order);
        let word = having.trailing_zeros() as usize / 8;
        let starts = bits::maximal(self.words[block * WORDS + word % WORDS], order);
        word as u32 * 64 + starts.trailing_zeros()
    }

    /// Finds the lowest maximal run of the smallest order >= `order` in blocks of `migrate`, ending its first
    /// `2^order` frames at or below frame number `limit`.
    pub fn find(&mut self, order: usize, migrate: MigrateType, limit: u64) -> Option<Found> {
        let set = migrate.hint_set()?;
        let mut runs = self.present[set] >> order << order;
        while runs != 0 {
            let run = runs.trailing_zeros() as usize;
            runs &= runs - 1;
            let found = self.find_exact(set, run, order, migrate, limit);
            if found.is_some() {
                return found;
            }
        }
        None
    }

    /// The lowest maximal run of exactly order `run`, of which `2^order` frames fit below `limit`.
    fn find_exact(
        &mut self,
        set: usize,
        run: usize,
        order: usize,
        migrate: MigrateType,
        limit: u64,
    ) -> Option<Found> {
        let mut from = 0;
        while self.present[set] >> run & 1 != 0
            && let Some(block) = self.hint_next(set, run, from)
        {
            if self.type_of(block) == migrate {
                if self.summaries[block] & STALE != 0 {
                    // The run may be part of a longer one by now.
                    self.refresh_block(block);
                    from = block;
                    continue;
                }
                let offset = self.locate(block, run);
                let found = Found {
                    block,
                    offset,
                    order: run,
                };
                // The first one is the lowest: where it ends too high, all do.
                return (self.frame_of(&found)? + (1 << order) <= limit).then_some(found);
            }
            from = block + 1;
        }
        None
    }

    /// The frame number of a run.
    pub fn frame_of(&self, found: &Found) -> Option<u64> {
        let segment = segment::of_block(self.segments, found.block)?;
        Some(segment.base_of(found.block) + u64::from(found.offset))
    }

    /// Takes the lower `2^order` frames of a run that `find` gave; the first frame's number.
    pub fn take(&mut self, found: &Found, order: usize) -> Option<u64> {
        let segment = *segment::of_block(self.segments, found.block)?;
        self.mark(&segment, found.block, found.offset, order, false);
        Some(segment.base_of(found.block) + u64::from(found.offset))
    }

    /// Takes up to `most` blocks of `order`, lowest first, and hands them to `give`; how many. One find serves all runs
    /// of its word.
    ///
    /// The same frames come out as from that many single takes, though not always in the same order.
    pub fn take_batch(
        &mut self,
        order: usize,
        migrate: MigrateType,
        limit: u64,
        most: usize,
        give: &mut impl Give,
    ) -> usize {
        let mut given = 0;
        while given < most {
            let Some(found) = self.find(order, migrate, limit) else {
                break;
            };
            let Some(&segment) = segment::of_block(self.segments, found.block) else {
                break;
            };
            if order > 5 || most == 1 {
                give.one(segment.base_of(found.block) + u64::from(found.offset));
                self.mark(&segment, found.block, found.offset, order, false);
                given += 1;
                continue;
            }
            // Inside words: all maximal runs of this order, cut into pieces of `order`. A longer run is one or more whole words.
            let base = segment.base_of(found.block);
            let run = found.order.min(6);
            let mut after = self.summaries[found.block];
            let word = found.offset as usize / 64;
            let mut having = after & (EACH << run) & (!0 << (8 * word));
            if found.order >= 6 {
                let words = 1 << (found.order.min(BLOCK_ORDER) - 6);
                having &= !0 >> (64 - 8 * (word + words).min(WORDS));
            }
            let before = given;
            while having != 0 && given < most {
                let word = having.trailing_zeros() as usize / 8;
                having &= having - 1;
                let at = found.block * WORDS + word;
                let taken = take_word(
                    self.words[at],
                    (run, order),
                    base + 64 * word as u64,
                    limit,
                    most - given,
                    give,
                );
                given += taken.count_ones() as usize >> order;
                let value = self.words[at] & !taken;
                self.words[at] = value;
                let byte = u64::from(bits::summary(value));
                after = after & !(0xff << (8 * word)) | byte << (8 * word);
                if taken == 0 {
                    break;
                }
            }
            self.set_summaries(&segment, found.block, after);
            self.account(found.block, ((given - before) as u64) << order, false);
            if given == before {
                break;
            }
        }
        given
    }

    /// Changes a block's type and moves its runs to the lists of the new one.
    pub fn set_type(&mut self, segment: &Segment, block: usize, to: MigrateType) {
        let from = self.type_of(block);
        if from == to {
            return;
        }
        let free = self.free_in(block);
        let mask = bits::orders(self.summaries[block]) & 0x1ff;
        if self.is_whole(block) {
            self.unlist_whole(segment, block);
        }
        for order in (0..9).filter(|order| mask >> order & 1 != 0) {
            if let Some(set) = from.hint_set() {
                self.hint_clear(set, order, block);
            }
            if let Some(set) = to.hint_set() {
                self.hint_set(set, order, block);
            }
        }
        if from == MigrateType::Cma {
            self.free_cma -= free;
        }
        if to == MigrateType::Cma {
            self.free_cma += free;
        }
        let flag = self.types[block].load(Ordering::Relaxed) & UNMANAGED;
        self.types[block].store(to as u8 | flag, Ordering::Relaxed);
        if self.is_whole(block) {
            self.list_whole(segment, block);
        }
    }

    /// Takes a block off all lists; it remembers its type.
    pub fn isolate_block(&mut self, segment: &Segment, block: usize) {
        let from = self.type_of(block);
        self.set_type(segment, block, MigrateType::Isolate);
        let byte = self.types[block].load(Ordering::Relaxed);
        self.types[block].store(byte | (from as u8) << 3, Ordering::Relaxed);
    }

    /// Puts an isolated block back on the lists of its old type.
    pub fn restore_block(&mut self, segment: &Segment, block: usize) {
        if self.type_of(block) == MigrateType::Isolate {
            let byte = self.types[block].load(Ordering::Relaxed);
            self.set_type(segment, block, MigrateType::from_byte(byte >> 3 & 7));
        }
    }

    /// The first frame of `first..end`, which lie in `segment`, that is not free.
    pub fn next_taken(&self, segment: &Segment, first: u64, end: u64) -> Option<u64> {
        let mut at = first;
        while at < end {
            let word = self.words[segment.block_of(at) * WORDS + (at % BLOCK_FRAMES) as usize / 64];
            let taken = !word >> (at % 64);
            if taken != 0 {
                return Some(at + u64::from(taken.trailing_zeros())).filter(|&at| at < end);
            }
            at = (at | 63) + 1;
        }
        None
    }

    /// Whether frames `first..end` lie in blocks that anybody may take from by place.
    pub fn is_takeable(&self, segment: &Segment, first: u64, end: u64) -> bool {
        (segment.block_of(first)..=segment.block_of(end - 1))
            .all(|block| !matches!(self.type_of(block), MigrateType::Cma | MigrateType::Isolate))
    }

    /// Free frames of a block.
    pub fn free_in(&self, block: usize) -> u64 {
        self.words[block * WORDS..(block + 1) * WORDS]
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// Finds a run in blocks of other types, and makes a block this type's where most of it is free.
    ///
    /// Movable requests first borrow from CMA. Then the largest run of a fallback type, whose block then changes type (a free block, or one that is free by
    /// half); otherwise the smallest run that fits, whose block keeps its type. Source: Linux mm/page_alloc.c,
    /// `__rmqueue_cma_fallback`,
    /// `__rmqueue_claim` and `__rmqueue_steal`.
    pub fn find_fallback(
        &mut self,
        order: usize,
        migrate: MigrateType,
        limit: u64,
    ) -> Option<Found> {
        if migrate == MigrateType::Movable
            && let Some(lent) = self.find(order, MigrateType::Cma, limit)
        {
            return Some(lent);
        }
        for run in (order..=TOP).rev() {
            for &from in migrate.fallbacks() {
                let found = from
                    .hint_set()
                    .and_then(|set| self.find_exact(set, run, order, from, limit));
                let Some(found) = found else { continue };
                let segment = *segment::of_block(self.segments, found.block)?;
                if run >= BLOCK_ORDER || self.free_in(found.block) >= BLOCK_FRAMES / 2 {
                    self.set_type(&segment, found.block, migrate);
                    self.stolen += 1;
                    if run > BLOCK_ORDER {
                        self.set_type(&segment, found.block + 1, migrate);
                    }
                    return self.find(order, migrate, limit);
                }
            }
        }
        migrate
            .fallbacks()
            .iter()
            .find_map(|&from| self.find(order, from, limit))
    }

    /// Gives `2^order` frames from number `first` back; they lie in `segment`.
    ///
    /// # Errors
    ///
    /// [`GiveError`] where some are free already; nothing changes then.
    pub fn give(&mut self, segment: &Segment, first: u64, order: usize) -> Result<(), GiveError> {
        let block = segment.block_of(first);
        let offset = (first % BLOCK_FRAMES) as u32;
        let (set, all) = self.count_run(block, offset, order);
        if set != 0 {
            return Err(if set == all {
                GiveError::Free
            } else {
                GiveError::PartlyFree
            });
        }
        if order > 5 {
            self.mark(segment, block, offset, order, true);
            return Ok(());
        }
        let word = offset as usize / 64;
        self.words[block * WORDS + word] |= bits::run_mask(offset % 64, order);
        self.set_stale(block, word);
        self.account(block, 1 << order, true);
        Ok(())
    }

    /// Gives blocks of one order (at most 5) back, each for the price of a few instructions.
    ///
    /// `entries` count from frame number `start`; a wrong one is handed to `wrong` and left out.
    pub fn give_entries(
        &mut self,
        start: u64,
        entries: &[u32],
        order: usize,
        mut wrong: impl FnMut(GiveError, u64),
    ) {
        let Some(mut segment) = self.segments.first() else {
            return;
        };
        for &entry in entries {
            let first = start + u64::from(entry);
            if !segment.contains(first, 1 << order) {
                let found = segment::find(self.segments, first);
                let Some(other) = found.filter(|found| found.contains(first, 1 << order)) else {
                    // Never pushed: every entry was found in a segment.
                    continue;
                };
                segment = other;
            }
            let block = segment.block_of(first);
            let word = (first % BLOCK_FRAMES) as usize / 64;
            let mask = bits::run_mask((first % 64) as u32, order);
            let bits = &mut self.words[block * WORDS + word];
            let free = *bits & mask;
            if free == 0 {
                *bits |= mask;
                self.set_stale(block, word);
                self.account(block, 1 << order, true);
            } else if free == mask {
                wrong(GiveError::Free, first);
            } else {
                wrong(GiveError::PartlyFree, first);
            }
        }
    }

    /// How many of a run's frames are free, and how many it has.
    fn count_run(&self, block: usize, offset: u32, order: usize) -> (u32, u32) {
        let at = block * WORDS + offset as usize / 64;
        if order <= 6 {
            let mask = bits::run_mask(offset % 64, order);
            return ((self.words[at] & mask).count_ones(), mask.count_ones());
        }
        let words = &self.words[at..at + (1 << (order - 6))];
        (words.iter().map(|word| word.count_ones()).sum(), 1 << order)
    }

    /// Whether all frames `first..end`, which lie in `segment`, are free (`true`) or all taken (`false`).
    pub fn is_uniform(&self, segment: &Segment, first: u64, end: u64, free: bool) -> bool {
        let mut at = first;
        while at < end {
            let stop = end.min((at | 63) + 1);
            let mask = !0 >> (64 - (stop - at)) << (at % 64);
            let word = self.words[segment.block_of(at) * WORDS + (at % BLOCK_FRAMES) as usize / 64];
            if word & mask != if free { mask } else { 0 } {
                return false;
            }
            at = stop;
        }
        true
    }

    /// Marks `first..end`, which lie in `segment` and are all taken or all free, free or taken.
    pub fn mark_range(&mut self, segment: &Segment, first: u64, end: u64, free: bool) {
        let mut at = first;
        while at < end {
            let block = segment.block_of(at);
            if at.is_multiple_of(BLOCK_FRAMES) && end - at >= BLOCK_FRAMES {
                self.set_words(segment, block, 0, WORDS, free);
                self.account(block, BLOCK_FRAMES, free);
                at += BLOCK_FRAMES;
                continue;
            }
            let stop = end.min((at | 63) + 1);
            let word = (at % BLOCK_FRAMES) as usize / 64;
            let mask = !0 >> (64 - (stop - at)) << (at % 64);
            let now = self.words[block * WORDS + word];
            let value = if free { now | mask } else { now & !mask };
            self.set_word(segment, block, word, value);
            self.account(block, stop - at, free);
            at = stop;
        }
    }

    /// The lowest run of `count` free frames that starts at a multiple of `align` frames (a power of two), ends at or below `limit`
    /// and avoids blocks that lend (`Cma`, unless `movable`) or are isolated.
    pub fn find_range(&self, count: u64, align: u64, limit: u64, movable: bool) -> Option<u64> {
        for segment in self.segments {
            let end = segment.end.min(limit);
            let mut at = segment.first;
            while at < end {
                let start = self.next_in(segment, at, end, true, movable);
                let stop = self.next_in(segment, start, end, false, movable);
                let aligned = (start + align - 1) & !(align - 1);
                if aligned < stop && stop - aligned >= count {
                    return Some(aligned);
                }
                at = stop.max(start + 1);
            }
        }
        None
    }

    /// The first frame at or after `at` that is free and allowed (`free`), or that is not; `end` where there is none.
    fn next_in(&self, segment: &Segment, mut at: u64, end: u64, free: bool, movable: bool) -> u64 {
        while at < end {
            let block = segment.block_of(at);
            let allowed = match self.type_of(block) {
                MigrateType::Isolate => false,
                MigrateType::Cma => movable,
                _ => true,
            };
            let word = self.words[block * WORDS + (at % BLOCK_FRAMES) as usize / 64];
            let word = if allowed { word } else { 0 };
            let sought = (if free { word } else { !word }) >> (at % 64);
            if sought != 0 {
                return end.min(at + u64::from(sought.trailing_zeros()));
            }
            at = (at | 63) + 1;
        }
        end
    }

    /// Free blocks by order, of all types or of one.
    pub fn counts(&mut self, only: Option<MigrateType>) -> [u64; ORDERS] {
        while self.refresh(STEP) {}
        let mut counts = [0; ORDERS];
        for segment in self.segments {
            for block in segment.block as usize..segment.block_end() {
                if only.is_some_and(|only| only != self.type_of(block)) {
                    continue;
                }
                if self.is_whole(block) {
                    match self.whole_pair(segment, block) {
                        // Counted with the even half, whose list it is on.
                        Some(pair) if pair < block => {}
                        Some(_) => counts[TOP] += 1,
                        None => counts[BLOCK_ORDER] += 1,
                    }
                    continue;
                }
                let mut whole = 0u8;
                for (at, word) in self.words[block * WORDS..(block + 1) * WORDS]
                    .iter()
                    .enumerate()
                {
                    whole |= u8::from(*word == !0) << at;
                    for (order, count) in counts.iter_mut().enumerate().take(6) {
                        *count += u64::from(bits::maximal(*word, order).count_ones());
                    }
                }
                for (order, count) in counts.iter_mut().enumerate().take(9).skip(6) {
                    *count += u64::from(bits::maximal_words(whole, order).count_ones());
                }
            }
        }
        counts
    }

    /// Checks `I2`, `I3` and `I4` against the words: for tests and audits.
    pub fn check(&self) -> Result<(), &'static str> {
        let mut free = 0;
        let mut cma = 0;
        for segment in self.segments {
            for block in segment.block as usize..segment.block_end() {
                let base = segment.base_of(block);
                let words = &self.words[block * WORDS..(block + 1) * WORDS];
                let mut summaries = 0;
                for (at, &word) in words.iter().enumerate() {
                    summaries |= u64::from(bits::summary(word)) << (8 * at);
                    let first = base + at as u64 * 64;
                    let outside = (0..64u64)
                        .filter(|bit| !segment.contains(first + bit, 1))
                        .fold(0, |mask, bit| mask | 1 << bit);
                    if word & outside != 0 {
                        return Err("a frame outside every segment is free");
                    }
                }
                let kept = self.summaries[block];
                let stale = (kept & STALE) >> 7;
                if (summaries ^ kept) & !(stale * 0xff) != 0 {
                    return Err("a summary differs from its word");
                }
                let (stale_blocks, shape) = (2 * ORDERS * self.shape.words(), &self.shape);
                if stale != 0
                    && bitmap::next(&self.hints[stale_blocks..], shape, block) != Some(block)
                {
                    return Err("a stale block is not listed");
                }
                let summaries = kept & !STALE;
                free += self.free_in(block);
                if self.type_of(block) == MigrateType::Cma {
                    cma += self.free_in(block);
                }
                let set = self.type_of(block).hint_set();
                let mut mask = u32::from(bits::orders(summaries) & 0x1ff);
                if summaries == WHOLE {
                    mask = match self.whole_pair(segment, block) {
                        None => 1 << 9,
                        Some(pair) if pair > block => 1 << 10,
                        Some(_) => 0,
                    };
                }
                for candidate in 0..2 {
                    for order in 0..ORDERS {
                        let listed = self.hint_next(candidate, order, block) == Some(block);
                        let due = set == Some(candidate) && mask >> order & 1 != 0;
                        if listed != due {
                            return Err("a hint differs from its block");
                        }
                    }
                }
            }
        }
        for (set, present) in self.present.iter().enumerate() {
            for order in 0..if set == STALE_SET { 1 } else { ORDERS } {
                if self.hint_next(set, order, 0).is_some() != (present >> order & 1 != 0) {
                    return Err("a bitmap is empty and said not to be, or the other way round");
                }
            }
        }
        if free != self.free || cma != self.free_cma {
            return Err("the count of free frames differs from the bits");
        }
        Ok(())
    }
}
