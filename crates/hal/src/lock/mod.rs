//! Locks: the two methods that a kernel gives, and the data they guard.
//!
//! kmem takes locks on slow paths only. Which lock is the kernel's choice, since only the kernel knows whether an
//! interrupt may enter: [`RawLock`] has two methods and a constructor. [`Spin`] just spins; [`IrqSafe`], the
//! default, also keeps interrupts out. What may sleep (an address space's write lock) is a [`RawSleepLock`].
//!
//! Lock order, outermost first (enforced by [`Ranked`] in debug builds and tests):
//!
//! ```text
//!   mm write lock > VMA > reverse map > page > page table (parent > child) > slab depot > buddy block
//! ```
//!
//! Nothing below the VMA allocates with `Context::MayWait`: allocate, lock, check again.

mod irq_safe;
mod rank;
mod sleep;
mod spin;

use core::fmt;
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};

pub use irq_safe::IrqSafe;
pub use rank::{Rank, RankTracker, Ranked, RankedGuard};
pub use sleep::{RawSleepLock, SleepLock, SleepReadGuard, SleepWriteGuard, SpinWait, Wait};
pub use spin::Spin;

use crate::sync::UnsafeCell;

/// A mutual exclusion that may be held only for short, and never sleeps.
///
/// # Safety
///
/// - `K1`: between the return of `lock` (or a successful `try_lock`) and the call of `unlock`, no other call of `lock`
///   returns and no `try_lock` succeeds.
/// - `K2`: what was written under the lock is visible to the next holder.
/// - `K3`: if the lock can be taken in an interrupt, then `lock` keeps that interrupt out on this CPU until `unlock`.
pub unsafe trait RawLock {
    /// What `unlock` needs to restore, such as the interrupt flag.
    type State;

    /// A lock that is free.
    #[cfg(not(loom))]
    const INIT: Self;

    /// A lock that is free (loom's atomics cannot be made in a constant).
    #[cfg(loom)]
    fn init() -> Self;

    /// Waits until the lock is free and takes it.
    fn lock(&self) -> Self::State;

    /// Takes the lock if it is free now.
    fn try_lock(&self) -> Option<Self::State>;

    /// Lets the lock go.
    ///
    /// # Safety
    ///
    /// The caller holds the lock, and `state` is what taking it returned.
    unsafe fn unlock(&self, state: Self::State);
}

/// A value behind a [`RawLock`].
///
/// # Examples
///
/// ```
/// use kmem_hal::lock::{Lock, Spin};
///
/// static COUNT: Lock<u64, Spin> = Lock::new(0);
/// *COUNT.lock() += 1;
/// assert_eq!(*COUNT.lock(), 1);
/// ```
pub struct Lock<T, L> {
    raw: L,
    value: UnsafeCell<T>,
}

// SAFETY: K1: the value is reached by one holder at a time; K2 passes it on.
unsafe impl<T: Send, L: Sync> Sync for Lock<T, L> {}
// SAFETY: whoever owns the lock owns the value and the raw lock.
unsafe impl<T: Send, L: Send> Send for Lock<T, L> {}

impl<T, L: RawLock> Lock<T, L> {
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

    /// Waits for the lock.
    #[inline]
    pub fn lock(&self) -> LockGuard<'_, T, L> {
        LockGuard {
            state: Some(self.raw.lock()),
            lock: self,
            _here: PhantomData,
        }
    }

    /// Takes the lock if it is free now.
    #[inline]
    pub fn try_lock(&self) -> Option<LockGuard<'_, T, L>> {
        let state = self.raw.try_lock()?;
        Some(LockGuard {
            state: Some(state),
            lock: self,
            _here: PhantomData,
        })
    }

    /// The value, where no one else can hold the lock.
    pub fn get_mut(&mut self) -> &mut T {
        // SAFETY: the exclusive borrow keeps every guard away.
        self.value.with_mut(|value| unsafe { &mut *value })
    }
}

impl<T: Default, L: RawLock> Default for Lock<T, L> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

impl<T, L> fmt::Debug for Lock<T, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Lock(..)")
    }
}

/// Access to a locked value; lets go when dropped.
pub struct LockGuard<'a, T, L: RawLock> {
    lock: &'a Lock<T, L>,
    /// `None` only while it is dropped.
    state: Option<L::State>,
    /// Neither sent, since the state is that of one CPU, nor shared, unless the value may be.
    _here: PhantomData<*mut ()>,
}

// SAFETY: a shared guard gives out shared references to the value and nothing else.
unsafe impl<T: Sync, L: RawLock> Sync for LockGuard<'_, T, L> {}

impl<T, L: RawLock> Deref for LockGuard<'_, T, L> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: K1: this guard holds the lock.
        self.lock.value.with(|value| unsafe { &*value })
    }
}

impl<T, L: RawLock> DerefMut for LockGuard<'_, T, L> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: K1: this guard holds the lock, and is borrowed exclusively.
        self.lock.value.with_mut(|value| unsafe { &mut *value })
    }
}

impl<T, L: RawLock> Drop for LockGuard<'_, T, L> {
    fn drop(&mut self) {
        if let Some(state) = self.state.take() {
            // SAFETY: this guard holds the lock, and `state` came from taking it.
            unsafe { self.lock.raw.unlock(state) }
        }
    }
}

impl<T: fmt::Debug, L: RawLock> fmt::Debug for LockGuard<'_, T, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}
