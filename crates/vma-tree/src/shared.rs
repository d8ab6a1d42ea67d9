//! A tree that readers look at while one writer edits it.
//!
//! A reader takes no lock, stores to no shared word and never waits: it opens a read section of the grace period, walks
//! from the root through nodes that do not change under it, and is done. A writer that stands still half-way, or is
//! preempted, is not noticed.
//!
//! ```text
//!   reader   ──[ section: root, inner, leaf, value ]──          loads only
//!   writer   copy leaf ── store one word of the parent ── retire the old leaf ── .. grace .. ── reuse it
//! ```
//!
//! What a reader sees
//! - `R1`: a lookup gives what the tree said at some moment between its call and its return. All pages of an edit change
//!   in one moment.
//! - `R2`: an entry that is given out was in the tree as it is given: range and value belong together, always.
//! - `R3`: a walk over many entries ([`ReadSection::entries_from`]) gives each page at most once, ascending; entries that
//!   stay in the tree unchanged during the walk are all given.
//! - `R4`: nodes are reused only when no section is left that could have seen them, so nothing a reader holds changes.
//!
//! Not handled: what a value points to. Whoever stores pointers frees what they point to after a grace period too.
//!
//! Sources: Howells, McKenney: Linux `Documentation/RCU/`; Clements et al., "Scalable address spaces using RCU balanced
//! trees" (Bonsai), ASPLOS 2012, for readers of address spaces without locks.

use core::fmt;
use core::mem::ManuallyDrop;
use core::ops::Deref;

use kmem_hal::{AllocError, Grace, ObjectAlloc, Page, PageRange};

use crate::edit::entry;
use crate::finger::Finger;
use crate::node::{Leaf, Node, from_word};
use crate::path::HEIGHT_MASK;
use crate::reserve::Reserved;
use crate::stock::{Exclusive, Shared};
use crate::store::{Change, MergeRule, Removed};
use crate::tree::RangeTree;
use crate::value::{Entry, Mergeable, Value};

/// A [`RangeTree`] for one writer and any number of readers at the same time.
///
/// # Examples
///
/// ```
/// use kmem_hal::{FixedPool, Page, PageRange, SingleGrace};
/// use kmem_vma_tree::{Node, SharedTree};
///
/// let nodes = FixedPool::<Node, 32>::new();
/// // SAFETY: one thread runs this example.
/// let grace = unsafe { SingleGrace::new() };
/// let mut tree: SharedTree<u32, _, _> = SharedTree::new_in(&nodes, &grace);
/// let (mut writer, readers) = tree.split();
///
/// writer.store(PageRange::single(Page::ZERO), Some(1), &mut |_| ())?;
/// let section = readers.read();
/// assert_eq!(section.get(Page::ZERO).unwrap().value, 1);
/// // An edit while a reader is inside: it goes through, and the old node waits.
/// writer.store(PageRange::single(Page::ZERO), Some(2), &mut |_| ())?;
/// assert_eq!(section.get(Page::ZERO).unwrap().value, 2);
/// assert_eq!(writer.garbage(), 1);
/// drop(section);
/// writer.quiesce();
/// assert_eq!(writer.garbage(), 0);
/// # Ok::<(), kmem_hal::AllocError>(())
/// ```
#[doc(alias = "MT_FLAGS_USE_RCU")]
pub struct SharedTree<V: Value, A: ObjectAlloc<Node<W>>, G: Grace, const W: usize = 32> {
    tree: RangeTree<V, A, Shared<G>, W>,
}

impl<V: Value, A: ObjectAlloc<Node<W>>, G: Grace, const W: usize> SharedTree<V, A, G, W> {
    kmem_hal::const_new! {
        /// An empty tree whose nodes come from `alloc` and wait for readers of `grace`. Allocates nothing.
        pub fn new_in(alloc: A, grace: G) -> Self {
            Self { tree: RangeTree::empty(alloc, Shared(grace)) }
        }
    }

    /// Shares a tree that was built alone: fork fills the child's tree first. Looks at every leaf once.
    #[must_use]
    pub fn from_tree(tree: RangeTree<V, A, Exclusive, W>, grace: G) -> Self {
        let built = Built::of(tree);
        let shared = RangeTree::empty(built.alloc, Shared(grace));
        shared.set_top(built.top);
        shared.set_root(built.root);
        shared.count_edit(built.len, 0);
        Self { tree: shared }
    }

