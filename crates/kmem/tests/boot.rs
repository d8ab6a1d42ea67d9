//! Two real machines' memory maps in the form of every boot protocol: each adapter finds the memory that Linux found.

use bootloader_api::info::{MemoryRegion, MemoryRegionKind};
use kmem::boot::{self, E820Entry, PvhEntry, TableError};
use kmem::{BootMap, BootMapError, PhysAddr, RegionKind, Reservation};
use limine::memory_map::{Entry, EntryType};
use uefi_raw::table::boot::{MemoryAttribute, MemoryDescriptor, MemoryType};

const DELL: &str = include_str!("data/dell-t3600-efi.txt");
const ASUS: &str = include_str!("data/asus-p5p43-16g.txt");

/// A line of a boot log: base, length, E820 type.
type Line = (u64, u64, u32);

fn lines(text: &str) -> Vec<Line> {
    let lines = text
        .lines()
        .filter_map(|line| line.strip_prefix("BIOS-e820: [mem 0x"));
    lines
        .map(|line| {
            let (range, kind) = line.split_once("] ").unwrap();
            let (first, last) = range.split_once("-0x").unwrap();
            let number = |digits| u64::from_str_radix(digits, 16).unwrap();
            let kind = match kind {
                "usable" => 1,
                "reserved" => 2,
                "ACPI data" => 3,
                "ACPI NVS" => 4,
                other => other.strip_prefix("type ").unwrap().parse().unwrap(),
            };
            (number(first), number(last) - number(first) + 1, kind)
        })
        .collect()
}

/// What Linux's loop over the table makes of it.
fn plain(lines: &[Line]) -> BootMap {
    let mut map = BootMap::new();
    for &(base, length, kind) in lines {
        map.push(PhysAddr::new(base), length, RegionKind::from_e820(kind))
            .unwrap();
    }
    map
}

/// Frames of each kind that a kernel asks for.
fn frames(map: &BootMap) -> (u64, u64, u64) {
    let of = |wanted: RegionKind| {
        let regions = map.regions().filter(|region| region.kind == wanted);
        regions.map(|region| region.length / 4096).sum()
    };
    (
        map.present_frames(),
        of(RegionKind::AcpiData),
        of(RegionKind::AcpiNvs),
    )
}

fn same_memory(map: &BootMap, lines: &[Line]) {
    let plain = plain(lines);
    assert_eq!(frames(map), frames(&plain));
    assert!(map.present().eq(plain.present()), "other frames");
}

#[test]
fn e820_and_raw_tables() {
    for text in [DELL, ASUS] {
        let lines = lines(text);
        let table: Vec<_> = lines
            .iter()
            .rev()
            .map(|&(base, length, kind)| E820Entry { base, length, kind })
            .collect();
        let mut map = BootMap::new();
        boot::e820(&mut map, &table).unwrap();
        let mut bytes = Vec::new();
        for &(base, length, kind) in &lines {
            bytes.extend(base.to_le_bytes());
            bytes.extend(length.to_le_bytes());
            bytes.extend(kind.to_le_bytes());
            bytes.extend([0; 4]);
        }
        let mut raw: BootMap = BootMap::new();
        boot::raw(&mut raw, &bytes, 24).unwrap();
        assert!(map.regions().eq(raw.regions()));
        // The BIOS's range is reserved besides; no machine has memory there.
        same_memory(&map, &lines);
        assert_eq!(
            boot::raw(&mut raw, &bytes[1..], 24),
            Err(TableError::Truncated {
                bytes: bytes.len() - 1,
                entry: 24
            })
        );
    }
}

fn descriptor(kind: u32, base: u64, length: u64, attributes: u64) -> MemoryDescriptor {
    MemoryDescriptor {
        ty: MemoryType(kind),
        phys_start: base,
        virt_start: 0,
        page_count: length / 4096,
        att: MemoryAttribute::from_bits_retain(attributes),
    }
}

