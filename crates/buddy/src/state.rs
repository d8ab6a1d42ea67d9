//! What `init` carves: zones, tables to find them, CPU areas. Immutable from then on, apart from what has locks or atomics.
//!
//! ```text
//!   boot map --> plan: how many zones, segments, blocks, and so bytes --> one piece from the early allocator --> build
//! ```
//!
//! One piece, so that there is one place where memory can run out, before anything has changed. Its size follows the
//! memory that is present, never the highest address: 0.15 bytes a frame and some KiB per CPU and zone.

use core::mem::MaybeUninit;
use core::ptr::NonNull;

use kmem_hal::sync::{
    AtomicPtr, AtomicU8, AtomicU32, AtomicU64, CachePadded, LocalBool, Ordering, fence, spin_loop,
};
use kmem_hal::{
    CpuId, CpuSet, Frame, FrameRange, Lock, Mobility, NodeId, PAGE_SIZE, PhysAddr, PhysMap, RawLock,
};

use crate::boot::{BootMap, EarlyAllocator, Reservation};
use crate::config::Config;
use crate::cpu_cache::{CpuArea, ZoneCache};
use crate::error::InitError;
use crate::zone::Zone;
use crate::zone::bitmap::Shape;
use crate::zone::bits::WORDS;
use crate::zone::core::Core;
use crate::zone::kind::{MigrateType, ZoneKind};
use crate::zone::segment::Segment;

/// Pieces of the reserved list beyond those at boot: each release may cut one in two.
#[cfg(not(loom))]
const SPARE_RESERVED: usize = 12;
#[cfg(loom)]
const SPARE_RESERVED: usize = 1;

/// A reserved run of frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReservedRun {
    pub first: u64,
    pub end: u64,
    pub why: Reservation,
}

/// A place of the reserved list; empty where `first == end`.
pub(crate) struct ReservedSlot {
    first: AtomicU64,
    end: AtomicU64,
    why: AtomicU8,
}

/// The runs that are present and not the allocator's.
///
/// Writers hold the lock of [`State::reserved`] and make `version` odd meanwhile; readers of single frames take no lock
/// and look at the version before and after.
pub(crate) struct Reserved {
    slots: &'static [ReservedSlot],
    version: AtomicU64,
    reach_first: AtomicU64,
    reach_end: AtomicU64,
}

