//! Bugs on purpose, for the models: a model that does not find them proves nothing.
//!
//! Only in loom builds. The question costs nothing elsewhere.

/// A bug to plant into a shared tree.
#[cfg(loom)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Plant {
    /// None.
    #[default]
    Nothing,
    /// Nodes are published without a release fence: readers may see them half written.
    NoPublishFence,
    /// Nodes taken out are reused at once.
    NoGrace,
    /// Leaves are edited under the readers.
    InPlace,
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
    pub(crate) fn publish(self) -> kmem_hal::sync::Ordering {
        #[cfg(loom)]
        if self.bug == Plant::NoPublishFence {
            return kmem_hal::sync::Ordering::Relaxed;
        }
        kmem_hal::sync::Ordering::Release
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
