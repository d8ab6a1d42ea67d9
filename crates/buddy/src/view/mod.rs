//! What the allocator knows, as data and in the formats of Linux's /proc.
//!
//! Each view is a handle; figures are computed when they are asked for, a zone at a time under its lock, and cost the
//! fast paths nothing. Frames in CPU caches are not free in these views, as in Linux; [`ZoneFree::cached`] counts them.

mod buddyinfo;
mod fragmentation;
mod meminfo;
mod pagetypeinfo;
mod picture;
mod show_mem;
mod zoneinfo;

use kmem_hal::{Cpu, CpuId, NodeId, PhysMap, RawLock};

use crate::buddy::Buddy;
use crate::cpu_cache::{CpuArea, ZoneCache};
use crate::state::State;
use crate::zone::bits::ORDERS;
use crate::zone::core::{Core, STEP};
use crate::zone::kind::{MigrateType, ZoneKind};
use crate::zone::{Mark, Zone, segment};

pub use buddyinfo::BuddyInfo;
pub use fragmentation::{FragmentationIndex, UnusableIndex};
pub use meminfo::MemInfo;
pub use pagetypeinfo::PageTypeInfo;
pub use picture::{Picture, PictureCell, Svg};
pub use show_mem::ShowMem;
pub use zoneinfo::ZoneInfo;

/// Who can say that this CPU is inside a lock: the allocator, whatever its types are.
trait Holder {
    /// Runs `f`, during which calls that interrupt it wait for no lock of a zone.
    fn hold(&self, f: &mut dyn FnMut());
}

/// The state, and the way to look into its zones.
struct Look<'a, L: 'static> {
    state: &'static State<L>,
    holder: &'a dyn Holder,
}

impl<L> Clone for Look<'_, L> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<L> Copy for Look<'_, L> {}

impl<'a, L: RawLock> Look<'a, L> {
    /// The figures of each zone, looked at one after the other.
    fn zones(self) -> impl Iterator<Item = ZoneFree> + use<'a, L> {
        let zones = self.state.zones.iter().enumerate();
        zones.map(move |(index, zone)| figures(self, index, zone))
    }

    /// Runs `f` under a zone's lock.
    fn at<R: Default>(self, zone: &Zone<L>, f: impl FnOnce(&mut Core) -> R) -> R {
        let (mut f, mut result) = (Some(f), R::default());
        self.holder.hold(&mut || {
            if let Some(f) = f.take() {
                result = zone.locked(f);
            }
        });
        result
    }
}

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
    /// Free frames in CMA areas.
    pub free_cma: u64,
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
        .map(|area| cached_by(state, area, zone))
        .sum()
}

/// Frames of a zone in one CPU's arrays, the hot block among them.
fn cached_by<L: RawLock + 'static>(state: &State<L>, area: &CpuArea, zone: usize) -> u64 {
    let arrays = area.caches.get(zone).map_or(0, ZoneCache::frames);
    let hot = area.hot_block().filter(|&(first, _)| {
        segment::find(state.segments, first).is_some_and(|segment| segment.zone as usize == zone)
    });
    arrays + hot.map_or(0, |(_, order)| 1 << order)
}

/// Frames of `first..end`, in one zone of `kind`, that are the allocator's: not reserved, and in reach where that matters.
fn managed_in<L: RawLock + 'static>(state: &State<L>, kind: ZoneKind, first: u64, end: u64) -> u64 {
    let reserved = &state.reserved;
    let (mut at, end) = if crate::buddy::needs_no_reach(kind) {
        (first, end)
    } else {
        let reach = reserved.reach();
        (
            first.max(reach.first().number()),
            end.min(reach.end_number()),
        )
    };
    let mut count = 0;
    while at < end {
        let next = reserved
            .iter()
            .filter(|run| run.end > at && run.first < end)
            .min_by_key(|run| run.first);
        count += next.map_or(end, |run| run.first.max(at)) - at;
        at = next.map_or(end, |run| run.end);
    }
    count
}

fn figures<L: RawLock + 'static>(look: Look<'_, L>, index: usize, zone: &Zone<L>) -> ZoneFree {
    // Most of what is stale, without holding the lock all the time; the rest is brought up to date by the count.
    let steps = zone.types.len().div_ceil(STEP);
    let _ = (0..steps).try_for_each(|_| look.at(zone, |core| core.refresh(STEP)).then_some(()));
    let (blocks, free, cma, free_cma) = look.at(zone, |core| {
        let mut cma = 0;
        for segment in zone.segments {
            for block in segment.block as usize..segment.block_end() {
                if core.type_of(block) == MigrateType::Cma {
                    let base = segment.base_of(block);
                    cma += (base + 512).min(segment.end) - base.max(segment.first);
                }
            }
        }
        (core.counts(None), core.free, cma, core.free_cma)
    });
    ZoneFree {
        node: zone.node,
        kind: zone.kind,
        blocks,
        free,
        cached: cached(look.state, index),
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
        free_cma,
    }
}

impl<M: PhysMap, C: Cpu, L: RawLock + 'static, K, P> Holder for Buddy<M, C, L, K, P> {
    fn hold(&self, f: &mut dyn FnMut()) {
        match self.state() {
            Some(state) => self.holding(state, f),
            None => f(),
        }
    }
}

