//! Slabs into which something was freed without the depot's lock: a stack that is pushed to by anybody
//! and taken whole by the lock's holder, so that no ABA problem exists.
//!
//! Invariant `P1`: a slab is on the stack at most once: its flag is set by the pusher before and cleared by the taker
//! **before** it looks at the bits, so that a later free pushes it again.

use kmem_hal::sync::{AtomicPtr, Ordering};

use crate::slab::Slab;

/// The stack.
#[derive(Debug)]
pub struct Pending {
    head: AtomicPtr<Slab>,
}

impl Pending {
    kmem_hal::const_new! {
        /// An empty stack.
        pub fn new() -> Self {
            Self { head: AtomicPtr::new(core::ptr::null_mut()) }
        }
    }

    /// Puts the slab on the stack unless it is there.
    pub fn push(&self, slab: &Slab) {
        if slab.pending.swap(true, Ordering::AcqRel) {
            return;
        }
        let pointer = core::ptr::from_ref(slab).cast_mut();
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            slab.pending_next.set(head);
            match self
                .head
                .compare_exchange(head, pointer, Ordering::Release, Ordering::Relaxed)
            {
                Ok(_) => return,
                Err(found) => head = found,
            }
        }
    }

    /// Whether something may be on the stack.
    #[inline]
    pub fn any(&self) -> bool {
        !self.head.load(Ordering::Relaxed).is_null()
    }

    /// Takes the whole stack and hands over each slab, its flag cleared. Under the depot's lock.
    pub fn take(&self, mut each: impl FnMut(&Slab)) {
        let mut at = self.head.swap(core::ptr::null_mut(), Ordering::Acquire);
        // SAFETY: descriptors of a cache are type-stable (I4), and this call alone holds this chain (P1).
        while let Some(slab) = unsafe { at.as_ref() } {
            at = slab.pending_next.get();
            slab.pending.swap(false, Ordering::AcqRel);
            each(slab);
        }
    }
}

impl Default for Pending {
    fn default() -> Self {
        Self::new()
    }
}
