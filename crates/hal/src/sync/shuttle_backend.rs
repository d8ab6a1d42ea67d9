//! The shuttle backend: random schedules, sequentially consistent, for models too large for loom.
//!
//! The words are `core`'s with a scheduling point before every access. shuttle runs one thread at a time, so that is all
//! its own atomics add; and unlike those, these have the size of their integers and a const `new`, so that page tables
//! and frame slots stay what they are: memory that is cast.

use core::sync::atomic::Ordering;

pub use super::cell::UnsafeCell;
pub use super::wrapped::{
    AtomicBool, AtomicPtr, AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize,
};

/// Another thread of the schedule may run here.
fn switch() {
    // shuttle's own scheduling point is not public; a load of one of its atomics contains it.
    shuttle::sync::atomic::AtomicBool::new(false).load(Ordering::SeqCst);
}

pub(super) fn loaded() {
    switch();
}

pub(super) fn stored(_order: Ordering) {
    switch();
}

pub(super) fn locked() {
    switch();
}

/// A fence: a scheduling point, since shuttle's memory is sequentially consistent.
pub fn fence(order: Ordering) {
    switch();
    core::sync::atomic::fence(order);
}

/// Lets another thread of the schedule run.
pub fn spin_loop() {
    shuttle::thread::yield_now();
}

/// A compiler fence orders nothing between threads.
pub fn compiler_fence(_order: Ordering) {}
