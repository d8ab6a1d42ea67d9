//! Each misuse that a policy is there to find, planted.
#![cfg(not(any(loom, shuttle)))]

mod common;

use std::alloc::Layout;
use std::ptr::NonNull;

use common::hardened::World;
use common::run_as;
use kmem_hal::{FrameRequest, FrameSink, FrameSource};
use kmem_slab::{
    Cache, Check, Flags, Guard, Misuse, Plain, Poison, Policy, Quarantine, Redzone, Shuffle,
};

#[test]
fn check_finds_a_double_free_at_the_call_and_goes_on() {
    let world: World<Check> = World::new();
    for size in [8, 24, 40, 64, 100, 5000] {
        let layout = Layout::from_size_align(size, 8).unwrap();
        let take = || world.system.kmalloc_layout(layout, Flags::empty()).unwrap();
        let (a, b) = (take(), take());
        // SAFETY: the second free of `a` is the misuse under test, which the policy refuses.
        unsafe {
            world.system.kfree(a.as_ptr());
            world.system.kfree(a.as_ptr());
        }
        let address = a.as_ptr().addr();
        assert!(
            matches!(world.seen()[..], [Misuse::DoubleFree { address: at, .. }] if at == address),
            "size {size}"
        );
        // SAFETY: as above, with the layout.
        unsafe { world.system.kfree_layout(a, layout) };
        assert!(matches!(world.seen()[..], [Misuse::DoubleFree { .. }]));
        // SAFETY: a live allocation.
        unsafe { world.system.kfree_layout(b, layout) };
        assert_eq!(world.seen(), []);
    }
    world.end();
}

#[test]
fn check_finds_an_address_inside_an_object() {
    let world: World<Check> = World::new();
    for (size, offsets) in [
        (64, &[8, 16, 48][..]),
        (24, &[8, 16]),
        (40, &[8, 16, 24, 32]),
    ] {
        let objects = [world.take(size), world.take(size), world.take(size)];
        for &offset in offsets {
            // SAFETY: the misuse under test; nothing is written.
            unsafe { world.system.kfree(objects[1].as_ptr().add(offset)) };
            assert!(
                matches!(world.seen()[..], [Misuse::InvalidFree { .. }]),
                "{offset} of {size}"
            );
        }
        for object in objects {
            // SAFETY: live allocations.
            unsafe { world.system.kfree(object.as_ptr()) };
        }
    }
    world.end();
}

#[test]
fn check_finds_the_wrong_class_the_wrong_cache_and_strangers() {
    let world: World<Check> = World::new();
    {
        let one: Cache<'_, [u64; 8], _> = Cache::new(&world.system, "one");
        let other: Cache<'_, [u64; 8], _> = Cache::new(&world.system, "other");
        let boxed = one.alloc([1; 8]).unwrap();
        drop(other.alloc([1; 8]).unwrap());
        let raw = kmem_slab::SlabBox::into_raw(boxed);
        // SAFETY: the misuse under test: an object of one cache in a box of the other.
        drop(unsafe { kmem_slab::SlabBox::from_raw(&other, raw) });
        assert!(matches!(
            world.seen()[..],
            [Misuse::WrongCache {
                cache: "other",
                belongs_to: "one",
                ..
            }]
        ));
        // SAFETY: the object is still in use.
        drop(unsafe { kmem_slab::SlabBox::from_raw(&one, raw) });
    }
    let a = world.take(64);
    // SAFETY: the misuse under test: the layout is that of another class.
    unsafe {
        world
            .system
            .kfree_layout(a, Layout::from_size_align(200, 8).unwrap())
    };
    assert!(matches!(
        world.seen()[..],
        [Misuse::WrongCache {
            cache: "kmalloc-224",
            belongs_to: "kmalloc-128",
            ..
        }]
    ));
    let mut local = 0u64;
    // SAFETY: the misuse under test.
    unsafe {
        world
            .system
            .kfree_layout(NonNull::from(&mut local).cast(), Layout::new::<u64>())
    };
    assert!(matches!(world.seen()[..], [Misuse::ForeignFree { .. }]));
    // SAFETY: a live allocation.
    unsafe { world.system.kfree(a.as_ptr()) };
    world.end();
}

