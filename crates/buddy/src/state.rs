//! Everything behind an initialised allocator: immutable from then on, apart from what has locks or atomics.

use kmem_hal::sync::{AtomicPtr, AtomicU32, AtomicU64, LocalBool, Ordering};
use kmem_hal::{CpuId, Frame, FrameRange, Lock, NodeId, PhysAddr, RawLock};

use crate::cpu_cache::CpuArea;
use crate::pending::Pending;
use crate::reserved::Reserved;
use crate::zone::Zone;
use crate::zone::segment::Segment;

/// Everything behind an initialised allocator.
pub(crate) struct State<L: 'static> {
    pub zones: &'static [Zone<L>],
    /// All segments by address.
    pub segments: &'static [Segment],
    pub nodes: usize,
    /// For each node the zones in the order in which they are asked, `zones.len()` entries each.
    pub lists: &'static [u16],
    /// Areas of the CPUs that are online; null otherwise.
    pub cpus: &'static [AtomicPtr<CpuArea>],
    /// Set while a CPU that has no area is inside a zone's lock.
    pub bare: &'static [LocalBool],
    pub cpu_node: fn(CpuId) -> NodeId,
    pub distance: fn(NodeId, NodeId) -> u8,
    pub reserved: Reserved,
    /// Held by whoever changes the reserved list.
    pub reserved_lock: Lock<(), L>,
    pub misuse_count: AtomicU64,
    pub misuse_last: AtomicU64,
    pub misuse_kind: AtomicU32,
    /// Blocks that nested calls freed.
    pub pending: Pending,
    /// How many calls are about to refuse: meanwhile arrays stay empty (see [`crate::refusal`]).
    pub refusing: AtomicU32,
    /// Counts what came to the zones while somebody was about to refuse.
    pub gives: AtomicU64,
    pub metadata: FrameRange,
    pub min_free_kib: Option<u64>,
    pub reserve_ratio: [u32; 5],
}

impl<L: RawLock + 'static> State<L> {
    /// The area of a CPU.
    #[inline(always)]
    pub fn area(&self, cpu: CpuId) -> Option<&CpuArea> {
        let area = self.cpus.get(cpu.index())?.load(Ordering::Acquire);
        // SAFETY: a non-null pointer came from a `&'static CpuArea` in `build` or `cpu_online`.
        unsafe { area.as_ref() }
    }

    /// The node whose zones a CPU asks first.
    pub fn node_of(&self, cpu: CpuId) -> NodeId {
        nearest(self.nodes, (self.cpu_node)(cpu), self.distance)
    }

    /// The node whose memory a CPU is given first: that of [`node_of`](Self::node_of), or the nearest with memory where it has none.
    pub fn memory_node_of(&self, cpu: CpuId) -> NodeId {
        let node = self.node_of(cpu);
        let first = self.list(node.index()).first();
        first
            .and_then(|&zone| self.zones.get(usize::from(zone)))
            .map_or(node, |zone| zone.node)
    }

    /// How far one node is from another.
    pub fn distance_between(&self, from: NodeId, to: NodeId) -> u8 {
        (self.distance)(from, to)
    }

    /// The zones that node `node` asks, in order.
    #[inline]
    pub fn list(&self, node: usize) -> &'static [u16] {
        let count = self.zones.len();
        self.lists
            .get(node * count..(node + 1) * count)
            .unwrap_or(&[])
    }
}

/// The node itself where it is one of the `nodes` first, which have lists; otherwise the nearest of them: a node without memory may have any
/// number.
pub(crate) fn nearest(nodes: usize, node: NodeId, distance: fn(NodeId, NodeId) -> u8) -> NodeId {
    if node.index() < nodes {
        return node;
    }
    let others = (0..nodes).map(|other| NodeId::new(other as u16));
    others
        .min_by_key(|&other| distance(node, other))
        .unwrap_or(NodeId::ZERO)
}

/// Cuts a range of frames into what lies in segments, with the zone's index.
pub(crate) fn cut<L: RawLock + 'static>(
    zones: &[Zone<L>],
    range: FrameRange,
) -> impl Iterator<Item = (&Segment, FrameRange)> {
    zones
        .iter()
        .flat_map(|zone| zone.segments)
        .filter_map(move |segment| {
            let own = FrameRange::from_numbers(segment.first, segment.end)?;
            let part = own.intersection(range);
            (!part.is_empty()).then_some((segment, part))
        })
}

/// The end of the frames that a request with this address limit may have.
pub(crate) fn frame_limit(max_address: PhysAddr) -> u64 {
    match max_address.checked_add(1) {
        Some(end) => Frame::containing(end).number(),
        None => Frame::LIMIT,
    }
}
