//! A reader's finger: the entries it found last.
//!
//! Programs touch the same few areas over and over: the stack, the heap, a library. A finger remembers six entries and
//! answers from them with one comparison each and no descent. It belongs to one reader (a thread, a CPU), so it needs
//! no lock and writes to no shared line. Linux's `vmacache` was this with four entries a thread.
//!
//! Invariants
//! - `F1`: a remembered entry is trusted only while the tree's count of edits is the one it was remembered at.
//! - `F2`: unused places hold the range of one page that is none.
//! - `F3`: a hint is a guess: any place may be tried first.
//!
//! Replacement is the clock: a place that was hit since the hand passed gets a second chance, so that a stray lookup
//! does not push out what is used.

use core::fmt;

use kmem_hal::{ObjectAlloc, Page};

use crate::edit::entry;
use crate::node::{Node, Raw};
use crate::stock::Sharing;
use crate::tree::RangeTree;
use crate::value::{Entry, Value};

/// Entries a finger remembers.
const PLACES: usize = 8;

/// Hints: a power of two.
const HINTS: usize = 64;

/// Which hint a page has: areas of a few pages have a few, and large ones all of them.
#[inline(always)]
fn hint_of(page: u64) -> usize {
    (page >> 2 ^ page >> 9) as usize % HINTS
}

/// The entries that one reader found last.
///
/// A finger belongs to the tree it was first used with. Before it is used with another, [`clear`](Self::clear) it: a tree
/// in the memory of an older one cannot be told from it.
///
/// # Examples
///
/// ```
/// use kmem_hal::{FixedPool, Page, PageRange};
/// use kmem_vma_tree::{Finger, Node, RangeTree};
///
/// let nodes = FixedPool::<Node, 4>::new();
/// let mut tree: RangeTree<u32, _> = RangeTree::new_in(&nodes);
/// tree.store(PageRange::single(Page::ZERO), Some(7), &mut |_| ())?;
/// let mut finger = Finger::new();
/// for _ in 0..100 {
///     assert_eq!(tree.get_with(&mut finger, Page::ZERO).unwrap().value, 7);
/// }
/// tree.store(PageRange::single(Page::ZERO), None, &mut |_| ())?;
/// assert!(tree.get_with(&mut finger, Page::ZERO).is_none());
/// # Ok::<(), kmem_hal::AllocError>(())
/// ```
#[doc(alias = "vmacache")]
#[doc(alias = "mmap_cache")]
#[derive(Clone)]
pub struct Finger<V> {
    /// Of the tree, when the entries were remembered.
    edits: u64,
    /// The tree; a finger may be used with another, and then starts over.
    tree: usize,
    first: [u64; PLACES],
    /// Pages after the first one.
    more: [u64; PLACES],
    value: [u64; PLACES],
    /// Bit `i`: place `i` was hit since the hand passed.
    used: u32,
    hand: u32,
    /// Places below `PLACES`.
    hints: [u8; HINTS],
    _values: core::marker::PhantomData<V>,
}

impl<V> Finger<V> {
    /// A finger that remembers nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            edits: 0,
            tree: 0,
            first: [u64::MAX; PLACES],
            more: [0; PLACES],
            value: [0; PLACES],
            used: 0,
            hand: 0,
            hints: [0; HINTS],
            _values: core::marker::PhantomData,
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::new();
    }

    /// The entry at the place that the hint names, if it covers the page.
    #[inline(always)]
    fn find(&mut self, page: u64) -> Option<Raw> {
        self.at(usize::from(self.hints[hint_of(page)]) % PLACES, page)
    }

    /// The entry at `place`, if it covers the page.
    #[inline(always)]
    fn at(&mut self, place: usize, page: u64) -> Option<Raw> {
        let (first, more) = (self.first[place], self.more[place]);
        if page.wrapping_sub(first) > more {
            return None;
        }
        self.used |= 1 << place;
        Some(Raw {
            first,
            last: first + more,
            value: self.value[place],
        })
    }

    /// The entry that covers the page, wherever it is.
    fn find_any(&mut self, page: u64) -> Option<Raw> {
        let mut hits = 0_u32;
        for place in 0..PLACES {
            hits |= u32::from(page.wrapping_sub(self.first[place]) <= self.more[place]) << place;
        }
        if hits == 0 {
            return None;
        }
        let place = hits.trailing_zeros() as usize % PLACES;
        self.hints[hint_of(page)] = place as u8;
        self.at(place, page)
    }

    fn forget(&mut self, tree: usize, edits: u64) {
        *self = Self {
            edits,
            tree,
            ..Self::new()
        };
    }

    fn remember(&mut self, page: u64, raw: Raw) {
        const ALL: u32 = (1 << PLACES) - 1;
        if self.used == ALL {
            self.used = 0;
        }
        // The first place from the hand on that was not hit; those that the hand passes lose their second chance.
        let above = ALL << self.hand & ALL;
        let mut free = !self.used & above;
        if free == 0 {
            self.used &= !above;
            free = !self.used & ALL;
        }
        let place = free.trailing_zeros() as usize % PLACES;
        let passed = above & ((1 << place) - 1);
        self.used &= !passed;
        self.first[place] = raw.first;
        self.more[place] = raw.last - raw.first;
        self.value[place] = raw.value;
        self.hints[hint_of(page)] = place as u8;
        self.hand = (place as u32 + 1) % PLACES as u32;
    }
}

impl<V> Default for Finger<V> {
    fn default() -> Self {
        Self::new()
    }
}

impl<V> fmt::Debug for Finger<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Finger(after {} edits)", self.edits)
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> RangeTree<V, A, S, W> {
    /// [`get`](Self::get) with a finger: fast where the last few lookups were near.
    #[must_use]
    #[inline]
    pub fn get_with(&self, finger: &mut Finger<V>, page: Page) -> Option<Entry<V>> {
        self.get_with_finger(finger, page)
    }

    /// For a tree that nobody edits, or inside a read section.
    ///
    /// An edit is counted after it was published. So a finger may answer with what an edit that is still under way
    /// replaces: the lookup came before the edit (`R1`).
    #[inline(always)]
    pub(crate) fn get_with_finger(&self, finger: &mut Finger<V>, page: Page) -> Option<Entry<V>> {
        if finger.edits == self.edits()
            && finger.tree == core::ptr::from_ref(self).addr()
            && let Some(raw) = finger.find(page.number())
        {
            return Some(entry(raw));
        }
        self.get_slow(finger, page)
    }

    #[inline(never)]
    fn get_slow(&self, finger: &mut Finger<V>, page: Page) -> Option<Entry<V>> {
        let (tree, edits) = (core::ptr::from_ref(self).addr(), self.edits());
        if finger.edits != edits || finger.tree != tree {
            finger.forget(tree, edits);
        }
        if let Some(raw) = finger.find_any(page.number()) {
            return Some(entry(raw));
        }
        // SAFETY: nobody edits while `&self` of this tree is out, or a read section is open: the nodes stay.
        let node = unsafe { self.leaf_for(page) }?;
        // SAFETY: as above.
        let raw = unsafe { node.as_ref() }.leaf().find(page.number())?;
        finger.remember(page.number(), raw);
        Some(entry(raw))
    }
}
