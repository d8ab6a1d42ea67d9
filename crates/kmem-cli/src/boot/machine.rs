//! Puts the mock machine together that a memory map describes, and hands the same map to the allocator.
//!
//! ```text
//!   MemoryMap ──> cut at every edge, the stronger kind wins ──> the machine's own list (what memory there is)
//!        └──────> as it was read, unsorted and overlapping ───> BootMap (what firmware says)
//! ```
//! The two ways are deliberately different: the machine gets what the recount gives, the boot map has to find the same by
//! its own rules, and a byte of difference is an access to memory that the machine does not have.
//!
//! Invariants: I1: the machine has memory exactly where [`MemoryMap::usable`] says. I2: ranges above the last usable byte are
//! left out of the machine, so that firmware's reserved terabytes cost no address space.

use crate::input::InputError;
use crate::input::map::{Entry, Kind, MemoryMap};
use kmem_buddy::{BootMap, RegionKind};
use kmem_hal::{NodeId, PhysAddr};
use kmem_mock_x86::{Machine, MemoryKind, MemoryRange, OnViolation};

/// Builds the machine.
///
/// # Errors
/// A map that the host has no address space for.
pub fn build(map: &MemoryMap, cpus: usize) -> Result<Machine, InputError> {
    let mut ranges: Vec<MemoryRange> = Vec::new();
    for (start, end) in map.usable() {
        cut_by_node(map, start, end, &mut |start, end, node| {
            // The machine numbers its nodes with 8 bits; it only reports them.
            let node = u8::try_from(node).unwrap_or(u8::MAX);
            ranges.push(MemoryRange {
                start,
                end,
                kind: MemoryKind::Ram,
                node,
            });
        });
    }
    let last = ranges.last().map_or(0, |r| r.end);
    let refuse = |what: String| map.error("usable", &format!("{last:#x}"), what);
    let list = kmem_mock_x86::MemoryMap::new(&ranges).map_err(|e| refuse(e.to_string()))?;
    Machine::builder()
        .memory(list)
        .cpus(cpus)
        .on_violation(OnViolation::Record)
        .build()
        .map_err(|e| {
            refuse(format!(
                "the host has no address space for a machine of this size: {e}"
            ))
        })
}

/// Fills a boot map, as a kernel does from what its boot protocol hands it.
///
/// # Errors
/// The line of the map that the boot map refuses.
pub fn boot_map(map: &MemoryMap) -> Result<Box<BootMap>, InputError> {
    let mut out: Box<BootMap> = Box::new(BootMap::new());
    let refuse = |line: usize, what: String| {
        InputError::new(&map.name, line, "boot map", format!("line {line}"), what)
    };
    for e in &map.entries {
        out.push(PhysAddr::new(e.base), e.len, region(e))
            .map_err(|why| refuse(e.line, why.to_string()))?;
    }
    for n in &map.nodes {
        let node = NodeId::new(u16::try_from(n.node).unwrap_or(u16::MAX));
        out.assign_node(PhysAddr::new(n.base), n.len, node)
            .map_err(|why| refuse(n.line, why.to_string()))?;
    }
    Ok(out)
}

fn region(e: &Entry) -> RegionKind {
    match e.kind {
        Kind::Usable => RegionKind::Usable,
        Kind::AcpiData => RegionKind::AcpiData,
        Kind::Persistent => RegionKind::Persistent,
        Kind::SoftReserved | Kind::Reserved => RegionKind::Reserved,
        Kind::AcpiNvs => RegionKind::AcpiNvs,
        Kind::Unusable => RegionKind::Unusable,
        Kind::Other(n) => RegionKind::Other(n),
    }
}

/// Cuts a usable range where its node changes.
fn cut_by_node(map: &MemoryMap, start: u64, end: u64, each: &mut dyn FnMut(u64, u64, u32)) {
    let mut at = start;
    while at < end {
        let (node, until) = super::recount::node_of(map, at);
        let stop = until.min(end);
        each(at, stop, node);
        at = stop;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::embedded::MAPS;
    use crate::input::{lines::Source, map};

    #[test]
    fn the_boot_map_finds_what_the_recount_finds() {
        for m in MAPS {
            let map = map::read(m.open().unwrap()).unwrap();
            let boot = boot_map(&map).unwrap();
            let recount: u64 = super::super::recount::zones(&map)
                .iter()
                .map(|z| z.present)
                .sum();
            assert_eq!(boot.present_frames(), recount, "{}", m.name);
            let machine = build(&map, 1).unwrap();
            assert_eq!(
                machine.memory().map().ram_bytes(),
                map.usable_bytes(),
                "{}",
                m.name
            );
        }
    }

    #[test]
    fn odd_maps_agree_too() {
        for text in [
            "BIOS-e820: [mem 0x0-0x3ffffff] usable\nBIOS-e820: [mem 0x200000-0x2fffff] reserved\nBIOS-e820: [mem 0x2800000-0x4ffffff] usable\n",
            "BIOS-e820: [mem 0x4000000-0x5ffffff] usable\nBIOS-e820: [mem 0x0-0x1ffffff] usable\nBIOS-e820: [mem 0xfffff00000000-0xfffffffffffff] reserved\n",
            "BIOS-e820: [mem 0x0-0x3ffffff] usable\nSRAT: Node 1 PXM 1 [mem 0x1000000-0x1ffffff]\n",
            "BIOS-e820: [mem 0x0-0x3ffffff] usable\nBIOS-e820: [mem 0x100800-0x1017ff] ACPI data\nBIOS-e820: [mem 0x100000-0x2fffff] type 12\n",
        ] {
            let map = map::read(Source::text("m", text)).unwrap();
            let boot = boot_map(&map).unwrap();
            let recount = super::super::recount::zones(&map);
            for z in &recount {
                let found: u64 = boot
                    .present_by_node()
                    .filter(|(n, _)| u32::from(n.get()) == z.node)
                    .map(|(_, r)| {
                        let (first, end) = (r.first().number(), r.first().number() + r.count());
                        end.min(z.end).saturating_sub(first.max(z.first))
                    })
                    .sum();
                assert_eq!(found, z.present, "{text}{z:?}");
            }
            assert!(build(&map, 2).is_ok());
        }
    }
}