impl Reserved {
    fn new(slots: &'static [ReservedSlot]) -> Self {
        Self {
            slots,
            version: AtomicU64::new(0),
            reach_first: AtomicU64::new(0),
            reach_end: AtomicU64::new(0),
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = ReservedRun> + '_ {
        self.slots.iter().filter_map(|slot| {
            let run = ReservedRun {
                first: slot.first.load(Ordering::Relaxed),
                end: slot.end.load(Ordering::Relaxed),
                why: Reservation::from_byte(slot.why.load(Ordering::Relaxed)),
            };
            (run.first < run.end).then_some(run)
        })
    }

    /// The frames that had been mapped when memory was last taken over.
    pub fn reach(&self) -> FrameRange {
        let first = self.reach_first.load(Ordering::Relaxed);
        FrameRange::from_numbers(first, self.reach_end.load(Ordering::Relaxed))
            .unwrap_or(FrameRange::EMPTY)
    }

    /// Whether `first..end` are the allocator's: not reserved, and in reach unless the zone needs none.
    ///
    /// Takes no lock. A call that interrupted a change of the list believes its caller.
    #[cold]
    pub fn is_managed(&self, first: u64, end: u64, needs_reach: bool) -> bool {
        for _ in 0..64 {
            let before = self.version.load(Ordering::Acquire);
            let reserved = self.iter().any(|run| run.first < end && first < run.end);
            let reach = self.reach();
            let reached =
                !needs_reach || first >= reach.first().number() && end <= reach.end_number();
            if !planted!(ReservedReaderUnfenced) {
                fence(Ordering::Acquire);
            }
            if before & 1 == 0 && self.version.load(Ordering::Relaxed) == before {
                return reached && !reserved;
            }
            spin_loop();
        }
        true
    }

    /// Runs `f`, which changes the list; the caller holds the lock.
    pub fn change<R>(&self, f: impl FnOnce(&Self) -> R) -> R {
        let version = self.version.load(Ordering::Relaxed);
        if !planted!(ReservedVersionEven) {
            self.version.store(version | 1, Ordering::Relaxed);
        }
        if !planted!(ReservedWriterUnfenced) {
            fence(Ordering::Release);
        }
        let result = f(self);
        self.version.store((version | 1) + 1, Ordering::Release);
        result
    }

    pub fn set_reach(&self, reach: FrameRange) {
        self.reach_first
            .store(reach.first().number(), Ordering::Relaxed);
        self.reach_end.store(reach.end_number(), Ordering::Relaxed);
    }

    fn set(slot: &ReservedSlot, run: ReservedRun) {
        slot.why.store(run.why as u8, Ordering::Relaxed);
        slot.first.store(run.first, Ordering::Relaxed);
        slot.end.store(run.end, Ordering::Relaxed);
    }

    /// Adds a run where the list has room.
    fn push(&self, run: ReservedRun) -> bool {
        let free = self
            .slots
            .iter()
            .find(|slot| slot.first.load(Ordering::Relaxed) >= slot.end.load(Ordering::Relaxed));
        if let Some(slot) = free {
            Self::set(slot, run);
        }
        free.is_some()
    }

    /// Takes `first..end` off the run that wholly contains it; `false` where none does or there is no room.
    pub fn remove(&self, first: u64, end: u64) -> bool {
        let holder = self.slots.iter().find(|slot| {
            slot.first.load(Ordering::Relaxed) <= first && end <= slot.end.load(Ordering::Relaxed)
        });
        let Some(slot) = holder.filter(|_| first < end) else {
            return false;
        };
        let run = ReservedRun {
            first: slot.first.load(Ordering::Relaxed),
            end: slot.end.load(Ordering::Relaxed),
            why: Reservation::from_byte(slot.why.load(Ordering::Relaxed)),
        };
        if run.first < first && end < run.end && !self.push(ReservedRun { first: end, ..run }) {
            return false;
        }
        let (low, high) = if run.first < first {
            (run.first, first)
        } else {
            (end, run.end)
        };
        Self::set(
            slot,
            ReservedRun {
                first: low,
                end: high,
                ..run
            },
        );
        true
    }
}

/// Everything behind an initialised allocator.
pub(crate) struct State<L: 'static> {
    pub zones: &'static [Zone<L>],
    /// All segments by address.
    pub segments: &'static [Segment],
    pub nodes: usize,
    /// For each node the zones in the order in which they are asked, `zones.len()` entries each.
    pub lists: &'static [u16],
    /// Areas of the CPUs that are online; null otherwise.
    pub cpus: &'static [AtomicPtr<CpuArea>],
    /// Set while a CPU that has no area is inside a zone's lock.
    pub bare: &'static [LocalBool],
    cpu_node: fn(CpuId) -> NodeId,
    distance: fn(NodeId, NodeId) -> u8,
    pub reserved: Reserved,
    /// Held by whoever changes the reserved list.
    pub reserved_lock: Lock<(), L>,
    pub misuse_count: AtomicU64,
    pub misuse_last: AtomicU64,
    pub misuse_kind: AtomicU32,
    /// Blocks that nested calls freed and that found no place to wait.
    pub lost: AtomicU64,
    /// How many calls are about to refuse: meanwhile arrays stay empty (see [`crate::refusal`]).
    pub refusing: AtomicU32,
    /// Counts what came to the zones while somebody was about to refuse.
    pub gives: AtomicU64,
    pub metadata: FrameRange,
    pub min_free_kib: Option<u64>,
    pub reserve_ratio: [u32; 5],
}

impl<L: RawLock + 'static> State<L> {
    /// The area of a CPU.
    #[inline(always)]
    pub fn area(&self, cpu: CpuId) -> Option<&CpuArea> {
        let area = self.cpus.get(cpu.index())?.load(Ordering::Acquire);
        // SAFETY: a non-null pointer came from a `&'static CpuArea` in `build` or `cpu_online`.
        unsafe { area.as_ref() }
    }

    /// The node whose zones a CPU asks first.
    pub fn node_of(&self, cpu: CpuId) -> NodeId {
        nearest(self.nodes, (self.cpu_node)(cpu), self.distance)
    }

    /// The node whose memory a CPU is given first: that of [`node_of`](Self::node_of), or the nearest with memory where it has none.
    pub fn memory_node_of(&self, cpu: CpuId) -> NodeId {
        let node = self.node_of(cpu);
        let first = self.list(node.index()).first();
        first
            .and_then(|&zone| self.zones.get(usize::from(zone)))
            .map_or(node, |zone| zone.node)
    }

    /// How far one node is from another.
    pub fn distance_between(&self, from: NodeId, to: NodeId) -> u8 {
        (self.distance)(from, to)
    }

    /// The zones that node `node` asks, in order.
    #[inline]
    pub fn list(&self, node: usize) -> &'static [u16] {
        let count = self.zones.len();
        self.lists
            .get(node * count..(node + 1) * count)
            .unwrap_or(&[])
    }
}

