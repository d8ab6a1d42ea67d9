//! A CPU's arrays grow while a cache streams and shrink when it does not, within a budget of bytes; what a depot keeps follows.
//!
//! Seen from outside: the most objects that a CPU holds while objects come back one by one are the slots of its two arrays.
#![cfg(not(any(loom, shuttle)))]

mod common;

use std::collections::BTreeSet;
use std::ptr::NonNull;

use common::{System, run_as, system};
use kmem_slab::{CacheInfo, Flags};

/// Sizes of objects, with the slots of an array at the start and of one that has grown: by 16 KiB and 64 KiB of objects, from 8 slots to 64, and to a page of them.
const SIZES: [(usize, usize, usize); 6] = [
    (8, 64, PAGE_OF_SLOTS),
    (64, 64, PAGE_OF_SLOTS),
    (256, 64, 128),
    (1024, 16, 64),
    (4096, 8, 16),
    (8192, 8, 8),
];

/// Slots that fit into a page behind its header and the array's.
const PAGE_OF_SLOTS: usize = 502;

/// The most bytes of objects in a CPU's grown array, and in a depot.
const ARRAY_BUDGET: usize = 64 << 10;
const DEPOT_BUDGET: usize = 256 << 10;

/// One CPU with one cache, and the objects that are out.
struct Load {
    system: System,
    size: usize,
    held: Vec<NonNull<u8>>,
}

impl Load {
    fn new(size: usize) -> Self {
        run_as(0);
        let (_, system) = system(8192, 1);
        let held = Vec::new();
        Self { system, size, held }
    }

    fn take(&mut self) {
        let object = self.system.kmalloc(self.size, Flags::empty()).unwrap();
        self.held.push(object);
    }

    fn give(&mut self) {
        let object = self.held.pop().unwrap();
        // SAFETY: allocated by `take`, given once.
        unsafe { self.system.kfree(object.as_ptr()) };
    }

    fn info(&self) -> CacheInfo {
        let mut found = None;
        let look = |cache: &CacheInfo| {
            if cache.name.starts_with("kmalloc-") && cache.object_size == self.size {
                found = Some(*cache);
            }
        };
        self.system.caches(look).unwrap();
        found.unwrap()
    }

    /// Objects that swings move: more than arrays and depot hold.
    fn many(&self) -> usize {
        (2 * DEPOT_BUDGET / self.size).max(400)
    }

    /// Arrays' worth of objects come and go at once.
    fn stream(&mut self) {
        for _ in 0..4 {
            (0..self.many()).for_each(|_| self.take());
            (0..self.many()).for_each(|_| self.give());
        }
    }

    /// `step` so often, with so many calls between that arrays change hands rarely.
    fn slowly(&mut self, count: usize, step: impl Fn(&mut Self)) {
        for _ in 0..count {
            step(self);
            // One that comes back fits into an array that is nearly empty, as it is before a slab of few objects is made.
            for _ in 0..8.min(8 * self.held.len()) {
                self.give();
                self.take();
            }
        }
    }

    /// The load drifts up and down.
    fn drift(&mut self) {
        let many = self.many();
        self.slowly(many, Self::take);
        self.slowly(many, Self::give);
    }

    /// The slots of the CPU's two arrays: objects come back until they hold no more. At most one array's worth of calls is an event.
    fn slots(&mut self) -> usize {
        let mut before = self.info().in_arrays;
        loop {
            self.give();
            let now = self.info().in_arrays;
            if now <= before {
                return before as usize;
            }
            before = now;
        }
    }

    /// Every object is free or held by one, whatever arrays it went through.
    fn check(&self) {
        let info = self.info();
        let distinct: BTreeSet<_> = self.held.iter().collect();
        assert_eq!(distinct.len(), self.held.len(), "an object has two owners");
        assert_eq!(info.active_objects as usize, self.held.len(), "{info:?}");
        assert_eq!(info.allocs - info.frees, info.active_objects, "{info:?}");
        assert_eq!(info.misuses, 0);
    }
}

#[test]
fn arrays_and_depots_grow_while_the_cache_streams_and_no_further_than_the_budget() {
    for (size, start, grown) in SIZES {
        let mut load = Load::new(size);
        // A few objects only: nothing streams yet, but where a slab has so few that a refill is soon used up.
        assert_eq!(load.info().array, start, "{size}");
        (0..3 * start).for_each(|_| load.take());
        if size <= 1024 {
            assert_eq!(load.slots(), 2 * start, "{size}");
        }
        load.stream();
        (0..load.many()).for_each(|_| load.take());
        for _ in 0..2 {
            load.slots();
        }
        assert_eq!(load.slots(), 2 * grown, "{size}");
        assert!(grown * size <= ARRAY_BUDGET || grown == start, "{size}");
        // The depot keeps arrays until the next does not fit.
        while !load.held.is_empty() {
            load.give();
        }
        let (depot, budget) = (load.info().in_depot as usize, DEPOT_BUDGET / size);
        assert!(depot <= budget && depot + grown > budget, "{size}: {depot}");
        load.check();
    }
}

#[test]
fn arrays_and_depots_shrink_when_calls_are_many_and_events_are_few() {
    // Not the smallest, as it takes long; not the largest, whose refills are of the two objects of a slab, so that events are never few.
    for &(size, start, grown) in &SIZES[1..5] {
        let mut load = Load::new(size);
        load.stream();
        // What a depot may keep falls by an array's worth each time that it runs dry or over.
        load.drift();
        load.drift();
        let depot = load.info().in_depot as usize;
        assert!(depot <= start, "{size}: {depot}");
        load.slowly(2 * grown, Load::take);
        assert_eq!(load.slots(), 2 * start, "{size}");
        load.check();
    }
}

/// Events that are further apart than an array's worth of calls, and nearer than four, change nothing.
#[test]
fn arrays_that_are_just_large_enough_stay() {
    let (size, start, grown) = SIZES[1];
    for (streams, slots) in [(false, start), (true, grown)] {
        let mut load = Load::new(size);
        if streams {
            load.stream();
            (0..3 * grown).for_each(|_| load.take());
        }
        // Three calls for each object, and a whole array of them an event.
        for _ in 0..load.many() {
            load.take();
            load.take();
            load.give();
        }
        assert_eq!(load.slots(), 2 * slots, "{streams}");
        load.check();
    }
}

/// An array that is exchanged for a larger or a smaller one goes back, with its page once it fills one; objects that were in it stay.
#[test]
fn nothing_is_lost_when_arrays_are_exchanged() {
    for &(size, ..) in &SIZES[1..] {
        let mut load = Load::new(size);
        let mut cycle = || {
            load.stream();
            load.drift();
            (0..100).for_each(|_| load.take());
            load.check();
            (0..100).for_each(|_| load.give());
            load.check();
            load.system.totals().overhead_frames
        };
        let settled = (0..2).map(|_| cycle()).max();
        for _ in 0..4 {
            assert!(Some(cycle()) <= settled, "{size}: arrays are lost");
        }
        load.system.shrink();
        assert_eq!(load.info().slabs, 0, "{size}: {:?}", load.info());
        load.system.teardown().unwrap();
    }
}
