//! An area: a run of kernel pages with a purpose, in one word of the tree.
//!
//! ```text
//!   range in the tree   | guard below | usable pages ............ | guard above |
//!                         0 or 1 page                               1 page
//! ```
//!
//! Guards are never mapped: running off either end faults at once instead of reaching the neighbour.

use kmem_hal::{Page, PageRange};
use kmem_vma_tree::Value;

/// What an area is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum AreaKind {
    /// Memory of frames that need not follow each other.
    Vmalloc = 0,
    /// Given frames, mapped one after the other.
    Vmap = 1,
    /// Device registers.
    Ioremap = 2,
    /// A kernel stack.
    Stack = 3,
}

impl AreaKind {
    /// As `vmallocinfo` prints it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Vmalloc => "vmalloc",
            Self::Vmap => "vmap",
            Self::Ioremap => "ioremap",
            Self::Stack => "stack",
        }
    }
}

/// What the tree keeps of an area: bits 0..8 kind, 8..16 guard pages below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area(u64);

impl Area {
    pub(crate) const fn new(kind: AreaKind, guard_below: u64) -> Self {
        Self(kind as u64 | (guard_below & 0xff) << 8)
    }

    pub(crate) const fn kind(self) -> AreaKind {
        match self.0 & 0xff {
            0 => AreaKind::Vmalloc,
            1 => AreaKind::Vmap,
            2 => AreaKind::Ioremap,
            _ => AreaKind::Stack,
        }
    }

    pub(crate) const fn guard_below(self) -> u64 {
        self.0 >> 8 & 0xff
    }

    /// The mapped pages of an area that the tree holds under `range`.
    pub(crate) fn usable(self, range: PageRange) -> Option<PageRange> {
        let first = Page::new(range.first().number() + self.guard_below())?;
        PageRange::new(first, range.last().checked_sub(1)?)
    }
}

impl Value for Area {
    fn to_word(self) -> u64 {
        self.0
    }

    fn from_word(word: u64) -> Self {
        Self(word)
    }
}
