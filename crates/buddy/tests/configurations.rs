//! Machines: unsorted and overlapping maps, zones that do not exist, many nodes and CPUs, terabytes.

mod common;

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;

use common::window::Window;
use kmem_buddy::{
    BootMap, BootMapError, Buddy, Config, EarlyAllocator, EarlyError, FreeError, InitError,
    RegionKind, Reservation, ZoneKind, ZoneLimits,
};
use kmem_hal::{
    AllocError, Cpu, CpuId, CpuSet, Frame, FrameRange, FrameRequest, FrameSink, FrameSource,
    NoCpuCall, NoPressure, NodeId, NodePolicy, Order, OwnedFrame, PhysAddr, PhysMap, Pressure,
    PressureLevel, SingleCpu, Spin,
};
use proptest::prelude::*;

type Machine<'a, C = SingleCpu> = Buddy<&'a Window, C, Spin>;

fn machine<'a>(window: &'a Window) -> Machine<'a> {
    // SAFETY: each test uses its allocator from one thread.
    Machine::new(window, unsafe { SingleCpu::new() })
}

fn map(regions: &[(u64, u64)]) -> BootMap {
    let mut map = BootMap::new();
    for &(base, end) in regions {
        map.push(PhysAddr::new(base), end - base, RegionKind::Usable)
            .unwrap();
    }
    map
}

fn kinds(buddy: &Machine<'_>) -> Vec<ZoneKind> {
    buddy.zones().map(|zone| zone.kind).collect()
}

/// Takes every frame of every kind and gives it back; nothing is missing and nothing is had twice.
fn exhaust<C: Cpu>(buddy: &Machine<'_, C>) {
    let total = buddy.mem_info().total;
    let mut taken = Vec::new();
    while let Ok(frame) = buddy.alloc(&FrameRequest::ONE.movable()) {
        taken.push(frame);
    }
    assert_eq!(taken.len() as u64, total);
    let mut numbers: Vec<_> = taken.iter().map(|frame| frame.first()).collect();
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len() as u64, total);
    buddy.free_batch(&mut || taken.pop());
    buddy.drain_all();
    assert_eq!(buddy.recount().free, total);
    assert_eq!(buddy.misuse(), None);
    buddy.check().unwrap();
}

const MIB: u64 = 1 << 20;

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
        let mut map = map(&[(0, 64 * MIB)]);
        let buddy = machine(&window);
        let config = Config::new()
            .limits(limits)
            .min_free_kib(0)
            .reserve_ratio([0; 5]);
        // SAFETY: X1: the test's own memory, which only this allocator has.
        unsafe { buddy.init(&mut map, &config) }.unwrap();
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

thread_local! {
    static CURRENT: Cell<u32> = const { Cell::new(0) };
}

/// As many CPUs as a set can name, played by one thread.
#[derive(Clone, Copy)]
struct Many;

// SAFETY: one thread plays one CPU at a time, and changes it only between calls (C1, C2); ids stay below 4096 (C3).
unsafe impl Cpu for Many {
    type Guard<'a> = ();
    fn raw_pin(&self) {}
    fn id(&self, (): &()) -> CpuId {
        CpuId::new(CURRENT.get())
    }
    fn count(&self) -> u32 {
        4096
    }
}

