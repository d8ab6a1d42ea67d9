//! Giving blocks back: their bits are looked at first, so that what is free cannot become free again.

use super::super::bits::{self, BLOCK_FRAMES, WORDS};
use super::super::segment::{self, Segment};
use super::Core;

/// Why a block was not taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GiveError {
    /// All frames are free already.
    Free,
    /// Some frames are free already: a wrong order, or a double free of a part.
    PartlyFree,
}

impl Core {
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
    pub(super) fn count_run(&self, block: usize, offset: u32, order: usize) -> (u32, u32) {
        let at = block * WORDS + offset as usize / 64;
        if order <= 6 {
            let mask = bits::run_mask(offset % 64, order);
            return ((self.words[at] & mask).count_ones(), mask.count_ones());
        }
        let words = &self.words[at..at + (1 << (order - 6))];
        (words.iter().map(|word| word.count_ones()).sum(), 1 << order)
    }
}
