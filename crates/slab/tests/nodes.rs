//! Machines with several memory nodes: memory stays near, comes home, and is borrowed where a node is short.

mod common;

use std::collections::HashSet;
use std::ptr::NonNull;

use common::{Arena, System, parts, run_as};
use kmem_hal::{AllocError, FrameRequest, FrameSink, FrameSource, NodeId, NodePolicy, OwnedFrame};
use kmem_slab::{Cache, CacheInfo, Flags, SlabSystem};

/// A system over an arena of several nodes.
struct Machine {
    arena: &'static Arena,
    system: System,
}

fn start(frames: usize, nodes: u16, cpus: u32) -> Machine {
    let arena = Arena::with_nodes(frames, nodes);
    let system = SlabSystem::new();
    run_as(0);
    system.init(parts(arena, cpus)).unwrap();
    Machine { arena, system }
}

impl Machine {
    fn take(&self, count: usize, size: usize) -> Vec<NonNull<u8>> {
        (0..count)
            .map(|_| self.system.kmalloc(size, Flags::empty()).unwrap())
            .collect()
    }

    /// The same as another CPU, which goes on.
    fn take_as(&self, cpu: u32, count: usize, size: usize) -> Vec<NonNull<u8>> {
        run_as(cpu);
        self.take(count, size)
    }

    fn give(&self, objects: impl IntoIterator<Item = NonNull<u8>>) {
        for object in objects {
            // SAFETY: allocated by the test, given once.
            unsafe { self.system.kfree(object.as_ptr()) };
        }
    }

    /// Each CPU's objects, given by that CPU.
    fn give_all(&self, held: Vec<(u32, Vec<NonNull<u8>>)>) {
        for (cpu, objects) in held {
            run_as(cpu);
            self.give(objects);
        }
    }

    fn info(&self, name: &str) -> CacheInfo {
        let mut found = None;
        self.system
            .caches(|cache| {
                if cache.name == name {
                    found = Some(*cache);
                }
            })
            .unwrap();
        found.unwrap()
    }

    /// How many of the objects lie in the memory of the node.
    fn of_node(&self, objects: &[NonNull<u8>], node: u16) -> usize {
        let here = |object: &&NonNull<u8>| self.arena.node_of(**object) == node;
        objects.iter().filter(here).count()
    }

    /// Takes every frame of a node, single frames last.
    fn exhaust(&self, node: u16) -> Vec<OwnedFrame> {
        let request = FrameRequest::ONE.node(NodePolicy::Strict(NodeId::new(node)));
        std::iter::from_fn(|| FrameSource::alloc(self.arena, &request).ok()).collect()
    }

    fn restore(&self, frames: Vec<OwnedFrame>) {
        for frame in frames {
            FrameSink::free(self.arena, frame);
        }
    }

    /// Objects on CPU `cpu`, of which every second is freed to its slab again; the others.
    fn every_second(&self, cpu: u32, count: usize) -> Vec<NonNull<u8>> {
        let mut objects = self.take_as(cpu, count, 64);
        objects.sort();
        let (kept, freed): (Vec<_>, Vec<_>) = objects
            .into_iter()
            .enumerate()
            .partition(|(at, _)| at % 2 == 0);
        self.give(freed.into_iter().map(|(_, object)| object));
        self.system.shrink();
        kept.into_iter().map(|(_, object)| object).collect()
    }

    /// Objects of 32 bytes, one call each; the slabs that they lie in.
    fn named(&self, count: usize, policy: NodePolicy) -> (Vec<NonNull<u8>>, u64) {
        let before = self.info("kmalloc-32").slabs;
        let one = |_| self.system.kmalloc_node(32, Flags::empty(), policy);
        let objects = (0..count).map(|n| one(n).unwrap()).collect();
        (objects, self.info("kmalloc-32").slabs - before)
    }

