//! The buddy system by the textbook: lists of free blocks by order, split and merge as drawn on a blackboard.
//!
//! One operation enum serves proptest and libFuzzer; unlike the twin of testkit this one gives and takes by place. It keeps,
//! for each zone, `free_area[11]`: the free blocks of every order, by first frame.
//!
//! ```text
//!   order 5   [ 32 frames ]                    take order 3 at the lowest place:
//!   order 4   [ 16 ][ 16 ]
//!   order 3   [ 8 ][ 8 ]                        the lower 8 are given, [8] and [16] stay on the lists
//!
//!   give order 3: its buddy (number ^ 8) is free, so both become 16; that one's buddy is free, so 32 again
//! ```
//!
//! Invariants
//! - `T1`: no two blocks on the lists overlap; each is naturally aligned and inside its zone.
//! - `T2`: no two buddies are on one list below the top order: they would have merged.
//!
//! So the lists are a function of the set of free frames, and an allocator of any other mechanism must show the same
//! counts whenever its caches are empty. Source: Knuth, The Art of Computer Programming, volume 1, 2.5 (buddy system); Linux
//! mm/page_alloc.c.

#![allow(dead_code)]

use std::collections::BTreeSet;

use arbitrary::Arbitrary;
use proptest::prelude::*;

/// The highest order that is merged to.
pub const TOP: usize = 10;

/// One call of a page-frame allocator. Numbers out of range wrap or are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Arbitrary)]
pub enum BuddyOp {
    /// Allocates one block.
    Alloc {
        /// log2 of the frames.
        order: u8,
        /// log2 of the alignment.
        align: u8,
        /// The frame number that it must end at or below.
        limit: Option<u16>,
        /// 0 unmovable, 1 reclaimable, others movable.
        mobility: u8,
        /// With zeroed bytes.
        zeroed: bool,
    },
    /// Allocates many blocks in one call.
    Batch {
        /// log2 of the frames of each.
        order: u8,
        /// How many.
        count: u8,
        /// As above.
        mobility: u8,
    },
    /// Frees a block that is held.
    Free(u16),
    /// Frees several in one call.
    FreeBatch(u16, u8),
    /// Allocates the block at a place.
    At {
        /// A frame in the block.
        first: u16,
        /// Its order.
        order: u8,
    },
    /// Allocates contiguous frames.
    Range {
        /// How many.
        frames: u16,
        /// log2 of the alignment.
        align: u8,
    },
    /// Allocates exactly these frames and frees them again.
    RangeAt {
        /// The first.
        first: u16,
        /// How many.
        frames: u16,
    },
    /// Frees a block twice; the second time is refused.
    DoubleFree(u16),
    /// Frees a frame that is not the allocator's.
    Foreign(u16),
    /// Empties the caches and compares everything.
    Drain,
    /// Frees what was reserved for the boot.
    Release,
}

/// Operations on memory of about `frames` frames.
pub fn buddy_op(frames: u16) -> impl Strategy<Value = BuddyOp> {
    let order = || prop_oneof![6 => 0..4u8, 3 => 4..=10u8, 1 => 11..=13u8];
    let align = prop_oneof![5 => Just(0), 1 => 0..12u8];
    let limit = prop_oneof![4 => Just(None), 1 => (0..frames).prop_map(Some)];
    prop_oneof![
        12 => (order(), align, limit, 0..5u8, any::<bool>()).prop_map(
            |(order, align, limit, mobility, zeroed)| BuddyOp::Alloc { order, align, limit, mobility, zeroed }
        ),
        3 => (0..6u8, 1..90u8, 0..5u8)
            .prop_map(|(order, count, mobility)| BuddyOp::Batch { order, count, mobility }),
        10 => any::<u16>().prop_map(BuddyOp::Free),
        2 => (any::<u16>(), 1..90u8).prop_map(|(at, count)| BuddyOp::FreeBatch(at, count)),
        2 => (0..frames, 0..11u8).prop_map(|(first, order)| BuddyOp::At { first, order }),
        2 => (0..frames / 3, 0..11u8).prop_map(|(frames, align)| BuddyOp::Range { frames, align }),
        1 => (0..frames, 0..300u16).prop_map(|(first, frames)| BuddyOp::RangeAt { first, frames }),
        1 => any::<u16>().prop_map(BuddyOp::DoubleFree),
        1 => (0..frames.saturating_mul(2)).prop_map(BuddyOp::Foreign),
        2 => Just(BuddyOp::Drain),
        1 => Just(BuddyOp::Release),
    ]
}

