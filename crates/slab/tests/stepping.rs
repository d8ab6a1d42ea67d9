//! An NMI before every machine instruction of alloc, free, refill, exchange, flush, shrink and the page source's calls beneath.
//!
//! The NMI allocates and frees in the same cache, in another one and straight from the page source, on the same CPU. Whatever
//! it meets, nothing spins, no object is lost or has two owners, and the interrupted call does what it does without it.
#![cfg(all(
    target_os = "linux",
    target_arch = "x86_64",
    not(any(loom, shuttle, miri, kmem_counting))
))]

#[path = "common/source.rs"]
#[allow(dead_code)]
mod source;

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::ptr::NonNull;

use kmem_hal::{AllocError, IrqSafe, OffsetMap, SingleCpu};
use kmem_slab::{Cache, Flags, Parts, SlabBox, SlabSystem};
use kmem_testkit::step::Stepper;
use source::Source;

type TestParts = Parts<&'static Source, OffsetMap, SingleCpu, IrqSafe>;
type System = SlabSystem<TestParts>;

/// Objects of 4 KiB: short arrays, so that refills and flushes are short.
const SIZE: usize = 4096;

type Place = Cell<Option<NonNull<u8>>>;

/// A system with objects that the operation holds, that the NMI frees, and that the NMI keeps.
struct World {
    source: &'static Source,
    system: RefCell<System>,
    held: RefCell<Vec<NonNull<u8>>>,
    got: [Place; 4],
    to_free: [Place; 3],
    kept: [Place; 3],
    nmi: Nmi,
}

/// What an NMI leaves behind, so that the operation meets what it is to meet.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Nmi {
    /// Objects freed and kept, arrays changed.
    Mixed,
    /// Arrays as they were, where the interrupted call does not have them.
    Neutral,
    /// Empty arrays.
    Shrinking,
}

impl World {
    fn new() -> Self {
        let (source, table) = Source::leaked();
        let system = System::new();
        // SAFETY: the map and the table cover the arena; one thread, and NMIs that end before it goes on.
        let parts = unsafe { Parts::new(source, source.map(), SingleCpu::new(), table) };
        system.init(parts).unwrap();
        let world = Self {
            source,
            system: RefCell::new(system),
            held: RefCell::default(),
            got: Default::default(),
            to_free: Default::default(),
            kept: Default::default(),
            nmi: Nmi::Mixed,
        };
        for (place, size) in world.to_free.iter().zip([SIZE, SIZE, 64]) {
            place.set(Some(world.alloc(size).unwrap()));
        }
        world
    }

    fn with(self, nmi: Nmi) -> Self {
        Self { nmi, ..self }
    }

    fn hold(self, count: usize) -> Self {
        for _ in 0..count {
            self.held.borrow_mut().push(self.alloc(SIZE).unwrap());
        }
        self
    }

    fn alloc(&self, size: usize) -> Result<NonNull<u8>, AllocError> {
        let object = self.system.borrow().kmalloc(size, Flags::empty())?;
        // SAFETY: `size` bytes that belong to the caller. What else is in there overwrites it, if it has two owners.
        unsafe { object.write_bytes(0x5a, size.min(64)) };
        Ok(object)
    }

    fn free(&self, object: NonNull<u8>) {
        // SAFETY: allocated by `alloc` and held by the caller.
        unsafe {
            assert_eq!(object.read(), 0x5a, "written by somebody else");
            object.write(0xdd);
            self.system.borrow().kfree(object.as_ptr());
        }
    }

    fn there_and_back(&self, size: usize) {
        if let Ok(object) = self.alloc(size) {
            self.free(object);
        }
    }

    fn interrupt(&self) {
        match self.nmi {
            Nmi::Neutral => return self.there_and_back(SIZE),
            Nmi::Shrinking => {
                self.there_and_back(SIZE);
                self.system.borrow().shrink();
                return;
            }
            Nmi::Mixed => {}
        }
        if let Some(object) = self.to_free.iter().find_map(Cell::take) {
            self.free(object);
        }
        for size in [SIZE, 64, 20_000] {
            self.there_and_back(size);
        }
        if let Some(place) = self.kept.iter().find(|place| place.get().is_none())
            && let Ok(object) = self.alloc(SIZE)
        {
            place.set(Some(object));
        }
    }

