//! The shuttle backend: random schedules, sequentially consistent, for larger models.

pub use shuttle::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize, fence,
};

/// Lets another thread of the schedule run.
pub fn spin_loop() {
    shuttle::thread::yield_now();
}

/// A compiler fence orders nothing between threads.
pub fn compiler_fence(_order: core::sync::atomic::Ordering) {}

pub use super::cell::UnsafeCell;
