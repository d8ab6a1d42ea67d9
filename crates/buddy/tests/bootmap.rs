//! The boot map against a byte-by-byte reading, and against real machines.

mod common;

use kmem_buddy::{
    BootList, BootMap, BootMapError, EarlyAllocator, EarlyError, RegionKind, Reservation,
};
use kmem_hal::{FrameRange, NodeId, OffsetMap, PhysAddr};
use proptest::prelude::*;

fn pa(address: u64) -> PhysAddr {
    PhysAddr::new(address)
}

#[test]
fn real_maps_have_the_pages_that_linux_found() {
    let sun = common::parse(common::SUN);
    let mut by_node = [0; 8];
    for (node, range) in sun.present_by_node() {
        by_node[node.index()] += range.count();
    }
    assert_eq!(by_node[0], 4_194_104);
    assert_eq!(by_node[1..], [4_194_304; 7]);
    assert_eq!(sun.node_count(), 8);

    // "unavailable: 1 + 97 pages in DMA".
    let firecracker = common::parse(common::FIRECRACKER);
    let dma = FrameRange::from_numbers(0, 4096).unwrap();
    let present: u64 = firecracker
        .present()
        .map(|r| r.intersection(dma).count())
        .sum();
    assert_eq!(present, 4096 - 1 - 97);
    for text in [common::QEMU, common::ASUS, common::DELL] {
        assert!(common::parse(text).present_frames() > 10_000);
    }
}

#[test]
fn errors_name_entry_field_and_value() {
    let mut map: BootMap<4> = BootMap::with_address_bits(40);
    map.push(pa(0), 0x1000, RegionKind::Usable).unwrap();
    let zero = map.push(pa(0x5000), 0, RegionKind::Usable).unwrap_err();
    assert_eq!(
        zero.to_string(),
        "region 1: length: 0x0 bytes at base 0x5000"
    );
    let wraps = map.push(pa(u64::MAX), 2, RegionKind::Usable).unwrap_err();
    assert_eq!(
        wraps.to_string(),
        "region 2: length: 0x2 from base 0xffffffffffffffff wraps around the address space"
    );
    let high = map.push(pa(1 << 40), 1, RegionKind::Usable).unwrap_err();
    assert_eq!(
        high.to_string(),
        "region 3: end: 0x10000000000 is beyond the last physical address 0xffffffffff"
    );
    assert_eq!(map.regions().count(), 1);
    for base in [0x10000, 0x20000, 0x30000] {
        map.push(pa(base), 0x1000, RegionKind::Usable).unwrap();
    }
    let full = map
        .push(pa(0x40000), 0x1000, RegionKind::Usable)
        .unwrap_err();
    assert_eq!(
        full.to_string(),
        "region 7: count: 5 disjoint entries, and the map holds 4"
    );
    // The whole of the processor's space is legal, to the last byte.
    let mut top: BootMap = BootMap::new();
    top.push(pa((1 << 52) - 0x1000), 0x1000, RegionKind::Usable)
        .unwrap();
    assert_eq!(top.present_frames(), 1);
    top.assign_node(pa(0), 0x2000, NodeId::new(1)).unwrap();
    assert_eq!(
        top.assign_node(pa(0x1000), 0x1000, NodeId::new(2))
            .unwrap_err(),
        BootMapError::NodeOverlap {
            index: 1,
            address: 0x1000,
            owner: 1,
            node: 2
        }
    );
    assert!(matches!(
        top.reserve(pa(1), 0, Reservation::Initrd).unwrap_err(),
        BootMapError::ZeroLength {
            list: BootList::Reservations,
            index: 0,
            base: 1
        }
    ));
}

