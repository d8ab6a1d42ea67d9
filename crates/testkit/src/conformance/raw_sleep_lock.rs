//! Checks of [`RawSleepLock`] and [`Wait`], clauses `S1`, `S2`, `S4` (`S3` binds callers, not implementers).

use kmem_hal::sync::{AtomicU32, LocalU64, Ordering};
use kmem_hal::{RawSleepLock, Wait};

use super::{Contexts, Report};

const NAME: &str = "RawSleepLock";

#[cfg(not(loom))]
fn new<L: RawSleepLock>() -> L {
    L::INIT
}

#[cfg(loom)]
fn new<L: RawSleepLock>() -> L {
    L::init()
}

/// Checks the lock type in as many contexts as there are.
pub fn check<L: RawSleepLock + Sync>(report: &Report, contexts: &dyn Contexts) {
    let lock = new::<L>();
    alone(report, &lock);

    let (readers, writers) = (AtomicU32::new(0), AtomicU32::new(0));
    let count = LocalU64::new(0);
    let written = AtomicU32::new(0);
    let overlaps = AtomicU32::new(0);
    let attempts = AtomicU32::new(0);
    contexts.run(&|context| {
        for round in 0..contexts.rounds() {
            attempts.fetch_add(1, Ordering::Relaxed);
            if (context + round) % 2 == 0 {
                lock.lock_exclusive();
                let others =
                    writers.fetch_add(1, Ordering::Relaxed) + readers.load(Ordering::Relaxed);
                if others != 0 {
                    overlaps.fetch_add(1, Ordering::Relaxed);
                }
                report.check(NAME, "S1", others == 0, || {
                    "somebody else held the lock while a writer did".into()
                });
                let before = count.get();
                let attempted = attempts.load(Ordering::Relaxed);
                contexts.wait_for(&|| attempts.load(Ordering::Relaxed) > attempted);
                count.set(before + 1);
                written.fetch_add(1, Ordering::Relaxed);
                writers.fetch_sub(1, Ordering::Relaxed);
                // SAFETY: taken above.
                unsafe { lock.unlock_exclusive() };
            } else {
                lock.lock_shared();
                readers.fetch_add(1, Ordering::Relaxed);
                let writing = writers.load(Ordering::Relaxed);
                if writing != 0 {
                    overlaps.fetch_add(1, Ordering::Relaxed);
                }
                report.check(NAME, "S1", writing == 0, || {
                    "a reader was let in while a writer held the lock".into()
                });
                readers.fetch_sub(1, Ordering::Relaxed);
                // SAFETY: taken above.
                unsafe { lock.unlock_shared() };
            }
        }
    });
    if overlaps.load(Ordering::SeqCst) == 0 {
        let (count, written) = (count.get(), u64::from(written.load(Ordering::SeqCst)));
        report.check(NAME, "S2", count == written, || {
            format!("{written} plain increments by writers gave {count}: a writer did not see what the one before wrote")
        });
    }
}

fn alone<L: RawSleepLock>(report: &Report, lock: &L) {
    lock.lock_shared();
    if !report.check(NAME, "S1", !lock.try_lock_exclusive(), || {
        "a writer was let in while a reader held the lock".into()
    }) {
        // SAFETY: taken just now.
        unsafe { lock.unlock_exclusive() };
    }
    if report.check(NAME, "S1", lock.try_lock_shared(), || {
        "readers do not share the lock".into()
    }) {
        // SAFETY: taken just now.
        unsafe { lock.unlock_shared() };
    }
    // SAFETY: taken above.
    unsafe { lock.unlock_shared() };
    lock.lock_exclusive();
    if !report.check(NAME, "S1", !lock.try_lock_shared(), || {
        "a reader was let in while a writer held the lock".into()
    }) {
        // SAFETY: taken just now.
        unsafe { lock.unlock_shared() };
    }
    if !report.check(NAME, "S1", !lock.try_lock_exclusive(), || {
        "two writers held the lock".into()
    }) {
        // SAFETY: taken just now.
        unsafe { lock.unlock_exclusive() };
    }
    // SAFETY: taken above.
    unsafe { lock.unlock_exclusive() };
}

/// Checks a way to wait: with two contexts or more, one waits for what another does.
pub fn check_wait(report: &Report, contexts: &dyn Contexts, wait: &(dyn Wait + Sync)) {
    let asked = AtomicU32::new(0);
    wait.wait_until(1, &|| asked.fetch_add(1, Ordering::Relaxed) >= 2);
    let questions = asked.load(Ordering::Relaxed);
    report.check("Wait", "S4", questions >= 3, || {
        format!("wait_until returned after {questions} questions; the third one says yes")
    });
    if contexts.count() < 2 {
        return;
    }
    let done = AtomicU32::new(0);
    contexts.run(&|context| {
        if context == 0 {
            done.store(1, Ordering::Release);
            wait.wake(7);
        } else {
            wait.wait_until(7, &|| done.load(Ordering::Acquire) == 1);
            let done = done.load(Ordering::Relaxed);
            report.check("Wait", "S4", done == 1, || {
                "wait_until returned before what it was to wait for".into()
            });
        }
    });
}