    /// Every object is free or has one owner, all are there, and all frames come back.
    fn check(&self) {
        let mut owned: Vec<NonNull<u8>> = self.held.take();
        for places in [&self.got[..], &self.kept, &self.to_free] {
            owned.extend(places.iter().filter_map(Cell::take));
        }
        let distinct: BTreeSet<_> = owned.iter().copied().collect();
        assert_eq!(distinct.len(), owned.len(), "an object has two owners");
        let active = || {
            let mut active = 0;
            let count = |info: &kmem_slab::CacheInfo| {
                assert_eq!(info.misuses, 0, "{info:?}");
                assert_eq!(info.allocs - info.frees, info.active_objects, "{info:?}");
                active += info.active_objects;
            };
            self.system.borrow().caches(count).unwrap();
            active
        };
        assert_eq!(active(), owned.len() as u64, "objects are lost");
        for object in owned {
            self.free(object);
        }
        assert_eq!(active(), 0);
        self.system.borrow_mut().teardown().unwrap();
        assert_eq!(self.source.used(), 0, "frames are lost");
    }
}

/// Steps through `operation` in both ways; alone at one instruction in `stride`.
fn step(
    name: &str,
    stride: u64,
    together: Nmi,
    setup: impl Fn() -> World,
    operation: impl Fn(&World),
) {
    let ways = [
        (Stepper::alone().stride(stride), Nmi::Mixed),
        (Stepper::together(), together),
    ];
    for (way, nmi) in ways {
        let start = std::time::Instant::now();
        let setup = || setup().with(nmi);
        match way.run(setup, &operation, World::interrupt, World::check) {
            Ok(Some(steps)) => println!("{name}: {steps:?} in {:?}", start.elapsed()),
            Ok(None) => {}
            Err(failure) => panic!("{name}: {failure}"),
        }
    }
}

fn take(world: &World) {
    let object = world.alloc(SIZE).expect("memory is not short");
    world.got[0].set(Some(object));
}

fn give(world: &World) {
    let object = world.held.borrow_mut().pop().unwrap();
    world.free(object);
}

/// Objects of the 4 KiB class in arrays, the depot, and slabs.
fn places(world: &World) -> (u64, u64, u64) {
    let mut found = (0, 0, 0);
    let look = |info: &kmem_slab::CacheInfo| {
        if info.object_size == SIZE {
            found = (info.in_arrays, info.in_depot, info.in_slabs);
        }
    };
    world.system.borrow().caches(look).unwrap();
    found
}

/// A world in which the next free does to a world like it what `happens` says: `before` and `after`.
fn before_a_free_that(happens: impl Fn((u64, u64, u64), (u64, u64, u64)) -> bool) -> World {
    const COUNT: usize = 300;
    let (world, probe) = (World::new().hold(COUNT), World::new().hold(COUNT));
    for _ in 0..COUNT {
        let before = places(&probe);
        give(&probe);
        if happens(before, places(&probe)) {
            return world;
        }
        give(&world);
    }
    panic!("never seen");
}

#[test]
fn hits() {
    let warm = || {
        let world = World::new().hold(3);
        give(&world);
        world
    };
    step("alloc", 1, Nmi::Mixed, warm, take);
    step("free", 1, Nmi::Mixed, warm, give);
}

/// No slab, no array: all of it is made, by way of the page source.
#[test]
fn first_object() {
    let system = || World::new();
    step("first", 97, Nmi::Mixed, system, |world| {
        let object = world.alloc(700).expect("memory is not short");
        world.got[0].set(Some(object));
    });
}

#[test]
fn refill_from_slabs() {
    let drained = || {
        let world = World::new().hold(20);
        for _ in 0..10 {
            give(&world);
        }
        world.system.borrow().shrink();
        world
    };
    step("refill", 29, Nmi::Shrinking, drained, take);
}

#[test]
fn flush_to_slabs() {
    let full = || before_a_free_that(|before, after| after.2 > before.2 && after.0 < before.0);
    step("flush", 29, Nmi::Neutral, full, give);
}

#[test]
fn exchange_with_the_depot() {
    let full = || before_a_free_that(|before, after| after.1 > before.1);
    step("exchange", 11, Nmi::Neutral, full, give);
}

#[test]
fn whole_pages() {
    step("pages", 31, Nmi::Mixed, World::new, |world| {
        let object = world.alloc(20_000).expect("memory is not short");
        world.free(object);
    });
}

