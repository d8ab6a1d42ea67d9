//! Depot, free bits, drain and a CPU that goes: every interleaving of two contexts on small ones.
//!
//! Objects are numbers here, and each has a loom cell that its owner writes: two owners at once are a failure that loom finds itself.
#![cfg(loom)]

use std::ptr::{self, NonNull};
use std::sync::Arc;

use kmem_hal::sync::{AtomicBool, Ordering};
use kmem_hal::{Lock, Spin};
use kmem_slab::model::{Array, ArrayStack, Depot, Head, Pending, Slab, Users};
use loom::cell::UnsafeCell;
use loom::thread;

/// Every interleaving of three contexts would take a minute: those in which threads are interrupted up to three times, or as often as
/// `LOOM_MAX_PREEMPTIONS` says.
fn explore(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(3));
    builder.check(model);
}

/// A slab of `N` objects and what a depot's lock guards.
struct World<const N: usize> {
    slab: Slab,
    pending: Pending,
    depot: Lock<Depot, Spin>,
    objects: [UnsafeCell<u32>; N],
}

// SAFETY: the slab's plain words are used under the depot's lock, and the cells by the owners of their objects.
unsafe impl<const N: usize> Sync for World<N> {}
// SAFETY: as above.
unsafe impl<const N: usize> Send for World<N> {}

impl<const N: usize> World<N> {
    /// All objects are in the hands of the caller.
    fn taken() -> Arc<Self> {
        let slab = Slab::new(ptr::null_mut(), kmem_hal::NodeId::ZERO, ptr::null_mut());
        slab.set_memory(ptr::null_mut(), 1, N);
        Arc::new(Self {
            slab,
            pending: Pending::new(),
            depot: Lock::new(Depot::new()),
            objects: std::array::from_fn(|_| UnsafeCell::new(0)),
        })
    }

    /// As its only owner would.
    fn own(&self, object: usize) {
        // SAFETY: the caller owns the object, which is what loom checks.
        self.objects[object].with_mut(|cell| unsafe { *cell += 1 });
    }

    /// A free by a context that cannot have the lock.
    fn free_without_lock(&self, object: usize) {
        self.own(object);
        assert!(self.slab.give_back_remote(object));
        self.pending.push(&self.slab);
    }

    /// A free under the lock.
    fn free(&self, object: usize) {
        self.own(object);
        let mut depot = self.depot.lock();
        assert!(self.slab.give_back(object));
        depot.relist(&self.slab);
    }

    /// An allocation under the lock.
    fn alloc(&self) -> Option<usize> {
        let mut depot = self.depot.lock();
        self.pending.take(|slab| {
            assert_eq!(slab.merge(), 0, "free twice");
            depot.relist(slab);
        });
        let mut got = None;
        self.slab
            .claim(1, |_, mask| got = Some(mask.trailing_zeros() as usize));
        depot.relist(&self.slab);
        drop(depot);
        if let Some(object) = got {
            self.own(object);
        }
        got
    }

    /// An allocation by a context that cannot have the lock.
    fn alloc_without_lock(&self) -> Option<usize> {
        let object = self.slab.claim_remote()?;
        self.own(object);
        Some(object)
    }

    /// Objects that are free in the end, after everything was merged.
    fn free_now(&self) -> usize {
        let mut depot = self.depot.lock();
        self.pending.take(|slab| {
            assert_eq!(slab.merge(), 0);
            depot.relist(slab);
        });
        assert_eq!(
            self.slab.free(),
            self.slab.free_in_all(),
            "something was left behind"
        );
        self.slab.free()
    }
}

#[test]
fn a_late_look_at_a_descriptor_finds_its_old_memory_or_its_new() {
    loom::model(|| {
        let world = World::<2>::taken();
        world.slab.clear_memory();
        let there = Arc::clone(&world);
        let other = thread::spawn(move || there.slab.set_memory(ptr::null_mut(), 3, 2));
        // By a note on the pending stack that is older than the new memory.
        if world.slab.is_live() {
            assert_eq!(world.slab.pages(), 3);
        }
        other.join().unwrap();
    });
}

