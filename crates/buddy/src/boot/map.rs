//! The boot map: what firmware and boot loader say about physical memory, made consistent.

use kmem_hal::{FrameRange, NodeId, PAGE_SIZE, PhysAddr};

use super::error::{BootList, BootMapError};
use super::kind::{RegionKind, Reservation};
use super::pieces::{Piece, Pieces, Rank};

/// A region of the sorted, merged map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootRegion {
    /// The first byte.
    pub base: PhysAddr,
    /// Bytes.
    pub length: u64,
    /// What it is.
    pub kind: RegionKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct OfNode(NodeId);

impl Rank for OfNode {
    fn rank(self) -> u32 {
        0
    }
}

/// The map of physical memory at boot.
///
/// Takes regions unsorted, overlapping and unaligned, from any boot protocol, with up to `N` disjoint pieces in each
/// of its three lists: regions, reservations inside usable memory, node ranges. A map of the default capacity takes 25
/// KiB: put it in a `static` or on a boot stack that has the room.
///
/// Frame 0 is left out, since a kernel that maps memory at offset 0 could not tell its pointer from null; Linux
/// leaves it out as well.
///
/// # Examples
///
/// ```
/// use kmem_buddy::{BootMap, RegionKind, Reservation};
/// use kmem_hal::PhysAddr;
///
/// let mut map: BootMap = BootMap::new();
/// map.push(PhysAddr::new(0), 64 << 20, RegionKind::Usable)?;
/// map.push(PhysAddr::new(0x9fc00), 0x60400, RegionKind::Reserved)?; // wins over usable
/// map.reserve(PhysAddr::new(1 << 20), 2 << 20, Reservation::KernelImage)?;
/// assert_eq!(map.present_frames(), 16384 - 97 - 1);
/// assert_eq!(map.free_frames(), 16384 - 97 - 1 - 512);
/// # Ok::<(), kmem_buddy::BootMapError>(())
/// ```
#[doc(alias = "e820_table")]
#[doc(alias = "memblock")]
#[derive(Clone, Debug)]
pub struct BootMap<const N: usize = 256> {
    regions: Pieces<RegionKind, N>,
    reservations: Pieces<Reservation, N>,
    nodes: Pieces<OfNode, N>,
    /// Calls so far, for the index in errors.
    calls: [usize; 3],
    limit: u64,
    first_byte: u64,
}

impl<const N: usize> BootMap<N> {
    /// A map without regions, for 52-bit physical addresses.
    #[must_use]
    pub const fn new() -> Self {
        Self::with_address_bits(52)
    }

    /// A map for a processor with `bits` bits of physical address (at most 63; CPUID leaf 8000_0008h tells).
    #[must_use]
    pub const fn with_address_bits(bits: u32) -> Self {
        Self {
            regions: Pieces::new(),
            reservations: Pieces::new(),
            nodes: Pieces::new(),
            calls: [0; 3],
            limit: 1 << if bits > 63 { 63 } else { bits },
            first_byte: PAGE_SIZE,
        }
    }

    /// Counts frame 0 as memory, too.
    #[must_use]
    pub const fn with_frame_zero(mut self) -> Self {
        self.first_byte = 0;
        self
    }

    /// Adds a region of `length` bytes at `base` as firmware lists it.
    ///
    /// # Errors
    ///
    /// [`BootMapError`] for an entry that cannot be, naming its index, the field and the value. The map is unchanged.
    #[doc(alias = "e820__range_add")]
    #[doc(alias = "memblock_add")]
    pub fn push(
        &mut self,
        base: PhysAddr,
        length: u64,
        kind: RegionKind,
    ) -> Result<(), BootMapError> {
        let (start, end) = self.check(BootList::Regions, base, length)?;
        let index = self.calls[0] - 1;
        self.regions
            .insert(start, end, kind)
            .map_err(|count| full::<N>(BootList::Regions, index, count))
    }

    /// Marks `length` bytes at `base` as taken: kernel image, initrd, boot structures. Need not be usable memory.
    ///
    /// # Errors
    ///
    /// As [`push`](Self::push).
    #[doc(alias = "memblock_reserve")]
    pub fn reserve(
        &mut self,
        base: PhysAddr,
        length: u64,
        why: Reservation,
    ) -> Result<(), BootMapError> {
        let (start, end) = self.check(BootList::Reservations, base, length)?;
        let index = self.calls[1] - 1;
        self.reservations
            .insert(start, end, why)
            .map_err(|count| full::<N>(BootList::Reservations, index, count))
    }

