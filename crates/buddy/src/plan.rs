//! What `init` will carve, counted before anything changes: zones, segments, page blocks, and so bytes.

use kmem_hal::sync::{AtomicPtr, AtomicU8, LocalBool};
use kmem_hal::{CpuSet, NodeId, RawLock};

use crate::boot::BootMap;
use crate::carve::{LINE, room, tight};
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
    /// Bytes of the tables that are hardly ever written to.
    pub tables: u64,
    pub bytes: u64,
}

impl Plan {
    /// Entries of the table of all segments; one zone's own serves where there is no other.
    pub const fn all_segments(&self) -> usize {
        if self.zones == 1 { 0 } else { self.segments }
    }
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
        reserved: 0,
        tables: 0,
        bytes: 0,
    };
    for node in 0..nodes {
        for kind in ZoneKind::ALL {
            let Some(zone) = plan_zone(map, config, NodeId::new(node as u16), kind) else {
                continue;
            };
            let frames = zone.span.1 - zone.span.0;
            // Entries of arrays are distances from the zone's start.
            if frames > 1 << 32 {
                return Err(InitError::ZoneTooLarge { frames });
            }
            plan.zones += 1;
            plan.segments += zone.segments;
            plan.bytes += room::<Segment>(zone.segments)
                + room::<u64>(zone.blocks * WORDS)
                + room::<[u8; WORDS]>(zone.blocks)
                + room::<AtomicU8>(zone.blocks)
                + room::<u64>(Core::hint_words(zone.blocks));
        }
    }
    // The runs that are reserved now, each cut at the ends of segments, and what will be carved, which may be cut at each.
    map.for_each_reserved(|range, _| {
        for_each_run(map, config, |_, _, first, end| {
            let touches = range.first().number() < end && first < range.end_number();
            plan.reserved += usize::from(touches);
        });
    });
    plan.reserved += plan.segments + SPARE_RESERVED;
    if plan.zones == 0 {
        return Err(InitError::NoMemory);
    }
    if plan.zones > usize::from(u16::MAX) {
        return Err(InitError::TooMany {
            count: plan.zones as u64,
        });
    }
    plan.tables = tight::<u16>(nodes * plan.zones)
        + tight::<AtomicPtr<CpuArea>>(plan.cpus)
        + tight::<LocalBool>(plan.cpus)
        + tight::<ReservedSlot>(plan.reserved);
    plan.bytes += room::<Zone<L>>(plan.zones)
        + room::<Segment>(plan.all_segments())
        + plan.tables.next_multiple_of(LINE)
        + room::<State<L>>(1)
        + plan.online as u64 * area_room(plan.zones);
    Ok(plan)
}

/// Bytes of one CPU's area: its arrays begin where it ends.
pub(crate) fn area_room(zones: usize) -> u64 {
    (tight::<CpuArea>(1) + tight::<ZoneCache>(zones)).next_multiple_of(LINE)
}

#[cfg(all(test, target_pointer_width = "64", not(any(loom, shuttle))))]
mod tests {
    use kmem_hal::{PhysAddr, Spin};

    use super::*;
    use crate::boot::RegionKind;
    use crate::zone::kind::ZoneLimits;

    /// 0.15 bytes a frame, 4 KiB a CPU that is online and zone, and for small machines the descriptions of zone and machine.
    #[test]
    fn tables_take_what_memory_and_cpus_need() {
        for mib in [256, 1024, 8192] {
            for cpus in [1, 2, 8] {
                let mut map: BootMap<8> = BootMap::new();
                map.push(PhysAddr::new(0), mib << 20, RegionKind::Usable)
                    .unwrap();
                let config = Config::new().limits(ZoneLimits::NORMAL_ONLY).cpus(cpus);
                let bytes = plan::<8, Spin>(&map, &config, cpus).unwrap().bytes;
                let frames = mib << 8;
                let fixed = if mib >= 1024 && cpus >= 2 { 0 } else { 1024 };
                let most = frames * 15 / 100 + u64::from(cpus) * 4096 + fixed;
                assert!(bytes <= most, "{mib} MiB, {cpus} CPUs: {bytes} > {most}");
            }
        }
    }
}