/// The map that the firmware had before it was translated to E820: usable memory cut into conventional, loader and boot-services
/// memory, and run-time services where the log has its type 20.
fn firmware(lines: &[Line]) -> Vec<MemoryDescriptor> {
    const WRITE_BACK: u64 = 0xf;
    let mut all = Vec::new();
    for (at, &(base, length, kind)) in lines.iter().enumerate() {
        match kind {
            1 if length > 1 << 24 => {
                let part = (length / 4) & !0xfff;
                for (index, kind) in [7, 4, 2].into_iter().enumerate() {
                    all.push(descriptor(
                        kind,
                        base + index as u64 * part,
                        part,
                        WRITE_BACK,
                    ));
                }
                all.push(descriptor(
                    3,
                    base + 3 * part,
                    length - 3 * part,
                    WRITE_BACK,
                ));
            }
            1 => all.push(descriptor(7, base, length, WRITE_BACK)),
            3 => all.push(descriptor(9, base, length, WRITE_BACK)),
            4 => all.push(descriptor(10, base, length, WRITE_BACK)),
            20 => all.push(descriptor(6, base, length, WRITE_BACK | 1 << 63)),
            _ => all.push(descriptor(
                if at % 2 == 0 { 0 } else { 11 },
                base,
                length,
                1,
            )),
        }
    }
    all
}