/// 64 nodes of 16 MiB and 4096 CPUs, 64 a node, of which every 64th is online at boot.
#[test]
fn sixty_four_nodes_and_4096_cpus() {
    const NODE: u64 = 16 * MIB;
    let window = Window::new(64 * NODE, 64 * NODE);
    let mut map = map(&[(0, 64 * NODE)]);
    for node in 0..64u16 {
        let base = PhysAddr::new(u64::from(node) * NODE);
        map.assign_node(base, NODE, NodeId::new(node)).unwrap();
    }
    assert_eq!(map.node_count(), 64);
    let buddy: Buddy<_, _, Spin, _, _> = Buddy::with(&window, Many, NoCpuCall, NoPressure);
    let config = Config::new()
        .limits(ZoneLimits::NORMAL_ONLY)
        .min_free_kib(0)
        .cpus(1)
        .cpu_node(|cpu| NodeId::new((cpu.get() / 64) as u16))
        .distance(|from, to| 10 + 2 * from.get().abs_diff(to.get()) as u8);
    // SAFETY: X1: the test's own memory, which only this allocator has.
    unsafe { buddy.init(&mut map, &config) }.unwrap();
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
        CURRENT.set(cpu);
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
    CURRENT.set(40 * 64);
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
    CURRENT.set(0);
}

/// One more than a set can name.
#[derive(Clone, Copy)]
struct Crowd;

// SAFETY: as `Many`; the count breaks C3, which is what is tested.
unsafe impl Cpu for Crowd {
    type Guard<'a> = ();
    fn raw_pin(&self) {}
    fn id(&self, (): &()) -> CpuId {
        CpuId::BOOT
    }
    fn count(&self) -> u32 {
        CpuSet::CAPACITY + 1
    }
}

#[test]
fn more_cpus_than_a_set_can_name_are_refused() {
    let window = Window::new(64 * MIB, 64 * MIB);
    let mut map = map(&[(0, 64 * MIB)]);
    let free = map.free_frames();
    let buddy: Buddy<_, _, Spin, _, _> = Buddy::with(&window, Crowd, NoCpuCall, NoPressure);
    // SAFETY: X1: the test's own memory, which only this allocator has.
    let error = unsafe { buddy.init(&mut map, &Config::new()) }.unwrap_err();
    assert_eq!(error, InitError::TooManyCpus { count: 4097 });
    assert_eq!(error.to_string(), "4097 CPUs: more than 4096");
    assert_eq!(map.free_frames(), free);
}

/// Nodes without memory may have numbers beyond those with: their CPUs, at boot and later, are served by the nearest node.
#[test]
fn a_cpu_of_a_node_without_memory_asks_the_nearest_one() {
    const NODE: u64 = 32 * MIB;
    let window = Window::new(3 * NODE, 3 * NODE);
    let mut map = map(&[(0, 3 * NODE)]);
    for node in 0..3u16 {
        let base = PhysAddr::new(u64::from(node) * NODE);
        map.assign_node(base, NODE, NodeId::new(node)).unwrap();
    }
    let buddy: Buddy<_, _, Spin, _, _> = Buddy::with(&window, Many, NoCpuCall, NoPressure);
    let config = Config::new()
        .limits(ZoneLimits::NORMAL_ONLY)
        .min_free_kib(0)
        .cpus(2)
        .cpu_node(|cpu| NodeId::new([7, u16::MAX, 9][cpu.index()]))
        .distance(|from, to| match (from.get(), to.get()) {
            (7, 1) | (9, 2) => 15,
            (from, to) if from == to => 10,
            _ => 40,
        });
    // SAFETY: X1: the test's own memory, which only this allocator has.
    unsafe { buddy.init(&mut map, &config) }.unwrap();
    let total = buddy.mem_info().free;
    let order9 = FrameRequest::new(Order::HUGE_2M);
    for (cpu, node) in [(0, 1), (1, 0), (2, 2)] {
        CURRENT.set(cpu);
        buddy.cpu_online(CpuId::new(cpu)).unwrap();
        let nearest = buddy.node_of_cpu(CpuId::new(cpu));
        assert_eq!(u64::from(nearest.get()), node);
        for request in [FrameRequest::ONE, FrameRequest::ONE.movable(), order9] {
            let frame = buddy.alloc(&request).unwrap();
            assert_eq!(frame.first().number() / (NODE >> 12), node, "CPU {cpu}");
            assert_eq!(buddy.node_of_frame(frame.first()), nearest);
            buddy.free(frame);
        }
        let range = buddy
            .alloc_range(3, Order::ZERO, &FrameRequest::ONE)
            .unwrap();
        assert_eq!(range.range().first().number() / (NODE >> 12), node);
        buddy.free_range(range).unwrap();
        buddy.drain_local();
    }
    // The third CPU's area.
    assert!(total - buddy.mem_info().free <= 8);
    CURRENT.set(0);
}