    /// Says that `length` bytes at `base` belong to memory node `node` (an SRAT entry).
    ///
    /// Memory that no entry names belongs to node 0.
    ///
    /// # Errors
    ///
    /// As [`push`](Self::push), and [`BootMapError::NodeOverlap`] where another node has some of the bytes.
    #[doc(alias = "memblock_set_node")]
    pub fn assign_node(
        &mut self,
        base: PhysAddr,
        length: u64,
        node: NodeId,
    ) -> Result<(), BootMapError> {
        let (start, end) = self.check(BootList::Nodes, base, length)?;
        let index = self.calls[2] - 1;
        let clash = self
            .nodes
            .iter()
            .find(|piece| piece.start < end && start < piece.end && piece.kind.0 != node);
        if let Some(piece) = clash {
            return Err(BootMapError::NodeOverlap {
                index,
                address: piece.start.max(start),
                owner: piece.kind.0.get(),
                node: node.get(),
            });
        }
        self.nodes
            .insert(start, end, OfNode(node))
            .map_err(|count| full::<N>(BootList::Nodes, index, count))
    }

    fn check(
        &mut self,
        list: BootList,
        base: PhysAddr,
        length: u64,
    ) -> Result<(u64, u64), BootMapError> {
        let calls = &mut self.calls[list as usize];
        let index = *calls;
        *calls += 1;
        let base = base.as_u64();
        if length == 0 {
            return Err(BootMapError::ZeroLength { list, index, base });
        }
        let Some(last) = base.checked_add(length - 1) else {
            return Err(BootMapError::Wraps {
                list,
                index,
                base,
                length,
            });
        };
        if last >= self.limit {
            let limit = self.limit;
            return Err(BootMapError::TooHigh {
                list,
                index,
                last,
                limit,
            });
        }
        Ok((base, last + 1))
    }

