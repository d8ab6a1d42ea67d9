//! One node: 32 words, a leaf or an inner node.
//!
//! ```text
//! leaf    word 0 ..= 14   keys: (first page - base) << b | (pages - 1); unused = all ones
//!         word 15         base page (52 bits) | b (6 bits) << 52 | count (4 bits) << 58
//!         word 16 ..= 30  values
//!         word 31         order: nibble i is the slot of range i (outside of the tree: a link)
//! inner   word 0 ..= 11   pivots: the first page of child 1 ..= 12; unused = all ones
//!         word 12 ..= 24  children
//!         word 25 ..= 31  14 half words: count, then the largest gap below each child, saturated to 32 bits
//! ```
//!
//! A range is one word, because its first page is written relative to a base and its length in `b` bits. `b` is
//! chosen per leaf among eight widths when the leaf is written; ranges too far apart and too long to share a leaf
//! get leaves of their own, and a single range of any length always fits (`b` = 52). So ranges of one page and
//! ranges of 2^52 pages live in one tree, and a leaf of common ranges holds 15.
//!
//! Keys lie in any order: a search counts those at or below its page, which needs none. The order is one word beside
//! them, so that a range goes between two others without moving any.
//!
//! ```text
//!   slot      0    1    2    3        order  2 1 3 0         open(1) takes the free slot 2:  1 3 2 0
//!   key       10   30   -    20       count  3
//! ```
//!
//! Invariants
//! - `N1`: the keys of a leaf in the slots that the first `count` nibbles of its order name ascend strictly, there is one
//!   at least, and every other key is all ones. The order names every slot once.
//! - `N2`: `count - 1` pivots of an inner node ascend strictly and every pivot after them is all ones; child `i` holds
//!   the pages from pivot `i - 1` up to the one below pivot `i`.
//! - `N3`: the words that a reader looks at (all but order or link, count of an inner node and gaps) of a node that readers
//!   can reach are never changed in a shared tree, except that a child may be replaced and a pivot moved inside a hole.
//! - `N4`: a child of an inner node is a node, alive for as long as a reader may hold its parent.
//! - `N5`: a position or slot given to a node's methods is below its count (of ranges or children), or was found by its own
//!   search, which ends within the layout whatever the words are. A nibble of an order is a slot (`N1`).
//! - `N6`: in a tree that is shared ranges lie in order: readers do not look at the order, which becomes a link under them.
//! - `N7`: a boundary moves after what follows from it was published, and with Release; pivots are loaded without order, since a search
//!   reads them all. So a reader whom a boundary told that a page is free puts an Acquire fence behind its search: its next search finds
//!   nothing older. Whoever finds a range needs none, for the range's leaf was loaded with Acquire.
//!
//! The number of words is a parameter: 8 words give 3 ranges and 3 children a node, which a model checker can explore.

mod coding;
mod inner;
mod leaf;
mod order;

use core::ptr::NonNull;

use kmem_hal::sync::{AtomicU64, Ordering};

pub(crate) use coding::Coding;
pub(crate) use inner::{Child, saturate};
pub(crate) use leaf::Leaf;

/// The word of an unused key or pivot: above every other.
pub(crate) const UNUSED: u64 = u64::MAX;

/// A range and its value's word, as numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Raw {
    pub(crate) first: u64,
    /// Inclusive.
    pub(crate) last: u64,
    pub(crate) value: u64,
}

/// Memory for a node of a tree: `W` words, 256 bytes and aligned to 64 by default.
///
/// Named only so that an allocator can say `ObjectAlloc<Node>`; its content is private to the tree. `W` is at least 8,
/// and at most 32.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Node<const W: usize = 32> {
    words: [AtomicU64; W],
}

/// A pointer to a node that was written once.
pub(crate) type NodePtr<const W: usize> = NonNull<Node<W>>;

impl<const W: usize> Node<W> {
    const CHECK: () = assert!(W >= 8 && W <= 32, "a node has 8 to 32 words");

    /// Ranges in a leaf.
    pub const RANGES: usize = {
        let () = Self::CHECK;
        (W - 2) / 2
    };

    /// Children of an inner node.
    pub const CHILDREN: usize = {
        let () = Self::CHECK;
        let mut children: usize = 2;
        // Pivots, children, and one half word each for the gaps and one for the count.
        while children + (children + 1) + (children + 2).div_ceil(2) <= W {
            children += 1;
        }
        children
    };

    /// A leaf with fewer ranges is joined with its neighbour.
    pub(crate) const LEAF_LOW: usize = low(Self::RANGES);

