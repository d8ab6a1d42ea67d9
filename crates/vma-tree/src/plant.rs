//! Bugs on purpose, for the models: a model that does not find them proves nothing.
//!
//! Only in loom builds. The question costs nothing elsewhere.

use kmem_hal::sync::{Ordering, fence};

/// A bug to plant into a shared tree.
#[cfg(loom)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Plant {
    /// None.
    #[default]
    Nothing,
    /// Nodes are published without a release fence: readers may see them half written.
    NoPublishFence,
    /// Readers load the root without an acquire fence.
    NoRootAcquire,
    /// Readers load a child without an acquire fence.
    NoChildAcquire,
    /// Boundaries are moved without a release fence.
    NoBoundaryRelease,
    /// Readers who find nothing, by a boundary, go on without an acquire fence.
    NoBoundaryAcquire,
    /// Fingers are not told that an edit is about to be published.
    NoBeginning,
    /// Edits are counted without a release fence.
    NoEditsRelease,
    /// Readers' fingers load the count of edits without an acquire fence.
    NoEditsAcquire,
    /// Nodes taken out are reused at once.
    NoGrace,
    /// Leaves are edited under the readers.
    InPlace,
}

/// A bug to plant into the lock of a VMA or of its space.
#[cfg(loom)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum LockPlant {
    /// None.
    #[default]
    Nothing,
    /// The writer does not keep readers from entering while it waits.
    StaysOpen,
    /// The writer's wait for the readers inside acquires nothing.
    NoWaitAcquire,
    /// The writer opens the count again without a release fence.
    NoOpenRelease,
    /// A reader counts itself in without an acquire fence.
    NoEnterAcquire,
    /// A reader's look at the space's number acquires nothing.
    NoCheckAcquire,
    /// A reader leaves without a release fence.
    NoLeaveRelease,
    /// The space's writer ends without a release fence.
    NoEndRelease,
}

/// A switch that is off, except where a model turned it on.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Planted {
    #[cfg(loom)]
    pub(crate) bug: Plant,
}

impl Planted {
    pub(crate) const NOTHING: Self = Self {
        #[cfg(loom)]
        bug: Plant::Nothing,
    };

    /// The ordering of a publishing store.
    #[inline(always)]
    pub(crate) fn publish(self) -> Ordering {
        #[cfg(loom)]
        if self.bug == Plant::NoPublishFence {
            return Ordering::Relaxed;
        }
        Ordering::Release
    }

    /// The ordering of a load of the root.
    #[inline(always)]
    pub(crate) fn root(self) -> Ordering {
        #[cfg(loom)]
        if self.bug == Plant::NoRootAcquire {
            return Ordering::Relaxed;
        }
        Ordering::Acquire
    }

    /// The ordering of a reader's load of a child.
    #[inline(always)]
    pub(crate) fn child(self) -> Ordering {
        #[cfg(loom)]
        if self.bug == Plant::NoChildAcquire {
            return Ordering::Relaxed;
        }
        Ordering::Acquire
    }

    /// The ordering of a store that moves a boundary.
    #[inline(always)]
    pub(crate) fn boundary(self) -> Ordering {
        #[cfg(loom)]
        if self.bug == Plant::NoBoundaryRelease {
            return Ordering::Relaxed;
        }
        Ordering::Release
    }

    /// The fence of a reader who may have seen a boundary that moved.
    #[inline(always)]
    pub(crate) fn boundary_seen(self) {
        #[cfg(loom)]
        if self.bug == Plant::NoBoundaryAcquire {
            return;
        }
        fence(Ordering::Acquire);
    }

    /// Whether fingers are told before an edit is published.
    #[inline(always)]
    pub(crate) fn begins(self, shared: bool) -> bool {
        #[cfg(loom)]
        if self.bug == Plant::NoBeginning {
            return false;
        }
        shared
    }

    /// The ordering of the store that counts an edit.
    #[inline(always)]
    pub(crate) fn count(self) -> Ordering {
        #[cfg(loom)]
        if self.bug == Plant::NoEditsRelease {
            return Ordering::Relaxed;
        }
        Ordering::Release
    }

    /// The ordering of a load of the count of edits.
    #[inline(always)]
    pub(crate) fn counted(self) -> Ordering {
        #[cfg(loom)]
        if self.bug == Plant::NoEditsAcquire {
            return Ordering::Relaxed;
        }
        Ordering::Acquire
    }

    /// Whether leaves are copied.
    #[inline(always)]
    pub(crate) fn copies(self, shared: bool) -> bool {
        #[cfg(loom)]
        if self.bug == Plant::InPlace {
            return false;
        }
        shared
    }

    /// Whether nodes wait for readers.
    #[inline(always)]
    pub(crate) fn waits(self, shared: bool) -> bool {
        #[cfg(loom)]
        if self.bug == Plant::NoGrace {
            return false;
        }
        shared
    }
}
