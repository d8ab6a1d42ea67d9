#![doc = include_str!("../README.md")]

pub mod arena;
pub mod conformance;
pub mod fail;
#[cfg(all(kmem_counting, not(any(loom, shuttle))))]
pub mod interrupt;
#[cfg(any(loom, shuttle))]
pub mod model;
pub mod objects;
pub mod ops;
pub mod processes;
pub mod slots;
#[cfg(all(
    target_os = "linux",
    target_arch = "x86_64",
    not(any(loom, shuttle, miri))
))]
pub mod step;
pub mod twins;

pub use arena::{Arena, ArenaSource};
pub use fail::{FailPlan, Failing, FailingObjects, FailingSource, every_failure};
pub use objects::HeapObjects;
pub use slots::SlotArena;

/// The book's chapter on testing a kernel; its programs are compiled with the doctests.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/testing-your-kernel.md")]
pub struct Chapter;
