//! Figures of the stack, each held against a count from somewhere else.
//!
//! | figure | where from | recount | where from |
//! |---|---|---|---|
//! | present pages of a zone | buddy | pages of the map in the zone's addresses | [`recount`](super::recount) |
//! | MemTotal | buddy's zones | present pages less those that a reservation touches | boot map |
//! | MemFree | zones' counters | set bits of the zones' bitmaps | buddy's own recount |
//! | buddyinfo | the printed text | MemFree | zones' counters |
//! | pages given | total - free - cached | pages in the books | [`Counted`](crate::world::counted::Counted) |
//! | owners of given pages | the books | tags in the frame table, by owner | hal's frame table |
//! | slab pages, table pages, user pages | the owner's counter | tags in the frame table | hal's frame table |
//! | objects in use | a cache's count of what is where | allocations less frees | slab |

use super::recount::{ZoneCount, against_linux};
use crate::input::map::MemoryMap;
use crate::output::Checks;
use crate::world::World;
use crate::world::types::Frames;
use kmem_buddy::BootMap;
use kmem_hal::{Frame, FrameTag};

/// KiB a page.
const KIB: u64 = 4;

/// Holds the zones against the map, and against what Linux made of the same map.
pub fn zones(checks: &mut Checks, map: &MemoryMap, frames: &Frames, recount: &[ZoneCount]) {
    let zones: Vec<ZoneCount> = frames
        .zones()
        .map(|z| ZoneCount {
            node: z.node.get().into(),
            zone: z.kind.name(),
            present: z.present,
            first: z.start,
            end: z.start + z.spanned,
        })
        .collect();
    let with_pages = zones.iter().filter(|z| z.present > 0).count() as u64;
    checks.equal(
        "zones with memory",
        with_pages,
        recount.len() as u64,
        "",
        "the map, cut at 16 MiB, 4 GiB and nodes",
    );
    for want in recount {
        let have = zones
            .iter()
            .filter(|z| (z.node, z.zone) == (want.node, want.zone))
            .map(|z| z.present)
            .sum();
        checks.equal(
            &format!("node {} {} present", want.node, want.zone),
            have,
            want.present,
            "pages",
            "the map",
        );
    }
    for c in against_linux(&map.linux, &zones) {
        checks.equal(&c.what, c.here, c.linux, "pages", "Linux on this machine");
    }
}

/// Holds MemTotal, MemFree and buddyinfo against recounts.
pub fn memory(checks: &mut Checks, frames: &Frames, boot_map: &BootMap) {
    let info = frames.mem_info();
    let unreserved = boot_map.present_frames() - reserved(boot_map);
    checks.equal(
        "MemTotal",
        info.total * KIB,
        unreserved * KIB,
        "kB",
        "the boot map less reservations",
    );
    let recount = frames.recount();
    checks.equal(
        "MemFree",
        info.free * KIB,
        recount.free * KIB,
        "kB",
        "bits set in the zones' bitmaps",
    );
    checks.equal(
        "free in CPUs' arrays",
        info.cached * KIB,
        recount.cached * KIB,
        "kB",
        "entries of the arrays",
    );
    let text = frames.buddy_info().to_string();
    let blocks = frames.zones().map(|z| z.free).sum();
    checks.equal(
        "buddyinfo, summed as printed",
        buddyinfo_pages(&text),
        blocks,
        "pages",
        "the zones' free counters",
    );
    let odd = frames
        .check()
        .map_err(|(node, zone, what)| format!("node {node} {zone}: {what}"));
    checks.holds(
        "derived words of the bitmaps",
        odd.is_ok(),
        "as the bits say",
        odd.err().as_deref().unwrap_or("as the bits say"),
    );
}

