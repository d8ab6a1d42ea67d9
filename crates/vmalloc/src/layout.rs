//! The kernel's half of the address space, as the classic pictures draw it.
//!
//! ```text
//!  64-bit, four levels                        32-bit, 3 GiB / 1 GiB
//!  ffff_8880_0000_0000  linear map            c000_0000  linear map of low memory (896 MiB)
//!  ffff_c900_0000_0000  vmalloc, ioremap      f800_0000  vmalloc, ioremap
//!  ffff_ffff_8000_0000  kernel image          ff80_0000  permanent kmap
//!  ffff_ffff_a000_0000  modules               ffff_e000  fixmap ends (grows down)
//!  ffff_ffff_ff60_0000  fixmap ends
//! ```
//!
//! Source: Linux Documentation/arch/x86/x86_64/mm.rst; Bovet and Cesati, chapter 8 (the 32-bit layout).

use kmem_hal::{PAGE_SIZE, Page, PageRange, VirtAddr};

/// Where things are in the kernel's half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelLayout {
    /// Where physical address 0 is mapped (`PAGE_OFFSET`).
    pub linear: VirtAddr,
    /// How many bytes of physical memory the linear map may hold.
    pub linear_bytes: u64,
    /// vmalloc, vmap, ioremap, stacks.
    pub vmalloc: PageRange,
    /// Loadable modules.
    pub modules: Option<PageRange>,
    /// One past the last byte of the fixmap, which grows down.
    pub fixmap_end: VirtAddr,
}

impl KernelLayout {
    /// x86-64 with four levels.
    #[must_use]
    pub fn x86_64() -> Self {
        Self {
            linear: VirtAddr::new(0xffff_8880_0000_0000),
            linear_bytes: 64 << 40,
            vmalloc: range(0xffff_c900_0000_0000, 0xffff_e900_0000_0000),
            modules: Some(range(0xffff_ffff_a000_0000, 0xffff_ffff_ff00_0000)),
            fixmap_end: VirtAddr::new(0xffff_ffff_ff60_0000),
        }
    }

    /// 32-bit x86 with 1 GiB of kernel space: 896 MiB of low memory, 8 MiB of guard, vmalloc above.
    #[must_use]
    pub fn x86_32() -> Self {
        Self {
            linear: VirtAddr::new(0xc000_0000),
            linear_bytes: 896 << 20,
            vmalloc: range(0xf880_0000, 0xff80_0000),
            modules: None,
            fixmap_end: VirtAddr::new(0xffff_f000),
        }
    }
}

fn range(start: u64, end: u64) -> PageRange {
    let first = Page::containing(VirtAddr::new(start));
    let last = Page::containing(VirtAddr::new(end - PAGE_SIZE));
    PageRange::new(first, last).unwrap_or(PageRange::single(first))
}
