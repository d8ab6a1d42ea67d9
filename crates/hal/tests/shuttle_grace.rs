//! Random schedules of more readers, writers and rounds than loom can bear.
#![cfg(shuttle)]

use std::ptr::NonNull;
use std::sync::Arc;

use kmem_hal::sync::{AtomicUsize, Ordering};
use kmem_hal::{CachePadded, Deferred, EpochArea, EpochGrace, Grace, Spin};
use kmem_testkit::model::ModelCpu;

const SLOTS: usize = 4;
const READERS: u32 = 3;
const ROUNDS: usize = 6;

struct World {
    grace: EpochGrace<'static, ModelCpu, Spin, 4>,
    head: AtomicUsize,
    /// Odd while a slot is being reused.
    slots: [AtomicUsize; SLOTS],
    reused: AtomicUsize,
}

unsafe fn reuse(context: *const (), object: NonNull<()>) {
    // SAFETY: the world outlives the schedule's threads.
    let world = unsafe { &*context.cast::<World>() };
    let slot = &world.slots[object.as_ptr().addr() - 1];
    slot.fetch_add(1, Ordering::Relaxed);
    slot.fetch_add(1, Ordering::Relaxed);
    world.reused.fetch_add(1, Ordering::Relaxed);
}

#[test]
fn shuttle_readers_never_see_reuse() {
    let model = || {
        let areas: &'static [CachePadded<EpochArea<Spin, 4>>] = Vec::leak(
            (0..=READERS)
                .map(|_| CachePadded::new(EpochArea::new()))
                .collect(),
        );
        let world = Arc::new(World {
            grace: EpochGrace::new(ModelCpu::new(READERS + 1)),
            head: AtomicUsize::new(0),
            slots: [const { AtomicUsize::new(0) }; SLOTS],
            reused: AtomicUsize::new(0),
        });
        world.grace.init(areas);
        let readers: Vec<_> = (1..=READERS)
            .map(|cpu| {
                let world = world.clone();
                shuttle::thread::spawn(move || {
                    ModelCpu::bind(cpu);
                    for _ in 0..ROUNDS {
                        let guard = world.grace.read();
                        let slot = &world.slots[world.head.load(Ordering::Acquire)];
                        let before = slot.load(Ordering::Relaxed);
                        let after = slot.load(Ordering::Relaxed);
                        assert_eq!(before, after, "a slot was reused under a reader");
                        drop(guard);
                    }
                })
            })
            .collect();
        for round in 0..ROUNDS {
            let old = world.head.load(Ordering::Relaxed);
            world.head.store((old + 1) % SLOTS, Ordering::Release);
            let context = Arc::as_ptr(&world).cast();
            let object = NonNull::new(std::ptr::without_provenance_mut(old + 1)).unwrap();
            // SAFETY: `reuse` is sound once after a grace period.
            let call = unsafe { Deferred::new(reuse, context, object) };
            assert!(world.grace.defer(call).is_ok());
            if round % 2 == 0 {
                world.grace.poll();
            } else {
                world.grace.synchronize();
                assert_eq!(world.grace.pending(), 0);
            }
            if old + 1 == SLOTS {
                // Slots are linked in again: not before they were reused.
                world.grace.synchronize();
            }
        }
        for reader in readers {
            reader.join().unwrap();
        }
        world.grace.synchronize();
        assert_eq!(world.reused.load(Ordering::Relaxed), ROUNDS);
    };
    shuttle::check_random(model, 300);
    shuttle::check_pct(model, 300, 3);
}
