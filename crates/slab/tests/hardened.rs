//! A system with any policy works as one without: contents, counts, alignments, sizes, and memory that runs out.
#![cfg(not(any(loom, shuttle)))]

mod common;

use std::alloc::Layout;
use std::ptr::NonNull;

use common::hardened::World;
use common::run_as;
use kmem_slab::{
    Check, Flags, Guard, Misuse, Owner, Plain, Poison, Policy, Quarantine, Redzone, Shuffle,
};

/// What is asked for with `ZERO`, however often its size changes, is zero where its owner wrote nothing.
fn zeroed_memory_stays_zero<H: Policy>() {
    let world: World<H> = World::new();
    let system = &world.system;
    let are = |memory: NonNull<u8>, from: usize, to: usize, byte: u8| {
        for at in from..to {
            // SAFETY: inside a live allocation whose bytes were written.
            assert_eq!(unsafe { memory.add(at).read() }, byte, "byte {at} of {to}");
        }
    };
    for (less, more) in [(65, 80), (60, 200), (9000, 12_000), (3000, 9000)] {
        // Others have used the memory, all of it.
        let used: Vec<_> = [less, more, less, more].map(|size| world.take(size)).into();
        for memory in used {
            // SAFETY: a live allocation of so many usable bytes.
            unsafe {
                memory.write_bytes(0xff, system.ksize(memory).unwrap());
                system.kfree(memory.as_ptr());
            }
        }
        let resize = |memory: NonNull<u8>, size| {
            // SAFETY: a live allocation, not used afterwards.
            unsafe { system.krealloc(memory.as_ptr(), size, Flags::ZERO) }.unwrap()
        };
        let memory = system.kmalloc(less, Flags::ZERO).unwrap();
        are(memory, 0, less, 0);
        // SAFETY: `less` bytes.
        unsafe { memory.write_bytes(1, less) };
        let memory = resize(memory, more);
        are(memory, 0, less, 1);
        are(memory, less, more, 0);
        // SAFETY: `more` bytes.
        unsafe { memory.write_bytes(2, more) };
        let memory = resize(resize(memory, less), more);
        are(memory, 0, less, 2);
        are(memory, less, more, 0);
        // SAFETY: a live allocation.
        unsafe { system.kfree(memory.as_ptr()) };
    }
    world.end();
}

#[test]
fn zeroed_memory_stays_zero_with_every_policy() {
    zeroed_memory_stays_zero::<Plain>();
    zeroed_memory_stays_zero::<Check>();
    zeroed_memory_stays_zero::<Redzone>();
    zeroed_memory_stays_zero::<(Owner, Poison)>();
    zeroed_memory_stays_zero::<Guard<1>>();
}

/// A mixed run: contents stay, counts agree, nothing is reported, all memory goes back.
fn works<H: Policy>() {
    let world: World<H> = World::new();
    // Address, size, content, and whether the layout was told.
    let mut held: Vec<(NonNull<u8>, usize, u8, bool)> = Vec::new();
    let mut state = 9u64;
    for step in 0..6000u32 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let random = (state >> 33) as usize;
        if !random.is_multiple_of(3) && held.len() < 300 || held.is_empty() {
            let size = 1 + random % [40, 300, 3000][random % 3];
            let by_layout = step.is_multiple_of(2);
            let served = if by_layout {
                let layout = Layout::from_size_align(size, 8).unwrap();
                world.system.kmalloc_layout(layout, Flags::empty())
            } else {
                world.system.kmalloc(size, Flags::empty())
            };
            let Ok(object) = served else {
                continue;
            };
            // SAFETY: a live allocation of `size` bytes.
            unsafe { object.write_bytes(step as u8, size) };
            held.push((object, size, step as u8, by_layout));
        } else {
            let (object, size, fill, by_layout) = held.swap_remove(random % held.len());
            // SAFETY: a live allocation, filled above.
            let bytes = unsafe { std::slice::from_raw_parts(object.as_ptr(), size) };
            assert!(bytes.iter().all(|&byte| byte == fill));
            let layout = Layout::from_size_align(size, 8).unwrap();
            // SAFETY: a live allocation.
            unsafe {
                if random.is_multiple_of(2) || !by_layout {
                    world.system.kfree(object.as_ptr());
                } else if random.is_multiple_of(5) {
                    let grown = world.system.realloc(object.as_ptr(), layout, size + 40);
                    let grown = NonNull::new(grown).unwrap();
                    assert_eq!(grown.as_ptr().read(), fill);
                    grown.write_bytes(fill, size + 40);
                    held.push((grown, size + 40, fill, true));
                } else {
                    world.system.kfree_layout(object, layout);
                }
            }
        }
        if step % 1500 == 700 {
            world.system.shrink();
        }
        run_as(u32::from(step % 64 < 20));
    }
    run_as(0);
    for (object, ..) in held {
        // SAFETY: live allocations.
        unsafe { world.system.kfree(object.as_ptr()) };
    }
    world
        .system
        .caches(|cache| {
            assert_eq!(cache.active_objects, 0, "{cache:?}");
            assert_eq!(cache.allocs, cache.frees, "{cache:?}");
        })
        .unwrap();
    world.end();
}

