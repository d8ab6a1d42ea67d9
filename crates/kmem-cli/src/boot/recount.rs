//! The recount: zones and their pages, counted straight from the map that was read.
//!
//! This is the other side of every check of boot about zones. It shares no code with the allocator: it cuts the usable
//! ranges to whole pages, drops page 0 as Linux does, and sorts the pages into nodes and zones by their addresses.
//!
//! ```text
//!   address   0      16 MiB          4 GiB
//!   zone      | DMA  |     DMA32     |     Normal ...
//! ```
//! Source of the limits: Linux `arch/x86/mm/init.c` (`zone_sizes_init`).

use crate::input::linux_notes::LinuxNotes;
use crate::input::map::MemoryMap;

/// Bytes a page.
pub const PAGE: u64 = 4096;
/// The zones of x86-64 with the address behind each.
pub const ZONES: [(&str, u64); 3] = [("DMA", 16 << 20), ("DMA32", 4 << 30), ("Normal", u64::MAX)];

/// What a zone of a node should have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ZoneCount {
    /// The node's number.
    pub node: u32,
    /// The zone's name.
    pub zone: &'static str,
    /// Whole usable pages.
    pub present: u64,
    /// The first present page.
    pub first: u64,
    /// The page behind the last present one.
    pub end: u64,
}

/// Counts the pages of all zones that have any, by node, then by address.
pub fn zones(map: &MemoryMap) -> Vec<ZoneCount> {
    let mut out: Vec<ZoneCount> = Vec::new();
    for (start, end) in map.usable() {
        let (mut page, last) = (start.div_ceil(PAGE).max(1), end / PAGE);
        while page < last {
            let (node, node_end) = node_of(map, page * PAGE);
            let (zone, zone_end) = ZONES
                .iter()
                .find(|(_, end)| page * PAGE < *end)
                .map_or(("Normal", u64::MAX), |z| (z.0, z.1));
            let run_end = last.min(node_end / PAGE).min(zone_end / PAGE).max(page + 1);
            match out.iter_mut().find(|z| (z.node, z.zone) == (node, zone)) {
                Some(z) => {
                    z.present += run_end - page;
                    z.first = z.first.min(page);
                    z.end = z.end.max(run_end);
                }
                None => out.push(ZoneCount {
                    node,
                    zone,
                    present: run_end - page,
                    first: page,
                    end: run_end,
                }),
            }
            page = run_end;
        }
    }
    out.sort_by_key(|z| (z.node, z.first));
    out
}

/// Counts the sections of 128 MiB that hold usable memory.
pub fn sections(map: &MemoryMap) -> u64 {
    let mut seen: Vec<u64> = Vec::new();
    for (start, end) in map.usable() {
        for section in start >> 27..=(end - 1) >> 27 {
            if seen.last().is_none_or(|last| *last < section) {
                seen.push(section);
            }
        }
    }
    seen.len() as u64
}

/// Returns the node of an address, and where the answer may change.
pub(super) fn node_of(map: &MemoryMap, address: u64) -> (u32, u64) {
    if let Some(range) = map
        .nodes
        .iter()
        .find(|n| n.base <= address && address <= n.last())
    {
        return (range.node, range.last() + 1);
    }
    let next = map
        .nodes
        .iter()
        .map(|n| n.base)
        .filter(|b| *b > address)
        .min();
    (0, next.unwrap_or(u64::MAX))
}

/// One thing that Linux said, beside what is here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinuxCheck {
    /// What Linux spoke of.
    pub what: String,
    /// What it said, in pages.
    pub linux: u64,
    /// What the zones have, in pages.
    pub here: u64,
}

/// Holds zones against what Linux said about the same map.
pub fn against_linux(notes: &LinuxNotes, zones: &[ZoneCount]) -> Vec<LinuxCheck> {
    let mut out = Vec::new();
    let present = |node: u32, zone: &str| {
        zones
            .iter()
            .filter(|z| z.node == node && z.zone == zone)
            .map(|z| z.present)
            .sum::<u64>()
    };
    for (node, zone, pages) in &notes.present {
        let what = format!("node {node} {zone} present");
        out.push(LinuxCheck {
            what,
            linux: *pages,
            here: present(*node, zone),
        });
    }
    for (node, pages) in &notes.totals {
        let here = zones
            .iter()
            .filter(|z| z.node == *node)
            .map(|z| z.present)
            .sum();
        out.push(LinuxCheck {
            what: format!("node {node} present"),
            linux: *pages,
            here,
        });
    }
    for (zone, unavailable) in &notes.unavailable {
        let Some(range) = notes.zone_ranges.iter().find(|r| r.0 == *zone) else {
            continue;
        };
        // In the lowest zone Linux counts the pages below its start as well, page 0 above all.
        let lowest = notes.zone_ranges.iter().all(|r| range.1 <= r.1);
        let below = if lowest { 0 } else { range.1 / PAGE };
        let linux = ((range.2 + 1) / PAGE - below).saturating_sub(*unavailable);
        let here = zones
            .iter()
            .filter(|z| z.zone == zone)
            .map(|z| z.present)
            .sum();
        out.push(LinuxCheck {
            what: format!("{zone} less its holes"),
            linux,
            here,
        });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::embedded::{MAPS, find};
    use crate::input::{lines::Source, map};

    fn embedded(name: &str) -> MemoryMap {
        map::read(find(MAPS, name).unwrap().open().unwrap()).unwrap()
    }

    #[test]
    fn the_numa_machine_has_linux_zones() {
        let map = embedded("sun-x4600-numa8");
        let zones = zones(&map);
        assert_eq!(zones.len(), 10);
        let checks = against_linux(&map.linux, &zones);
        assert_eq!(checks.len(), 11);
        for c in checks {
            assert_eq!(c.here, c.linux, "{}", c.what);
        }
    }

    #[test]
    fn the_micro_vm_has_linux_zones() {
        let map = embedded("firecracker-24g");
        let zones = zones(&map);
        let checks = against_linux(&map.linux, &zones);
        assert_eq!(
            checks,
            [LinuxCheck {
                what: "DMA less its holes".into(),
                linux: 3998,
                here: 3998
            }]
        );
        assert_eq!(
            zones.iter().map(|z| z.present).collect::<Vec<_>>(),
            [3998, 782_336, 5_505_024]
        );
    }

    #[test]
    fn partial_pages_do_not_count() {
        let text = "BIOS-e820: [mem 0x1800-0x37ff] usable\nBIOS-e820: [mem 0xfffff000-0x100000fff] usable\n";
        let map = map::read(Source::text("m", text)).unwrap();
        let z = zones(&map);
        assert_eq!(
            z.iter()
                .map(|z| (z.zone, z.present, z.first, z.end))
                .collect::<Vec<_>>(),
            [
                ("DMA", 1, 2, 3),
                ("DMA32", 1, 0xfffff, 0x10_0000),
                ("Normal", 1, 0x10_0000, 0x10_0001)
            ]
        );
    }
}
