//! What calls cost in locked instructions, and an interrupt at every step of every path.
#![cfg(kmem_counting)]

mod common;

use std::alloc::Layout;
use std::cell::RefCell;
use std::collections::HashSet;
use std::ptr::NonNull;

use common::hardened;
use common::{Arena, System, TestParts, parts};
use kmem_hal::sync::{Counts, counts, reset_counts};
use kmem_slab::{Cache, Flags, Guard, Quarantine, SlabSystem};
use kmem_testkit::interrupt::every_interrupt;

const SMALL: Layout = Layout::new::<[u64; 8]>();

fn cost(f: impl FnOnce()) -> Counts {
    reset_counts();
    f();
    counts()
}

fn take(system: &System, count: usize) -> Vec<NonNull<u8>> {
    (0..count)
        .map(|_| system.kmalloc(64, Flags::empty()).unwrap())
        .collect()
}

fn give(system: &System, objects: impl IntoIterator<Item = NonNull<u8>>) {
    for object in objects {
        // SAFETY: from `take`, given once.
        unsafe { system.kfree(object.as_ptr()) };
    }
}

#[test]
fn counting_a_pair_takes_no_locked_instruction_and_no_shared_store() {
    let (_, system) = common::system(1024, 1);
    give(&system, take(&system, 10));
    for size in [16, 64, 100, 1000, 8000] {
        let layout = Layout::from_size_align(size, 8).unwrap();
        let warm = system.alloc(layout);
        // SAFETY: allocated with this layout, freed once.
        unsafe { system.dealloc(warm, layout) };
        let spent = cost(|| {
            let memory = system.alloc(layout);
            // SAFETY: as above.
            unsafe { system.dealloc(memory, layout) };
        });
        assert_eq!(
            spent,
            Counts {
                locked: 0,
                stores: 0
            },
            "size {size}"
        );
    }
    let cache: Cache<'_, [u64; 9], TestParts> = Cache::new(&system, "counted");
    drop(cache.alloc([0; 9]).unwrap());
    let spent = cost(|| drop(cache.alloc([0; 9]).unwrap()));
    assert_eq!(
        spent,
        Counts {
            locked: 0,
            stores: 0
        }
    );
}

#[test]
fn counting_guard_costs_the_other_pairs_no_locked_instruction() {
    let world: hardened::World<Guard<1000>> = hardened::World::new();
    let pair = |_| {
        let memory = world.system.alloc(SMALL);
        // SAFETY: allocated with this layout, freed once.
        unsafe { world.system.dealloc(memory, SMALL) };
    };
    (0..10).for_each(pair);
    let none = Counts {
        locked: 0,
        stores: 0,
    };
    assert_eq!(cost(|| (0..500).for_each(pair)), none);
}

#[test]
fn counting_quarantine_takes_the_lock_once_a_free() {
    let world: hardened::World<Quarantine<8>> = hardened::World::new();
    let pair = |_| {
        let memory = world.system.alloc(SMALL);
        // SAFETY: allocated with this layout, freed once.
        unsafe { world.system.dealloc(memory, SMALL) };
    };
    (0..20).for_each(pair);
    assert_eq!(cost(|| (0..500).for_each(pair)).locked, 500);
}

#[test]
fn counting_refills_and_flushes_take_two_locked_instructions_for_64_objects() {
    let (_, system) = common::system(8192, 1);
    // 64 objects of 64 bytes are a page, and the objects of one word of free bits: every second word is freed, so that
    // no slab becomes empty.
    // A first round makes the depot's arrays.
    give(&system, take(&system, 64 * 400));
    system.shrink();
    let mut objects = take(&system, 64 * 400);
    objects.sort();
    let (freed, kept): (Vec<_>, Vec<_>) = objects
        .into_iter()
        .partition(|object| object.as_ptr().addr() & 4096 == 0);
    assert!(freed.len() > 64 * 190);
    system.shrink();
    let arrays = freed.len() as u64 / 64;
    let locked = cost(|| give(&system, freed)).locked;
    assert!(
        locked <= 2 * arrays,
        "{locked} locked instructions for {arrays} arrays freed"
    );
    let locked = cost(|| drop(take(&system, 64 * 180))).locked;
    assert!(
        locked <= 2 * 180,
        "{locked} locked instructions for 180 arrays taken"
    );
    give(&system, kept);
}

/// What one CPU allocates the other frees, 64 objects at a time: so many locked instructions for 64 in the long run.
fn stream(nodes: u16) -> u64 {
    const ROUNDS: u64 = 300;
    let arena = Arena::with_nodes(8192, nodes);
    let system = SlabSystem::new();
    common::run_as(0);
    system.init(parts(arena, 2)).unwrap();
    let round = || {
        common::run_as(0);
        let objects = take(&system, 64);
        common::run_as(1);
        give(&system, objects);
    };
    (0..ROUNDS).for_each(|_| round());
    let locked = cost(|| (0..ROUNDS).for_each(|_| round())).locked;
    locked / ROUNDS
}

