//! The edits of the public face: store, erase, merge, modify, and reservations.
//!
//! Memory is asked for before anything changes. An edit of one range needs at most three nodes a level; whoever cannot
//! stop half-way takes them ahead with [`RangeTree::reserve`].

use core::fmt;

use kmem_hal::{AllocError, ObjectAlloc, Page, PageRange};

use crate::edit::leaf::Hole;
use crate::edit::{Cut, entry};
use crate::node::{Node, Raw};
use crate::path::Path;
use crate::stock::{Exclusive, Sharing};
use crate::tree::RangeTree;
use crate::value::{Entry, Mergeable, Value};

/// A merge rule: the value of two touching ranges as one, or `None` where they stay two.
pub type MergeRule<'m, V> = &'m mut dyn FnMut(&Entry<V>, &Entry<V>) -> Option<V>;

/// What [`RangeTree::modify`] asks of its caller for each piece: the new value, or `None` to erase it.
pub type Change<'c, V> = &'c mut dyn FnMut(Entry<V>, Neighbours<V>) -> Option<V>;

/// What takes the removed pieces.
pub type Removed<'r, V> = &'r mut dyn FnMut(Entry<V>);

/// The entries next to a piece that [`RangeTree::modify`] shows to its closure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbours<V> {
    /// The nearest entry below, touching or not; the lower rest of the piece's own entry if there is one.
    pub below: Option<Entry<V>>,
    /// The nearest entry above, touching or not; the upper rest of the piece's own entry if there is one.
    pub above: Option<Entry<V>>,
}

/// `entry` below `page`.
fn part_below<V: Value>(entry: Entry<V>, page: Page) -> Option<Entry<V>> {
    let last = page.checked_sub(1)?.min(entry.last());
    entry.clipped(PageRange::new(entry.first(), last)?)
}

/// `entry` above `page`.
fn part_above<V: Value>(entry: Entry<V>, page: Page) -> Option<Entry<V>> {
    entry.clipped(PageRange::new(page.checked_add(1)?, entry.last())?)
}

impl<V: Value, A: ObjectAlloc<Node<W>>, const W: usize> RangeTree<V, A, Exclusive, W> {
    /// Makes `range` map to `value`, or to nothing, whatever was there.
    ///
    /// Entries that reach over an end of `range` keep what is outside of it (the upper part with
    /// [`Value::split`]); what was inside is handed to `removed` piece by piece, ascending, when nothing can fail any
    /// more. Never merges.
    ///
    /// # Errors
    ///
    /// [`AllocError`] where no node could be had: then nothing has changed and `removed` was not called.
    ///
    /// # Examples
    ///
    /// ```
    /// use kmem_hal::{FixedPool, Page, PageRange};
    /// use kmem_vma_tree::{Node, RangeTree};
    ///
    /// let nodes = FixedPool::<Node, 8>::new();
    /// let mut tree: RangeTree<u8, _> = RangeTree::new_in(&nodes);
    /// let pages = |first, last| PageRange::new(Page::new(first).unwrap(), Page::new(last).unwrap()).unwrap();
    ///
    /// tree.store(pages(10, 19), Some(b'a'), &mut |_| ())?;
    /// let mut cut_out = None;
    /// tree.store(pages(12, 13), Some(b'b'), &mut |piece| cut_out = Some(piece))?;
    /// assert_eq!(cut_out.unwrap().range, pages(12, 13));
    /// assert_eq!(format!("{tree:?}"), "[[0xa..=0xb] 97, [0xc..=0xd] 98, [0xe..=0x13] 97]");
    /// # Ok::<(), kmem_hal::AllocError>(())
    /// ```
    #[doc(alias = "mas_store_gfp")]
    #[doc(alias = "mas_erase")]
    #[doc(alias = "vma_iter_store")]
    #[doc(alias = "vma_iter_clear_gfp")]
    pub fn store(
        &mut self,
        range: PageRange,
        value: Option<V>,
        removed: Removed<'_, V>,
    ) -> Result<(), AllocError> {
        self.write(range, value, removed)
    }

