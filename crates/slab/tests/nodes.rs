//! Machines with several memory nodes: memory stays near, comes home, and is borrowed where a node is short.

mod common;

use std::collections::HashSet;
use std::ptr::NonNull;

use common::{Arena, System, parts, run_as};
use kmem_hal::{AllocError, FrameRequest, FrameSink, FrameSource, NodeId, NodePolicy, OwnedFrame};
use kmem_slab::{Cache, CacheInfo, Flags, SlabSystem};

fn start(frames: usize, nodes: u16, cpus: u32) -> (&'static Arena, System) {
    let arena = Arena::with_nodes(frames, nodes);
    let system = SlabSystem::new();
    run_as(0);
    system.init(parts(arena, cpus)).unwrap();
    (arena, system)
}

fn take(system: &System, count: usize, size: usize) -> Vec<NonNull<u8>> {
    (0..count)
        .map(|_| system.kmalloc(size, Flags::empty()).unwrap())
        .collect()
}

fn give(system: &System, objects: impl IntoIterator<Item = NonNull<u8>>) {
    for object in objects {
        // SAFETY: allocated by the test, given once.
        unsafe { system.kfree(object.as_ptr()) };
    }
}

fn info(system: &System, name: &str) -> CacheInfo {
    let mut found = None;
    system
        .caches(|cache| {
            if cache.name == name {
                found = Some(*cache);
            }
        })
        .unwrap();
    found.unwrap()
}

fn end(arena: &Arena, mut system: System) {
    system
        .caches(|info| {
            assert_eq!(info.misuses, 0, "{info:?}");
            assert_eq!(info.allocs - info.frees, info.active_objects, "{info:?}");
        })
        .unwrap();
    system.teardown().unwrap();
    assert_eq!(arena.used(), 0);
    arena.check_slots();
}

/// How many of the objects lie in the memory of the node.
fn of_node(arena: &Arena, objects: &[NonNull<u8>], node: u16) -> usize {
    let here = |object: &&NonNull<u8>| arena.node_of(**object) == node;
    objects.iter().filter(here).count()
}

/// The most objects that a CPU holds in its two arrays.
const IN_ARRAYS: usize = 2 * 502;

#[test]
fn memory_is_that_of_the_cpus_node() {
    for nodes in 1..=4 {
        let (arena, system) = start(8192, nodes, 8);
        let mut held = Vec::new();
        for cpu in 0..8 {
            run_as(cpu);
            for size in [16, 64, 700, 3000] {
                let objects = take(&system, 300, size);
                assert_eq!(of_node(arena, &objects, cpu as u16 % nodes), 300);
                held.push((cpu, objects));
            }
        }
        for (cpu, objects) in held {
            run_as(cpu);
            give(&system, objects);
        }
        end(arena, system);
    }
}

#[test]
fn what_is_freed_far_away_goes_home_and_is_used_there() {
    const COUNT: usize = 5000;
    let (arena, system) = start(8192, 2, 2);
    let objects = take(&system, COUNT, 64);
    let used = arena.used_on(0);
    run_as(1);
    give(&system, objects);
    // At most what lies in the arrays of the CPU that freed them is given again there.
    let far = take(&system, COUNT, 64);
    assert!(of_node(arena, &far, 0) <= IN_ARRAYS);
    // The others are where they came from.
    run_as(0);
    let near = take(&system, COUNT - IN_ARRAYS, 64);
    assert_eq!(of_node(arena, &near, 0), near.len());
    assert!(arena.used_on(0) <= used + 4, "no new slabs");
    give(&system, near);
    run_as(1);
    give(&system, far);
    end(arena, system);
}

#[test]
fn a_stream_from_node_to_node_needs_no_more_memory_with_time() {
    let (arena, system) = start(8192, 3, 3);
    let mut after = Vec::new();
    for round in 0..200 {
        run_as(0);
        let objects = take(&system, 1000, 64);
        assert!(of_node(arena, &objects, 0) == 1000, "round {round}");
        run_as(2);
        give(&system, objects);
        after.push(arena.used());
    }
    assert!(after[199] <= after[20] + 16, "{after:?}");
    // Whole arrays travel: slabs are not asked for each object.
    let moved = info(&system, "kmalloc-64");
    assert!(moved.exchanges >= 400 && moved.flushes <= 100, "{moved:?}");
    end(arena, system);
}