#[test]
fn redzone_finds_writes_behind_the_object_and_the_wrong_size() {
    let world: World<Redzone> = World::new();
    for size in [1, 60, 64, 1000] {
        for behind in [0, 1, 15] {
            let a = world.take(size);
            // SAFETY: a live allocation.
            assert_eq!(unsafe { world.system.ksize(a) }, Some(size));
            // SAFETY: inside the slot, behind the object: the misuse under test.
            unsafe {
                a.add(size + behind).write(1);
                world.system.kfree(a.as_ptr());
            }
            let at = size + behind;
            assert!(
                matches!(world.seen()[..], [Misuse::Overrun { offset, .. }] if offset == at),
                "{size} + {behind}"
            );
        }
    }
    let a = world.take(1000);
    // SAFETY: a live allocation; no record lies behind what is not its beginning, and the call does not look for one.
    assert_eq!(unsafe { world.system.ksize(a.add(999)) }, None);
    // SAFETY: a live allocation, and then none: its slab is still there.
    unsafe {
        world.system.kfree(a.as_ptr());
        assert_eq!(world.system.ksize(a), None);
    }
    let a = world.take(60);
    // SAFETY: the misuse under test: one byte less than was asked for.
    unsafe {
        world
            .system
            .kfree_layout(a, Layout::from_size_align(59, 8).unwrap())
    };
    assert!(matches!(
        world.seen()[..],
        [Misuse::WrongSize {
            allocated: 60,
            freed: 59,
            ..
        }]
    ));
    // SAFETY: it stayed where it was.
    unsafe { world.system.kfree(a.as_ptr()) };
    world.end();
}

#[test]
fn poison_finds_writes_after_the_free() {
    let world: World<Poison> = World::new();
    for offset in [0, 8, 63] {
        let a = world.take(64);
        // SAFETY: the write after the free is the misuse under test; the slab is still there.
        unsafe {
            world.system.kfree(a.as_ptr());
            a.add(offset).write(7);
        }
        let b = world.take(64);
        assert_eq!(a, b);
        assert!(
            matches!(world.seen()[..], [Misuse::UseAfterFree { offset: at, .. }] if at == offset)
        );
        // SAFETY: a live allocation.
        unsafe { world.system.kfree(b.as_ptr()) };
    }
    world.end();
}

#[test]
fn poison_shows_in_what_is_not_initialised() {
    let world: World<Poison> = World::new();
    let a = world.take(32);
    // SAFETY: allocated, and written by the policy.
    assert_eq!(unsafe { a.add(31).read() }, 0x5a);
    let b = world.system.kmalloc(32, Flags::ZERO).unwrap();
    // SAFETY: as above.
    assert_eq!(unsafe { b.add(31).read() }, 0);
    for object in [a, b] {
        // SAFETY: live allocations.
        unsafe { world.system.kfree(object.as_ptr()) };
    }
    world.end();
}

#[test]
fn quarantine_ends_with_its_cache_on_a_cpu_without_memory_for_a_head() {
    let world: World<Quarantine<8>> = World::new();
    let cache: Cache<'_, [u64; 9], _> = Cache::new(&world.system, "waiting");
    drop(cache.alloc([1; 9]).unwrap());
    assert!(cache.info().unwrap().waiting > 0);
    let one = || FrameSource::alloc(world.arena, &FrameRequest::ONE).ok();
    let frames: Vec<_> = std::iter::from_fn(one).collect();
    run_as(1);
    cache.destroy().unwrap();
    run_as(0);
    for frame in frames {
        FrameSink::free(world.arena, frame);
    }
    world.end();
}

#[test]
fn what_waits_in_quarantine_serves_another_node_before_it_is_refused() {
    let world: World<Quarantine<8>> = World::with_nodes(2);
    let near = [world.take(64), world.take(64)];
    run_as(1);
    let take = || world.system.kmalloc(64, Flags::NO_WARN).ok();
    let mut held: Vec<_> = std::iter::from_fn(take).collect();
    let far = near[0];
    let from = held.iter().position(|&object| object == far);
    assert_eq!((from, take()), (None, None));
    // SAFETY: a live allocation.
    unsafe { world.system.kfree(far.as_ptr()) };
    // It waits at the first node, whose slab it goes back to.
    assert_eq!(take(), Some(far));
    held.extend(near);
    for object in held {
        // SAFETY: live allocations.
        unsafe { world.system.kfree(object.as_ptr()) };
    }
    run_as(0);
    world.end();
}

#[test]
fn quarantine_keeps_freed_objects_from_coming_back_at_once() {
    let world: World<(Quarantine<8>, Poison)> = World::new();
    let mut freed = Vec::new();
    for round in 0..100 {
        let a = world.take(64);
        assert!(
            !freed.iter().rev().take(8).any(|&old| old == a),
            "round {round}: given again within 8 frees"
        );
        freed.push(a);
        // SAFETY: a live allocation.
        unsafe { world.system.kfree(a.as_ptr()) };
    }
    let old = *freed.last().unwrap();
    // SAFETY: the write after the free and the double free are the misuses under test.
    unsafe {
        world.system.kfree(old.as_ptr());
        assert!(matches!(world.seen()[..], [Misuse::DoubleFree { .. }]));
        old.add(5).write(1);
    }
    let mut waiting = 0;
    world
        .system
        .caches(|cache| waiting += cache.waiting)
        .unwrap();
    assert_eq!(waiting, 8);
    // It is found when the object leaves the quarantine.
    for _ in 0..8 {
        let a = world.take(64);
        // SAFETY: a live allocation.
        unsafe { world.system.kfree(a.as_ptr()) };
    }
    assert!(matches!(
        world.seen()[..],
        [Misuse::UseAfterFree { offset: 5, .. }]
    ));
    // What was found is poisoned again before the teardown looks.
    world.system.shrink();
    let mut active = 0;
    world
        .system
        .caches(|cache| active += cache.active_objects + cache.waiting)
        .unwrap();
    assert_eq!(active, 0);
}

