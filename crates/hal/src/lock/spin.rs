//! A plain spin lock: for code that no interrupt enters, and for hosts.
//!
//! The default build uses the `spin` crate; shuttle and the counting backend a few lines over the facade, so that they see
//! the lock's atomics. Under loom it is loom's mutex: a thread that spins gives loom nothing but endless paths, while
//! a thread that is blocked gives it none.

use super::RawLock;

/// Spins until the lock is free. Interrupts are left as they are.
#[derive(Debug)]
pub struct Spin {
    #[cfg(not(any(loom, shuttle, kmem_counting)))]
    inner: spin::mutex::SpinMutex<()>,
    #[cfg(all(any(shuttle, kmem_counting), not(loom)))]
    held: crate::sync::AtomicBool,
    #[cfg(loom)]
    inner: loom::sync::Mutex<()>,
    /// The guard of whoever holds `inner`, which borrows it.
    #[cfg(loom)]
    guard: core::cell::UnsafeCell<Option<loom::sync::MutexGuard<'static, ()>>>,
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

#[cfg(all(any(shuttle, kmem_counting), not(loom)))]
use crate::sync::{AtomicBool, Ordering, spin_loop};

#[cfg(all(any(shuttle, kmem_counting), not(loom)))]
// SAFETY: K1: only the exchange false -> true takes the lock; K2: acquire pairs with the release in `unlock`.
unsafe impl RawLock for Spin {
    type State = ();

    const INIT: Self = Self {
        held: AtomicBool::new(false),
    };

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

// SAFETY: `guard` is touched by the holder of `inner` only.
#[cfg(loom)]
unsafe impl Sync for Spin {}
// SAFETY: loom runs all threads of a model on one thread of the host.
#[cfg(loom)]
unsafe impl Send for Spin {}

#[cfg(loom)]
impl Spin {
    fn keep(&self, guard: loom::sync::MutexGuard<'_, ()>) {
        // SAFETY: only the lifetime changes; `unlock` drops the guard before the mutex dies.
        let guard: loom::sync::MutexGuard<'static, ()> = unsafe { core::mem::transmute(guard) };
        // SAFETY: the caller holds `inner`.
        unsafe { *self.guard.get() = Some(guard) };
    }
}

#[cfg(loom)]
// SAFETY: K1, K2: loom's mutex; K3 as in the other builds.
unsafe impl RawLock for Spin {
    type State = ();

    fn init() -> Self {
        Self {
            inner: loom::sync::Mutex::new(()),
            guard: core::cell::UnsafeCell::new(None),
        }
    }

    fn lock(&self) {
        match self.inner.lock() {
            Ok(guard) => self.keep(guard),
            Err(_) => unreachable!("loom ends the model at a panic"),
        }
    }

    fn try_lock(&self) -> Option<()> {
        self.inner.try_lock().ok().map(|guard| self.keep(guard))
    }

    unsafe fn unlock(&self, _state: ()) {
        // SAFETY: the caller holds `inner`. Taken out before it is dropped: the next holder may run at once.
        drop(unsafe { (*self.guard.get()).take() });
    }
}
