//! What the allocator knows, as data and in the formats of Linux's /proc.
//!
//! Each view is a handle; figures are computed when they are asked for, a zone at a time under its lock, and cost the
//! fast paths nothing. Frames in CPU caches are not free in these views, as in Linux; [`ZoneFree::cached`] counts them.

mod buddyinfo;
mod meminfo;
mod pagetypeinfo;
mod zoneinfo;

use kmem_hal::{CpuId, NodeId, RawLock};

use crate::buddy::Buddy;
use crate::state::State;
use crate::zone::bits::ORDERS;
use crate::zone::kind::{MigrateType, ZoneKind};
use crate::zone::{Mark, Zone};

pub use buddyinfo::BuddyInfo;
pub use meminfo::MemInfo;
pub use pagetypeinfo::PageTypeInfo;
pub use zoneinfo::ZoneInfo;

/// The figures of one zone at one instant, in frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZoneFree {
    /// The zone's node.
    pub node: NodeId,
    /// The zone's kind.
    pub kind: ZoneKind,
    /// Free blocks by order, 0 to 10.
    pub blocks: [u64; ORDERS],
    /// Free frames.
    pub free: u64,
    /// Frames in CPUs' caches.
    pub cached: u64,
    /// Frames that the zone spans, holes included.
    pub spanned: u64,
    /// Frames that are memory.
    pub present: u64,
    /// Frames that are the allocator's.
    pub managed: u64,
    /// The min, low and high watermarks.
    pub marks: [u64; 3],
    /// Frames kept from requests that could also use DMA, DMA32, Normal, HighMem, Movable.
    pub protection: [u64; 5],
    /// The first frame's number.
    pub start: u64,
    /// Frames in CMA areas.
    pub cma: u64,
}

impl ZoneFree {
    /// Frames in the blocks, summed over the orders: equals `free`.
    #[must_use]
    pub fn sum(&self) -> u64 {
        self.blocks
            .iter()
            .enumerate()
            .map(|(order, count)| count << order)
            .sum()
    }

    /// Frames that are allocated: managed, not free, in no cache.
    #[must_use]
    pub fn allocated(&self) -> u64 {
        self.managed - self.free.min(self.managed) - self.cached.min(self.managed - self.free)
    }
}

/// A count of the zones' bits made from scratch, beside the figures that the allocator keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recount {
    /// Frames in segments that no reservation touches and that are in reach.
    pub managed: u64,
    /// Bits that say free.
    pub free: u64,
    /// Entries of CPUs' caches, in frames.
    pub cached: u64,
}

fn cached<L: RawLock + 'static>(state: &State<L>, zone: usize) -> u64 {
    (0..state.cpus.len() as u32)
        .filter_map(|cpu| state.area(CpuId::new(cpu)))
        .filter_map(|area| area.caches.get(zone))
        .map(crate::cpu_cache::ZoneCache::frames)
        .sum()
}

fn figures<L: RawLock + 'static>(state: &State<L>, index: usize, zone: &Zone<L>) -> ZoneFree {
    let (blocks, free, cma) = zone.locked(|core| {
        let mut cma = 0;
        for segment in zone.segments {
            for block in segment.block as usize..segment.block_end() {
                if core.type_of(block) == MigrateType::Cma {
                    let base = segment.base_of(block);
                    cma += (base + 512).min(segment.end) - base.max(segment.first);
                }
            }
        }
        (core.counts(None), core.free, cma)
    });
    ZoneFree {
        node: zone.node,
        kind: zone.kind,
        blocks,
        free,
        cached: cached(state, index),
        spanned: zone.spanned,
        present: zone.present,
        managed: zone.managed(),
        marks: [
            zone.mark(Mark::Min),
            zone.mark(Mark::Low),
            zone.mark(Mark::High),
        ],
        protection: core::array::from_fn(|kind| {
            zone.protection[kind].load(kmem_hal::sync::Ordering::Relaxed)
        }),
        start: zone.start,
        cma,
    }
}

impl<M, C, L: RawLock + 'static, K, P> Buddy<M, C, L, K, P> {
    /// The figures of every zone that has memory, by node and kind. Takes each zone's lock in turn; not for NMIs.
    pub fn zones(&self) -> impl Iterator<Item = ZoneFree> + use<M, C, L, K, P> {
        let state = self.state();
        state.into_iter().flat_map(|state| {
            state
                .zones
                .iter()
                .enumerate()
                .map(move |(index, zone)| figures(state, index, zone))
        })
    }

    /// Free blocks by order: /proc/buddyinfo.
    pub fn buddy_info(&self) -> BuddyInfo<L> {
        BuddyInfo {
            state: self.state(),
        }
    }

    /// Everything about each zone: /proc/zoneinfo.
    pub fn zone_info(&self) -> ZoneInfo<L> {
        ZoneInfo {
            state: self.state(),
        }
    }

    /// Free blocks and page blocks by migrate type: /proc/pagetypeinfo.
    pub fn page_type_info(&self) -> PageTypeInfo<L> {
        PageTypeInfo {
            state: self.state(),
        }
    }

    /// The allocator's lines of /proc/meminfo.
    pub fn mem_info(&self) -> MemInfo {
        MemInfo::of(self.zones())
    }

    /// Counts everything from scratch, for a comparison with the figures that are kept.
    ///
    /// Exact while nothing else allocates or frees.
    pub fn recount(&self) -> Recount {
        let mut result = Recount::default();
        let Some(state) = self.state() else {
            return result;
        };
        let reserved = &state.reserved;
        for (index, zone) in state.zones.iter().enumerate() {
            result.cached += cached(state, index);
            for segment in zone.segments {
                let reach = if crate::buddy::needs_no_reach(zone.kind) {
                    (segment.first, segment.end)
                } else {
                    (
                        segment.first.max(reserved.reach().first().number()),
                        segment.end.min(reserved.reach().end_number()),
                    )
                };
                let mut at = reach.0;
                while at < reach.1 {
                    let next = reserved
                        .iter()
                        .filter(|run| run.end > at && run.first < reach.1)
                        .min_by_key(|run| run.first);
                    result.managed += next.map_or(reach.1, |run| run.first.max(at)) - at;
                    at = next.map_or(reach.1, |run| run.end);
                }
            }
            result.free += zone.locked(|core| {
                core.words
                    .iter()
                    .map(|word| u64::from(word.count_ones()))
                    .sum::<u64>()
            });
        }
        result
    }

    /// Checks every derived word of every zone against its bits: for tests and audits.
    ///
    /// # Errors
    ///
    /// What does not agree, and in which zone.
    pub fn check(&self) -> Result<(), (NodeId, ZoneKind, &'static str)> {
        let Some(state) = self.state() else {
            return Ok(());
        };
        for zone in state.zones {
            zone.locked(|core| core.check())
                .map_err(|what| (zone.node, zone.kind, what))?;
        }
        Ok(())
    }
}
