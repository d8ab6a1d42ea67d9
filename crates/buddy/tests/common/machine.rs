//! Machines with one CPU, from their boot map on, and the test that all of their memory can be had.

use kmem_buddy::{BootMap, Buddy, Config, RegionKind, Reservation, ZoneLimits};
use kmem_hal::{
    Cpu, FrameRange, FrameRequest, FrameSink, FrameSource, NodeId, PhysAddr, SingleCpu, Spin,
};

use super::window::Window;

pub const MIB: u64 = 1 << 20;

pub type Machine<'a, C = SingleCpu> = Buddy<&'a Window, C, Spin>;

fn single() -> SingleCpu {
    // SAFETY: each test uses its allocator from one thread.
    unsafe { SingleCpu::new() }
}

/// A machine that was given no memory yet.
pub fn machine(window: &Window) -> Machine<'_> {
    Machine::new(window, single())
}

/// A boot map of memory from each of these addresses up to the other.
pub fn map(regions: &[(u64, u64)]) -> BootMap {
    let mut map = BootMap::new();
    for &(base, end) in regions {
        map.push(PhysAddr::new(base), end - base, RegionKind::Usable)
            .unwrap();
    }
    map
}

/// A boot map of so many nodes of `bytes` bytes each, one behind the other.
pub fn map_of_nodes(count: u16, bytes: u64) -> BootMap {
    let mut map = map(&[(0, u64::from(count) * bytes)]);
    for node in 0..count {
        let base = PhysAddr::new(u64::from(node) * bytes);
        map.assign_node(base, bytes, NodeId::new(node)).unwrap();
    }
    map
}

/// A boot map of memory with holes and odd ends, up to frame `end`, and a kernel image in it.
pub fn map_with_holes(end: u64) -> BootMap {
    let frames = [(0, 0x9f), (0x100, 0x777), (0x7ff, end)];
    let mut map = map(&frames.map(|(first, end)| (first << 12, end << 12)));
    map.reserve(PhysAddr::new(0x123 << 12), 0x4321, Reservation::KernelImage)
        .unwrap();
    map
}

/// A machine that has booted with this map.
pub fn start<'a>(window: &'a Window, map: &mut BootMap, config: &Config) -> Machine<'a> {
    start_on(single(), window, map, config)
}

/// The same with other CPUs.
pub fn start_on<'a, C: Cpu>(
    cpu: C,
    window: &'a Window,
    map: &mut BootMap,
    config: &Config,
) -> Machine<'a, C> {
    let buddy = Machine::new(window, cpu);
    // SAFETY: X1: the test's own memory, which only this allocator has.
    unsafe { buddy.init(map, config) }.unwrap();
    buddy
}

/// One zone whose last frame can be had by everybody.
pub fn one_zone() -> Config {
    Config::new()
        .limits(ZoneLimits::NORMAL_ONLY)
        .min_free_kib(0)
}

/// A machine of one zone, with all memory up to the window's end but for what is reserved.
pub fn boot<'a>(window: &'a Window, reserved: &[(FrameRange, Reservation)]) -> Machine<'a> {
    let mut map = map(&[(0, window.end())]);
    for &(range, what) in reserved {
        map.reserve(range.first().start(), range.count() << 12, what)
            .unwrap();
    }
    start(window, &mut map, &one_zone())
}

/// Takes every frame of every kind and gives it back; nothing is missing and nothing is had twice.
pub fn exhaust(buddy: &Machine<'_>) {
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