/// The number of a node without memory may lie between those with.
#[test]
fn a_cpu_of_a_node_without_memory_between_others_is_near_to_what_it_is_given() {
    const NODE: u64 = 32 * MIB;
    let window = Window::new(2 * NODE, 2 * NODE);
    let mut map = map(&[(0, 2 * NODE)]);
    for (at, node) in [(0, 0), (1, 2)] {
        map.assign_node(PhysAddr::new(at * NODE), NODE, NodeId::new(node))
            .unwrap();
    }
    let buddy: Buddy<_, _, Spin, _, _> = Buddy::with(&window, Many, NoCpuCall, NoPressure);
    let config = Config::new()
        .limits(ZoneLimits::NORMAL_ONLY)
        .min_free_kib(0)
        .cpus(3)
        .cpu_node(|cpu| NodeId::new(cpu.get() as u16))
        .distance(|from, to| match (from.get(), to.get()) {
            (1, 2) => 15,
            (from, to) if from == to => 10,
            _ => 40,
        });
    // SAFETY: X1: the test's own memory, which only this allocator has.
    unsafe { buddy.init(&mut map, &config) }.unwrap();
    for (cpu, node) in [(0, 0), (1, 2), (2, 2)] {
        CURRENT.set(cpu);
        let frame = buddy.alloc(&FrameRequest::ONE).unwrap();
        assert_eq!(buddy.node_of_frame(frame.first()), NodeId::new(node));
        assert_eq!(buddy.node_of_cpu(CpuId::new(cpu)), NodeId::new(node));
        buddy.free(frame);
    }
    CURRENT.set(0);
}

/// A reserved run may lie across many nodes: no part of it is forgotten.
#[test]
fn a_reserved_run_across_many_nodes_comes_back_whole() {
    const RUN: (u64, u64) = (16 * MIB, 240 * MIB);
    let window = Window::new(256 * MIB, 256 * MIB);
    let mut map = map(&[(0, 256 * MIB)]);
    for part in 0..50u16 {
        let base = PhysAddr::new(RUN.0 + u64::from(part) * 4 * MIB);
        map.assign_node(base, MIB, NodeId::new(1 + part % 2))
            .unwrap();
    }
    map.reserve(PhysAddr::new(RUN.0), RUN.1 - RUN.0, Reservation::Initrd)
        .unwrap();
    let buddy = machine(&window);
    let config = Config::new()
        .limits(ZoneLimits::NORMAL_ONLY)
        .min_free_kib(0);
    // SAFETY: X1: the test's own memory, which only this allocator has.
    unsafe { buddy.init(&mut map, &config) }.unwrap();
    for first in (RUN.0 >> 12..RUN.1 >> 12).step_by(64) {
        // SAFETY: the wrong free is what is tested.
        let wrong = unsafe { OwnedFrame::from_raw(Frame::new(first).unwrap(), Order::ZERO) };
        assert!(buddy.try_free(wrong).is_err(), "frame {first:#x}");
    }
    // SAFETY: nobody uses the simulated initrd.
    let freed = unsafe { buddy.release(Reservation::Initrd) };
    assert_eq!(freed, (RUN.1 - RUN.0) >> 12);
    buddy.check().unwrap();
    assert_eq!(buddy.recount().free, buddy.mem_info().total);
}