fn bytes_of(descriptors: &[MemoryDescriptor]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for entry in descriptors {
        bytes.extend(entry.ty.0.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(entry.phys_start.to_le_bytes());
        bytes.extend(entry.virt_start.to_le_bytes());
        bytes.extend(entry.page_count.to_le_bytes());
        bytes.extend(entry.att.bits().to_le_bytes());
        // Firmware's stride is larger than the structure.
        bytes.extend([0xee; 8]);
    }
    bytes
}

#[test]
fn uefi_descriptors_as_bytes_and_as_types() {
    let lines = lines(DELL);
    let descriptors = firmware(&lines);
    let mut map = BootMap::new();
    boot::uefi(&mut map, &bytes_of(&descriptors), 48).unwrap();
    same_memory(&map, &lines);
    let conventional: u64 = descriptors
        .iter()
        .filter(|entry| entry.ty.0 == 7)
        .map(|entry| entry.page_count)
        .sum();
    // Frame 0 is never counted.
    assert_eq!(map.free_frames(), conventional - 1);
    let mut typed: BootMap = BootMap::new();
    boot::uefi_descriptors(&mut typed, &descriptors).unwrap();
    assert!(map.regions().eq(typed.regions()));

    let only = |kind, attributes| {
        let mut map: BootMap = BootMap::new();
        boot::uefi_descriptors(&mut map, &[descriptor(kind, 0x10_0000, 0x1000, attributes)])
            .unwrap();
        map.regions().next().unwrap().kind
    };
    assert_eq!(only(7, 8), RegionKind::Usable);
    assert_eq!(only(7, 1), RegionKind::Reserved, "not write-back");
    assert_eq!(
        only(7, 8 | 1 << 63),
        RegionKind::Reserved,
        "firmware needs it"
    );
    assert_eq!(
        only(7, 8 | 1 << 18),
        RegionKind::Reserved,
        "specific purpose"
    );
    assert_eq!(only(7, 8 | 1 << 15), RegionKind::Persistent);
    assert_eq!(only(15, 8), RegionKind::Reserved, "not accepted");
    assert_eq!(
        only(0x8000_0001, 8),
        RegionKind::Reserved,
        "a vendor's type"
    );
    assert_eq!(only(8, 8), RegionKind::Unusable);
    let mut map: BootMap = BootMap::new();
    let bytes = bytes_of(&descriptors);
    let cut = TableError::Truncated {
        bytes: bytes.len(),
        entry: 40,
    };
    assert!(boot::uefi(&mut map, &bytes[..bytes.len() - 8], 39).is_err());
    assert!(bytes.len().is_multiple_of(40) || boot::uefi(&mut map, &bytes, 40) == Err(cut));
    let endless = [
        descriptor(7, 0x1000, 0, 8),
        descriptor(7, !0xfff, 1 << 40, 8),
    ];
    assert!(matches!(
        boot::uefi_descriptors(&mut map, &endless),
        Err(BootMapError::Wraps { index: 0, .. })
    ));
}

/// A boot information with the tags given as (type, payload).
fn information(tags: &[(u32, Vec<u8>)]) -> Vec<u8> {
    let mut info = vec![0; 8];
    for (kind, payload) in tags {
        info.extend(kind.to_le_bytes());
        info.extend((payload.len() as u32 + 8).to_le_bytes());
        info.extend(payload);
        info.resize(info.len().next_multiple_of(8), 0);
    }
    info.extend([0, 0, 0, 0, 8, 0, 0, 0]);
    let total = info.len() as u32;
    info[..4].copy_from_slice(&total.to_le_bytes());
    info
}

fn map_tag(lines: &[Line]) -> (u32, Vec<u8>) {
    let mut payload = vec![24, 0, 0, 0, 0, 0, 0, 0];
    for &(base, length, kind) in lines {
        payload.extend(base.to_le_bytes());
        payload.extend(length.to_le_bytes());
        payload.extend(kind.to_le_bytes());
        payload.extend([0; 4]);
    }
    (6, payload)
}

fn module_tag(start: u32, end: u32) -> (u32, Vec<u8>) {
    let mut payload = Vec::new();
    payload.extend(start.to_le_bytes());
    payload.extend(end.to_le_bytes());
    payload.extend(b"initrd\0");
    (3, payload)
}

#[test]
fn multiboot2_as_bytes_and_as_types() {
    let at = PhysAddr::new(0x20_0000);
    for text in [DELL, ASUS] {
        let mut lines = lines(text);
        let name = (2, b"GRUB 2.12\0".to_vec());
        let info = information(&[name, map_tag(&lines), module_tag(0x100_0000, 0x140_0800)]);
        let mut map: BootMap = BootMap::new();
        boot::multiboot2(&mut map, &info, at).unwrap();
        same_memory(&map, &lines);
        let reserved: Vec<_> = map.reservations().collect();
        assert!(reserved.contains(&(at, info.len() as u64, Reservation::BootStructures)));
        let initrd = (PhysAddr::new(0x100_0000), 0x40_0800, Reservation::Initrd);
        assert!(reserved.contains(&initrd), "{reserved:?}");
        // The ramdisk's last page is shared with nobody.
        assert_eq!(map.free_frames(), map.present_frames() - 0x401 - 1);

        // The crate wants its bytes aligned to 8.
        let mut words = vec![0u64; info.len().div_ceil(8)];
        for (word, bytes) in words.iter_mut().zip(info.chunks(8)) {
            *word = bytes
                .iter()
                .rev()
                .fold(0, |sum, &byte| sum << 8 | u64::from(byte));
        }
        // SAFETY: the bytes of a whole boot information, which live to the end of the block.
        let typed = unsafe { multiboot2::BootInformation::load(words.as_ptr().cast()) }.unwrap();
        let mut other: BootMap = BootMap::new();
        boot::multiboot2_info(&mut other, &typed, at).unwrap();
        assert!(map.regions().eq(other.regions()));
        assert!(map.reservations().eq(other.reservations()));

        // Entries without length are no memory and no error.
        lines.push((0x1234_0000, 0, 1));
        let mut again: BootMap = BootMap::new();
        boot::multiboot2(&mut again, &information(&[map_tag(&lines)]), at).unwrap();
        assert!(map.regions().eq(again.regions()));
    }
    // With firmware's map alone.
    let lines = lines(DELL);
    let mut payload = vec![48, 0, 0, 0, 1, 0, 0, 0];
    payload.extend(bytes_of(&firmware(&lines)));
    let mut map: BootMap = BootMap::new();
    boot::multiboot2(&mut map, &information(&[(17, payload)]), at).unwrap();
    same_memory(&map, &lines);
}

#[test]
fn broken_boot_informations_are_refused() {
    let at = PhysAddr::new(0x20_0000);
    let lines = lines(ASUS);
    let good = information(&[map_tag(&lines), module_tag(0x100_0000, 0x140_0000)]);
    let read = |bytes: &[u8]| boot::multiboot2(&mut BootMap::<256>::new(), bytes, at);
    assert_eq!(read(&good), Ok(()));
    assert_eq!(read(&information(&[])), Err(TableError::NoMap));
    for cut in 0..good.len() {
        assert!(read(&good[..cut]).is_err(), "{cut} bytes of {}", good.len());
    }
    // Any byte may be anything: an answer or an error, never a panic, never an endless loop.
    for place in 0..good.len() {
        for value in [0, 1, 7, 8, 0x7f, 0xff] {
            let mut bytes = good.clone();
            bytes[place] = value;
            let _ = read(&bytes);
        }
    }
    let mut tag = good.clone();
    tag[12..16].copy_from_slice(&7u32.to_le_bytes());
    assert_eq!(read(&tag), Err(TableError::Tag { at: 8, size: 7 }));
}

#[test]
fn limine_entries() {
    let lines = lines(DELL);
    let mut entries = Vec::new();
    for &(base, length, kind) in &lines {
        let kind = match kind {
            // The kernel and Limine's own memory are cut out of the largest range.
            1 if length > 1 << 33 => {
                entries.push((base, 0x40_0000, EntryType::EXECUTABLE_AND_MODULES, 6));
                entries.push((
                    base + 0x40_0000,
                    0x10_0000,
                    EntryType::BOOTLOADER_RECLAIMABLE,
                    5,
                ));
                entries.push((base + 0x50_0000, length - 0x50_0000, EntryType::USABLE, 0));
                continue;
            }
            1 => (EntryType::USABLE, 0),
            3 => (EntryType::ACPI_RECLAIMABLE, 2),
            4 => (EntryType::ACPI_NVS, 3),
            _ => (EntryType::RESERVED, 1),
        };
        entries.push((base, length, kind.0, kind.1));
    }
    entries.push((0xfd00_0000, 0x30_0000, EntryType::FRAMEBUFFER, 7));
    let mut map: BootMap = BootMap::new();
    let numbers = entries.iter().map(|entry| (entry.0, entry.1, entry.3));
    boot::limine(&mut map, numbers).unwrap();
    same_memory(&map, &lines);
    assert_eq!(map.free_frames(), map.present_frames() - 0x500);

    let typed: Vec<Entry> = entries
        .iter()
        .map(|&(base, length, entry_type, _)| Entry {
            base,
            length,
            entry_type,
        })
        .collect();
    let pointers: Vec<&Entry> = typed.iter().collect();
    let mut other: BootMap = BootMap::new();
    boot::limine_entries(&mut other, &pointers).unwrap();
    assert!(map.regions().eq(other.regions()));
    assert!(map.reservations().eq(other.reservations()));
}

#[test]
fn regions_of_bootloader() {
    let region = |start, end, kind| MemoryRegion { start, end, kind };
    for (text, uefi) in [(DELL, true), (ASUS, false)] {
        let lines = lines(text);
        let mut regions = Vec::new();
        for &(base, length, kind) in &lines {
            let end = base + length;
            match kind {
                1 if length > 1 << 32 => {
                    // Kernel, tables, stack and boot information lie at the start.
                    let own = base + 0x80_0000;
                    regions.push(region(base, own, MemoryRegionKind::Bootloader));
                    regions.push(region(own, end, MemoryRegionKind::Usable));
                }
                1 => regions.push(region(base, end, MemoryRegionKind::Usable)),
                3 if uefi => regions.push(region(base, end, MemoryRegionKind::UnknownUefi(9))),
                4 if uefi => regions.push(region(base, end, MemoryRegionKind::UnknownUefi(10))),
                _ if uefi => regions.push(region(base, end, MemoryRegionKind::UnknownUefi(6))),
                kind => regions.push(region(base, end, MemoryRegionKind::UnknownBios(kind))),
            }
        }
        regions.push(MemoryRegion::empty());
        let mut map: BootMap = BootMap::new();
        boot::bootloader(&mut map, &regions).unwrap();
        same_memory(&map, &lines);
        assert_eq!(map.free_frames(), map.present_frames() - 0x800);
        // What the loader withholds from «usable» memory of the BIOS stays withheld.
        let mut odd: BootMap = BootMap::new();
        let withheld = [region(0x1000, 0x2000, MemoryRegionKind::UnknownBios(1))];
        boot::bootloader(&mut odd, &withheld).unwrap();
        assert_eq!(odd.present_frames(), 0);
    }
}

#[test]
fn an_entry_of_no_bytes_is_passed_over() {
    let table = [
        (0u64, 0x9_fc00u64, 1u32),
        (0x9_fc00, 0, 2),
        (0x10_0000, 63 << 20, 1),
        (0, 0, 0),
    ];
    let mut bytes = Vec::new();
    for (base, length, kind) in table {
        bytes.extend(base.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(kind.to_le_bytes());
    }
    let e820_entries = table.map(|(base, length, kind)| E820Entry { base, length, kind });
    let pvh_entries = table.map(|(base, length, kind)| PvhEntry {
        base,
        length,
        kind,
        reserved: 0,
    });
    let [mut first, mut second, mut third]: [BootMap; 3] = [const { BootMap::new() }; 3];
    boot::e820(&mut first, &e820_entries).unwrap();
    boot::pvh(&mut second, &pvh_entries).unwrap();
    boot::raw(&mut third, &bytes, 20).unwrap();
    for map in [first, second, third] {
        assert_eq!(map.present_frames(), 63 * 256 + 0x9f - 1);
    }
}
