//! Models of `EpochGrace`: a reader that may still look keeps memory from being reused.
//!
//! Each thread plays a CPU. `Slot` is memory that a writer reuses after the grace period, in a cell that loom watches:
//! a reader inside it at that moment ends the model with an error.
#![cfg(loom)]

use std::ptr::NonNull;
use std::sync::Arc;

use kmem_hal::sync::{AtomicUsize, Ordering, UnsafeCell};
use kmem_hal::{CachePadded, Deferred, EpochArea, EpochGrace, Grace, Plant, Spin};
use kmem_testkit::model::{ModelCpu, explore};

const OLD: usize = 1;
const NEW: usize = 2;

struct World {
    areas: Box<[CachePadded<EpochArea<Spin, 2>>]>,
    grace: EpochGrace<'static, ModelCpu, Spin, 2>,
    /// Which slot readers may look at.
    head: AtomicUsize,
    old: UnsafeCell<u32>,
    new: UnsafeCell<u32>,
    reused: AtomicUsize,
}

// SAFETY: that the cells are reached by one at a time is what the model checks.
unsafe impl Sync for World {}
// SAFETY: as above.
unsafe impl Send for World {}

impl World {
    fn new(cpus: u32, plant: Plant) -> Arc<Self> {
        let areas: Box<[_]> = (0..cpus)
            .map(|_| CachePadded::new(EpochArea::new()))
            .collect();
        let world = Self {
            areas,
            grace: EpochGrace::with_bug(ModelCpu::new(cpus.max(4)), plant),
            head: AtomicUsize::new(OLD),
            old: UnsafeCell::new(7),
            new: UnsafeCell::new(8),
            reused: AtomicUsize::new(0),
        };
        let areas: *const [_] = &*world.areas;
        // SAFETY: the areas live in a box as long as `grace` does, which does not look at them when it is dropped.
        world.grace.init(unsafe { &*areas });
        Arc::new(world)
    }

    fn look(&self) {
        let guard = self.grace.read();
        let value = if self.head.load(Ordering::Acquire) == OLD {
            // SAFETY: the guard keeps the slot from being reused: the model's question.
            self.old.with(|value| unsafe { *value })
        } else {
            // SAFETY: never written.
            self.new.with(|value| unsafe { *value })
        };
        assert!(value == 7 || value == 8, "read reused memory: {value}");
        drop(guard);
    }

    /// Unlinks the old slot; it is reused after a grace period.
    fn retire(self: &Arc<Self>) {
        unsafe fn reuse(context: *const (), _object: NonNull<()>) {
            // SAFETY: the world outlives the model's threads.
            let world = unsafe { &*context.cast::<World>() };
            // SAFETY: the grace period is over: nobody looks. The model's question.
            world.old.with_mut(|value| unsafe { *value = 99 });
            world.reused.fetch_add(1, Ordering::Relaxed);
        }
        self.head.store(NEW, Ordering::Release);
        // SAFETY: `reuse` is sound once after a grace period.
        let call = unsafe { Deferred::new(reuse, Arc::as_ptr(self).cast(), NonNull::dangling()) };
        assert!(self.grace.defer(call).is_ok());
    }
}

fn reader_against_reuse(plant: Plant) {
    explore(3, move || {
        let world = World::new(2, plant);
        let reader = {
            let world = world.clone();
            loom::thread::spawn(move || {
                ModelCpu::bind(1);
                world.look();
            })
        };
        world.retire();
        world.grace.synchronize();
        assert_eq!(world.reused.load(Ordering::Relaxed), 1);
        reader.join().unwrap();
    });
}

#[test]
fn loom_reader_against_retire_and_reuse() {
    reader_against_reuse(Plant::Nothing);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn loom_finds_the_missing_reader_fence() {
    reader_against_reuse(Plant::NoReaderFence);
}

/// The epoch is moved by a third CPU, which has no fence of a `defer` or `synchronize` behind it.
fn third_cpu_polls(plant: Plant) {
    unsafe fn nothing(_context: *const (), _object: NonNull<()>) {}
    explore(2, move || {
        let world = World::new(3, plant);
        // SAFETY: the call does nothing.
        let call = unsafe { Deferred::new(nothing, std::ptr::null(), NonNull::dangling()) };
        assert!(world.grace.defer(call).is_ok());
        let reader = {
            let world = world.clone();
            loom::thread::spawn(move || {
                ModelCpu::bind(1);
                world.look();
            })
        };
        let writer = {
            let world = world.clone();
            loom::thread::spawn(move || {
                ModelCpu::bind(2);
                world.retire();
            })
        };
        world.grace.poll();
        world.grace.poll();
        reader.join().unwrap();
        writer.join().unwrap();
    });
}

#[test]
fn loom_third_cpu_polls() {
    third_cpu_polls(Plant::Nothing);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn loom_finds_the_missing_scanner_fence() {
    third_cpu_polls(Plant::NoScannerFence);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn loom_finds_a_grace_period_of_one_step() {
    two_sections(Plant::OneStep);
}

/// A reader that comes twice, so that it may begin in the epoch after the writer's.
fn two_sections(plant: Plant) {
    explore(2, move || {
        let world = World::new(2, plant);
        let reader = {
            let world = world.clone();
            loom::thread::spawn(move || {
                ModelCpu::bind(1);
                world.look();
                world.look();
            })
        };
        world.grace.poll();
        world.retire();
        world.grace.poll();
        world.grace.synchronize();
        reader.join().unwrap();
    });
}

#[test]
fn loom_reader_comes_twice() {
    two_sections(Plant::Nothing);
}

#[test]
fn loom_two_readers() {
    explore(2, || {
        let world = World::new(3, Plant::Nothing);
        let readers = [1, 2].map(|cpu| {
            let world = world.clone();
            loom::thread::spawn(move || {
                ModelCpu::bind(cpu);
                world.look();
            })
        });
        world.retire();
        world.grace.synchronize();
        assert_eq!(world.reused.load(Ordering::Relaxed), 1);
        for reader in readers {
            reader.join().unwrap();
        }
    });
}

#[test]
fn loom_reader_without_an_area() {
    explore(3, || {
        // The reader's CPU has no area: the shared counter keeps the epoch still.
        let world = World::new(1, Plant::Nothing);
        let reader = {
            let world = world.clone();
            loom::thread::spawn(move || {
                ModelCpu::bind(1);
                world.look();
            })
        };
        world.retire();
        world.grace.synchronize();
        assert_eq!(world.reused.load(Ordering::Relaxed), 1);
        reader.join().unwrap();
    });
}

#[test]
fn loom_two_writers_make_each_call_once() {
    explore(2, || {
        let world = World::new(2, Plant::Nothing);
        let other = {
            let world = world.clone();
            loom::thread::spawn(move || {
                ModelCpu::bind(1);
                world.grace.synchronize();
            })
        };
        world.retire();
        world.grace.synchronize();
        // Made by one of the two, and finished before this one returned.
        assert_eq!(world.reused.load(Ordering::Relaxed), 1);
        other.join().unwrap();
    });
}
