//! Checks of [`Clock`], clause `N1`.

use kmem_hal::Clock;
use kmem_hal::sync::{AtomicU64, Ordering};

use super::{Contexts, Report};

/// Checks that no context sees time before what another one has seen.
pub fn check<C: Clock + Sync>(report: &Report, contexts: &dyn Contexts, clock: &C) {
    let latest = AtomicU64::new(0);
    contexts.run(&|_| {
        for _ in 0..contexts.rounds().saturating_mul(100) {
            let before = latest.load(Ordering::Acquire);
            let now = clock.now();
            report.check("Clock", "N1", now >= before, || {
                format!("the clock went from {before} back to {now}")
            });
            latest.fetch_max(now, Ordering::AcqRel);
        }
    });
}
