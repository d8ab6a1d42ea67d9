//! The machine as the scenarios see it: the two address maps, what boot left behind.

use core::arch::asm;

/// Where `boot.s` maps the first 4 GiB of physical memory (top-table entry 256).
pub const DIRECT: u64 = 0xffff_8000_0000_0000;
/// Physical memory that is in the direct map from boot on, in bytes.
pub const DIRECT_BYTES: u64 = 4 << 30;
/// Linear minus physical address of the image (`kernel.ld`).
pub const IMAGE_BASE: u64 = 0xffff_ffff_8000_0000;

/// A pointer to physical memory through the direct map.
pub fn direct(physical: u64) -> *mut u8 {
    assert!(
        physical < DIRECT_BYTES,
        "{physical:#x} is beyond the direct map"
    );
    (DIRECT + physical) as *mut u8
}

/// The first physical byte after the image.
pub fn image_end() -> u64 {
    unsafe extern "C" {
        static __image_end: u8;
    }
    &raw const __image_end as u64 - IMAGE_BASE
}

/// Switches the identity map of `boot.s` (top-table entry 0) off or on again.
///
/// # Safety
/// To switch it off, nothing may run or point below the direct map any more.
pub unsafe fn identity_map(on: bool) {
    unsafe extern "C" {
        static boot_pml4: u8;
    }
    // SAFETY: entries 0 and 256 of the loaded top table reach the same tables; the caller's promise;
    // reloading CR3 flushes.
    unsafe {
        let top = direct(&raw const boot_pml4 as u64).cast::<u64>();
        let entry = if on { top.add(256).read_volatile() } else { 0 };
        top.write_volatile(entry);
        asm!("mov {0}, cr3", "mov cr3, {0}", out(reg) _, options(nostack));
    }
}
