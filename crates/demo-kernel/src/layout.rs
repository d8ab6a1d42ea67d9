//! Where things lie: the kernel's half of the address space, and the image.
//!
//! ```text
//!   0000_0000_0000_0000   user space                       0x7fff_ffff_f000 bytes
//!   ffff_8000_0000_0000   direct map of physical memory    512 GiB
//!   ffff_c000_0000_0000   memory that scenario `paging` fills by faults
//!   ffff_c900_0000_0000   vmalloc: kernel stacks, buffers
//!   ffff_ffff_8000_0000   the image (kernel.ld)
//!   ffff_ffff_ff60_0000   end of the fixmap: page 0 below it is the interrupt controller
//! ```
//!
//! All of it is canonical with four levels and with five.

use core::arch::asm;
use core::arch::x86_64::__cpuid;

/// Where physical memory is mapped (`boot.s`: top-table entry 256).
pub const DIRECT: u64 = 0xffff_8000_0000_0000;
/// How much of it, in bytes.
pub const DIRECT_BYTES: u64 = 512 << 30;
/// The window of vmalloc.
pub const VMALLOC: (u64, u64) = (0xffff_c900_0000_0000, 0xffff_c910_0000_0000);
/// Linear minus physical address of the image (`kernel.ld`).
pub const IMAGE_BASE: u64 = 0xffff_ffff_8000_0000;
/// One past the last byte of the fixmap.
pub const FIXMAP_END: u64 = 0xffff_ffff_ff60_0000;

/// A pointer to physical memory.
pub fn direct(physical: u64) -> *mut u8 {
    assert!(
        physical < DIRECT_BYTES,
        "{physical:#x} is beyond the direct map"
    );
    (DIRECT + physical) as *mut u8
}

unsafe extern "C" {
    static __text_start: u8;
    static __rodata_start: u8;
    static __data_start: u8;
    static __image_end: u8;
    static boot_pml4: u8;
    static boot_pml5: u8;
}

/// Linear addresses at which the image's text, constants and data begin, and where it ends.
pub fn image() -> [u64; 4] {
    [
        &raw const __text_start as u64,
        &raw const __rodata_start as u64,
        &raw const __data_start as u64,
        &raw const __image_end as u64,
    ]
}

/// The first physical byte after the image.
pub fn image_end() -> u64 {
    image()[3] - IMAGE_BASE
}

/// Whether the CPU translates through five levels.
pub fn five_levels() -> bool {
    let cr4: u64;
    // SAFETY: reading CR4 has no effect.
    unsafe { asm!("mov {}, cr4", out(reg) cr4, options(nostack, nomem)) };
    cr4 & 1 << 12 != 0
}

/// How much physical memory the direct map reaches: all that `boot.s` maps there, which is less where the CPU has no leaves
/// of 1 GiB (KVM without nested paging).
pub fn direct_end() -> u64 {
    if has_gigabyte_leaves() {
        DIRECT_BYTES
    } else {
        16 << 30
    }
}

/// Whether the CPU has leaves of 1 GiB.
pub fn has_gigabyte_leaves() -> bool {
    // The call is safe in newer toolchains.
    #[allow(unused_unsafe)]
    // SAFETY: every processor with long mode has the leaf.
    let features = unsafe { __cpuid(0x8000_0001) };
    features.edx & 1 << 26 != 0
}

/// The root table of `boot.s`.
pub fn boot_root() -> u64 {
    if five_levels() {
        &raw const boot_pml5 as u64
    } else {
        &raw const boot_pml4 as u64
    }
}

/// Switches the identity map of `boot.s` (top-table entry 0) off or on again.
///
/// # Safety
/// To switch it off, nothing may run or point below the direct map any more.
pub unsafe fn identity_map(on: bool) {
    unsafe extern "C" {
        static boot_pdpt: u8;
    }
    // SAFETY: entry 0 of boot.s's four-level table is the identity map, and nothing else is below it; the caller's
    // promise; loading CR3 again flushes.
    unsafe {
        let entry = if on {
            &raw const boot_pdpt as u64 | 3
        } else {
            0
        };
        direct(&raw const boot_pml4 as u64)
            .cast::<u64>()
            .write_volatile(entry);
        asm!("mov {0}, cr3", "mov cr3, {0}", out(reg) _, options(nostack));
    }
}
