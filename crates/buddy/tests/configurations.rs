//! Machines: unsorted and overlapping maps, zones that do not exist, any number of CPUs.

mod common;

use common::machine::{
    MIB, Machine, exhaust, machine, map, map_of_nodes, one_zone, start, start_on,
};
use common::played::{MANY, Played, become_cpu};
use common::window::Window;
use kmem_buddy::{
    BootMap, BootMapError, Config, EarlyAllocator, EarlyError, InitError, RegionKind, Reservation,
    ZoneKind, ZoneLimits,
};
use kmem_hal::{
    AllocError, CpuId, CpuSet, Frame, FrameRequest, FrameSink, FrameSource, NodeId, Order,
    PhysAddr, PhysMap,
};
use proptest::prelude::*;

fn kinds(buddy: &Machine<'_>) -> Vec<ZoneKind> {
    buddy.zones().map(|zone| zone.kind).collect()
}

#[test]
fn zones_that_do_not_exist_are_not_asked() {
    let window = Window::new(64 * MIB, 64 * MIB);
    let no_dma = ZoneLimits {
        dma: None,
        ..ZoneLimits::X86_64
    };
    let movable = ZoneLimits {
        movable: Some((32 * MIB) >> 12),
        ..ZoneLimits::X86_64
    };
    let cases: [(ZoneLimits, &[ZoneKind]); 5] = [
        (ZoneLimits::X86_64, &[ZoneKind::Dma, ZoneKind::Dma32]),
        (no_dma, &[ZoneKind::Dma32]),
        // 32 bits without HIGHMEM: the machine is smaller than 896 MiB.
        (ZoneLimits::X86_32, &[ZoneKind::Dma, ZoneKind::Normal]),
        (ZoneLimits::NORMAL_ONLY, &[ZoneKind::Normal]),
        (
            movable,
            &[ZoneKind::Dma, ZoneKind::Dma32, ZoneKind::Movable],
        ),
    ];
    for (limits, expected) in cases {
        let config = Config::new()
            .limits(limits)
            .min_free_kib(0)
            .reserve_ratio([0; 5]);
        let buddy = start(&window, &mut map(&[(0, 64 * MIB)]), &config);
        assert_eq!(kinds(&buddy), expected);
        for kind in ZoneKind::ALL {
            let printed = buddy
                .zone_info()
                .to_string()
                .contains(&format!("zone {:>8}\n", kind.name()));
            assert_eq!(printed, expected.contains(&kind), "{kind}");
        }
        // A device's limit is met whether or not a zone ends there.
        let device = buddy
            .alloc(&FrameRequest::new(Order::HUGE_2M).below(PhysAddr::new(16 * MIB)))
            .unwrap();
        assert!(device.range().end_number() <= (16 * MIB) >> 12);
        buddy.free(device);
        // Kernel data never lies in memory that only holds what can move.
        let mut kernel = Vec::new();
        while let Ok(frame) = buddy.alloc(&FrameRequest::ONE) {
            kernel.push(frame);
        }
        let movable: u64 = buddy
            .zones()
            .filter(|zone| zone.kind == ZoneKind::Movable)
            .map(|zone| zone.managed)
            .sum();
        assert_eq!(kernel.len() as u64, buddy.mem_info().total - movable);
        buddy.free_batch(&mut || kernel.pop());
        exhaust(&buddy);
    }
}

#[test]
fn a_machine_that_is_all_highmem_has_no_place_for_tables() {
    let window = Window::new(64 * MIB, 64 * MIB);
    window.set_reach(0);
    let limits = ZoneLimits {
        dma: None,
        dma32: None,
        normal: Some(0x100),
        movable: None,
    };
    let mut map = map(&[(2 * MIB, 64 * MIB)]);
    let buddy = machine(&window);
    // SAFETY: X1: the test's own memory, which only this allocator has.
    let result = unsafe { buddy.init(&mut map, &Config::new().limits(limits)) };
    assert!(
        matches!(result, Err(InitError::Metadata { .. })),
        "{result:?}"
    );
    assert_eq!(map.reservations().count(), 0);
}