#[test]
fn counting_objects_that_come_from_another_node_go_home_in_whole_arrays() {
    let (one, two) = (stream(1), stream(2));
    assert!(
        one <= 4 && two <= one,
        "{one} with one node, {two} with two"
    );
}

#[test]
fn counting_new_slabs_take_two_locked_instructions_for_64_objects() {
    const ARRAYS: usize = 400;
    let (_, system) = common::system(8192, 1);
    // Descriptors and arrays are there from a first round.
    give(&system, take(&system, 64 * ARRAYS));
    system.shrink();
    let mut objects = Vec::new();
    let locked = cost(|| objects = take(&system, 64 * ARRAYS)).locked;
    assert!(
        locked <= 2 * ARRAYS as u64,
        "{locked} locked instructions for {ARRAYS} times 64 objects of new slabs"
    );
    give(&system, objects);
}

/// Random replacement of objects of 8 to 4096 bytes, sizes spread evenly over their logarithm: arrays absorb nearly all of it.
#[test]
fn counting_random_replacement_stores_nearly_nothing_to_shared_lines() {
    const LIVE: usize = 20_000;
    const REPLACES: u32 = 40_000;
    let (_, system) = common::system(8192, 1);
    let mut state = 1u64;
    let mut random = |below: u64| {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) * below >> 32
    };
    let layout = |random: &mut dyn FnMut(u64) -> u64| {
        let power = 3 + random(9);
        let size = (1 << power) + random(1 << power);
        Layout::from_size_align(size as usize, 8).unwrap()
    };
    let mut live: Vec<_> = (0..LIVE)
        .map(|_| {
            let layout = layout(&mut random);
            (system.alloc(layout), layout)
        })
        .collect();
    let mut replaces = |count: u32| {
        for _ in 0..count {
            let at = random(LIVE as u64) as usize;
            let (object, old) = live[at];
            // SAFETY: allocated with this layout, replaced below.
            unsafe { system.dealloc(object, old) };
            let new = layout(&mut random);
            live[at] = (system.alloc(new), new);
        }
    };
    // What came in one go lies in full slabs; after some lifetimes it does not.
    replaces(8 * LIVE as u32);
    let spent = cost(|| replaces(REPLACES));
    assert!(live.iter().all(|(object, _)| !object.is_null()));
    let each = (spent.locked + spent.stores) as f64 / f64::from(REPLACES);
    assert!(each <= 0.05, "{each} for each replacement: {spent:?}");
    for (object, layout) in live {
        // SAFETY: allocated with this layout, freed once.
        unsafe { system.dealloc(object, layout) };
    }
}

struct World {
    arena: &'static Arena,
    system: System,
    held: RefCell<Vec<NonNull<u8>>>,
}

impl World {
    fn check(mut self, step: u64) {
        let held = self.held.take();
        let distinct: HashSet<_> = held.iter().collect();
        assert_eq!(
            distinct.len(),
            held.len(),
            "an object was given twice: interrupt at step {step}"
        );
        let mut seen = 0;
        self.system
            .caches(|cache| {
                assert_eq!(
                    cache.allocs - cache.frees,
                    cache.active_objects,
                    "counts of {} after an interrupt at step {step}",
                    cache.name
                );
                assert_eq!(cache.misuses, 0);
                seen += cache.active_objects;
            })
            .unwrap();
        assert_eq!(
            seen,
            held.len() as u64,
            "objects in use after an interrupt at step {step}"
        );
        give(&self.system, held);
        self.system
            .teardown()
            .unwrap_or_else(|leaked| panic!("{leaked} after an interrupt at step {step}"));
        assert_eq!(self.arena.used(), 0);
    }
}

/// What interrupts do here: free one object and allocate two, of the class that was interrupted.
fn interrupt(world: &World) {
    // The vector may be borrowed by the interrupted code; then the interrupt only allocates and frees.
    match world.held.try_borrow_mut() {
        Ok(mut held) => {
            if let Some(object) = held.pop() {
                give(&world.system, [object]);
            }
            for _ in 0..2 {
                held.extend(world.system.kmalloc(64, Flags::empty()));
            }
        }
        Err(_) => {
            if let Ok(object) = world.system.kmalloc(64, Flags::empty()) {
                give(&world.system, [object]);
            }
        }
    }
}

