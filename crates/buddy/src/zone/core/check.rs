//! Recounts: free blocks by order for the views, and whether everything derived agrees with the words.

use super::super::bitmap;
use super::super::bits::{self, BLOCK_ORDER, ORDERS, STALE, TOP, WHOLE, WORDS};
use super::super::kind::MigrateType;
use super::{Core, LONG, ROWS, STALE_SET, STEP};

impl Core {
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
                let kept = self.summaries_of(block);
                let stale = (kept & STALE) >> 7;
                if (summaries ^ kept) & !(stale * 0xff) != 0 {
                    return Err("a summary differs from its word");
                }
                let (stale_blocks, shape) = (2 * ROWS * self.shape.words(), &self.shape);
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
                    for row in 0..ROWS {
                        let listed = self.hint_next(candidate, row, block) == Some(block);
                        let order = if row < ORDERS { row } else { row - LONG };
                        let due = set == Some(candidate)
                            && mask >> order & 1 != 0
                            && (order >= BLOCK_ORDER || self.row_of(block, order) == row);
                        if listed != due {
                            return Err("a hint differs from its block");
                        }
                    }
                }
            }
        }
        for (set, present) in self.present.iter().enumerate() {
            for order in 0..if set == STALE_SET { 1 } else { ROWS } {
                if self.hint_next(set, order, 0).is_some() != (present >> order & 1 != 0) {
                    return Err("a bitmap is empty and said not to be, or the other way round");
                }
            }
        }
        let high_atomic = (0..self.types.len())
            .filter(|&block| self.type_of(block) == MigrateType::HighAtomic)
            .count();
        if high_atomic as u64 != self.high_atomic {
            return Err("the count of kept page blocks differs from the types");
        }
        if free != self.free || cma != self.free_cma {
            return Err("the count of free frames differs from the bits");
        }
        Ok(())
    }
}