/// Values of a typed cache come and go, one of them from a reserve, while NMIs make and drop values of the same cache.
#[test]
fn typed_cache() {
    type Line = [u64; 8];
    type Lines = Cache<'static, Line, TestParts>;
    type Boxes = RefCell<Vec<SlabBox<'static, Line, TestParts>>>;
    let setup = || {
        let system: &'static System = Box::leak(Box::new(World::new().system.into_inner()));
        let cache: &'static Lines = Box::leak(Box::new(Cache::new(system, "lines")));
        let boxes: Vec<_> = (0..5)
            .map(|n| cache.alloc([n; 8]).expect("memory is not short"))
            .collect();
        // An NMI is not to ask the host for memory.
        (cache, Boxes::new(boxes), Boxes::new(Vec::with_capacity(3)))
    };
    type Setup = (&'static Lines, Boxes, Boxes);
    let operation = |(cache, boxes, _): &Setup| {
        let mut reserve = cache.prefill::<2>(2).expect("memory is not short");
        let mut boxes = boxes.borrow_mut();
        drop(boxes.pop());
        boxes.push(cache.alloc([7; 8]).expect("memory is not short"));
        let object = reserve.take().expect("two are there");
        // SAFETY: the object is this call's, taken from the cache, given back once.
        unsafe {
            object.write([8; 8]);
            assert_eq!(object.read(), [8; 8], "written by somebody else");
            kmem_hal::ObjectAlloc::free(*cache, object);
        }
    };
    let interrupt = |(cache, _, kept): &Setup| {
        let _there_and_back = cache.alloc([0xee; 8]);
        if kept.borrow().len() < 3 {
            kept.borrow_mut().extend(cache.alloc([0xdd; 8]).ok());
        }
    };
    let check = |(cache, boxes, kept): &Setup| {
        let (boxes, kept) = (boxes.take(), kept.take());
        let info = cache.info().unwrap();
        assert_eq!(info.misuses, 0);
        assert_eq!(info.allocs - info.frees, info.active_objects);
        assert_eq!(info.active_objects as usize, boxes.len() + kept.len());
        for (at, line) in boxes.iter().enumerate() {
            let expected = if at == 4 { 7 } else { at as u64 };
            assert_eq!(**line, [expected; 8]);
        }
        assert!(kept.iter().all(|line| **line == [0xdd; 8]));
    };
    for way in [Stepper::alone().stride(3), Stepper::together()] {
        let steps = way.run(setup, operation, interrupt, check);
        println!(
            "typed cache: {:?}",
            steps.unwrap_or_else(|failure| panic!("{failure}"))
        );
    }
}

/// One cache is emptied into its slabs and the page source, while NMIs use it.
#[test]
fn shrink() {
    type Page = [u8; 2048];
    type Pages = Cache<'static, Page, TestParts>;
    type Boxes = RefCell<Vec<SlabBox<'static, Page, TestParts>>>;
    let setup = || {
        let system: &'static System = Box::leak(Box::new(World::new().system.into_inner()));
        let cache: &'static Pages = Box::leak(Box::new(Cache::new(system, "pages")));
        let boxes: Vec<_> = (0..40)
            .map(|n| cache.alloc([n; 2048]).expect("memory is not short"))
            .collect();
        let boxes: Boxes = RefCell::new(boxes);
        // Every fourth stays, so that slabs are partly free.
        let mut count = 0;
        boxes.borrow_mut().retain(|_| {
            count += 1;
            count % 4 == 0
        });
        (cache, boxes)
    };
    let operation = |(cache, _): &(&'static Pages, Boxes)| {
        cache.shrink();
    };
    let interrupt = |(cache, _): &(&'static Pages, Boxes)| {
        let _there_and_back = cache.alloc([0xee; 2048]);
    };
    let check = |(cache, boxes): &(&'static Pages, Boxes)| {
        let boxes = boxes.take();
        let active = || {
            let info = cache.info().unwrap();
            assert_eq!(info.misuses, 0);
            assert_eq!(info.allocs - info.frees, info.active_objects);
            info.active_objects
        };
        assert_eq!(active(), 10);
        for (at, page) in boxes.iter().enumerate() {
            assert_eq!(**page, [at as u8 * 4 + 3; 2048]);
        }
        drop(boxes);
        assert_eq!(active(), 0);
        cache.shrink();
        assert!(cache.info().unwrap().slabs <= 3, "{:?}", cache.info());
    };
    for way in [Stepper::alone().stride(31), Stepper::together()] {
        let steps = way.run(setup, operation, interrupt, check);
        println!(
            "shrink: {:?}",
            steps.unwrap_or_else(|failure| panic!("{failure}"))
        );
    }
}
