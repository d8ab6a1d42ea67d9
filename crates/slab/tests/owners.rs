//! The policy `Owner`: who allocated what is in use, by the source line of the call.
#![cfg(not(any(loom, shuttle)))]

mod common;

use std::alloc::Layout;

use common::hardened::World;
use kmem_hal::{NodeId, NodePolicy};
use kmem_slab::{Cache, Flags, Owner, OwnerCount, Plain, ReuseCache};

#[test]
fn owner_tells_which_line_leaked() {
    let mut world: World<Owner> = World::new();
    let line = line!() + 1;
    let leaked = world.system.kmalloc(100, Flags::empty()).unwrap();
    let other = world.take(100);
    // SAFETY: a live allocation.
    unsafe { world.system.kfree(other.as_ptr()) };
    let mut owned = Vec::new();
    world.system.owners(|object| owned.push(*object));
    let [object] = owned[..] else {
        panic!("{owned:?}")
    };
    assert_eq!((object.cache, object.size), ("kmalloc-128", 100));
    assert_eq!(object.address, leaked.as_ptr().addr());
    let place = object.place.unwrap();
    assert_eq!((place.file(), place.line()), (file!(), line));
    assert!(object.to_string().contains("owners.rs"), "{object}");
    let refused = world.system.teardown().unwrap_err();
    assert_eq!((refused.cache, refused.objects), ("kmalloc-128", 1));
    // SAFETY: the allocation is still there.
    unsafe { world.system.kfree(leaked.as_ptr()) };
    world.end();
}

#[test]
fn owner_counts_objects_by_line() {
    let mut world: World<Owner> = World::new();
    let many: Vec<_> = (0..10).map(|_| world.take(100)).collect();
    let line = line!() + 1;
    let one = world.system.kmalloc(5000, Flags::empty()).unwrap();
    let mut table = [OwnerCount::NONE; 4];
    let (counts, others) = world.system.owner_counts(&mut table);
    assert_eq!((counts.len(), others), (2, 0));
    // Most bytes first.
    assert_eq!((counts[0].objects, counts[0].bytes), (1, 5000));
    assert_eq!(counts[0].place.unwrap().line(), line);
    assert_eq!((counts[1].cache, counts[1].objects), ("kmalloc-128", 10));
    assert_eq!(counts[1].bytes, 1000);
    assert!(
        counts[1]
            .to_string()
            .contains("10 objects, 1000 bytes from")
    );
    // A table that is too small says so.
    let mut small = [OwnerCount::NONE; 1];
    let (counts, others) = world.system.owner_counts(&mut small);
    assert_eq!(counts[0].objects + others, 11);
    for object in many.into_iter().chain([one]) {
        // SAFETY: live allocations.
        unsafe { world.system.kfree(object.as_ptr()) };
    }
    world.end();
}

#[test]
fn owner_tells_the_callers_line_whatever_the_call() {
    let mut world: World<Owner> = World::new();
    let layout = Layout::from_size_align(100, 8).unwrap();
    let here = NodePolicy::Preferred(NodeId::new(0));
    let system = &world.system;
    let line = line!() + 4;
    // SAFETY: memory of this system and its layout, which is given up; null allocates.
    let objects = unsafe {
        [
            system
                .kmalloc_node(100, Flags::empty(), here)
                .unwrap()
                .as_ptr(),
            system
                .krealloc(std::ptr::null_mut(), 100, Flags::empty())
                .unwrap()
                .as_ptr(),
            system.alloc(layout),
            system.alloc_zeroed(layout),
            system.realloc(std::ptr::dangling_mut(), Layout::new::<()>(), 100),
        ]
    };
    let mut lines = Vec::new();
    world.system.owners(|object| {
        let place = object.place.unwrap();
        assert_eq!(place.file(), file!());
        lines.push(place.line());
    });
    lines.sort_unstable();
    assert!(
        lines.iter().all(|at| (line..line + 15).contains(at)),
        "{lines:?}"
    );
    lines.dedup();
    assert_eq!(lines.len(), objects.len());
    for object in objects {
        // SAFETY: allocated above.
        unsafe { world.system.kfree(object) };
    }
    world.end();
}

#[test]
fn owner_tells_the_line_of_a_built_object() {
    let world: World<Owner> = World::new();
    {
        let cache = ReuseCache::new(&world.system, "built", || 5u64, |_| {});
        let line = line!() + 1;
        let object = cache.alloc().unwrap();
        // SAFETY: nobody else uses the system.
        unsafe {
            world.system.owners_shared(|owned| {
                assert_eq!(
                    owned.place.map(|at| (at.file(), at.line())),
                    Some((file!(), line))
                );
            });
        }
        drop(object);
    }
    world.end();
}

#[test]
fn owner_tells_the_line_of_a_box() {
    let mut world: World<Plain> = World::new();
    {
        let cache: Cache<'_, u64, _, false, Owner> = Cache::new(&world.system, "owned");
        let line = line!() + 1;
        let boxed = cache.alloc(5).unwrap();
        let mut owned = Vec::new();
        // SAFETY: nobody else uses the system.
        unsafe { world.system.owners_shared(|object| owned.push(*object)) };
        assert_eq!(owned.len(), 1);
        assert_eq!((owned[0].cache, owned[0].size), ("owned", 8));
        assert_eq!(owned[0].place.unwrap().line(), line);
        drop(boxed);
    }
    let mut owned = 0;
    world.system.owners(|_| owned += 1);
    assert_eq!(owned, 0);
    world.end();
}

/// The record of an object is what was asked for last, and by whom.
#[test]
fn owner_tells_the_size_and_line_of_a_resize() {
    let mut world: World<Owner> = World::new();
    // With its tag and record an object of 30 bytes lies in a class of 56, which leaves room for 32.
    for _ in 0..20 {
        let object = world.take(30);
        let line = line!() + 2;
        // SAFETY: a live allocation, not used afterwards.
        let object = unsafe { (world.system).krealloc(object.as_ptr(), 32, Flags::empty()) };
        let object = object.unwrap();
        assert!(object.as_ptr().addr().is_multiple_of(32), "{object:?}");
        // SAFETY: a live allocation.
        assert_eq!(unsafe { world.system.ksize(object) }, Some(32));
        let mut owned = Vec::new();
        world.system.owners(|object| owned.push(*object));
        let [owned] = owned[..] else {
            panic!("{owned:?}")
        };
        assert_eq!((owned.address, owned.size), (object.as_ptr().addr(), 32));
        assert_eq!(owned.place.unwrap().line(), line);
        // SAFETY: a live allocation.
        unsafe { world.system.kfree(object.as_ptr()) };
    }
    world.end();
}
