//! The lock of a host: spins a little, then lets another thread run.
//!
//! A holder may have been preempted, which a kernel's spin lock never sees; spinning on would waste its time slice.

use kmem_hal::{RawLock, Spin};

/// Tries before the processor is given away.
const TRIES: u32 = 100;

/// A spin lock that yields.
#[derive(Debug)]
pub struct HostLock {
    spin: Spin,
}

// SAFETY: K1 and K2 are `Spin`'s; K3: signal handlers never wait for a lock that they interrupted (kmem's paths see to it).
unsafe impl RawLock for HostLock {
    type State = ();

    #[cfg(not(loom))]
    const INIT: Self = Self { spin: Spin::INIT };

    #[cfg(loom)]
    fn init() -> Self {
        Self { spin: Spin::init() }
    }

    #[inline]
    fn lock(&self) {
        if self.spin.try_lock().is_none() {
            self.wait();
        }
    }

    #[inline]
    fn try_lock(&self) -> Option<()> {
        self.spin.try_lock()
    }

    #[inline]
    unsafe fn unlock(&self, state: ()) {
        // SAFETY: the caller holds this lock and so the inner one.
        unsafe { self.spin.unlock(state) }
    }
}

impl HostLock {
    #[cold]
    fn wait(&self) {
        loop {
            for _ in 0..TRIES {
                if self.spin.try_lock().is_some() {
                    return;
                }
                std::hint::spin_loop();
            }
            // SAFETY: has no preconditions.
            unsafe { libc::sched_yield() };
        }
    }
}
