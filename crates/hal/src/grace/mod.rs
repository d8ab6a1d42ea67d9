//! Grace periods: when may memory that lock-free readers might hold be reused?
//!
//! A reader announces itself with a guard and takes no lock. A writer that took something out of a shared structure
//! may not reuse its memory while a reader that could have seen it is still reading. After a *grace period* every
//! guard that existed at its start is gone, and the memory is free.
//!
//! ```text
//!   reader   ──[ guard ]──────       ──[ guard ]─────────
//!   writer     unlink X ── defer(X) ......... run(X)
//!                          └─ grace period ──┘   no guard spans both ends
//! ```
//!
//! Source: McKenney and Slingwine, "Read-Copy Update", PDCS 1998; Fraser, "Practical lock-freedom", 2004 (epochs).

mod announcement;
mod barrier;
mod epoch;
mod queue;
mod single;

use core::ptr::NonNull;

pub use barrier::{Barrier, CallBarrier, FullBarrier};
#[cfg(loom)]
pub use epoch::Plant;
pub use epoch::{EpochArea, EpochGrace, EpochGuard};
pub use single::{SingleGrace, SingleGuard};

/// A call that waits for a grace period: what to reclaim, and how.
///
/// Two words and a function; no memory is needed to defer one. It is made once, so it cannot be copied.
#[derive(Debug)]
pub struct Deferred {
    run: unsafe fn(context: *const (), object: NonNull<()>),
    context: *const (),
    object: NonNull<()>,
}

// SAFETY: `new` demands that the call may be made from any CPU.
unsafe impl Send for Deferred {}

impl Deferred {
    /// A call of `run(context, object)` after a grace period.
    ///
    /// # Safety
    ///
    /// The call is sound once, from any CPU, in the context of whoever ends the grace period, at any time after it.
    /// It does not call into the same `Grace`.
    #[must_use]
    pub const unsafe fn new(
        run: unsafe fn(context: *const (), object: NonNull<()>),
        context: *const (),
        object: NonNull<()>,
    ) -> Self {
        Self {
            run,
            context,
            object,
        }
    }

    /// Makes the call.
    ///
    /// # Safety
    ///
    /// A grace period has passed since the object was unlinked, and the call has not been made.
    pub unsafe fn run(self) {
        // SAFETY: `new` made this call sound after a grace period.
        unsafe { (self.run)(self.context, self.object) }
    }
}

/// Read guards and grace periods.
///
/// # Safety
///
/// - `G1`: a deferred call is made only when no guard is left that existed at the time of `defer`.
/// - `G2`: when `synchronize` returns, no guard is left that existed when it was called.
/// - `G3`: what a reader did under its guard happens before a call deferred past it.
/// - `G4`: `read` neither waits nor writes to a line that other CPUs' readers write.
/// - `G5`: guards nest and are dropped in any order; what is protected stays so until the last of them is gone.
pub unsafe trait Grace {
    /// What a reader holds.
    type Guard<'a>
    where
        Self: 'a;

    /// Begins a read section on this CPU. Sections nest. Usable in interrupts.
    #[doc(alias = "rcu_read_lock")]
    fn read(&self) -> Self::Guard<'_>;

    /// Runs `f` inside a read section, which costs less than a guard does.
    ///
    /// # Safety
    ///
    /// Guards of this value that `f` makes are dropped before it returns, it drops no others, and it does not unwind.
    #[inline]
    unsafe fn read_with<R>(&self, f: impl FnOnce() -> R) -> R
    where
        Self: Sized,
    {
        let _reading = self.read();
        f()
    }

    /// Arranges for `call` to be made after a grace period.
    ///
    /// # Errors
    ///
    /// Gives the call back where the bounded queue is full: call [`synchronize`](Self::synchronize), or
    /// [`poll`](Self::poll) and try again.
    #[doc(alias = "call_rcu")]
    fn defer(&self, call: Deferred) -> Result<(), Deferred>;

    /// Makes the deferred calls whose grace period is over; gives how many. Never waits.
    fn poll(&self) -> usize;

    /// Waits for a grace period and makes every call deferred before.
    ///
    /// Deadlocks where the caller holds a guard itself; not for interrupts.
    #[doc(alias = "synchronize_rcu")]
    fn synchronize(&self);

    /// Deferred calls not made yet.
    fn pending(&self) -> usize;
}

// SAFETY: a reference forwards to an implementation that keeps the contract.
unsafe impl<G: Grace> Grace for &G {
    type Guard<'a>
        = G::Guard<'a>
    where
        Self: 'a;

    #[inline]
    fn read(&self) -> Self::Guard<'_> {
        (**self).read()
    }
    #[inline]
    unsafe fn read_with<R>(&self, f: impl FnOnce() -> R) -> R {
        // SAFETY: the caller's promise is passed on.
        unsafe { (**self).read_with(f) }
    }
    fn defer(&self, call: Deferred) -> Result<(), Deferred> {
        (**self).defer(call)
    }
    fn poll(&self) -> usize {
        (**self).poll()
    }
    fn synchronize(&self) {
        (**self).synchronize();
    }
    fn pending(&self) -> usize {
        (**self).pending()
    }
}
