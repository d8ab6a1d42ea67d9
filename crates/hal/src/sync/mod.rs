//! The sync facade: every atomic, cell and spin hint of kmem comes from here.
//!
//! Four backends, chosen when the program is built, never at run time:
//!
//! | build | atomics are | what for |
//! |---|---|---|
//! | default | `core`'s | kernels, hosts: no cost, same code |
//! | `--cfg loom` | loom's | every interleaving and every allowed reordering of a small model |
//! | `--cfg shuttle` | `core`'s and a scheduling point | random schedules of models too large for loom |
//! | `--cfg kmem_counting` | `core`'s and a count | locked instructions and stores to shared lines, asserted in tests; an interrupt at any step (`with_interrupt`) |
//!
//! Two families of words, because their costs differ by twenty:
//! - **shared** words (`AtomicU64`, ...): other CPUs write them. A read-modify-write is a locked
//!   instruction, a store takes the line away from the others. Both are counted.
//! - **local** words ([`LocalU64`], ...): one CPU, or whoever holds its pin, writes them with plain
//!   moves; anybody may read them and may read an old value. No read-modify-write exists, so no
//!   locked instruction can slip in. They are not counted as shared.
//!
//! Invariants
//! - `I1`: library crates of kmem take atomics from here only, so that a model sees every one of them.
//! - `I2`: loom's atomics have another size and no `const fn new`. Const constructors go through
//!   [`const_new!`](crate::const_new), and nothing casts raw memory to a facade type except the accessors of hal
//!   ([`FrameTable`](crate::FrameTable), [`PhysMap::words`](crate::PhysMap::words)), which the loom build serves from
//!   constructed arenas.
//!
//! Decision record 002 says why these are `cfg`s and not features.

#[cfg(not(any(loom, shuttle, kmem_counting)))]
mod core_backend;
#[cfg(not(any(loom, shuttle, kmem_counting)))]
use core_backend as backend;

#[cfg(loom)]
mod loom_backend;
#[cfg(loom)]
use loom_backend as backend;

#[cfg(all(shuttle, not(loom)))]
mod shuttle_backend;
#[cfg(all(shuttle, not(loom)))]
use shuttle_backend as backend;

#[cfg(all(kmem_counting, not(any(loom, shuttle))))]
mod counting;
#[cfg(all(kmem_counting, not(any(loom, shuttle))))]
use counting as backend;
#[cfg(all(kmem_counting, not(any(loom, shuttle))))]
pub use counting::{Counts, counts, reset_counts, with_interrupt};

#[cfg(not(loom))]
mod cell;
mod local;
#[cfg(all(any(shuttle, kmem_counting), not(loom)))]
mod wrapped;

pub use backend::{
    AtomicBool, AtomicPtr, AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize, UnsafeCell,
    compiler_fence, fence, spin_loop,
};
pub use core::sync::atomic::Ordering;
pub use local::{LocalBool, LocalPtr, LocalU8, LocalU16, LocalU32, LocalU64, LocalUsize};

/// Makes a constructor `const`, except under loom, whose atomics have no const `new`.
///
/// # Examples
///
/// ```
/// use kmem_hal::{const_new, sync::AtomicU64};
///
/// struct Counter(AtomicU64);
/// impl Counter {
///     const_new! {
///         /// Counts from zero.
///         pub fn new() -> Self { Self(AtomicU64::new(0)) }
///     }
/// }
/// static HITS: Counter = Counter::new();
/// # let _ = &HITS;
/// ```
#[macro_export]
#[cfg(not(loom))]
macro_rules! const_new {
    ($(#[$meta:meta])* $vis:vis unsafe fn $($rest:tt)*) => {
        $(#[$meta])* $vis const unsafe fn $($rest)*
    };
    ($(#[$meta:meta])* $vis:vis fn $($rest:tt)*) => {
        $(#[$meta])* $vis const fn $($rest)*
    };
}

/// Makes a constructor `const`, except under loom, whose atomics have no const `new`.
#[macro_export]
#[cfg(loom)]
macro_rules! const_new {
    ($(#[$meta:meta])* $vis:vis unsafe fn $($rest:tt)*) => {
        $(#[$meta])* $vis unsafe fn $($rest)*
    };
    ($(#[$meta:meta])* $vis:vis fn $($rest:tt)*) => {
        $(#[$meta])* $vis fn $($rest)*
    };
}

/// A value alone on its cache line(s): 64 bytes of alignment.
///
/// Words of two CPUs on one line cost a transfer at every store, though nothing is shared.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct CachePadded<T>(T);

impl<T> CachePadded<T> {
    /// Puts `value` on a line of its own.
    pub const fn new(value: T) -> Self {
        Self(value)
    }

    /// Takes the value out.
    pub fn into_inner(self) -> T {
        self.0
    }
}

impl<T> core::ops::Deref for CachePadded<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> core::ops::DerefMut for CachePadded<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}
