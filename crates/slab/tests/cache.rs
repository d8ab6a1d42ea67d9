//! Typed caches.
#![cfg(not(any(loom, shuttle)))]

mod common;

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Arena, System, TestParts, parts, system};
use kmem_hal::{AllocError, Grace, NodeId, NodePolicy, ObjectAlloc, SingleGrace};
use kmem_slab::{Cache, Flags, ReuseCache, SlabBox, SlabSystem};

static SYSTEM: System = SlabSystem::new();
static INODES: Cache<'static, [u64; 20], TestParts> = Cache::new(&SYSTEM, "inode");

#[test]
fn a_static_cache_joins_at_its_first_use() {
    let value = [7; 20];
    let refused = INODES.alloc(value).unwrap_err();
    assert_eq!(
        (refused.error, refused.value),
        (AllocError::NotInitialised, value),
        "the value comes back"
    );
    let arena = Arena::new(1024);
    SYSTEM.init(parts(arena, 2)).unwrap();
    assert!(INODES.info().is_none());
    let boxed = INODES.alloc(value).unwrap();
    assert_eq!(*boxed, value);
    assert_eq!(INODES.info().unwrap().active_objects, 1);
    assert!(SYSTEM.slabinfo().to_string().contains("\ninode "));
    assert_eq!(SlabBox::into_inner(boxed), value);
    assert_eq!(INODES.info().unwrap().active_objects, 0);
}

#[test]
fn values_are_dropped_once_and_objects_come_back() {
    let (arena, mut system) = system(1024, 1);
    {
        let cache: Cache<'_, Rc<Cell<u32>>, _> = Cache::new(&system, "rc");
        let shared = Rc::new(Cell::new(0));
        let boxes: Vec<_> = (0..1000)
            .map(|_| cache.alloc(shared.clone()).unwrap())
            .collect();
        assert_eq!(Rc::strong_count(&shared), 1001);
        assert_eq!(cache.info().unwrap().active_objects, 1000);
        drop(boxes);
        assert_eq!(Rc::strong_count(&shared), 1);
        let kept = SlabBox::into_raw(cache.alloc(shared.clone()).unwrap());
        // SAFETY: the object came from this cache and nobody else owns it.
        drop(unsafe { SlabBox::from_raw(&cache, kept) });
        assert_eq!(Rc::strong_count(&shared), 1);
        cache.destroy().unwrap();
    }
    system.teardown().unwrap();
    assert_eq!(arena.used(), 0);
}

#[test]
fn a_full_machine_gives_the_value_back() {
    let (_, system) = system(64, 1);
    let cache: Cache<'_, [u8; 1000], _> = Cache::new(&system, "big");
    let mut held = Vec::new();
    let refused = loop {
        match cache.alloc([held.len() as u8; 1000]) {
            Ok(boxed) => held.push(boxed),
            Err(refused) => break refused,
        }
    };
    assert_eq!(refused.value, [held.len() as u8; 1000]);
    assert_eq!(refused.error, AllocError::OutOfMemory);
    assert!(
        held.iter()
            .enumerate()
            .all(|(at, boxed)| **boxed == [at as u8; 1000])
    );
    assert!(cache.info().unwrap().failures > 0);
}

#[test]
fn zero_sized_and_over_aligned_types() {
    #[repr(align(1024))]
    #[derive(Debug)]
    struct Wide(u8);
    let (_, system) = system(1024, 1);
    let nothing: Cache<'_, (), _> = Cache::new(&system, "unit");
    let a = nothing.alloc(()).unwrap();
    let b = nothing.alloc(()).unwrap();
    assert_eq!((*a, *b), ((), ()));
    assert!(nothing.info().is_none(), "no memory for nothing");
    let wide: Cache<'_, Wide, _> = Cache::new(&system, "wide");
    for at in 0..100 {
        let boxed = wide.alloc(Wide(at)).unwrap();
        assert!((&raw const *boxed).addr().is_multiple_of(1024));
        assert_eq!(boxed.0, at);
        std::mem::forget(boxed);
    }
    let tiny: Cache<'_, u8, _> = Cache::new(&system, "tiny");
    let all: Vec<_> = (0..=255).map(|n| tiny.alloc(n).unwrap()).collect();
    assert!(all.iter().enumerate().all(|(at, n)| usize::from(**n) == at));
}