#[test]
fn shuffle_gives_addresses_out_of_order() {
    let plain: World<Plain> = World::new();
    let shuffled: World<Shuffle> = World::new();
    fn ascending<H: Policy>(world: &World<H>) -> usize {
        let objects: Vec<_> = (0..60).map(|_| world.take(64)).collect();
        let count = objects.windows(2).filter(|pair| pair[0] < pair[1]).count();
        for object in objects {
            // SAFETY: live allocations.
            unsafe { world.system.kfree(object.as_ptr()) };
        }
        count
    }
    assert!(ascending(&plain) >= 57);
    assert!((10..50).contains(&ascending(&shuffled)));
    plain.end();
    shuffled.end();
}

#[test]
fn refusals_are_told_unless_the_caller_asks_for_silence() {
    let world: World<Plain> = World::new();
    let mut held = Vec::new();
    while let Ok(object) = world.system.kmalloc(8192, Flags::NO_WARN) {
        held.push(object);
    }
    assert_eq!(*world.refused.lock().unwrap(), []);
    assert!(world.system.kmalloc(8000, Flags::empty()).is_err());
    assert!(world.system.kmalloc(8000, Flags::NO_WARN).is_err());
    assert!(world.system.kmalloc(20_000, Flags::empty()).is_err());
    {
        let cache: Cache<'_, [u64; 600], _> = Cache::new(&world.system, "large");
        assert!(cache.alloc([0; 600]).is_err());
        assert!(cache.alloc_with([0; 600], Flags::NO_WARN).is_err());
    }
    assert_eq!(*world.refused.lock().unwrap(), [8000, 20_000, 4800]);
    for object in held {
        // SAFETY: live allocations.
        unsafe { world.system.kfree(object.as_ptr()) };
    }
    world.end();
}

#[test]
fn guard_puts_one_in_so_many_at_the_end_of_its_own_page() {
    let world: World<Guard<4>> = World::new();
    let mut at_an_end = 0;
    for size in [16, 48, 100, 1024] {
        let layout = Layout::from_size_align(size, 8).unwrap();
        let take = |_| world.system.kmalloc_layout(layout, Flags::empty()).unwrap();
        let objects: Vec<_> = (0..8).map(take).collect();
        for object in objects {
            let end = object.as_ptr().addr() + size.next_multiple_of(8);
            let guarded = end.is_multiple_of(4096);
            at_an_end += usize::from(guarded);
            // SAFETY: a live allocation.
            unsafe {
                object.write_bytes(1, size);
                if object.as_ptr().addr() & 16 == 0 {
                    world.system.kfree(object.as_ptr());
                } else {
                    world.system.kfree_layout(object, layout);
                }
            }
        }
    }
    assert!(at_an_end >= 8, "{at_an_end} of 32");
    world.end();
}

#[test]
fn check_finds_a_write_behind_an_object_at_the_free_of_the_next() {
    let world: World<Check> = World::new();
    let mut held: Vec<_> = (0..40).map(|_| world.take(56)).collect();
    held.sort();
    let behind = |pair: &[NonNull<u8>]| pair[1].as_ptr().addr() == pair[0].as_ptr().addr() + 64;
    let at = held.windows(2).position(behind).unwrap();
    let (a, b) = (held[at], held.remove(at + 1));
    // SAFETY: a live allocation.
    let room = unsafe { world.system.ksize(a) }.unwrap();
    // SAFETY: the misuse under test: the first byte behind what may be used.
    unsafe {
        let behind = a.as_ptr().add(room);
        let was = behind.read();
        behind.write(!was);
        world.system.kfree(b.as_ptr());
        let seen = world.seen();
        assert!(
            matches!(seen[..], [Misuse::Overrun { address, offset, .. }]
                if address == a.as_ptr().addr() && offset == room),
            "{seen:?}"
        );
        // The object stayed where it was, and can be freed once the tag is whole again.
        behind.write(was);
        world.system.kfree(b.as_ptr());
    }
    for object in held {
        // SAFETY: live allocations.
        unsafe { world.system.kfree(object.as_ptr()) };
    }
    world.end();
}

#[test]
fn check_never_reads_what_is_not_mapped() {
    let world: World<Check> = World::new();
    let layout = Layout::from_size_align(100, 8).unwrap();
    for address in [8usize, 4096, usize::MAX - 64, 1 << 40] {
        let wild = std::ptr::without_provenance_mut::<u8>(address);
        // SAFETY: the misuse under test.
        unsafe {
            world
                .system
                .kfree_layout(NonNull::new(wild).unwrap(), layout)
        };
        assert!(matches!(world.seen()[..], [Misuse::ForeignFree { .. }]));
    }
    world.end();
}
