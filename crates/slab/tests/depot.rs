//! What a depot keeps of whole arrays, and which slabs it takes objects from.
#![cfg(not(any(loom, shuttle)))]

mod common;

use std::collections::BTreeMap;
use std::ptr::NonNull;

use common::{System, run_as, system};
use kmem_hal::{NodeId, NodePolicy};
use kmem_slab::{CacheInfo, Flags};

fn take(system: &System, count: usize) -> Vec<NonNull<u8>> {
    (0..count)
        .map(|_| system.kmalloc(64, Flags::empty()).unwrap())
        .collect()
}

fn give(system: &System, objects: impl IntoIterator<Item = NonNull<u8>>) {
    for object in objects {
        // SAFETY: allocated by the test, given once.
        unsafe { system.kfree(object.as_ptr()) };
    }
}

fn info(system: &System) -> CacheInfo {
    let mut found = None;
    let look = |cache: &CacheInfo| {
        if cache.name == "kmalloc-64" {
            found = Some(*cache);
        }
    };
    system.caches(look).unwrap();
    found.unwrap()
}

/// The fullest slab serves first, so that emptier ones drain and go back.
#[test]
fn objects_come_from_the_fullest_slab() {
    run_as(0);
    let (_, system) = system(1024, 1);
    let per_slab = info(&system).objects_per_slab;
    let objects = take(&system, 8 * per_slab);
    assert_eq!(info(&system).slabs, 8);
    let slab_bytes = info(&system).frames_per_slab as usize * 4096;
    let mut slabs: BTreeMap<usize, Vec<NonNull<u8>>> = BTreeMap::new();
    for object in objects {
        let slab = object.as_ptr().addr() / slab_bytes;
        slabs.entry(slab).or_default().push(object);
    }
    let mut whole: Vec<_> = slabs.into_values().collect();
    // One object of the first slab, all but one of the second, half of the third.
    let free: Vec<_> = [(0, 1), (1, per_slab - 1), (2, per_slab / 2)]
        .into_iter()
        .flat_map(|(slab, count)| whole[slab].drain(..count).collect::<Vec<_>>())
        .collect();
    give(&system, free.iter().copied());
    system.shrink();
    let here = NodePolicy::Preferred(NodeId::new(0));
    let again = || system.kmalloc_node(64, Flags::empty(), here).unwrap();
    let first = again();
    let mut got: Vec<_> = (0..per_slab / 2).map(|_| again()).collect();
    assert_eq!(first, free[0]);
    got.sort();
    let mut half = free[per_slab..].to_vec();
    half.sort();
    assert_eq!(got, half);
    give(&system, got.into_iter().chain([first]));
    give(&system, whole.into_iter().flatten());
    assert_eq!(info(&system).active_objects, 0);
}

/// A depot that kept much for a stream keeps an array's worth after a drain.
#[test]
fn a_drain_ends_what_a_depot_keeps_for_a_stream() {
    run_as(0);
    let (_, system) = system(2048, 1);
    let array = info(&system).array;
    let few = take(&system, 8 * array);
    for _ in 0..10 {
        let many = take(&system, 10_000);
        give(&system, many);
    }
    let streamed = info(&system);
    assert!(streamed.in_depot > 8 * array as u64, "{streamed:?}");
    system.shrink();
    give(&system, few);
    let after = info(&system);
    assert!(after.in_depot <= 5 * array as u64, "{after:?}");
}

/// Objects that a named node's depot gives out of its arrays make room there for others.
#[test]
fn what_leaves_a_depot_makes_room_in_it() {
    run_as(0);
    let (_, system) = system(1024, 1);
    let figures = info(&system);
    let (array, slab) = (figures.array, figures.objects_per_slab);
    let mut objects = take(&system, 8 * slab);
    // What was kept for a stream ends.
    give(&system, objects.pop());
    system.shrink();
    objects.extend(take(&system, 1));
    assert_eq!(info(&system).in_slabs, 0);
    // Two arrays stay at the CPU, the third goes to the depot.
    while info(&system).in_depot == 0 {
        give(&system, objects.pop());
    }
    let before = info(&system);
    assert!(before.in_depot >= array as u64 && before.in_slabs == 0);
    let here = NodePolicy::Preferred(NodeId::new(0));
    for _ in 0..before.in_depot {
        objects.push(system.kmalloc_node(64, Flags::empty(), here).unwrap());
    }
    assert_eq!(info(&system).in_depot, 0);
    while info(&system).in_depot == 0 && info(&system).in_slabs == 0 {
        give(&system, objects.pop());
    }
    assert_eq!(info(&system).flushes, before.flushes);
    give(&system, objects);
}

/// Whatever the page source gave is counted: slabs, whole pages, and the allocator's own.
#[test]
fn every_frame_is_counted() {
    run_as(0);
    let (arena, system) = system(4096, 2);
    let mut held = Vec::new();
    for size in [8, 16, 64, 100, 700, 3000, 8192, 20_000, 100_000] {
        for _ in 0..200_000_usize.div_ceil(size).min(1500) {
            held.push(system.kmalloc(size, Flags::empty()).unwrap());
        }
        let totals = system.totals();
        let counted = totals.slab_frames + totals.page_frames + totals.overhead_frames;
        assert_eq!(counted, arena.used() as u64, "{size}");
    }
    give(&system, held);
}
