//! Why a table could not be read.

use core::fmt;

use kmem_buddy::BootMapError;

/// Why a table could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TableError {
    /// The bytes end inside an entry.
    Truncated {
        /// Bytes of the table.
        bytes: usize,
        /// Bytes of an entry.
        entry: usize,
    },
    /// A tag's size cannot be: smaller than its header, or beyond the end of the table.
    Tag {
        /// Where the tag begins, in bytes from the start of the table.
        at: usize,
        /// What it says that its size is.
        size: u32,
    },
    /// No memory map is in the table.
    NoMap,
    /// An entry that cannot be.
    Entry(BootMapError),
}

impl fmt::Display for TableError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated { bytes, entry } => {
                write!(
                    f,
                    "a table of {bytes} bytes is no multiple of an entry's {entry}"
                )
            }
            Self::Tag { at, size } => write!(f, "the tag at byte {at} has a size of {size} bytes"),
            Self::NoMap => f.write_str("the table holds no memory map"),
            Self::Entry(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for TableError {}

impl From<BootMapError> for TableError {
    fn from(error: BootMapError) -> Self {
        Self::Entry(error)
    }
}
