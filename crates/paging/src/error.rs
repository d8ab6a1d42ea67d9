//! Why an operation was refused. A refused operation changed nothing, unless its variant says how far it came.

use core::fmt;

use kmem_hal::{AllocError, Page};

/// Why a table was not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TableError {
    /// No frame for a table.
    Memory(AllocError),
    /// The format has no such number of levels.
    BadLevels,
    /// The part that was to be shared was not [lent](crate::PageTable::lend_from), or the two that lend it have different numbers of levels; or
    /// it cannot be lent: a top entry is a leaf or a payload, leads to a table that spaces share, or is another table's; or there is one level alone.
    CannotShare,
    /// The MMU knows one root a space ([`Mmu::isolates`](kmem_hal::Mmu::isolates)).
    OneRoot,
}

/// The tag of a table is fixed: somebody asked for the root, and may have loaded it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RootKnown;

/// Why a range was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RangeError {
    /// Some of it is outside the addresses that the format translates, or crosses the hole between its halves.
    NotCanonical,
    /// Some of it is in the part that this table shares from another one: change it there.
    Borrowed,
}

/// Why nothing was mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MapError {
    /// The pages are outside the cursor's range.
    OutOfRange,
    /// The page is not a multiple of the block's pages.
    Misaligned,
    /// The format has no leaf of the block's order.
    BadOrder,
    /// Something is mapped there: a leaf, a payload, or a table below.
    Occupied,
    /// The format cannot say this: the frame is too high, or it lacks the key or software bit.
    Unencodable,
    /// No frame for a table.
    Memory(AllocError),
    /// The page's table is shared with another space: [`unshare`](crate::Cursor::unshare) it first.
    Shared,
}

/// Why a range was changed in part or not at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChangeError {
    /// Some of the pages are outside the cursor's range. Nothing changed.
    OutOfRange,
    /// The gather belongs to another table. Nothing changed.
    ForeignGather,
    /// The gather has no room left: commit it and go on at `next`. What is below was done.
    Full {
        /// The first page that was not done.
        next: Page,
    },
    /// No frame for the table that a huge leaf must be split into. Nothing changed.
    Memory(AllocError),
    /// A huge leaf that the range covers in part cannot be split, as no smaller leaf can name its frames (PSE-36 above 4 GiB). Nothing changed.
    Indivisible {
        /// The first page of the leaf.
        at: Page,
    },
    /// The format cannot say what a leaf should become. What is below `at` was done.
    Unencodable {
        /// The page of the leaf.
        at: Page,
    },
    /// The table of page `at` is shared with another space: [`unshare`](crate::Cursor::unshare) it and go on at `at`. What is below was
    /// done.
    Shared {
        /// The first page that was not done.
        at: Page,
    },
}

/// Why a range was not moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MoveError {
    /// A range is outside the cursor's range, passes the top, or the two overlap. Nothing changed.
    OutOfRange,
    /// The gather belongs to another table. Nothing changed.
    ForeignGather,
    /// Something is mapped at the target, or an empty table stays there in the place of a huge leaf. Nothing changed.
    Occupied,
    /// No frame for a table. Nothing changed.
    Memory(AllocError),
    /// A huge leaf that cannot be moved whole cannot be split, as no smaller leaf can name its frames (PSE-36 above 4 GiB). Nothing changed.
    Indivisible {
        /// The first page of the leaf.
        at: Page,
    },
    /// The table of page `at` is shared with another space: [`unshare`](crate::Cursor::unshare) it first. Nothing changed.
    Shared {
        /// A page of the table.
        at: Page,
    },
}

/// Why huge leaves were not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HugeError {
    /// The page is outside the cursor's range, or not aligned.
    OutOfRange,
    /// The gather belongs to another table.
    ForeignGather,
    /// There is no leaf of that order to split, or none whose frames smaller leaves can name (PSE-36 above 4 GiB); or no full table of equal,
    /// consecutive leaves to merge.
    NotPossible,
    /// No frame for a table.
    Memory(AllocError),
    /// The page's table is shared with another space: [`unshare`](crate::Cursor::unshare) it first.
    Shared,
}

/// Why a table is still shared. Nothing changed but that the other spaces' leaves may have lost the right to write, for which
/// they fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum UnshareError {
    /// The page is outside the cursor's range.
    OutOfRange,
    /// The gather belongs to another table.
    ForeignGather,
    /// The gather has no room for the table: commit it.
    Full,
    /// No frame for the copy.
    Memory(AllocError),
    /// The callback stopped, or answered for a leaf without a handle of its block, or for a payload with a handle.
    Stopped,
    /// A table has as many sharers as can be counted.
    Saturated,
}