#[test]
fn large_values_are_built_in_place() {
    let (_, system) = system(1024, 1);
    let cache: Cache<'_, [u64; 2000], _> = Cache::new(&system, "large");
    let boxed = cache
        .alloc_in_place(|place| {
            for at in 0..2000 {
                // SAFETY: inside the place.
                unsafe { place.as_mut_ptr().cast::<u64>().add(at).write(at as u64) };
            }
            // SAFETY: every element was written.
            unsafe { place.assume_init_mut() }
        })
        .unwrap();
    assert!(boxed.iter().enumerate().all(|(at, &n)| n == at as u64));
}

#[test]
fn a_value_that_was_built_elsewhere_is_left_there() {
    let (_, system) = system(1024, 1);
    let borrowed = 5;
    let counted = Rc::new(());
    let mut elsewhere = (counted.clone(), &borrowed);
    let cache: Cache<'_, (Rc<()>, &u8), _> = Cache::new(&system, "elsewhere");
    let place = &mut elsewhere;
    assert_eq!(
        cache.alloc_in_place(|_| place).map(drop),
        Err(AllocError::Unsatisfiable)
    );
    assert_eq!(cache.info().unwrap().active_objects, 0);
    assert_eq!(Rc::strong_count(&counted), 2, "nothing was dropped");
}

#[test]
fn a_leak_is_counted_and_the_object_lives_on() {
    let (_, system) = system(1024, 1);
    let cache: Cache<'_, u64, _> = Cache::new(&system, "leaky");
    let kept = SlabBox::into_raw(cache.alloc(41).unwrap());
    let _ = SlabBox::into_raw(cache.alloc(42).unwrap());
    let leaked = cache.destroy().unwrap_err();
    assert_eq!((leaked.cache, leaked.objects), ("leaky", 2));
    assert_eq!(leaked.to_string(), "2 objects of leaky are still in use");
    // SAFETY: the leaked object's memory stays.
    assert_eq!(unsafe { kept.read() }, 41);
    assert!(system.slabinfo().to_string().contains("leaky"));
}

#[test]
fn caches_come_and_go_without_a_trace() {
    let (arena, mut system) = system(2048, 2);
    // More than a page of heads has columns, so a second row is needed.
    let mut used = None;
    for _ in 0..3 {
        let caches: Vec<Cache<'_, u64, TestParts>> =
            (0..100).map(|_| Cache::new(&system, "many")).collect();
        let boxes: Vec<_> = caches.iter().map(|cache| cache.alloc(5).unwrap()).collect();
        drop(boxes);
        for cache in caches {
            cache.destroy().unwrap();
        }
        let now = arena.used();
        assert_eq!(
            *used.get_or_insert(now),
            now,
            "the second round takes nothing more than the first"
        );
    }
    system.teardown().unwrap();
    assert_eq!(arena.used(), 0);
}

#[test]
fn bulk_calls_are_the_single_calls() {
    let (_, system) = system(1024, 1);
    let cache: Cache<'_, u64, _> = Cache::new(&system, "bulk");
    let mut out = [const { MaybeUninit::uninit() }; 500];
    assert_eq!(cache.alloc_bulk(&mut out), 500);
    // SAFETY: all were given.
    let objects: Vec<NonNull<u64>> = out
        .iter()
        .map(|place| unsafe { place.assume_init() })
        .collect();
    let mut sorted = objects.clone();
    sorted.sort();
    sorted.dedup();
    assert_eq!(sorted.len(), 500);
    assert_eq!(cache.info().unwrap().active_objects, 500);
    // SAFETY: given above, freed once.
    unsafe { cache.free_bulk(&objects) };
    let info = cache.info().unwrap();
    assert_eq!(
        (info.active_objects, info.allocs, info.frees),
        (0, 500, 500)
    );
}

#[test]
fn a_reserve_cannot_fail() {
    let (arena, system) = system(1024, 1);
    let cache: Cache<'_, u64, _> = Cache::new(&system, "reserve");
    let mut reserve = cache.prefill::<64>(50).unwrap();
    arena.fail_at.store(0, std::sync::atomic::Ordering::Relaxed);
    let taken: Vec<_> = (0..50).map(|_| reserve.take().unwrap()).collect();
    assert!(reserve.take().is_none());
    drop(reserve);
    assert_eq!(cache.info().unwrap().active_objects, 50);
    for object in taken {
        // SAFETY: taken above.
        unsafe { cache.free(object) };
    }
    assert_eq!(
        cache.prefill::<8>(9).unwrap_err(),
        AllocError::Unsatisfiable
    );
}

