//! Locks whose holder may sleep, and waiting itself.
//!
//! The write lock of an address space is held across page-table work and allocation that may wait, so a kernel
//! with a scheduler gives a lock that puts the waiter to sleep. A kernel without one, and tests, use [`SpinWait`].

use core::fmt;
use core::ops::{Deref, DerefMut};

use crate::sync::{AtomicU32, Ordering, UnsafeCell, spin_loop};

/// A reader-writer lock whose waiters may sleep.
///
/// # Safety
///
/// - `S1`: while a writer holds the lock nobody else does; readers may share it.
/// - `S2`: what a writer wrote is visible to every later holder.
/// - `S3`: it is not taken in interrupts, nor under a [`RawLock`](super::RawLock).
pub unsafe trait RawSleepLock {
    /// A lock that is free.
    #[cfg(not(loom))]
    const INIT: Self;

    /// A lock that is free.
    #[cfg(loom)]
    fn init() -> Self;

    /// Waits until no writer holds the lock, and shares it.
    fn lock_shared(&self);

    /// Shares the lock if no writer holds it now.
    fn try_lock_shared(&self) -> bool;

    /// Lets a share go.
    ///
    /// # Safety
    ///
    /// The caller holds a share.
    unsafe fn unlock_shared(&self);

    /// Waits until nobody holds the lock, and takes it alone.
    fn lock_exclusive(&self);

    /// Takes the lock alone if nobody holds it now.
    fn try_lock_exclusive(&self) -> bool;

    /// Lets the lock go.
    ///
    /// # Safety
    ///
    /// The caller holds it alone.
    unsafe fn unlock_exclusive(&self);
}

/// Sleeping until something happened: I/O, a page lock, a table being copied.
///
/// - `S4`: [`wait_until`](Self::wait_until) returns only after `done()` gave `true`, and asks again after every
///   [`wake`](Self::wake) of its key that came after the question before.
pub trait Wait {
    /// Returns once `done()` holds. `key` names what is waited for; [`wake`](Self::wake) with the same key makes the
    /// kernel ask again. Spurious returns are not allowed, spurious questions are.
    #[doc(alias = "wait_event")]
    fn wait_until(&self, key: usize, done: &dyn Fn() -> bool);

    /// Makes every waiter of `key` ask again.
    #[doc(alias = "wake_up_all")]
    fn wake(&self, key: usize);
}

/// Waits by spinning: for kernels without a scheduler, and tests.
#[derive(Debug)]
pub struct SpinWait {
    /// Shares held, or `WRITER`.
    state: AtomicU32,
}

const WRITER: u32 = u32::MAX;

impl Wait for SpinWait {
    fn wait_until(&self, _key: usize, done: &dyn Fn() -> bool) {
        while !done() {
            spin_loop();
        }
    }

    fn wake(&self, _key: usize) {}
}

// SAFETY: S1: the state is 0, a number of shares, or WRITER, and moves by compare-and-exchange from the values that
// allow it; S2: acquire pairs with release.
unsafe impl RawSleepLock for SpinWait {
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
            spin_loop();
        }
    }

    fn try_lock_shared(&self) -> bool {
        self.state
            .fetch_update(Ordering::Acquire, Ordering::Relaxed, |held| {
                if held < WRITER - 1 {
                    Some(held + 1)
                } else {
                    None
                }
            })
            .is_ok()
    }

    unsafe fn unlock_shared(&self) {
        self.state.fetch_sub(1, Ordering::Release);
    }

    fn lock_exclusive(&self) {
        while !self.try_lock_exclusive() {
            spin_loop();
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

/// A value behind a [`RawSleepLock`].
pub struct SleepLock<T, L> {
    raw: L,
    value: UnsafeCell<T>,
}

// SAFETY: S1 and S2: the value is shared among readers or reached by one writer.
unsafe impl<T: Send + Sync, L: Sync> Sync for SleepLock<T, L> {}
// SAFETY: whoever owns the lock owns the value.
unsafe impl<T: Send, L: Send> Send for SleepLock<T, L> {}

impl<T, L: RawSleepLock> SleepLock<T, L> {
    /// Puts `value` behind a free lock.
    #[cfg(not(loom))]
    pub const fn new(value: T) -> Self {
        Self {
            raw: L::INIT,
            value: UnsafeCell::new(value),
        }
    }

    /// Puts `value` behind a free lock.
    #[cfg(loom)]
    pub fn new(value: T) -> Self {
        Self {
            raw: L::init(),
            value: UnsafeCell::new(value),
        }
    }

    /// Waits until no writer holds the lock.
    pub fn read(&self) -> SleepReadGuard<'_, T, L> {
        self.raw.lock_shared();
        SleepReadGuard { lock: self }
    }

    /// Waits until nobody holds the lock.
    pub fn write(&self) -> SleepWriteGuard<'_, T, L> {
        self.raw.lock_exclusive();
        SleepWriteGuard { lock: self }
    }

    /// Shares the lock if no writer holds it now.
    pub fn try_read(&self) -> Option<SleepReadGuard<'_, T, L>> {
        self.raw
            .try_lock_shared()
            .then(|| SleepReadGuard { lock: self })
    }

    /// Takes the lock alone if nobody holds it now.
    pub fn try_write(&self) -> Option<SleepWriteGuard<'_, T, L>> {
        self.raw
            .try_lock_exclusive()
            .then(|| SleepWriteGuard { lock: self })
    }

    /// The value, where no one else can hold the lock.
    pub fn get_mut(&mut self) -> &mut T {
        // SAFETY: the exclusive borrow keeps every guard away.
        self.value.with_mut(|value| unsafe { &mut *value })
    }
}

impl<T, L> fmt::Debug for SleepLock<T, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SleepLock(..)")
    }
}

/// Shared access to a [`SleepLock`]'s value.
pub struct SleepReadGuard<'a, T, L: RawSleepLock> {
    lock: &'a SleepLock<T, L>,
}

impl<T, L: RawSleepLock> Deref for SleepReadGuard<'_, T, L> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: S1: no writer while this guard lives.
        self.lock.value.with(|value| unsafe { &*value })
    }
}

impl<T, L: RawSleepLock> Drop for SleepReadGuard<'_, T, L> {
    fn drop(&mut self) {
        // SAFETY: this guard holds a share.
        unsafe { self.lock.raw.unlock_shared() }
    }
}

/// Exclusive access to a [`SleepLock`]'s value.
pub struct SleepWriteGuard<'a, T, L: RawSleepLock> {
    lock: &'a SleepLock<T, L>,
}

impl<T, L: RawSleepLock> Deref for SleepWriteGuard<'_, T, L> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: S1: this guard holds the lock alone.
        self.lock.value.with(|value| unsafe { &*value })
    }
}

impl<T, L: RawSleepLock> DerefMut for SleepWriteGuard<'_, T, L> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: S1: this guard holds the lock alone, and is borrowed exclusively.
        self.lock.value.with_mut(|value| unsafe { &mut *value })
    }
}

impl<T, L: RawSleepLock> Drop for SleepWriteGuard<'_, T, L> {
    fn drop(&mut self) {
        // SAFETY: this guard holds the lock alone.
        unsafe { self.lock.raw.unlock_exclusive() }
    }
}
