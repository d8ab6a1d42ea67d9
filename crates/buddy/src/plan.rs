//! What `init` will carve, counted before anything changes: zones, segments, page blocks, and so bytes.

use kmem_hal::sync::{AtomicPtr, AtomicU8, CachePadded, LocalBool};
use kmem_hal::{CpuSet, NodeId, RawLock};

use crate::boot::BootMap;
use crate::carve::room;
use crate::config::Config;
use crate::cpu_cache::{CpuArea, ZoneCache};
use crate::error::InitError;
use crate::reserved::ReservedSlot;
use crate::state::State;
use crate::zone::Zone;
use crate::zone::bits::WORDS;
use crate::zone::core::Core;
use crate::zone::kind::ZoneKind;
use crate::zone::segment::Segment;

/// Pieces of the reserved list beyond those at boot: each release may cut one in two.
#[cfg(not(loom))]
const SPARE_RESERVED: usize = 12;
#[cfg(loom)]
const SPARE_RESERVED: usize = 1;

/// One zone as planned.
#[derive(Clone, Copy)]
pub(crate) struct ZonePlan {
    pub node: NodeId,
    pub kind: ZoneKind,
    pub span: (u64, u64),
    pub present: u64,
    pub segments: usize,
    pub blocks: usize,
}

/// Calls `give(node, kind, first, end)` for each run of present frames of one zone, ascending.
pub(crate) fn for_each_run<const N: usize>(
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

/// The plans of all zones that have memory, by node and kind.
pub(crate) fn zone_plans<'a, const N: usize>(
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

/// Sizes, one after the other in the order in which `build` carves.
pub(crate) struct Plan {
    pub zones: usize,
    pub segments: usize,
    pub nodes: usize,
    pub cpus: usize,
    pub online: usize,
    pub reserved: usize,
    pub bytes: u64,
}

pub(crate) fn plan<const N: usize, L: RawLock + 'static>(
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