#[test]
fn systems_with_any_policy_work() {
    works::<Plain>();
    works::<Check>();
    works::<Redzone>();
    works::<Poison>();
    works::<Quarantine<16>>();
    works::<Shuffle>();
    works::<Owner>();
    works::<Guard<10>>();
    works::<(Check, Redzone, Poison, Quarantine<32>, Shuffle, Owner)>();
}

/// Powers of two up to a page lie at multiples of themselves, whatever lies behind each object.
fn aligns<H: Policy>() {
    let world: World<H> = World::new();
    let aligned = |object: NonNull<u8>, size: usize| {
        assert!(
            object.as_ptr().addr().is_multiple_of(size),
            "{size} bytes at {object:?}"
        );
    };
    for size in (0..=12).map(|shift| 1usize << shift) {
        let mut held: Vec<_> = (0..20).map(|_| world.take(size)).collect();
        for object in &mut held {
            aligned(*object, size);
            // SAFETY: a live allocation, replaced by what it became.
            unsafe {
                // Its class may be the same as that of the power of two, or not.
                for other in [size + 3, size] {
                    let moved = world
                        .system
                        .krealloc(object.as_ptr(), other, Flags::empty());
                    *object = moved.unwrap();
                }
            }
            aligned(*object, size);
        }
        for object in held {
            // SAFETY: a live allocation.
            unsafe { world.system.kfree(object.as_ptr()) };
        }
    }
    world.end();
}

#[test]
fn powers_of_two_are_aligned_to_themselves_under_every_policy() {
    aligns::<Plain>();
    aligns::<Check>();
    aligns::<Redzone>();
    aligns::<Poison>();
    aligns::<Owner>();
    aligns::<Guard<3>>();
    aligns::<(Check, Redzone, Poison, Quarantine<32>, Shuffle, Owner)>();
}

/// Sizes of one class, and that of a changed object is the last that was asked for.
fn sizes<H: Policy>() {
    let world: World<H> = World::new();
    let layout = |size| Layout::from_size_align(size, 8).unwrap();
    let system = &world.system;
    let is_wrong = |allocated, freed| {
        let seen = world.seen();
        assert!(
            matches!(seen[..], [Misuse::WrongSize { allocated: had, freed: was, .. }]
                if (had, was) == (allocated, freed)),
            "{allocated} {freed}: {seen:?}"
        );
    };
    for (size, wrong) in [(60, 64), (64, 60), (1, 8), (8000, 8001)] {
        let a = system.kmalloc_layout(layout(size), Flags::empty()).unwrap();
        // SAFETY: the misuse under test: another size of the same class.
        unsafe { system.kfree_layout(a, layout(wrong)) };
        is_wrong(size, wrong);
        // SAFETY: the object is still in use, and grows into what was the wrong size; it may move.
        let a = unsafe { system.realloc(a.as_ptr(), layout(size), wrong) };
        let a = NonNull::new(a).unwrap();
        // SAFETY: the misuse under test, and then a live allocation.
        unsafe {
            system.kfree_layout(a, layout(size));
            is_wrong(wrong, size);
            system.kfree_layout(a, layout(wrong));
        }
        assert_eq!(world.seen(), []);
    }
    let a = system.kmalloc(60, Flags::empty()).unwrap();
    // SAFETY: a live allocation, which may move; freed by the pointer alone, and the second time by mistake.
    unsafe {
        let a = system.krealloc(a.as_ptr(), 61, Flags::empty()).unwrap();
        system.kfree_layout(a, layout(60));
        is_wrong(61, 60);
        // A size that the caller has wrong moves nothing out of its class.
        let b = system.realloc(a.as_ptr(), layout(60), 62);
        is_wrong(61, 60);
        system.kfree(b);
        system.kfree(a.as_ptr());
        system.kfree(a.as_ptr());
    }
    assert!(matches!(world.seen()[..], [Misuse::DoubleFree { .. }]));
    world.end();
}

