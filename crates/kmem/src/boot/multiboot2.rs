//! Multiboot2: the boot information that GRUB leaves, a list of tags.
//!
//! ```text
//!   | total size | 0 | tag: type, size, ... pad to 8 | tag | ... | end: 0, 8 |
//!                      6: memory map   17: UEFI memory map   3: module
//! ```
//!
//! | not excluded by the map | what to do |
//! |---|---|
//! | the kernel's image | reserve it, from the linker's symbols |
//! | modules, and the boot information itself | reserved here, as initial ramdisk and boot structures |
//! | GRUB's own memory and stack | nothing is left to keep: the protocol gives the kernel no stack and no tables |
//! | UEFI with boot services still running (tag 18) | exit them, and use the map that this answers instead |
//!
//! Source: the Multiboot2 specification 2.0, 3.6 (boot information).

use kmem_buddy::{BootMap, RegionKind, Reservation};
use kmem_hal::PhysAddr;

use super::bytes::{long, word};
use super::error::TableError;
use super::uefi::uefi;

const MODULE: u32 = 3;
const MEMORY_MAP: u32 = 6;
const UEFI_MAP: u32 = 17;
const END: u32 = 0;

/// The types are those of E820 up to 5; what a loader makes up is not free.
fn region(number: u32) -> RegionKind {
    match number {
        1..=5 => RegionKind::from_e820(number),
        other => RegionKind::Other(other),
    }
}

/// The tags of a boot information: (offset, type, whole tag).
fn tags(info: &[u8]) -> impl Iterator<Item = Result<(u32, &[u8]), TableError>> {
    let mut at = 8;
    let mut ended = false;
    core::iter::from_fn(move || {
        if ended || at >= info.len() {
            return None;
        }
        let header = word(info, at).zip(word(info, at + 4));
        let (kind, size) = header.unwrap_or((END, 0));
        let end = at.checked_add(size as usize);
        let tag = end.and_then(|end| info.get(at..end));
        let Some(tag) = tag.filter(|tag| tag.len() >= 8) else {
            ended = true;
            return Some(Err(TableError::Tag { at, size }));
        };
        ended = kind == END;
        at += tag.len().next_multiple_of(8);
        (!ended).then_some(Ok((kind, tag)))
    })
}

/// Adds the memory map of a boot information, and reserves its modules and the information itself, which lies at `address`.
///
/// Where firmware's UEFI map is there and the plain one is not, it is used. Entries of no length are passed over.
///
/// # Errors
///
/// [`TableError`] for tags that cannot be, a table without a map, or the first entry that cannot be.
///
/// # Examples
///
/// ```
/// use kmem::{BootMap, PhysAddr, boot};
///
/// let mut info = vec![0u8; 8];
/// let mut put = |words: &[u32]| info.extend(words.iter().flat_map(|word| word.to_le_bytes()));
/// put(&[6, 40, 24, 0, 0x10_0000, 0, 63 << 20, 0, 1, 0]); // one entry: 63 MiB at 1 MiB
/// put(&[3, 20, 0x20_0000, 0x20_3000, 0, 0]);             // a module of 12 KiB
/// put(&[0, 8]);
/// let total = info.len() as u32;
/// info[0..4].copy_from_slice(&total.to_le_bytes());
///
/// let mut map: BootMap = BootMap::new();
/// boot::multiboot2(&mut map, &info, PhysAddr::new(0x9000))?;
/// assert_eq!(map.present_frames(), 63 * 256);
/// assert_eq!(map.free_frames(), 63 * 256 - 3);
/// # Ok::<(), boot::TableError>(())
/// ```
pub fn multiboot2<const N: usize>(
    map: &mut BootMap<N>,
    info: &[u8],
    address: PhysAddr,
) -> Result<(), TableError> {
    let total = word(info, 0).unwrap_or(0) as usize;
    let info = info
        .get(..total)
        .filter(|info| info.len() >= 16)
        .ok_or(TableError::Truncated {
            bytes: info.len(),
            entry: total,
        })?;
    let mut plain = false;
    let mut firmware = None;
    for tag in tags(info) {
        let (kind, tag) = tag?;
        match kind {
            MEMORY_MAP => {
                plain = true;
                memory_map(map, tag)?;
            }
            UEFI_MAP => firmware = Some(tag),
            MODULE => {
                let ends = word(tag, 8).zip(word(tag, 12));
                if let Some((start, end)) = ends.filter(|(start, end)| start < end) {
                    let start = u64::from(start);
                    let bytes = u64::from(end) - start;
                    map.reserve(PhysAddr::new(start), bytes, Reservation::Initrd)?;
                }
            }
            _ => {}
        }
    }
    match firmware {
        _ if plain => {}
        Some(tag) => {
            let stride = word(tag, 8).unwrap_or(0) as usize;
            uefi(map, tag.get(16..).unwrap_or(&[]), stride)?;
        }
        None => return Err(TableError::NoMap),
    }
    map.reserve(address, info.len() as u64, Reservation::BootStructures)?;
    Ok(())
}

fn memory_map<const N: usize>(map: &mut BootMap<N>, tag: &[u8]) -> Result<(), TableError> {
    let stride = word(tag, 8).unwrap_or(0) as usize;
    let entries = tag.get(16..).unwrap_or(&[]);
    let truncated = TableError::Truncated {
        bytes: entries.len(),
        entry: stride,
    };
    if stride < 20 || !entries.len().is_multiple_of(stride) {
        return Err(truncated);
    }
    for entry in entries.chunks_exact(stride) {
        let fields = (long(entry, 0), long(entry, 8), word(entry, 16));
        let (Some(base), Some(length), Some(number)) = fields else {
            return Err(truncated);
        };
        if length > 0 {
            map.push(PhysAddr::new(base), length, region(number))?;
        }
    }
    Ok(())
}

/// [`multiboot2`] of the `multiboot2` crate's boot information, which lies at physical `address`.
///
/// # Errors
///
/// As there.
#[cfg(feature = "multiboot2")]
pub fn multiboot2_info<const N: usize>(
    map: &mut BootMap<N>,
    info: &::multiboot2::BootInformation<'_>,
    address: PhysAddr,
) -> Result<(), TableError> {
    let areas = info.memory_map_tag().ok_or(TableError::NoMap)?;
    for area in areas.memory_areas() {
        if area.size() > 0 {
            let base = PhysAddr::new(area.start_address());
            map.push(base, area.size(), region(u32::from(area.typ())))?;
        }
    }
    for module in info.module_tags() {
        let (start, end) = (module.start_address(), module.end_address());
        if start < end {
            let bytes = u64::from(end - start);
            let start = PhysAddr::new(u64::from(start));
            map.reserve(start, bytes, Reservation::Initrd)?;
        }
    }
    let bytes = info.total_size() as u64;
    map.reserve(address, bytes, Reservation::BootStructures)?;
    Ok(())
}
