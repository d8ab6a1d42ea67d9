//! The default backend: `core`'s atomics.

pub use core::hint::spin_loop;
pub use core::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize, compiler_fence,
    fence,
};

pub use super::cell::UnsafeCell;
