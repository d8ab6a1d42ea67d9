//! The counting backend: `core`'s atomics plus a count per thread.
//!
//! Counts what a processor pays for on shared lines: read-modify-writes (locked instructions on
//! x86; `swap` too, since XCHG with memory always locks), plain stores to shared words, and
//! sequentially consistent fences and stores (a store of that order is an XCHG on x86).
//! Loads are not counted: a line that nobody writes is read from the own cache.

extern crate std;

use core::cell::Cell;
use core::sync::atomic::Ordering;

pub use super::cell::UnsafeCell;
pub use core::hint::spin_loop;
pub use core::sync::atomic::compiler_fence;

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

fn locked() {
    let mut now = COUNTS.get();
    now.locked += 1;
    COUNTS.set(now);
}

fn stored(order: Ordering) {
    if order == Ordering::SeqCst {
        return locked();
    }
    let mut now = COUNTS.get();
    now.stores += 1;
    COUNTS.set(now);
}

/// A memory fence; a sequentially consistent one counts as a locked instruction.
pub fn fence(order: Ordering) {
    if order == Ordering::SeqCst {
        locked();
    }
    core::sync::atomic::fence(order);
}

macro_rules! counted {
    ($name:ident, $inner:ty, $value:ty $(, $param:ident)?) => {
        /// A counted atomic with the interface of `core`'s.
        #[derive(Debug, Default)]
        #[repr(transparent)]
        pub struct $name$(<$param>)?($inner);

        impl$(<$param>)? $name$(<$param>)? {
            /// Wraps `value`.
            pub const fn new(value: $value) -> Self {
                Self(<$inner>::new(value))
            }

            /// Reads the value; not counted.
            pub fn load(&self, order: Ordering) -> $value {
                self.0.load(order)
            }

            /// Writes the value.
            pub fn store(&self, value: $value, order: Ordering) {
                stored(order);
                self.0.store(value, order);
            }

            /// Exchanges the value.
            pub fn swap(&self, value: $value, order: Ordering) -> $value {
                locked();
                self.0.swap(value, order)
            }

            /// Writes `new` where the value is `current`.
            ///
            /// # Errors
            ///
            /// The value found, where it was another.
            pub fn compare_exchange(
                &self,
                current: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                locked();
                self.0.compare_exchange(current, new, success, failure)
            }

            /// Like `compare_exchange`, and may fail for no reason.
            ///
            /// # Errors
            ///
            /// The value found.
            pub fn compare_exchange_weak(
                &self,
                current: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                locked();
                self.0.compare_exchange_weak(current, new, success, failure)
            }

            /// Applies `f` by compare-and-exchange until it holds.
            ///
            /// # Errors
            ///
            /// The value found, where `f` declined it.
            pub fn fetch_update(
                &self,
                set: Ordering,
                fetch: Ordering,
                mut f: impl FnMut($value) -> Option<$value>,
            ) -> Result<$value, $value> {
                let mut previous = self.load(fetch);
                while let Some(next) = f(previous) {
                    match self.compare_exchange_weak(previous, next, set, fetch) {
                        Ok(found) => return Ok(found),
                        Err(found) => previous = found,
                    }
                }
                Err(previous)
            }
        }
    };
}

macro_rules! arithmetic {
    ($name:ident, $value:ty: $($method:ident)*) => {
        impl $name {$(
            /// The locked read-modify-write of this name; gives the value before.
            pub fn $method(&self, value: $value, order: Ordering) -> $value {
                locked();
                self.0.$method(value, order)
            }
        )*}
    };
}

counted!(AtomicBool, core::sync::atomic::AtomicBool, bool);
counted!(AtomicU8, core::sync::atomic::AtomicU8, u8);
counted!(AtomicU16, core::sync::atomic::AtomicU16, u16);
counted!(AtomicU32, core::sync::atomic::AtomicU32, u32);
counted!(AtomicU64, core::sync::atomic::AtomicU64, u64);
counted!(AtomicUsize, core::sync::atomic::AtomicUsize, usize);
counted!(AtomicPtr, core::sync::atomic::AtomicPtr<T>, *mut T, T);

arithmetic!(AtomicBool, bool: fetch_and fetch_or fetch_xor);
arithmetic!(AtomicU8, u8: fetch_add fetch_sub fetch_and fetch_or fetch_xor fetch_max fetch_min);
arithmetic!(AtomicU16, u16: fetch_add fetch_sub fetch_and fetch_or fetch_xor fetch_max fetch_min);
arithmetic!(AtomicU32, u32: fetch_add fetch_sub fetch_and fetch_or fetch_xor fetch_max fetch_min);
arithmetic!(AtomicU64, u64: fetch_add fetch_sub fetch_and fetch_or fetch_xor fetch_max fetch_min);
arithmetic!(AtomicUsize, usize: fetch_add fetch_sub fetch_and fetch_or fetch_xor fetch_max fetch_min);
