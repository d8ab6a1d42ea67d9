//! What the caches hold: figures per cache, totals, and `/proc/slabinfo`.
//!
//! Exact while nothing allocates; otherwise each figure is of some instant, and sums may be off by what moved meanwhile.

use core::fmt;

use kmem_hal::sync::Ordering;
use kmem_hal::{AllocError, Cpu};

use crate::platform::Platform;
use crate::raw::RawCache;
use crate::system::SlabSystem;

/// The figures of one cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheInfo {
    /// The name.
    pub name: &'static str,
    /// Bytes from one object to the next.
    pub object_size: usize,
    /// Objects in users' hands, by a recount: all, minus those in slabs, arrays and depot.
    pub active_objects: u64,
    /// Objects in live slabs.
    pub total_objects: u64,
    /// Objects in arrays of CPUs.
    pub in_arrays: u64,
    /// Objects in arrays of the depots of all nodes.
    pub in_depot: u64,
    /// Objects in quarantine.
    pub waiting: u64,
    /// Objects free in their slabs.
    pub in_slabs: u64,
    /// Live slabs.
    pub slabs: u64,
    /// Live slabs with at least one object out.
    pub active_slabs: u64,
    /// Frames of live slabs.
    pub frames: u64,
    /// Objects in a slab of the preferred size.
    pub objects_per_slab: usize,
    /// Frames in a slab of the preferred size.
    pub frames_per_slab: u64,
    /// Slots of a CPU's array.
    pub array: usize,
    /// Allocations so far.
    pub allocs: u64,
    /// Frees so far. `allocs - frees` is `active_objects`, counted another way.
    pub frees: u64,
    /// Arrays exchanged with the depot.
    pub exchanges: u64,
    /// Arrays filled from slabs.
    pub refills: u64,
    /// Batches given back to slabs.
    pub flushes: u64,
    /// Allocations that were refused.
    pub failures: u64,
    /// Misuses found.
    pub misuses: u64,
}

/// The sums over all caches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlabTotals {
    /// Caches.
    pub caches: u64,
    /// Bytes of objects in users' hands, after rounding to their cache's size.
    pub active_bytes: u64,
    /// Frames of slabs.
    #[doc(alias = "Slab")]
    pub slab_frames: u64,
    /// Frames of empty slabs and of objects that CPUs and depots hold, rounded down: about what a shrink gives back.
    #[doc(alias = "SReclaimable")]
    pub reclaimable_bytes: u64,
    /// Frames of allocations in whole pages.
    pub page_frames: u64,
    /// Allocations in whole pages.
    pub page_blocks: u64,
    /// Frames of the allocator's own objects.
    pub overhead_frames: u64,
    /// Frees of addresses that were never allocated here.
    pub foreign_frees: u64,
}

impl<P: Platform> SlabSystem<P> {
    /// Calls `each` with the figures of every cache, kmalloc's classes first. Holds no lock meanwhile.
    ///
    /// # Errors
    ///
    /// [`AllocError::NotInitialised`]; [`AllocError::Busy`] in a context that interrupted the registry.
    pub fn caches(&self, mut each: impl FnMut(&CacheInfo)) -> Result<(), AllocError> {
        self.for_each_cache(|cache| each(&self.info_of(cache)))
    }

    /// The sums over all caches; all zero before `init`.
    #[must_use]
    pub fn totals(&self) -> SlabTotals {
        let mut totals = SlabTotals {
            page_frames: self.page_frames.load(Ordering::Relaxed),
            page_blocks: self.page_blocks.load(Ordering::Relaxed),
            overhead_frames: self.overhead_frames(),
            foreign_frees: self.foreign.load(Ordering::Relaxed),
            ..SlabTotals::default()
        };
        let _ = self.caches(|cache| {
            totals.caches += 1;
            totals.active_bytes += cache.active_objects * cache.object_size as u64;
            totals.slab_frames += cache.frames;
            totals.reclaimable_bytes +=
                (cache.in_arrays + cache.in_depot + cache.in_slabs) * cache.object_size as u64;
        });
        totals
    }