impl<M: PhysMap, C: Cpu, L: RawLock + 'static, K, P> Buddy<M, C, L, K, P> {
    fn look(&self) -> Option<Look<'_, L>> {
        let state = self.state()?;
        Some(Look {
            state,
            holder: self,
        })
    }

    /// The figures of every zone that has memory, by node and kind. Takes each zone's lock in turn; not for NMIs.
    pub fn zones(&self) -> impl Iterator<Item = ZoneFree> + use<'_, M, C, L, K, P> {
        self.look().into_iter().flat_map(Look::zones)
    }

    /// Free blocks by order: /proc/buddyinfo.
    pub fn buddy_info(&self) -> BuddyInfo<'_, L> {
        BuddyInfo { look: self.look() }
    }

    /// Everything about each zone: /proc/zoneinfo.
    pub fn zone_info(&self) -> ZoneInfo<'_, L> {
        ZoneInfo { look: self.look() }
    }

    /// Free blocks and page blocks by migrate type: /proc/pagetypeinfo.
    pub fn page_type_info(&self) -> PageTypeInfo<'_, L> {
        PageTypeInfo { look: self.look() }
    }

    /// Which part of free memory each order cannot use: debugfs' extfrag/unusable_index.
    pub fn unusable_index(&self) -> UnusableIndex<'_, L> {
        UnusableIndex { look: self.look() }
    }

    /// Whether requests of each order fail for lack of memory or since it is broken up: debugfs' extfrag/extfrag_index.
    #[doc(alias = "extfrag_index")]
    pub fn fragmentation_index(&self) -> FragmentationIndex<'_, L> {
        FragmentationIndex { look: self.look() }
    }

    /// What a kernel logs when memory runs out: zones against their marks, free blocks by order and type.
    #[doc(alias = "__show_mem")]
    pub fn show_mem(&self) -> ShowMem<'_, L> {
        ShowMem { look: self.look() }
    }

    /// Physical memory in at most 2048 cells, as text, SVG and data.
    ///
    /// # Examples
    ///
    /// ```
    /// # use kmem_buddy::{BootMap, Buddy, Config, RegionKind, Reservation, ZoneLimits};
    /// # use kmem_hal::{FrameRequest, FrameSource, OffsetMap, Order, PhysAddr, SingleCpu};
    /// # let arena = Box::leak(vec![0u8; 9 << 20].into_boxed_slice());
    /// # let base = (arena.as_mut_ptr().expose_provenance() + 0xf_ffff) & !0xf_ffff;
    /// # let mut map: BootMap = BootMap::new();
    /// # map.push(PhysAddr::new(0), 8 << 20, RegionKind::Usable)?;
    /// # map.reserve(PhysAddr::new(0), 2 << 20, Reservation::KernelImage)?;
    /// # let (memory, cpu) = unsafe { (OffsetMap::new(base, 2048), SingleCpu::new()) };
    /// # let buddy: Buddy<_, _> = Buddy::new(memory, cpu);
    /// # // SAFETY: X1: nobody else uses the memory of the map.
    /// # unsafe { buddy.init(&mut map, &Config::new().limits(ZoneLimits::NORMAL_ONLY).min_free_kib(0))? };
    /// // 8 MiB: the kernel in the first two, one MiB taken after it, the allocator's tables at the end.
    /// let _megabyte = buddy.alloc(&FrameRequest::new(Order::new(8).unwrap()))?;
    /// let picture = buddy.picture().to_string();
    /// assert_eq!(picture, "Node 0, zone   Normal: 512 frames a cell\n0x000000001000 =5..\n");
    /// # let _ = buddy.picture().svg().to_string();
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn picture(&self) -> Picture<'_, L> {
        Picture::new(self.look())
    }

    /// Frames that nested calls freed and for which there was no place to wait: out of use until the next boot.
    ///
    /// 0 unless NMIs freed more than 32 blocks of memory that is not mapped while the calls that they interrupted held locks; there is
    /// room for any number of mapped ones (see [the crate](crate)). Where one of them had been freed twice, those that waited beyond it may be out
    /// of reach: each counts as one frame here, as its order is not known.
    pub fn lost(&self) -> u64 {
        self.state().map_or(0, |state| state.pending.lost())
    }

    /// The allocator's lines of /proc/meminfo.
    pub fn mem_info(&self) -> MemInfo {
        MemInfo::of(self.zones())
    }

    /// Whether all frames of `range` are the allocator's, free or not, in one zone.
    pub(crate) fn is_own(&self, range: kmem_hal::FrameRange) -> bool {
        let (first, end) = (range.first().number(), range.end_number());
        let Some(state) = self.state() else {
            return false;
        };
        let segment = crate::zone::segment::find(state.segments, first);
        segment
            .filter(|segment| segment.contains(first, end - first))
            .and_then(|segment| state.zones.get(segment.zone as usize))
            .is_some_and(|zone| managed_in(state, zone.kind, first, end) == end - first)
    }

    /// Counts everything from scratch, for a comparison with the figures that are kept.
    ///
    /// Exact while nothing else allocates or frees.
    pub fn recount(&self) -> Recount {
        let mut result = Recount::default();
        let Some(look) = self.look() else {
            return result;
        };
        let state = look.state;
        for (index, zone) in state.zones.iter().enumerate() {
            result.cached += cached(state, index);
            for segment in zone.segments {
                result.managed += managed_in(state, zone.kind, segment.first, segment.end);
            }
            result.free += look.at(zone, |core| {
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
        let Some(look) = self.look() else {
            return Ok(());
        };
        for zone in look.state.zones {
            if let Some(what) = look.at(zone, |core| core.check().err()) {
                return Err((zone.node, zone.kind, what));
            }
        }
        Ok(())
    }
}
