//! Models of the lock in a VMA: readers and the writer exclude each other, and one increment releases all.
#![cfg(loom)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use kmem_hal::sync::{UnsafeCell, spin_loop};
use kmem_vma_tree::{LockPlant, SpaceSeq, VmaLock};

struct Space {
    seq: SpaceSeq,
    locks: [VmaLock; 2],
    /// What the locks guard. loom ends the model when a reader is inside beside the writer.
    data: [UnsafeCell<u64>; 2],
}

// SAFETY: that the cells are reached by readers or by one writer is what the model checks.
unsafe impl Sync for Space {}
// SAFETY: as above.
unsafe impl Send for Space {}

fn explore(bug: LockPlant, readers: usize) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(3));
    builder.check(move || {
        let space = Arc::new(Space {
            seq: SpaceSeq::with_bug(bug),
            locks: [VmaLock::with_bug(bug), VmaLock::with_bug(bug)],
            data: [UnsafeCell::new(0), UnsafeCell::new(0)],
        });
        let threads: Vec<_> = (0..readers)
            .map(|at| {
                let space = Arc::clone(&space);
                loom::thread::spawn(move || {
                    let at = at % 2;
                    if let Some(guard) = space.locks[at].try_read(&space.seq) {
                        // SAFETY: the model's question: the guard keeps the writer out.
                        let value = space.data[at].with(|data| unsafe { *data });
                        assert!(value == 0 || value == 2, "half of a change: {value}");
                        drop(guard);
                    }
                })
            })
            .collect();
        for (lock, data) in space.locks.iter().zip(&space.data) {
            lock.start_write(&space.seq, &mut spin_loop);
            // SAFETY: the model's question: the lock keeps readers out.
            data.with_mut(|data| unsafe { *data = 1 });
        }
        for data in &space.data {
            // SAFETY: as above: both stay locked until the end.
            data.with_mut(|data| unsafe { *data = 2 });
        }
        space.seq.end_write_all();
        for thread in threads {
            thread.join().unwrap();
        }
        assert!(space.locks.iter().all(|lock| lock.readers() == 0));
        let after = space.locks[0].try_read(&space.seq);
        assert!(after.is_some(), "one increment releases all");
    });
}

#[test]
fn readers_and_writer_exclude_each_other() {
    explore(LockPlant::Nothing, 1);
}

#[test]
fn two_readers_of_two_vmas() {
    explore(LockPlant::Nothing, 2);
}

fn finds(bug: LockPlant) {
    let found = catch_unwind(AssertUnwindSafe(|| explore(bug, 1)));
    assert!(found.is_err(), "the model does not find {bug:?}");
}

#[test]
fn a_writer_that_does_not_close_the_count_is_found() {
    finds(LockPlant::StaysOpen);
}

#[test]
fn a_writer_that_waits_without_acquire_is_found() {
    finds(LockPlant::NoWaitAcquire);
}

#[test]
fn a_writer_that_opens_the_count_without_release_is_found() {
    finds(LockPlant::NoOpenRelease);
}

#[test]
fn a_writer_that_ends_without_release_is_found() {
    finds(LockPlant::NoEndRelease);
}

#[test]
fn a_reader_that_enters_without_acquire_is_found() {
    finds(LockPlant::NoEnterAcquire);
}

#[test]
fn a_reader_that_checks_without_acquire_is_found() {
    finds(LockPlant::NoCheckAcquire);
}

#[test]
fn a_reader_that_leaves_without_release_is_found() {
    finds(LockPlant::NoLeaveRelease);
}
