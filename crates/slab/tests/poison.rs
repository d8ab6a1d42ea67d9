//! What `Poison` sees of a free object, and what becomes of a call that reports it where a report panics.
#![cfg(not(any(loom, shuttle)))]

mod common;

use std::alloc::Layout;
use std::collections::HashSet;
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::sync::atomic::Ordering;

use common::hardened::World;
use common::quietly;
use kmem_hal::ObjectAlloc;
use kmem_slab::{Cache, CacheInfo, Check, Flags, Misuse, Poison, Policy, Quarantine, Redzone};

/// Every byte of a free slot but the tag is looked at, those in front of it too.
#[test]
fn a_write_in_front_of_a_free_object_is_found() {
    let world: World<Poison> = World::new();
    for (size, align) in [(60, 64), (100, 32), (64, 64), (500, 256)] {
        let layout = Layout::from_size_align(size, align).unwrap();
        let take = || world.system.kmalloc_layout(layout, Flags::empty()).unwrap();
        for before in [align, align - 1, 10, 9] {
            let object = take();
            // SAFETY: a live allocation, whose slot begins `align` bytes before it; the write is the misuse under test.
            unsafe {
                world.system.kfree_layout(object, layout);
                object.sub(before).write(1);
            }
            assert_eq!(take(), object);
            let seen = world.seen();
            let (slot, written) = (object.as_ptr().addr() - align, align - before);
            assert!(
                matches!(seen[..], [Misuse::UseAfterFree { address, offset, .. }] if address == slot && offset == written),
                "{size} at {align}, {before} before: {seen:?}"
            );
            // SAFETY: a live allocation.
            unsafe { world.system.kfree_layout(object, layout) };
        }
    }
    world.end();
}

/// One of several free objects was written to, and the report, in the middle of a bulk allocation, panics: all others are free, or somebody's.
fn loses_only_what_was_written_to<H: Policy>(place: usize) {
    const COUNT: usize = 6;
    let world: World<H> = World::new();
    let cache: Cache<'_, [u64; 5], _> = Cache::new(&world.system, "bulk");
    let mut out = [MaybeUninit::uninit(); COUNT];
    assert_eq!(cache.alloc_bulk(&mut out), COUNT);
    // SAFETY: all were written.
    let mut objects = out.map(|object| unsafe { object.assume_init() });
    objects.reverse();
    // SAFETY: objects of this cache.
    unsafe { cache.free_bulk(&objects) };
    let written: NonNull<u8> = objects[COUNT - 1 - place].cast();
    // SAFETY: inside the object: the misuse under test.
    unsafe { written.add(20).write(1) };

    world.panics.store(true, Ordering::Relaxed);
    let fill = AssertUnwindSafe(|| cache.alloc_bulk(&mut [MaybeUninit::uninit(); COUNT]));
    assert!(quietly(|| catch_unwind(fill)).is_err());
    world.panics.store(false, Ordering::Relaxed);
    assert!(matches!(world.seen()[..], [Misuse::UseAfterFree { .. }]));
    assert_eq!(cache.info().unwrap().active_objects, 1, "at {place}");

    let mut owned = HashSet::from([written]);
    for _ in 0..100 {
        let object = ObjectAlloc::alloc(&cache).unwrap();
        assert!(owned.insert(object.cast()), "an object has two owners");
    }
    // What came back was free in every respect.
    assert_eq!(world.seen(), []);
    owned.remove(&written);
    for object in owned {
        // SAFETY: objects of this cache.
        unsafe { ObjectAlloc::free(&cache, object.cast()) };
    }
    assert_eq!(world.seen(), []);
    assert_eq!(cache.info().unwrap().active_objects, 1);
}

#[test]
fn a_report_in_a_bulk_allocation_loses_only_what_it_is_about() {
    for place in 0..6 {
        loses_only_what_was_written_to::<Poison>(place);
        loses_only_what_was_written_to::<(Check, Redzone, Poison)>(place);
    }
}

/// As many objects wait as the policy says, whoever was first.
#[test]
fn a_quarantine_holds_what_it_says_from_the_first_free() {
    let world: World<Quarantine<3>> = World::new();
    let layout = Layout::from_size_align(40, 8).unwrap();
    let take = || world.system.kmalloc_layout(layout, Flags::empty()).unwrap();
    let objects = [(); 8].map(|()| take());
    for (number, &object) in objects.iter().enumerate() {
        // SAFETY: a live allocation.
        unsafe { world.system.kfree_layout(object, layout) };
        let mut waiting = 0;
        let add = |cache: &CacheInfo| waiting += cache.waiting;
        world.system.caches(add).unwrap();
        assert_eq!(waiting, (number as u64 + 1).min(3));
    }
    world.end();
}
