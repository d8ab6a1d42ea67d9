//! What the `compare` program and the criterion benches are made of.
//!
//! ```text
//!   area::{buddy, slab, paging, fork, vma}     workloads: one name, one size, and the programs that run it
//!            │ Competitor
//!            ▼
//!   harness                                    takes turns inside each repetition, checks, collects
//!            │ samples
//!            ▼
//!   stats ──> output                           median, min, max, p99.9; lines and JSON
//! ```
//!
//! The method is described in `benches/README.md`.

#[cfg(feature = "programs")]
pub mod area;
pub mod clock;
pub mod counting;
pub mod harness;
#[cfg(feature = "programs")]
pub mod hosted;
pub mod lock;
pub mod mixed;
pub mod output;
pub mod platform;
pub mod rng;
pub mod stats;
pub mod valgrind;
