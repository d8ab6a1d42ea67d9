//! A reader's finger: the entries it found last.
//!
//! Programs touch the same few areas over and over: the stack, the heap, a library. A finger remembers entries by the pages
//! they were found for, and answers from them with two comparisons and no descent. It belongs to one reader (a thread, a
//! CPU), so it needs no lock and writes to no shared line. Linux's `vmacache` was this with four entries a thread.
//!
//! ```text
//!   small    64 sets of two, by 8 pages          areas up to 64 pages           (as a TLB has an array
//!   medium    8 sets of two, by 256 pages        areas up to 16,384 pages        for each size of page)
//!   large     8 sets of two, by 65,536 pages     the others
//! ```
//!
//! An area is written into the set of the page it was found for, in the array of its size. So a large area, however many of
//! its pages are looked at, does not push small ones out. A new entry goes to the second place of its set and changes places
//! with the first when it is found again: what is looked up once does not push out what is looked up often.
//!
//! Invariants
//! - `F1`: a remembered entry is trusted only while the tree's count of edits is the one it was remembered at.
//! - `F2`: an unused place holds a range that contains no page.
//! - `F3`: the count is odd from before an edit is published to readers until after. At an odd count nothing is trusted or remembered: a reader that has
//!   seen the edit by any other lookup has seen the odd count, or the next one, too.
//!
//! Costs: a hit is a line of the cache and two comparisons; a miss is a descent and three sets looked at. 5 KiB, of which a
//! program that stays in a few areas touches a few lines: for memory of a CPU or a thread, not for a kernel's stack.

use core::fmt;

use kmem_hal::{ObjectAlloc, Page};

use crate::edit::entry;
use crate::node::{Node, Raw};
use crate::stock::Sharing;
use crate::tree::RangeTree;
use crate::value::{Entry, Value};

/// Sets of small areas; a power of two.
const SMALL: usize = 64;
/// Sets of medium and of large areas; a power of two.
const LARGER: usize = 8;
/// A small area has so many pages at most, and a medium one so many.
const SMALL_PAGES: u64 = 64;
const MEDIUM_PAGES: u64 = 1 << 14;

/// A remembered entry.
#[derive(Clone, Copy)]
struct Place {
    first: u64,
    /// Pages after the first one.
    more: u64,
    value: u64,
    /// The tree's count of edits when the entry was found.
    edits: u64,
}

impl Place {
    /// A range of one page that is none.
    const UNUSED: Self = Self {
        first: u64::MAX,
        more: 0,
        value: 0,
        edits: 0,
    };

    #[inline(always)]
    fn holds(&self, page: u64, edits: u64) -> bool {
        page.wrapping_sub(self.first) <= self.more && self.edits == edits
    }

    #[inline(always)]
    fn raw(&self) -> Raw {
        Raw {
            first: self.first,
            last: self.first + self.more,
            value: self.value,
        }
    }
}

/// Two remembered entries: a line of the cache.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Set([Place; 2]);

impl Set {
    const UNUSED: Self = Self([Place::UNUSED; 2]);

    /// The entry that is found often, if it covers the page.
    #[inline(always)]
    fn often(&self, page: u64, edits: u64) -> Option<Raw> {
        let place = &self.0[0];
        place.holds(page, edits).then(|| place.raw())
    }

    /// The other entry, if it covers the page; it is found often from now on.
    #[inline(always)]
    fn seldom(&mut self, page: u64, edits: u64) -> Option<Raw> {
        if !self.0[1].holds(page, edits) {
            return None;
        }
        self.0.swap(0, 1);
        Some(self.0[0].raw())
    }

    /// Either entry, which is found often from now on.
    fn either(&mut self, page: u64, edits: u64) -> Option<Raw> {
        self.often(page, edits).or_else(|| self.seldom(page, edits))
    }
}

/// The entries that one reader found last.
///
/// 5 KiB: one for each thread or CPU, beside its other data; not on a kernel's stack.
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
    small: [Set; SMALL],
    medium: [Set; LARGER],
    large: [Set; LARGER],
    /// Whether an area that is not small was ever remembered: mostly nobody need look for one.
    has_larger: bool,
    /// The tree; a finger may be used with another, and then starts over.
    tree: usize,
    _values: core::marker::PhantomData<V>,
}

impl<V> Finger<V> {
    /// A finger that remembers nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            small: [Set::UNUSED; SMALL],
            medium: [Set::UNUSED; LARGER],
            large: [Set::UNUSED; LARGER],
            has_larger: false,
            tree: 0,
            _values: core::marker::PhantomData,
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        // In place: a new one is too large for a kernel's stack.
        self.small.fill(Set::UNUSED);
        self.medium.fill(Set::UNUSED);
        self.large.fill(Set::UNUSED);
        self.has_larger = false;
        self.tree = 0;
    }

    /// The set of a small area found for `page`.
    #[inline(always)]
    fn small(&mut self, page: u64) -> &mut Set {
        &mut self.small[(page >> 3 ^ page >> 9) as usize % SMALL]
    }

    #[inline(always)]
    fn medium(&mut self, page: u64) -> &mut Set {
        &mut self.medium[(page >> 8 ^ page >> 11) as usize % LARGER]
    }

    #[inline(always)]
    fn large(&mut self, page: u64) -> &mut Set {
        &mut self.large[(page >> 16 ^ page >> 19) as usize % LARGER]
    }

    fn remember(&mut self, page: u64, raw: Raw, edits: u64) {
        let more = raw.last - raw.first;
        self.has_larger |= more >= SMALL_PAGES;
        let set = if more < SMALL_PAGES {
            self.small(page)
        } else if more < MEDIUM_PAGES {
            self.medium(page)
        } else {
            self.large(page)
        };
        set.0[1] = Place {
            first: raw.first,
            more,
            value: raw.value,
            edits,
        };
    }
}

impl<V> Default for Finger<V> {
    fn default() -> Self {
        Self::new()
    }
}

impl<V> fmt::Debug for Finger<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sets = self.small.iter().chain(&self.medium).chain(&self.large);
        let places = sets.flat_map(|set| &set.0);
        let used = places.filter(|place| place.first != u64::MAX).count();
        write!(f, "Finger({used} entries)")
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
    #[inline(always)]
    pub(crate) fn get_with_finger(&self, finger: &mut Finger<V>, page: Page) -> Option<Entry<V>> {
        if finger.tree == core::ptr::from_ref(self).addr()
            && let Some(raw) = finger
                .small(page.number())
                .often(page.number(), self.edits())
        {
            return Some(entry(raw));
        }
        self.get_slow(finger, page)
    }

    #[inline(never)]
    fn get_slow(&self, finger: &mut Finger<V>, page: Page) -> Option<Entry<V>> {
        let (tree, edits) = (core::ptr::from_ref(self).addr(), self.edits());
        if finger.tree != tree {
            finger.clear();
            finger.tree = tree;
        }
        let number = page.number();
        let mut found = finger.small(number).seldom(number, edits);
        if found.is_none() && finger.has_larger {
            found = finger
                .medium(number)
                .either(number, edits)
                .or_else(|| finger.large(number).either(number, edits));
        }
        if let Some(raw) = found {
            return Some(entry(raw));
        }
        // SAFETY: nobody edits while `&self` of this tree is out, or a read section is open: the nodes stay.
        let raw = unsafe { self.look_up(page) }?;
        if edits & 1 == 0 {
            finger.remember(number, raw, edits);
        }
        Some(entry(raw))
    }
}