/// Hands out parts of one piece of memory, each on lines of its own.
struct Carver {
    next: NonNull<u8>,
    left: usize,
}

const LINE: usize = 64;

/// Bytes that `count` values of `T` take in a carver.
const fn room<T>(count: usize) -> u64 {
    (size_of::<T>() as u64 * count as u64).next_multiple_of(LINE as u64)
}

impl Carver {
    /// `count` values made by `make`. The plan has counted them, so that they fit.
    fn slice<T: 'static>(
        &mut self,
        count: usize,
        mut make: impl FnMut(usize) -> T,
    ) -> &'static mut [T] {
        // SAFETY: every place is written to.
        unsafe {
            self.places(count, |place, index| {
                place.write(make(index));
            })
        }
    }

    /// `count` values, each made in its place by `build`.
    ///
    /// # Safety
    ///
    /// `build` leaves a value in the place.
    unsafe fn places<T: 'static>(
        &mut self,
        count: usize,
        mut build: impl FnMut(&mut MaybeUninit<T>, usize),
    ) -> &'static mut [T] {
        const { assert!(align_of::<T>() <= LINE) };
        let bytes = room::<T>(count) as usize;
        if bytes == 0 || bytes > self.left {
            debug_assert!(bytes == 0, "the plan and the build disagree");
            return &mut [];
        }
        let first = self.next.cast::<MaybeUninit<T>>();
        for index in 0..count {
            // SAFETY: the carver owns `left` bytes from `next`, aligned to a line, and `bytes` fit.
            build(unsafe { first.add(index).as_mut() }, index);
        }
        // SAFETY: as above: `bytes` is at most `left`.
        self.next = unsafe { self.next.add(bytes) };
        self.left -= bytes;
        // SAFETY: `count` values were just built; the memory is the allocator's for ever and nobody else's.
        unsafe { core::slice::from_raw_parts_mut(first.cast().as_ptr(), count) }
    }
}

/// One zone as planned.
#[derive(Clone, Copy)]
struct ZonePlan {
    node: NodeId,
    kind: ZoneKind,
    span: (u64, u64),
    present: u64,
    segments: usize,
    blocks: usize,
}

/// Calls `give(node, kind, first, end)` for each run of present frames of one zone, ascending.
fn for_each_run<const N: usize>(
    map: &BootMap<N>,
    config: &Config,
    mut give: impl FnMut(NodeId, ZoneKind, u64, u64),
) {
    for (node, range) in map.present_by_node() {
        let mut rest = range;
        while !rest.is_empty() {
            let (kind, end) = config.limits.kind_of(rest.first());
            let (head, tail) = rest.split_at(end);
            give(node, kind, head.first().number(), head.end_number());
            rest = tail;
        }
    }
}

/// The plan of the zone (`node`, `kind`); `None` where it has no memory.
///
/// The spanned range is the node's, clamped to the zone's, as in Linux mm/mm_init.c `zone_spanned_pages_in_node`.
fn plan_zone<const N: usize>(
    map: &BootMap<N>,
    config: &Config,
    node: NodeId,
    kind: ZoneKind,
) -> Option<ZonePlan> {
    let mut plan = ZonePlan {
        node,
        kind,
        span: (0, 0),
        present: 0,
        segments: 0,
        blocks: 0,
    };
    let mut of_node: Option<(u64, u64)> = None;
    for_each_run(map, config, |run_node, run_kind, first, end| {
        if run_node == node {
            of_node = Some((of_node.map_or(first, |span| span.0), end));
            if run_kind == kind {
                plan.present += end - first;
                plan.segments += 1;
                plan.blocks += Segment::blocks(first, end) as usize;
            }
        }
    });
    let (low, high) = config.limits.bounds(kind);
    let (first, end) = of_node?;
    plan.span = (first.max(low), end.min(high));
    (plan.present > 0).then_some(plan)
}

/// Sizes, one after the other in the order in which `build` carves.
struct Plan {
    zones: usize,
    segments: usize,
    nodes: usize,
    cpus: usize,
    online: usize,
    reserved: usize,
    bytes: u64,
}

