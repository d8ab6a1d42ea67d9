//! Checks of [`Grace`], clauses `G1` to `G3` and `G5`.
//!
//! `G4` says which lines a reader writes; no test sees that. hal counts stores of its own implementations instead.

use std::ptr::NonNull;

use kmem_hal::sync::{AtomicU32, AtomicUsize, Ordering};
use kmem_hal::{Deferred, Grace};

use super::{Contexts, Report};

const NAME: &str = "Grace";

unsafe fn count_call(context: *const (), _object: NonNull<()>) {
    // SAFETY: the checks pass a counter that outlives the call, since they end with `synchronize`.
    unsafe { &*context.cast::<AtomicUsize>() }.fetch_add(1, Ordering::Relaxed);
}

fn call(made: &AtomicUsize) -> Deferred {
    let context = std::ptr::from_ref(made).cast();
    // SAFETY: counting is sound from anywhere; the counter outlives the grace period.
    unsafe { Deferred::new(count_call, context, NonNull::dangling()) }
}

/// Checks `grace` in as many contexts as there are.
pub fn check<G: Grace + Sync>(report: &Report, contexts: &dyn Contexts, grace: &G) {
    alone(report, grace);
    if contexts.count() > 1 {
        check_readers(report, contexts, grace);
    }
    report.skip(NAME, "G4", "no test sees which line a reader writes");
}

fn alone<G: Grace>(report: &Report, grace: &G) {
    let made = AtomicUsize::new(0);
    let outer = grace.read();
    let inner = grace.read();
    if grace.defer(call(&made)).is_err() {
        report.check(NAME, "G1", grace.pending() > 0, || {
            "an empty queue refused a call".into()
        });
        drop((outer, inner));
        return;
    }
    for _ in 0..8 {
        grace.poll();
    }
    let early = made.load(Ordering::Relaxed);
    report.check(NAME, "G1", early == 0, || {
        "a deferred call was made while a guard from before it lived".into()
    });
    // Out of order on purpose: guards are values.
    drop(outer);
    for _ in 0..8 {
        grace.poll();
    }
    let early = made.load(Ordering::Relaxed);
    report.check(NAME, "G5", early == 0, || {
        "a deferred call was made while the inner of two nested guards lived".into()
    });
    drop(inner);
    grace.synchronize();
    let times = made.load(Ordering::Relaxed);
    report.check(NAME, "G1", times == 1, || {
        format!("a deferred call was made {times} times when synchronize had returned")
    });

    // A full queue gives the call back, and takes it again after a grace period.
    let made = AtomicUsize::new(0);
    let mut taken = 0;
    let guard = grace.read();
    let refused = loop {
        match grace.defer(call(&made)) {
            Ok(()) => taken += 1,
            Err(call) => break Some(call),
        }
        if taken == 4096 {
            break None;
        }
    };
    drop(guard);
    grace.synchronize();
    if let Some(call) = refused {
        let again = grace.defer(call);
        if report.check(NAME, "G1", again.is_ok(), || {
            "a queue that synchronize has emptied refused a call".into()
        }) {
            taken += 1;
        }
        grace.synchronize();
    }
    let times = made.load(Ordering::Relaxed);
    report.check(NAME, "G1", times == taken && grace.pending() == 0, || {
        format!(
            "{taken} calls were taken, {times} made, {} are pending",
            grace.pending()
        )
    });
}

/// The part of the check that needs two contexts or more, small enough for loom: readers look at a slot, a writer
/// moves them to the next one and reuses the old.
pub fn check_readers<G: Grace + Sync>(report: &Report, contexts: &dyn Contexts, grace: &G) {
    let head = AtomicUsize::new(0);
    let readers: [AtomicU32; 2] = [AtomicU32::new(0), AtomicU32::new(0)];
    let (writes, ended) = (AtomicU32::new(0), AtomicU32::new(0));
    contexts.run(&|context| {
        for round in 0..contexts.rounds() {
            if context == 0 {
                let old = head.load(Ordering::Relaxed);
                // Somebody should be inside; where nobody comes, the round shows nothing.
                contexts.wait_for(&|| readers[old].load(Ordering::Relaxed) != 0);
                head.store(1 - old, Ordering::Release);
                writes.fetch_add(1, Ordering::Relaxed);
                grace.synchronize();
                // A relaxed load may read the past, where G3 does not bring what readers did; an addition never does.
                let seen = readers[old].load(Ordering::Relaxed);
                let left = readers[old].fetch_add(0, Ordering::Relaxed);
                report.check(NAME, "G2", left == 0, || {
                    format!("synchronize returned while {left} guards from before it lived")
                });
                report.check(NAME, "G3", seen == left, || {
                    "what a reader did under its guard is not visible after synchronize".into()
                });
                ended.fetch_add(1, Ordering::Relaxed);
            } else {
                let guard = grace.read();
                let slot = head.load(Ordering::Acquire);
                readers[slot].fetch_add(1, Ordering::Relaxed);
                // Until the writer waits, and then a little: or until it came back, which it must not.
                contexts.wait_for(&|| writes.load(Ordering::Relaxed) > round);
                contexts.wait_for(&|| ended.load(Ordering::Relaxed) > round);
                readers[slot].fetch_sub(1, Ordering::Relaxed);
                drop(guard);
            }
        }
    });
}
