//! Giving blocks back: their bits are looked at first, so that what is free cannot become free again.
//!
//! Invariant `G1`: a segment's page blocks are neighbours in the zone's tables, each with [`WORDS`] words and as many summaries.

use kmem_hal::sync::LocalU32;

use super::super::bits::{self, BLOCK_FRAMES, STALE, STALE_BYTE, WORDS};
use super::super::segment::{self, Segment};
use super::{Core, STALE_SET};

/// Why a block was not taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GiveError {
    /// All frames are free already.
    Free,
    /// Some frames are free already: a wrong order, or a double free of a part.
    PartlyFree,
}

/// Why a run of entries was not given back at once.
enum Stop {
    /// They end, or the next one is of another segment.
    Outside,
    /// This block became stale with the last one that was given.
    Stale(usize),
    /// The next one is wrong.
    Wrong(GiveError),
}

/// Whether a run of `order` (at most 5) that is freed at `place` leaves a word's summary as it is: its buddy is not wholly free, so that
/// nothing grows together, and the word has such a run already.
#[inline(always)]
const fn keeps_summary(word: u64, place: u32, order: usize, summary: u8) -> bool {
    let buddy = bits::run_mask(place ^ 1 << order, order);
    summary >> order & 1 != 0 && word & buddy != buddy
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
        let now = self.words[block * WORDS + word];
        self.words[block * WORDS + word] = now | bits::run_mask(offset % 64, order);
        if !keeps_summary(now, offset % 64, order, self.summaries[block][word]) {
            self.set_stale(block, word);
        }
        self.account(block, 1 << order, true);
        Ok(())
    }

    /// Gives blocks of one order (at most 5) back, each for the price of a few instructions.
    ///
    /// `entries` count from frame number `start`; a wrong one is handed to `wrong` and left out. None of them is in a block of type
    /// `Cma`: frees into those pass the arrays by, and a block becomes one only while all of it is free.
    pub fn give_entries(
        &mut self,
        start: u64,
        entries: &[LocalU32],
        order: usize,
        mut wrong: impl FnMut(GiveError, u64),
    ) {
        let Some(mut segment) = self.segments.first() else {
            return;
        };
        let mut rest = entries;
        let mut given = 0;
        while let Some(entry) = rest.first() {
            let first = start + u64::from(entry.get());
            if !segment.contains(first, 1 << order) {
                let found = segment::find(self.segments, first);
                if let Some(other) = found.filter(|found| found.contains(first, 1 << order)) {
                    segment = other;
                } else {
                    // Never pushed: every entry was found in a segment.
                    rest = &rest[1..];
                }
                continue;
            }
            let (done, stop) = self.give_in(segment, start, rest, order);
            given += done;
            match stop {
                Stop::Outside => rest = &rest[done..],
                Stop::Stale(block) => {
                    self.hint_set(STALE_SET, 0, block);
                    rest = &rest[done..];
                }
                Stop::Wrong(error) => {
                    wrong(error, start + u64::from(rest[done].get()));
                    rest = &rest[done + 1..];
                }
            }
        }
        self.free += (given as u64) << order;
    }

    /// Gives entries of one segment back until something is to be done about one of them; how many were given, and what it is.
    #[inline]
    fn give_in(
        &mut self,
        segment: &Segment,
        start: u64,
        entries: &[LocalU32],
        order: usize,
    ) -> (usize, Stop) {
        // Entries become places from the segment's first block on, which its words and summaries are cut out for.
        let base = segment.first & !(BLOCK_FRAMES - 1);
        let blocks = segment.block as usize..segment.block_end();
        let words = &mut self.words[blocks.start * WORDS..blocks.end * WORDS];
        let summaries = self.summaries[blocks.clone()].as_flattened_mut();
        let shift = start.wrapping_sub(base);
        let lowest = segment.first - base;
        let most = segment.end - segment.first - (1 << order);
        let run = bits::run_mask(0, order);
        debug_assert_eq!(words.len(), summaries.len());
        debug_assert!((lowest + most) / 64 < words.len() as u64);
        for (done, entry) in entries.iter().enumerate() {
            let place = u64::from(entry.get()).wrapping_add(shift);
            if place.wrapping_sub(lowest) > most {
                return (done, Stop::Outside);
            }
            let (at, mask) = ((place / 64) as usize, run << (place % 64));
            // SAFETY: G1: a place from `lowest` to `lowest + most` is in a block of the segment, and each of these has its words and as
            // many summaries in the slices.
            let (word, summary) =
                unsafe { (words.get_unchecked_mut(at), summaries.get_unchecked_mut(at)) };
            let now = *word;
            if now & mask != 0 {
                let error = if now & mask == mask {
                    GiveError::Free
                } else {
                    GiveError::PartlyFree
                };
                return (done, Stop::Wrong(error));
            }
            *word = now | mask;
            if *summary & STALE_BYTE != 0 || keeps_summary(now, place as u32 % 64, order, *summary)
            {
                continue;
            }
            *summary |= STALE_BYTE;
            let block = summaries[at & !(WORDS - 1)..].first_chunk();
            let stale = block.map_or(0, |&block| u64::from_le_bytes(block) & STALE);
            if stale.is_power_of_two() {
                return (done + 1, Stop::Stale(blocks.start + at / WORDS));
            }
        }
        (entries.len(), Stop::Outside)
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
