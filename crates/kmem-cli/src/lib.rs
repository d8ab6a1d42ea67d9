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
