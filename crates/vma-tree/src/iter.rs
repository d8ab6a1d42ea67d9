//! Going through the ranges in order, from both ends.
//!
//! An end of an iterator stands in a leaf and knows the leaf's parent: per range one word for the range, one for the
//! value; from leaf to leaf one word of the parent; from parent to parent a descent. Where an iteration ends is found out
//! once a leaf, so a step compares a slot and nothing else. The two ends know of each other by page numbers only.

use core::fmt;
use core::iter::FusedIterator;

use kmem_hal::{ObjectAlloc, Page, PageRange};

use crate::edit::entry;
use crate::node::{Leaf, Node, from_word};
use crate::path::{HEIGHT_MASK, Path};
use crate::stock::{Exclusive, Sharing};
use crate::tree::RangeTree;
use crate::value::{Entry, Value};

/// One end: the leaf it is in, decoded, and where that hangs.
#[derive(Clone, Copy)]
struct End<'a, const W: usize> {
    leaf: Leaf<'a, W>,
    /// The leaf's parent, which child of it the leaf is, and of how many; none where the leaf is the root.
    parent: Option<(&'a Node<W>, usize, usize)>,
    /// Front: the next slot to give. Back: one above the next slot to give.
    slot: usize,
    /// Front: where the end stops in this leaf. Back: not looked at.
    stop: usize,
}

impl<'a, const W: usize> End<'a, W> {
    /// # Safety
    ///
    /// The nodes of the path stay alive and unedited for `'a`.
    #[inline]
    unsafe fn new(path: &Path<W>) -> Self {
        // SAFETY: by contract.
        let node = |level| unsafe { path.pointer(level).as_ref() };
        let parent = (path.height() > 1).then(|| (node(1), path.slot(1), node(1).children()));
        Self {
            leaf: node(0).leaf(),
            parent,
            slot: 0,
            stop: 0,
        }
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
    /// What lies below was given from the back's view already, or is not asked for. Behind the front while that is in a leaf.
    low: u64,
    /// What lies above was given already, or is not asked for.
    high: u64,
    done: bool,
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> RangeTree<V, A, S, W> {
    /// The entries, ascending.
    ///
    /// The tree is not edited meanwhile; for that there is a [cursor](RangeTree::cursor_mut).
    ///
    /// ```compile_fail,E0502
    /// # use kmem_hal::{ObjectAlloc, PageRange};
    /// # use kmem_vma_tree::{Node, RangeTree};
    /// fn clear_all<A: ObjectAlloc<Node>>(tree: &mut RangeTree<u32, A>) {
    ///     for entry in tree.iter() {
    ///         tree.store(entry.range, None, &mut |_| ()).unwrap();
    ///     }
    /// }
    /// ```
    #[must_use]
    #[inline]
    #[doc(alias = "mt_for_each")]
    pub fn iter(&self) -> Iter<'_, V, A, S, W> {
        self.range(PageRange::ALL)
    }

    /// The entries whose last page is at or above `page`, ascending.
    #[must_use]
    #[inline]
    #[doc(alias = "for_each_vma")]
    pub fn iter_from(&self, page: Page) -> Iter<'_, V, A, S, W> {
        self.range(PageRange::new(page, Page::MAX).unwrap_or(PageRange::ALL))
    }

    /// The entries that overlap `range`, whole, ascending.
    #[must_use]
    #[inline]
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

    /// The leaves, ascending, each with the largest gap on record for it (0 for a leaf that is the root).
    pub(crate) fn leaves(&self) -> impl Iterator<Item = (Leaf<'_, W>, u32)> {
        let mut next = self.end_at(0);
        core::iter::from_fn(move || {
            let end = next?;
            next = match Iter::<V, A, S, W>::sibling(&end, Page::MAX.number()) {
                Some(end) => Some(end),
                None => Iter::<V, A, S, W>::refill(
                    self,
                    Some(End {
                        slot: end.leaf.count(),
                        stop: end.leaf.count(),
                        ..end
                    }),
                    0,
                    Page::MAX.number(),
                ),
            };
            let gap = end.parent.map_or(0, |(parent, slot, _)| parent.gap(slot));
            Some((end.leaf, gap))
        })
    }

