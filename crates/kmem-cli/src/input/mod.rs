//! Everything that `kmem` reads: memory maps, recorded runs, fuzz files.
//!
//! ```text
//!   file or embedded data ──> Source (name + numbered lines, gzip undone)
//!                               ├── map::read    ──> MemoryMap   (boot)
//!                               ├── trace::Reader ─> trace events (boot, replay)
//!                               └── fuzz::Reader ──> fuzz events  (replay)
//! ```
//!
//! Invariants
//! - I1: no input makes the program panic. Whatever is wrong ends in one [`InputError`], and the binary prints it as
//!   exactly one line and leaves with status 2.
//! - I2: an error names the file, the line, the field, the value that stood there and what is wrong with it.
//! - I3: readers of recorded runs hold one line at a time; a map is held whole (it is at most [`lines::MAX_MAP_LINES`]
//!   lines).
//!
//! Not handled: compressed formats other than gzip, and character sets other than UTF-8 (other bytes are read as noise
//! in a map and are an error in a recorded run).

pub mod e820;
mod error;
pub mod field;
pub mod fuzz;
pub mod iomem;
pub mod lines;
pub mod linux_notes;
pub mod map;
pub mod oracle;
pub mod srat;
pub mod trace;

pub use error::InputError;
