//! UEFI: the descriptors of `GetMemoryMap`.
//!
//! | not excluded by the map | what to do |
//! |---|---|
//! | the kernel's image, modules, command line: they lie in loader memory | reserve them; loader memory goes in as boot-reclaimable |
//! | the stack and the page tables that the kernel runs on: boot-services data | reserve nothing, but release boot-reclaimable memory only on a stack and in tables of your own |
//! | the map itself, in loader memory | the same |
//! | ACPI tables that firmware put into boot-services memory (a known fault) | copy them before the release |
//!
//! The map is the one that `ExitBootServices` accepted. Memory that is not write-back, that firmware needs at run time, that has a
//! specific purpose or has not been accepted yet is reserved.
//!
//! Source: UEFI 2.10, 7.2 (`EFI_MEMORY_TYPE`, `EFI_MEMORY_DESCRIPTOR`, table 7.10); Linux `drivers/firmware/efi/` and
//! `arch/x86/platform/efi/efi.c` (`do_add_efi_memmap`).

use kmem_buddy::{BootMap, BootMapError, RegionKind};
use kmem_hal::{PAGE_SIZE, PhysAddr};

use super::bytes::{long, word};
use super::error::TableError;

/// Bytes of a descriptor that are read; firmware's stride may be larger.
const DESCRIPTOR: usize = 40;

const WRITE_BACK: u64 = 1 << 3;
const NON_VOLATILE: u64 = 1 << 15;
const SPECIFIC_PURPOSE: u64 = 1 << 18;
const RUNTIME: u64 = 1 << 63;

/// What a region of this type and these attributes is to the kernel.
fn kind(number: u32, attributes: u64) -> RegionKind {
    let memory = if attributes & (RUNTIME | SPECIFIC_PURPOSE) != 0 || attributes & WRITE_BACK == 0 {
        RegionKind::Reserved
    } else if attributes & NON_VOLATILE != 0 {
        RegionKind::Persistent
    } else if number == 7 {
        RegionKind::Usable
    } else {
        RegionKind::BootReclaimable
    };
    match number {
        // Loader code and data, boot-services code and data, conventional memory.
        1..=4 | 7 => memory,
        8 => RegionKind::Unusable,
        9 => RegionKind::AcpiData,
        10 => RegionKind::AcpiNvs,
        14 => RegionKind::Persistent,
        // Reserved, run-time services, device registers, PAL code, not yet accepted, and what firmware makes up.
        _ => RegionKind::Reserved,
    }
}

fn push<const N: usize>(
    map: &mut BootMap<N>,
    number: u32,
    start: u64,
    pages: u64,
    attributes: u64,
) -> Result<(), BootMapError> {
    if pages == 0 {
        return Ok(());
    }
    let bytes = pages.saturating_mul(PAGE_SIZE);
    map.push(PhysAddr::new(start), bytes, kind(number, attributes))
}

/// Adds the descriptors of a map that `GetMemoryMap` filled: `table` is its bytes, `stride` the descriptor size that it
/// answered (48 with many firmwares, not 40).
///
/// # Errors
///
/// [`TableError`] for a table that ends inside a descriptor, or the first one that cannot be.
///
/// # Examples
///
/// ```
/// use kmem::{BootMap, boot};
///
/// // Two descriptors: 16 MiB of conventional memory at 1 MiB, boot-services data behind it; write-back.
/// let mut table = [0u8; 96];
/// for (at, (kind, start, pages)) in [(7u32, 0x10_0000u64, 0x1000u64), (4, 0x110_0000, 0x100)].into_iter().enumerate() {
///     let entry = &mut table[at * 48..][..48];
///     entry[0..4].copy_from_slice(&kind.to_le_bytes());
///     entry[8..16].copy_from_slice(&start.to_le_bytes());
///     entry[24..32].copy_from_slice(&pages.to_le_bytes());
///     entry[32..40].copy_from_slice(&0xfu64.to_le_bytes());
/// }
/// let mut map: BootMap = BootMap::new();
/// boot::uefi(&mut map, &table, 48)?;
/// assert_eq!((map.free_frames(), map.present_frames()), (0x1000, 0x1100));
/// # Ok::<(), boot::TableError>(())
/// ```
#[doc(alias = "do_add_efi_memmap")]
pub fn uefi<const N: usize>(
    map: &mut BootMap<N>,
    table: &[u8],
    stride: usize,
) -> Result<(), TableError> {
    let truncated = TableError::Truncated {
        bytes: table.len(),
        entry: stride,
    };
    if stride < DESCRIPTOR || !table.len().is_multiple_of(stride) {
        return Err(truncated);
    }
    for entry in table.chunks_exact(stride) {
        let fields = (
            word(entry, 0),
            long(entry, 8),
            long(entry, 24),
            long(entry, 32),
        );
        let (Some(number), Some(start), Some(pages), Some(attributes)) = fields else {
            return Err(truncated);
        };
        push(map, number, start, pages, attributes)?;
    }
    Ok(())
}

/// [`uefi`] of the `uefi-raw` crate's descriptors, which the `uefi` crate's memory map gives as well.
///
/// # Errors
///
/// [`BootMapError`] for the first one that cannot be.
#[cfg(feature = "uefi")]
pub fn uefi_descriptors<'d, const N: usize>(
    map: &mut BootMap<N>,
    descriptors: impl IntoIterator<Item = &'d uefi_raw::table::boot::MemoryDescriptor>,
) -> Result<(), BootMapError> {
    for entry in descriptors {
        push(
            map,
            entry.ty.0,
            entry.phys_start,
            entry.page_count,
            entry.att.bits(),
        )?;
    }
    Ok(())
}
