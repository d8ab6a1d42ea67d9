//! Giving memory back: what caches hold beyond need, on request and under pressure.
//!
//! Order, cheapest loss first: full arrays of depots, the calling CPU's arrays, empty slabs. Other CPUs empty their own arrays at
//! their next slow path: a drain request is a number that each head compares with the last it has answered. Nothing interrupts
//! another CPU; a kernel that can ([`CpuCall`](kmem_hal::CpuCall)) calls [`drain_local`](SlabSystem::drain_local) there.

use core::ptr::NonNull;

use kmem_hal::sync::Ordering;
use kmem_hal::{
    AllocError, Context, Cpu, CpuId, FrameRequest, NodeId, Pressure, PressureLevel, Shrink,
};

use crate::grow::retire;
use crate::head::Head;
use crate::node::CacheNode;
use crate::platform::Platform;
use crate::raw::RawCache;
use crate::system::SlabSystem;

impl<P: Platform> SlabSystem<P> {
    /// Empties depots, the calling CPU's arrays and empty slabs; asks the other CPUs to empty theirs. Answers the frames given back.
    ///
    /// 0 before `init`, and where this CPU was interrupted in the registry.
    #[doc(alias = "kmem_cache_shrink")]
    #[doc(alias = "shrink_slab")]
    pub fn shrink(&self) -> u64 {
        self.shrink_where(|_| true)
    }

    fn shrink_where(&self, mut wanted: impl FnMut(&RawCache<P::Lock>) -> bool) -> u64 {
        self.drain.fetch_add(1, Ordering::Relaxed);
        let mut frames = 0;
        // On Busy nothing more can be done from here.
        let _ = self.for_each_cache(|cache| {
            if wanted(cache) {
                frames += self.shrink_cache(cache);
            }
        });
        frames
    }

    /// As [`shrink`](Self::shrink) beneath an allocation in this context: where nobody may wait, caches of built objects are passed over, whose
    /// destructors may take locks that the caller holds.
    pub(crate) fn shrink_for(&self, context: Context) -> u64 {
        self.shrink_where(|cache| may_take_apart(cache, context))
    }

    /// As [`shrink_for`](Self::shrink_for) beneath an allocation of frames that went short: never asks for a frame itself, which would end here
    /// again. Caches of which this CPU has no head yet are passed over.
    fn shrink_short(&self, request: &FrameRequest) -> u64 {
        let Some(platform) = self.platform() else {
            return 0;
        };
        let here = || platform.cpu().pin().id();
        if !self.has_first_page(here()) {
            return 0;
        }
        self.shrink_where(|cache| {
            may_take_apart(cache, request.context) && self.head_of(cache, here().get()).is_some()
        })
    }

    /// As [`shrink`](Self::shrink) for one cache.
    pub(crate) fn shrink_cache(&self, cache: &RawCache<P::Lock>) -> u64 {
        self.end_quarantine(cache, false);
        self.drain_own(cache);
        self.drain_depots(cache, false);
        if cache.setup.stable {
            return 0;
        }
        self.retire_empty(cache)
    }

    /// Gives every empty slab back, of a type-stable cache as well.
    pub(crate) fn retire_empty(&self, cache: &RawCache<P::Lock>) -> u64 {
        let of_node = |node| {
            let Some(chain) = self.with_depot(cache, node, |depot| retire(depot, 0)) else {
                return 0;
            };
            self.give_slabs_back(cache, chain, |bury| {
                self.with_depot(cache, node, |depot| bury(depot)).is_some()
            })
        };
        cache.nodes().map(of_node).sum()
    }

    /// Empties the calling CPU's arrays of every cache: what a drain of one CPU is made of.
    pub fn drain_local(&self) {
        let _ = self.for_each_cache(|cache| self.drain_own(cache));
    }

    fn drain_own(&self, cache: &RawCache<P::Lock>) {
        // SAFETY: a cache exists, so the system is ready.
        let pin = unsafe { self.platform_unchecked() }.cpu().pin();
        if let Some(busy) = self.head(cache, &pin).and_then(Head::enter) {
            self.drain_head(cache, self.node_of_cpu(cache, pin.id()), &busy);
        }
    }

    /// Flushes every full array of the depots to the slabs. Nothing where this CPU has no head or was interrupted there, unless the caller is
    /// `alone` with the cache: then nobody can come to wait for a lock that is held here.
    fn drain_depots(&self, cache: &RawCache<P::Lock>, alone: bool) {
        for node in cache.nodes() {
            self.drain_depot(cache, node, alone);
        }
    }

    fn drain_depot(&self, cache: &RawCache<P::Lock>, node: &CacheNode<P::Lock>, alone: bool) {
        // SAFETY: a cache exists, so the system is ready.
        let platform = unsafe { self.platform_unchecked() };
        loop {
            let pin = platform.cpu().pin();
            let busy = self.head(cache, &pin).and_then(Head::enter);
            if busy.is_none() && !alone {
                return;
            }
            let taken = {
                let mut depot = node.depot.lock();
                let taken = depot.full.pop();
                node.held.set(depot.full.objects() as u32);
                taken
            };
            let Some(array) = taken else { return };
            // SAFETY: the array left the depot and belongs to this call; the busy flag is set, or the caller is alone with the cache.
            unsafe {
                self.flush_array(cache, array);
                self.drop_array(cache, node, array);
            }
        }
    }

