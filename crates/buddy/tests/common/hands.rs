//! Who has which frames: a set of intervals, none of which overlaps another.
//!
//! An interval is what one call gave and one call takes back. Frames of no interval are free, or never were the allocator's.
#![allow(dead_code)]

use std::collections::BTreeMap;

use kmem_hal::FrameRange;

/// Whose an interval is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hand {
    /// A block or run that was allocated.
    Held,
    /// A user's page, with its id.
    Page(u64),
    /// A range that was emptied and taken.
    Claimed,
    /// The arrays of a CPU that came online; never given back.
    Arrays,
}

/// The intervals: where each begins, where it ends, whose it is.
#[derive(Debug, Default)]
pub struct Hands(BTreeMap<u64, (u64, Hand)>);

impl Hands {
    /// Puts frames into a hand.
    ///
    /// # Panics
    ///
    /// Where one of them is in a hand already.
    pub fn take(&mut self, range: FrameRange, hand: Hand) {
        let (first, end) = (range.first().number(), range.end_number());
        let below = self.0.range(..end).next_back();
        let apart = below.is_none_or(|(_, &(other, _))| other <= first);
        assert!(apart, "{range:?} for {hand:?} overlaps {below:x?}");
        self.0.insert(first, (end, hand));
    }

    /// Takes an interval out of its hand; whose it was.
    ///
    /// # Panics
    ///
    /// Where there is no such interval.
    pub fn give(&mut self, range: FrameRange) -> Hand {
        let (end, hand) = self.0.remove(&range.first().number()).unwrap();
        assert_eq!(end, range.end_number(), "{range:?}");
        hand
    }

    /// All intervals, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (FrameRange, Hand)> + '_ {
        let range = |first, end| FrameRange::from_numbers(first, end).unwrap();
        let intervals = self.0.iter();
        intervals.map(move |(&first, &(end, hand))| (range(first, end), hand))
    }

    /// Frames that are in some hand.
    pub fn frames(&self) -> u64 {
        self.iter().map(|(range, _)| range.count()).sum()
    }
}
