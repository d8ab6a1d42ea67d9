//! Runs of any length and at any place: whether they are free, where one is, taking and freeing them.

use super::super::bits::{BLOCK_FRAMES, WORDS};
use super::super::kind::MigrateType;
use super::super::segment::Segment;
use super::Core;

impl Core {
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
    /// and lies in blocks of types that are `allowed`.
    pub fn find_range(
        &self,
        count: u64,
        align: u64,
        limit: u64,
        allowed: impl Fn(MigrateType) -> bool,
    ) -> Option<u64> {
        for segment in self.segments {
            let end = segment.end.min(limit);
            let mut at = segment.first;
            while at < end {
                let start = self.next_in(segment, at, end, true, &allowed);
                let stop = self.next_in(segment, start, end, false, &allowed);
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
    fn next_in(
        &self,
        segment: &Segment,
        mut at: u64,
        end: u64,
        free: bool,
        allowed: impl Fn(MigrateType) -> bool,
    ) -> u64 {
        while at < end {
            let block = segment.block_of(at);
            let word = self.words[block * WORDS + (at % BLOCK_FRAMES) as usize / 64];
            let word = if allowed(self.type_of(block)) {
                word
            } else {
                0
            };
            let sought = (if free { word } else { !word }) >> (at % 64);
            if sought != 0 {
                return end.min(at + u64::from(sought.trailing_zeros()));
            }
            at = (at | 63) + 1;
        }
        end
    }
}
