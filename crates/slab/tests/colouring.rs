//! Colours of slabs: that slabs begin at different ones, and what that does for a cache of sets, ways and tags.
#![cfg(not(any(loom, shuttle)))]

mod common;

use std::collections::HashSet;
use std::ptr::NonNull;

use common::TestParts;
use kmem_hal::ObjectAlloc;
use kmem_slab::{Cache, Geometry};
use kmem_testkit::twins::LineCache;

/// 3520 bytes: seven pages hold eight of them and 512 bytes more.
type Task = [u64; 440];

const GEOMETRY: Geometry = match Geometry::new(size_of::<Task>(), 8) {
    Some(geometry) => geometry,
    None => panic!("a size that slabs serve"),
};

fn tasks(count: usize, each: impl FnOnce(&[NonNull<Task>])) {
    let (arena, system) = common::system(4096, 1);
    {
        let cache: Cache<'_, Task, TestParts> = Cache::new(&system, "task");
        let tasks: Vec<_> = (0..count)
            .map(|_| ObjectAlloc::alloc(&cache).unwrap())
            .collect();
        each(&tasks);
        // SAFETY: from this cache, freed once.
        unsafe { cache.free_bulk(&tasks) };
        cache.destroy().unwrap();
    }
    let mut system = system;
    system.teardown().unwrap();
    assert_eq!(arena.used(), 0);
    arena.check_slots();
}

/// Hits of every hundred when the first lines of all objects are read again and again.
fn hits(addresses: &[u64]) -> u64 {
    let mut l1 = LineCache::new(32 << 10, 8, 64);
    const ROUNDS: u64 = 50;
    for _ in 0..ROUNDS {
        for &address in addresses {
            l1.touch(address);
        }
    }
    l1.hits() * 100 / (ROUNDS * addresses.len() as u64)
}

#[test]
fn slabs_begin_at_all_colours_in_turn() {
    assert_eq!(
        (GEOMETRY.pages(), GEOMETRY.objects(), GEOMETRY.colours(7)),
        (7, 8, 9)
    );
    tasks(400, |tasks| {
        let starts: HashSet<usize> = tasks
            .iter()
            .map(|task| task.as_ptr().addr() % 4096 / 64)
            .collect();
        // Eight objects a slab, nine colours, 64 lines a page.
        assert!(starts.len() > 40, "{} different lines", starts.len());
    });
}

/// 200 live objects whose first line is used all the time, as the state of a task is, need 200 of the 512 lines of a cache of
/// 32 KiB. Without colours they have eight places in a page, so that they fight for 64 lines.
#[test]
fn colours_keep_hot_lines_of_many_objects_in_the_cache() {
    tasks(200, |tasks| {
        let coloured: Vec<u64> = tasks
            .iter()
            .map(|task| task.as_ptr().addr() as u64)
            .collect();
        let per_slab = GEOMETRY.objects();
        let plain: Vec<u64> = (0..tasks.len())
            .map(|number| {
                let slab = (number / per_slab) as u64 * GEOMETRY.pages() * 4096;
                slab + (number % per_slab * GEOMETRY.size()) as u64
            })
            .collect();
        let (with, without) = (hits(&coloured), hits(&plain));
        assert!(with >= 90, "{with} of 100 hits with colours");
        assert!(without <= 10, "{without} of 100 hits without");
    });
}