#[test]
fn a_free_without_the_lock_is_merged_once_and_never_lost() {
    loom::model(|| {
        let world = World::<2>::taken();
        let there = Arc::clone(&world);
        let other = thread::spawn(move || {
            there.free_without_lock(0);
            there.free_without_lock(1);
        });
        let got = [world.alloc(), world.alloc()];
        other.join().unwrap();
        let held = got.iter().flatten().count();
        assert_eq!(world.free_now() + held, 2);
    });
}

#[test]
fn an_object_freed_without_the_lock_has_one_next_owner() {
    loom::model(|| {
        let world = World::<2>::taken();
        world.free_without_lock(0);
        let there = Arc::clone(&world);
        // One takes it with the lock, one without.
        let other = thread::spawn(move || there.alloc());
        let here = world.alloc_without_lock();
        let there = other.join().unwrap();
        assert_eq!(
            usize::from(here.is_some()) + usize::from(there.is_some()) + world.free_now(),
            1,
            "one object, one owner"
        );
    });
}

#[test]
fn words_under_the_lock_and_words_without_do_not_mix() {
    loom::model(|| {
        let world = World::<3>::taken();
        let there = Arc::clone(&world);
        let other = thread::spawn(move || {
            there.free(1);
            there.alloc()
        });
        world.free_without_lock(0);
        let here = world.alloc_without_lock();
        let there = other.join().unwrap();
        let held = usize::from(here.is_some()) + usize::from(there.is_some()) + 1;
        assert_eq!(world.free_now() + held, 3);
    });
}

#[test]
fn a_drained_slab_goes_back_whole_or_not_at_all() {
    loom::model(|| {
        let world = World::<2>::taken();
        world.free(0);
        let there = Arc::clone(&world);
        // The last object comes back while a drain looks for empty slabs.
        let other = thread::spawn(move || there.free_without_lock(1));
        let retired = {
            let mut depot = world.depot.lock();
            world.pending.take(|slab| {
                slab.merge();
                depot.relist(slab);
            });
            depot.take_empty().is_some()
        };
        other.join().unwrap();
        if retired {
            // Whoever retires owns every object.
            world.own(0);
            world.own(1);
            assert_eq!(world.slab.free_in_all(), 0);
        } else {
            assert_eq!(world.free_now(), 2);
            assert!(
                world.depot.lock().take_empty().is_some(),
                "the next drain finds it"
            );
        }
    });
}

/// Memory for an array of two slots.
fn array() -> NonNull<Array> {
    let words = vec![0u128; 64].leak();
    // SAFETY: leaked memory, larger than an array of two slots, aligned to 16.
    unsafe { Array::construct(NonNull::new(words.as_mut_ptr().cast()).unwrap(), 2) }
}

#[test]
fn arrays_change_hands_whole() {
    struct Shared(Lock<ArrayStack, Spin>, [UnsafeCell<u32>; 2]);
    // SAFETY: the stack is behind its lock, and the cells belong to the owners of their objects.
    unsafe impl Sync for Shared {}
    // SAFETY: as above.
    unsafe impl Send for Shared {}

    loom::model(|| {
        let shared = Arc::new(Shared(
            Lock::new(ArrayStack::new()),
            std::array::from_fn(|_| UnsafeCell::new(0)),
        ));
        let there = Arc::clone(&shared);
        // One CPU gives an array of two objects to the depot, two ask for it.
        let producer = thread::spawn(move || {
            for object in &there.1 {
                // SAFETY: not given yet.
                object.with_mut(|cell| unsafe { *cell += 1 });
            }
            let array = array();
            // SAFETY: the array belongs to this thread until it is pushed.
            unsafe {
                array.as_ref().set_len(2);
                there.0.lock().push(array);
            }
        });
        let there = Arc::clone(&shared);
        let take = |shared: &Shared| {
            let array = shared.0.lock().pop();
            if let Some(array) = array {
                // SAFETY: popped, so this thread's.
                assert_eq!(unsafe { array.as_ref() }.len(), 2);
                for object in &shared.1 {
                    // SAFETY: the objects came with the array.
                    object.with_mut(|cell| unsafe { *cell += 1 });
                }
            }
            array.is_some()
        };
        let consumer = thread::spawn(move || take(&there));
        let here = take(&shared);
        producer.join().unwrap();
        let there = consumer.join().unwrap();
        assert!(!(here && there), "one array, two owners");
        assert_eq!(shared.0.lock().objects(), if here || there { 0 } else { 2 });
    });
}

