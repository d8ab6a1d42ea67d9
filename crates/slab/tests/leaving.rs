//! Caches that leave the system: while walks look at them, and from a task that moves between CPUs.
#![cfg(not(any(loom, shuttle)))]

mod common;

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicBool, Ordering};

use common::{Arena, TestParts, run_as, system};
use kmem_hal::{
    Cpu, CpuId, FrameRequest, FrameSink, FrameSource, FrameTable, NoLarge, OffsetMap, Spin,
};
use kmem_slab::{Cache, Flags, Leaked, Parts, Plain, SlabBox, SlabSystem};

#[test]
fn a_walk_takes_apart_what_is_dropped_while_it_looks() {
    let (arena, mut system) = system(1024, 2);
    {
        let dropped: Cache<'_, u64, TestParts> = Cache::new(&system, "dropped");
        drop(dropped.alloc(1).unwrap());
        let before = arena.used();
        let dropped = RefCell::new(Some(dropped));
        let next: Cache<'_, u64, TestParts> = Cache::new(&system, "next");
        let mut seen = Vec::new();
        system
            .caches(|cache| {
                if cache.name == "dropped" {
                    // Waits for nobody: the walk would never go on.
                    drop(dropped.take());
                    next.join().unwrap();
                }
                seen.push(cache.name);
            })
            .unwrap();
        // The index of the cache that left was not given away while the walk was there: the new one has a later index.
        assert_eq!(&seen[seen.len() - 2..], ["dropped", "next"]);
        assert!(arena.used() < before, "its slab is back");
        assert!(!system.slabinfo().to_string().contains("dropped"));
        // And now it can be had.
        let last: Cache<'_, u64, TestParts> = Cache::new(&system, "last");
        last.join().unwrap();
        let mut seen = Vec::new();
        system.caches(|cache| seen.push(cache.name)).unwrap();
        assert_eq!(&seen[seen.len() - 2..], ["last", "next"]);
    }
    system.teardown().unwrap();
    assert_eq!(arena.used(), 0);
}

#[test]
fn a_cache_dropped_with_objects_out_stays_for_walks_to_see() {
    let (_, system) = system(1024, 1);
    let cache: Cache<'_, u64, TestParts> = Cache::new(&system, "leaky");
    let kept = SlabBox::into_raw(cache.alloc(41).unwrap());
    let cache = RefCell::new(Some(cache));
    system
        .caches(|info| {
            if info.name == "leaky" {
                drop(cache.take());
            }
        })
        .unwrap();
    let mut active = 0;
    system
        .caches(|info| {
            if info.name == "leaky" {
                active = info.active_objects;
            }
        })
        .unwrap();
    assert_eq!(active, 1);
    // SAFETY: the leaked object's memory stays.
    assert_eq!(unsafe { kept.read() }, 41);
}

/// A CPU without heads cannot enter the registry where there is no memory for them; a context that interrupted it cannot either.
#[test]
fn a_cache_that_the_registry_could_not_let_go_leaves_with_the_next_walk() {
    let (arena, mut system) = system(1024, 2);
    for destroyed in [false, true] {
        let cache: Cache<'_, u64, TestParts> = Cache::new(&system, "left");
        // Without a slab, whose frames would serve.
        cache.join().unwrap();
        let one = || FrameSource::alloc(arena, &FrameRequest::ONE).ok();
        let frames: Vec<_> = std::iter::from_fn(one).collect();
        run_as(1);
        if destroyed {
            cache.destroy().unwrap();
        } else {
            drop(cache);
        }
        run_as(0);
        for frame in frames {
            FrameSink::free(arena, frame);
        }
        let seen = |name| {
            let mut seen = 0;
            let count = |info: &kmem_slab::CacheInfo| seen += u32::from(info.name == name);
            system.caches(count).unwrap();
            seen
        };
        assert_eq!(seen("left"), 1, "it is still there");
        assert_eq!(seen("left"), 0, "and that walk took it apart");
        // Its index is another's.
        let next: Cache<'_, u64, TestParts> = Cache::new(&system, "next");
        drop(next.alloc(1).unwrap());
        assert_eq!(seen("next"), 1);
    }
    system.teardown().unwrap();
    assert_eq!(arena.used(), 0);
}