    /// Makes sure that the next `stores` stores cannot fail.
    ///
    /// # Errors
    ///
    /// [`AllocError`] where there are too few nodes; the tree is unchanged and those taken are given back.
    #[doc(alias = "mas_preallocate")]
    #[doc(alias = "vma_iter_prealloc")]
    pub fn reserve(
        &mut self,
        stores: usize,
    ) -> Result<Reserved<'_, V, A, Exclusive, W>, AllocError> {
        Reserved::new(self, stores)
    }

    /// Stores `value` over `range` and merges it with the entries that touch it below and above, as `merge` says.
    ///
    /// Gives the entry that covers `range` afterwards. `removed` gets what was inside `range`, not the neighbours.
    ///
    /// # Errors
    ///
    /// As [`store`](Self::store).
    #[doc(alias = "vma_merge_new_range")]
    pub fn store_merged_by(
        &mut self,
        range: PageRange,
        value: V,
        removed: Removed<'_, V>,
        merge: MergeRule<'_, V>,
    ) -> Result<Entry<V>, AllocError> {
        self.write_merged(range, value, removed, merge)
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
        removed: Removed<'_, V>,
    ) -> Result<Entry<V>, AllocError>
    where
        V: Mergeable,
    {
        self.write_merged(range, value, removed, &mut V::merge)
    }

    /// Passes each piece of an entry inside `range` through `change`, and merges where the value's rule says so.
    ///
    /// Pieces come ascending; each is merged with its neighbours before the next is asked for. Holes stay holes.
    ///
    /// # Errors
    ///
    /// [`AllocError`] where there are too few nodes: then nothing has changed and `change` was not called, except where
    /// `range` touches a single entry, when `change` may have been asked.
    #[doc(alias = "vma_modify")]
    #[doc(alias = "vma_merge_existing_range")]
    pub fn modify(&mut self, range: PageRange, change: Change<'_, V>) -> Result<(), AllocError>
    where
        V: Mergeable,
    {
        self.rewrite(range, change, &mut V::merge)
    }

    /// [`modify`](Self::modify) with a merge rule of the caller's.
    ///
    /// # Errors
    ///
    /// As [`modify`](Self::modify).
    pub fn modify_by(
        &mut self,
        range: PageRange,
        change: Change<'_, V>,
        merge: MergeRule<'_, V>,
    ) -> Result<(), AllocError> {
        self.rewrite(range, change, merge)
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> RangeTree<V, A, S, W> {
    /// `store` for the one writer.
    pub(crate) fn write(
        &self,
        range: PageRange,
        value: Option<V>,
        removed: Removed<'_, V>,
    ) -> Result<(), AllocError> {
        let cut = Cut {
            first: range.first().number(),
            last: range.last().number(),
            value: value.map(V::to_word),
            shown: (range.first().number(), range.last().number()),
        };
        self.splice(cut, removed)
    }

    /// `store_merged_by` for the one writer.
    #[inline]
    pub(crate) fn write_merged<M>(
        &self,
        range: PageRange,
        value: V,
        removed: Removed<'_, V>,
        merge: &mut M,
    ) -> Result<Entry<V>, AllocError>
    where
        M: FnMut(&Entry<V>, &Entry<V>) -> Option<V> + ?Sized,
    {
        self.admit()?;
        let mut middle = Entry { range, value };
        let first = range.first().number();
        self.with_finger(|path| {
            if self.aim(path, first) {
                self.merge_at(path, &mut middle, removed, merge)
            } else {
                Ok(false)
            }
        })
        .and_then(|done| {
            if done {
                Ok(middle)
            } else {
                self.write_merged_across(range, value, removed, merge)
            }
        })
    }

    /// [`write_merged`](Self::write_merged) where the way to the range's first page is known. Makes `middle` the range as
    /// it is merged; `false`, and nothing has changed, where neighbours may lie in other leaves.
    #[inline(always)]
    fn merge_at<M>(
        &self,
        path: &mut Path<W>,
        middle: &mut Entry<V>,
        removed: Removed<'_, V>,
        merge: &mut M,
    ) -> Result<bool, AllocError>
    where
        M: FnMut(&Entry<V>, &Entry<V>) -> Option<V> + ?Sized,
    {
        let range = middle.range;
        let (first, last) = (range.first().number(), range.last().number());
        let leaf = path.leaf();
        if let Some(hole) = Hole::left_by_last_edit(path, &leaf, (first, last)) {
            return self.merge_in_hole(path, middle, &hole, removed, merge);
        }
        let rank = leaf.rank(first);
        if let Some(hole) = Hole::find(path, &leaf, rank, (first, last)) {
            return self.merge_in_hole(path, middle, &hole, removed, merge);
        }
        self.merge_ranked(path, middle, rank, removed, merge)
    }

    /// [`merge_at`](Self::merge_at) where the range lies in a hole of the leaf.
    #[inline(always)]
    fn merge_in_hole<M>(
        &self,
        path: &mut Path<W>,
        middle: &mut Entry<V>,
        hole: &Hole,
        removed: Removed<'_, V>,
        merge: &mut M,
    ) -> Result<bool, AllocError>
    where
        M: FnMut(&Entry<V>, &Entry<V>) -> Option<V> + ?Sized,
    {
        let leaf = path.leaf();
        let (first, last) = (middle.first().number(), middle.last().number());
        let at = hole.at;
        let mut lower = false;
        if hole.low == first {
            if at > 0 {
                let below = leaf.raw(at - 1);
                if let Some(value) = merge(&entry(below), middle) {
                    lower = true;
                    *middle = entry(Raw {
                        first: below.first,
                        last,
                        value: value.to_word(),
                    });
                }
            } else if first > 0 {
                // The range below is another leaf's.
                return Ok(false);
            }
        }
        let mut upper = false;
        if last + 1 == hole.end && at < leaf.count() {
            let above = leaf.raw(at);
            if let Some(value) = merge(middle, &entry(above)) {
                upper = true;
                *middle = entry(Raw {
                    first: middle.first().number(),
                    last: above.last,
                    value: value.to_word(),
                });
            }
        }
        let grown = Raw {
            first: middle.first().number(),
            last: middle.last().number(),
            value: middle.value.to_word(),
        };
        if lower && upper {
            if leaf.fits_pages(grown.last - grown.first) {
                self.heal(path, hole, grown)?;
                return Ok(true);
            }
        } else if lower || upper {
            if leaf.fits(grown.first, grown.last) {
                let at = at - usize::from(lower);
                self.fill(path, at, grown, (hole, (first, last)))?;
                return Ok(true);
            }
        } else if self.has_room(&leaf, (first, last)) {
            self.insert(path, hole, (first, last), grown.value)?;
            return Ok(true);
        } else if leaf.fits(first, last) {
            if self.insert_split(path, hole, (first, last), grown.value)? {
                return Ok(true);
            }
        } else if self.insert_apart(path, hole, (first, last), grown.value)? {
            return Ok(true);
        }
        let cut = Cut {
            first: grown.first,
            last: grown.last,
            value: Some(grown.value),
            shown: (first, last),
        };
        let touched = (at - usize::from(lower), at + usize::from(upper));
        self.edit_merged(path, &cut, touched, removed)?;
        Ok(true)
    }

    /// [`merge_at`](Self::merge_at) for the rest of the cases: `rank` ranges begin at or below the range's first page.
    #[inline(never)]
    fn merge_ranked<M>(
        &self,
        path: &mut Path<W>,
        middle: &mut Entry<V>,
        rank: usize,
        removed: Removed<'_, V>,
        merge: &mut M,
    ) -> Result<bool, AllocError>
    where
        M: FnMut(&Entry<V>, &Entry<V>) -> Option<V> + ?Sized,
    {
        let range = middle.range;
        let (first, last) = (range.first().number(), range.last().number());
        let leaf = path.leaf();
        let (mut from, mut to) = leaf.touched(rank, first, last);
        // E1: a neighbour that touches lies in another leaf only where the range reaches an end of this one.
        let over_end = to == leaf.count() && last >= leaf.end() && !path.is_last();
        let at_start = from == 0 && path.low() == first;
        if over_end || at_start {
            return Ok(false);
        }
        let lowest = (to > from).then(|| leaf.raw(from));
        let highest = if to > from + 1 {
            Some(leaf.raw(to - 1))
        } else {
            lowest
        };
        // What touches below: the lower rest of the lowest range, or the range below.
        let below = match lowest {
            Some(raw) if raw.first < first => Some((
                Raw {
                    last: first - 1,
                    ..raw
                },
                0,
            )),
            _ if from > 0 => Some((leaf.raw(from - 1), 1)).filter(|(raw, _)| raw.last + 1 == first),
            _ => None,
        };
        let mut merged = false;
        if let Some((below, more)) = below
            && let Some(value) = merge(&entry(below), middle)
        {
            merged = true;
            from -= more;
            *middle = entry(Raw {
                first: below.first,
                last,
                value: value.to_word(),
            });
        }
        let above = match highest {
            Some(raw) if raw.last > last => {
                let value = V::from_word(raw.value).split(last + 1 - raw.first);
                Some((
                    Raw {
                        first: last + 1,
                        last: raw.last,
                        value: value.to_word(),
                    },
                    0,
                ))
            }
            _ if to < leaf.count() => {
                Some((leaf.raw(to), 1)).filter(|(raw, _)| raw.first == last + 1)
            }
            _ => None,
        };
        if let Some((above, more)) = above
            && let Some(value) = merge(middle, &entry(above))
        {
            merged = true;
            to += more;
            *middle = entry(Raw {
                first: middle.first().number(),
                last: above.last,
                value: value.to_word(),
            });
        }
        let cut = Cut {
            first: middle.first().number(),
            last: middle.last().number(),
            value: Some(middle.value.to_word()),
            shown: (first, last),
        };
        let done = match lowest {
            Some(raw) if !merged && raw.first <= first && last <= raw.last => {
                self.overlay(path, (from, raw), &cut, removed)?
            }
            Some(_) if merged && to == from + 2 => self.shift(path, from, &cut, removed)?,
            _ => false,
        };
        if done {
            return Ok(true);
        }
        self.edit_merged(path, &cut, (from, to), removed)?;
        Ok(true)
    }

    /// [`write_merged`](Self::write_merged) where neighbours may lie in other leaves.
    #[inline(never)]
    fn write_merged_across<M>(
        &self,
        range: PageRange,
        value: V,
        removed: Removed<'_, V>,
        merge: &mut M,
    ) -> Result<Entry<V>, AllocError>
    where
        M: FnMut(&Entry<V>, &Entry<V>) -> Option<V> + ?Sized,
    {
        let mut middle = Entry { range, value };
        // The entry below, whole or the part of it that lies below the range.
        let below = range.first().checked_sub(1).and_then(|page| {
            let whole = self.get(page)?;
            part_below(whole, range.first())
        });
        if let Some(below) = below
            && let Some(value) = merge(&below, &middle)
        {
            let range = below.range.hull(middle.range);
            middle = Entry { range, value };
        }
        let above = range.last().checked_add(1).and_then(|page| {
            let whole = self.get(page)?;
            part_above(whole, range.last())
        });
        if let Some(above) = above
            && let Some(value) = merge(&middle, &above)
        {
            let range = middle.range.hull(above.range);
            middle = Entry { range, value };
        }
        self.splice(
            Cut {
                first: middle.first().number(),
                last: middle.last().number(),
                value: Some(middle.value.to_word()),
                shown: (range.first().number(), range.last().number()),
            },
            removed,
        )?;
        Ok(middle)
    }

    /// `modify_by` for the one writer.
    pub(crate) fn rewrite(
        &self,
        range: PageRange,
        change: Change<'_, V>,
        merge: MergeRule<'_, V>,
    ) -> Result<(), AllocError> {
        let pieces = self.range(range).take(2).count();
        let held = self.stock.hold.get();
        if pieces > 1 {
            // Each piece may need a new leaf of its own; those that reach over leaves need a path's worth.
            let pieces = self.range(range).count();
            let need = held + 2 * pieces + (pieces / 4 + 3) * (3 * self.height() + 4);
            self.stock.hold.set(need);
            let filled = self.stock.fill(&self.alloc, need);
            if filled.is_err() {
                self.stock.hold.set(held);
                self.stock.trim(&self.alloc);
                return filled;
            }
        }
        let done = self.rewrite_each(range, change, merge);
        self.stock.hold.set(held);
        self.stock.trim(&self.alloc);
        done
    }

    fn rewrite_each(
        &self,
        range: PageRange,
        change: Change<'_, V>,
        merge: MergeRule<'_, V>,
    ) -> Result<(), AllocError> {
        let mut left = range;
        while let Some(found) = self.first_at_or_after(left.first()) {
            let Some(piece) = found.clipped(left) else {
                break;
            };
            let around = Neighbours {
                below: part_below(found, piece.first()).or_else(|| self.last_before(piece.first())),
                above: part_above(found, piece.last()).or_else(|| {
                    let next = piece.last().checked_add(1)?;
                    self.first_at_or_after(next)
                }),
            };
            match change(piece, around) {
                Some(value) => {
                    // A piece that is a whole entry, keeps its value and merges with nobody stays as it is.
                    let same =
                        value.to_word() == found.value.to_word() && piece.range == found.range;
                    let alone = |entry: Option<Entry<V>>, below: bool| {
                        entry.is_none_or(|entry| {
                            if below {
                                !entry.touches(&found)
                            } else {
                                !found.touches(&entry)
                            }
                        })
                    };
                    if !(same && alone(around.below, true) && alone(around.above, false)) {
                        self.write_merged(piece.range, value, &mut |_| (), &mut *merge)?;
                    }
                }
                None => self.write(piece.range, None, &mut |_| ())?,
            }
            match piece
                .last()
                .checked_add(1)
                .and_then(|next| PageRange::new(next, range.last()))
            {
                Some(rest) => left = rest,
                None => break,
            }
        }
        Ok(())
    }

    /// Nodes that `stores` stores need at most.
    ///
    /// One store takes up to three nodes a level before it gives any back. After it the tree is larger by at most two
    /// leaves and one node for each level above; what it took out is spare again, unless readers may look at it.
    fn nodes_for(&self, stores: usize) -> usize {
        if stores == 0 {
            return 0;
        }
        // How many levels the tree may gain meanwhile. A store makes two more leaves at most, and one more node of each
        // level above; so a new root of two children is full after so many stores.
        let children = Node::<W>::CHILDREN;
        let growth = if self.height() < 2 {
            (children.saturating_sub(3) / 2).max(1)
        } else {
            children - 1
        };
        let height = self.height().max(1);
        let levels = (height + (stores - 1).div_ceil(growth)).min(crate::path::MAX_HEIGHT);
        // What one store takes before it gives anything back: three nodes a level, and two for one more level.
        let one = 3 * levels + 2;
        if S::SHARED {
            stores * one
        } else {
            one + (stores - 1) * (levels + 1) + (levels - height)
        }
    }
}

/// A tree with nodes set aside: a given number of stores cannot fail.
///
/// Reads go through `Deref`. What is left over goes back when the reservation is dropped, but for 24 nodes (6 KiB) that the
/// tree keeps for its next reservation: a tree that reserves before each edit calls the allocator now and then.
///
/// # Examples
///
/// ```
/// use kmem_hal::{FixedPool, Page, PageRange};
/// use kmem_vma_tree::{Node, RangeTree};
///
/// let nodes = FixedPool::<Node, 16>::new();
/// let mut tree: RangeTree<u32, _> = RangeTree::new_in(&nodes);
/// let mut reserved = tree.reserve(2)?;
/// // .. take locks, check again ..
/// reserved.store(PageRange::single(Page::ZERO), Some(1), &mut |_| ());
/// reserved.store(PageRange::single(Page::MAX), Some(2), &mut |_| ());
/// drop(reserved);
/// assert_eq!(tree.len(), 2);
/// # Ok::<(), kmem_hal::AllocError>(())
/// ```
pub struct Reserved<
    't,
    V: Value,
    A: ObjectAlloc<Node<W>>,
    S: Sharing = Exclusive,
    const W: usize = 32,
> {
    tree: &'t RangeTree<V, A, S, W>,
    stores: usize,
    /// What the stock held back before.
    held: usize,
}

impl<'t, V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> Reserved<'t, V, A, S, W> {
    /// The caller is the one writer for as long as the value lives.
    pub(crate) fn new(tree: &'t RangeTree<V, A, S, W>, stores: usize) -> Result<Self, AllocError> {
        let held = tree.stock.hold.get();
        let need = held + tree.nodes_for(stores);
        tree.stock.hold.set(need);
        let reserved = Self { tree, stores, held };
        // On failure dropping `reserved` gives back what was taken.
        tree.stock.fill(&tree.alloc, need)?;
        tree.stock.keep_reserved(need - held);
        Ok(reserved)
    }

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
    pub fn store(&mut self, range: PageRange, value: Option<V>, removed: Removed<'_, V>) {
        assert!(self.stores > 0, "more stores than were reserved");
        self.stores -= 1;
        let stored = self.tree.write(range, value, removed);
        assert!(stored.is_ok(), "a reserved store found no node");
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> core::ops::Deref
    for Reserved<'_, V, A, S, W>
{
    type Target = RangeTree<V, A, S, W>;

    fn deref(&self) -> &Self::Target {
        self.tree
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> Drop
    for Reserved<'_, V, A, S, W>
{
    fn drop(&mut self) {
        self.tree.stock.hold.set(self.held);
        self.tree.stock.trim(&self.tree.alloc);
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> fmt::Debug
    for Reserved<'_, V, A, S, W>
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reserved({} stores)", self.stores)
    }
}