#[test]
fn objects_of_all_nodes_freed_in_turn_are_sorted_out() {
    let (arena, system) = start(8192, 4, 4);
    for size in [64, 700] {
        let mut mixed: Vec<Vec<NonNull<u8>>> = Vec::new();
        for cpu in 0..4 {
            run_as(cpu);
            mixed.push(take(&system, 2000, size));
        }
        run_as(3);
        for at in 0..2000 {
            give(&system, mixed.iter().map(|of_node| of_node[at]));
        }
        // What CPUs hold in their own arrays may be anybody's.
        for cpu in 0..4 {
            run_as(cpu);
            system.drain_local();
        }
        let mut held = Vec::new();
        for cpu in 0..4 {
            run_as(cpu);
            let objects = take(&system, 1500, size);
            assert_eq!(
                of_node(arena, &objects, cpu as u16),
                1500,
                "size {size} CPU {cpu}"
            );
            held.push((cpu, objects));
        }
        for (cpu, objects) in held {
            run_as(cpu);
            give(&system, objects);
        }
    }
    end(arena, system);
}

/// Takes every frame of a node, single frames last.
fn exhaust(arena: &'static Arena, node: u16) -> Vec<OwnedFrame> {
    let request = FrameRequest::ONE.node(NodePolicy::Strict(NodeId::new(node)));
    std::iter::from_fn(|| FrameSource::alloc(arena, &request).ok()).collect()
}

/// Objects on CPU `cpu`, of which every second is freed to its slab again; the others.
fn every_second(system: &System, cpu: u32, count: usize) -> Vec<NonNull<u8>> {
    run_as(cpu);
    let mut objects = take(system, count, 64);
    objects.sort();
    let (kept, freed): (Vec<_>, Vec<_>) = objects
        .into_iter()
        .enumerate()
        .partition(|(at, _)| at % 2 == 0);
    give(system, freed.into_iter().map(|(_, object)| object));
    system.shrink();
    kept.into_iter().map(|(_, object)| object).collect()
}

#[test]
fn a_node_without_memory_borrows_from_the_nearest_and_comes_back() {
    let (arena, system) = start(6144, 3, 3);
    let mut held = every_second(&system, 2, 4000);
    held.extend(every_second(&system, 1, 40_000));
    run_as(0);
    system.shrink();
    let frames = exhaust(arena, 0);
    let before = arena.used();
    let borrowed = take(&system, 2000, 64);
    assert_eq!(of_node(arena, &borrowed, 1), 2000, "the nearest first");
    assert!(arena.used() <= before + 24, "{} {before}", arena.used());
    for frame in frames {
        FrameSink::free(arena, frame);
    }
    // Memory of the node is there again: soon it is used, though the other has free objects still.
    let objects = take(&system, 12_000, 64);
    assert_eq!(of_node(arena, &objects[10_000..], 0), 2000);
    held.extend(objects.into_iter().chain(borrowed));
    give(&system, held);
    end(arena, system);
}

#[test]
fn what_a_node_borrows_is_used_up_before_more_is_asked_for() {
    let (arena, system) = start(3072, 3, 3);
    let frames = exhaust(arena, 0);
    let before = arena.used_on(2);
    // Each time the CPU's array is empty, and what is left of a slab is on the other node.
    let mut objects = Vec::new();
    for _ in 0..100 {
        objects.extend(take(&system, 1, 16));
        system.drain_local();
    }
    assert_eq!(of_node(arena, &objects, 1), 100);
    // The page source is asked again now and then.
    let slabs = info(&system, "kmalloc-16").slabs;
    assert!(slabs <= 100 / 16 + 2, "{slabs} slabs for 100 objects");
    assert_eq!(arena.used_on(2), before);
    for frame in frames {
        FrameSink::free(arena, frame);
    }
    give(&system, objects);
    end(arena, system);
}

#[test]
fn where_all_memory_is_out_any_nodes_objects_serve() {
    let (arena, system) = start(3072, 3, 3);
    let kept = every_second(&system, 2, 1280);
    run_as(0);
    let keep = take(&system, 1, 64);
    let frames: Vec<_> = (0..3).flat_map(|node| exhaust(arena, node)).collect();
    let mut got = Vec::new();
    while let Ok(object) = system.kmalloc(64, Flags::NO_WARN) {
        got.push(object);
    }
    assert!(of_node(arena, &got, 2) >= 600, "{}", got.len());
    for objects in [got, keep, kept] {
        give(&system, objects);
    }
    for frame in frames {
        FrameSink::free(arena, frame);
    }
    end(arena, system);
}

#[test]
fn a_node_that_is_named_does_not_fill_this_cpus_arrays() {
    let (arena, system) = start(3072, 3, 3);
    let mut held = Vec::new();
    loop {
        held.extend(take(&system, 1, 64));
        if info(&system, "kmalloc-64").in_arrays == 0 {
            break;
        }
    }
    let far = NodePolicy::Strict(NodeId::new(2));
    held.push(system.kmalloc_node(64, Flags::empty(), far).unwrap());
    let near = take(&system, 10, 64);
    assert_eq!(of_node(arena, &near, 0), 10);
    held.extend(near);
    give(&system, held);
    end(arena, system);
}

