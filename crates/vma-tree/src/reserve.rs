//! Nodes taken ahead, for whoever cannot stop half-way.

use core::fmt;

use kmem_hal::{AllocError, ObjectAlloc, PageRange};

use crate::node::Node;
use crate::path::{MAX_HEIGHT, MAX_NODES};
use crate::stock::{Exclusive, Sharing};
use crate::store::{MergeRule, Removed};
use crate::tree::RangeTree;
use crate::value::{Entry, Mergeable, Value};

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> RangeTree<V, A, S, W> {
    /// Nodes that the next `stores` stores need at most, whatever they are.
    ///
    /// For who edits under a lock under which the allocator must not be asked: as many in an allocator of the tree's own, and
    /// no store fails. [`reserve`](RangeTree::reserve) asks the tree's allocator itself.
    ///
    /// One store takes up to three nodes a level before it gives any back. After it the tree is larger by at most two
    /// leaves and one node for each level above; what it took out is spare again, unless readers may look at it.
    ///
    /// `usize::MAX` where it is more than that.
    #[must_use]
    pub fn nodes_for(&self, stores: usize) -> usize {
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
        let more = (stores - 1).div_ceil(growth);
        let levels = height.saturating_add(more).min(MAX_HEIGHT);
        // What one store takes before it gives anything back: three nodes a level, and two for one more level.
        let one = 3 * levels + 2;
        if S::SHARED {
            stores.saturating_mul(one)
        } else {
            let others = (stores - 1).saturating_mul(levels + 1);
            others.saturating_add(one + (levels - height))
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
    held: Held<'t, V, A, S, W>,
    stores: usize,
}

/// Spare nodes that a tree holds back until the value is dropped.
pub(crate) struct Held<'t, V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> {
    tree: &'t RangeTree<V, A, S, W>,
    /// What it held back before.
    before: usize,
}

impl<'t, V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> Held<'t, V, A, S, W> {
    /// `nodes` nodes beside those that the tree holds back already. The caller is the one writer for as long as the value lives.
    pub(crate) fn new(tree: &'t RangeTree<V, A, S, W>, nodes: usize) -> Result<Self, AllocError> {
        let before = tree.stock.hold.get();
        let need = before.saturating_add(nodes);
        if need as u64 > MAX_NODES {
            return Err(AllocError::Unsatisfiable);
        }
        tree.stock.hold.set(need);
        // On failure dropping it gives back what was taken.
        let held = Self { tree, before };
        tree.stock.fill(&tree.alloc, need)?;
        Ok(held)
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> Drop for Held<'_, V, A, S, W> {
    fn drop(&mut self) {
        self.tree.stock.hold.set(self.before);
        self.tree.stock.trim(&self.tree.alloc);
    }
}

impl<'t, V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> Reserved<'t, V, A, S, W> {
    /// The caller is the one writer for as long as the value lives.
    pub(crate) fn new(tree: &'t RangeTree<V, A, S, W>, stores: usize) -> Result<Self, AllocError> {
        let nodes = tree.nodes_for(stores);
        let held = Held::new(tree, nodes)?;
        tree.stock.keep_reserved(nodes);
        Ok(Self { held, stores })
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
        self.use_one();
        let stored = self.held.tree.write(range, value, removed);
        assert!(stored.is_ok(), "a reserved store found no node");
    }

    /// [`RangeTree::store_merged_by`], and cannot fail: it is one store.
    ///
    /// # Panics
    ///
    /// As [`store`](Self::store).
    pub fn store_merged_by(
        &mut self,
        range: PageRange,
        value: V,
        removed: Removed<'_, V>,
        merge: MergeRule<'_, V>,
    ) -> Entry<V> {
        self.use_one();
        let stored = self.held.tree.write_merged(range, value, removed, merge);
        stored.expect("a reserved store finds its nodes")
    }

    /// [`RangeTree::store_merged`], and cannot fail: it is one store.
    ///
    /// # Panics
    ///
    /// As [`store`](Self::store).
    pub fn store_merged(&mut self, range: PageRange, value: V, removed: Removed<'_, V>) -> Entry<V>
    where
        V: Mergeable,
    {
        self.store_merged_by(range, value, removed, &mut V::merge)
    }

    fn use_one(&mut self) {
        assert!(self.stores > 0, "more stores than were reserved");
        self.stores -= 1;
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> core::ops::Deref
    for Reserved<'_, V, A, S, W>
{
    type Target = RangeTree<V, A, S, W>;

    fn deref(&self) -> &Self::Target {
        self.held.tree
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> fmt::Debug
    for Reserved<'_, V, A, S, W>
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reserved({} stores)", self.stores)
    }
}
