//! The buddy system by the textbook: lists of free blocks by order, split and merge as drawn on a blackboard.
//!
//! Unlike the twin of testkit this one gives and takes by place. It keeps, for each zone, `free_area[11]`: the free blocks of every
//! order, by first frame.
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

/// The highest order that is merged to.
pub const TOP: usize = 10;

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

    /// The first frames of the blocks on one list.
    pub fn blocks(&self, order: usize) -> impl Iterator<Item = u64> + '_ {
        self.free_area[order].iter().copied()
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