#[test]
fn a_node_that_is_named_serves_small_and_large_sizes() {
    let (arena, system) = start(4096, 3, 3);
    let mut held = Vec::new();
    for node in [2, 0, 1, 2] {
        for size in [1, 100, 5000, 30_000] {
            for policy in [NodePolicy::Strict, NodePolicy::Preferred] {
                let policy = policy(NodeId::new(node));
                let memory = system.kmalloc_node(size, Flags::ZERO, policy).unwrap();
                assert_eq!(arena.node_of(memory), node, "{policy:?} {size}");
                // SAFETY: allocated above.
                let usable = unsafe { system.ksize(memory) }.unwrap();
                assert!(usable < size + size / 2 + 16 || size > 8192);
                held.push(memory);
            }
        }
    }
    let all: HashSet<_> = (0..6)
        .map(|_| {
            let memory = system
                .kmalloc_node(64, Flags::empty(), NodePolicy::Interleave)
                .unwrap();
            held.push(memory);
            arena.node_of(memory)
        })
        .collect();
    assert_eq!(all.len(), 3);
    // This CPU's own array stayed its node's.
    let near = take(&system, 100, 64);
    assert_eq!(of_node(arena, &near, 0), 100);
    held.extend(near);
    let frames = exhaust(arena, 1);
    let one = NodeId::new(1);
    let mut strict = 0;
    let refused = loop {
        match system.kmalloc_node(4096, Flags::NO_WARN, NodePolicy::Strict(one)) {
            Ok(memory) => held.push(memory),
            Err(error) => break error,
        }
        strict += 1;
        assert!(strict < 64);
    };
    assert_eq!(refused, AllocError::OutOfMemory);
    let other = system
        .kmalloc_node(4096, Flags::NO_WARN, NodePolicy::Preferred(one))
        .unwrap();
    assert_ne!(arena.node_of(other), 1);
    let nowhere = NodePolicy::Strict(NodeId::new(7));
    assert!(system.kmalloc_node(64, Flags::NO_WARN, nowhere).is_err());
    held.push(other);
    for frame in frames {
        FrameSink::free(arena, frame);
    }
    give(&system, held);
    end(arena, system);
}

/// Objects of 32 bytes, one call each; the slabs that they lie in.
fn named(system: &System, count: usize, policy: NodePolicy) -> (Vec<NonNull<u8>>, u64) {
    let before = info(system, "kmalloc-32").slabs;
    let objects = (0..count)
        .map(|_| system.kmalloc_node(32, Flags::empty(), policy).unwrap())
        .collect();
    (objects, info(system, "kmalloc-32").slabs - before)
}

#[test]
fn a_preferred_node_that_is_short_does_not_take_a_slab_for_each_object() {
    let one = NodePolicy::Preferred(NodeId::new(1));
    for nodes in [1, 2, 3] {
        for policy in [one, NodePolicy::Interleave] {
            let (arena, system) = start(9216, nodes, 1);
            let frames = if nodes > 1 {
                exhaust(arena, 1)
            } else {
                Vec::new()
            };
            let (objects, slabs) = named(&system, 1000, policy);
            // The page source is asked again now and then: for no more slabs than the objects fill, and one for each node.
            let filled = 1000 / info(&system, "kmalloc-32").objects_per_slab as u64 + 1;
            assert!(
                slabs <= filled + u64::from(nodes),
                "{nodes} nodes, {policy:?}: {slabs} for {filled}"
            );
            for frame in frames {
                FrameSink::free(arena, frame);
            }
            give(&system, objects);
            // The node has memory again, and is soon used.
            if nodes > 1 {
                let (objects, _) = named(&system, 8000, one);
                assert_eq!(of_node(arena, &objects[7000..], 1), 1000);
                give(&system, objects);
            }
            end(arena, system);
        }
    }
}

#[test]
fn a_node_that_nobody_knows_may_be_preferred() {
    for nodes in [1, 2, 3] {
        let (arena, system) = start(6144, nodes, nodes.into());
        run_as(u32::from(nodes) - 1);
        let (objects, slabs) = named(&system, 1000, NodePolicy::Preferred(NodeId::new(7)));
        assert!(slabs <= 1000 / 64 + 2, "{nodes} nodes: {slabs}");
        assert_eq!(of_node(arena, &objects, nodes - 1), 1000, "near the caller");
        give(&system, objects);
        end(arena, system);
    }
}

