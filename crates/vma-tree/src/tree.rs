//! The tree: what it is made of, and looking things up.

use core::fmt;
use core::marker::PhantomData;

use kmem_hal::sync::{AtomicU64, LocalU64, LocalUsize, Ordering, UnsafeCell, fence};
use kmem_hal::{ObjectAlloc, Page};

use crate::edit::entry;
use crate::node::{Node, NodePtr, Raw, from_word};
use crate::path::{HEIGHT_MASK, Path};
use crate::plant::{Plant, Planted};
use crate::stock::{Exclusive, Sharing, Stock};
use crate::value::{Entry, Value};

/// Ordered, non-overlapping ranges of pages with a value each.
///
/// `A` gives the nodes; `S` says whether readers may look while the tree is edited ([`Exclusive`], the default, or
/// [`Shared`](crate::Shared), see [`SharedTree`](crate::SharedTree)); `W` is the number of words in a node.
///
/// Costs: lookups, gap searches and edits O(log N); an empty tree owns no memory.
#[doc(alias = "maple_tree")]
#[doc(alias = "mm_mt")]
pub struct RangeTree<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing = Exclusive, const W: usize = 32>
{
    /// The root node and, in the low six bits, the number of levels; 0 while the tree is empty.
    root: AtomicU64,
    /// Two for each edit, so that a finger notices them: odd while one is being published to readers.
    edits: AtomicU64,
    len: LocalUsize,
    /// The page after the last range, 0 in an empty tree (`E2`). Not for readers beside a writer.
    top: LocalU64,
    /// The way to the leaf that was edited last (`E4`). The writer's alone.
    pub(crate) finger: UnsafeCell<Path<W>>,
    pub(crate) stock: Stock<W>,
    pub(crate) sharing: S,
    pub(crate) alloc: A,
    /// Bugs on purpose, in models only.
    pub(crate) planted: Planted<Plant>,
    _values: PhantomData<V>,
}

// SAFETY: the nodes belong to the tree and are reached through atomics; values are `Copy` words of a sendable type.
unsafe impl<V: Value + Send, A: ObjectAlloc<Node<W>> + Send, S: Sharing + Send, const W: usize> Send
    for RangeTree<V, A, S, W>
{
}
// SAFETY: `&self` of the public face only reads; edits by one writer meet readers only in atomics (E3, N3).
unsafe impl<
    V: Value + Send + Sync,
    A: ObjectAlloc<Node<W>> + Sync,
    S: Sharing + Sync,
    const W: usize,
> Sync for RangeTree<V, A, S, W>
{
}

