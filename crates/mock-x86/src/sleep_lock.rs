//! A reader-writer lock and a wait for code on virtual CPUs: sleeping is letting the other CPUs run.
//!
//! As [`MachineLock`](crate::MachineLock), but interrupts stay on, since the holder may sleep.
//!
//! Invariant `I1`: `state` is the number of shares held, or [`WRITER`].

use std::sync::atomic::{AtomicU32, Ordering};

use kmem_hal::{RawSleepLock, Wait};

use crate::sched;

const WRITER: u32 = u32::MAX;

/// A lock that may be held while its holder waits, and a [`Wait`].
#[derive(Debug)]
pub struct MachineSleepLock {
    state: AtomicU32,
}

/// Lets others run: virtual CPUs under a schedule, host threads otherwise.
fn rest() {
    if !sched::spin_point() {
        std::thread::yield_now();
    }
}

// SAFETY: S1: I1, and the state moves by compare-and-exchange only from values that allow it; S2: acquire pairs with release; S3 is the
// user's.
unsafe impl RawSleepLock for MachineSleepLock {
    #[cfg(not(loom))]
    const INIT: Self = Self {
        state: AtomicU32::new(0),
    };

    #[cfg(loom)]
    fn init() -> Self {
        Self {
            state: AtomicU32::new(0),
        }
    }

    fn lock_shared(&self) {
        while !self.try_lock_shared() {
            rest();
        }
    }

    fn try_lock_shared(&self) -> bool {
        let more = |held| (held < WRITER - 1).then(|| held + 1);
        self.state
            .fetch_update(Ordering::Acquire, Ordering::Relaxed, more)
            .is_ok()
    }

    unsafe fn unlock_shared(&self) {
        self.state.fetch_sub(1, Ordering::Release);
    }

    fn lock_exclusive(&self) {
        while !self.try_lock_exclusive() {
            rest();
        }
    }

    fn try_lock_exclusive(&self) -> bool {
        self.state
            .compare_exchange(0, WRITER, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
    }

    unsafe fn unlock_exclusive(&self) {
        self.state.store(0, Ordering::Release);
    }
}

impl Wait for MachineSleepLock {
    fn wait_until(&self, _key: usize, done: &dyn Fn() -> bool) {
        while !done() {
            rest();
        }
    }

    fn wake(&self, _key: usize) {}
}