#[test]
fn stable_memory_stays_until_the_end() {
    let (arena, system) = system(1024, 1);
    let stable: Cache<'_, [u64; 64], _, true> = Cache::new_stable(&system, "stable");
    const { assert!(<Cache<'_, [u64; 64], TestParts, true> as ObjectAlloc<[u64; 64]>>::TYPE_STABLE) };
    const { assert!(!<Cache<'_, u64, TestParts> as ObjectAlloc<u64>>::TYPE_STABLE) };
    drop(
        (0..2000)
            .map(|n| stable.alloc([n; 64]).unwrap())
            .collect::<Vec<_>>(),
    );
    let frames = stable.info().unwrap().frames;
    assert_eq!((stable.shrink(), system.shrink()), (0, 0));
    assert_eq!(stable.info().unwrap().frames, frames);
    let before = arena.used();
    stable.destroy().unwrap();
    assert!(arena.used() <= before - frames as usize);
}

#[test]
fn deferred_frees_wait_for_the_readers() {
    let (_, system) = system(1024, 1);
    let cache: Cache<'_, u64, _> = Cache::new(&system, "deferred");
    // SAFETY: one thread.
    let grace = unsafe { SingleGrace::new() };
    let object = cache.alloc(5).map(SlabBox::into_raw).unwrap();
    let guard = grace.read();
    // SAFETY: the object came from the cache, which outlives the grace period.
    unsafe { cache.free_deferred(object, &grace) }.unwrap();
    assert_eq!(cache.info().unwrap().active_objects, 1);
    drop(guard);
    grace.poll();
    assert_eq!(cache.info().unwrap().active_objects, 0);
}

static BUILT: AtomicUsize = AtomicUsize::new(0);
static ALIVE: AtomicUsize = AtomicUsize::new(0);

struct Costly(u32);

impl Costly {
    fn build() -> Self {
        BUILT.fetch_add(1, Ordering::Relaxed);
        ALIVE.fetch_add(1, Ordering::Relaxed);
        Self(0)
    }
}

impl Drop for Costly {
    fn drop(&mut self) {
        ALIVE.fetch_sub(1, Ordering::Relaxed);
    }
}

#[test]
fn built_objects_stay_built() {
    let (_, system) = system(1024, 1);
    let cache = ReuseCache::new(&system, "costly", Costly::build, |c: &mut Costly| c.0 = 0);
    for round in 0..1000 {
        let mut object = cache.alloc().unwrap();
        assert_eq!(object.0, 0, "reset in round {round}");
        object.0 = 7;
    }
    assert_eq!(
        BUILT.load(Ordering::Relaxed) as u64,
        cache.info().unwrap().total_objects
    );
    assert_eq!(ALIVE.load(Ordering::Relaxed), BUILT.load(Ordering::Relaxed));
    cache.destroy().unwrap();
    assert_eq!(ALIVE.load(Ordering::Relaxed), 0);
}

/// Counts the values that were taken apart in a test of one thread.
struct Counted([u64; 64]);

thread_local! {
    static APART: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

impl Drop for Counted {
    fn drop(&mut self) {
        APART.set(APART.get() + 1);
    }
}

#[test]
fn no_destructor_runs_beneath_an_allocation_that_may_not_wait() {
    type Attempt = fn(&System, Flags) -> bool;
    let attempts: [Attempt; 3] = [
        |system, flags| system.kmalloc(8192, flags).is_ok(),
        |system, flags| system.kmalloc(20_000, flags).is_ok(),
        |system, flags| {
            let here = NodePolicy::Strict(NodeId::new(0));
            system.kmalloc_node(8192, flags, here).is_ok()
        },
    ];
    for attempt in attempts {
        let (_, system) = system(256, 1);
        let build = || Counted([0; 64]);
        let cache = ReuseCache::new(&system, "built", build, |built: &mut Counted| {
            built.0[0] = 0
        });
        drop((0..100).map(|_| cache.alloc().unwrap()).collect::<Vec<_>>());
        APART.set(0);
        while attempt(&system, Flags::empty()) {}
        assert_eq!(APART.get(), 0, "the caller may hold a lock of theirs");
        attempt(&system, Flags::MAY_WAIT);
        assert!(APART.get() > 0, "who may wait gets their memory");
    }
}

#[test]
fn a_limit_of_addresses_is_refused_and_not_ignored() {
    let (_, system) = system(1024, 1);
    let cache: Cache<'_, u64, _> = Cache::new(&system, "limits");
    for flags in [Flags::DMA, Flags::DMA32 | Flags::MAY_WAIT] {
        // With an object at hand too.
        drop(cache.alloc(1).unwrap());
        let refused = cache.alloc_with(3, flags).unwrap_err();
        assert_eq!(
            (refused.error, refused.value),
            (AllocError::Unsatisfiable, 3)
        );
    }
    assert_eq!(cache.info().unwrap().active_objects, 0);
}
