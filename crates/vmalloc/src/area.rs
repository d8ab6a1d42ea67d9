//! An area: a run of kernel pages with a purpose, in one word of the tree.
//!
//! ```text
//!   range in the tree   | guard below | usable pages ............ | guard above |
//!                         0 or more                                 1 page
//!
//!   word of an area     | caller, 48 bits              | guard 8 | . . lazy borrowed | kind 4 |
//!   word of a freed one | next freed area, in pages    | guard 8 | . . lazy borrowed | kind 4 |
//! ```
//!
//! Guards are never mapped: running off either end faults at once instead of reaching the neighbour.
//!
//! Invariant `I4`: the upper 48 bits of a word without the lazy bit are 0 or what [`Area::called_from`] made of a
//! `&'static Location`.

use core::panic::Location;

use kmem_hal::{Page, PageRange};
use kmem_vma_tree::Value;

/// What an area is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
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
    /// A buffer that a device reads and writes.
    Dma = 4,
    /// Code and data of a loadable module.
    Module = 5,
}

impl AreaKind {
    /// As `vmallocinfo` prints it. Linux knows stacks and modules by their caller; here they have names.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Vmalloc => "vmalloc",
            Self::Vmap => "vmap",
            Self::Ioremap => "ioremap",
            Self::Stack => "stack",
            Self::Dma => "dma-coherent",
            Self::Module => "module",
        }
    }

    const fn from_bits(bits: u64) -> Self {
        match bits {
            0 => Self::Vmalloc,
            1 => Self::Vmap,
            2 => Self::Ioremap,
            3 => Self::Stack,
            4 => Self::Dma,
            _ => Self::Module,
        }
    }
}

const KIND: u64 = 0xf;
const BORROWED: u64 = 1 << 4;
const LAZY: u64 = 1 << 5;
const GUARD_SHIFT: u32 = 8;
const LINK_SHIFT: u32 = 16;

/// The most guard pages below an area.
pub(crate) const MAX_GUARD: u64 = 0xff;

/// What the tree keeps of an area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area(u64);

impl Area {
    pub(crate) const fn new(kind: AreaKind, guard_below: u64) -> Self {
        Self(kind as u64 | (guard_below & MAX_GUARD) << GUARD_SHIFT)
    }

    /// The same, whose frames belong to somebody else.
    pub(crate) const fn borrowed(self) -> Self {
        Self(self.0 | BORROWED)
    }

    /// The same, with who asked for it. A pointer that 48 bits cannot hold (sign-extended) is not kept.
    pub(crate) fn called_from(self, caller: &'static Location<'static>) -> Self {
        let address = core::ptr::from_ref(caller).expose_provenance();
        let link = address as u64 & (u64::MAX >> LINK_SHIFT);
        let low = self.0 & ((1 << LINK_SHIFT) - 1);
        let kept = if widen(link) == address { link } else { 0 };
        Self(low | kept << LINK_SHIFT)
    }

    /// The same, freed: `next` is the area that was freed before it, as an offset in the window.
    pub(crate) const fn freed(self, next: Option<u64>) -> Self {
        let low = self.0 & ((1 << LINK_SHIFT) - 1);
        let link = match next {
            Some(offset) => offset + 1,
            None => 0,
        };
        Self(low | LAZY | link << LINK_SHIFT)
    }

    pub(crate) const fn kind(self) -> AreaKind {
        AreaKind::from_bits(self.0 & KIND)
    }

    pub(crate) const fn is_borrowed(self) -> bool {
        self.0 & BORROWED != 0
    }

    /// Whether it was freed and waits.
    pub(crate) const fn is_freed(self) -> bool {
        self.0 & LAZY != 0
    }

    /// The area that was freed before this freed one.
    pub(crate) const fn next_freed(self) -> Option<u64> {
        if self.is_freed() {
            (self.0 >> LINK_SHIFT).checked_sub(1)
        } else {
            None
        }
    }

    /// Who asked for it.
    pub(crate) fn caller(self) -> Option<&'static Location<'static>> {
        let link = self.0 >> LINK_SHIFT;
        if self.is_freed() || link == 0 {
            return None;
        }
        let caller = core::ptr::with_exposed_provenance::<Location<'static>>(widen(link));
        // SAFETY: `I4`: the bits are those of a `&'static Location`, whose provenance was exposed.
        Some(unsafe { &*caller })
    }

    pub(crate) const fn guard_below(self) -> u64 {
        self.0 >> GUARD_SHIFT & MAX_GUARD
    }

    /// The mapped pages of an area that the tree holds under `range`.
    pub(crate) fn usable(self, range: PageRange) -> Option<PageRange> {
        let first = Page::new(range.first().number() + self.guard_below())?;
        PageRange::new(first, range.last().checked_sub(1)?)
    }
}

/// The address whose low 48 bits these are, sign-extended.
const fn widen(link: u64) -> usize {
    ((link << LINK_SHIFT) as i64 >> LINK_SHIFT) as usize
}

impl Value for Area {
    fn to_word(self) -> u64 {
        self.0
    }

    fn from_word(word: u64) -> Self {
        Self(word)
    }
}