    fn end(mut self) {
        self.system
            .caches(|info| {
                assert_eq!(info.misuses, 0, "{info:?}");
                assert_eq!(info.allocs - info.frees, info.active_objects, "{info:?}");
            })
            .unwrap();
        self.system.teardown().unwrap();
        assert_eq!(self.arena.used(), 0);
        self.arena.check_slots();
    }
}

/// The most objects that a CPU holds in its two arrays.
const IN_ARRAYS: usize = 2 * 502;

#[test]
fn memory_is_that_of_the_cpus_node() {
    for nodes in 1..=4 {
        let m = start(8192, nodes, 8);
        let mut held = Vec::new();
        for cpu in 0..8 {
            run_as(cpu);
            for size in [16, 64, 700, 3000] {
                let objects = m.take(300, size);
                assert_eq!(m.of_node(&objects, cpu as u16 % nodes), 300);
                held.push((cpu, objects));
            }
        }
        m.give_all(held);
        m.end();
    }
}

#[test]
fn what_is_freed_far_away_goes_home_and_is_used_there() {
    const COUNT: usize = 5000;
    let m = start(8192, 2, 2);
    let objects = m.take(COUNT, 64);
    let used = m.arena.used_on(0);
    run_as(1);
    m.give(objects);
    // At most what lies in the arrays of the CPU that freed them is given again there.
    let far = m.take(COUNT, 64);
    assert!(m.of_node(&far, 0) <= IN_ARRAYS);
    // The others are where they came from.
    run_as(0);
    let near = m.take(COUNT - IN_ARRAYS, 64);
    assert_eq!(m.of_node(&near, 0), near.len());
    assert!(m.arena.used_on(0) <= used + 4, "no new slabs");
    m.give(near);
    run_as(1);
    m.give(far);
    m.end();
}

#[test]
fn a_stream_from_node_to_node_needs_no_more_memory_with_time() {
    let m = start(8192, 3, 3);
    let mut after = Vec::new();
    for round in 0..200 {
        let objects = m.take_as(0, 1000, 64);
        assert!(m.of_node(&objects, 0) == 1000, "round {round}");
        run_as(2);
        m.give(objects);
        after.push(m.arena.used());
    }
    assert!(after[199] <= after[20] + 16, "{after:?}");
    // Whole arrays travel: slabs are not asked for each object.
    let moved = m.info("kmalloc-64");
    assert!(moved.exchanges >= 400 && moved.flushes <= 100, "{moved:?}");
    m.end();
}

#[test]
fn objects_of_all_nodes_freed_in_turn_are_sorted_out() {
    let m = start(8192, 4, 4);
    for size in [64, 700] {
        let mut mixed: Vec<Vec<NonNull<u8>>> = Vec::new();
        for cpu in 0..4 {
            mixed.push(m.take_as(cpu, 2000, size));
        }
        run_as(3);
        for at in 0..2000 {
            m.give(mixed.iter().map(|of_node| of_node[at]));
        }
        // What CPUs hold in their own arrays may be anybody's.
        for cpu in 0..4 {
            run_as(cpu);
            m.system.drain_local();
        }
        let mut held = Vec::new();
        for cpu in 0..4 {
            let objects = m.take_as(cpu, 1500, size);
            assert_eq!(
                m.of_node(&objects, cpu as u16),
                1500,
                "size {size} CPU {cpu}"
            );
            held.push((cpu, objects));
        }
        m.give_all(held);
    }
    m.end();
}

#[test]
fn a_node_without_memory_borrows_from_the_nearest_and_comes_back() {
    let m = start(6144, 3, 3);
    let mut held = m.every_second(2, 4000);
    held.extend(m.every_second(1, 40_000));
    run_as(0);
    m.system.shrink();
    let frames = m.exhaust(0);
    let before = m.arena.used();
    let borrowed = m.take(2000, 64);
    assert_eq!(m.of_node(&borrowed, 1), 2000, "the nearest first");
    assert!(m.arena.used() <= before + 24, "{} {before}", m.arena.used());
    m.restore(frames);
    // Memory of the node is there again: soon it is used, though the other has free objects still.
    let objects = m.take(12_000, 64);
    assert_eq!(m.of_node(&objects[10_000..], 0), 2000);
    held.extend(objects.into_iter().chain(borrowed));
    m.give(held);
    m.end();
}