fn plan<const N: usize, L: RawLock + 'static>(
    map: &BootMap<N>,
    config: &Config,
    cpus: u32,
) -> Result<Plan, InitError> {
    if cpus > CpuSet::CAPACITY {
        return Err(InitError::TooManyCpus { count: cpus });
    }
    let nodes = map.node_count();
    let mut plan = Plan {
        zones: 0,
        segments: 0,
        nodes,
        cpus: cpus as usize,
        online: cpus.min(config.cpus) as usize,
        // Each reserved piece may be cut by a hole or a zone's end once more than it is long.
        reserved: map.reserved_runs() + SPARE_RESERVED,
        bytes: 0,
    };
    for node in 0..nodes {
        for kind in ZoneKind::ALL {
            let Some(zone) = plan_zone(map, config, NodeId::new(node as u16), kind) else {
                continue;
            };
            let frames = zone.span.1 - zone.span.0;
            if frames > u64::from(u32::MAX) {
                return Err(InitError::ZoneTooLarge { frames });
            }
            plan.zones += 1;
            plan.segments += zone.segments;
            plan.bytes += room::<Segment>(zone.segments)
                + room::<u64>(zone.blocks * WORDS)
                + room::<u64>(zone.blocks)
                + room::<AtomicU8>(zone.blocks)
                + room::<u64>(Core::hint_words(zone.blocks));
        }
    }
    if plan.zones == 0 {
        return Err(InitError::NoMemory);
    }
    if plan.zones > usize::from(u16::MAX) {
        return Err(InitError::TooMany {
            count: plan.zones as u64,
        });
    }
    plan.bytes += room::<Zone<L>>(plan.zones)
        + room::<Segment>(plan.segments)
        + room::<u16>(nodes * plan.zones)
        + room::<AtomicPtr<CpuArea>>(plan.cpus)
        + room::<LocalBool>(plan.cpus)
        + room::<ReservedSlot>(plan.reserved)
        + room::<State<L>>(1)
        + plan.online as u64 * area_room(plan.zones);
    Ok(plan)
}

/// Bytes of one CPU's area.
pub(crate) fn area_room(zones: usize) -> u64 {
    room::<CachePadded<CpuArea>>(1) + room::<ZoneCache>(zones)
}

/// Carves a CPU's area out of `bytes` bytes at `memory`, at least [`area_room`] of them.
///
/// # Safety
///
/// The memory is aligned to a page, valid for ever, and nobody else's.
pub(crate) unsafe fn build_area<L: RawLock + 'static>(
    memory: NonNull<u8>,
    bytes: usize,
    node: NodeId,
    bare: Option<&'static LocalBool>,
    zones: &[Zone<L>],
    list: &[u16],
) -> Option<NonNull<CpuArea>> {
    let mut carver = Carver {
        next: memory,
        left: bytes,
    };
    carve_area(&mut carver, node, bare, zones, list)
}

fn carve_area<L: RawLock + 'static>(
    carver: &mut Carver,
    node: NodeId,
    bare: Option<&'static LocalBool>,
    zones: &[Zone<L>],
    list: &[u16],
) -> Option<NonNull<CpuArea>> {
    // SAFETY: `ZoneCache::build` writes all of it.
    let caches: &'static [ZoneCache] = unsafe {
        carver.places(zones.len(), |place, zone| {
            ZoneCache::build(place, zones[zone].start);
        })
    };
    let first = [
        Mobility::Unmovable,
        Mobility::Movable,
        Mobility::Reclaimable,
    ]
    .map(|mobility| {
        let highest = ZoneKind::highest_for(mobility);
        list.iter()
            .map(|&zone| usize::from(zone))
            .find(|&zone| zones.get(zone).is_some_and(|zone| zone.kind <= highest))
            .and_then(|zone| caches.get(zone))
    });
    let area = carver.slice(1, |_| {
        CachePadded::new(CpuArea::new(u32::from(node.get()), bare, caches, first))
    });
    area.first().map(|area| NonNull::from(&**area))
}