/// 64 nodes of 16 MiB and 4096 CPUs, 64 a node, of which every 64th is online at boot.
#[test]
fn sixty_four_nodes_and_4096_cpus() {
    const NODE: u64 = 16 * MIB;
    let window = Window::new(64 * NODE, 64 * NODE);
    let mut map = map_of_nodes(64, NODE);
    assert_eq!(map.node_count(), 64);
    let config = one_zone()
        .cpus(1)
        .cpu_node(|cpu| NodeId::new((cpu.get() / 64) as u16))
        .distance(|from, to| 10 + 2 * from.get().abs_diff(to.get()) as u8);
    let buddy = start_on(MANY, &window, &mut map, &config);
    assert_eq!(buddy.zones().count(), 64);
    // What the slab allocator asks.
    assert_eq!(buddy.node_count(), 64);
    assert_eq!(buddy.node_of_cpu(CpuId::new(65)), NodeId::new(1));
    assert_eq!(buddy.node_distance(NodeId::new(3), NodeId::new(5)), 14);
    for (frame, node) in [(0, 0), (4095, 0), (4096, 1), (64 * 4096 - 1, 63)] {
        let frame = Frame::from_number(frame);
        assert_eq!(buddy.node_of_frame(frame), NodeId::new(node));
    }
    // CPUs that are not online cost a pointer each and nothing else: one CPU of 64 zones takes 64 arrays.
    let frames = (64 * NODE) >> 12;
    let budget = frames * 15 / 100 + 64 * 4096 + 4096 * 8 + 64 * 64 * 2 + 64 * 1024;
    let metadata = buddy.metadata().count() * 4096;
    assert!(metadata <= budget, "{metadata} of {budget}");
    let mut held = Vec::new();
    for cpu in (0..4096).step_by(64).chain([4095]) {
        become_cpu(cpu);
        buddy.cpu_online(CpuId::new(cpu)).unwrap();
        for _ in 0..2 {
            let frame = buddy.alloc(&FrameRequest::ONE).unwrap();
            assert_eq!(frame.first().number() / (NODE >> 12), u64::from(cpu / 64));
            held.push(frame);
        }
    }
    assert_eq!(
        buddy.cpu_online(CpuId::new(4096)),
        Err(AllocError::Unsatisfiable)
    );
    // Whose node is full is served by the nearest ones.
    become_cpu(40 * 64);
    let block = FrameRequest::new(Order::HUGE_2M);
    let mut order = Vec::new();
    for _ in 0..40 {
        let frame = buddy.alloc(&block).unwrap();
        let node = frame.first().number() / (NODE >> 12);
        if order.last() != Some(&node) {
            order.push(node);
        }
        held.push(frame);
    }
    assert_eq!(order[0], 40);
    assert!(
        order[1..].iter().all(|node| node.abs_diff(40) <= 4),
        "{order:?}"
    );
    buddy.free_batch(&mut || held.pop());
    assert_eq!(buddy.misuse(), None);
    buddy.check().unwrap();
    become_cpu(0);
}

/// One more than a set can name.
const CROWD: Played<{ CpuSet::CAPACITY + 1 }> = Played;

#[test]
fn more_cpus_than_a_set_can_name_are_refused() {
    let window = Window::new(64 * MIB, 64 * MIB);
    let mut map = map(&[(0, 64 * MIB)]);
    let free = map.free_frames();
    let buddy = Machine::new(&window, CROWD);
    // SAFETY: X1: the test's own memory, which only this allocator has.
    let error = unsafe { buddy.init(&mut map, &Config::new()) }.unwrap_err();
    assert_eq!(error, InitError::TooManyCpus { count: 4097 });
    assert_eq!(error.to_string(), "4097 CPUs: more than 4096");
    assert_eq!(map.free_frames(), free);
}

/// CPUs that come online share the zones with those that are: no more is kept in arrays than if all had been there at boot.
#[test]
fn cpus_that_come_later_share_the_zones() {
    let window = Window::new(1 << 30, 1 << 30);
    let cached = |at_boot: u32| {
        let mut map = map(&[(0, 1 << 30)]);
        let buddy = start_on(MANY, &window, &mut map, &one_zone().cpus(at_boot));
        for cpu in 0..64 {
            buddy.cpu_online(CpuId::new(cpu)).unwrap();
        }
        for cpu in 0..64 {
            become_cpu(cpu);
            for request in [FrameRequest::ONE, FrameRequest::new(Order::HUGE_2M)] {
                let frames = [(); 5].map(|()| buddy.alloc(&request).unwrap());
                frames.into_iter().for_each(|frame| buddy.free(frame));
            }
        }
        become_cpu(0);
        buddy.check().unwrap();
        buddy.mem_info().cached
    };
    let (late, at_boot) = (cached(1), cached(64));
    // An array that was filled before the others came is as large as it was until it is next found full.
    assert!(late <= at_boot + 128, "{late} and {at_boot} frames");
}