/// Why a table is not quiescent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum QuiesceError {
    /// A CPU has the root loaded, or the MMU cannot tell.
    Loaded,
    /// Other tables lead into this one.
    Lent,
}

/// Why a fork stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ForkError {
    /// The gather belongs to another table than the parent's. Nothing changed.
    ForeignGather,
    /// The child is the parent. Nothing changed.
    SameTable,
    /// The range is not one of the parent's or of the child's. Nothing changed.
    Range(RangeError),
    /// No frame for the child's tables. Nothing changed.
    Memory(AllocError),
    /// The callback stopped, or the child had something mapped, at this page, or a huge leaf would have to be split that cannot be, or whose table
    /// other spaces share. What is below was copied.
    Stopped {
        /// The first page that was not copied.
        at: Page,
    },
}

macro_rules! errors {
    ($($name:ident { $($pattern:pat => $text:literal $(, $argument:expr)*;)* })*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $($pattern => write!(f, $text $(, $argument)*),)*
                }
            }
        }
        impl core::error::Error for $name {}
    )*};
}

errors! {
    TableError {
        Self::Memory(error) => "no frame for a page table: {}", error;
        Self::BadLevels => "the page-table format has no such number of levels";
        Self::CannotShare => "the other table cannot be shared from here";
        Self::OneRoot => "the MMU does not know of a second root for user mode";
    }
    RootKnown {
        Self => "a CPU may hold translations of the page table under its tag";
    }
    RangeError {
        Self::NotCanonical => "the page-table format does not translate these addresses";
        Self::Borrowed => "these pages belong to another table";
    }
    MapError {
        Self::OutOfRange => "the pages are outside the cursor's range";
        Self::Misaligned => "the page is not aligned to the block";
        Self::BadOrder => "the page-table format has no leaf of that order";
        Self::Occupied => "something is mapped there";
        Self::Unencodable => "the page-table format cannot express these attributes or this frame";
        Self::Memory(error) => "no frame for a page table: {}", error;
        Self::Shared => "the page's table is shared with another space";
    }
    QuiesceError {
        Self::Loaded => "a CPU may have the page table loaded";
        Self::Lent => "other page tables lead into this one";
    }
    UnshareError {
        Self::OutOfRange => "the page is outside the cursor's range";
        Self::ForeignGather => "the gather belongs to another table";
        Self::Full => "the gather has no room for the table";
        Self::Memory(error) => "no frame for a page table: {}", error;
        Self::Stopped => "the copy of a table was stopped";
        Self::Saturated => "a table has too many sharers";
    }
    ChangeError {
        Self::OutOfRange => "the pages are outside the cursor's range";
        Self::ForeignGather => "the gather belongs to another table";
        Self::Full { next } => "the gather is full at page {}", next;
        Self::Memory(error) => "no frame to split a huge leaf: {}", error;
        Self::Indivisible { at } => "the huge leaf of page {} has frames that small leaves cannot name", at;
        Self::Unencodable { at } => "the page-table format cannot express the change at page {}", at;
        Self::Shared { at } => "the table of page {} is shared with another space", at;
    }
    MoveError {
        Self::OutOfRange => "the pages cannot be moved there";
        Self::ForeignGather => "the gather belongs to another table";
        Self::Occupied => "something is mapped at the target";
        Self::Memory(error) => "no frame for a page table: {}", error;
        Self::Indivisible { at } => "the huge leaf of page {} has frames that small leaves cannot name", at;
        Self::Shared { at } => "the table of page {} is shared with another space", at;
    }
    HugeError {
        Self::OutOfRange => "the pages are outside the cursor's range";
        Self::ForeignGather => "the gather belongs to another table";
        Self::NotPossible => "no huge leaf can be split or made there";
        Self::Memory(error) => "no frame for a page table: {}", error;
        Self::Shared => "the page's table is shared with another space";
    }
    ForkError {
        Self::ForeignGather => "the gather belongs to another table than the parent's";
        Self::SameTable => "a page table cannot be its own child";
        Self::Range(error) => "{}", error;
        Self::Memory(error) => "no frame for the child's page tables: {}", error;
        Self::Stopped { at } => "the fork stopped at page {}", at;
    }
}