impl<V: Value, A: ObjectAlloc<Node<W>>, const W: usize> RangeTree<V, A, Exclusive, W> {
    kmem_hal::const_new! {
        /// An empty tree whose nodes come from `alloc`. Allocates nothing.
        pub fn new_in(alloc: A) -> Self {
            Self::empty(alloc, Exclusive)
        }
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> RangeTree<V, A, S, W> {
    kmem_hal::const_new! {
        pub(crate) fn empty(alloc: A, sharing: S) -> Self {
            Self {
                root: AtomicU64::new(0),
                edits: AtomicU64::new(0),
                len: LocalUsize::new(0),
                top: LocalU64::new(0),
                finger: UnsafeCell::new(Path::unset()),
                stock: Stock::new(),
                sharing,
                alloc,
                planted: Planted::<Plant>::NOTHING,
                _values: PhantomData,
            }
        }
    }

    /// Number of ranges.
    #[must_use]
    #[doc(alias = "map_count")]
    pub fn len(&self) -> usize {
        self.len.get()
    }

    /// Whether no page is covered.
    #[must_use]
    #[doc(alias = "mtree_empty")]
    pub fn is_empty(&self) -> bool {
        self.root_word() == 0
    }

    /// Levels of nodes; 0 while the tree is empty.
    #[must_use]
    pub fn height(&self) -> usize {
        (self.root_word() & HEIGHT_MASK) as usize
    }

    /// What gives the nodes.
    #[must_use]
    pub fn allocator(&self) -> &A {
        &self.alloc
    }

    /// The entry that covers `page`.
    #[must_use]
    #[inline]
    #[doc(alias = "vma_lookup")]
    #[doc(alias = "mas_walk")]
    pub fn get(&self, page: Page) -> Option<Entry<V>> {
        // SAFETY: nobody edits while `&self` of this tree is out, so the nodes stay.
        unsafe { self.look_up(page) }.map(entry)
    }

    /// The range that covers `page`.
    ///
    /// # Safety
    ///
    /// As [`leaf_for`](Self::leaf_for).
    #[inline(always)]
    pub(crate) unsafe fn look_up(&self, page: Page) -> Option<Raw> {
        // SAFETY: by contract.
        let node = unsafe { self.leaf_for(page) }?;
        // SAFETY: as above.
        let node = unsafe { node.as_ref() };
        // N6: the order is not for readers beside a writer.
        let leaf = if S::SHARED {
            node.sorted_leaf()
        } else {
            node.leaf()
        };
        let found = leaf.find(page.number());
        if S::SHARED && found.is_none() {
            // N7: a boundary may have said so.
            self.boundary_seen();
        }
        found
    }

    /// The leaf that answers for `page`.
    ///
    /// # Safety
    ///
    /// Nobody edits the tree, or the caller holds a guard of its grace period for as long as it uses the node.
    #[inline(always)]
    pub(crate) unsafe fn leaf_for(&self, page: Page) -> Option<NodePtr<W>> {
        let root = self.root_seen();
        let mut node = from_word::<W>(root)?;
        let mut level = (root & HEIGHT_MASK) - 1;
        while level > 0 {
            // SAFETY: N4 and the contract: the node is alive.
            let inner = unsafe { node.as_ref() };
            node = self.child_seen(inner, inner.child_for(page.number()))?;
            // SAFETY: as above.
            unsafe { node.as_ref() }.fetch();
            level -= 1;
        }
        Some(node)
    }

    /// The order of a load that leads a reader on: Acquire, so that what it leads to is seen as it was published; Relaxed where nobody
    /// looks beside a writer.
    #[inline(always)]
    fn order_seen(&self, bug: Plant) -> Ordering {
        if S::SHARED {
            self.planted.order(bug, Ordering::Acquire)
        } else {
            Ordering::Relaxed
        }
    }

    /// The root's word as a reader loads it.
    #[inline(always)]
    pub(crate) fn root_seen(&self) -> u64 {
        self.root.load(self.order_seen(Plant::NoRootAcquire))
    }

    /// Child `slot` as a reader loads it.
    #[inline(always)]
    pub(crate) fn child_seen(&self, inner: &Node<W>, slot: usize) -> Option<NodePtr<W>> {
        inner.child_by(slot, self.order_seen(Plant::NoChildAcquire))
    }

    /// The fence of a reader who may have seen a boundary that moved (`N7`).
    #[inline(always)]
    pub(crate) fn boundary_seen(&self) {
        if !self.planted.is(Plant::NoBoundaryAcquire) {
            fence(Ordering::Acquire);
        }
    }

    /// The lowest entry whose last page is at or above `page`.
    #[must_use]
    #[doc(alias = "find_vma")]
    #[doc(alias = "mt_find")]
    pub fn first_at_or_after(&self, page: Page) -> Option<Entry<V>> {
        // SAFETY: nobody edits while `&self` of this tree is out, so the nodes stay.
        let node = unsafe { self.leaf_for(page) }?;
        // SAFETY: as above.
        let leaf = unsafe { node.as_ref() }.leaf();
        // E1: if there is such a range, it is in this leaf.
        let slot = leaf.first_at_or_after(page.number());
        if slot < leaf.count() {
            Some(entry(leaf.raw(slot)))
        } else {
            None
        }
    }

    /// The highest entry whose last page is below `page`.
    #[must_use]
    #[doc(alias = "vma_prev")]
    #[doc(alias = "mas_prev")]
    pub fn last_before(&self, page: Page) -> Option<Entry<V>> {
        // SAFETY: nobody edits while `&self` of this tree is out, so the nodes stay.
        let path = unsafe { Path::new(self.root_word(), page.number()) }?;
        self.last_before_at(path, page.number())
    }

    /// [`last_before`](Self::last_before) from the path to the page.
    pub(crate) fn last_before_at(&self, mut path: Path<W>, page: u64) -> Option<Entry<V>> {
        let leaf = path.leaf();
        if let Some(slot) = leaf.first_at_or_after(page).checked_sub(1) {
            return Some(entry(leaf.raw(slot)));
        }
        if !path.previous_leaf() {
            return None;
        }
        let leaf = path.leaf();
        Some(entry(leaf.raw(leaf.count().checked_sub(1)?)))
    }

    /// The lowest entry.
    #[must_use]
    pub fn first(&self) -> Option<Entry<V>> {
        self.first_at_or_after(Page::ZERO)
    }

    /// The highest entry.
    #[must_use]
    pub fn last(&self) -> Option<Entry<V>> {
        self.get(Page::MAX).or_else(|| self.last_before(Page::MAX))
    }

    /// Erases everything and gives the nodes back.
    #[doc(alias = "mtree_destroy")]
    pub fn clear(&mut self) {
        self.splice_all();
        self.stock.trim_to(&self.alloc, 0);
    }

    /// The root's word, for the writer or where nobody edits.
    #[inline(always)]
    pub(crate) fn root_word(&self) -> u64 {
        self.root.load(Ordering::Relaxed)
    }

    /// Publishes another root. Only for the writer.
    pub(crate) fn set_root(&self, word: u64) {
        let order = self.planted.order(Plant::NoPublishFence, Ordering::Release);
        self.root.store(word, order);
    }

    /// Forgets where the last edit was (`E4`). Only for the writer.
    pub(crate) fn unset_finger(&self) {
        self.with_finger(|path| *path = Path::unset());
    }

    /// The page after the last range; 0 in an empty tree.
    #[inline(always)]
    pub(crate) fn top(&self) -> u64 {
        self.top.get()
    }

    /// Records where the last range ends. Only for the writer.
    #[inline(always)]
    pub(crate) fn set_top(&self, top: u64) {
        self.top.set(top);
    }

    /// Twice the number of edits so far, and one more while one is being published.
    #[inline(always)]
    pub(crate) fn edits(&self) -> u64 {
        self.edits.load(self.order_seen(Plant::NoEditsAcquire))
    }

    /// Counts an edit that put `new` ranges in the place of `old`. Only for the writer.
    #[inline(always)]
    pub(crate) fn count_edit(&self, new: usize, old: usize) {
        self.len.set(self.len.get() + new - old);
        let edits = self.edits.load(Ordering::Relaxed);
        if S::SHARED {
            let order = self.planted.order(Plant::NoEditsRelease, Ordering::Release);
            self.edits.store((edits & !1) + 2, order);
        } else {
            self.edits.store(edits + 2, Ordering::Relaxed);
        }
    }

    /// Says to fingers that an edit is about to be published: what they remember is in doubt until it is counted (`F3`).
    #[inline(always)]
    pub(crate) fn begin_edit(&self) {
        if S::SHARED && !self.planted.is(Plant::NoBeginning) {
            let edits = self.edits.load(Ordering::Relaxed);
            self.edits.store(edits | 1, Ordering::Relaxed);
        }
    }

    /// Makes the tree empty and retires its nodes. Only for the writer.
    pub(crate) fn splice_all(&self) {
        let root = self.root_word();
        // SAFETY: E3: the caller is the one writer; nodes in the tree are alive.
        let ends = unsafe { (Path::new(root, 0), Path::new(root, Page::MAX.number())) };
        if let (Some(before), Some(after)) = ends {
            self.begin_edit();
            self.set_root(0);
            self.set_top(0);
            self.unset_finger();
            self.count_edit(0, self.len());
            self.sweep_all(&before, &after);
        }
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> Drop for RangeTree<V, A, S, W> {
    fn drop(&mut self) {
        // Every reader borrows the tree, so none is left. Only a deferred call that has not been made may still touch a node.
        self.stock.land_all(&self.sharing);
        self.splice_all();
        self.stock.land_all(&self.sharing);
        self.stock.trim_to(&self.alloc, 0);
    }
}

impl<V: Value + fmt::Debug, A: ObjectAlloc<Node<W>>, S: Sharing, const W: usize> fmt::Debug
    for RangeTree<V, A, S, W>
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}
