//! Limine: entries of base, length and type, page-aligned where usable, sorted.
//!
//! | not excluded by the map | what to do |
//! |---|---|
//! | nothing of the kernel: image and modules are entries of type 6 | pushed as memory and reserved as the kernel's image |
//! | the responses, the boot stack, the page tables: entries of type 5 | boot-reclaimable: release them after the last response was read, on a stack and in tables of your own |
//! | memory below 4 KiB | nothing: [`BootMap`] leaves frame 0 alone |
//!
//! Usable and reclaimable entries do not overlap others; the others may overlap each other.
//!
//! Source: the Limine protocol, PROTOCOL.md, «Memory Map Feature».

use kmem_buddy::{BootMap, BootMapError, RegionKind, Reservation};
use kmem_hal::PhysAddr;

const USABLE: u64 = 0;
const ACPI_RECLAIMABLE: u64 = 2;
const ACPI_NVS: u64 = 3;
const BAD_MEMORY: u64 = 4;
const BOOTLOADER_RECLAIMABLE: u64 = 5;
const EXECUTABLE_AND_MODULES: u64 = 6;

/// Adds Limine's entries, each as (base, length, type).
///
/// Executable and modules are memory that is never freed; entries of no length are passed over.
///
/// # Errors
///
/// [`BootMapError`] for the first entry that cannot be.
///
/// # Examples
///
/// ```
/// use kmem::{BootMap, boot};
///
/// let mut map: BootMap = BootMap::new();
/// let entries = [
///     (0x1000, 0x9_e000, 0),          // usable
///     (0x10_0000, 0x100_0000, 0),
///     (0x110_0000, 0x20_0000, 5),     // Limine's tables, stack, responses
///     (0x130_0000, 0x40_0000, 6),     // kernel and modules
///     (0xfd00_0000, 0x30_0000, 7),    // frame buffer
/// ];
/// boot::limine(&mut map, entries)?;
/// assert_eq!(map.present_frames(), 0x9e + 0x1000 + 0x200 + 0x400);
/// assert_eq!(map.free_frames(), 0x9e + 0x1000);
/// # Ok::<(), kmem::BootMapError>(())
/// ```
pub fn limine<const N: usize>(
    map: &mut BootMap<N>,
    entries: impl IntoIterator<Item = (u64, u64, u64)>,
) -> Result<(), BootMapError> {
    for (base, length, kind) in entries {
        if length == 0 {
            continue;
        }
        let base = PhysAddr::new(base);
        let region = match kind {
            USABLE | EXECUTABLE_AND_MODULES => RegionKind::Usable,
            ACPI_RECLAIMABLE => RegionKind::AcpiData,
            ACPI_NVS => RegionKind::AcpiNvs,
            BAD_MEMORY => RegionKind::Unusable,
            BOOTLOADER_RECLAIMABLE => RegionKind::BootReclaimable,
            _ => RegionKind::Reserved,
        };
        map.push(base, length, region)?;
        if kind == EXECUTABLE_AND_MODULES {
            map.reserve(base, length, Reservation::KernelImage)?;
        }
    }
    Ok(())
}

/// [`limine`] of the `limine` crate's entries, as `MemoryMapResponse::entries` gives them.
///
/// # Errors
///
/// As there.
#[cfg(feature = "limine")]
pub fn limine_entries<const N: usize>(
    map: &mut BootMap<N>,
    entries: &[&::limine::memory_map::Entry],
) -> Result<(), BootMapError> {
    use ::limine::memory_map::EntryType;

    let number = |kind: EntryType| {
        // The crate hides the number; each constant has the protocol's.
        let known = [
            (EntryType::USABLE, USABLE),
            (EntryType::ACPI_RECLAIMABLE, ACPI_RECLAIMABLE),
            (EntryType::ACPI_NVS, ACPI_NVS),
            (EntryType::BAD_MEMORY, BAD_MEMORY),
            (EntryType::BOOTLOADER_RECLAIMABLE, BOOTLOADER_RECLAIMABLE),
            (EntryType::EXECUTABLE_AND_MODULES, EXECUTABLE_AND_MODULES),
        ];
        let found = known.into_iter().find(|(known, _)| *known == kind);
        found.map_or(u64::MAX, |(_, number)| number)
    };
    let entries = entries.iter();
    limine(
        map,
        entries.map(|entry| (entry.base, entry.length, number(entry.entry_type))),
    )
}
