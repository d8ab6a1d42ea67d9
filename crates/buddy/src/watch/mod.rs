//! Policies that look at every block that is given and taken back: an allocator that is asked about, and answers.
//!
//! ```text
//!   WatchedBuddy<M, C, Audit>                     finds every wrong free at the call, memory intact
//!   WatchedBuddy<M, C, PageOwner>                 knows who allocated each frame
//!   WatchedBuddy<M, C, (Audit, PageOwner)>        both
//!   Buddy<M, C>                                   none: no table, no instruction
//! ```
//!
//! A watched allocator is a [`Buddy`](crate::Buddy) with a table beside it, one entry a usable frame, carved from the boot map before
//! anything else. Calls go through [`WatchedBuddy`], which has all of the allocator's under the same names; views
//! pass through.
//!
//! Invariants
//! - `W1`: an entry says what a *live* block at that frame is: it is written after the block was taken and before anybody has
//!   it, and cleared by one exchange before the block is given back. So of two frees of a block, on whatever CPUs, one is right.
//! - `W2`: no call waits: entries are atomics, so that interrupts and NMIs may allocate and free as in [the crate](crate).
//!
//! Costs: one store for an allocation and one locked instruction for a free with [`Audit`], two locked instructions for each with
//! [`PageOwner`]; 1 and 4 bytes a frame.

mod audit;
mod owner;
mod table;
mod watched;

use core::fmt;
use core::panic::Location;

use crate::error::FreeError;

pub use crate::carve::Carving;
pub use audit::Audit;
pub use owner::{Owner, PageOwner};
pub use watched::WatchedBuddy;

pub(crate) mod sealed {
    /// Only this crate's policies know what `W1` asks of them.
    pub trait Sealed {}
}

/// What is kept about blocks that are in use. `at` is the place of the first frame in the table, `order` the block's.
pub trait Watch: sealed::Sealed + Sized + Sync + 'static {
    /// Bytes of table for `frames` frames.
    #[doc(hidden)]
    fn bytes(frames: usize) -> u64;

    /// Makes the table.
    #[doc(hidden)]
    fn build(memory: &mut Carving, frames: usize) -> Self;

    /// A block was taken.
    #[doc(hidden)]
    fn taken(&self, at: usize, order: usize, by: &'static Location<'static>);

    /// `count` frames were taken that may come back in any pieces.
    #[doc(hidden)]
    fn taken_loose(&self, at: usize, count: usize, by: &'static Location<'static>);

    /// A block comes back.
    ///
    /// # Errors
    ///
    /// What is wrong with that; nothing changes then.
    #[doc(hidden)]
    fn give(&self, at: usize, order: usize) -> Result<(), FreeError>;

    /// Frames that were taken as loose ones come back, or whole blocks of them.
    ///
    /// # Errors
    ///
    /// What is wrong with that; nothing changes then.
    #[doc(hidden)]
    fn give_run(&self, at: usize, count: usize) -> Result<(), FreeError>;

    /// A block became two halves.
    ///
    /// # Errors
    ///
    /// Where no such block is in use.
    #[doc(hidden)]
    fn split(&self, at: usize, order: usize) -> Result<(), FreeError>;

    /// Who took the frame.
    #[doc(hidden)]
    fn owner(&self, _at: usize) -> Option<&'static Location<'static>> {
        None
    }

    /// Hands out who holds how much.
    #[doc(hidden)]
    fn owners(&self, _give: &mut dyn FnMut(Owner)) {}

    /// What `show_mem` adds.
    #[doc(hidden)]
    fn show(&self, _f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Ok(())
    }
}

impl<A: Watch, B: Watch> sealed::Sealed for (A, B) {}

/// Two policies; the first one says what a wrong free is.
impl<A: Watch, B: Watch> Watch for (A, B) {
    fn bytes(frames: usize) -> u64 {
        A::bytes(frames) + B::bytes(frames)
    }
    fn build(memory: &mut Carving, frames: usize) -> Self {
        (A::build(memory, frames), B::build(memory, frames))
    }
    fn taken(&self, at: usize, order: usize, by: &'static Location<'static>) {
        self.1.taken(at, order, by);
        self.0.taken(at, order, by);
    }
    fn taken_loose(&self, at: usize, count: usize, by: &'static Location<'static>) {
        self.1.taken_loose(at, count, by);
        self.0.taken_loose(at, count, by);
    }
    fn give(&self, at: usize, order: usize) -> Result<(), FreeError> {
        self.0.give(at, order)?;
        self.1.give(at, order)
    }
    fn give_run(&self, at: usize, count: usize) -> Result<(), FreeError> {
        self.0.give_run(at, count)?;
        self.1.give_run(at, count)
    }
    fn split(&self, at: usize, order: usize) -> Result<(), FreeError> {
        self.0.split(at, order)?;
        self.1.split(at, order)
    }
    fn owner(&self, at: usize) -> Option<&'static Location<'static>> {
        self.0.owner(at).or_else(|| self.1.owner(at))
    }
    fn owners(&self, give: &mut dyn FnMut(Owner)) {
        self.0.owners(give);
        self.1.owners(give);
    }
    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.show(f)?;
        self.1.show(f)
    }
}