    /// A tree with a bug on purpose.
    #[cfg(loom)]
    #[doc(hidden)]
    pub fn with_bug(alloc: A, grace: G, bug: crate::Plant) -> Self {
        let mut shared = Self::new_in(alloc, grace);
        shared.tree.planted = crate::plant::Planted::bug(bug);
        shared
    }

    /// The writer and the readers' handle, for as long as the tree is borrowed.
    pub fn split(&mut self) -> (Writer<'_, V, A, G, W>, Readers<'_, V, A, G, W>) {
        let tree = &self.tree;
        (Writer { tree }, Readers { tree })
    }

    /// The writer, where a lock outside says who that is (`mmap_lock`).
    ///
    /// # Safety
    ///
    /// At most one [`Writer`] of the tree exists at a time: the caller holds the lock that makes it so.
    #[doc(alias = "mmap_write_lock")]
    pub unsafe fn writer(&self) -> Writer<'_, V, A, G, W> {
        Writer { tree: &self.tree }
    }

    /// Opens a read section: no lock, no shared store.
    #[doc(alias = "mas_lock_is_held")]
    pub fn read(&self) -> ReadSection<'_, V, A, G, W> {
        Readers { tree: &self.tree }.read()
    }
}

/// What a tree that was built alone holds, for a shared tree to take over: its nodes are nobody's until then.
struct Built<A> {
    root: u64,
    len: usize,
    top: u64,
    alloc: A,
}

impl<A> Built<A> {
    fn of<V: Value, const W: usize>(tree: RangeTree<V, A, Exclusive, W>) -> Self
    where
        A: ObjectAlloc<Node<W>>,
    {
        for (leaf, _) in tree.leaves() {
            // N6: the tree is ours alone, so the leaf may be written.
            leaf.sort();
        }
        tree.stock.trim_to(&tree.alloc, 0);
        let tree = ManuallyDrop::new(tree);
        Self {
            root: tree.root_word(),
            len: tree.len(),
            top: tree.top(),
            // SAFETY: `tree` is neither used nor dropped any more, and its stock is empty: the allocator moves once.
            alloc: unsafe { core::ptr::read(&tree.alloc) },
        }
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, G: Grace, const W: usize> fmt::Debug
    for SharedTree<V, A, G, W>
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedTree({} ranges)", self.tree.len())
    }
}

/// The one writer of a [`SharedTree`]. Reads like a [`RangeTree`].
pub struct Writer<'t, V: Value, A: ObjectAlloc<Node<W>>, G: Grace, const W: usize = 32> {
    tree: &'t RangeTree<V, A, Shared<G>, W>,
}

