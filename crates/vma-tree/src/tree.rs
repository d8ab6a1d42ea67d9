//! The tree.

use core::marker::PhantomData;
use core::ptr::NonNull;

use kmem_hal::sync::{AtomicU64, Ordering};
use kmem_hal::{AllocError, ObjectAlloc, Page, PageRange};

use crate::gap::{Gap, GapRequest};
use crate::node::Node;
use crate::value::{Entry, Mergeable, Value};

type Link<const W: usize> = Option<NonNull<Node<W>>>;

/// The entries next to a piece that [`RangeTree::modify`] shows to its closure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbours<V> {
    /// The nearest entry below, touching or not.
    pub below: Option<Entry<V>>,
    /// The nearest entry above, touching or not.
    pub above: Option<Entry<V>>,
}

/// Ordered, non-overlapping ranges of pages with a value each.
#[doc(alias = "maple_tree")]
#[doc(alias = "mm_mt")]
pub struct RangeTree<V: Value, A: ObjectAlloc<Node<W>>, const W: usize = 32> {
    head: Link<W>,
    spare: Link<W>,
    len: usize,
    alloc: A,
    _values: PhantomData<V>,
}

// SAFETY: the nodes are owned by the tree; values are plain words of a type that may be sent.
unsafe impl<V: Value + Send, A: ObjectAlloc<Node<W>> + Send, const W: usize> Send
    for RangeTree<V, A, W>
{
}
// SAFETY: shared access only reads.
unsafe impl<V: Value + Sync, A: ObjectAlloc<Node<W>> + Sync, const W: usize> Sync
    for RangeTree<V, A, W>
{
}

fn word<const W: usize>(node: NonNull<Node<W>>, index: usize) -> u64 {
    // SAFETY: links lead to nodes of the tree.
    unsafe { node.as_ref() }.words[index].load(Ordering::Relaxed)
}

fn set<const W: usize>(node: NonNull<Node<W>>, index: usize, value: u64) {
    // SAFETY: links lead to nodes of the tree.
    unsafe { node.as_ref() }.words[index].store(value, Ordering::Relaxed);
}

fn link<const W: usize>(node: NonNull<Node<W>>) -> Link<W> {
    NonNull::new(core::ptr::with_exposed_provenance_mut(
        word(node, 0) as usize
    ))
}

fn set_link<const W: usize>(node: NonNull<Node<W>>, next: Link<W>) {
    set(
        node,
        0,
        next.map_or(0, |next| next.as_ptr().expose_provenance() as u64),
    );
}

fn entry<V: Value, const W: usize>(node: NonNull<Node<W>>) -> Entry<V> {
    let first = Page::from_number(word(node, 1));
    let last = Page::from_number(word(node, 2));
    Entry {
        range: PageRange::new(first, last).unwrap_or(PageRange::single(first)),
        value: V::from_word(word(node, 3)),
    }
}

#[allow(clippy::type_complexity)]
impl<V: Value, A: ObjectAlloc<Node<W>>, const W: usize> RangeTree<V, A, W> {
    kmem_hal::const_new! {
        /// An empty tree whose nodes come from `alloc`. Allocates nothing.
        pub fn new_in(alloc: A) -> Self {
            Self { head: None, spare: None, len: 0, alloc, _values: PhantomData }
        }
    }

    /// Number of ranges.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no page is covered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The entry that covers `page`.
    #[must_use]
    #[doc(alias = "vma_lookup")]
    pub fn get(&self, page: Page) -> Option<Entry<V>> {
        self.first_at_or_after(page)
            .filter(|entry| entry.range.contains(page))
    }

    /// The lowest entry whose last page is at or above `page`.
    #[must_use]
    #[doc(alias = "find_vma")]
    pub fn first_at_or_after(&self, page: Page) -> Option<Entry<V>> {
        let mut at = self.head;
        while let Some(node) = at {
            if word(node, 2) >= page.number() {
                return Some(entry(node));
            }
            at = link(node);
        }
        None
    }

    /// The highest entry whose last page is below `page`.
    #[must_use]
    pub fn last_before(&self, page: Page) -> Option<Entry<V>> {
        let mut found = None;
        let mut at = self.head;
        while let Some(node) = at {
            if word(node, 2) >= page.number() {
                break;
            }
            found = Some(entry(node));
            at = link(node);
        }
        found
    }