/// Holds what is allocated against the books, and each owner's own count against the tags of its frames.
pub fn owners(checks: &mut Checks, world: &World, processes: &Processes) {
    let info = world.frames().mem_info();
    let (given, wrong) = world.source().ledger(|l| (l.frames, l.wrong));
    let cached: u64 = world.frames().zones().map(|z| z.cached).sum();
    let free: u64 = world.frames().zones().map(|z| z.free).sum();
    checks.equal(
        "pages allocated",
        info.total - free - cached,
        given,
        "pages",
        "the books of all callers",
    );
    checks.equal("wrong entries in the books", wrong, 0, "", "none may be");
    let tags = Tags::of(world);
    checks.equal(
        "their owners, by frame table",
        tags.sum(),
        given,
        "pages",
        "the books of all callers",
    );
    let totals = world.slabs().totals();
    let slab = totals.slab_frames + totals.page_frames + totals.overhead_frames;
    let records = world.areas().overhead_frames();
    checks.equal(
        "Slab and vmalloc's records",
        (slab + records) * KIB,
        tags.slab * KIB,
        "kB",
        "tags of frames",
    );
    let cached_tables = world.cached_tables();
    let tables = world.kernel().table_count() as u64 + processes.tables + cached_tables;
    checks.equal(
        "PageTables",
        tables * KIB,
        tags.tables * KIB,
        "kB",
        "tags of frames",
    );
    checks.equal(
        "AnonPages",
        processes.anon * KIB,
        tags.anon * KIB,
        "kB",
        "tags of frames",
    );
    for cache in caches(world) {
        checks.equal(
            &format!("{} in use", cache.name),
            cache.active_objects,
            cache.allocs - cache.frees,
            "objects",
            "allocations less frees",
        );
    }
}

/// What processes that live say of themselves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Processes {
    /// Frames of their page tables.
    pub tables: u64,
    /// Pages that are theirs alone or shared by fork, each frame once.
    pub anon: u64,
}

/// Allocated frames by the tag of their owner.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tags {
    /// Object caches: slabs, whole pages, the allocator's own objects; and what vmalloc keeps of its areas.
    pub slab: u64,
    /// Page tables.
    pub tables: u64,
    /// Anonymous pages.
    pub anon: u64,
    /// Pages of files and shared memory, and the zero page.
    pub file: u64,
    /// Memory of the kernel's areas.
    pub vmalloc: u64,
    /// Allocated, and the frame table says free or nothing.
    pub unknown: u64,
}

impl Tags {
    /// Looks up every frame that is out.
    pub fn of(world: &World) -> Self {
        let mut tags = Self::default();
        world.source().ledger(|books| {
            for (first, order) in &books.blocks {
                let pages = 1u64 << order;
                let place = match world
                    .table()
                    .slot(Frame::from_number(*first))
                    .map(|s| s.tag())
                {
                    Some(FrameTag::Slab | FrameTag::Large | FrameTag::Kernel) => &mut tags.slab,
                    Some(FrameTag::Table) => &mut tags.tables,
                    Some(FrameTag::Anon) => &mut tags.anon,
                    Some(FrameTag::File) => &mut tags.file,
                    Some(FrameTag::Vmalloc) => &mut tags.vmalloc,
                    _ => &mut tags.unknown,
                };
                *place += pages;
            }
        });
        tags
    }

    /// Returns the frames that are out and belong to no object cache.
    pub fn without_slab(&self) -> u64 {
        self.tables + self.anon + self.file + self.vmalloc + self.unknown
    }

    /// Returns the frames whose owner is known.
    pub fn sum(&self) -> u64 {
        self.slab + self.tables + self.anon + self.file + self.vmalloc
    }
}

/// Frames of memory that some reservation touches, each once.
pub fn reserved(boot_map: &BootMap) -> u64 {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    boot_map.for_each_reserved(|range, _| {
        let first = range.first().number();
        runs.push((first, first + range.count()));
    });
    runs.sort_unstable();
    let (mut sum, mut behind) = (0, 0);
    for (first, end) in runs {
        sum += end.saturating_sub(first.max(behind));
        behind = behind.max(end);
    }
    sum
}

/// Sums `/proc/buddyinfo` as a reader of the text would: column n holds blocks of 2^n pages.
pub fn buddyinfo_pages(text: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once("zone"))
        .flat_map(|(_, rest)| rest.split_whitespace().skip(1).enumerate())
        .filter_map(|(order, count)| Some(count.parse::<u64>().ok()? << order))
        .sum()
}

/// The figures of all caches that were ever used.
pub fn caches(world: &World) -> Vec<kmem_slab::CacheInfo> {
    let mut out = Vec::new();
    // Nothing runs beside this, so the registry cannot be busy.
    let _ = world.slabs().caches(|c| {
        if c.allocs > 0 {
            out.push(*c);
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buddyinfo_is_summed_as_it_is_printed() {
        let text = "Node 0, zone      DMA      1      2      0      1 \nNode 0, zone   Normal      0      0      0      0      1 \n";
        assert_eq!(buddyinfo_pages(text), 1 + 4 + 8 + 16);
        assert_eq!(buddyinfo_pages(""), 0);
    }
}