    /// The end of an iterator in the leaf that answers for `page`.
    #[inline]
    fn end_at(&self, page: u64) -> Option<End<'_, W>> {
        let root = self.root_word();
        let mut node: &Node<W> = {
            // SAFETY: the tree is borrowed, so nobody edits it while the iterator lives.
            unsafe { from_word(root)?.as_ref() }
        };
        let mut parent = None;
        for _ in 1..root & HEIGHT_MASK {
            let slot = node.child_for(page);
            parent = Some((node, slot, node.children()));
            // SAFETY: as above; N4.
            node = unsafe { node.child(slot)?.as_ref() };
        }
        Some(End {
            leaf: node.leaf(),
            parent,
            slot: 0,
            stop: 0,
        })
    }

    /// The end of an iterator in the leaf before the one that answers for `page`.
    #[inline(never)]
    fn end_before(&self, page: u64) -> Option<End<'_, W>> {
        let mut path = Path::unset();
        // SAFETY: as in `end_at`.
        unsafe {
            (path.find(self.root_word(), page) && path.previous_leaf()).then(|| End::new(&path))
        }
    }
}

impl<'a, V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> Iter<'a, V, A, S, W> {
    /// The front in the next leaf of the same parent, if there is one and every range of it is asked for.
    #[inline(always)]
    fn sibling(end: &End<'a, W>, high: u64) -> Option<End<'a, W>> {
        let (parent, slot, children) = end.parent?;
        if high != Page::MAX.number() || slot + 1 >= children {
            return None;
        }
        if slot + 2 < children
            && let Some(ahead) = parent.child(slot + 2)
        {
            // SAFETY: the tree is borrowed, so nobody edits it while the iterator lives.
            unsafe { ahead.as_ref() }.fetch_ahead();
        }
        // SAFETY: the tree is borrowed, so nobody edits it while the iterator lives.
        let leaf = unsafe { parent.child(slot + 1)?.as_ref() }.leaf();
        Some(End {
            leaf,
            parent: Some((parent, slot + 1, children)),
            slot: 0,
            stop: leaf.count(),
        })
    }

    /// The front in its first leaf, or in the next one; `None` at the end.
    ///
    /// Takes and gives values, so that an iterator that is used where it was made lives in registers.
    #[inline(never)]
    fn refill(
        tree: &'a RangeTree<V, A, S, W>,
        front: Option<End<'a, W>>,
        low: u64,
        high: u64,
    ) -> Option<End<'a, W>> {
        let Some(end) = front else {
            let mut end = tree.end_at(low)?;
            end.slot = end.leaf.first_at_or_after(low);
            end.stop = end.leaf.rank(high);
            return Some(end);
        };
        let last = end.leaf.end();
        if end.stop < end.leaf.count() || last >= high {
            return None;
        }
        let mut next = end;
        match end.parent {
            Some((parent, slot, children)) if slot + 1 < children => {
                let node = parent.child(slot + 1)?;
                next.parent = Some((parent, slot + 1, children));
                // SAFETY: the tree is borrowed, so nobody edits it while the iterator lives.
                next.leaf = unsafe { node.as_ref() }.leaf();
            }
            None => return None,
            Some(_) => {
                // E1: the next page is the next leaf's, unless this leaf is the tree's last.
                next = tree.end_at(last + 1)?;
                if core::ptr::eq(next.leaf.node(), end.leaf.node()) {
                    return None;
                }
            }
        }
        next.slot = 0;
        next.stop = if high == Page::MAX.number() {
            next.leaf.count()
        } else {
            next.leaf.rank(high)
        };
        Some(next)
    }

    /// The page from which on the front has not given anything yet.
    fn front_page(&self) -> u64 {
        match &self.front {
            Some(end) if end.slot > 0 => self.low.max(end.leaf.range(end.slot - 1).1 + 1),
            _ => self.low,
        }
    }