#[test]
fn what_a_node_borrows_is_used_up_before_more_is_asked_for() {
    let m = start(3072, 3, 3);
    let frames = m.exhaust(0);
    let before = m.arena.used_on(2);
    // Each time the CPU's array is empty, and what is left of a slab is on the other node.
    let mut objects = Vec::new();
    for _ in 0..100 {
        objects.extend(m.take(1, 16));
        m.system.drain_local();
    }
    assert_eq!(m.of_node(&objects, 1), 100);
    // The page source is asked again now and then.
    let slabs = m.info("kmalloc-16").slabs;
    assert!(slabs <= 100 / 16 + 2, "{slabs} slabs for 100 objects");
    assert_eq!(m.arena.used_on(2), before);
    m.restore(frames);
    m.give(objects);
    m.end();
}

#[test]
fn where_all_memory_is_out_any_nodes_objects_serve() {
    let m = start(3072, 3, 3);
    let kept = m.every_second(2, 1280);
    run_as(0);
    let keep = m.take(1, 64);
    let frames: Vec<_> = (0..3).flat_map(|node| m.exhaust(node)).collect();
    let mut got = Vec::new();
    while let Ok(object) = m.system.kmalloc(64, Flags::NO_WARN) {
        got.push(object);
    }
    assert!(m.of_node(&got, 2) >= 600, "{}", got.len());
    for objects in [got, keep, kept] {
        m.give(objects);
    }
    m.restore(frames);
    m.end();
}

#[test]
fn a_node_that_is_named_does_not_fill_this_cpus_arrays() {
    let m = start(3072, 3, 3);
    let mut held = Vec::new();
    loop {
        held.extend(m.take(1, 64));
        if m.info("kmalloc-64").in_arrays == 0 {
            break;
        }
    }
    let far = NodePolicy::Strict(NodeId::new(2));
    held.push(m.system.kmalloc_node(64, Flags::empty(), far).unwrap());
    let near = m.take(10, 64);
    assert_eq!(m.of_node(&near, 0), 10);
    held.extend(near);
    m.give(held);
    m.end();
}

#[test]
fn a_node_that_is_named_serves_small_and_large_sizes() {
    let m = start(4096, 3, 3);
    let mut held = Vec::new();
    for node in [2, 0, 1, 2] {
        for size in [1, 100, 5000, 30_000] {
            for policy in [NodePolicy::Strict, NodePolicy::Preferred] {
                let policy = policy(NodeId::new(node));
                let memory = m.system.kmalloc_node(size, Flags::ZERO, policy).unwrap();
                assert_eq!(m.arena.node_of(memory), node, "{policy:?} {size}");
                // SAFETY: allocated above.
                let usable = unsafe { m.system.ksize(memory) }.unwrap();
                assert!(usable < size + size / 2 + 16 || size > 8192);
                held.push(memory);
            }
        }
    }
    let all: HashSet<_> = (0..6)
        .map(|_| {
            let memory = m
                .system
                .kmalloc_node(64, Flags::empty(), NodePolicy::Interleave)
                .unwrap();
            held.push(memory);
            m.arena.node_of(memory)
        })
        .collect();
    assert_eq!(all.len(), 3);
    // This CPU's own array stayed its node's.
    let near = m.take(100, 64);
    assert_eq!(m.of_node(&near, 0), 100);
    held.extend(near);
    let frames = m.exhaust(1);
    let one = NodeId::new(1);
    let mut strict = 0;
    let refused = loop {
        match m
            .system
            .kmalloc_node(4096, Flags::NO_WARN, NodePolicy::Strict(one))
        {
            Ok(memory) => held.push(memory),
            Err(error) => break error,
        }
        strict += 1;
        assert!(strict < 64);
    };
    assert_eq!(refused, AllocError::OutOfMemory);
    let other = m
        .system
        .kmalloc_node(4096, Flags::NO_WARN, NodePolicy::Preferred(one))
        .unwrap();
    assert_ne!(m.arena.node_of(other), 1);
    let nowhere = NodePolicy::Strict(NodeId::new(7));
    assert!(m.system.kmalloc_node(64, Flags::NO_WARN, nowhere).is_err());
    held.push(other);
    m.restore(frames);
    m.give(held);
    m.end();
}

