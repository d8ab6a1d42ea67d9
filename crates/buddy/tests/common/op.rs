//! The calls of the allocator as data: one enum for proptest and for libFuzzer.
//!
//! Fields are raw small numbers that the world reduces to what is possible, so that every list of bytes is a list of calls. A derived
//! decoder shares the values of a tag among all variants alike: whoever appends one writes the tags of the committed seeds anew.

#![allow(dead_code)]

use arbitrary::Arbitrary;
use proptest::prelude::*;

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
    /// Users allocate eight times so many pages, each with an id in its memory.
    Pages(u8),
    /// Changes what a user's page does when it is to move.
    Mood {
        /// Which page, modulo their number.
        which: u16,
        /// See `Mood::of`.
        mood: u8,
    },
    /// Users free pages: the first, and others at odd distances.
    FreePages {
        /// Which page, modulo their number.
        which: u16,
        /// How many.
        count: u8,
    },
    /// Empties exactly these frames and takes them.
    Claim {
        /// The first.
        first: u16,
        /// How many.
        frames: u16,
    },
    /// Gives a claimed range back.
    Unclaim(u16),
    /// Lends page blocks to movable users.
    Area {
        /// The first frame, in page blocks.
        block: u8,
        /// How many blocks, less one.
        more: u8,
    },
    /// Claims frames of a CMA area.
    CmaClaim {
        /// Which area.
        area: u8,
        /// How many frames.
        frames: u16,
        /// log2 of the alignment.
        align: u8,
    },
    /// Makes so many page blocks free.
    Compact(u8),
    /// Allocates where a node policy says.
    OnNode {
        /// See `policy_of`.
        policy: u8,
        /// log2 of the frames.
        order: u8,
        /// As above.
        mobility: u8,
    },
    /// The calls that follow are made on this CPU.
    OnCpu(u8),
    /// A CPU goes offline.
    Offline(u8),
    /// A CPU comes online.
    Online(u8),
    /// Whether CPUs can be called from each other.
    Deaf(bool),
}

/// Calls that allocate and free, on memory of about `frames` frames.
fn allocating(frames: u16) -> impl Strategy<Value = BuddyOp> {
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

fn order() -> impl Strategy<Value = u8> {
    prop_oneof![6 => 0..4u8, 3 => 4..=10u8, 1 => 11..=13u8]
}

/// Users' pages, and calls that empty ranges.
fn emptying(frames: u16) -> impl Strategy<Value = BuddyOp> {
    let length = || prop_oneof![3 => 1..40u16, 2 => 0..700u16];
    prop_oneof![
        4 => any::<u8>().prop_map(BuddyOp::Pages),
        3 => (any::<u16>(), any::<u8>()).prop_map(|(which, mood)| BuddyOp::Mood { which, mood }),
        2 => (any::<u16>(), any::<u8>()).prop_map(|(which, count)| BuddyOp::FreePages { which, count }),
        5 => (0..frames, length()).prop_map(|(first, frames)| BuddyOp::Claim { first, frames }),
        3 => any::<u16>().prop_map(BuddyOp::Unclaim),
        1 => area(),
        5 => (any::<u8>(), length(), 0..10u8)
            .prop_map(|(area, frames, align)| BuddyOp::CmaClaim { area, frames, align }),
        2 => (0..6u8).prop_map(BuddyOp::Compact),
    ]
}

fn area() -> impl Strategy<Value = BuddyOp> {
    (0..10u8, 0..3u8).prop_map(|(block, more)| BuddyOp::Area { block, more })
}

/// Requests by node, and CPUs that come and go.
fn placing() -> impl Strategy<Value = BuddyOp> {
    prop_oneof![
        5 => (any::<u8>(), order(), 0..5u8)
            .prop_map(|(policy, order, mobility)| BuddyOp::OnNode { policy, order, mobility }),
        4 => any::<u8>().prop_map(BuddyOp::OnCpu),
        2 => any::<u8>().prop_map(BuddyOp::Offline),
        2 => any::<u8>().prop_map(BuddyOp::Online),
        1 => prop::bool::weighted(0.3).prop_map(BuddyOp::Deaf),
    ]
}

/// Calls of all kinds on memory of about `frames` frames.
pub fn buddy_ops(frames: u16) -> impl Strategy<Value = Vec<BuddyOp>> {
    mixed(frames, [4, 2, 1])
}

/// The same where most frames are users', and ranges are emptied all the time; areas are lent while memory is free.
pub fn emptying_ops(frames: u16) -> impl Strategy<Value = Vec<BuddyOp>> {
    let areas = prop::collection::vec(area(), 0..4);
    (areas, mixed(frames, [1, 8, 1])).prop_map(|(areas, ops)| [areas, ops].concat())
}

fn mixed(frames: u16, shares: [u32; 3]) -> impl Strategy<Value = Vec<BuddyOp>> {
    let [allocated, emptied, placed] = shares;
    let op = prop_oneof![
        allocated => allocating(frames),
        emptied => emptying(frames),
        placed => placing(),
    ];
    prop::collection::vec(op, 1..120)
}
