//! Going through the ranges in order, from both ends.
//!
//! An iterator keeps its path, so a step to the next leaf is a step in the parent and not a descent: per range one
//! word for the range, one for the value. The two ends know of each other by page numbers only.

use core::fmt;
use core::iter::FusedIterator;

use kmem_hal::{ObjectAlloc, Page, PageRange};

use crate::edit::entry;
use crate::node::{Leaf, Node, Raw};
use crate::path::Path;
use crate::stock::{Exclusive, Sharing};
use crate::tree::RangeTree;
use crate::value::{Entry, Value};

/// One end: the leaf it is in, decoded, and the next slot.
struct End<'a, const W: usize> {
    path: Path<W>,
    leaf: Leaf<'a, W>,
    /// Front: the next slot to give. Back: one above the next slot to give.
    slot: usize,
}

impl<'a, const W: usize> End<'a, W> {
    /// # Safety
    ///
    /// The nodes of the path stay alive and unedited for `'a`.
    unsafe fn new(path: Path<W>, slot: impl FnOnce(&Leaf<'a, W>) -> usize) -> Self {
        // SAFETY: by contract.
        let leaf = unsafe { path.pointer(0).as_ref() }.leaf();
        let slot = slot(&leaf);
        Self { path, leaf, slot }
    }

    #[inline(never)]
    fn next_leaf(&mut self) -> bool {
        let more = self.path.next_leaf();
        // SAFETY: `new`'s contract.
        self.leaf = unsafe { self.path.pointer(0).as_ref() }.leaf();
        self.slot = 0;
        more
    }

    #[inline(never)]
    fn previous_leaf(&mut self) -> bool {
        let more = self.path.previous_leaf();
        // SAFETY: `new`'s contract.
        self.leaf = unsafe { self.path.pointer(0).as_ref() }.leaf();
        self.slot = self.leaf.count();
        more
    }
}

/// The entries of a tree that overlap a range, whole and in order, from both ends.
///
/// Made by [`RangeTree::iter`], [`iter_from`](RangeTree::iter_from) and [`range`](RangeTree::range).
pub struct Iter<'a, V: Value, A: ObjectAlloc<Node<W>>, S: Sharing = Exclusive, const W: usize = 32>
{
    tree: &'a RangeTree<V, A, S, W>,
    front: Option<End<'a, W>>,
    back: Option<End<'a, W>>,
    /// What lies below was given already, or is not asked for.
    low: u64,
    /// What lies above was given already, or is not asked for.
    high: u64,
    done: bool,
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> RangeTree<V, A, S, W> {
    /// The entries, ascending.
    #[must_use]
    #[doc(alias = "mt_for_each")]
    pub fn iter(&self) -> Iter<'_, V, A, S, W> {
        self.range(PageRange::ALL)
    }

    /// The entries whose last page is at or above `page`, ascending.
    #[must_use]
    #[doc(alias = "for_each_vma")]
    pub fn iter_from(&self, page: Page) -> Iter<'_, V, A, S, W> {
        self.range(PageRange::new(page, Page::MAX).unwrap_or(PageRange::ALL))
    }

    /// The entries that overlap `range`, whole, ascending.
    #[must_use]
    #[doc(alias = "for_each_vma_range")]
    pub fn range(&self, range: PageRange) -> Iter<'_, V, A, S, W> {
        Iter {
            tree: self,
            front: None,
            back: None,
            low: range.first().number(),
            high: range.last().number(),
            done: false,
        }
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> Iter<'_, V, A, S, W> {
    #[cold]
    fn start(&mut self) -> Option<()> {
        let low = self.low;
        // SAFETY: the tree is borrowed, so nobody edits it while the iterator lives.
        unsafe {
            let path = Path::new(self.tree.root_word(), low)?;
            self.front = Some(End::new(path, |leaf| leaf.first_at_or_after(low)));
        }
        Some(())
    }

    #[cold]
    fn start_back(&mut self) -> Option<()> {
        let high = self.high;
        // SAFETY: the tree is borrowed, so nobody edits it while the iterator lives.
        unsafe {
            let path = Path::new(self.tree.root_word(), high)?;
            self.back = Some(End::new(path, |leaf| leaf.rank(high)));
        }
        Some(())
    }

    #[inline]
    fn next_raw(&mut self) -> Option<Raw> {
        if self.done {
            return None;
        }
        if self.front.is_none() {
            self.start()?;
        }
        let end = self.front.as_mut()?;
        if end.slot >= end.leaf.count() && !end.next_leaf() {
            self.done = true;
            return None;
        }
        let raw = end.leaf.raw(end.slot);
        end.slot += 1;
        if raw.first > self.high {
            self.done = true;
            return None;
        }
        self.done = raw.last >= self.high;
        self.low = raw.last.wrapping_add(1);
        Some(raw)
    }

    #[inline]
    fn next_back_raw(&mut self) -> Option<Raw> {
        if self.done {
            return None;
        }
        if self.back.is_none() {
            self.start_back()?;
        }
        let end = self.back.as_mut()?;
        if end.slot == 0 && !end.previous_leaf() {
            self.done = true;
            return None;
        }
        end.slot -= 1;
        let raw = end.leaf.raw(end.slot);
        if raw.last < self.low {
            self.done = true;
            return None;
        }
        self.done = raw.first <= self.low;
        self.high = raw.first.wrapping_sub(1);
        Some(raw)
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> Iterator
    for Iter<'_, V, A, S, W>
{
    type Item = Entry<V>;

    #[inline]
    fn next(&mut self) -> Option<Entry<V>> {
        entry(self.next_raw()?)
    }

    /// A whole leaf at a time.
    fn fold<B, F: FnMut(B, Entry<V>) -> B>(mut self, init: B, mut f: F) -> B {
        let mut all = init;
        let Some(first) = self.next() else {
            return all;
        };
        all = f(all, first);
        let high = self.high;
        if let (Some(end), false) = (&mut self.front, self.done) {
            loop {
                for slot in end.slot..end.leaf.count() {
                    let raw = end.leaf.raw(slot);
                    if raw.first > high {
                        return all;
                    }
                    if let Some(entry) = entry(raw) {
                        all = f(all, entry);
                    }
                }
                if !end.next_leaf() {
                    break;
                }
            }
        }
        all
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (0, Some(self.tree.len()))
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> DoubleEndedIterator
    for Iter<'_, V, A, S, W>
{
    #[inline]
    fn next_back(&mut self) -> Option<Entry<V>> {
        entry(self.next_back_raw()?)
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> FusedIterator
    for Iter<'_, V, A, S, W>
{
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> fmt::Debug
    for Iter<'_, V, A, S, W>
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Iter({:#x}..={:#x})", self.low, self.high)
    }
}

impl<'a, V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> IntoIterator
    for &'a RangeTree<V, A, S, W>
{
    type Item = Entry<V>;
    type IntoIter = Iter<'a, V, A, S, W>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}