#[test]
fn a_preferred_node_that_is_short_does_not_take_a_slab_for_each_object() {
    let one = NodePolicy::Preferred(NodeId::new(1));
    for nodes in [1, 2, 3] {
        for policy in [one, NodePolicy::Interleave] {
            let m = start(9216, nodes, 1);
            let frames = if nodes > 1 { m.exhaust(1) } else { Vec::new() };
            let (objects, slabs) = m.named(1000, policy);
            // The page source is asked again now and then: for no more slabs than the objects fill, and one for each node.
            let filled = 1000 / m.info("kmalloc-32").objects_per_slab as u64 + 1;
            assert!(
                slabs <= filled + u64::from(nodes),
                "{nodes} nodes, {policy:?}: {slabs} for {filled}"
            );
            m.restore(frames);
            m.give(objects);
            // The node has memory again, and is soon used.
            if nodes > 1 {
                let (objects, _) = m.named(8000, one);
                assert_eq!(m.of_node(&objects[7000..], 1), 1000);
                m.give(objects);
            }
            m.end();
        }
    }
}

/// Where memory is out, the spare array serves as the loaded one does, and nothing is taken apart for it.
#[test]
fn in_need_a_cpus_spare_array_serves_who_prefers_a_node() {
    for nodes in [1, 2] {
        let m = start(6144, nodes, 1);
        let info = || m.info("kmalloc-32");
        let filling = m.take(3 * IN_ARRAYS, 32);
        m.give(filling);
        let frames: Vec<_> = (0..nodes).map(|node| m.exhaust(node)).collect();
        let mut held = Vec::new();
        let prefer = NodePolicy::Preferred(NodeId::new(nodes - 1));
        // Both arrays are full, as frees go on to the depot. What lies there is used first.
        assert!(info().in_depot + info().in_slabs > 0);
        while info().in_arrays > 0 {
            let before = info().in_arrays;
            held.push(m.system.kmalloc_node(32, Flags::empty(), prefer).unwrap());
            assert!(info().in_arrays + 1 >= before, "of {before}");
        }
        frames.into_iter().for_each(|frames| m.restore(frames));
        m.give(held);
        m.end();
    }
}

#[test]
fn a_node_that_nobody_knows_may_be_preferred() {
    for nodes in [1, 2, 3] {
        let m = start(6144, nodes, nodes.into());
        run_as(u32::from(nodes) - 1);
        let (objects, slabs) = m.named(1000, NodePolicy::Preferred(NodeId::new(7)));
        assert!(slabs <= 1000 / 64 + 2, "{nodes} nodes: {slabs}");
        assert_eq!(m.of_node(&objects, nodes - 1), 1000, "near the caller");
        m.give(objects);
        m.end();
    }
}

