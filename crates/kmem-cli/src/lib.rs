//! The parts of the `kmem` command; the binary only parses arguments and sets the exit status.
//!
//! ```text
//!   kmem boot ──> input::map, input::trace, elf ──> boot ──> output, report
//!   kmem replay ─> input::{fuzz, trace} ──────────> replay
//!   kmem top ───> input::trace ──────────────────> top
//! ```

pub mod args;
pub mod boot;
pub mod elf;
pub mod embedded;
pub mod input;
pub mod output;
pub mod replay;
pub mod report;
pub mod top;
pub mod world;

/// How a command ended, as the exit status says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Everything ran and held.
    Held = 0,
    /// kmem is wrong somewhere.
    Broken = 1,
    /// The input is unusable.
    Unusable = 2,
}
