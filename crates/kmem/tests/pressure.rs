//! Short memory: what the slab system's caches hold beyond need serves requests for frames before anything is refused, and before the kernel
//! is asked to reclaim.

use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use kmem::hal::{Cpu, CpuId, NoCpuCall, NoLarge, PressureLevel, Shrink, Spin};
use kmem::{
    AllocError, BootMap, Cache, Config, Context, Flags, FrameRequest, FrameSink, FrameSource,
    Memory, NodeId, OffsetMap, OwnedFrame, PhysAddr, Pressure, RegionKind, SingleCpu,
};

/// A kernel that has nothing to give, and remembers what it was told.
#[derive(Default)]
struct Told(Mutex<Vec<PressureLevel>>);

impl Told {
    fn count(&self, level: PressureLevel) -> usize {
        let told = self.0.lock().unwrap();
        told.iter().filter(|&&other| other == level).count()
    }
}

impl Pressure for &'static Told {
    fn pressure(&self, _node: NodeId, level: PressureLevel, _request: &FrameRequest) -> bool {
        self.0.lock().unwrap().push(level);
        false
    }
}

type World<C = SingleCpu> = Memory<OffsetMap, C, Spin, NoCpuCall, &'static Told>;

const MIB: u64 = 16;

/// A machine, and who is told.
fn world() -> (&'static World, &'static Told) {
    // SAFETY: one thread uses each world.
    world_of(unsafe { SingleCpu::new() })
}

fn world_of<C: Cpu>(cpu: C) -> (&'static World<C>, &'static Told) {
    let bytes = vec![0u8; (MIB as usize + 1) << 20].leak();
    let base = (bytes.as_mut_ptr().expose_provenance() + 0xf_ffff) & !0xf_ffff;
    let told: &'static Told = Box::leak(Box::default());
    let world = World::with(OffsetMap::unset(), cpu, NoCpuCall, told);
    let world: &'static World<C> = Box::leak(Box::new(world));
    let mut map: BootMap = BootMap::new();
    map.push(PhysAddr::new(1 << 20), MIB << 20, RegionKind::Usable)
        .unwrap();
    // SAFETY: the arena is mapped there and nobody's.
    unsafe {
        let memory = world.frames().memory();
        memory.set(base.wrapping_sub(1 << 20), (1 + MIB) << 8);
    }
    let config = Config::new().min_free_kib(64);
    // SAFETY: X1: the test's own memory, which only this allocator has.
    unsafe { world.init_with(&mut map, &config, NoLarge) }.unwrap();
    (world, told)
}

/// Objects of many sizes come and go, until arrays, depots and empty slabs hold a good deal; one of each size stays.
fn use_caches<C: Cpu>(world: &'static World<C>) -> Vec<NonNull<u8>> {
    let mut kept = Vec::new();
    for size in (64..=2048).step_by(64) {
        let take = || world.slab().kmalloc(size, Flags::empty()).unwrap();
        kept.push(take());
        let objects: Vec<_> = (0..100).map(|_| take()).collect();
        for object in objects {
            // SAFETY: allocated above, freed once.
            unsafe { world.slab().kfree(object.as_ptr()) };
        }
    }
    kept
}

fn all_frames<C: Cpu>(world: &'static World<C>, context: Context) -> (Vec<OwnedFrame>, AllocError) {
    let request = FrameRequest::ONE.context(context);
    let mut frames = Vec::new();
    loop {
        match world.frames().alloc(&request) {
            Ok(frame) => frames.push(frame),
            Err(error) => return (frames, error),
        }
    }
}

#[test]
fn a_refusal_comes_after_the_caches_gave_what_they_could() {
    for context in [Context::Atomic, Context::MayWait] {
        let (world, told) = world();
        let kept = use_caches(world);
        assert!(world.slab().count() > 500, "{}", world.slab().count());
        let (frames, error) = all_frames(world, context);
        assert_eq!(error, AllocError::OutOfMemory, "{context:?}");
        assert!(!frames.is_empty());
        // Nothing is left that a shrink would give back, and nobody had to ask for one.
        assert_eq!(world.slab().count(), 0, "{context:?}");
        assert_eq!(world.slab().shrink(), 0, "{context:?}");
        assert!(told.count(PressureLevel::Min) > 0, "{context:?}");
        let may_reclaim = context == Context::MayWait;
        assert_eq!(told.count(PressureLevel::Refusing) > 0, may_reclaim);
        for object in kept {
            // SAFETY: allocated in `use_caches`, freed once.
            unsafe { world.slab().kfree(object.as_ptr()) };
        }
    }
}

