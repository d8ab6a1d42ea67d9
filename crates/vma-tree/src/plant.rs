//! Bugs on purpose, for the models: a model that does not find them proves nothing.
//!
//! Only in loom builds. The question costs nothing elsewhere.

#[cfg(not(loom))]
use core::marker::PhantomData;

use kmem_hal::sync::Ordering;

/// A bug to plant into a shared tree.
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

/// The bug of a tree or a lock: none, except where a model planted one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Planted<B> {
    #[cfg(loom)]
    bug: B,
    #[cfg(not(loom))]
    _bug: PhantomData<B>,
}

impl Planted<Plant> {
    pub(crate) const NOTHING: Self = Self {
        #[cfg(loom)]
        bug: Plant::Nothing,
        #[cfg(not(loom))]
        _bug: PhantomData,
    };
}

impl Planted<LockPlant> {
    pub(crate) const NOTHING: Self = Self {
        #[cfg(loom)]
        bug: LockPlant::Nothing,
        #[cfg(not(loom))]
        _bug: PhantomData,
    };
}

impl<B: Copy + PartialEq> Planted<B> {
    #[cfg(loom)]
    pub(crate) const fn bug(bug: B) -> Self {
        Self { bug }
    }

    /// Whether this is the bug.
    #[inline(always)]
    pub(crate) fn is(self, bug: B) -> bool {
        #[cfg(loom)]
        return self.bug == bug;
        #[cfg(not(loom))]
        {
            let _ = bug;
            false
        }
    }

    /// `order`, which this bug takes away.
    #[inline(always)]
    pub(crate) fn order(self, bug: B, order: Ordering) -> Ordering {
        if self.is(bug) {
            Ordering::Relaxed
        } else {
            order
        }
    }
}
