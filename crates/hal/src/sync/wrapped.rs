//! `core`'s atomics with a hook before every access: what the counting and the shuttle backend are made of.
//!
//! Same size, same alignment, all-zero valid, const `new`: memory may be cast to these, as to `core`'s.

use core::sync::atomic::Ordering;

#[cfg(not(shuttle))]
use super::counting as hooks;
#[cfg(shuttle)]
use super::shuttle_backend as hooks;

macro_rules! wrapped {
    ($name:ident, $inner:ty, $value:ty $(, $param:ident)?) => {
        /// `core`'s atomic of this name, which tells the backend of every access.
        #[derive(Debug, Default)]
        #[repr(transparent)]
        pub struct $name$(<$param>)?($inner);

        impl$(<$param>)? $name$(<$param>)? {
            /// Wraps `value`.
            pub const fn new(value: $value) -> Self {
                Self(<$inner>::new(value))
            }

            /// Reads the value.
            pub fn load(&self, order: Ordering) -> $value {
                hooks::loaded();
                self.0.load(order)
            }

            /// Writes the value.
            pub fn store(&self, value: $value, order: Ordering) {
                hooks::stored(order);
                self.0.store(value, order);
            }

            /// Exchanges the value.
            pub fn swap(&self, value: $value, order: Ordering) -> $value {
                hooks::locked();
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
                hooks::locked();
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
                hooks::locked();
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
                hooks::locked();
                self.0.$method(value, order)
            }
        )*}
    };
}

wrapped!(AtomicBool, core::sync::atomic::AtomicBool, bool);
wrapped!(AtomicU8, core::sync::atomic::AtomicU8, u8);
wrapped!(AtomicU16, core::sync::atomic::AtomicU16, u16);
wrapped!(AtomicU32, core::sync::atomic::AtomicU32, u32);
wrapped!(AtomicU64, core::sync::atomic::AtomicU64, u64);
wrapped!(AtomicUsize, core::sync::atomic::AtomicUsize, usize);
wrapped!(AtomicPtr, core::sync::atomic::AtomicPtr<T>, *mut T, T);

arithmetic!(AtomicBool, bool: fetch_and fetch_or fetch_xor);
arithmetic!(AtomicU8, u8: fetch_add fetch_sub fetch_and fetch_or fetch_xor fetch_max fetch_min);
arithmetic!(AtomicU16, u16: fetch_add fetch_sub fetch_and fetch_or fetch_xor fetch_max fetch_min);
arithmetic!(AtomicU32, u32: fetch_add fetch_sub fetch_and fetch_or fetch_xor fetch_max fetch_min);
arithmetic!(AtomicU64, u64: fetch_add fetch_sub fetch_and fetch_or fetch_xor fetch_max fetch_min);
arithmetic!(AtomicUsize, usize: fetch_add fetch_sub fetch_and fetch_or fetch_xor fetch_max fetch_min);
