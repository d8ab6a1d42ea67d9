//! What operations cost in locked instructions and stores to shared lines, and what interrupts between any two of
//! their steps do to them.
#![cfg(kmem_counting)]

use core::ptr::NonNull;
use std::cell::Cell;

use kmem_hal::sync::{
    AtomicU64, Counts, LocalU64, Ordering, counts, fence, reset_counts, with_interrupt,
};
use kmem_hal::{
    CachePadded, Cpu, Deferred, EpochArea, EpochGrace, FixedPool, FrameSlot, FrameTag, Grace, Lock,
    ObjectAlloc, Order, Page, PerCpu, SingleCpu, SingleGrace, Spin, TableSlot, UserSlot,
};

fn cost<R>(f: impl FnOnce() -> R) -> (u64, u64) {
    reset_counts();
    let kept = f();
    let Counts { locked, stores } = counts();
    drop(kept);
    (locked, stores)
}

fn cpu() -> SingleCpu {
    // SAFETY: each test is one thread with values of its own.
    unsafe { SingleCpu::new() }
}

#[test]
fn counting_the_words_themselves() {
    let shared = AtomicU64::new(0);
    assert_eq!(cost(|| shared.load(Ordering::SeqCst)), (0, 0));
    assert_eq!(cost(|| shared.store(1, Ordering::Release)), (0, 1));
    assert_eq!(cost(|| shared.store(1, Ordering::SeqCst)), (1, 0));
    assert_eq!(cost(|| shared.fetch_or(1, Ordering::Relaxed)), (1, 0));
    assert_eq!(cost(|| shared.swap(1, Ordering::Relaxed)), (1, 0));
    assert_eq!(cost(|| fence(Ordering::SeqCst)), (1, 0));
    assert_eq!(cost(|| fence(Ordering::AcqRel)), (0, 0));
}

#[test]
fn counting_per_cpu_words_are_free_of_locked_instructions() {
    let areas = [CachePadded::new(LocalU64::new(0))];
    let words = PerCpu::new(&areas);
    let cpu = cpu();
    let spent = cost(|| {
        let pin = cpu.pin();
        let own = words.get_own(&pin).unwrap();
        own.set(own.get() + 1);
    });
    assert_eq!(spent, (0, 0));
}

#[test]
fn counting_a_fixed_pool_takes_one_locked_instruction_each_way() {
    let pool = FixedPool::<u64, 64>::new();
    let mut object = None;
    assert_eq!(cost(|| object = pool.alloc().ok()), (1, 0));
    // SAFETY: from the pool, freed once.
    assert_eq!(cost(|| unsafe { pool.free(object.unwrap()) }), (1, 0));
}

#[test]
fn counting_a_lock_takes_one_locked_instruction_and_a_store() {
    let lock = Lock::<u64, Spin>::new(0);
    assert_eq!(cost(|| *lock.lock() += 1), (1, 1));
}

#[test]
fn counting_a_table_slot_changes_its_live_count_with_stores() {
    let slot = FrameSlot::new();
    let table = TableSlot::claim(&slot, 1, Page::ZERO);
    let spent = cost(|| {
        let guard = slot.lock();
        for _ in 0..512 {
            table.set_live(table.live() + 1);
        }
        drop(guard);
    });
    assert_eq!(spent, (2, 512));
}

#[test]
fn counting_later_mappings_of_a_page_take_one_locked_instruction() {
    let slot = FrameSlot::new();
    let page = UserSlot::claim(&slot, FrameTag::Anon, Order::ZERO, 1, 0).unwrap();
    assert_eq!(cost(|| page.add_mapping()), (2, 0));
    assert_eq!(cost(|| page.add_mapping()), (1, 0));
    assert_eq!(cost(|| page.sub_mapping()), (1, 0));
    assert_eq!(cost(|| page.sub_mapping()), (2, 0));
}

#[test]
fn counting_grace_readers() {
    // SAFETY: one thread uses the value.
    let single = unsafe { SingleGrace::new() };
    assert_eq!(cost(|| drop(single.read())), (0, 0));

    let areas = [CachePadded::new(EpochArea::<Spin>::new())];
    let epoch = EpochGrace::<_, Spin>::new(cpu());
    epoch.init(&areas);
    // One fence; the word is stored at both ends.
    assert_eq!(cost(|| drop(epoch.read())), (1, 2));
    let outer = epoch.read();
    assert_eq!(cost(|| drop(epoch.read())), (0, 0));
    drop(outer);
}

unsafe fn count_up(context: *const (), _object: NonNull<()>) {
    // SAFETY: the tests pass a counter that outlives the call.
    let made = unsafe { &*context.cast::<Cell<u32>>() };
    made.set(made.get() + 1);
}

/// An interrupt at every step of a read section: the section still protects, and nothing of it is left behind.
#[test]
fn counting_interrupts_at_every_step_of_an_epoch_reader() {
    let mut steps = 0;
    for at in 1.. {
        let areas = [CachePadded::new(EpochArea::<Spin>::new())];
        let grace = EpochGrace::<_, Spin>::new(cpu());
        grace.init(&areas);
        let (task, nested) = (Cell::new(0), Cell::new(0));
        // Whether a call deferred now is kept back while the caller's guard lives.
        let protected = |made: &Cell<u32>| {
            let context = core::ptr::from_ref(made).cast();
            // SAFETY: both counters outlive the queue, which is drained below.
            let call = unsafe { Deferred::new(count_up, context, NonNull::dangling()) };
            grace.defer(call).unwrap();
            for _ in 0..4 {
                grace.poll();
            }
            made.get() == 0
        };
        let mut interrupt = || {
            let guard = grace.read();
            assert!(protected(&nested), "step {at}: the interrupt's own section");
            drop(guard);
        };
        let ((), fired) = with_interrupt(at, &mut interrupt, || {
            let guard = grace.read();
            let inner = grace.read();
            drop(guard);
            // The check makes hundreds of steps that are not the reader's: none of them is interrupted.
            let (kept, _) = with_interrupt(u64::MAX, &mut || {}, || protected(&task));
            assert!(kept, "step {at}: the interrupted section");
            drop(inner);
        });
        for _ in 0..4 {
            grace.poll();
        }
        assert_eq!(grace.pending(), 0, "step {at}: a section was left open");
        assert_eq!((task.get(), nested.get()), (1, u32::from(fired)));
        if !fired {
            break;
        }
        steps = at;
    }
    assert!(steps > 15, "only {steps} steps were interrupted");
}
