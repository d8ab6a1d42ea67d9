//! What page tables need of the machine, in one parameter.
//!
//! ```text
//!   PageTable<F, E, H>
//!             │  │  └─ what a leaf stands for (OwnedFrame, a counted page, a device)
//!             │  └──── Env: map, frames, mmu, grace, cpu, slots, zeroed tables, trace
//!             └─────── the processor mode
//! ```
//!
//! A kernel puts a reference to its platform here; [`Parts`] is the ready-made struct for everybody else.

use kmem_hal::{Cpu, FrameSink, FrameSource, FrameTable, Grace, Mmu, NoTrace, PhysMap, Trace};

use crate::cache::TableCache;

/// The machine as page tables see it. One environment serves any number of tables.
///
/// # Safety
///
/// - `E1`: every call gives the same thing again, for as long as the environment exists.
/// - `E2`: `slots` is the machine's only frame table, and covers every frame that `frames` gives.
/// - `E3`: `mmu` is the MMU that loads the roots of these tables, and `map` reaches the memory that it walks.
/// - `E4`: `cache` is used by environments with the same `frames`, `slots` and `map` only.
/// - `E5`: tables that share others ([`PageTable::sharing`](crate::PageTable::sharing)) or are forked into one another are made
///   in environments with the same `grace`.
pub unsafe trait Env {
    /// Where tables can be read and written.
    type Map: PhysMap;
    /// Where frames for tables come from and go to.
    type Frames: FrameSource + FrameSink;
    /// Who caches translations.
    type Mmu: Mmu;
    /// When a detached table has no lock-free reader left.
    type Grace: Grace;
    /// Which CPU runs a flush.
    type Cpu: Cpu;
    /// Who wants to know.
    type Trace: Trace;

    /// Where tables can be read and written.
    fn map(&self) -> &Self::Map;
    /// Where frames for tables come from and go to.
    fn frames(&self) -> &Self::Frames;
    /// Who caches translations.
    fn mmu(&self) -> &Self::Mmu;
    /// When a detached table has no lock-free reader left.
    fn grace(&self) -> &Self::Grace;
    /// Which CPU runs a flush.
    fn cpu(&self) -> &Self::Cpu;
    /// Who wants to know.
    fn trace(&self) -> &Self::Trace;
    /// The slot of each frame: a table's lock, level and counts live there.
    fn slots(&self) -> &FrameTable;
    /// Tables that were emptied and are known to be zero.
    fn cache(&self) -> &TableCache;

    /// Called again and again while a table's lock is taken by somebody else.
    ///
    /// The locks are spin bits that leave preemption on: a kernel that may preempt their holder lets others run here.
    #[inline]
    fn relax(&self) {
        kmem_hal::sync::spin_loop();
    }
}

// SAFETY: a reference forwards to an environment that keeps the contract.
unsafe impl<E: Env + ?Sized> Env for &E {
    type Map = E::Map;
    type Frames = E::Frames;
    type Mmu = E::Mmu;
    type Grace = E::Grace;
    type Cpu = E::Cpu;
    type Trace = E::Trace;

    #[inline]
    fn map(&self) -> &E::Map {
        (**self).map()
    }
    #[inline]
    fn frames(&self) -> &E::Frames {
        (**self).frames()
    }
    #[inline]
    fn mmu(&self) -> &E::Mmu {
        (**self).mmu()
    }
    #[inline]
    fn grace(&self) -> &E::Grace {
        (**self).grace()
    }
    #[inline]
    fn cpu(&self) -> &E::Cpu {
        (**self).cpu()
    }
    #[inline]
    fn trace(&self) -> &E::Trace {
        (**self).trace()
    }
    #[inline]
    fn slots(&self) -> &FrameTable {
        (**self).slots()
    }
    #[inline]
    fn cache(&self) -> &TableCache {
        (**self).cache()
    }
    #[inline]
    fn relax(&self) {
        (**self).relax();
    }
}

/// An [`Env`] of separate parts: values, or references to them.
#[derive(Debug)]
pub struct Parts<'a, M, A, U, G, C, T = NoTrace> {
    map: M,
    frames: A,
    mmu: U,
    grace: G,
    cpu: C,
    trace: T,
    slots: &'a FrameTable,
    cache: TableCache,
}

impl<'a, M, A, U, G, C> Parts<'a, M, A, U, G, C> {
    kmem_hal::const_new! {
        /// Puts an environment together.
        ///
        /// # Safety
        ///
        /// `E2` and `E3` of [`Env`] hold for the parts.
        pub unsafe fn new(map: M, frames: A, mmu: U, grace: G, cpu: C, slots: &'a FrameTable) -> Self {
            Self {
                map,
                frames,
                mmu,
                grace,
                cpu,
                trace: NoTrace,
                slots,
                cache: TableCache::new(TableCache::DEFAULT_CAPACITY),
            }
        }
    }
}

impl<'a, M, A, U, G, C, T> Parts<'a, M, A, U, G, C, T> {
    /// With room for `capacity` emptied tables; 0 keeps none.
    #[must_use]
    pub fn with_cache(mut self, capacity: usize) -> Self {
        self.cache = TableCache::new(capacity);
        self
    }

    /// With a listener.
    pub fn with_trace<S>(self, trace: S) -> Parts<'a, M, A, U, G, C, S> {
        Parts {
            map: self.map,
            frames: self.frames,
            mmu: self.mmu,
            grace: self.grace,
            cpu: self.cpu,
            trace,
            slots: self.slots,
            cache: self.cache,
        }
    }
}

// SAFETY: E1: fields never change; E2 and E3 were promised to `new`; E4: the cache is this environment's own.
unsafe impl<M, A, U, G, C, T> Env for Parts<'_, M, A, U, G, C, T>
where
    M: PhysMap,
    A: FrameSource + FrameSink,
    U: Mmu,
    G: Grace,
    C: Cpu,
    T: Trace,
{
    type Map = M;
    type Frames = A;
    type Mmu = U;
    type Grace = G;
    type Cpu = C;
    type Trace = T;

    #[inline]
    fn map(&self) -> &M {
        &self.map
    }
    #[inline]
    fn frames(&self) -> &A {
        &self.frames
    }
    #[inline]
    fn mmu(&self) -> &U {
        &self.mmu
    }
    #[inline]
    fn grace(&self) -> &G {
        &self.grace
    }
    #[inline]
    fn cpu(&self) -> &C {
        &self.cpu
    }
    #[inline]
    fn trace(&self) -> &T {
        &self.trace
    }
    #[inline]
    fn slots(&self) -> &FrameTable {
        self.slots
    }
    #[inline]
    fn cache(&self) -> &TableCache {
        &self.cache
    }
}