#[test]
fn a_cpu_that_goes_leaves_its_objects_to_whoever_drains_it() {
    struct Shared(Head, AtomicBool, [UnsafeCell<u32>; 2]);
    // SAFETY: the head is its CPU's until the flag says that the CPU is gone.
    unsafe impl Sync for Shared {}
    // SAFETY: as above.
    unsafe impl Send for Shared {}

    loom::model(|| {
        let shared = Arc::new(Shared(
            Head::new(),
            AtomicBool::new(false),
            std::array::from_fn(|_| UnsafeCell::new(0)),
        ));
        let there = Arc::clone(&shared);
        let cpu = thread::spawn(move || {
            let busy = there.0.enter().unwrap();
            busy.load(array());
            for number in 0..2 {
                // SAFETY: the object is this CPU's to free.
                there.2[number].with_mut(|cell| unsafe { *cell += 1 });
                let object = ptr::without_provenance_mut(16 * (number + 1));
                assert!(busy.push(NonNull::new(object).unwrap()));
            }
            drop(busy);
            // Offline: what was written is visible to whoever sees the flag (hal C5).
            there.1.store(true, Ordering::Release);
        });
        if shared.1.load(Ordering::Acquire) {
            let busy = shared.0.enter().expect("nobody runs there");
            let mut drained = 0;
            while let Some(object) = busy.pop() {
                let number = object.as_ptr().addr() / 16 - 1;
                // SAFETY: drained, so this CPU's.
                shared.2[number].with_mut(|cell| unsafe { *cell += 1 });
                drained += 1;
            }
            assert_eq!(drained, 2, "an object was stranded");
        }
        cpu.join().unwrap();
    });
}

#[test]
fn one_context_takes_a_cache_apart_and_has_it_alone() {
    /// The count of walks, what a walk changes (a head, say), and whether the cache was taken apart.
    struct Shared(Users, [UnsafeCell<u32>; 2], UnsafeCell<bool>);
    // SAFETY: the cells belong to who the count says.
    unsafe impl Sync for Shared {}
    // SAFETY: as above.
    unsafe impl Send for Shared {}

    impl Shared {
        fn take_apart(&self) {
            for cell in &self.1 {
                // SAFETY: no walk looks, which is what loom checks.
                cell.with_mut(|cell| unsafe { *cell += 1 });
            }
            // SAFETY: as above.
            self.2.with_mut(|gone| unsafe {
                assert!(!*gone, "taken apart twice");
                *gone = true;
            });
        }

        fn walk(&self, cpu: usize) {
            if !self.0.enter() {
                return;
            }
            // SAFETY: a walk has its CPU's part while it is counted.
            self.2.with(|gone| assert!(unsafe { !*gone }));
            self.1[cpu].with_mut(|cell| unsafe { *cell += 1 });
            if self.0.exit() {
                self.take_apart();
            }
        }
    }

    for waits in [false, true] {
        explore(move || {
            let shared = Arc::new(Shared(
                Users::new(),
                std::array::from_fn(|_| UnsafeCell::new(0)),
                UnsafeCell::new(false),
            ));
            let walks = [0, 1].map(|cpu| {
                let there = Arc::clone(&shared);
                thread::spawn(move || there.walk(cpu))
            });
            if waits {
                shared.0.wait_and_let_go();
                shared.take_apart();
            } else if shared.0.let_go() {
                shared.take_apart();
            }
            for walk in walks {
                walk.join().unwrap();
            }
            assert!(!shared.0.enter());
            // SAFETY: all threads have ended.
            shared.2.with(|gone| assert!(unsafe { *gone }));
        });
    }

    // The registry could not be had: the last of two walks that look takes it apart.
    loom::model(|| {
        let shared = Arc::new(Shared(
            Users::new(),
            std::array::from_fn(|_| UnsafeCell::new(0)),
            UnsafeCell::new(false),
        ));
        assert!(shared.0.let_go());
        shared.0.abandon();
        let there = Arc::clone(&shared);
        let other = thread::spawn(move || there.walk(1));
        shared.walk(0);
        other.join().unwrap();
        assert!(!shared.0.enter());
        // SAFETY: all threads have ended.
        shared.2.with(|gone| assert!(unsafe { *gone }));
    });
}
