//! Nodes for the tree, taken before the lock under which the tree is edited.
//!
//! ```text
//!   allocator ──no lock held──> spare ──> tree ──> spare ──no lock held──> allocator
//! ```
//!
//! An allocator may look for memory in the middle of a call, and what it asks for that ends stacks and purges
//! ([`StackCache`](crate::StackCache)): calls that take the lock. So whoever is about to edit the tree sees to it first that there are
//! as many spare nodes as the edit may need.
//!
//! Invariant `N1`: the memory in the chain came from one allocator, holds the link of the chain and nothing else, and is in no
//! other hands. A tree that takes its nodes here gives them back here.

use core::ptr::NonNull;

use kmem_hal::sync::{LocalPtr, LocalUsize};
use kmem_hal::{AllocError, ObjectAlloc};
use kmem_vma_tree::Node;

/// What a spare node holds.
struct Spare {
    next: Option<NonNull<Node>>,
}

/// The nodes that the tree takes and gives back: a chain. Behind the lock, as the tree is.
#[derive(Debug)]
pub(crate) struct SpareNodes {
    head: LocalPtr<Node>,
    count: LocalUsize,
}

impl SpareNodes {
    pub fn new() -> Self {
        Self {
            head: LocalPtr::new(core::ptr::null_mut()),
            count: LocalUsize::new(0),
        }
    }

    pub fn count(&self) -> usize {
        self.count.get()
    }

    /// Puts memory for a node into the chain.
    ///
    /// # Safety
    ///
    /// `N1` holds from now on: the memory was given by the allocator of all others and is nobody's.
    pub unsafe fn put(&self, node: NonNull<Node>) {
        let next = NonNull::new(self.head.get());
        // SAFETY: `N1`: the memory is the chain's; a node is larger than a link and aligned to more.
        unsafe { node.cast::<Spare>().write(Spare { next }) };
        self.head.set(node.as_ptr());
        self.count.set(self.count.get() + 1);
    }

    /// Takes memory for a node out of the chain.
    pub fn take(&self) -> Option<NonNull<Node>> {
        let node = NonNull::new(self.head.get())?;
        // SAFETY: `N1`: `put` wrote a link there.
        let next = unsafe { node.cast::<Spare>().read() }.next;
        self.head
            .set(next.map_or(core::ptr::null_mut(), NonNull::as_ptr));
        self.count.set(self.count.get() - 1);
        Some(node)
    }
}

// SAFETY: B1: `N1`, and the memory was an allocator's for nodes; B2: a call that finds the chain empty changes nothing; B3: not
// type-stable; B4: the default.
unsafe impl ObjectAlloc<Node> for SpareNodes {
    const TYPE_STABLE: bool = false;

    fn alloc(&self) -> Result<NonNull<Node>, AllocError> {
        self.take().ok_or(AllocError::OutOfMemory)
    }

    unsafe fn free(&self, node: NonNull<Node>) {
        // SAFETY: the caller's promise: the node came from this chain, which `N1` held for.
        unsafe { self.put(node) }
    }
}
