#![doc = include_str!("../README.md")]

pub mod arena;
pub mod fail;
#[cfg(any(loom, shuttle))]
pub mod model;
pub mod objects;

pub use arena::{Arena, ArenaSource};
pub use fail::{FailPlan, Failing, FailingObjects, FailingSource, every_failure};
pub use objects::HeapObjects;