    /// An inner node with fewer children is joined with its neighbour.
    pub(crate) const INNER_LOW: usize = low(Self::CHILDREN);

    /// The last word: the order of a leaf in the tree, the link of any node outside.
    const LINK: usize = W - 1;

    /// A node for [`NodePtr`]; its content means nothing yet.
    pub(crate) fn blank() -> Self {
        Self {
            words: core::array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    /// Word `index`, which is below `W`: every index comes from a slot that was searched or counted in this node, or is
    /// a constant of the layout.
    #[inline(always)]
    fn at(&self, index: usize) -> &AtomicU64 {
        debug_assert!(index < W);
        // SAFETY: N5: `index` is below `W`. Checked in debug builds, in which all tests run.
        unsafe { self.words.get_unchecked(index) }
    }

    #[inline(always)]
    fn word(&self, index: usize) -> u64 {
        self.at(index).load(Ordering::Relaxed)
    }

    /// Word `index` of a leaf: N3: while anybody may read a leaf nobody changes it, so the processor and the compiler may
    /// do with it what they like. A model sees a relaxed load.
    #[inline(always)]
    fn leaf_word(&self, index: usize) -> u64 {
        #[cfg(not(any(loom, shuttle, kmem_counting)))]
        {
            // SAFETY: the pointer is to a word of ours; the last store to it happened before the node was published to the
            // reader, or was the writer's own (N3).
            unsafe { self.at(index).as_ptr().read() }
        }
        #[cfg(any(loom, shuttle, kmem_counting))]
        self.word(index)
    }

    #[inline(always)]
    fn set_word(&self, index: usize, word: u64) {
        self.at(index).store(word, Ordering::Relaxed);
    }

    /// Has all lines of the node fetched at once: what a search reads of a node depends on itself, line after line.
    ///
    /// Relaxed loads whose values nobody uses; no core waits for them.
    #[inline(always)]
    pub(crate) fn fetch(&self) {
        #[cfg(not(loom))]
        for index in (8..W).step_by(8) {
            let _ = self.word(index);
        }
    }

    /// Has all lines of a node fetched that will be looked at after the present one.
    #[inline(always)]
    pub(crate) fn fetch_ahead(&self) {
        #[cfg(not(loom))]
        for index in (0..W).step_by(8) {
            let _ = self.word(index);
        }
    }

    /// Copies every word of `from` into this node, which no reader can reach.
    ///
    /// For the writer: what it alone changes it may read as plain memory.
    #[inline(always)]
    pub(crate) fn copy_from(&self, from: &Self) {
        #[cfg(not(loom))]
        {
            let (source, target) = (from.words.as_ptr(), self.words.as_ptr().cast_mut());
            // SAFETY: both are `W` words. `from` is changed by nobody else (E3; readers only load), `self` is reached by
            // nobody else, and an atomic word may be written through a shared reference.
            unsafe { core::ptr::copy_nonoverlapping(source, target, W) }
        }
        #[cfg(loom)]
        for index in 0..W {
            self.set_word(index, from.word(index));
        }
    }

    /// The link of a node outside of the tree.
    #[inline(always)]
    pub(crate) fn link(&self) -> u64 {
        self.at(Self::LINK).load(Ordering::Acquire)
    }

    /// Sets the link.
    pub(crate) fn set_link(&self, link: u64) {
        self.at(Self::LINK).store(link, Ordering::Release);
    }
}

/// `count`, and one more if `word` is above `limit`, which is given with all bits turned.
///
/// The carry of an addition. A comparison says the same, but compilers then go over flags, and from several comparisons
/// make vectors.
#[inline(always)]
fn count_above(count: u64, word: u64, not_limit: u64) -> u64 {
    let sum = ((u128::from(count) << 64) | u128::from(word)).wrapping_add(u128::from(not_limit));
    (sum >> 64) as u64
}

const fn low(capacity: usize) -> usize {
    if capacity / 3 < 2 { 2 } else { capacity / 3 }
}

/// A pointer as a word.
#[inline(always)]
pub(crate) fn to_word<const W: usize>(node: NodePtr<W>) -> u64 {
    node.as_ptr().expose_provenance() as u64
}

/// The node that a word leads to; `None` for 0. The low six bits are not part of the pointer.
#[inline(always)]
pub(crate) fn from_word<const W: usize>(word: u64) -> Option<NodePtr<W>> {
    NonNull::new(core::ptr::with_exposed_provenance_mut(
        (word & !63) as usize,
    ))
}
