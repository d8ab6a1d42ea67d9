//! Taking blocks off their words: one by one, or all runs of a word at once.

use super::super::bits::{self, BLOCK_FRAMES, BLOCK_ORDER, EACH, WORDS};
use super::super::kind::MigrateType;
use super::super::segment::{self, Segment};
use super::{Core, Found};

/// Where taken blocks go.
pub(crate) trait Give {
    /// Takes one block by its first frame's number.
    fn one(&mut self, first: u64);
    /// Takes `count` blocks of `order` that follow each other.
    fn run(&mut self, first: u64, count: usize, order: usize);
}

/// The frames of `word` that are taken, and whether all its maximal runs of `run` (6 is all of it) went: the first `most` pieces of
/// `order` in them, below `limit`; each is handed to `give`. `base` is the word's first frame.
#[inline]
fn take_word(
    word: u64,
    (run, order): (usize, usize),
    base: u64,
    limit: u64,
    most: usize,
    give: &mut impl Give,
) -> (u64, bool) {
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
                return (taken, false);
            }
            taken |= bits::run_mask(start, order);
            give.one(first);
            left -= 1;
        }
        return (taken, true);
    }
    while starts != 0 {
        let start = starts.trailing_zeros();
        starts &= starts - 1;
        let first = base + u64::from(start);
        let pieces = 1 << (run - order);
        let count = allowed(first, left, pieces);
        if count == 0 {
            return (taken, false);
        }
        give.run(first, count, order);
        let frames = (count as u32) << order;
        taken |= (!0 >> (64 - frames)) << start;
        left -= count;
        if count < pieces {
            return (taken, false);
        }
    }
    (taken, true)
}

impl Core {
    /// Marks `2^order` frames from `offset` of `block` free or taken; they are the opposite now.
    pub(super) fn mark(
        &mut self,
        segment: &Segment,
        block: usize,
        offset: u32,
        order: usize,
        free: bool,
    ) {
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

    /// Takes the lower `2^order` frames of a run that `find` gave; the first frame's number.
    pub fn take(&mut self, found: &Found, order: usize) -> Option<u64> {
        let segment = segment::of_block(self.segments, found.block)?;
        self.settle_use(found, order);
        self.mark(segment, found.block, found.offset, order, false);
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
            let Some(segment) = segment::of_block(self.segments, found.block) else {
                break;
            };
            self.settle_use(&found, order);
            if order > 5 || most == 1 {
                give.one(segment.base_of(found.block) + u64::from(found.offset));
                self.mark(segment, found.block, found.offset, order, false);
                given += 1;
                continue;
            }
            // Inside words: all maximal runs of this order, cut into pieces of `order`. A longer run is one or more whole words.
            let base = segment.base_of(found.block);
            let run = found.order.min(6);
            let mut after = self.summaries_of(found.block);
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
                let (taken, all) = take_word(
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
                if all {
                    // What is left was beside these runs: no other run changed.
                    after &= !(1 << (8 * word + run));
                } else {
                    let byte = u64::from(bits::summary(value));
                    after = after & !(0xff << (8 * word)) | byte << (8 * word);
                }
                if taken == 0 {
                    break;
                }
            }
            self.set_summaries(segment, found.block, after);
            self.account(found.block, ((given - before) as u64) << order, false);
            if given == before {
                break;
            }
        }
        given
    }
}
