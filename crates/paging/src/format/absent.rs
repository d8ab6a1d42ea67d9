//! Words that no hardware sees as present, in every format of this crate.
//!
//! ```text
//!   empty       0
//!   no access   .. attributes and address ..   bit 1       a leaf that grants nothing, and keeps its frame
//!   payload     .. the payload ..              bit 2       and not bit 1
//! ```
//!
//! All of them ignore the rest of a word whose lowest bit is clear.

use super::Kind;

/// A leaf without access.
pub(super) const NO_ACCESS: u64 = 1 << 1;
/// A payload.
pub(super) const PAYLOAD: u64 = 1 << 2;

/// What a word is that is not present.
#[inline(always)]
pub(super) const fn kind(word: u64) -> Kind {
    if word == 0 {
        Kind::Empty
    } else if word & NO_ACCESS != 0 {
        Kind::Leaf
    } else {
        Kind::Payload
    }
}
