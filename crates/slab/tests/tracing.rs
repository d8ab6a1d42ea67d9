//! What a system tells its platform's trace: each slab that it took and each that it gave back, once, and nothing else.
#![cfg(not(any(loom, shuttle)))]

mod common;

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use common::{Arena, TestParts, ThreadCpu, parts, run_as};
use kmem_hal::{
    Frame, FrameRequest, FrameSink, FrameSource, FrameTable, FrameTag, NoLarge, OffsetMap, Order,
    Spin, TraceEvent,
};
use kmem_slab::{Cache, CacheInfo, Flags, Geometry, Plain, Platform, SlabSystem};

/// The slabs that are there by what was told.
#[derive(Default)]
struct Log {
    live: BTreeMap<Frame, Order>,
    taken: usize,
    given: usize,
}

struct Traced {
    parts: TestParts,
    log: Arc<Mutex<Log>>,
}

// SAFETY: S1 to S3: those of the parts.
unsafe impl Platform for Traced {
    type Frames = &'static Arena;
    type Map = OffsetMap;
    type Cpu = ThreadCpu;
    type Lock = Spin;
    type Large = NoLarge;
    type Policy = Plain;

    fn frames(&self) -> &&'static Arena {
        self.parts.frames()
    }
    fn map(&self) -> &OffsetMap {
        self.parts.map()
    }
    fn table(&self) -> &FrameTable {
        self.parts.table()
    }
    fn cpu(&self) -> &ThreadCpu {
        self.parts.cpu()
    }
    fn large(&self) -> &NoLarge {
        self.parts.large()
    }
    fn trace(&self, event: TraceEvent) {
        let TraceEvent::Slab(frame, order, taken) = event else {
            panic!("{event:?}");
        };
        // Before the frames can be somebody else's, who would tell of them first.
        assert_eq!(
            self.table().slot(frame).unwrap().tag(),
            FrameTag::Slab,
            "{event:?}"
        );
        let mut log = self.log.lock().unwrap();
        if taken {
            log.taken += 1;
            assert_eq!(
                log.live.insert(frame, order),
                None,
                "taken twice: {event:?}"
            );
        } else {
            log.given += 1;
            assert_eq!(
                log.live.remove(&frame),
                Some(order),
                "not as it was taken: {event:?}"
            );
        }
    }
}

struct World {
    arena: &'static Arena,
    system: SlabSystem<Traced>,
    log: Arc<Mutex<Log>>,
}

impl World {
    fn new(frames: usize) -> Self {
        run_as(0);
        let arena = Arena::new(frames);
        let log = Arc::default();
        let system = SlabSystem::new();
        let parts = parts(arena, 1);
        let log_of = Arc::clone(&log);
        system.init(Traced { parts, log: log_of }).unwrap();
        Self { arena, system, log }
    }

    fn take(&self, size: usize) -> NonNull<u8> {
        self.system.kmalloc(size, Flags::empty()).unwrap()
    }

    fn give(&self, objects: impl IntoIterator<Item = NonNull<u8>>) {
        for object in objects {
            // SAFETY: allocated by `take`, given once.
            unsafe { self.system.kfree(object.as_ptr()) };
        }
    }

    /// The slab that an object lies in, by what was told.
    fn slab_of(&self, object: NonNull<u8>) -> (Frame, Order) {
        let frame = Frame::containing(kmem_hal::PhysMap::to_phys(
            &self.arena.map(),
            object.as_ptr(),
        ));
        let log = self.log.lock().unwrap();
        let (&first, &order) = log
            .live
            .range(..=frame)
            .next_back()
            .expect("a slab was told");
        assert!(
            frame.number() < first.number() + order.frames(),
            "{frame} lies in none"
        );
        (first, order)
    }

    /// How many slabs were taken and given back; those that are there are those that the caches have.
    fn told(&self) -> (usize, usize) {
        let mut slabs = 0;
        let count = |cache: &CacheInfo| slabs += cache.slabs as usize;
        self.system.caches(count).unwrap();
        let log = self.log.lock().unwrap();
        assert_eq!(log.live.len(), slabs);
        (log.taken, log.given)
    }

    fn end(mut self) {
        self.system.teardown().unwrap();
        let log = self.log.lock().unwrap();
        assert!(log.live.is_empty(), "{:?}", log.live);
        assert_eq!(log.taken, log.given);
        assert_eq!(self.arena.used(), 0);
    }
}