/// After a resize, in place or not, the memory can be freed by the new size.
fn resized<H: Policy>() {
    let world: World<H> = World::new();
    let system = &world.system;
    let align_of = |size: usize| match size.is_power_of_two() {
        true => size.max(8),
        false => 8,
    };
    for old in 1..200_usize {
        for new in [16, 32, 64, 128, old, old + 1, old + 8, old + 16] {
            // Places of every alignment that the class has.
            let held = [(); 4].map(|()| world.take(old));
            for object in held {
                // SAFETY: a live allocation, not used afterwards.
                let moved = unsafe { system.krealloc(object.as_ptr(), new, Flags::empty()) };
                let (moved, align) = (moved.unwrap(), align_of(new));
                assert!(moved.as_ptr().addr().is_multiple_of(align), "{old} {new}");
                let layout = Layout::from_size_align(new, align).unwrap();
                // SAFETY: a live allocation of this layout.
                unsafe { system.kfree_layout(moved, layout) };
                assert_eq!(world.seen(), [], "{old} to {new}");
            }
        }
    }
    world.end();
}

#[test]
fn what_was_resized_is_freed_by_its_new_size() {
    resized::<Plain>();
    resized::<Check>();
    resized::<Redzone>();
    resized::<Poison>();
    resized::<Owner>();
    resized::<Guard<10>>();
    resized::<(Check, Guard<3>)>();
    resized::<(Check, Redzone, Poison, Quarantine<32>, Shuffle, Owner)>();
}

#[test]
fn every_policy_that_checks_finds_the_wrong_size_in_the_same_class() {
    sizes::<Check>();
    sizes::<Redzone>();
    sizes::<Poison>();
    sizes::<Owner>();
    sizes::<(Check, Redzone, Poison, Quarantine<32>, Shuffle, Owner)>();
}

/// Objects of one class with different alignments, over each other's places.
fn alignments<H: Policy>() {
    let world: World<H> = World::new();
    for round in 0..4 {
        let mut held = Vec::new();
        for n in 0..200 {
            let align = 8 << ((n + round) % 4);
            // With what is in front of it and behind it, 192 bytes, or a little less.
            let size = 192 - H::FEATURES.extra(align) - n % 3;
            let layout = Layout::from_size_align(size, align).unwrap();
            let object = world.system.kmalloc_layout(layout, Flags::empty()).unwrap();
            assert!(object.as_ptr().addr().is_multiple_of(align));
            // SAFETY: a live allocation.
            unsafe { object.write_bytes(0xff, size) };
            held.push((object, layout));
        }
        for (n, (object, layout)) in held.into_iter().enumerate() {
            // SAFETY: live allocations; the second free is the misuse under test.
            unsafe {
                if n % 2 == 0 {
                    world.system.kfree_layout(object, layout);
                } else {
                    world.system.kfree(object.as_ptr());
                }
                assert_eq!(world.seen(), [], "{layout:?}");
                world.system.kfree(object.as_ptr());
            }
            let seen = world.seen();
            assert!(matches!(seen[..], [Misuse::DoubleFree { .. }]), "{seen:?}");
        }
    }
    world.end();
}

#[test]
fn objects_of_all_alignments_share_a_class_under_every_policy() {
    alignments::<Check>();
    alignments::<Redzone>();
    alignments::<Poison>();
    alignments::<(Poison, Quarantine<16>, Shuffle)>();
    alignments::<(Check, Redzone, Poison, Quarantine<32>, Shuffle, Owner)>();
}

#[test]
fn memory_for_hardened_slabs_may_run_out_anywhere() {
    for fail in 0..40 {
        let mut world: World<(Check, Owner)> = World::new();
        world
            .arena
            .fail_at
            .store(fail, std::sync::atomic::Ordering::Relaxed);
        let objects: Vec<_> = (0..200)
            .filter_map(|n| world.system.kmalloc(40 + n, Flags::empty()).ok())
            .collect();
        world
            .arena
            .fail_at
            .store(u64::MAX, std::sync::atomic::Ordering::Relaxed);
        assert!(objects.len() >= 199, "one refusal costs at most one object");
        for object in objects {
            // SAFETY: live allocations.
            unsafe { world.system.kfree(object.as_ptr()) };
        }
        world.system.teardown().unwrap();
        assert_eq!(world.arena.used(), 0);
        world.arena.check_slots();
    }
}