/// As may many runs in one zone.
#[test]
fn many_reserved_runs_come_back_whole() {
    let window = Window::new(64 * MIB, 64 * MIB);
    let mut map = map(&[(0, 64 * MIB)]);
    let runs = || (1..50u64).map(|run| run * MIB);
    for base in runs() {
        map.reserve(PhysAddr::new(base), 0x2000, Reservation::InitSections)
            .unwrap();
    }
    let buddy = machine(&window);
    let config = Config::new().limits(ZoneLimits::NORMAL_ONLY);
    // SAFETY: X1: the test's own memory, which only this allocator has.
    unsafe { buddy.init(&mut map, &config) }.unwrap();
    for base in runs() {
        let first = Frame::new(base >> 12).unwrap();
        // SAFETY: the wrong free is what is tested.
        let wrong = unsafe { OwnedFrame::from_raw(first, Order::ZERO) };
        assert!(buddy.try_free(wrong).is_err(), "{base:#x}");
    }
    // SAFETY: nobody uses the simulated sections.
    let freed = unsafe { buddy.release(Reservation::InitSections) };
    assert_eq!(freed, 2 * runs().count() as u64);
    buddy.check().unwrap();
}

/// Each release from the middle of a run cuts it, as often as the list has room; what lies at its ends needs none.
#[test]
fn a_full_list_of_reserved_runs_lets_ends_go() {
    let window = Window::new(64 * MIB, 64 * MIB);
    let mut map = map(&[(0, 64 * MIB)]);
    map.reserve(PhysAddr::new(16 * MIB), 16 * MIB, Reservation::Initrd)
        .unwrap();
    let buddy = machine(&window);
    let config = Config::new().limits(ZoneLimits::NORMAL_ONLY);
    // SAFETY: X1: the test's own memory, which only this allocator has.
    unsafe { buddy.init(&mut map, &config) }.unwrap();
    let (first, end) = (16 << 8, 32 << 8);
    // SAFETY: nobody uses the simulated initrd.
    let release = |frame: u64| unsafe {
        buddy.release_range(FrameRange::from_numbers(frame, frame + 1).unwrap())
    };
    let mut cut = first + 1;
    let refused = loop {
        match release(cut) {
            Ok(_) => cut += 2,
            Err(error) => break error,
        }
    };
    assert_eq!(refused, FreeError::ListFull);
    assert_eq!(
        release(cut - 2),
        Err(FreeError::Foreign),
        "it is released already"
    );
    assert!((first + 24..first + 64).contains(&cut), "{cut:#x}");
    for frame in [end - 1, end - 2, cut - 1, first] {
        assert_eq!(release(frame), Ok(1), "{frame:#x}");
    }
    // A place has become free.
    assert_eq!(release(cut + 1), Ok(1));
    buddy.check().unwrap();
}

/// Notes of which nodes it was told that memory is short.
#[derive(Default)]
struct Told(RefCell<BTreeSet<NodeId>>);

impl Pressure for &Told {
    fn pressure(&self, node: NodeId, _level: PressureLevel, _request: &FrameRequest) -> bool {
        self.0.borrow_mut().insert(node);
        false
    }
}