/// Of any number of pages, with and without a tail to colour.
#[test]
fn a_slab_is_told_when_it_is_taken_and_when_it_goes_back() {
    for size in [8, 64, 100, 700, 3000, 5000] {
        let world = World::new(2048);
        assert_eq!(world.told(), (0, 0));
        let mut objects = vec![world.take(size)];
        assert_eq!(world.told(), (1, 0), "{size}");
        let mut geometry = None;
        world
            .system
            .caches(|cache| {
                if cache.slabs > 0 {
                    geometry = Geometry::new(cache.object_size, 8);
                }
            })
            .unwrap();
        let geometry = geometry.unwrap();
        let (first, order) = world.slab_of(objects[0]);
        assert_eq!(order, geometry.order(), "{size}");
        // All objects of one slab, and none of another, before it is told.
        objects.extend((1..geometry.objects()).map(|_| world.take(size)));
        assert_eq!(world.told(), (1, 0), "{size}");
        for &object in &objects {
            assert_eq!(world.slab_of(object), (first, order));
        }
        for slabs in 2..=6 {
            objects.extend((0..geometry.objects()).map(|_| world.take(size)));
            assert_eq!(world.told(), (slabs, 0), "{size}");
        }
        // There and back is nobody's business.
        for _ in 0..1000 {
            world.give([world.take(size)]);
        }
        let (taken, given) = world.told();
        assert!(taken <= 7 && given == 0, "{size}: {taken}, {given}");
        world.give(objects);
        world.system.shrink();
        assert_eq!(world.told(), (taken, taken), "{size}");
        world.end();
    }
}

/// A cache that goes away, and a system that ends, give slabs back as any other call does.
#[test]
fn slabs_of_a_cache_that_ends_are_told() {
    let world = World::new(2048);
    {
        let cache: Cache<'_, [u8; 700], _> = Cache::new(&world.system, "ends");
        drop(cache.alloc([1; 700]).unwrap());
        assert_eq!(world.told(), (1, 0));
    }
    assert_eq!(world.told(), (1, 1));
    world.give([world.take(64)]);
    assert_eq!(world.told(), (2, 1));
    world.end();
}

/// Where memory is short a slab is smaller, and is told as what it is.
#[test]
fn a_smaller_slab_is_told_with_its_own_order() {
    let world = World::new(2048);
    let first = world.take(700);
    let (_, order) = world.slab_of(first);
    assert!(order > Order::ZERO);
    let mut objects = vec![first];
    // Single frames are left.
    let one = || FrameSource::alloc(world.arena, &FrameRequest::ONE).ok();
    let all: Vec<_> = std::iter::from_fn(one).collect();
    let (free, held): (Vec<_>, Vec<_>) = all
        .into_iter()
        .partition(|frame| frame.first().number() % 2 == 0);
    for frame in free {
        FrameSink::free(world.arena, frame);
    }
    let told = world.told();
    while world.told() == told {
        objects.push(world.take(700));
    }
    let last = *objects.last().unwrap();
    assert_eq!(world.slab_of(last).1, Order::ZERO);
    world.give(objects);
    world.system.shrink();
    let (taken, given) = world.told();
    assert_eq!((taken, given), (2, 2));
    for frame in held {
        FrameSink::free(world.arena, frame);
    }
    world.end();
}

/// What is refused, or needs no slab, is not told.
#[test]
fn nothing_else_is_told() {
    let world = World::new(2048);
    let pages = [world.take(20_000), world.take(300_000)];
    assert_eq!(world.told(), (0, 0));
    world.give(pages);
    // Each request of the page source beneath the first object is refused in turn: for the slab, its descriptor, the arrays.
    let mut at = 0;
    loop {
        let before = world.told();
        world.arena.fail_at.store(at, Ordering::Relaxed);
        let object = world.system.kmalloc(3000, Flags::empty());
        world.arena.fail_at.store(u64::MAX, Ordering::Relaxed);
        let Ok(object) = object else {
            assert_eq!(world.told(), before, "refused, and a slab told");
            at += 1;
            assert!(at < 20);
            continue;
        };
        world.slab_of(object);
        world.give([object]);
        break;
    }
    world.end();
}
