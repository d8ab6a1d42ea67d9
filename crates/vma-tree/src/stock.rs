//! Where nodes come from and go to: the stock of spare nodes, and the garbage that readers may still look at.
//!
//! ```text
//!   allocator ──take──> tree ──retire──> open batch ──128 nodes──> in flight (one deferred call) ──grace──> stock
//!       ▲                 │  (not shared: at once)                                                            │
//!       └────── trim ─────┴──────────────────────────────── stock <──────────────────────────────────────────┘
//! ```
//!
//! A tree that is not shared has no readers to wait for: a node taken out is a spare node at once. A shared tree
//! collects nodes into batches, chained through a word that readers do not read, and asks the grace period for one
//! call a batch. So an edit costs no call into the allocator in the long run, and 1/128 of a deferred call.
//!
//! Invariants
//! - `K1`: a node is in the tree, in the stock, in the open batch, in flight, or the allocator's; in one of them.
//! - `K2`: nodes of a batch are reused only after the deferred call has set `DONE` in the link of its first node.

use core::ptr::NonNull;

use kmem_hal::sync::{LocalPtr, LocalUsize};
use kmem_hal::{AllocError, Deferred, Grace, ObjectAlloc};

use crate::node::{Node, NodePtr, from_word, to_word};

/// The bit that the deferred call sets in the first node of its batch.
const DONE: u64 = 1;
/// Spare nodes that a tree keeps for its next edit.
const KEEP: usize = 4;
/// Spare nodes that a tree keeps for its next reservation, once it has made one: 6 KiB, two stores and more in most trees.
const KEEP_RESERVED: usize = 24;
/// Garbage nodes above which a shared tree refuses edits: 512 KiB.
pub(crate) const GARBAGE_LIMIT: usize = 2048;

mod sealed {
    pub trait Sealed {}
}

/// Whether readers may look at a tree while it is edited: [`Exclusive`] or [`Shared`].
pub trait Sharing: sealed::Sealed {
    /// Whether they may.
    #[doc(hidden)]
    const SHARED: bool;

    #[doc(hidden)]
    fn defer(&self, call: Deferred) -> Result<(), Deferred>;
    #[doc(hidden)]
    fn poll(&self);
    #[doc(hidden)]
    fn synchronize(&self);
}

/// Nobody reads while the tree is edited: the borrow checker sees to it. Edits are made in place.
#[derive(Clone, Copy, Debug, Default)]
pub struct Exclusive;

impl sealed::Sealed for Exclusive {}
impl Sharing for Exclusive {
    const SHARED: bool = false;

    fn defer(&self, call: Deferred) -> Result<(), Deferred> {
        Err(call)
    }
    fn poll(&self) {}
    fn synchronize(&self) {}
}

/// Readers may look at any time, under a guard of the grace period `G`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Shared<G>(pub(crate) G);

impl<G> sealed::Sealed for Shared<G> {}
impl<G: Grace> Sharing for Shared<G> {
    const SHARED: bool = true;

    fn defer(&self, call: Deferred) -> Result<(), Deferred> {
        self.0.defer(call)
    }
    fn poll(&self) {
        self.0.poll();
    }
    fn synchronize(&self) {
        self.0.synchronize();
    }
}

/// A chain of nodes through their links.
#[derive(Debug)]
struct Chain<const W: usize> {
    head: LocalPtr<Node<W>>,
    count: LocalUsize,
}

impl<const W: usize> Chain<W> {
    kmem_hal::const_new! {
        fn new() -> Self {
            Self { head: LocalPtr::new(core::ptr::null_mut()), count: LocalUsize::new(0) }
        }
    }

    fn push(&self, node: NodePtr<W>) {
        let next = NonNull::new(self.head.get()).map_or(0, to_word);
        // SAFETY: K1: the node is in this chain and nowhere else.
        unsafe { node.as_ref() }.set_link(next);
        self.head.set(node.as_ptr());
        self.count.set(self.count.get() + 1);
    }

    fn pop(&self) -> Option<NodePtr<W>> {
        let node = NonNull::new(self.head.get())?;
        // SAFETY: K1: the nodes of a chain are alive.
        let next = from_word(unsafe { node.as_ref() }.link());
        self.head
            .set(next.map_or(core::ptr::null_mut(), NonNull::as_ptr));
        self.count.set(self.count.get() - 1);
        Some(node)
    }
}

/// The writer's stock of nodes. Only the writer touches it.
#[derive(Debug)]
pub(crate) struct Stock<const W: usize> {
    spare: Chain<W>,
    open: Chain<W>,
    flying: Chain<W>,
    /// Spare nodes that `trim` leaves, for a reservation.
    pub(crate) hold: LocalUsize,
    /// Spare nodes that `trim` leaves in any case.
    keep: LocalUsize,
}

impl<const W: usize> Stock<W> {
    /// Nodes in a batch: 128, and fewer of the small nodes of a model. A batch costs a look at the grace period, which on many machines is an
    /// interrupt for each CPU: microseconds, and an edit of an address space takes half of one.
    const BATCH: usize = if W >= 32 { W * 4 } else { W / 2 };

    kmem_hal::const_new! {
        pub(crate) fn new() -> Self {
            Self {
                spare: Chain::new(),
                open: Chain::new(),
                flying: Chain::new(),
                hold: LocalUsize::new(0),
                keep: LocalUsize::new(KEEP),
            }
        }
    }

