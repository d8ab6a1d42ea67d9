//! Checks of [`RawLock`], clauses `K1` to `K3`.

use kmem_hal::RawLock;
use kmem_hal::sync::{AtomicU32, LocalU64, Ordering};

use super::{Contexts, Report};

const NAME: &str = "RawLock";

#[cfg(not(loom))]
fn new<L: RawLock>() -> L {
    L::INIT
}

#[cfg(loom)]
fn new<L: RawLock>() -> L {
    L::init()
}

/// Checks the lock type in as many contexts as there are.
///
/// `interrupts_on` tells whether interrupts are on in the calling context; with `None`, `K3` is not checked.
pub fn check<L: RawLock + Sync>(
    report: &Report,
    contexts: &dyn Contexts,
    interrupts_on: Option<&dyn Fn() -> bool>,
) {
    let lock = new::<L>();
    alone(report, &lock, interrupts_on);

    let inside = AtomicU32::new(0);
    let count = LocalU64::new(0);
    let taken = AtomicU32::new(0);
    let overlaps = AtomicU32::new(0);
    let attempts = AtomicU32::new(0);
    contexts.run(&|context| {
        for round in 0..contexts.rounds() {
            attempts.fetch_add(1, Ordering::Relaxed);
            // Every context takes both ways.
            let state = if (context + round) % 2 == 0 {
                Some(lock.lock())
            } else {
                lock.try_lock()
            };
            let Some(state) = state else { continue };
            let others = inside.fetch_add(1, Ordering::Relaxed);
            if others != 0 {
                overlaps.fetch_add(1, Ordering::Relaxed);
            }
            report.check(NAME, "K1", others == 0, || {
                "two contexts held the lock at the same time".into()
            });
            let before = count.get();
            let attempted = attempts.load(Ordering::Relaxed);
            contexts.wait_for(&|| attempts.load(Ordering::Relaxed) > attempted);
            count.set(before + 1);
            taken.fetch_add(1, Ordering::Relaxed);
            inside.fetch_sub(1, Ordering::Relaxed);
            // SAFETY: taken above, with this state.
            unsafe { lock.unlock(state) };
        }
    });
    if overlaps.load(Ordering::SeqCst) == 0 {
        let (count, taken) = (count.get(), u64::from(taken.load(Ordering::SeqCst)));
        report.check(NAME, "K2", count == taken, || {
            format!("{taken} plain increments under the lock gave {count}: a holder did not see what the one before wrote")
        });
    }
}

fn alone<L: RawLock>(report: &Report, lock: &L, interrupts_on: Option<&dyn Fn() -> bool>) {
    let before = interrupts_on.map(|on| on());
    let Some(state) = lock.try_lock() else {
        report.check(NAME, "K1", false, || "a new lock is not free".into());
        return;
    };
    if let Some(on) = interrupts_on {
        report.check(NAME, "K3", !on(), || {
            "interrupts are on while the lock is held".into()
        });
    } else {
        report.skip(NAME, "K3", "nothing tells whether interrupts are on");
    }
    // A second way in, while it is held.
    if let Some(second) = lock.try_lock() {
        report.check(NAME, "K1", false, || {
            "try_lock succeeded on a lock that is held".into()
        });
        // SAFETY: taken just now.
        unsafe { lock.unlock(second) };
    } else {
        report.check(NAME, "K1", true, String::new);
        if let Some(on) = interrupts_on {
            report.check(NAME, "K3", !on(), || {
                "a try_lock that failed switched interrupts on under the holder".into()
            });
        }
    }
    // SAFETY: taken above.
    unsafe { lock.unlock(state) };
    if let Some(on) = interrupts_on {
        report.check(NAME, "K3", Some(on()) == before, || {
            "unlock did not restore the interrupt flag".into()
        });
    }
    if let Some(state) = lock.try_lock() {
        // SAFETY: taken just now.
        unsafe { lock.unlock(state) };
    } else {
        report.check(NAME, "K1", false, || {
            "the lock is not free after unlock".into()
        });
    }
}
