//! Frees that did no more than set their bits, and bringing their blocks up to date.
//!
//! A free of order <= 5 marks its word stale where the word's summary changes, which costs a few instructions; the lists follow once for
//! all frees since the last time (`I2`, `I5` of [`super`]).

use super::super::bits::{self, STALE, WORDS};
use super::super::segment;
use super::{Core, STALE_SET};

impl Core {
    /// Notes that frames of a word were freed and nothing else was done about it.
    #[inline]
    pub(super) fn set_stale(&mut self, block: usize, word: usize) {
        let before = self.summaries_of(block);
        self.put_summaries(block, before | 0x80 << (8 * word));
        if before & STALE == 0 {
            self.hint_set(STALE_SET, 0, block);
        }
    }

    /// Brings the summaries and hints of a block up to date.
    pub(super) fn refresh_block(&mut self, block: usize) {
        let before = self.summaries_of(block);
        let mut stale = before & STALE;
        if stale == 0 {
            return;
        }
        let Some(segment) = segment::of_block(self.segments, block) else {
            return;
        };
        let mut after = before & !STALE;
        self.put_summaries(block, after);
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
}