    /// A node that no reader can reach.
    pub(crate) fn take<A: ObjectAlloc<Node<W>>>(
        &self,
        alloc: &A,
    ) -> Result<NodePtr<W>, AllocError> {
        match self.spare.pop() {
            Some(node) => Ok(node),
            None => Self::fresh(alloc),
        }
    }

    /// A node of the allocator's.
    fn fresh<A: ObjectAlloc<Node<W>>>(alloc: &A) -> Result<NodePtr<W>, AllocError> {
        let node = alloc.alloc()?;
        // SAFETY: B1: the memory is ours alone and fits a node.
        unsafe { node.as_ptr().write(Node::blank()) };
        Ok(node)
    }

    /// Takes back a node that no reader has ever reached or can reach any more.
    pub(crate) fn give(&self, node: NodePtr<W>) {
        self.spare.push(node);
    }

    /// Takes a node that was taken out of a shared tree: readers may still look at it.
    pub(crate) fn retire<S: Sharing>(&self, sharing: &S, node: NodePtr<W>) {
        self.open.push(node);
        if self.open.count.get().is_multiple_of(Self::BATCH) {
            self.collect(sharing);
        }
    }

    /// Brings batches forward: what is done into the stock, what is open into flight.
    pub(crate) fn collect<S: Sharing>(&self, sharing: &S) {
        if !S::SHARED {
            return;
        }
        self.land();
        if self.flying.count.get() != 0 {
            sharing.poll();
            self.land();
        }
        if self.flying.count.get() == 0
            && let Some(head) = NonNull::new(self.open.head.get())
        {
            unsafe fn done<const W: usize>(_context: *const (), head: NonNull<()>) {
                // SAFETY: the first node of a batch stays as it is until this call has been made (K2).
                let head: &Node<W> = unsafe { head.cast().as_ref() };
                head.set_link(head.link() | DONE);
            }
            // SAFETY: the call touches one word of a node that lives until then, from anywhere, once.
            let call = unsafe { Deferred::new(done::<W>, core::ptr::null(), head.cast()) };
            let deferred = sharing.defer(call).or_else(|call| {
                sharing.poll();
                sharing.defer(call)
            });
            if deferred.is_ok() {
                self.flying.head.set(head.as_ptr());
                self.flying.count.set(self.open.count.get());
                self.open.head.set(core::ptr::null_mut());
                self.open.count.set(0);
                self.land();
            }
        }
    }

    /// Moves the batch in flight into the stock if its grace period is over.
    fn land(&self) {
        let over = NonNull::new(self.flying.head.get())
            // SAFETY: K1: the nodes of a chain are alive.
            .is_some_and(|head| unsafe { head.as_ref() }.link() & DONE != 0);
        if over {
            while let Some(node) = self.flying.pop() {
                self.spare.push(node);
            }
        }
    }

    /// Gives spare nodes above what is kept back to the allocator.
    #[inline]
    pub(crate) fn trim<A: ObjectAlloc<Node<W>>>(&self, alloc: &A) {
        let keep = self.keep.get().max(self.hold.get());
        if self.spare.count.get() > keep {
            self.trim_to(alloc, keep);
        }
    }

    /// Keeps what the last reservation took for the next one, within bounds.
    pub(crate) fn keep_reserved(&self, count: usize) {
        let keep = self.keep.get().max(count.min(KEEP_RESERVED));
        self.keep.set(keep);
    }

    /// Gives spare nodes above `keep` back to the allocator.
    pub(crate) fn trim_to<A: ObjectAlloc<Node<W>>>(&self, alloc: &A, keep: usize) {
        while self.spare.count.get() > keep
            && let Some(node) = self.spare.pop()
        {
            // SAFETY: K1: the node came from the allocator, is in no chain any more, and nobody looks at it.
            unsafe { alloc.free(node) };
        }
    }

    /// Has at least `count` spare nodes, or changes nothing but the stock.
    pub(crate) fn fill<A: ObjectAlloc<Node<W>>>(
        &self,
        alloc: &A,
        count: usize,
    ) -> Result<(), AllocError> {
        while self.spare.count.get() < count {
            self.spare.push(Self::fresh(alloc)?);
        }
        Ok(())
    }

    /// Nodes that wait for readers.
    pub(crate) fn garbage(&self) -> usize {
        self.open.count.get() + self.flying.count.get()
    }

    /// Spare nodes.
    pub(crate) fn spares(&self) -> usize {
        self.spare.count.get()
    }

    /// Makes every node that waits for readers a spare one, where there are no readers: waits for deferred calls only.
    pub(crate) fn land_all<S: Sharing>(&self, sharing: &S) {
        while S::SHARED && self.flying.count.get() != 0 {
            sharing.poll();
            self.land();
            if self.flying.count.get() != 0 {
                sharing.synchronize();
                self.land();
            }
        }
        while let Some(node) = self.open.pop() {
            self.spare.push(node);
        }
    }

    /// Waits until no node waits for readers.
    pub(crate) fn quiesce<S: Sharing>(&self, sharing: &S) {
        while S::SHARED && self.garbage() != 0 {
            self.collect(sharing);
            if self.garbage() != 0 {
                sharing.synchronize();
                self.land();
            }
        }
    }
}