    /// The caches as `/proc/slabinfo` prints them.
    #[doc(alias = "slabtop")]
    #[must_use]
    pub fn slabinfo(&self) -> SlabInfo<'_, P> {
        SlabInfo { system: self }
    }

    pub(crate) fn info_of(&self, cache: &RawCache<P::Lock>) -> CacheInfo {
        // SAFETY: a cache exists, so the system is ready.
        let cpus = unsafe { self.platform_unchecked() }.cpu().count();
        let (mut in_arrays, mut allocs, mut frees) = (
            0,
            cache.direct_allocs.load(Ordering::Relaxed),
            cache.direct_frees.load(Ordering::Relaxed),
        );
        for head in (0..cpus).filter_map(|cpu| self.head_of(cache, cpu)) {
            in_arrays += head.cached() as u64;
            allocs = allocs.wrapping_add(head.allocs.get());
            frees = frees.wrapping_add(head.frees());
        }
        let (mut in_slabs, mut active_slabs) = (0, 0);
        cache.for_each_slab(|slab| {
            let free = slab.free_in_all();
            in_slabs += free as u64;
            active_slabs += u64::from(free < slab.objects());
            true
        });
        let mut sums = [0; 8];
        for node in cache.nodes() {
            let depot = self.with_depot(cache, node, |depot| {
                [
                    depot.full.objects() as u64,
                    depot.waiting_len(),
                    depot.exchanges,
                    depot.refills,
                    depot.flushes,
                    depot.slabs,
                    depot.objects,
                    depot.frames,
                ]
            });
            for (sum, of_node) in sums.iter_mut().zip(depot.unwrap_or_default()) {
                *sum += of_node;
            }
        }
        let [
            in_depot,
            waiting,
            exchanges,
            refills,
            flushes,
            slabs,
            total_objects,
            frames,
        ] = sums;
        let geometry = cache.geometry();
        CacheInfo {
            name: cache.setup.name,
            object_size: geometry.size(),
            active_objects: total_objects.saturating_sub(in_slabs + in_arrays + in_depot + waiting),
            total_objects,
            in_arrays,
            in_depot,
            waiting,
            in_slabs,
            slabs,
            active_slabs,
            frames,
            objects_per_slab: geometry.objects(),
            frames_per_slab: geometry.pages(),
            array: geometry.array(),
            allocs,
            frees: frees.wrapping_add(waiting),
            exchanges,
            refills,
            flushes,
            failures: cache.failures.load(Ordering::Relaxed),
            misuses: cache.misuses.load(Ordering::Relaxed),
        }
    }
}

/// One line of `/proc/slabinfo`, version 2.1.
///
/// Source: Linux `mm/slab_common.c` (`cache_show`), proc(5).
impl fmt::Display for CacheInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:<17} {:6} {:6} {:6} {:4} {:4} : tunables {:4} {:4} {:4} : slabdata {:6} {:6} {:6}",
            self.name,
            self.active_objects,
            self.total_objects,
            self.object_size,
            self.objects_per_slab,
            self.frames_per_slab,
            self.array,
            self.array,
            0,
            self.active_slabs,
            self.slabs,
            self.in_depot,
        )
    }
}

/// `/proc/slabinfo`, version 2.1, of caches that have had a slab.
///
/// The tunables are the slots of a CPU's array; the last column, which Linux uses for objects shared between CPUs, holds those of
/// the depot.
#[derive(Debug)]
pub struct SlabInfo<'s, P: Platform> {
    system: &'s SlabSystem<P>,
}

impl<P: Platform> fmt::Display for SlabInfo<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("slabinfo - version: 2.1\n")?;
        f.write_str(
            "# name            <active_objs> <num_objs> <objsize> <objperslab> <pagesperslab> : tunables <limit> \
             <batchcount> <sharedfactor> : slabdata <active_slabs> <num_slabs> <sharedavail>\n",
        )?;
        let mut result = Ok(());
        let _ = self.system.caches(|cache| {
            if result.is_ok() && (cache.slabs > 0 || cache.allocs > 0) {
                result = writeln!(f, "{cache}");
            }
        });
        result
    }
}