    /// The entries, ascending.
    #[must_use]
    pub fn iter(&self) -> Iter<'_, V, A, W> {
        self.range(PageRange::ALL)
    }

    /// The entries whose last page is at or above `page`, ascending.
    #[must_use]
    #[doc(alias = "for_each_vma")]
    pub fn iter_from(&self, page: Page) -> Iter<'_, V, A, W> {
        self.range(PageRange::new(page, Page::MAX).unwrap_or(PageRange::ALL))
    }

    /// The entries that overlap `range`, whole, ascending.
    #[must_use]
    #[doc(alias = "for_each_vma_range")]
    pub fn range(&self, range: PageRange) -> Iter<'_, V, A, W> {
        Iter {
            tree: self,
            left: Some(range),
        }
    }

    fn take_node(&mut self) -> Result<NonNull<Node<W>>, AllocError> {
        if let Some(node) = self.spare {
            self.spare = link(node);
            return Ok(node);
        }
        let node = self.alloc.alloc()?;
        // SAFETY: B1: the memory is ours and fits a node.
        unsafe {
            node.as_ptr().write(Node {
                words: core::array::from_fn(|_| AtomicU64::new(0)),
            });
        }
        Ok(node)
    }

    fn drop_node(&mut self, node: NonNull<Node<W>>) {
        set_link(node, self.spare);
        self.spare = Some(node);
    }

    fn trim(&mut self) {
        while let Some(node) = self.spare {
            self.spare = link(node);
            // SAFETY: the node came from `alloc` and is linked nowhere.
            unsafe { self.alloc.free(node) }
        }
    }

    fn fill_spare(&mut self, count: usize) -> Result<(), AllocError> {
        let mut have = 0;
        let mut at = self.spare;
        while let Some(node) = at {
            have += 1;
            at = link(node);
        }
        while have < count {
            let node = self.alloc.alloc()?;
            // SAFETY: B1: the memory is ours and fits a node.
            unsafe {
                node.as_ptr().write(Node {
                    words: core::array::from_fn(|_| AtomicU64::new(0)),
                });
            }
            self.drop_node(node);
            have += 1;
        }
        Ok(())
    }

    /// Makes `range` map to `value`, or to nothing, whatever was there.
    ///
    /// Entries that reach over an end of `range` keep what is outside of it (the upper part with
    /// [`Value::split`]); what was inside is handed to `removed` piece by piece, ascending, after the change.
    /// Never merges.
    ///
    /// # Errors
    ///
    /// [`AllocError`] where no node could be had: then nothing has changed and `removed` was not called.
    #[doc(alias = "mas_store_gfp")]
    #[doc(alias = "vma_iter_clear")]
    pub fn store(
        &mut self,
        range: PageRange,
        value: Option<V>,
        removed: &mut dyn FnMut(Entry<V>),
    ) -> Result<(), AllocError> {
        self.fill_spare(3)?;
        let (first, last) = (range.first().number(), range.last().number());
        let mut previous: Link<W> = None;
        let mut at = self.head;
        while let Some(node) = at {
            if word(node, 2) >= first {
                break;
            }
            previous = at;
            at = link(node);
        }
        let mut old: Link<W> = None;
        let mut tail = at;
        if let Some(node) = at
            && word(node, 1) < first
        {
            // Keep the lower part.
            let whole: Entry<V> = entry(node);
            let low = Page::from_number(first - 1);
            if let Some(part) = PageRange::new(whole.first(), low) {
                let keep = self.take_node()?;
                self.put(keep, part, whole.value, None);
                self.link_after(previous, Some(keep));
                previous = Some(keep);
                self.len += 1;
            }
        }
        let mut old_end: Link<W> = None;
        while let Some(node) = tail {
            if word(node, 1) > last {
                break;
            }
            let next = link(node);
            match old_end {
                Some(end) => set_link(end, Some(node)),
                None => old = Some(node),
            }
            set_link(node, None);
            old_end = Some(node);
            self.len -= 1;
            if word(node, 2) > last {
                let whole: Entry<V> = entry(node);
                if let Some(part) = PageRange::new(Page::from_number(last + 1), whole.last())
                    && let Some(part) = whole.clipped(part)
                {
                    let keep = self.take_node()?;
                    self.put(keep, part.range, part.value, next);
                    self.len += 1;
                    tail = Some(keep);
                    break;
                }
            }
            tail = next;
        }
        if let Some(value) = value {
            let node = self.take_node()?;
            self.put(node, range, value, tail);
            self.len += 1;
            tail = Some(node);
        }
        self.link_after(previous, tail);
        while let Some(node) = old {
            old = link(node);
            if let Some(piece) = entry::<V, W>(node).clipped(range) {
                removed(piece);
            }
            self.drop_node(node);
        }
        Ok(())
    }

    fn put(&self, node: NonNull<Node<W>>, range: PageRange, value: V, next: Link<W>) {
        set(node, 1, range.first().number());
        set(node, 2, range.last().number());
        set(node, 3, value.to_word());
        set_link(node, next);
    }

    fn link_after(&mut self, previous: Link<W>, next: Link<W>) {
        match previous {
            Some(previous) => set_link(previous, next),
            None => self.head = next,
        }
    }

    /// Makes sure that the next `stores` stores cannot fail.
    ///
    /// # Errors
    ///
    /// [`AllocError`] where there are too few nodes; the tree is unchanged.
    #[doc(alias = "mas_preallocate")]
    pub fn reserve(&mut self, stores: usize) -> Result<Reserved<'_, V, A, W>, AllocError> {
        if let Err(error) = self.fill_spare(3 * stores) {
            self.trim();
            return Err(error);
        }
        Ok(Reserved { tree: self, stores })
    }

    /// Stores `value` over `range` and merges it with the entries that touch it below and above, as `merge` says.
    ///
    /// Gives the entry that covers `range` afterwards.
    ///
    /// # Errors
    ///
    /// As [`store`](Self::store).
    pub fn store_merged_by(
        &mut self,
        range: PageRange,
        value: V,
        removed: &mut dyn FnMut(Entry<V>),
        merge: &mut dyn FnMut(&Entry<V>, &Entry<V>) -> Option<V>,
    ) -> Result<Entry<V>, AllocError> {
        let mut middle = Entry { range, value };
        let below = range
            .first()
            .checked_sub(1)
            .and_then(|page| self.get(page))
            .and_then(|entry| {
                entry.clipped(PageRange::new(
                    entry.first(),
                    Page::from_number(range.first().number() - 1),
                )?)
            });
        let above = range.last().checked_add(1).and_then(|page| {
            self.get(page)
                .and_then(|e| e.clipped(PageRange::new(page, e.last())?))
        });
        if let Some(below) = below
            && let Some(value) = merge(&below, &middle)
        {
            middle = Entry {
                range: below.range.hull(middle.range),
                value,
            };
        }
        if let Some(above) = above
            && let Some(value) = merge(&middle, &above)
        {
            middle = Entry {
                range: middle.range.hull(above.range),
                value,
            };
        }
        self.store(middle.range, Some(middle.value), &mut |piece| {
            if let Some(inside) = piece.clipped(range) {
                removed(inside);
            }
        })?;
        Ok(middle)
    }

    /// [`store_merged_by`](Self::store_merged_by) with the value's own rule.
    ///
    /// # Errors
    ///
    /// As [`store`](Self::store).
    pub fn store_merged(
        &mut self,
        range: PageRange,
        value: V,
        removed: &mut dyn FnMut(Entry<V>),
    ) -> Result<Entry<V>, AllocError>
    where
        V: Mergeable,
    {
        self.store_merged_by(range, value, removed, &mut V::merge)
    }

    /// Passes each piece of an entry inside `range` through `change`, and merges where the value's rule says so.
    ///
    /// `change` sees the piece and the nearest entries on both sides; it answers the new value, or `None` to erase
    /// the piece. Pieces come ascending.
    ///
    /// # Errors
    ///
    /// As [`store`](Self::store).
    pub fn modify(
        &mut self,
        range: PageRange,
        change: &mut dyn FnMut(Entry<V>, Neighbours<V>) -> Option<V>,
    ) -> Result<(), AllocError>
    where
        V: Mergeable,
    {
        self.modify_by(range, change, &mut V::merge)
    }

    /// [`modify`](Self::modify) with a merge rule of the caller's.
    ///
    /// # Errors
    ///
    /// As [`store`](Self::store).
    pub fn modify_by(
        &mut self,
        range: PageRange,
        change: &mut dyn FnMut(Entry<V>, Neighbours<V>) -> Option<V>,
        merge: &mut dyn FnMut(&Entry<V>, &Entry<V>) -> Option<V>,
    ) -> Result<(), AllocError> {
        let count = self.range(range).count();
        self.fill_spare(3 * count + 3)?;
        let mut page = range.first();
        while let Some(found) = self.first_at_or_after(page) {
            let Some(left) = PageRange::new(page, range.last()) else {
                break;
            };
            let Some(piece) = found.clipped(left) else {
                break;
            };
            let around = Neighbours {
                below: if found.first() < piece.first() {
                    found.clipped(
                        PageRange::new(
                            found.first(),
                            Page::from_number(piece.first().number() - 1),
                        )
                        .unwrap_or(found.range),
                    )
                } else {
                    self.last_before(piece.first())
                },
                above: piece.last().checked_add(1).and_then(|next| {
                    let above = self.first_at_or_after(next)?;
                    above.clipped(PageRange::new(next, Page::MAX)?)
                }),
            };
            match change(piece, around) {
                Some(value) => {
                    self.store_merged_by(piece.range, value, &mut |_| (), merge)?;
                }
                None => self.store(piece.range, None, &mut |_| ())?,
            }
            match piece.last().checked_add(1) {
                Some(next) => page = next,
                None => break,
            }
        }
        Ok(())
    }

    /// The free ranges inside `limits`, ascending, with their neighbours.
    pub fn gaps(&self, limits: PageRange) -> impl Iterator<Item = Gap<V>> + '_ {
        let mut below = self.last_before(limits.first());
        let mut from = Some(limits.first());
        core::iter::from_fn(move || {
            loop {
                let first = from?;
                if first > limits.last() {
                    return None;
                }
                let above = self.first_at_or_after(first);
                let was = below;
                let end = match above {
                    Some(above) => {
                        below = Some(above);
                        from = above.last().checked_add(1);
                        match above.first().checked_sub(1) {
                            Some(end) => end,
                            None => continue,
                        }
                    }
                    None => {
                        from = None;
                        Page::MAX
                    }
                };
                let Some(range) = PageRange::new(first, end.min(limits.last())) else {
                    continue;
                };
                return Some(Gap {
                    range,
                    below: was.filter(|e| e.last().number() + 1 == range.first().number()),
                    above: above.filter(|e| range.last().number() + 1 == e.first().number()),
                });
            }
        })
    }

    /// The lowest place for the request.
    #[must_use]
    #[doc(alias = "unmapped_area")]
    #[doc(alias = "mas_empty_area")]
    pub fn find_gap_up(&self, request: &GapRequest) -> Option<PageRange> {
        self.find_gap_up_with(request, &mut |gap| Some(gap.range))
    }

    /// The highest place for the request.
    #[must_use]
    #[doc(alias = "unmapped_area_topdown")]
    #[doc(alias = "mas_empty_area_rev")]
    pub fn find_gap_down(&self, request: &GapRequest) -> Option<PageRange> {
        self.find_gap_down_with(request, &mut |gap| Some(gap.range))
    }

    /// The lowest place for the request in the part of a gap that `usable` leaves (stack guards take their share).
    pub fn find_gap_up_with(
        &self,
        request: &GapRequest,
        usable: &mut dyn FnMut(&Gap<V>) -> Option<PageRange>,
    ) -> Option<PageRange> {
        self.gaps(request.limits)
            .filter_map(|gap| usable(&gap))
            .filter(|gap| gap.count() >= request.at_least)
            .find_map(|gap| request.place_low(gap))
    }

    /// The highest place for the request in the part of a gap that `usable` leaves.
    pub fn find_gap_down_with(
        &self,
        request: &GapRequest,
        usable: &mut dyn FnMut(&Gap<V>) -> Option<PageRange>,
    ) -> Option<PageRange> {
        self.gaps(request.limits)
            .filter_map(|gap| usable(&gap))
            .filter(|gap| gap.count() >= request.at_least)
            .filter_map(|gap| request.place_high(gap))
            .last()
    }

    /// Pages in the largest free range; 0 where every page is covered.
    #[must_use]
    pub fn largest_gap(&self) -> u64 {
        self.gaps(PageRange::ALL)
            .map(|gap| gap.range.count())
            .max()
            .unwrap_or(0)
    }

    /// Erases everything and gives the nodes back.
    pub fn clear(&mut self) {
        while let Some(node) = self.head {
            self.head = link(node);
            self.drop_node(node);
        }
        self.len = 0;
        self.trim();
    }

    /// A tree with what `filter` makes of each entry (`None` leaves it out): fork's copy.
    ///
    /// # Errors
    ///
    /// [`AllocError`] where there are too few nodes; those taken are given back.
    #[doc(alias = "__mt_dup")]
    pub fn duplicate_in<B: ObjectAlloc<Node<W>>>(
        &self,
        alloc: B,
        filter: &mut dyn FnMut(Entry<V>) -> Option<V>,
    ) -> Result<RangeTree<V, B, W>, AllocError> {
        let mut copy = RangeTree::new_in(alloc);
        for entry in self {
            if let Some(value) = filter(entry) {
                copy.store(entry.range, Some(value), &mut |_| ())?;
            }
        }
        Ok(copy)
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, const W: usize> Drop for RangeTree<V, A, W> {
    fn drop(&mut self) {
        self.clear();
    }
}

impl<'a, V: Value, A: ObjectAlloc<Node<W>>, const W: usize> IntoIterator
    for &'a RangeTree<V, A, W>
{
    type Item = Entry<V>;
    type IntoIter = Iter<'a, V, A, W>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// A tree with nodes set aside: a given number of stores cannot fail.
pub struct Reserved<'t, V: Value, A: ObjectAlloc<Node<W>>, const W: usize = 32> {
    tree: &'t mut RangeTree<V, A, W>,
    stores: usize,
}

impl<V: Value, A: ObjectAlloc<Node<W>>, const W: usize> Reserved<'_, V, A, W> {
    /// How many more stores cannot fail.
    #[must_use]
    pub fn stores_left(&self) -> usize {
        self.stores
    }

    /// [`RangeTree::store`], and cannot fail.
    ///
    /// # Panics
    ///
    /// Panics where the reservation is used up ([`stores_left`](Self::stores_left) is 0).
    pub fn store(&mut self, range: PageRange, value: Option<V>, removed: &mut dyn FnMut(Entry<V>)) {
        assert!(self.stores > 0, "more stores than were reserved");
        self.stores -= 1;
        let stored = self.tree.store(range, value, removed);
        assert!(stored.is_ok(), "a reserved store found no node");
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, const W: usize> core::ops::Deref for Reserved<'_, V, A, W> {
    type Target = RangeTree<V, A, W>;

    fn deref(&self) -> &Self::Target {
        self.tree
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, const W: usize> Drop for Reserved<'_, V, A, W> {
    fn drop(&mut self) {
        self.tree.trim();
    }
}

/// Entries in order, from both ends.
pub struct Iter<'a, V: Value, A: ObjectAlloc<Node<W>>, const W: usize = 32> {
    tree: &'a RangeTree<V, A, W>,
    left: Option<PageRange>,
}

impl<V: Value, A: ObjectAlloc<Node<W>>, const W: usize> Iterator for Iter<'_, V, A, W> {
    type Item = Entry<V>;

    fn next(&mut self) -> Option<Entry<V>> {
        let left = self.left.take()?;
        let entry = self.tree.first_at_or_after(left.first())?;
        if entry.first() > left.last() {
            return None;
        }
        self.left = entry
            .last()
            .checked_add(1)
            .and_then(|next| PageRange::new(next, left.last()));
        Some(entry)
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, const W: usize> DoubleEndedIterator for Iter<'_, V, A, W> {
    fn next_back(&mut self) -> Option<Entry<V>> {
        let left = self.left.take()?;
        let entry = self
            .tree
            .get(left.last())
            .or_else(|| self.tree.last_before(left.last()))?;
        if entry.last() < left.first() {
            return None;
        }
        self.left = entry
            .first()
            .checked_sub(1)
            .and_then(|last| PageRange::new(left.first(), last));
        Some(entry)
    }
}