    #[cold]
    fn start_back(&self) -> Option<End<'a, W>> {
        let mut end = self.tree.end_at(self.high)?;
        end.slot = end.leaf.rank(self.high);
        Some(end)
    }

    /// The previous leaf of the back; `None` at the beginning.
    fn step_back(&self, end: &End<'a, W>) -> Option<End<'a, W>> {
        let mut next = match end.parent {
            None => return None,
            Some((parent, slot, children)) if slot > 0 => {
                let node = parent.child(slot - 1)?;
                End {
                    parent: Some((parent, slot - 1, children)),
                    // SAFETY: the tree is borrowed, so nobody edits it while the iterator lives.
                    leaf: unsafe { node.as_ref() }.leaf(),
                    ..*end
                }
            }
            Some(_) => self.tree.end_before(end.leaf.range(0).0)?,
        };
        next.slot = next.leaf.count();
        Some(next)
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> Iterator
    for Iter<'_, V, A, S, W>
{
    type Item = Entry<V>;

    #[inline(always)]
    fn next(&mut self) -> Option<Entry<V>> {
        loop {
            if let Some(end) = &mut self.front
                && end.slot < end.stop
            {
                let raw = end.leaf.raw(end.slot);
                end.slot += 1;
                return Some(entry(raw));
            }
            if self.done {
                return None;
            }
            if let Some(end) = &self.front
                && end.stop == end.leaf.count()
                && let Some(next) = Self::sibling(end, self.high)
            {
                self.front = Some(next);
                continue;
            }
            match Self::refill(self.tree, self.front, self.low, self.high) {
                Some(end) => self.front = Some(end),
                None => {
                    self.done = true;
                    return None;
                }
            }
        }
    }

    /// A whole leaf at a time.
    #[inline]
    fn fold<B, F: FnMut(B, Entry<V>) -> B>(mut self, init: B, mut f: F) -> B {
        let mut all = init;
        loop {
            if let Some(mut end) = self.front {
                loop {
                    let stop = end.stop.max(end.slot);
                    if end.leaf.is_sorted() {
                        for slot in end.slot..stop {
                            all = f(all, entry(end.leaf.raw_in(slot)));
                        }
                    } else {
                        for raw in end.leaf.raws(end.slot, stop) {
                            all = f(all, entry(raw));
                        }
                    }
                    end.slot = stop;
                    if end.stop < end.leaf.count() {
                        break;
                    }
                    match Self::sibling(&end, self.high) {
                        Some(next) => end = next,
                        None => break,
                    }
                }
                self.front = Some(end);
            }
            if self.done {
                return all;
            }
            match Self::refill(self.tree, self.front, self.low, self.high) {
                Some(end) => self.front = Some(end),
                None => return all,
            }
        }
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
        if self.done {
            return None;
        }
        if self.back.is_none() {
            self.back = self.start_back();
        }
        let mut end = self.back?;
        if end.slot == 0 {
            match self.step_back(&end) {
                Some(next) => end = next,
                None => {
                    self.done = true;
                    return None;
                }
            }
        }
        end.slot -= 1;
        let raw = end.leaf.raw(end.slot);
        self.back = Some(end);
        if raw.last < self.front_page() {
            self.done = true;
            if let Some(front) = &mut self.front {
                front.stop = front.slot;
            }
            return None;
        }
        // What the front may still give ends below this range.
        match raw.first.checked_sub(1) {
            Some(high) => {
                self.high = high;
                if let Some(front) = &mut self.front {
                    front.stop = front.leaf.rank(high).max(front.slot);
                }
                self.done = high < self.low;
            }
            None => self.done = true,
        }
        if self.done
            && let Some(front) = &mut self.front
        {
            front.stop = front.slot;
        }
        Some(entry(raw))
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
        write!(f, "Iter({:#x}..={:#x})", self.front_page(), self.high)
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