/// Carves and fills everything; the boot map has the memory as an early allocation afterwards.
///
/// # Errors
///
/// [`InitError`]; the boot map is as it was then.
///
/// # Safety
///
/// `X1` of [`EarlyAllocator::new`] holds for `map`.
pub(crate) unsafe fn build<const N: usize, M: PhysMap, L: RawLock + 'static>(
    map: &mut BootMap<N>,
    memory: &M,
    config: &Config,
    cpus: u32,
) -> Result<&'static State<L>, InitError> {
    let plan = plan::<N, L>(map, config, cpus)?;
    let bytes = plan.bytes.next_multiple_of(PAGE_SIZE);
    let failed = |reason| InitError::Metadata { bytes, reason };
    // SAFETY: X1, by contract.
    let piece = unsafe { EarlyAllocator::new(map, memory) }
        .alloc(bytes, PAGE_SIZE)
        .map_err(failed)?;
    let next = NonNull::new(memory.to_ptr(piece)).ok_or(InitError::NoMemory)?;
    let mut carver = Carver {
        next,
        left: bytes as usize,
    };
    let map = &*map;

    let mut index = 0;
    let mut specs = zone_plans(map, config, plan.nodes);
    let zones: &'static [Zone<L>] = {
        // The zones' own slice first, then what each of them holds; `slice` makes them one by one, so carve ahead.
        let mut parts = Carver {
            next: carver.next,
            left: carver.left,
        };
        let zone_room = room::<Zone<L>>(plan.zones) as usize;
        // SAFETY: the plan counted the zones' slice inside the piece.
        parts.next = unsafe { parts.next.add(zone_room) };
        parts.left -= zone_room;
        let zones = carver.slice(plan.zones, |_| {
            let spec = specs.next().unwrap_or(ZonePlan {
                node: NodeId::ZERO,
                kind: ZoneKind::Normal,
                span: (0, 0),
                present: 0,
                segments: 0,
                blocks: 0,
            });
            let zone = build_zone(
                map,
                memory.reach(),
                config,
                (&spec, plan.online),
                index,
                &mut parts,
            );
            index += 1;
            zone
        });
        carver = parts;
        zones
    };
    drop(specs);

    let segments = carver.slice(plan.segments, |_| Segment {
        first: u64::MAX,
        end: u64::MAX,
        zone: 0,
        block: 0,
        start: 0,
        clean: (0, 0),
        types: &[],
    });
    let mut place = 0;
    for zone in zones {
        for segment in zone.segments {
            if let Some(entry) = segments.get_mut(place) {
                *entry = *segment;
            }
            place += 1;
        }
    }
    segments.sort_unstable_by_key(|segment| segment.first);

    let lists = carver.slice(plan.nodes * plan.zones, |_| 0u16);
    for (node, list) in lists.chunks_mut(plan.zones).enumerate() {
        for (at, entry) in list.iter_mut().enumerate() {
            *entry = at as u16;
        }
        let here = NodeId::new(node as u16);
        list.sort_unstable_by_key(|&index| {
            let zone = &zones[usize::from(index)];
            let away = zone.node != here;
            // Own node, then by distance; nodes at equal distance in turn from here, so that they share the load.
            let turn = (zone.node.index() + plan.nodes - node) % plan.nodes;
            let distance = (config.distance)(here, zone.node);
            (away, distance, turn, core::cmp::Reverse(zone.kind))
        });
    }

    let areas: &'static [AtomicPtr<CpuArea>] =
        carver.slice(plan.cpus, |_| AtomicPtr::new(core::ptr::null_mut()));
    let bare: &'static [LocalBool] = carver.slice(plan.cpus, |_| LocalBool::new(false));
    for (cpu, slot) in areas.iter().enumerate().take(plan.online) {
        let node = (config.cpu_node)(CpuId::new(cpu as u32));
        let node = nearest(plan.nodes, node, config.distance);
        let list = lists
            .get(node.index() * plan.zones..(node.index() + 1) * plan.zones)
            .unwrap_or(&[]);
        if let Some(area) = carve_area(&mut carver, node, bare.get(cpu), zones, list) {
            slot.store(area.as_ptr(), Ordering::Release);
        }
    }

    let reserved = Reserved::new(carver.slice(plan.reserved, |_| ReservedSlot {
        first: AtomicU64::new(0),
        end: AtomicU64::new(0),
        why: AtomicU8::new(0),
    }));
    map.for_each_reserved(|range, why| {
        for (_, part) in cut(zones, range) {
            reserved.push(ReservedRun {
                first: part.first().number(),
                end: part.end_number(),
                why,
            });
        }
    });

    let state: &'static [State<L>] = {
        let mut reserved = Some(reserved);
        carver.slice(1, |_| State {
            zones,
            segments,
            nodes: plan.nodes,
            lists,
            cpus: areas,
            bare,
            cpu_node: config.cpu_node,
            distance: config.distance,
            reserved: reserved.take().unwrap_or(Reserved::new(&[])),
            reserved_lock: Lock::new(()),
            misuse_count: AtomicU64::new(0),
            misuse_last: AtomicU64::new(0),
            misuse_kind: AtomicU32::new(0),
            lost: AtomicU64::new(0),
            refusing: AtomicU32::new(0),
            gives: AtomicU64::new(0),
            metadata: FrameRange::touching(piece, bytes),
            min_free_kib: config.min_free_kib,
            reserve_ratio: config.reserve_ratio,
        })
    };
    state.first().ok_or(InitError::NoMemory)
}