#[test]
fn caches_leave_under_walks_of_another_cpu() {
    let (arena, mut system) = system(4096, 2);
    {
        let (system, done) = (&system, AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                run_as(1);
                while !done.load(Ordering::Relaxed) {
                    system.shrink();
                    system.drain_local();
                }
            });
            run_as(0);
            for round in 0..300u64 {
                let caches: [Cache<'_, [u64; 8], TestParts>; 2] =
                    [Cache::new(system, "leaving"), Cache::new(system, "dropped")];
                for cache in &caches {
                    // Both CPUs have arrays of it.
                    let boxes: Vec<_> =
                        (0..100).map(|_| cache.alloc([round; 8]).unwrap()).collect();
                    assert!(boxes.iter().all(|boxed| **boxed == [round; 8]));
                    drop(boxes);
                }
                let [left, dropped] = caches;
                left.destroy().unwrap();
                drop(dropped);
            }
            done.store(true, Ordering::Relaxed);
        });
    }
    system
        .caches(|info| assert_eq!((info.misuses, info.slabs), (0, 0), "{info:?}"))
        .unwrap();
    system.teardown().unwrap();
    assert_eq!(arena.used(), 0);
}

/// One task that runs as another CPU after every pin, as a scheduler may have it.
struct Moving(u32);

thread_local! {
    static NEXT: Cell<u32> = const { Cell::new(0) };
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

struct Here;

impl Drop for Here {
    fn drop(&mut self) {
        DEPTH.set(DEPTH.get() - 1);
        if DEPTH.get() == 0 {
            NEXT.set(NEXT.get() + 1);
        }
    }
}

// SAFETY: one thread plays all CPUs and moves only while it is not pinned.
unsafe impl Cpu for Moving {
    type Guard<'a> = Here;
    fn raw_pin(&self) -> Here {
        DEPTH.set(DEPTH.get() + 1);
        Here
    }
    fn id(&self, _guard: &Here) -> CpuId {
        CpuId::new(NEXT.get() % self.0)
    }
    fn count(&self) -> u32 {
        self.0
    }
}

type MovingParts =
    Parts<&'static Arena, OffsetMap, Moving, Spin, NoLarge, &'static FrameTable, Plain>;

#[test]
fn a_task_that_moves_leaves_nothing_on_any_cpu() {
    for cpus in 1..8 {
        let arena = Arena::new(1024);
        let mut system: SlabSystem<MovingParts> = SlabSystem::new();
        // SAFETY: map and table cover the arena.
        system
            .init(unsafe { Parts::new(arena, arena.map(), Moving(cpus), arena.table) })
            .unwrap();
        {
            let cache: Cache<'_, [u64; 16], MovingParts> = Cache::new(&system, "moving");
            for count in 1..40 {
                drop(
                    (0..count)
                        .map(|n| cache.alloc([n; 16]).unwrap())
                        .collect::<Vec<_>>(),
                );
            }
            assert!(cache.info().unwrap().in_arrays > 0);
            assert_eq!(cache.destroy(), Ok::<(), Leaked>(()), "{cpus} CPUs");
        }
        let blocks: Vec<_> = (0..200)
            .map(|_| system.kmalloc(64, Flags::empty()).unwrap())
            .collect();
        for block in blocks {
            // SAFETY: allocated above.
            unsafe { system.kfree(block.as_ptr()) };
        }
        assert_eq!(system.teardown(), Ok::<(), Leaked>(()), "{cpus} CPUs");
        assert_eq!(arena.used(), 0);
    }
}
