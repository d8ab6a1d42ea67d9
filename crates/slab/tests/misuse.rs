//! Double frees and foreign frees are found and do no harm.

mod common;

use std::alloc::Layout;
use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::sync::atomic::Ordering;

use common::hardened::World;
use common::{quietly, run_as, system};
use kmem_slab::{Check, Flags, Misuse, Plain, Poison, Policy, Quarantine, Redzone};

fn misuses(system: &common::System) -> u64 {
    let mut sum = 0;
    system.caches(|cache| sum += cache.misuses).unwrap();
    sum + system.totals().foreign_frees
}

#[test]
fn a_double_free_is_found_at_the_flush_and_never_handed_out_twice() {
    let (_, system) = system(1024, 1);
    let a = system.kmalloc(64, Flags::empty()).unwrap();
    let b = system.kmalloc(64, Flags::empty()).unwrap();
    // SAFETY: the second free is the misuse under test.
    unsafe {
        system.kfree(a.as_ptr());
        system.kfree(b.as_ptr());
        system.kfree(a.as_ptr());
    }
    assert_eq!(misuses(&system), 0, "not seen yet: late");
    system.shrink();
    assert_eq!(misuses(&system), 1);
    let all: Vec<NonNull<u8>> = (0..1000)
        .map(|_| system.kmalloc(64, Flags::empty()).unwrap())
        .collect();
    let distinct: HashSet<_> = all.iter().collect();
    assert_eq!(distinct.len(), all.len());
}

#[test]
fn a_double_free_across_two_flushes_is_found() {
    let (_, system) = system(1024, 1);
    let keep = system.kmalloc(64, Flags::empty()).unwrap();
    let a = system.kmalloc(64, Flags::empty()).unwrap();
    // SAFETY: the second free is the misuse under test; `keep` keeps the slab alive.
    unsafe {
        system.kfree(a.as_ptr());
        system.shrink();
        system.kfree(a.as_ptr());
        system.shrink();
        assert_eq!(misuses(&system), 1);
        system.kfree(keep.as_ptr());
    }
}

#[test]
fn what_is_found_late_is_told_with_its_address() {
    let world = World::<Plain>::new();
    let layout = Layout::from_size_align(64, 64).unwrap();
    let take = || world.system.kmalloc(64, Flags::empty()).unwrap();
    let all: Vec<NonNull<u8>> = (0..300).map(|_| take()).collect();
    // Of several words of several slabs, with a neighbour in between, and at once.
    let twice = [0, 1, 70, 71, 130, 255, 299];
    for at in twice.into_iter().flat_map(|at| [at, at ^ 2, at]) {
        // SAFETY: live allocations of this layout; the second free is the misuse under test.
        unsafe { world.system.kfree_layout(all[at], layout) };
    }
    world.system.shrink();
    let mut told: Vec<usize> = world
        .seen()
        .iter()
        .map(|misuse| match misuse {
            Misuse::DoubleFree { address, .. } => *address,
            other => panic!("{other}"),
        })
        .collect();
    let mut wanted: Vec<usize> = twice.map(|at| all[at].addr().get()).to_vec();
    told.sort_unstable();
    wanted.sort_unstable();
    assert_eq!(told, wanted);
}

#[test]
fn an_address_inside_an_object_is_found() {
    let (_, system) = system(1024, 1);
    let a = system.kmalloc(64, Flags::empty()).unwrap();
    // SAFETY: the misuse under test; the pointer stays inside the object.
    unsafe { system.kfree(a.as_ptr().add(8)) };
    system.shrink();
    assert_eq!(misuses(&system), 1);
    // SAFETY: allocated above, and still in use as far as the system knows.
    unsafe { system.kfree(a.as_ptr()) };
    system.shrink();
    assert_eq!(misuses(&system), 1);
}

#[test]
fn a_layout_of_another_class_is_found() {
    let (_, system) = system(1024, 1);
    let a = system.kmalloc(64, Flags::empty()).unwrap();
    // SAFETY: the misuse under test: the layout is not that of the allocation.
    unsafe { system.kfree_layout(a, Layout::from_size_align(200, 8).unwrap()) };
    system.shrink();
    assert_eq!(misuses(&system), 1);
}

#[test]
fn strangers_are_refused() {
    let (_, one) = system(1024, 1);
    let (_, other) = system(1024, 1);
    let mut local = 5u64;
    let theirs = other.kmalloc(64, Flags::empty()).unwrap();
    // SAFETY: the misuses under test.
    unsafe {
        assert_eq!(one.ksize(NonNull::from(&mut local).cast()), None);
        one.kfree((&raw mut local).cast());
        assert_eq!(misuses(&one), 1);
        one.kfree(theirs.as_ptr());
        assert_eq!(misuses(&one), 2);
        one.kfree(std::ptr::null_mut());
    }
    assert_eq!(misuses(&one), 2);
}