fn everywhere(arena: &'static Arena, prepare: impl Fn(&World), operation: impl Fn(&World)) -> u64 {
    every_interrupt(
        || {
            let system = SlabSystem::new();
            system.init(parts(arena, 1)).unwrap();
            let world = World {
                arena,
                system,
                held: RefCell::new(Vec::new()),
            };
            prepare(&world);
            RefCell::new(Some(world))
        },
        |world| operation(world.borrow().as_ref().unwrap()),
        |world| interrupt(world.borrow().as_ref().unwrap()),
        |world, step| world.take().unwrap().check(step),
    )
}

#[test]
fn counting_interrupts_between_any_steps_of_the_fast_paths_do_no_harm() {
    let arena = Arena::new(512);
    let steps = everywhere(
        arena,
        |world| {
            *world.held.borrow_mut() = take(&world.system, 8);
        },
        |world| {
            let object = world.system.alloc(SMALL);
            // SAFETY: just allocated with this layout.
            unsafe { world.system.dealloc(object, SMALL) };
        },
    );
    assert!(steps >= 10, "{steps} steps");
}

#[test]
fn counting_interrupts_in_the_first_allocation_do_no_harm() {
    let arena = Arena::new(512);
    everywhere(
        arena,
        |_| {},
        |world| {
            let object = world.system.kmalloc(64, Flags::empty()).unwrap();
            world.held.borrow_mut().push(object);
        },
    );
}

#[test]
fn counting_interrupts_in_refills_do_no_harm() {
    let arena = Arena::new(512);
    everywhere(
        arena,
        |world| {
            let objects = take(&world.system, 150);
            give(&world.system, objects);
            world.system.shrink();
        },
        |world| {
            let objects = take(&world.system, 3);
            world.held.borrow_mut().extend(objects);
        },
    );
}

#[test]
fn counting_interrupts_in_exchanges_with_the_depot_do_no_harm() {
    let arena = Arena::new(512);
    everywhere(
        arena,
        |world| {
            *world.held.borrow_mut() = take(&world.system, 200);
            for _ in 0..127 {
                let object = world.held.borrow_mut().pop();
                give(&world.system, object);
            }
        },
        |world| {
            // The 129th free sends an array away.
            for _ in 0..3 {
                let object = world.held.borrow_mut().pop();
                give(&world.system, object);
            }
        },
    );
}

/// Of two nodes; the arrays of the CPU that frees hold both nodes' objects.
#[test]
fn counting_interrupts_where_objects_are_sent_home_do_no_harm() {
    let arena = Arena::with_nodes(1024, 2);
    let large = |world: &World| world.system.kmalloc(3000, Flags::empty()).unwrap();
    let places = every_interrupt(
        || {
            let system = SlabSystem::new();
            common::run_as(1);
            system.init(parts(arena, 2)).unwrap();
            let world = World {
                arena,
                system,
                held: RefCell::new(Vec::new()),
            };
            let far: Vec<_> = (0..11).map(|_| large(&world)).collect();
            common::run_as(0);
            let near: Vec<_> = (0..11).map(|_| large(&world)).collect();
            let mut held = world.held.borrow_mut();
            held.extend(
                far.into_iter()
                    .zip(near)
                    .flat_map(|(far, near)| [far, near]),
            );
            // An array has 8 places here: the 17th free makes room.
            let rest = held.split_off(6);
            give(&world.system, rest);
            drop(held);
            RefCell::new(Some(world))
        },
        |world| {
            let world = world.borrow();
            let world = world.as_ref().unwrap();
            let objects = std::mem::take(&mut *world.held.borrow_mut());
            give(&world.system, objects);
        },
        |world| {
            let world = world.borrow();
            let world = world.as_ref().unwrap();
            let object = large(world);
            give(&world.system, [object]);
        },
        |world, step| world.take().unwrap().check(step),
    );
    assert!(places > 100, "{places} steps");
}

#[test]
fn counting_interrupts_in_flushes_and_shrinks_do_no_harm() {
    let arena = Arena::new(512);
    everywhere(
        arena,
        |world| {
            let mut objects = take(&world.system, 140);
            *world.held.borrow_mut() = objects.split_off(136);
            give(&world.system, objects);
        },
        |world| {
            world.system.shrink();
        },
    );
}

#[test]
fn counting_interrupts_in_bulk_and_join_do_no_harm() {
    let arena = Arena::new(512);
    everywhere(
        arena,
        |world| *world.held.borrow_mut() = take(&world.system, 5),
        |world| {
            let cache: Cache<'_, [u64; 8], TestParts> = Cache::new(&world.system, "joined");
            let _ = cache.join();
            if let Ok(reserve) = cache.prefill::<8>(8) {
                drop(reserve);
            }
            drop(cache);
        },
    );
}