/// What is above the top order, ranges, and what is told of short memory: all are of the node that the request is for.
#[test]
fn ranges_and_pressure_are_of_the_node_that_is_asked_for() {
    const NODE: u64 = 32 * MIB;
    let window = Window::new(3 * NODE, 3 * NODE);
    let mut map = map(&[(0, 3 * NODE)]);
    for node in 0..3u16 {
        let base = PhysAddr::new(u64::from(node) * NODE);
        map.assign_node(base, NODE, NodeId::new(node)).unwrap();
    }
    let told = Told::default();
    let buddy: Buddy<_, _, Spin, _, _> = Buddy::with(&window, Many, NoCpuCall, &told);
    let config = Config::new()
        .limits(ZoneLimits::NORMAL_ONLY)
        .min_free_kib(0)
        .cpus(2)
        .cpu_node(|cpu| NodeId::new(cpu.get() as u16));
    // SAFETY: X1: the test's own memory, which only this allocator has.
    unsafe { buddy.init(&mut map, &config) }.unwrap();
    CURRENT.set(1);
    let huge = FrameRequest::new(Order::new(11).unwrap());
    for (policy, node) in [
        (NodePolicy::Local, 1),
        (NodePolicy::Preferred(NodeId::new(2)), 2),
        (NodePolicy::Preferred(NodeId::new(0)), 0),
        (NodePolicy::Strict(NodeId::new(2)), 2),
    ] {
        let block = buddy.alloc(&huge.node(policy)).unwrap();
        assert_eq!(block.first().number() / (NODE >> 12), node, "{policy:?}");
        buddy.free(block);
        let request = FrameRequest::ONE.node(policy);
        let range = buddy.alloc_range(1500, Order::ZERO, &request).unwrap();
        assert_eq!(range.range().first().number() / (NODE >> 12), node);
        buddy.free_range(range).unwrap();
    }
    let mut held = Vec::new();
    for (policy, node) in [
        (NodePolicy::Strict(NodeId::new(2)), 2),
        (NodePolicy::Local, 1),
    ] {
        let request = FrameRequest::ONE.node(policy);
        held.extend(std::iter::from_fn(|| buddy.alloc(&request).ok()));
        let nodes = std::mem::take(&mut *told.0.borrow_mut());
        assert_eq!(Vec::from_iter(nodes), [NodeId::new(node)], "{policy:?}");
    }
    buddy.free_batch(&mut || held.pop());
    buddy.check().unwrap();
    CURRENT.set(0);
}

/// CPUs that come online share the zones with those that are: no more is kept in arrays than if all had been there at boot.
#[test]
fn cpus_that_come_later_share_the_zones() {
    let window = Window::new(1 << 30, 1 << 30);
    let cached = |at_boot: u32| {
        let buddy: Buddy<_, _, Spin, _, _> = Buddy::with(&window, Many, NoCpuCall, NoPressure);
        let config = Config::new()
            .limits(ZoneLimits::NORMAL_ONLY)
            .min_free_kib(0)
            .cpus(at_boot);
        // SAFETY: X1: the test's own memory, which only this allocator has.
        unsafe { buddy.init(&mut map(&[(0, 1 << 30)]), &config) }.unwrap();
        for cpu in 0..64 {
            buddy.cpu_online(CpuId::new(cpu)).unwrap();
        }
        for cpu in 0..64 {
            CURRENT.set(cpu);
            for request in [FrameRequest::ONE, FrameRequest::new(Order::HUGE_2M)] {
                let frames = [(); 5].map(|()| buddy.alloc(&request).unwrap());
                frames.into_iter().for_each(|frame| buddy.free(frame));
            }
        }
        CURRENT.set(0);
        buddy.check().unwrap();
        buddy.mem_info().cached
    };
    let (late, at_boot) = (cached(1), cached(64));
    // An array that was filled before the others came is as large as it was until it is next found full.
    assert!(late <= at_boot + 128, "{late} and {at_boot} frames");
}