impl<V: Value, A: ObjectAlloc<Node<W>>, G: Grace, const W: usize> Writer<'_, V, A, G, W> {
    /// [`RangeTree::store`]. `removed` is called when readers see the change already.
    ///
    /// # Errors
    ///
    /// As there; [`AllocError::Busy`] too, where 2048 nodes wait for readers: let them pass, [`quiesce`](Self::quiesce).
    pub fn store(
        &mut self,
        range: PageRange,
        value: Option<V>,
        removed: Removed<'_, V>,
    ) -> Result<(), AllocError> {
        self.tree.write(range, value, removed)
    }

    /// [`RangeTree::reserve`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn reserve(
        &mut self,
        stores: usize,
    ) -> Result<Reserved<'_, V, A, Shared<G>, W>, AllocError> {
        Reserved::new(self.tree, stores)
    }

    /// [`RangeTree::store_merged_by`].
    ///
    /// # Errors
    ///
    /// As [`store`](Self::store).
    pub fn store_merged_by(
        &mut self,
        range: PageRange,
        value: V,
        removed: Removed<'_, V>,
        merge: MergeRule<'_, V>,
    ) -> Result<Entry<V>, AllocError> {
        self.tree.write_merged(range, value, removed, merge)
    }

    /// [`RangeTree::store_merged`].
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
        self.tree.write_merged(range, value, removed, &mut V::merge)
    }

    /// [`RangeTree::modify`]. Readers see each piece change by itself.
    ///
    /// # Errors
    ///
    /// As [`store`](Self::store).
    pub fn modify(&mut self, range: PageRange, change: Change<'_, V>) -> Result<(), AllocError>
    where
        V: Mergeable,
    {
        self.tree.rewrite(range, change, &mut V::merge)
    }

    /// [`RangeTree::modify_by`]. Readers see each piece change by itself.
    ///
    /// # Errors
    ///
    /// As [`store`](Self::store).
    pub fn modify_by(
        &mut self,
        range: PageRange,
        change: Change<'_, V>,
        merge: MergeRule<'_, V>,
    ) -> Result<(), AllocError> {
        self.tree.rewrite(range, change, merge)
    }

    /// Takes over what a tree holds that was built alone: fork fills a child's tree so. Readers see all of it from one moment on.
    ///
    /// What was in this tree is erased. Looks at every leaf of `tree` once.
    ///
    /// # Safety
    ///
    /// Nodes of `tree` may be given back to this tree's allocator: it is the same one.
    pub unsafe fn adopt(&mut self, tree: RangeTree<V, A, Exclusive, W>) {
        self.clear();
        let built = Built::of(tree);
        self.tree.set_top(built.top);
        self.tree.begin_edit();
        self.tree.set_root(built.root);
        self.tree.count_edit(built.len, 0);
    }

    /// Erases everything, in one moment. Needs no memory; the nodes wait for readers.
    pub fn clear(&mut self) {
        self.tree.splice_all();
    }

    /// Nodes taken out of the tree that readers may still look at.
    #[must_use]
    pub fn garbage(&self) -> usize {
        self.tree.stock.garbage()
    }

    /// Waits until every node taken out can be reused, and gives spare nodes back to the allocator.
    ///
    /// Deadlocks where the caller is inside a read section of the same grace period.
    #[doc(alias = "rcu_barrier")]
    pub fn quiesce(&mut self) {
        self.tree.stock.quiesce(&self.tree.sharing);
        self.tree.stock.trim(&self.tree.alloc);
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, G: Grace, const W: usize> Deref for Writer<'_, V, A, G, W> {
    type Target = RangeTree<V, A, Shared<G>, W>;

    fn deref(&self) -> &Self::Target {
        self.tree
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, G: Grace, const W: usize> fmt::Debug
    for Writer<'_, V, A, G, W>
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Writer({} ranges)", self.tree.len())
    }
}

/// A handle through which any thread opens read sections.
pub struct Readers<'t, V: Value, A: ObjectAlloc<Node<W>>, G: Grace, const W: usize = 32> {
    tree: &'t RangeTree<V, A, Shared<G>, W>,
}

impl<V: Value, A: ObjectAlloc<Node<W>>, G: Grace, const W: usize> Clone
    for Readers<'_, V, A, G, W>
{
    fn clone(&self) -> Self {
        *self
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, G: Grace, const W: usize> Copy for Readers<'_, V, A, G, W> {}

impl<'t, V: Value, A: ObjectAlloc<Node<W>>, G: Grace, const W: usize> Readers<'t, V, A, G, W> {
    /// Opens a read section: no lock, no shared store.
    #[must_use]
    pub fn read(self) -> ReadSection<'t, V, A, G, W> {
        ReadSection {
            tree: self.tree,
            _guard: self.tree.sharing.0.read(),
        }
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, G: Grace, const W: usize> fmt::Debug
    for Readers<'_, V, A, G, W>
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Readers")
    }
}

/// A reader inside: what it has found stays readable until the section ends.
pub struct ReadSection<'t, V: Value, A: ObjectAlloc<Node<W>>, G: Grace + 't, const W: usize = 32> {
    tree: &'t RangeTree<V, A, Shared<G>, W>,
    _guard: G::Guard<'t>,
}

impl<V: Value, A: ObjectAlloc<Node<W>>, G: Grace, const W: usize> ReadSection<'_, V, A, G, W> {
    /// The entry that covers `page`.
    #[must_use]
    #[inline]
    #[doc(alias = "lock_vma_under_rcu")]
    pub fn get(&self, page: Page) -> Option<Entry<V>> {
        // SAFETY: the section holds a guard, so the nodes stay (R4).
        unsafe { self.tree.look_up(page) }.map(entry)
    }

    /// [`get`](Self::get) with a finger of the reader's own.
    #[must_use]
    #[inline]
    pub fn get_with(&self, finger: &mut Finger<V>, page: Page) -> Option<Entry<V>> {
        self.tree.get_with_finger(finger, page)
    }

    /// The lowest entry whose last page is at or above `page`.
    #[must_use]
    #[doc(alias = "find_vma")]
    pub fn first_at_or_after(&self, page: Page) -> Option<Entry<V>> {
        self.entries_from(page).next()
    }

    /// The entries from `page` on, ascending: a snapshot for `/proc/PID/maps` (`R2`, `R3`).
    ///
    /// An entry that has grown downwards since the walk was below it is given without the pages that were passed.
    #[must_use]
    #[doc(alias = "proc_pid_maps")]
    pub fn entries_from(&self, page: Page) -> Entries<'_, V, A, G, W> {
        Entries {
            tree: self.tree,
            leaf: None,
            slot: 0,
            next: Some(page.number()),
            passed: None,
        }
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, G: Grace, const W: usize> fmt::Debug
    for ReadSection<'_, V, A, G, W>
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ReadSection")
    }
}