/// The node itself where it is one of the `nodes` first, which have lists; otherwise the nearest of them: a node without memory may have any
/// number.
fn nearest(nodes: usize, node: NodeId, distance: fn(NodeId, NodeId) -> u8) -> NodeId {
    if node.index() < nodes {
        return node;
    }
    let others = (0..nodes).map(|other| NodeId::new(other as u16));
    others
        .min_by_key(|&other| distance(node, other))
        .unwrap_or(NodeId::ZERO)
}

/// The plans of all zones that have memory, by node and kind.
fn zone_plans<'a, const N: usize>(
    map: &'a BootMap<N>,
    config: &'a Config,
    nodes: usize,
) -> impl Iterator<Item = ZonePlan> + 'a {
    (0..nodes).flat_map(move |node| {
        ZoneKind::ALL
            .into_iter()
            .filter_map(move |kind| plan_zone(map, config, NodeId::new(node as u16), kind))
    })
}

/// The longest run in `first..end` that is neither reserved nor, where that matters, out of reach.
fn longest_clean<const N: usize>(
    map: &BootMap<N>,
    reach: FrameRange,
    kind: ZoneKind,
    first: u64,
    end: u64,
) -> (u64, u64) {
    let mut best = (first, first);
    map.for_each_free(|range| {
        let range = if kind == ZoneKind::HighMem {
            range
        } else {
            range.intersection(reach)
        };
        let run = (
            range.first().number().max(first),
            range.end_number().min(end),
        );
        if run.0 < run.1 && run.1 - run.0 > best.1 - best.0 {
            best = run;
        }
    });
    best
}

fn build_zone<const N: usize, L: RawLock + 'static>(
    map: &BootMap<N>,
    reach: FrameRange,
    config: &Config,
    (spec, cpus): (&ZonePlan, usize),
    index: u32,
    carver: &mut Carver,
) -> Zone<L> {
    let types: &'static [AtomicU8] =
        carver.slice(spec.blocks, |_| AtomicU8::new(MigrateType::Movable as u8));
    let segments = carver.slice(spec.segments, |_| Segment {
        first: u64::MAX,
        end: u64::MAX,
        zone: index,
        block: 0,
        start: spec.span.0,
        clean: (0, 0),
        types,
    });
    let mut place = 0;
    let mut block = 0;
    for_each_run(map, config, |node, kind, first, end| {
        if node == spec.node && kind == spec.kind {
            if let Some(segment) = segments.get_mut(place) {
                *segment = Segment {
                    first,
                    end,
                    zone: index,
                    block,
                    start: spec.span.0,
                    clean: longest_clean(map, reach, spec.kind, first, end),
                    types,
                };
            }
            place += 1;
            block += Segment::blocks(first, end) as u32;
        }
    });
    let core = Core {
        segments,
        words: carver.slice(spec.blocks * WORDS, |_| 0),
        summaries: carver.slice(spec.blocks, |_| 0),
        types,
        hints: carver.slice(Core::hint_words(spec.blocks), |_| 0),
        shape: Shape::new(spec.blocks),
        present: [0; 3],
        stolen: 0,
        high_atomic: 0,
        free: 0,
        free_cma: 0,
    };
    Zone::new(
        spec.node,
        spec.kind,
        spec.span,
        spec.present,
        cpus as u32,
        core,
    )
}

/// Cuts a range of frames into what lies in segments, with the zone's index.
pub(crate) fn cut<L: RawLock + 'static>(
    zones: &[Zone<L>],
    range: FrameRange,
) -> impl Iterator<Item = (&Segment, FrameRange)> {
    zones
        .iter()
        .flat_map(|zone| zone.segments)
        .filter_map(move |segment| {
            let own = FrameRange::from_numbers(segment.first, segment.end)?;
            let part = own.intersection(range);
            (!part.is_empty()).then_some((segment, part))
        })
}

/// The end of the frames that a request with this address limit may have.
pub(crate) fn frame_limit(max_address: PhysAddr) -> u64 {
    match max_address.checked_add(1) {
        Some(end) => Frame::containing(end).number(),
        None => Frame::LIMIT,
    }
}