/// 16 TiB of addresses with a GiB in every 256: the tables follow memory, never the highest address.
#[test]
fn tables_are_sized_by_memory_and_not_by_the_highest_address() {
    const TOP: u64 = 16 << 40;
    const GIB: u64 = 1 << 30;
    let window = Window::new(TOP, 64 * MIB);
    let regions: Vec<_> = (0..64u64)
        .map(|node| (node * 256 * GIB, node * 256 * GIB + GIB))
        .chain([(TOP - GIB, TOP)])
        .collect();
    let mut map = map(&regions);
    // What firmware lists beside it: a reserved range of terabytes, and devices at the top of 52 bits.
    map.push(PhysAddr::new(20 << 40), 100 << 40, RegionKind::Reserved)
        .unwrap();
    map.push(PhysAddr::new((1 << 52) - 4096), 4096, RegionKind::Reserved)
        .unwrap();
    let present = map.present_frames();
    let buddy = machine(&window);
    // SAFETY: X1: the test's own memory, which only this allocator has.
    unsafe { buddy.init(&mut map, &Config::new().min_free_kib(0)) }.unwrap();
    let metadata = buddy.metadata().count() << 12;
    assert!(
        metadata <= present * 15 / 100 + 32 * 1024,
        "{metadata} for {present} frames"
    );
    let info = buddy.mem_info();
    assert_eq!(info.total, present - buddy.metadata().count());
    let zone = buddy.zones().last().unwrap();
    assert_eq!(
        (zone.kind, zone.start + zone.spanned),
        (ZoneKind::Normal, TOP >> 12)
    );
    let gibibyte = FrameRequest::new(Order::HUGE_1G);
    let top = buddy.alloc(&gibibyte).unwrap();
    assert!(top.first().number() >= 256 << 18);
    buddy.free(top);
    buddy.check().unwrap();
    assert_eq!(buddy.recount().free, info.total);
}

/// All of 16 TiB is memory: 2^32 frames, more than half a GiB of tables.
#[test]
#[cfg_attr(debug_assertions, ignore = "a minute in a debug build")]
fn sixteen_tebibytes() {
    const TOP: u64 = 16 << 40;
    let window = Window::new(TOP, 768 * MIB);
    let mut map = map(&[(0, TOP)]);
    let present = map.present_frames();
    let buddy = machine(&window);
    // SAFETY: X1: the test's own memory, which only this allocator has.
    unsafe { buddy.init(&mut map, &Config::new().min_free_kib(0)) }.unwrap();
    let metadata = buddy.metadata().count() << 12;
    assert!(metadata <= present * 15 / 100 + 32 * 1024);
    let order = Order::new(30).unwrap();
    let tebibytes = buddy.alloc(&FrameRequest::new(order)).unwrap();
    assert!(tebibytes.first().is_aligned(order));
    let page = buddy.alloc(&FrameRequest::ONE).unwrap();
    buddy.free(tebibytes);
    buddy.free(page);
    buddy.drain_all();
    assert_eq!(buddy.mem_info().free, buddy.mem_info().total);
}

#[test]
fn a_zone_of_16_tebibytes_is_served_to_its_last_frame() {
    let (base, size) = (MIB, 16 << 40);
    let window = Window::new(base + size, 4 * MIB);
    let mut map = map(&[(base, 2 * MIB), (base + size - 4 * MIB, base + size)]);
    let buddy = machine(&window);
    let config = Config::new()
        .limits(ZoneLimits::NORMAL_ONLY)
        .min_free_kib(0);
    // SAFETY: X1: the test's own memory, which only this allocator has.
    unsafe { buddy.init(&mut map, &config) }.unwrap();
    assert_eq!(buddy.zones().next().unwrap().spanned, 1 << 32);
    exhaust(&buddy);
    buddy.check().unwrap();
}

#[test]
fn a_zone_of_more_than_16_tebibytes_is_refused() {
    let window = Window::new(40 << 40, MIB);
    let mut map = map(&[(0, MIB), ((40 << 40) - MIB, 40 << 40)]);
    let buddy = machine(&window);
    let config = Config::new().limits(ZoneLimits::NORMAL_ONLY);
    // SAFETY: X1: the test's own memory, which only this allocator has.
    let result = unsafe { buddy.init(&mut map, &config) };
    let Err(InitError::ZoneTooLarge { frames }) = result else {
        panic!("accepted");
    };
    assert_eq!(frames, ((40 << 40) >> 12) - 1);
    assert_eq!(map.reservations().count(), 0);
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
        let config = Config::new().limits(ZoneLimits::NORMAL_ONLY).min_free_kib(0);
        // SAFETY: X1: the test's own memory, which only this allocator has.
        if unsafe { buddy.init(&mut map, &config) }.is_ok() {
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
