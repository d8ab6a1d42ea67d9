//! The memory of the world: two nodes, four zones with holes, unaligned ends.
#![allow(dead_code)]

use kmem_buddy::{ZoneKind, ZoneLimits};
use kmem_hal::{FrameRange, NodeId};

use super::twin::TOP;

/// Frames of a page block.
pub const BLOCK: u64 = 512;

/// One past the last frame.
pub const END: u64 = 0x1155;

/// Where kinds of zones end.
pub const LIMITS: ZoneLimits = ZoneLimits {
    dma: Some(0x3a0),
    dma32: None,
    normal: Some(0xc00),
    movable: None,
};

/// Where memory begins and ends; frame 0 is none of it.
const PRESENT: [(u64, u64); 3] = [(1, 0x9f), (0x100, 0x777), (0x7ff, END)];

/// The zones: node, kind, first frame, and one past the last.
pub const ZONES: [(u16, ZoneKind, u64, u64); 4] = [
    (0, ZoneKind::Dma, 0, 0x3a0),
    (0, ZoneKind::Normal, 0x3a0, 0xa00),
    (1, ZoneKind::Normal, 0xa00, 0xc00),
    (1, ZoneKind::HighMem, 0xc00, END),
];

/// Nodes with memory.
pub const NODES: u16 = 2;

/// The block of the top order that begins with a frame.
pub fn top_block(first: u64) -> FrameRange {
    FrameRange::from_numbers(first, first + (1 << TOP)).unwrap()
}

/// The zone of a frame: its node, its kind, where it begins and ends.
pub fn zone_of(frame: u64) -> (u16, ZoneKind, u64, u64) {
    let zone = ZONES.iter().find(|&&(.., end)| frame < end);
    *zone.unwrap_or(&ZONES[ZONES.len() - 1])
}

/// The node of a frame.
pub fn node_of(frame: u64) -> NodeId {
    NodeId::new(zone_of(frame).0)
}

/// The run of memory of one zone that wholly holds the range: where it begins and ends.
pub fn segment_of(range: FrameRange) -> Option<(u64, u64)> {
    let (first, end) = (range.first().number(), range.end_number());
    let (.., low, high) = zone_of(first);
    let mut runs = PRESENT
        .map(|run| (run.0.max(low), run.1.min(high)))
        .into_iter();
    runs.find(|run| !range.is_empty() && run.0 <= first && end <= run.1)
}