/// With a layout, that is found where the object would reach a slab: counted there and in all.
#[test]
fn a_stranger_with_a_layout_is_counted_at_the_flush() {
    let (_, one) = system(1024, 1);
    let (_, other) = system(1024, 1);
    let layout = Layout::new::<[u64; 8]>();
    let own = one.kmalloc_layout(layout, Flags::empty()).unwrap();
    let theirs = other.kmalloc_layout(layout, Flags::empty()).unwrap();
    let mut local = [5u64; 8];
    // SAFETY: the misuses under test.
    unsafe {
        one.kfree_layout(theirs, layout);
        one.kfree_layout(NonNull::from(&mut local).cast(), layout);
        one.kfree_layout(own, layout);
    }
    one.shrink();
    assert_eq!(one.totals().foreign_frees, 2);
    assert_eq!(misuses(&one), 2 + 2);
}

#[test]
fn pages_freed_twice_are_strangers() {
    let (_, system) = system(1024, 1);
    let pages = system.kmalloc(20_000, Flags::empty()).unwrap();
    // SAFETY: the second free is the misuse under test.
    unsafe {
        system.kfree(pages.as_ptr());
        system.kfree(pages.as_ptr());
    }
    assert_eq!(misuses(&system), 1);
}

/// Objects come and go on two CPUs; number `at` is freed twice, the second time `later`, and each report panics. The caller of
/// whatever call it came from goes on. How many reports there were.
fn goes_on_after_panics<H: Policy>(nodes: u16, size: usize, at: usize, later: usize) -> usize {
    let world: World<H> = World::with_nodes(nodes);
    let layout = Layout::from_size_align(size, 8).unwrap();
    let take = || world.system.kmalloc_layout(layout, Flags::empty()).unwrap();
    let mut of_first: Vec<_> = (0..30).map(|_| take()).collect();
    run_as(1);
    let mut of_second: Vec<_> = (0..80).map(|_| take()).collect();
    // Number 0, 4, 8 .. are the other CPU's.
    let next = |at: usize| {
        if at.is_multiple_of(4) {
            of_first.pop()
        } else {
            of_second.pop()
        }
    };
    let mut frees: Vec<_> = (0..100).filter_map(next).collect();
    frees.insert(at + later, frees[at]);

    world.panics.store(true, Ordering::Relaxed);
    quietly(|| {
        for object in frees {
            // SAFETY: live allocations of this layout; the second free of the first is the misuse under test.
            let free = || unsafe { world.system.kfree_layout(object, layout) };
            let _ = catch_unwind(AssertUnwindSafe(free));
            // What is called next meets what the panic left behind.
            // SAFETY: a live allocation.
            let pair = || unsafe { world.system.kfree_layout(take(), layout) };
            let _ = catch_unwind(AssertUnwindSafe(pair));
        }
        let _ = catch_unwind(AssertUnwindSafe(|| world.system.shrink()));
        run_as(0);
        let _ = catch_unwind(AssertUnwindSafe(|| world.system.shrink()));
    });
    world.panics.store(false, Ordering::Relaxed);

    let mut owned: HashSet<_> = of_first.into_iter().chain(of_second).collect();
    for cpu in 0..2 {
        run_as(cpu);
        for _ in 0..100 {
            assert!(owned.insert(take()), "an object has two owners");
        }
    }
    for &object in &owned {
        // SAFETY: live allocations.
        unsafe { world.system.kfree(object.as_ptr()) };
    }
    for cpu in 0..2 {
        run_as(cpu);
        world.system.shrink();
    }
    let check = |info: &kmem_slab::CacheInfo| {
        // A CPU's two arrays that were on their way to the slabs may be lost, and the object whose free was not finished.
        assert!(info.active_objects <= 8 + 8 + 1, "{info:?}");
    };
    world.system.caches(check).unwrap();
    run_as(0);
    world.seen().len()
}

/// Of [`goes_on_after_panics`], for second frees that are found in either array of a CPU, in the depot and at a drain.
fn go_on_after_panics<H: Policy>() {
    for (nodes, at, later) in [(1, 1), (2, 1), (1, 20), (2, 20)]
        .into_iter()
        .flat_map(|(nodes, later)| (0..80).step_by(8).map(move |at| (nodes, at, later)))
    {
        let reports = goes_on_after_panics::<H>(nodes, 8000, at, later);
        assert_eq!(reports, 1, "{nodes} nodes, {at}, {later} later");
    }
}

#[test]
#[cfg_attr(
    kmem_asan,
    ignore = "frees memory on purpose that its slab has given back"
)]
fn a_report_that_panics_gives_no_object_two_owners() {
    go_on_after_panics::<Plain>();
}

#[test]
#[cfg_attr(
    kmem_asan,
    ignore = "frees memory on purpose that its slab has given back"
)]
fn a_report_that_panics_gives_no_object_two_owners_with_policies() {
    go_on_after_panics::<Check>();
    go_on_after_panics::<(Redzone, Poison)>();
    go_on_after_panics::<Quarantine<16>>();
}
