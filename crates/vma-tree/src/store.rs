//! The edits of the public face: store, erase, merge, modify, and reservations.
//!
//! Memory is asked for before anything changes. An edit of one range needs at most three nodes a level; whoever cannot
//! stop half-way takes them ahead with [`RangeTree::reserve`].

use kmem_hal::{AllocError, ObjectAlloc, PageRange};

use crate::edit::Cut;
use crate::node::Node;
use crate::reserve::Reserved;
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
    /// [`AllocError`] where there are too few nodes; the tree is unchanged and those taken are given back. At once, and none is taken,
    /// where it is more than 2^32 nodes (1 TiB).
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
}
