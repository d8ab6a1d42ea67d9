//! What a caller did wrong, where the allocator found out.
//!
//! The default build finds these late: a pointer is checked when its array is flushed to the slabs. That costs
//! nothing on the fast path, and what is found is dropped instead of being handed out again.

use core::fmt;

/// A misuse of the allocator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Misuse {
    /// The object was free already.
    DoubleFree {
        /// The name of the cache.
        cache: &'static str,
        /// The address that was freed.
        address: usize,
    },
    /// The address lies in a slab of the cache and not at the start of an object.
    InvalidFree {
        /// The name of the cache.
        cache: &'static str,
        /// The address that was freed.
        address: usize,
    },
    /// The object belongs to another cache, or to another size class than the layout says.
    WrongCache {
        /// The cache that it was freed to.
        cache: &'static str,
        /// The cache that it belongs to.
        belongs_to: &'static str,
        /// The address that was freed.
        address: usize,
    },
    /// The address is in no slab, in no block of pages and in no large area of this system.
    ForeignFree {
        /// The address that was freed.
        address: usize,
    },
}

impl fmt::Display for Misuse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DoubleFree { cache, address } => {
                write!(f, "{cache}: {address:#x} was freed twice")
            }
            Self::InvalidFree { cache, address } => {
                write!(
                    f,
                    "{cache}: {address:#x} was freed and is not the start of an object"
                )
            }
            Self::WrongCache {
                cache,
                belongs_to,
                address,
            } => write!(
                f,
                "{address:#x} was freed to {cache} and belongs to {belongs_to}"
            ),
            Self::ForeignFree { address } => {
                write!(f, "{address:#x} was freed and was never allocated here")
            }
        }
    }
}

impl core::error::Error for Misuse {}