#[test]
fn a_cpu_without_arrays_borrows_from_another_nodes_arrays() {
    const CPUS: u32 = 32;
    let (arena, system) = start(2048, 2, CPUS);
    let mut held = Vec::new();
    for cpu in (0..CPUS).step_by(2) {
        // A head, but no arrays of the class.
        run_as(cpu);
        held.extend(take(&system, 1, 8192));
    }
    run_as(1);
    let mut objects = take(&system, 2000, 64);
    let more = take(&system, 600, 64);
    give(&system, more);
    system.shrink();
    let frames: Vec<_> = (0..2).flat_map(|node| exhaust(arena, node)).collect();
    while let Ok(object) = system.kmalloc(64, Flags::NO_WARN) {
        objects.push(object);
    }
    for cpu in (2..CPUS).step_by(2) {
        // Takes what there is of arrays, for nothing.
        run_as(cpu);
        assert!(system.kmalloc(64, Flags::NO_WARN).is_err());
    }
    run_as(1);
    // Answers the drains that were asked for; then all is out again.
    give(&system, objects.pop());
    let figures = info(&system, "kmalloc-64");
    let free = figures.total_objects - figures.active_objects;
    objects.extend(take(&system, free as usize, 64));
    while info(&system, "kmalloc-64").in_depot == 0 {
        let object = objects.pop().expect("an array becomes full");
        give(&system, [object]);
    }
    // Nothing but the arrays has an object.
    let one = NodePolicy::Strict(NodeId::new(1));
    for _ in 0..info(&system, "kmalloc-64").in_slabs {
        objects.push(system.kmalloc_node(64, Flags::NO_WARN, one).unwrap());
    }
    let figures = info(&system, "kmalloc-64");
    assert_eq!(figures.in_slabs, 0, "{figures:?}");
    assert!(figures.in_depot > 0, "{figures:?}");
    run_as(0);
    let object = system.kmalloc(64, Flags::NO_WARN).unwrap();
    assert_eq!(arena.node_of(object), 1);
    assert_eq!(info(&system, "kmalloc-64").in_depot, figures.in_depot - 1);
    objects.push(object);
    for frame in frames {
        FrameSink::free(arena, frame);
    }
    give(&system, objects.into_iter().chain(held));
    end(arena, system);
}

#[test]
fn views_are_sums_over_the_nodes() {
    let (arena, system) = start(4096, 4, 4);
    let mut held = Vec::new();
    for cpu in 0..4 {
        run_as(cpu);
        held.extend(take(&system, 250, 64));
    }
    let figures = info(&system, "kmalloc-64");
    assert_eq!(figures.active_objects, 1000);
    assert!(figures.slabs >= 4 && figures.total_objects >= 1000);
    assert_eq!(
        figures.total_objects,
        figures.active_objects + figures.in_arrays + figures.in_depot + figures.in_slabs
    );
    assert!(
        system
            .slabinfo()
            .to_string()
            .contains("kmalloc-64          1000")
    );
    let frames: usize = (0..4).map(|node| arena.used_on(node)).sum();
    assert_eq!(frames, arena.used());
    give(&system, held);
    end(arena, system);
}

#[test]
fn caches_come_and_go_on_all_nodes() {
    let (arena, system) = start(4096, 3, 3);
    for round in 0..100 {
        let cache: Cache<'_, [u64; 9], _> = Cache::new(&system, "comes");
        let mut boxes = Vec::new();
        for cpu in 0..3 {
            run_as(cpu);
            boxes.extend((0..100).map(|n| cache.alloc([n; 9]).unwrap()));
        }
        run_as(round % 3);
        drop(boxes);
        cache.destroy().unwrap();
    }
    end(arena, system);
}

#[test]
fn arrays_that_are_drained_serve_the_node_again() {
    let (arena, system) = start(4096, 3, 3);
    let mut after = Vec::new();
    for _ in 0..500 {
        for cpu in 0..3 {
            run_as(cpu);
            let objects = take(&system, 10, 3000);
            give(&system, objects);
            system.drain_local();
        }
        after.push(system.overhead_frames());
    }
    assert_eq!(after[499], after[10]);
    end(arena, system);
}

#[test]
fn a_cpu_that_goes_leaves_its_objects_at_their_homes() {
    let (arena, system) = start(4096, 2, 3);
    let mut objects = take(&system, 200, 700);
    run_as(1);
    objects.extend(take(&system, 200, 700));
    give(&system, objects);
    run_as(2);
    // SAFETY: one thread plays all CPUs, and it is not this one now.
    unsafe { system.cpu_offline(kmem_hal::CpuId::new(1)) }.unwrap();
    system.shrink();
    run_as(0);
    system.drain_local();
    assert_eq!(info(&system, "kmalloc-768").in_arrays, 0);
    for cpu in [0, 1] {
        run_as(cpu);
        let objects = take(&system, 100, 700);
        assert_eq!(of_node(arena, &objects, cpu as u16), 100);
        give(&system, objects);
    }
    end(arena, system);
}
