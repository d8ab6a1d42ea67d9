//! The lock that stands around every peer that asks for `&mut self`.
//!
//! A kernel with more than one CPU has to put one there, so it is part of the price; it is the same for all of them.

use spin::Mutex;

/// A peer behind one spin lock.
pub struct Locked<T>(Mutex<T>);

// SAFETY: the peers hold raw pointers into memory that they own; the lock keeps threads apart, and they are not tied to a thread.
unsafe impl<T> Send for Locked<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Locked<T> {}

impl<T> Locked<T> {
    /// Puts the lock around `inner`.
    pub const fn new(inner: T) -> Self {
        Self(Mutex::new(inner))
    }

    /// Runs `work` under the lock.
    #[inline]
    pub fn with<R>(&self, work: impl FnOnce(&mut T) -> R) -> R {
        work(&mut self.0.lock())
    }
}

impl<T> std::fmt::Debug for Locked<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Locked(..)")
    }
}
