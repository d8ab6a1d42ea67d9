//! `bootloader` 0.11, the one of `blog_os`: regions of start, end and kind.
//!
//! | not excluded by the map | what to do |
//! |---|---|
//! | nothing: kernel, ramdisk, page tables, stack and boot information are all of kind `Bootloader` | see below |
//!
//! The kind does not say which of these a region holds: the kernel's own `.bss` and stack are among them. So it goes in as memory
//! that is never freed, reserved as the kernel's image. What the kernel knows the place of, it may free later with
//! [`Buddy::release_range`](kmem_buddy::Buddy::release_range): the ramdisk once unpacked, the tables and the stack once it runs in its own.
//!
//! Source: `bootloader_api` 0.11, `MemoryRegionKind`; `bootloader` 0.11, `common/src/legacy_memory_region.rs`.

use bootloader_api::info::{MemoryRegion, MemoryRegionKind};
use kmem_buddy::{BootMap, BootMapError, RegionKind, Reservation};
use kmem_hal::PhysAddr;

/// Adds the regions of a boot information: `bootloader(&mut map, &info.memory_regions)`.
///
/// Regions of no length are passed over. Regions of kinds that firmware made up are reserved, ACPI's are what they are.
///
/// # Errors
///
/// [`BootMapError`] for the first region that cannot be.
pub fn bootloader<const N: usize>(
    map: &mut BootMap<N>,
    regions: &[MemoryRegion],
) -> Result<(), BootMapError> {
    for region in regions {
        let Some(length) = region.end.checked_sub(region.start).filter(|&l| l > 0) else {
            continue;
        };
        let base = PhysAddr::new(region.start);
        let kind = match region.kind {
            MemoryRegionKind::Usable | MemoryRegionKind::Bootloader => RegionKind::Usable,
            MemoryRegionKind::UnknownBios(number) => match RegionKind::from_e820(number) {
                // The boot loader has its reasons not to call it usable.
                RegionKind::Usable => RegionKind::Reserved,
                kind => kind,
            },
            MemoryRegionKind::UnknownUefi(8) => RegionKind::Unusable,
            MemoryRegionKind::UnknownUefi(9) => RegionKind::AcpiData,
            MemoryRegionKind::UnknownUefi(10) => RegionKind::AcpiNvs,
            MemoryRegionKind::UnknownUefi(14) => RegionKind::Persistent,
            _ => RegionKind::Reserved,
        };
        map.push(base, length, kind)?;
        if region.kind == MemoryRegionKind::Bootloader {
            map.reserve(base, length, Reservation::KernelImage)?;
        }
    }
    Ok(())
}
