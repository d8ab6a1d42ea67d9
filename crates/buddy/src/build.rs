//! What `init` carves: zones, tables to find them, CPU areas.
//!
//! ```text
//!   boot map --> plan: how many zones, segments, blocks, and so bytes --> one piece from the early allocator --> build
//! ```
//!
//! One piece, so that there is one place where memory can run out, before anything has changed. Its size follows the
//! memory that is present, never the highest address: 0.15 bytes a frame and some KiB per CPU and zone.

use core::ptr::NonNull;

use kmem_hal::sync::{AtomicPtr, AtomicU8, AtomicU32, AtomicU64, LocalBool, Ordering};
use kmem_hal::{CpuId, FrameRange, Lock, Mobility, NodeId, PAGE_SIZE, PhysMap, RawLock};

use crate::boot::{BootMap, EarlyAllocator};
use crate::carve::{Carving, room, tight};
use crate::config::Config;
use crate::cpu_cache::{CpuArea, ZoneCache};
use crate::error::InitError;
use crate::pending::Pending;
use crate::plan::{ZonePlan, area_room, for_each_run, plan, zone_plans};
use crate::reserved::{Reserved, ReservedRun, ReservedSlot};
use crate::state::{State, cut, nearest};
use crate::zone::Zone;
use crate::zone::bitmap::Shape;
use crate::zone::bits::WORDS;
use crate::zone::core::Core;
use crate::zone::kind::{MigrateType, ZoneKind};
use crate::zone::segment::Segment;

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
    // SAFETY: the caller's promise.
    let mut carving = unsafe { Carving::new(memory, bytes as u64) };
    carve_area(&mut carving, node, bare, zones, list)
}

fn carve_area<L: RawLock + 'static>(
    carving: &mut Carving,
    node: NodeId,
    bare: Option<&'static LocalBool>,
    zones: &[Zone<L>],
    list: &[u16],
) -> Option<NonNull<CpuArea>> {
    let mut block = carving.block(area_room(zones.len()));
    let mut place = block.block(tight::<CpuArea>(1));
    // SAFETY: `ZoneCache::build` writes all of it.
    let caches: &'static [ZoneCache] = unsafe {
        block.places(zones.len(), |place, zone| {
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
    let area = place.slice(1, |_| {
        CpuArea::new(u32::from(node.get()), bare, caches, first)
    });
    area.first().map(NonNull::from)
}

/// The segments of all zones by address: `count` entries, or the only zone's own.
fn all_segments<L: RawLock + 'static>(
    zones: &'static [Zone<L>],
    count: usize,
    carving: &mut Carving,
) -> &'static [Segment] {
    if let [only] = zones {
        return only.segments;
    }
    let mut rest = zones.iter().flat_map(|zone| zone.segments);
    let segments = carving.slice(count, |_| *rest.next().unwrap_or(&Segment::NONE));
    segments.sort_unstable_by_key(|segment| segment.first);
    segments
}

/// Carves and fills everything; the boot map has the memory as [`Tables`](crate::Reservation::Tables) afterwards.
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
        .for_tables()
        .alloc(bytes, PAGE_SIZE)
        .map_err(failed)?;
    let next = NonNull::new(memory.to_ptr(piece)).ok_or(InitError::NoMemory)?;
    // SAFETY: a piece of the early allocator of that many bytes, aligned to a page and in reach, that is given back by nobody.
    let mut carving = unsafe { Carving::new(next, bytes) };
    let map = &*map;

    let mut index = 0;
    let mut specs = zone_plans(map, config, plan.nodes);
    // The zones' own slice first, then what each of them holds.
    let mut places = carving.block(room::<Zone<L>>(plan.zones));
    let zones: &'static [Zone<L>] = places.slice(plan.zones, |_| {
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
            &mut carving,
        );
        index += 1;
        zone
    });
    drop(specs);

    let segments = all_segments(zones, plan.all_segments(), &mut carving);

    let mut tables = carving.block(plan.tables);
    let lists = tables.slice(plan.nodes * plan.zones, |_| 0u16);
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
        tables.slice(plan.cpus, |_| AtomicPtr::new(core::ptr::null_mut()));
    let bare: &'static [LocalBool] = tables.slice(plan.cpus, |_| LocalBool::new(false));
    for (cpu, slot) in areas.iter().enumerate().take(plan.online) {
        let node = (config.cpu_node)(CpuId::new(cpu as u32));
        let node = nearest(plan.nodes, node, config.distance);
        let list = lists
            .get(node.index() * plan.zones..(node.index() + 1) * plan.zones)
            .unwrap_or(&[]);
        if let Some(area) = carve_area(&mut carving, node, bare.get(cpu), zones, list) {
            slot.store(area.as_ptr(), Ordering::Release);
        }
    }

    let reserved = Reserved::new(tables.slice(plan.reserved, |_| ReservedSlot::new()));
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
        carving.slice(1, |_| State {
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
            pending: Pending::new(),
            refusing: AtomicU32::new(0),
            gives: AtomicU64::new(0),
            metadata: FrameRange::touching(piece, bytes),
            min_free_kib: config.min_free_kib,
            reserve_ratio: config.reserve_ratio,
        })
    };
    state.first().ok_or(InitError::NoMemory)
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
    carving: &mut Carving,
) -> Zone<L> {
    let types: &'static [AtomicU8] =
        carving.slice(spec.blocks, |_| AtomicU8::new(MigrateType::Movable as u8));
    let segments = carving.slice(spec.segments, |_| Segment::NONE);
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
        words: carving.slice(spec.blocks * WORDS, |_| 0),
        summaries: carving.slice(spec.blocks, |_| [0; WORDS]),
        types,
        hints: carving.slice(Core::hint_words(spec.blocks), |_| 0),
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
