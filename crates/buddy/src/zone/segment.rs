//! Runs of present frames, and finding the one a frame is in.
//!
//! Invariants
//! - `I1`: every frame of a segment is memory and belongs to the segment's zone; holes lie between segments.
//! - `I2`: segments of a table are sorted and disjoint.
//!
//! So a block that is naturally aligned and free lies in one segment, whatever the zone's edges are, and metadata is
//! sized by memory and not by the highest address.

use kmem_hal::sync::AtomicU8;

use super::bits::BLOCK_ORDER;

/// A run of present frames of one zone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    /// The first frame's number.
    pub first: u64,
    /// One past the last frame's number.
    pub end: u64,
    /// The zone's index in the state.
    pub zone: u32,
    /// The zone's index of the page block that holds `first`.
    pub block: u32,
    /// The zone's first frame number, from which arrays count.
    pub start: u64,
    /// The longest run of frames that were the allocator's from the beginning: none of them is reserved or out of reach.
    pub clean: (u64, u64),
    /// The types of the zone's page blocks.
    pub types: &'static [AtomicU8],
}

impl Segment {
    /// No segment: no frame is in it, and all others come before it.
    pub const NONE: Self = Self {
        first: u64::MAX,
        end: u64::MAX,
        zone: 0,
        block: 0,
        start: 0,
        clean: (0, 0),
        types: &[],
    };

    /// How many page blocks the frames `first..end` touch.
    pub const fn blocks(first: u64, end: u64) -> u64 {
        ((end - 1) >> BLOCK_ORDER) - (first >> BLOCK_ORDER) + 1
    }

    /// One past the segment's last block index.
    pub const fn block_end(&self) -> usize {
        self.block as usize + Self::blocks(self.first, self.end) as usize
    }

    /// The index of the block that holds frame `number`, which is in the segment.
    #[inline]
    pub const fn block_of(&self, number: u64) -> usize {
        self.block as usize + ((number >> BLOCK_ORDER) - (self.first >> BLOCK_ORDER)) as usize
    }

    /// The number of the first frame of block `block`, which may lie below the segment.
    #[inline]
    pub const fn base_of(&self, block: usize) -> u64 {
        ((block - self.block as usize) as u64 + (self.first >> BLOCK_ORDER)) << BLOCK_ORDER
    }

    /// Whether `first..first + count` is inside.
    #[inline]
    pub const fn contains(&self, first: u64, count: u64) -> bool {
        first >= self.first && first < self.end && count <= self.end - first
    }

    /// Whether `first..first + count` is known to be the allocator's without a look at the reserved list.
    #[inline]
    pub const fn is_clean(&self, first: u64, count: u64) -> bool {
        first >= self.clean.0 && first < self.clean.1 && count <= self.clean.1 - first
    }

    /// The other half of the order-10 block that `block` belongs to, where it has one here.
    #[inline]
    pub const fn pair_of(&self, block: usize) -> Option<usize> {
        if (self.base_of(block) >> BLOCK_ORDER) & 1 == 0 {
            if block + 1 < self.block_end() {
                Some(block + 1)
            } else {
                None
            }
        } else if block > self.block as usize {
            Some(block - 1)
        } else {
            None
        }
    }
}

/// The segment of a sorted table that holds frame `number`.
#[inline]
pub(crate) fn find(table: &[Segment], number: u64) -> Option<&Segment> {
    if let [only] = table {
        return only.contains(number, 1).then_some(only);
    }
    let after = table.partition_point(|segment| segment.first <= number);
    let segment = table.get(after.wrapping_sub(1))?;
    (number < segment.end).then_some(segment)
}

/// The segment of a zone's table that has block index `block`.
#[inline]
pub(crate) fn of_block(table: &[Segment], block: usize) -> Option<&Segment> {
    if let [only] = table {
        return Some(only);
    }
    let after = table.partition_point(|segment| segment.block as usize <= block);
    table.get(after.wrapping_sub(1))
}
