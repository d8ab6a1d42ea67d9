//! Real memory maps as boot maps, and what the tests have in common.
#![allow(dead_code)]

pub mod allocation;
pub mod emptying;
pub mod hands;
pub mod layout;
pub mod machine;
pub mod op;
pub mod placement;
pub mod played;
pub mod twin;
pub mod users;
pub mod window;
pub mod world;

use kmem_buddy::{BootMap, RegionKind};
use kmem_hal::{Frame, Migrate, MigrateError, NodeId, OwnedFrame, PhysAddr};

pub const SUN: &str = include_str!("../data/sun-x4600-numa8.txt");
pub const FIRECRACKER: &str = include_str!("../data/firecracker-24g.txt");
pub const QEMU: &str = include_str!("../data/qemu-q35-64m.txt");
pub const ASUS: &str = include_str!("../data/asus-p5p43-16g.txt");
pub const DELL: &str = include_str!("../data/dell-t3600-efi.txt");

fn span(line: &str) -> (u64, u64) {
    let inside = line.split("[mem ").nth(1).unwrap();
    let (range, _) = inside.split_once(']').unwrap();
    let (first, last) = range.split_once('-').unwrap();
    let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
    (number(first), number(last) - number(first) + 1)
}

/// The boot map that a file of `BIOS-e820:` and `SRAT:` lines describes.
pub fn parse(text: &str) -> BootMap {
    let mut map = BootMap::new();
    for line in text.lines() {
        if line.starts_with("BIOS-e820:") {
            let (base, length) = span(line);
            let kind = match line.split("] ").nth(1).unwrap().trim() {
                "usable" => RegionKind::Usable,
                "reserved" => RegionKind::Reserved,
                "ACPI data" => RegionKind::AcpiData,
                "ACPI NVS" => RegionKind::AcpiNvs,
                "unusable" => RegionKind::Unusable,
                other => RegionKind::Other(other.trim_start_matches("type ").parse().unwrap()),
            };
            map.push(PhysAddr::new(base), length, kind).unwrap();
        } else if let Some(rest) = line.strip_prefix("SRAT: Node ") {
            let node: u16 = rest.split(' ').next().unwrap().parse().unwrap();
            let (base, length) = span(line);
            map.assign_node(PhysAddr::new(base), length, NodeId::new(node))
                .unwrap();
        }
    }
    map
}

/// Nobody moves anything.
pub struct NoOwner;

impl Migrate for NoOwner {
    fn migrate(&self, _: Frame, to: OwnedFrame) -> Result<OwnedFrame, (MigrateError, OwnedFrame)> {
        Err((MigrateError::NotMovable, to))
    }
}
