//! The counting backend: `core`'s atomics plus a count per thread, and interrupts between any two of them.
//!
//! Counts what a processor pays for on shared lines: read-modify-writes (locked instructions on
//! x86; `swap` too, since XCHG with memory always locks), plain stores to shared words, and
//! sequentially consistent fences and stores (a store of that order is an XCHG on x86).
//! Loads are not counted: a line that nobody writes is read from the own cache.
//!
//! Every operation of the facade, counted or not, local words included, is also a *step*, and [`with_interrupt`] runs a
//! function at a chosen step: the interrupt that arrives between two instructions. A test that does so for step 1, 2, 3, ...
//! until nothing fires has interrupted a call everywhere, which is how contract `C2` of [`Cpu`](crate::Cpu) is put to the
//! test in code that runs with interrupts on.

extern crate std;

use core::cell::Cell;
use core::sync::atomic::Ordering;

pub use super::cell::UnsafeCell;
pub use super::wrapped::{
    AtomicBool, AtomicPtr, AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize,
};
pub use core::hint::spin_loop;

/// What one thread did to shared lines since [`reset_counts`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Locked instructions: read-modify-writes, and stores and fences of order `SeqCst`.
    pub locked: u64,
    /// Plain stores to shared words.
    pub stores: u64,
}

std::thread_local! {
    static COUNTS: Cell<Counts> = const { Cell::new(Counts { locked: 0, stores: 0 }) };
}

/// This thread's counts since the last reset.
#[must_use]
pub fn counts() -> Counts {
    COUNTS.get()
}

/// Sets this thread's counts to zero.
pub fn reset_counts() {
    COUNTS.set(Counts::default());
}

std::thread_local! {
    static INTERRUPT: Cell<Option<Interrupt>> = const { Cell::new(None) };
}

#[derive(Clone, Copy)]
struct Interrupt {
    /// Steps left before it fires.
    after: u64,
    handler: *mut (dyn FnMut() + 'static),
}

/// One operation of the facade: an interrupt may come before it.
#[inline]
pub(super) fn step() {
    let Some(mut interrupt) = INTERRUPT.take() else {
        return;
    };
    if interrupt.after > 1 {
        interrupt.after -= 1;
        INTERRUPT.set(Some(interrupt));
        return;
    }
    // SAFETY: `with_interrupt` keeps the handler alive until it takes the interrupt away, and it is run once.
    unsafe { (*interrupt.handler)() }
}

/// Runs `body`, and runs `interrupt` on the same thread just before the `at`-th operation (the first is 1) that `body` makes
/// through the facade. Gives what `body` gave, and whether it came to that.
///
/// The handler is not interrupted itself.
///
/// # Examples
///
/// ```
/// use kmem_hal::sync::{LocalU64, with_interrupt};
///
/// let word = LocalU64::new(0);
/// // An interrupt between the load and the store loses its own update: invariant L1 of local words.
/// let ((), fired) = with_interrupt(2, &mut || word.set(word.get() + 10), || word.set(word.get() + 1));
/// assert!(fired);
/// assert_eq!(word.get(), 1);
/// ```
pub fn with_interrupt<R>(
    at: u64,
    interrupt: &mut dyn FnMut(),
    body: impl FnOnce() -> R,
) -> (R, bool) {
    struct Disarm(Option<Interrupt>);
    impl Drop for Disarm {
        fn drop(&mut self) {
            INTERRUPT.set(self.0.take());
        }
    }
    let mut fired = false;
    let mut handler = || {
        fired = true;
        interrupt();
    };
    let handler: *mut (dyn FnMut() + '_) = &mut handler;
    // SAFETY: only the lifetime changes; `Disarm` takes the pointer away before the handler dies, panics included.
    let handler: *mut (dyn FnMut() + 'static) = unsafe { core::mem::transmute(handler) };
    let armed = Interrupt {
        after: at.max(1),
        handler,
    };
    let disarm = Disarm(INTERRUPT.replace(Some(armed)));
    let result = body();
    drop(disarm);
    (result, fired)
}

/// Before a read-modify-write.
pub(super) fn locked() {
    step();
    let mut now = COUNTS.get();
    now.locked += 1;
    COUNTS.set(now);
}

/// Before a load.
pub(super) fn loaded() {
    step();
}

/// Before a store.
pub(super) fn stored(order: Ordering) {
    if order == Ordering::SeqCst {
        return locked();
    }
    step();
    let mut now = COUNTS.get();
    now.stores += 1;
    COUNTS.set(now);
}

/// A memory fence; a sequentially consistent one counts as a locked instruction.
pub fn fence(order: Ordering) {
    if order == Ordering::SeqCst {
        locked();
    } else {
        step();
    }
    core::sync::atomic::fence(order);
}

/// A compiler fence: free, and a step.
pub fn compiler_fence(order: Ordering) {
    step();
    core::sync::atomic::compiler_fence(order);
}