    /// The regions, sorted, merged, disjoint.
    pub fn regions(&self) -> impl Iterator<Item = BootRegion> + Clone + '_ {
        self.regions.iter().map(|piece| BootRegion {
            base: PhysAddr::new(piece.start),
            length: piece.end - piece.start,
            kind: piece.kind,
        })
    }

    /// The reservations, sorted, merged, disjoint: base, bytes, reason.
    pub fn reservations(&self) -> impl Iterator<Item = (PhysAddr, u64, Reservation)> + Clone + '_ {
        self.reservations.iter().map(|piece| {
            (
                PhysAddr::new(piece.start),
                piece.end - piece.start,
                piece.kind,
            )
        })
    }

    /// The frames that are memory, reserved ones included: runs in ascending order.
    #[doc(alias = "for_each_mem_pfn_range")]
    pub fn present(&self) -> impl Iterator<Item = FrameRange> + '_ {
        self.runs()
            .map(|(start, end)| frames_inside(start, end))
            .filter(|range| !range.is_empty())
    }

    /// The present frames of each node in ascending order, cut where the node changes.
    pub fn present_by_node(&self) -> impl Iterator<Item = (NodeId, FrameRange)> + '_ {
        self.present().flat_map(move |run| {
            let mut rest = run;
            core::iter::from_fn(move || {
                if rest.is_empty() {
                    return None;
                }
                let (node, end) = self.node_span(rest.first().start().as_u64());
                let (head, tail) = rest.split_at(end.div_ceil(PAGE_SIZE));
                rest = tail;
                Some((node, head))
            })
        })
    }

    /// The node of the byte at `address`, and where that answer may change next.
    fn node_span(&self, address: u64) -> (NodeId, u64) {
        if let Some(piece) = self.nodes.find(address) {
            return (piece.kind.0, piece.end);
        }
        let next = self
            .nodes
            .iter()
            .map(|piece| piece.start)
            .find(|&start| start > address);
        (NodeId::ZERO, next.unwrap_or(u64::MAX))
    }

    /// The node that `address` belongs to.
    #[must_use]
    pub fn node_of(&self, address: PhysAddr) -> NodeId {
        self.node_span(address.as_u64()).0
    }

    /// How many nodes there are: one more than the highest number.
    #[must_use]
    pub fn node_count(&self) -> usize {
        self.nodes
            .iter()
            .map(|piece| piece.kind.0.index() + 1)
            .max()
            .unwrap_or(1)
    }

    /// How many frames are memory.
    #[must_use]
    pub fn present_frames(&self) -> u64 {
        self.present().map(FrameRange::count).sum()
    }

    /// Hands each run of frames that are memory and not reserved to `give`, ascending.
    pub fn for_each_free(&self, mut give: impl FnMut(FrameRange)) {
        self.for_each_gap(|start, end| {
            let range = frames_inside(start, end);
            if !range.is_empty() {
                give(range);
            }
        });
    }

    /// How many frames are memory and not reserved.
    #[must_use]
    pub fn free_frames(&self) -> u64 {
        let mut count = 0;
        self.for_each_free(|range| count += range.count());
        count
    }

    /// Hands each frame range that is reserved and touches memory to `give`, with the reason, ascending.
    ///
    /// Ranges may touch each other's edge frame where a reservation ends inside a frame.
    pub fn for_each_reserved(&self, mut give: impl FnMut(FrameRange, Reservation)) {
        for run in self.present() {
            for piece in self.taken() {
                let touched =
                    FrameRange::touching(PhysAddr::new(piece.start), piece.end - piece.start);
                let range = touched.intersection(run);
                if !range.is_empty() {
                    give(range, piece.kind);
                }
            }
        }
    }

    /// Reservations, and boot-reclaimable regions as such.
    fn taken(&self) -> impl Iterator<Item = Piece<Reservation>> + Clone + '_ {
        let regions = self.regions.iter().filter_map(|piece| {
            (piece.kind == RegionKind::BootReclaimable).then_some(Piece {
                start: piece.start,
                end: piece.end,
                kind: Reservation::BootStructures,
            })
        });
        self.reservations.iter().chain(regions)
    }

    /// Runs of bytes that are present, ascending.
    fn runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let first_byte = self.first_byte;
        let mut pieces = self
            .regions
            .iter()
            .filter(|piece| piece.kind.is_present())
            .peekable();
        core::iter::from_fn(move || {
            loop {
                let first = pieces.next()?;
                let mut end = first.end;
                while let Some(next) = pieces.next_if(|next| next.start == end) {
                    end = next.end;
                }
                if end > first_byte {
                    return Some((first.start.max(first_byte), end));
                }
            }
        })
    }

    /// Hands each gap of present bytes between reservations to `give`, ascending.
    pub(super) fn for_each_gap(&self, mut give: impl FnMut(u64, u64)) {
        for (start, end) in self.runs() {
            let mut at = start;
            // Both lists that make up `taken` are sorted, their chain is not: take the lowest next one each time.
            while at < end {
                let blocking = self
                    .taken()
                    .filter(|piece| piece.end > at && piece.start < end)
                    .min_by_key(|piece| piece.start);
                match blocking {
                    None => {
                        give(at, end);
                        at = end;
                    }
                    Some(piece) => {
                        if piece.start > at {
                            give(at, piece.start);
                        }
                        at = piece.end;
                    }
                }
            }
        }
    }

    pub(super) fn insert_taken(
        &mut self,
        start: u64,
        end: u64,
        why: Reservation,
    ) -> Result<(), usize> {
        self.reservations.insert(start, end, why)
    }

    pub(super) fn remove_taken(
        &mut self,
        start: u64,
        end: u64,
        why: Reservation,
    ) -> Result<(), usize> {
        self.reservations.remove(start, end, why)
    }

    /// Pieces of regions now.
    #[must_use]
    pub fn region_count(&self) -> usize {
        self.regions.len()
    }
}

impl<const N: usize> Default for BootMap<N> {
    fn default() -> Self {
        Self::new()
    }
}

fn full<const N: usize>(list: BootList, index: usize, count: usize) -> BootMapError {
    BootMapError::Full {
        list,
        index,
        count,
        capacity: N,
    }
}

fn frames_inside(start: u64, end: u64) -> FrameRange {
    FrameRange::inside(PhysAddr::new(start), end - start)
}