/// Kinds by the way that they win over each other, as numbers for proptest.
const KINDS: [RegionKind; 6] = [
    RegionKind::Usable,
    RegionKind::BootReclaimable,
    RegionKind::AcpiData,
    RegionKind::Reserved,
    RegionKind::Unusable,
    RegionKind::Other(77),
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 300, ..ProptestConfig::default() })]
    /// Any list of regions and reservations, in any order, bytes not aligned: the map is what a byte-by-byte reading says.
    #[test]
    fn any_list_makes_one_map(
        regions in prop::collection::vec((0..3_000_000u64, 1..900_000u64, 0..KINDS.len()), 1..12),
        reserved in prop::collection::vec((0..3_500_000u64, 1..300_000u64), 0..8),
        early in prop::collection::vec((1..40_000u64, 0..15u32), 0..6),
    ) {
        let mut map: BootMap = BootMap::new();
        for &(base, length, kind) in &regions {
            map.push(PhysAddr::new(base), length, KINDS[kind]).unwrap();
        }
        for &(base, length) in &reserved {
            map.reserve(PhysAddr::new(base), length, Reservation::Other).unwrap();
        }
        // Frames, the plain way: present where every byte's strongest region is memory and no byte is missing.
        let end = 4_000_000u64 >> 12;
        let present = |frame: u64| {
            let (first, last) = (frame << 12, (frame + 1) << 12);
            let mut edges = vec![first];
            for &(base, length, _) in &regions {
                edges.extend([base, base + length].into_iter().filter(|&at| at > first && at < last));
            }
            frame > 0 && edges.iter().all(|&at| {
                let here = regions.iter().filter(|&&(base, length, _)| base <= at && at < base + length);
                here.map(|&(_, _, kind)| match KINDS[kind] {
                    RegionKind::Usable => 0,
                    RegionKind::BootReclaimable => 1,
                    _ => 9,
                }).max().is_some_and(|strongest| strongest < 9)
            })
        };
        let touched = |frame: u64| {
            let (first, last) = (frame << 12, (frame + 1) << 12);
            reserved.iter().any(|&(base, length)| base < last && first < base + length)
                || regions.iter().any(|&(base, length, kind)| {
                    KINDS[kind] == RegionKind::BootReclaimable && base < last && first < base + length
                })
        };
        let expected: Vec<u64> = (0..end).filter(|&frame| present(frame)).collect();
        let found: Vec<u64> = map.present().flat_map(|range| range.iter()).map(Frame::number).collect();
        prop_assert_eq!(&found, &expected);
        let free: Vec<u64> = expected.iter().copied().filter(|&frame| !touched(frame)).collect();
        let mut listed = Vec::new();
        map.for_each_free(|range| listed.extend(range.iter().map(Frame::number)));
        prop_assert_eq!(&listed, &free);

        // Early pieces lie in free memory, apart from each other, aligned, and are out of what the zones get.
        let window = Window::new(4_000_000 & !0xfff, 4_000_000 & !0xfff);
        let memory = &window;
        let mut taken: Vec<(u64, u64)> = Vec::new();
        for &(bytes, align) in &early {
            // SAFETY: X1: the test's own memory, which only this allocator has.
            match unsafe { EarlyAllocator::new(&mut map, &memory) }.alloc(bytes, 1 << align) {
                Ok(at) => {
                    let (first, last) = (at.as_u64(), at.as_u64() + bytes);
                    prop_assert!(at.is_aligned(1 << align));
                    prop_assert!(taken.iter().all(|&(a, b)| last <= a || b <= first));
                    for frame in (first >> 12)..=((last - 1) >> 12) {
                        let inside = regions.iter().any(|&(b, l, _)| b < (frame + 1) << 12 && frame << 12 < b + l);
                        prop_assert!(inside && frame > 0);
                    }
                    taken.push((first, last));
                }
                Err(error) => prop_assert!(matches!(error, EarlyError::NoSpace { .. }), "{error:?}"),
            }
        }
        let buddy = machine(&window);
        // SAFETY: X1: the test's own memory, which only this allocator has.
        if unsafe { buddy.init(&mut map, &one_zone()) }.is_ok() {
            let metadata = buddy.metadata();
            let managed = free.iter().filter(|&&frame| {
                let (first, last) = (frame << 12, (frame + 1) << 12);
                taken.iter().all(|&(a, b)| last <= a || b <= first) && !metadata.contains(Frame::from_number(frame))
            }).count() as u64;
            prop_assert_eq!(buddy.mem_info().total, managed);
            exhaust(&buddy);
        }
    }
}

#[test]
fn a_full_list_names_the_count_and_changes_nothing() {
    let mut map: BootMap<4> = BootMap::new();
    for at in 0..4u64 {
        map.push(PhysAddr::new(at * 0x10_000), 0x1000, RegionKind::Usable)
            .unwrap();
    }
    let before: Vec<_> = map.regions().collect();
    let error = map
        .push(PhysAddr::new(0x90_000), 0x1000, RegionKind::Usable)
        .unwrap_err();
    assert!(
        matches!(
            error,
            BootMapError::Full {
                index: 4,
                count: 5,
                capacity: 4,
                ..
            }
        ),
        "{error:?}"
    );
    assert_eq!(map.regions().collect::<Vec<_>>(), before);
    // One that closes a gap needs less room, not more.
    map.push(PhysAddr::new(0x1000), 0xf000, RegionKind::Usable)
        .unwrap();
    assert_eq!(map.region_count(), 3);
    let window = Window::new(16 * MIB, 16 * MIB);
    let pointer = (&&window).to_ptr(PhysAddr::new(0x1000));
    assert_eq!((&&window).to_phys(pointer), PhysAddr::new(0x1000));
}
