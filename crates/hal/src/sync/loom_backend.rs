//! The loom backend: a model explores every interleaving of these.

pub use loom::cell::UnsafeCell;
pub use loom::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize, fence,
};

/// Lets another thread of the model run: a spin that never yields never ends under loom.
pub fn spin_loop() {
    loom::thread::yield_now();
}

/// A compiler fence orders nothing between threads, so a model has nothing to see.
pub fn compiler_fence(_order: core::sync::atomic::Ordering) {}
