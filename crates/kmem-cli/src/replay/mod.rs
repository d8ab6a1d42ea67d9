//! `kmem replay`: recorded runs of Linux, replayed on the memory manager, call by call.
//!
//! ```text
//!   file ──> input::fuzz ──> fuzz_run ──┐
//!        └─> input::trace ─> trace_run ─┼──> MmUnderTest (cow-mm over the mock machine, or a test's double)
//!                                       └──> compare: result, errno, page bytes, the list of VMAs
//! ```
//! A run ends at its first difference; the difference is the run's result, `FAIL name line=N expected=.. got=..`.
//!
//! Invariants
//! - I1: a run that is not malformed gives exactly one line of output.
//! - I2: nothing is skipped silently: what the manager does not support is a failure, and what the recording's own rules
//!   leave out is listed in [`trace_run`].

pub mod command;
pub mod compare;
pub mod fuzz_run;
pub mod mm;
pub mod trace_run;

#[cfg(test)]
mod echo;
#[cfg(test)]
pub mod flat;

use crate::input::{InputError, field::At, fuzz, lines::Source, oracle, trace};
use core::fmt;
use mm::MmUnderTest;

/// What came of one run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Everything agreed with Linux.
    Pass {
        /// How many calls were made.
        calls: usize,
    },
    /// Something did not.
    Fail {
        /// The line of the recording.
        line: usize,
        /// What Linux did.
        expected: String,
        /// What the manager did.
        got: String,
    },
}

/// An outcome with the name of its file, as it is printed.
pub struct Report<'a> {
    /// The file's name without folder.
    pub name: &'a str,
    /// What came of it.
    pub outcome: &'a Outcome,
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.outcome {
            Outcome::Pass { calls } => write!(f, "PASS {} calls={calls}", self.name),
            Outcome::Fail {
                line,
                expected,
                got,
            } => {
                write!(
                    f,
                    "FAIL {} line={line} expected={expected} got={got}",
                    self.name
                )
            }
        }
    }
}

/// Replays one recording of either kind; `make` builds a manager whose user space is empty.
///
/// # Errors
/// A recording that cannot be read, at the place where it is wrong.
pub fn replay<M, F>(mut source: Source, make: F) -> Result<Outcome, InputError>
where
    M: MmUnderTest,
    F: FnOnce() -> M,
{
    let name = source.name().to_string();
    let first = source.next_strict()?;
    let kind = oracle::kind(
        At {
            file: &name,
            line: 1,
        },
        first.as_deref(),
    )?;
    let heading = first.unwrap_or_default();
    match kind {
        oracle::RunKind::Fuzz => fuzz_run::run(fuzz::Reader::new(source, &heading)?, make()),
        oracle::RunKind::Trace => {
            let mut run = trace_run::TraceRun::new(trace::Reader::new(source, &heading)?, make());
            run.finish()
        }
    }
}

/// Returns the name that a run is printed under: the path's last part.
pub fn short_name(path: &str) -> &str {
    path.rsplit(['/', ':']).next().unwrap_or(path)
}