/// Entries of a shared tree in ascending order, each as it was at one moment.
pub struct Entries<'s, V: Value, A: ObjectAlloc<Node<W>>, G: Grace, const W: usize = 32> {
    tree: &'s RangeTree<V, A, Shared<G>, W>,
    leaf: Option<Leaf<'s, W>>,
    slot: usize,
    /// Where the next leaf is looked up; `None` after the last.
    next: Option<u64>,
    /// The last page that was given; `None` before the first entry, which is given whole.
    passed: Option<u64>,
}

impl<'s, V: Value, A: ObjectAlloc<Node<W>>, G: Grace, const W: usize> Entries<'s, V, A, G, W> {
    /// The leaf that answers for `page` and the last page it answers for.
    fn leaf_and_last(&self, page: u64) -> Option<(Leaf<'s, W>, u64)> {
        let root = self.tree.root_seen();
        let mut node = from_word::<W>(root)?;
        let mut high = Page::MAX.number();
        let mut level = (root & HEIGHT_MASK) - 1;
        while level > 0 {
            // SAFETY: the section that lent the tree for `'s` holds a guard, so the nodes stay (R4).
            let inner = unsafe { node.as_ref() };
            let slot = inner.child_for(page);
            // A boundary that has just moved below the page would send the walk back: never step below it.
            high = inner.last_of(slot, high).max(page);
            node = self.tree.child_seen(inner, slot)?;
            level -= 1;
        }
        // N7: a boundary that moved may have led here.
        self.tree.boundary_seen();
        // SAFETY: as above.
        Some((unsafe { node.as_ref() }.sorted_leaf(), high))
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, G: Grace, const W: usize> Iterator
    for Entries<'_, V, A, G, W>
{
    type Item = Entry<V>;

    fn next(&mut self) -> Option<Entry<V>> {
        loop {
            if let Some(leaf) = &self.leaf
                && self.slot < leaf.count()
            {
                let raw = leaf.raw(self.slot);
                self.slot += 1;
                if self.passed.is_some_and(|passed| raw.last <= passed) {
                    continue;
                }
                let whole = entry::<V>(raw);
                return match self.passed.replace(raw.last) {
                    Some(passed) if passed >= raw.first => {
                        let rest = Page::from_number(passed + 1);
                        whole.clipped(PageRange::new(rest, whole.last())?)
                    }
                    _ => Some(whole),
                };
            }
            let page = self.next?;
            let (leaf, last) = self.leaf_and_last(page)?;
            self.next = (last < Page::MAX.number()).then_some(last + 1);
            self.slot = leaf.first_at_or_after(page);
            self.leaf = Some(leaf);
        }
    }
}

impl<V: Value, A: ObjectAlloc<Node<W>>, G: Grace, const W: usize> fmt::Debug
    for Entries<'_, V, A, G, W>
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Entries(after {:?})", self.passed)
    }
}