    /// Gives back all that a cache holds which nobody uses: the arrays of every CPU and of the depot, and every slab without an object that
    /// is out.
    ///
    /// # Safety
    ///
    /// Nobody is in a call on the cache, on whichever CPU and by whichever way, nor will be before this call returns; what they wrote is
    /// visible to the caller.
    pub(crate) unsafe fn empty(&self, cache: &RawCache<P::Lock>) {
        // SAFETY: a cache exists, so the system is ready.
        let cpus = unsafe { self.platform_unchecked() }.cpu().count();
        // No CPU is left to itself as "the calling one": this task may move from one to another at any time.
        for cpu in 0..cpus {
            if let Some(busy) = self.head_of(cache, cpu).and_then(Head::enter) {
                let node = self.node_of_cpu(cache, CpuId::new(cpu));
                self.drain_head(cache, node, &busy);
                for empty in busy.unload().into_iter().filter_map(NonNull::new) {
                    // SAFETY: the head owned the array, which was drained.
                    unsafe { self.free_array(empty) };
                }
            }
        }
        self.end_quarantine(cache, true);
        self.drain_depots(cache, true);
        self.shrink_cache(cache);
        self.retire_empty(cache);
        self.drop_spare_arrays(cache);
    }

    /// Clears the heads of a cache that is empty, for the next owner of its index.
    pub(crate) fn reset_heads(&self, cache: &RawCache<P::Lock>) {
        // SAFETY: a cache exists, so the system is ready.
        let cpus = unsafe { self.platform_unchecked() }.cpu().count();
        for head in (0..cpus).filter_map(|cpu| self.head_of(cache, cpu)) {
            head.reset();
        }
    }

    /// Returns the arrays of a depot to their pool.
    fn drop_spare_arrays(&self, cache: &RawCache<P::Lock>) {
        for node in cache.nodes() {
            let next = || self.with_depot(cache, node, |depot| depot.spare.pop());
            while let Some(array) = next().flatten() {
                // SAFETY: the array is empty, left the depot, and nobody else knows it.
                unsafe { self.free_array(array) };
            }
        }
    }

    /// Empties the arrays of a CPU that runs nothing, and gives its arrays to the depots.
    ///
    /// # Errors
    ///
    /// [`AllocError::OutOfMemory`] where the calling CPU has no head and no memory for one; [`AllocError::Busy`] where it was interrupted there.
    ///
    /// # Safety
    ///
    /// No code runs as `cpu`, nor will before this call returns; what it wrote is visible to the caller. `cpu` is below the platform's
    /// count and not the calling CPU.
    pub(crate) unsafe fn drain_idle(
        &self,
        cache: &RawCache<P::Lock>,
        cpu: u32,
    ) -> Result<(), AllocError> {
        let Some(head) = self.head_of(cache, cpu).filter(|head| head.capacity() > 0) else {
            return Ok(());
        };
        // SAFETY: a cache exists, so the system is ready.
        let pin = unsafe { self.platform_unchecked() }.cpu().pin();
        // The flag of the calling CPU keeps its own interrupts off the depot's lock (refill I1).
        let own = self.head(cache, &pin).ok_or(AllocError::OutOfMemory)?;
        let _own = own.enter().ok_or(AllocError::Busy)?;
        let busy = head.enter().ok_or(AllocError::Busy)?;
        let node = self.node_of_cpu(cache, CpuId::new(cpu));
        self.drain_head(cache, node, &busy);
        for empty in busy.unload().into_iter().filter_map(NonNull::new) {
            // SAFETY: the idle CPU's head owned the array, which is empty; the flag of this CPU is set.
            unsafe { self.drop_array(cache, node, empty) };
        }
        Ok(())
    }
}

/// Whether slabs of the cache may go back beneath an allocation in this context.
fn may_take_apart<L>(cache: &RawCache<L>, context: Context) -> bool {
    context != Context::Atomic || cache.setup.hooks.is_none()
}

/// As the page-frame allocator's hook for short memory: gives back what caches hold beyond need, in any context.
///
/// A request of the slab system itself may end here: it holds no lock then, and what it has begun to use is left alone.
impl<P: Platform> Pressure for SlabSystem<P> {
    fn pressure(&self, _node: NodeId, level: PressureLevel, request: &FrameRequest) -> bool {
        match level {
            // Somebody reclaims in the background; arrays and depots are what keeps the rest fast.
            PressureLevel::Low => false,
            // A slab larger than it must be, for one, is worth less than they are.
            _ if request.optional => false,
            _ => self.shrink_short(request) > 0,
        }
    }
}

/// About how many objects the caches hold beyond need, and their release: for a reclaimer.
impl<P: Platform> Shrink for SlabSystem<P> {
    fn count(&self) -> usize {
        let mut objects = 0;
        let _ = self.for_each_cache(|cache| {
            for node in cache.nodes() {
                let held = self.with_depot(cache, node, |depot| {
                    depot.full.objects() + depot.empty * cache.geometry().objects()
                });
                objects += held.unwrap_or(0);
            }
        });
        objects
    }

    fn scan(&self, objects: usize) -> usize {
        let mut freed = 0;
        let _ = self.for_each_cache(|cache| {
            if freed < objects {
                let of_node = |node| self.with_depot(cache, node, |depot| depot.objects);
                let count = || cache.nodes().filter_map(of_node).sum::<u64>();
                let before = count();
                self.shrink_cache(cache);
                let after = count();
                freed += before.saturating_sub(after) as usize;
            }
        });
        freed
    }
}
