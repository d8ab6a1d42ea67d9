//! E820 and PVH: what a PC's BIOS, Linux's zero page and Xen's start info hold.
//!
//! | not excluded by the table | reserve it as |
//! |---|---|
//! | the kernel's image, modules, command line | `KernelImage`, `Initrd`, `BootStructures` |
//! | PVH: the start info, the module list and the table itself | `BootStructures` |
//! | the real-mode IVT and BDA (frame 0) | nothing: [`BootMap`] leaves frame 0 alone |
//!
//! The BIOS's own range (640 KiB to 1 MiB) is reserved here, whatever the table says.

use kmem_buddy::{BootMap, BootMapError, RegionKind};
use kmem_hal::PhysAddr;

use super::bytes::number;
use super::error::TableError;

/// Where a PC's BIOS keeps ROMs and video memory, whatever its table says (Linux `trim_bios_range`).
const BIOS_START: u64 = 0xa_0000;
const BIOS_BYTES: u64 = 0x6_0000;

/// One entry of the E820 table as the BIOS and Linux's zero page have it: packed, 20 bytes.
///
/// Source: ACPI 6.5, 15.1; Linux Documentation/arch/x86/zero-page.rst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, packed)]
pub struct E820Entry {
    /// The first byte's physical address.
    pub base: u64,
    /// Bytes.
    pub length: u64,
    /// 1 usable, 2 reserved, 3 ACPI data, 4 ACPI NVS, 5 unusable, 7 persistent.
    pub kind: u32,
}

/// One entry of the memory map of the PVH boot protocol: 24 bytes.
///
/// Source: Xen public/arch-x86/hvm/start_info.h, `hvm_memmap_table_entry`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct PvhEntry {
    /// The first byte's physical address.
    pub base: u64,
    /// Bytes.
    pub length: u64,
    /// As in E820.
    pub kind: u32,
    /// Zero.
    pub reserved: u32,
}

fn push<const N: usize>(
    map: &mut BootMap<N>,
    entries: impl Iterator<Item = (u64, u64, u32)>,
) -> Result<(), BootMapError> {
    // Firmware leaves entries of no bytes, and they say nothing.
    for (base, length, kind) in entries.filter(|&(_, length, _)| length > 0) {
        map.push(PhysAddr::new(base), length, RegionKind::from_e820(kind))?;
    }
    map.push(PhysAddr::new(BIOS_START), BIOS_BYTES, RegionKind::Reserved)
}

/// Adds the entries of an E820 table, and keeps the BIOS range (640 KiB to 1 MiB) reserved. Entries of no bytes are passed over.
///
/// # Errors
///
/// [`BootMapError`] for the first entry that cannot be.
///
/// # Examples
///
/// ```
/// use kmem::{BootMap, boot::{E820Entry, e820}};
///
/// let table = [
///     E820Entry { base: 0x10_0000, length: 63 << 20, kind: 1 },
///     E820Entry { base: 0, length: 0x9_fc00, kind: 1 },
/// ];
/// let mut map: BootMap = BootMap::new();
/// e820(&mut map, &table)?;
/// assert_eq!(map.present_frames(), 63 * 256 + 0x9f - 1);
/// # Ok::<(), kmem::BootMapError>(())
/// ```
#[doc(alias = "e820__memory_setup")]
pub fn e820<const N: usize>(
    map: &mut BootMap<N>,
    entries: &[E820Entry],
) -> Result<(), BootMapError> {
    push(
        map,
        entries
            .iter()
            .map(|entry| (entry.base, entry.length, entry.kind)),
    )
}

/// Adds the entries of a PVH memory map, and keeps the BIOS range reserved. Entries of no bytes are passed over.
///
/// # Errors
///
/// [`BootMapError`] for the first entry that cannot be.
pub fn pvh<const N: usize>(map: &mut BootMap<N>, entries: &[PvhEntry]) -> Result<(), BootMapError> {
    push(
        map,
        entries
            .iter()
            .map(|entry| (entry.base, entry.length, entry.kind)),
    )
}

/// Adds the entries of a raw table of little-endian `base, length, type` records of `stride` bytes: 20 for E820, 24 for
/// PVH and for E820 with extended attributes. Records of no bytes are passed over.
///
/// # Errors
///
/// [`TableError`] for a table that ends inside an entry, or the first entry that cannot be.
pub fn raw<const N: usize>(
    map: &mut BootMap<N>,
    table: &[u8],
    stride: usize,
) -> Result<(), TableError> {
    if stride < 20 || !table.len().is_multiple_of(stride) {
        return Err(TableError::Truncated {
            bytes: table.len(),
            entry: stride,
        });
    }
    let entries = table.chunks_exact(stride).map(|entry| {
        (
            number(&entry[..8]),
            number(&entry[8..16]),
            number(&entry[16..20]) as u32,
        )
    });
    Ok(push(map, entries)?)
}
