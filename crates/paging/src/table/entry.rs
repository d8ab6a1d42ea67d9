//! What one page's entry says, and where it is.

use kmem_hal::Page;

use crate::attributes::{Leaf, Payload};
use crate::format::{Format, Kind, level};
use crate::mutants::mutant;

/// What one page's entry holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Nothing.
    Empty,
    /// No frame, but something of the owner's.
    Payload(Payload),
    /// A leaf; it may cover more pages than the one asked for.
    Leaf(Leaf),
}

impl Entry {
    /// The leaf, if it is one.
    #[must_use]
    pub const fn leaf(self) -> Option<Leaf> {
        match self {
            Self::Leaf(leaf) => Some(leaf),
            _ => None,
        }
    }
}

/// What the word of `page` in a table of level `number` says; a table is nothing.
#[inline(always)]
pub(crate) fn decode<F: Format>(page: Page, number: usize, word: u64) -> Entry {
    match F::kind(number, word) {
        Kind::Empty | Kind::Table => Entry::Empty,
        Kind::Payload => Entry::Payload(F::payload_of(word)),
        Kind::Leaf => {
            let level = level::<F>(number);
            Entry::Leaf(Leaf {
                page: Page::from_number(page.number() & !((1 << level.shift) - 1)),
                frame: F::leaf_frame(number, word),
                order: level.order(),
                attributes: F::attributes(number, word),
            })
        }
    }
}

/// What an entry is worth below tables that are shared, if they are: rights are the AND over all levels.
#[inline(always)]
pub(crate) fn seen_from(entry: Entry, shared: bool) -> Entry {
    match entry {
        Entry::Leaf(mut leaf) if shared && !mutant!("share-shows-the-leafs-rights") => {
            leaf.attributes = leaf.attributes.write_protected();
            Entry::Leaf(leaf)
        }
        entry => entry,
    }
}

/// The index of a page in a table of level `number`.
#[inline(always)]
pub(crate) fn index_at<F: Format>(page: u64, number: usize) -> usize {
    let level = level::<F>(number);
    (page >> level.shift) as usize & (level.entries() - 1)
}
