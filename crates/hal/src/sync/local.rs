//! Local words: written by one CPU under its pin, readable by all.
//!
//! A per-CPU counter or array index is written by the CPU that owns it (and by interrupts that finish before
//! the interrupted code goes on) and read by a statistics call on another CPU. The right machine code is a plain
//! move both ways. These types say so: relaxed `get` and `set`, nothing else.
//!
//! Invariant `L1`: between a `get` and the `set` that depends on it, only code that finishes before the
//! interrupted code resumes may have run (contract `C2` of [`Cpu`](crate::Cpu)); such code must leave the word
//! as it found it or be kept out by a busy flag. Otherwise an update is lost, though memory stays sound.

use super::Ordering;

macro_rules! local {
    ($(#[$meta:meta])* $name:ident, $atomic:ident, $value:ty) => {
        $(#[$meta])*
        #[derive(Debug)]
        #[repr(transparent)]
        pub struct $name(backing::$atomic);

        impl $name {
            $crate::const_new! {
                /// Wraps `value`.
                pub fn new(value: $value) -> Self {
                    Self(backing::$atomic::new(value))
                }
            }

            /// Reads the value: a plain load.
            #[inline(always)]
            pub fn get(&self) -> $value {
                step();
                self.0.load(Ordering::Relaxed)
            }

            /// Writes the value: a plain store.
            #[inline(always)]
            pub fn set(&self, value: $value) {
                step();
                self.0.store(value, Ordering::Relaxed);
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self::new(Default::default())
            }
        }
    };
}

// Under the counting backend local words are `core`'s: their stores stay on lines of their own CPU. But each is a step at
// which an interrupt may come.
#[cfg(all(kmem_counting, not(any(loom, shuttle))))]
use super::backend::step;
#[cfg(not(all(kmem_counting, not(any(loom, shuttle)))))]
#[inline(always)]
fn step() {}

#[cfg(not(all(kmem_counting, not(any(loom, shuttle)))))]
use super::backend as backing;
#[cfg(all(kmem_counting, not(any(loom, shuttle))))]
use core::sync::atomic as backing;

local!(
    /// A local `bool`.
    LocalBool, AtomicBool, bool
);
local!(
    /// A local `u8`.
    LocalU8, AtomicU8, u8
);
local!(
    /// A local `u16`.
    LocalU16, AtomicU16, u16
);
local!(
    /// A local `u32`.
    LocalU32, AtomicU32, u32
);
local!(
    /// A local `u64`.
    LocalU64, AtomicU64, u64
);
local!(
    /// A local `usize`.
    LocalUsize, AtomicUsize, usize
);

/// A local pointer.
#[derive(Debug)]
#[repr(transparent)]
pub struct LocalPtr<T>(backing::AtomicPtr<T>);

impl<T> LocalPtr<T> {
    crate::const_new! {
        /// Wraps `pointer`.
        pub fn new(pointer: *mut T) -> Self {
            Self(backing::AtomicPtr::new(pointer))
        }
    }

    /// Reads the pointer: a plain load.
    #[inline(always)]
    pub fn get(&self) -> *mut T {
        step();
        self.0.load(Ordering::Relaxed)
    }

    /// Writes the pointer: a plain store.
    #[inline(always)]
    pub fn set(&self, pointer: *mut T) {
        step();
        self.0.store(pointer, Ordering::Relaxed);
    }
}

impl<T> Default for LocalPtr<T> {
    fn default() -> Self {
        Self::new(core::ptr::null_mut())
    }
}