/// One zone's lists.
#[derive(Clone, Debug)]
pub struct ZoneTwin {
    first: u64,
    end: u64,
    free_area: [BTreeSet<u64>; TOP + 1],
}

impl ZoneTwin {
    /// A zone of the frames `first..end`, none of them free.
    #[must_use]
    pub fn new(first: u64, end: u64) -> Self {
        Self {
            first,
            end,
            free_area: Default::default(),
        }
    }

    /// Whether the frame belongs to the zone.
    #[must_use]
    pub fn contains(&self, frame: u64) -> bool {
        (self.first..self.end).contains(&frame)
    }

    /// Blocks on each list.
    #[must_use]
    pub fn counts(&self) -> [u64; TOP + 1] {
        core::array::from_fn(|order| self.free_area[order].len() as u64)
    }

    /// Free frames.
    #[must_use]
    pub fn free(&self) -> u64 {
        self.counts()
            .iter()
            .enumerate()
            .map(|(order, count)| count << order)
            .sum()
    }

    /// The free block that holds the frame: first frame and order.
    #[must_use]
    pub fn holder(&self, frame: u64) -> Option<(u64, usize)> {
        (0..=TOP)
            .map(|order| (frame >> order << order, order))
            .find(|&(first, order)| self.free_area[order].contains(&first))
    }

    /// Whether all frames of `first..end` are free.
    #[must_use]
    pub fn is_free(&self, first: u64, end: u64) -> bool {
        let mut at = first;
        while at < end {
            let Some((block, order)) = self.holder(at) else {
                return false;
            };
            at = block + (1 << order);
        }
        true
    }

    /// Takes the lowest block of the smallest order that is large enough, and gives its lower part.
    pub fn alloc(&mut self, order: usize) -> Option<u64> {
        let (first, found) =
            (order..=TOP).find_map(|found| Some((*self.free_area[found].first()?, found)))?;
        self.free_area[found].remove(&first);
        for half in (order..found).rev() {
            self.free_area[half].insert(first + (1 << half));
        }
        Some(first)
    }

    /// Takes one free frame, wherever it is.
    ///
    /// # Panics
    ///
    /// Where it is not free.
    pub fn take_frame(&mut self, frame: u64) {
        let Some((mut first, order)) = self.holder(frame) else {
            panic!("frame {frame:#x} was not free");
        };
        self.free_area[order].remove(&first);
        for half in (0..order).rev() {
            let upper = first + (1 << half);
            if frame < upper {
                self.free_area[half].insert(upper);
            } else {
                self.free_area[half].insert(first);
                first = upper;
            }
        }
    }

    /// Gives a block back and merges it with its buddy as often as that is free.
    ///
    /// # Panics
    ///
    /// Where some of it is free already or outside the zone.
    pub fn give(&mut self, first: u64, order: usize) {
        assert!(
            self.contains(first) && first + (1 << order) <= self.end,
            "outside the zone"
        );
        assert!(
            (first..first + (1 << order)).all(|frame| self.holder(frame).is_none()),
            "block {first:#x} of order {order} is partly free already"
        );
        let (mut first, mut order) = (first, order);
        while order < TOP && self.free_area[order].remove(&(first ^ (1 << order))) {
            first &= !(1 << order);
            order += 1;
        }
        self.free_area[order].insert(first);
    }

    /// Gives the frames of `first..end` that belong to the zone.
    pub fn give_range(&mut self, first: u64, end: u64) {
        for frame in first.max(self.first)..end.min(self.end) {
            self.give(frame, 0);
        }
    }

    /// Takes the frames of `first..end`.
    ///
    /// # Panics
    ///
    /// Where one of them is not free.
    pub fn take_range(&mut self, first: u64, end: u64) {
        for frame in first..end {
            self.take_frame(frame);
        }
    }
}