#[test]
fn early_allocator_takes_from_the_top_and_gives_back() {
    let mut map: BootMap = BootMap::new();
    map.push(pa(0), 0x10_0000, RegionKind::Usable).unwrap();
    map.reserve(pa(0xf_f000), 0x1000, Reservation::KernelImage)
        .unwrap();
    // SAFETY: no memory is accessed through the map.
    let memory = unsafe { OffsetMap::new(0, 0x1000) };
    // SAFETY: X1: no memory is accessed.
    let mut early = unsafe { EarlyAllocator::new(&mut map, &memory) };
    let a = early.alloc(24, 8).unwrap();
    assert_eq!(a, pa(0xf_f000 - 24));
    let b = early.alloc(4096, 4096).unwrap();
    assert_eq!(b, pa(0xf_d000));
    assert_eq!(
        early.alloc(0, 8).unwrap_err(),
        EarlyError::BadRequest { bytes: 0, align: 8 }
    );
    assert!(matches!(
        early.alloc(1 << 40, 8),
        Err(EarlyError::NoSpace { .. })
    ));
    // SAFETY: X1: no memory is accessed.
    let low = unsafe { EarlyAllocator::new(early_map(&mut early), &memory) }
        .below(pa(0x8000))
        .alloc(1, 1);
    assert_eq!(low.unwrap(), pa(0x7fff));
    assert_eq!(map.free_frames(), 256 - 1 - 1 - 1 - 1 - 1);
    // SAFETY: X1: no memory is accessed.
    let mut early = unsafe { EarlyAllocator::new(&mut map, &memory) };
    // SAFETY: nobody uses these bytes.
    unsafe { early.free(a, 24).unwrap() };
    assert_eq!(map.free_frames(), 256 - 1 - 1 - 1 - 1);
}

fn early_map<'a, M>(early: &'a mut EarlyAllocator<'_, M>) -> &'a mut BootMap
where
    M: kmem_hal::PhysMap,
{
    // SAFETY: X1: no memory is accessed.
    unsafe { early.map_mut() }
}

/// A page-sized world of 64 bytes a frame would be handy; real frames it is: 40 frames, quarter-frame edges.
const QUARTERS: u64 = 160;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn agrees_with_a_byte_map(
        regions in prop::collection::vec((0..QUARTERS, 1..60u64, 0..4u32), 0..14),
        taken in prop::collection::vec((0..QUARTERS, 1..30u64), 0..6),
    ) {
        let mut map: BootMap<64> = BootMap::new();
        let mut bytes = [None::<u32>; 256];
        let mut reserved = [false; 256];
        for &(at, len, kind) in &regions {
            let kinds = [
                RegionKind::Usable,
                RegionKind::BootReclaimable,
                RegionKind::AcpiNvs,
                RegionKind::Reserved,
            ];
            map.push(pa(at * 1024), len * 1024, kinds[kind as usize]).unwrap();
            for byte in &mut bytes[at as usize..(at + len) as usize] {
                *byte = (*byte).max(Some(kind));
            }
        }
        for &(at, len) in &taken {
            map.reserve(pa(at * 1024), len * 1024, Reservation::Other).unwrap();
            reserved[at as usize..(at + len) as usize].fill(true);
        }
        let frames = |good: &dyn Fn(usize) -> bool| -> Vec<u64> {
            (1..64u64).filter(|f| (0..4).all(|q| good((f * 4 + q) as usize))).collect()
        };
        let present = frames(&|q| matches!(bytes[q], Some(0 | 1)));
        let free = frames(&|q| bytes[q] == Some(0) && !reserved[q]);
        let mine: Vec<u64> =
            map.present().flat_map(|r| r.iter()).map(|f| f.number()).collect();
        prop_assert_eq!(mine, present);
        let mut mine = Vec::new();
        map.for_each_free(|range| mine.extend(range.iter().map(|f| f.number())));
        prop_assert_eq!(mine, free);
    }
}

#[test]
fn a_slice_of_values_without_bytes_has_its_length() {
    let mut map: BootMap = BootMap::new();
    map.push(pa(0), 1 << 20, RegionKind::Usable).unwrap();
    // SAFETY: only addresses are computed here, and nothing is accessed.
    let memory = unsafe { OffsetMap::new(0, 256) };
    // SAFETY: X1: the memory of this map is nobody's.
    let mut early = unsafe { EarlyAllocator::new(&mut map, &memory) };
    let mut made = 0;
    let units = early.alloc_slice(5, |_| made += 1).unwrap();
    assert_eq!((units.len(), made), (5, 5));
    assert_eq!(early.alloc_slice(0, |_| 7u32).unwrap().len(), 0);
    assert_eq!(early.map().free_frames(), 255);
}
