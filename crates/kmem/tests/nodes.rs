//! Two nodes under the whole heap: page frames and objects are those of the CPU's node, and what is freed far away goes home.

use std::cell::Cell;
use std::ptr::NonNull;

use kmem::hal::{Cpu, CpuId, NoCpuCall, NoLarge, NoPressure, Spin};
use kmem::{
    BootMap, Config, Flags, FrameRequest, FrameSource, Memory, NodeId, NodePolicy, OffsetMap,
    PhysAddr, RegionKind, ZoneLimits,
};

thread_local! {
    static CURRENT: Cell<u32> = const { Cell::new(0) };
}

/// Two CPUs, played by one thread.
struct Two;

// SAFETY: C1 to C4: one thread plays both, one at a time.
unsafe impl Cpu for Two {
    type Guard<'a> = ();
    fn raw_pin(&self) {}
    fn id(&self, _guard: &()) -> CpuId {
        CpuId::new(CURRENT.get())
    }
    fn count(&self) -> u32 {
        2
    }
}

const NODE: u64 = 16 << 20;
const START: u64 = 2 << 20;

#[test]
fn objects_lie_on_their_cpus_node_and_go_home() {
    let bytes = vec![0u8; (2 * NODE + START) as usize].leak();
    let base = (bytes.as_mut_ptr().expose_provenance() + 0xf_ffff) & !0xf_ffff;
    let base = base.wrapping_sub(1 << 20);
    let world: &'static Memory<OffsetMap, Two, Spin> = Box::leak(Box::new(Memory::with(
        OffsetMap::unset(),
        Two,
        NoCpuCall,
        NoPressure,
    )));
    let mut map: BootMap = BootMap::new();
    map.push(PhysAddr::new(START), 2 * NODE - START, RegionKind::Usable)
        .unwrap();
    map.assign_node(PhysAddr::new(NODE), NODE, NodeId::new(1))
        .unwrap();
    let config = Config::new()
        .limits(ZoneLimits::NORMAL_ONLY)
        .min_free_kib(64)
        .cpu_node(|cpu| NodeId::new(cpu.get() as u16));
    // SAFETY: the arena is mapped there and nobody's.
    unsafe { world.frames().memory().set(base, (2 * NODE) >> 12) };
    // SAFETY: X1: the test's own memory, which only this allocator has.
    unsafe { world.init_with(&mut map, &config, NoLarge) }.unwrap();
    CURRENT.set(1);
    world.cpu_online(CpuId::new(1)).unwrap();
    let slab = world.slab();
    let node_of = |object: NonNull<u8>| (object.as_ptr().addr().wrapping_sub(base)) as u64 / NODE;
    let take = |count| -> Vec<_> {
        let one = || slab.kmalloc(256, Flags::empty()).unwrap();
        (0..count).map(|_| one()).collect()
    };
    let give = |objects: Vec<NonNull<u8>>| {
        for object in objects {
            // SAFETY: allocated by the test, freed once.
            unsafe { slab.kfree(object.as_ptr()) };
        }
    };
    assert_eq!(world.frames().node_count(), 2);
    let mut held = Vec::new();
    for cpu in 0..2 {
        CURRENT.set(cpu);
        let frame = world.frames().alloc(&FrameRequest::ONE).unwrap();
        let node = world.frames().node_of_frame(frame.first());
        assert_eq!(u32::from(node.get()), cpu);
        kmem::FrameSink::free(world.frames(), frame);
        let objects = take(3000);
        assert!(
            objects
                .iter()
                .all(|&object| node_of(object) == u64::from(cpu))
        );
        held.push(objects);
    }
    // Each frees what the other has.
    for (cpu, objects) in [1, 0].into_iter().zip(held) {
        CURRENT.set(cpu);
        give(objects);
        slab.drain_local();
    }
    for cpu in [0, 1] {
        CURRENT.set(cpu);
        let objects = take(2000);
        assert!(
            objects
                .iter()
                .all(|&object| node_of(object) == u64::from(cpu))
        );
        let other = NodePolicy::Strict(NodeId::new(1 - cpu as u16));
        let far = slab.kmalloc_node(256, Flags::empty(), other).unwrap();
        assert_ne!(node_of(far), u64::from(cpu));
        give(vec![far]);
        give(objects);
    }
    CURRENT.set(0);
}
