//! Operations as data: one enum an area, and what runs a list of them against an implementation and its model.
//!
//! The same enum serves three ways of making lists: proptest (`any::<FrameOp>()`, with shrinking), fuzzing
//! (`arbitrary::Arbitrary`), and shuttle ([`from_bytes`] on random bytes). Fields are raw small numbers that the runner
//! reduces to what is possible, so that every list of bytes is a list of operations and none is rejected.
//!
//! ```
//! use kmem_testkit::ops::{FrameOp, from_bytes, run_frames};
//! use kmem_testkit::{Arena, ArenaSource};
//!
//! let ops: Vec<FrameOp> = from_bytes(b"any bytes are operations, as far as they go");
//! let arena = Arena::new(64);
//! let source = ArenaSource::new(&arena);
//! run_frames(&source, &arena, &ops).unwrap();
//! source.assert_all_free();
//! ```

mod frames;
mod objects;
mod pages;
mod ranges;
mod space;

use std::fmt;

use arbitrary::{Arbitrary, Unstructured};

pub use frames::{FrameOp, run_frames};
pub use objects::{ObjectOp, run_objects};
pub use pages::{PageOp, PageTableUnderTest, run_pages};
pub use ranges::{RangeOp, RangesUnderTest, run_ranges};
pub use space::{SpaceOp, SpacesUnderTest, run_spaces};

/// Where an implementation and its model disagreed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disagreement {
    /// Index of the operation.
    pub at: usize,
    /// The operation.
    pub op: String,
    /// What differed.
    pub what: String,
}

impl Disagreement {
    /// An operation, its index, and what differed.
    pub fn new(at: usize, op: &impl fmt::Debug, what: impl Into<String>) -> Self {
        Self {
            at,
            op: format!("{op:?}"),
            what: what.into(),
        }
    }
}

impl fmt::Display for Disagreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "operation {} ({}): {}", self.at, self.op, self.what)
    }
}

impl std::error::Error for Disagreement {}

/// As many operations as the bytes give: for fuzzers, and for random bytes of a model's scheduler.
#[must_use]
pub fn from_bytes<'a, O: Arbitrary<'a>>(bytes: &'a [u8]) -> Vec<O> {
    let mut input = Unstructured::new(bytes);
    let mut ops = Vec::new();
    while !input.is_empty() {
        match O::arbitrary(&mut input) {
            Ok(op) => ops.push(op),
            Err(_) => break,
        }
    }
    ops
}

/// proptest's `Arbitrary` by a strategy function of the module.
macro_rules! strategy {
    ($type:ty, $strategy:expr) => {
        impl proptest::arbitrary::Arbitrary for $type {
            type Parameters = ();
            type Strategy = proptest::strategy::BoxedStrategy<Self>;

            fn arbitrary_with((): ()) -> Self::Strategy {
                proptest::strategy::Strategy::boxed($strategy)
            }
        }
    };
}
use strategy;
