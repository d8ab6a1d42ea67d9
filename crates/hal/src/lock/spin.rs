//! A plain spin lock: for code that no interrupt enters, and for hosts.
//!
//! The default build uses the `spin` crate; the model builds use a few lines over the facade, so that loom and
//! shuttle see the lock's atomics and the counting backend counts them.

use super::RawLock;

/// Spins until the lock is free. Interrupts are left as they are.
#[derive(Debug)]
pub struct Spin {
    #[cfg(not(any(loom, shuttle, kmem_counting)))]
    inner: spin::mutex::SpinMutex<()>,
    #[cfg(any(loom, shuttle, kmem_counting))]
    held: crate::sync::AtomicBool,
}

#[cfg(not(any(loom, shuttle, kmem_counting)))]
// SAFETY: K1 and K2 are those of `spin`'s mutex; K3 is the user's to judge: the type's name says that it spins.
unsafe impl RawLock for Spin {
    type State = ();

    const INIT: Self = Self {
        inner: spin::mutex::SpinMutex::new(()),
    };

    #[inline]
    fn lock(&self) {
        core::mem::forget(self.inner.lock());
    }

    #[inline]
    fn try_lock(&self) -> Option<()> {
        self.inner.try_lock().map(core::mem::forget)
    }

    #[inline]
    unsafe fn unlock(&self, _state: ()) {
        // SAFETY: the caller holds the lock, whose guard was forgotten.
        unsafe { self.inner.force_unlock() }
    }
}

#[cfg(any(loom, shuttle, kmem_counting))]
use crate::sync::{AtomicBool, Ordering, spin_loop};

#[cfg(any(loom, shuttle, kmem_counting))]
// SAFETY: K1: only the exchange false -> true takes the lock; K2: acquire pairs with the release in `unlock`.
unsafe impl RawLock for Spin {
    type State = ();

    #[cfg(not(loom))]
    const INIT: Self = Self {
        held: AtomicBool::new(false),
    };

    #[cfg(loom)]
    fn init() -> Self {
        Self {
            held: AtomicBool::new(false),
        }
    }

    fn lock(&self) {
        while self.try_lock().is_none() {
            spin_loop();
        }
    }

    fn try_lock(&self) -> Option<()> {
        self.held
            .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
            .ok()
            .map(|_| ())
    }

    unsafe fn unlock(&self, _state: ()) {
        self.held.store(false, Ordering::Release);
    }
}