#[test]
fn a_cpu_without_arrays_borrows_from_another_nodes_arrays() {
    const CPUS: u32 = 32;
    let m = start(2048, 2, CPUS);
    let mut held = Vec::new();
    for cpu in (0..CPUS).step_by(2) {
        // A head, but no arrays of the class.
        held.extend(m.take_as(cpu, 1, 8192));
    }
    run_as(1);
    let mut objects = m.take(2000, 64);
    let more = m.take(600, 64);
    m.give(more);
    m.system.shrink();
    let frames: Vec<_> = (0..2).flat_map(|node| m.exhaust(node)).collect();
    while let Ok(object) = m.system.kmalloc(64, Flags::NO_WARN) {
        objects.push(object);
    }
    for cpu in (2..CPUS).step_by(2) {
        // Takes what there is of arrays, for nothing.
        run_as(cpu);
        assert!(m.system.kmalloc(64, Flags::NO_WARN).is_err());
    }
    run_as(1);
    // Answers the drains that were asked for; then all is out again.
    m.give(objects.pop());
    let figures = m.info("kmalloc-64");
    let free = figures.total_objects - figures.active_objects;
    objects.extend(m.take(free as usize, 64));
    while m.info("kmalloc-64").in_depot == 0 {
        let object = objects.pop().expect("an array becomes full");
        m.give([object]);
    }
    // Nothing but the arrays has an object.
    let one = NodePolicy::Strict(NodeId::new(1));
    for _ in 0..m.info("kmalloc-64").in_slabs {
        objects.push(m.system.kmalloc_node(64, Flags::NO_WARN, one).unwrap());
    }
    let figures = m.info("kmalloc-64");
    assert_eq!(figures.in_slabs, 0, "{figures:?}");
    assert!(figures.in_depot > 0, "{figures:?}");
    run_as(0);
    let object = m.system.kmalloc(64, Flags::NO_WARN).unwrap();
    assert_eq!(m.arena.node_of(object), 1);
    assert_eq!(m.info("kmalloc-64").in_depot, figures.in_depot - 1);
    objects.push(object);
    m.restore(frames);
    m.give(objects.into_iter().chain(held));
    m.end();
}

#[test]
fn views_are_sums_over_the_nodes() {
    let m = start(4096, 4, 4);
    let mut held = Vec::new();
    for cpu in 0..4 {
        held.extend(m.take_as(cpu, 250, 64));
    }
    let figures = m.info("kmalloc-64");
    assert_eq!(figures.active_objects, 1000);
    assert!(figures.slabs >= 4 && figures.total_objects >= 1000);
    assert_eq!(
        figures.total_objects,
        figures.active_objects + figures.in_arrays + figures.in_depot + figures.in_slabs
    );
    assert!(
        m.system
            .slabinfo()
            .to_string()
            .contains("kmalloc-64          1000")
    );
    let frames: usize = (0..4).map(|node| m.arena.used_on(node)).sum();
    assert_eq!(frames, m.arena.used());
    m.give(held);
    m.end();
}

#[test]
fn caches_come_and_go_on_all_nodes() {
    let m = start(4096, 3, 3);
    for round in 0..100 {
        let cache: Cache<'_, [u64; 9], _> = Cache::new(&m.system, "comes");
        let mut boxes = Vec::new();
        for cpu in 0..3 {
            run_as(cpu);
            boxes.extend((0..100).map(|n| cache.alloc([n; 9]).unwrap()));
        }
        run_as(round % 3);
        drop(boxes);
        cache.destroy().unwrap();
    }
    m.end();
}

#[test]
fn arrays_that_are_drained_serve_the_node_again() {
    let m = start(4096, 3, 3);
    let mut after = Vec::new();
    for _ in 0..500 {
        for cpu in 0..3 {
            let objects = m.take_as(cpu, 10, 3000);
            m.give(objects);
            m.system.drain_local();
        }
        after.push(m.system.overhead_frames());
    }
    assert_eq!(after[499], after[10]);
    m.end();
}

#[test]
fn a_cpu_that_goes_leaves_its_objects_at_their_homes() {
    let m = start(4096, 2, 3);
    let mut objects = m.take(200, 700);
    objects.extend(m.take_as(1, 200, 700));
    m.give(objects);
    run_as(2);
    // SAFETY: one thread plays all CPUs, and it is not this one now.
    unsafe { m.system.cpu_offline(kmem_hal::CpuId::new(1)) }.unwrap();
    m.system.shrink();
    run_as(0);
    m.system.drain_local();
    assert_eq!(m.info("kmalloc-768").in_arrays, 0);
    for cpu in [0, 1] {
        let objects = m.take_as(cpu, 100, 700);
        assert_eq!(m.of_node(&objects, cpu as u16), 100);
        m.give(objects);
    }
    m.end();
}