/// Two CPUs, played by one thread.
struct Played(&'static AtomicU32);

// SAFETY: one thread plays both and changes over only while it is not pinned.
unsafe impl Cpu for Played {
    type Guard<'a> = ();
    fn raw_pin(&self) {}
    fn id(&self, (): &()) -> CpuId {
        CpuId::new(self.0.load(Ordering::Relaxed))
    }
    fn count(&self) -> u32 {
        2
    }
}

/// A CPU that has no page of heads, of any row or of the second, takes what is left: it asks for no such page beneath that.
#[test]
fn short_memory_asks_for_no_memory_itself() {
    for (context, used) in [
        (Context::Atomic, false),
        (Context::Atomic, true),
        (Context::MayWait, false),
        (Context::MayWait, true),
    ] {
        let here: &'static AtomicU32 = Box::leak(Box::default());
        let (world, _) = world_of(Played(here));
        let kept = use_caches(world);
        // More caches than one row has.
        let caches: Vec<_> = (0..40)
            .map(|_| Cache::<u64, _>::new(world.slab(), "short"))
            .collect();
        let objects: Vec<_> = caches.iter().map(|cache| cache.alloc(1).unwrap()).collect();
        here.store(1, Ordering::Relaxed);
        if used {
            let object = world.slab().kmalloc(64, Flags::empty()).unwrap();
            // SAFETY: allocated above, freed once.
            unsafe { world.slab().kfree(object.as_ptr()) };
        }
        let (frames, error) = all_frames(world, context);
        // The other CPU's arrays were not asked.
        assert_eq!(error, AllocError::OutOfMemoryHere, "{context:?} {used}");
        drop((frames, objects));
        here.store(0, Ordering::Relaxed);
        for object in kept {
            // SAFETY: allocated in `use_caches`, freed once.
            unsafe { world.slab().kfree(object.as_ptr()) };
        }
    }
}

#[test]
fn the_kernel_is_asked_to_reclaim_only_where_the_caches_have_nothing() {
    let (world, told) = world();
    assert!(std::ptr::eq(*world.frames().pressure().kernel(), told));
    // Frames are short first; then a cache holds more than it needs.
    let (mut frames, _) = all_frames(world, Context::MayWait);
    let asked = told.count(PressureLevel::Refusing);
    assert!(asked > 0);
    for frame in frames.split_off(frames.len() - 600) {
        world.frames().free(frame);
    }
    let kept = use_caches(world);
    let held = world.slab().count();
    assert!(held > 0);
    let (more, _) = all_frames(world, Context::MayWait);
    assert!(!more.is_empty());
    assert_eq!(world.slab().count(), 0);
    // One refusal, one question for each retry at most: none while the caches gave.
    assert_eq!(told.count(PressureLevel::Refusing), 2 * asked);
    drop(kept);
}

/// A slab larger than it must be is worth nothing that caches hold: where only single frames are left, one of these is taken.
#[test]
fn caches_give_nothing_up_for_a_larger_slab() {
    for flags in [Flags::empty(), Flags::MAY_WAIT] {
        let (world, _) = world();
        let (frames, _) = all_frames(world, Context::MayWait);
        // One of each two that are neighbours stays.
        let (odd, even): (Vec<_>, Vec<_>) = frames
            .into_iter()
            .partition(|frame| frame.first().number() % 2 == 1);
        for frame in odd {
            world.frames().free(frame);
        }
        let _kept = use_caches(world);
        let held = world.slab().count();
        assert!(held > 500, "{held}");
        for size in [3000, 3500, 4000] {
            let _ = world.slab().kmalloc(size, flags).unwrap();
            assert!(world.slab().count() >= held, "{flags:?}, {size}");
        }
        drop(even);
    }
}

#[test]
fn low_memory_leaves_the_caches_alone() {
    let (world, told) = world();
    let _kept = use_caches(world);
    let held = world.slab().count();
    let mut frames = Vec::new();
    while told.count(PressureLevel::Low) == 0 {
        frames.push(world.frames().alloc(&FrameRequest::ONE).unwrap());
    }
    assert_eq!(told.count(PressureLevel::Min), 0);
    assert_eq!(world.slab().count(), held);
}
