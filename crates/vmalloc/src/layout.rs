//! The kernel's half of the address space, as the classic pictures draw it.
//!
//! ```text
//!  64-bit, four levels                        32-bit, 3 GiB / 1 GiB
//!  ffff_8880_0000_0000  linear map            c000_0000  linear map of low memory (896 MiB)
//!  ffff_c900_0000_0000  vmalloc, ioremap      f880_0000  vmalloc, ioremap (8 MiB above low memory)
//!  ffff_ffff_8000_0000  kernel image          ff80_0000  permanent kmap, 2 or 4 MiB
//!  ffff_ffff_a000_0000  modules               ffc0_0000  temporary kmap, 16 pages a CPU
//!  ffff_ffff_ff60_0000  fixmap ends           ffff_f000  fixmap ends (grows down)
//! ```
//!
//! The three cases of the 32-bit kernel: memory up to 896 MiB is all in the linear map; up to 4 GiB the rest is high memory,
//! reached page by page; above 4 GiB only PAE tables can name it.
//!
//! Source: Linux Documentation/arch/x86/x86_64/mm.rst and Documentation/mm/highmem.rst; Bovet and Cesati, chapter 8 (the
//! 32-bit layout).

use kmem_hal::{Frame, FrameRange, PAGE_SHIFT, PAGE_SIZE, Page, PageRange, PhysAddr, VirtAddr};

/// Where things are in the kernel's half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelLayout {
    /// Where physical address 0 is mapped (`PAGE_OFFSET`).
    #[doc(alias = "PAGE_OFFSET")]
    pub linear: VirtAddr,
    /// How many bytes of physical memory the linear map may hold.
    #[doc(alias = "MAXMEM")]
    pub linear_bytes: u64,
    /// vmalloc, vmap, ioremap, stacks.
    #[doc(alias = "VMALLOC_START")]
    pub vmalloc: PageRange,
    /// Loadable modules; `None` where they live in `vmalloc`.
    #[doc(alias = "MODULES_VADDR")]
    pub modules: Option<PageRange>,
    /// Permanent kmap; `None` where the linear map holds all memory.
    #[doc(alias = "PKMAP_BASE")]
    pub kmap: Option<PageRange>,
    /// Temporary kmap of all CPUs; `None` where the linear map holds all memory.
    pub local: Option<PageRange>,
    /// One past the last byte of the fixmap, which grows down.
    #[doc(alias = "FIXADDR_TOP")]
    pub fixmap_end: VirtAddr,
}

/// Which part of the kernel's half an address is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KernelRegion {
    /// The linear map.
    Linear,
    /// vmalloc, vmap, ioremap, stacks.
    Vmalloc,
    /// Loadable modules.
    Modules,
    /// Permanent kmap.
    Kmap,
    /// Temporary kmap.
    Local,
}

impl KernelLayout {
    /// x86-64 with four levels.
    #[must_use]
    pub const fn x86_64() -> Self {
        Self {
            linear: VirtAddr::new(0xffff_8880_0000_0000),
            linear_bytes: 64 << 40,
            vmalloc: range(0xffff_c900_0000_0000, 0xffff_e900_0000_0000),
            modules: Some(range(0xffff_ffff_a000_0000, 0xffff_ffff_ff00_0000)),
            kmap: None,
            local: None,
            fixmap_end: VirtAddr::new(0xffff_ffff_ff60_0000),
        }
    }

    /// x86-64 with five levels (LA57).
    #[must_use]
    pub const fn x86_64_la57() -> Self {
        Self {
            linear: VirtAddr::new(0xff11_0000_0000_0000),
            linear_bytes: 32 << 50,
            vmalloc: range(0xffa0_0000_0000_0000, 0xffd2_0000_0000_0000),
            ..Self::x86_64()
        }
    }

    /// 32-bit x86 with two-level tables and 1 GiB of kernel space: 896 MiB of low memory, 8 MiB of guard, vmalloc above.
    #[must_use]
    pub const fn x86_32() -> Self {
        Self {
            linear: VirtAddr::new(0xc000_0000),
            linear_bytes: 896 << 20,
            vmalloc: range(0xf880_0000, 0xff7f_e000),
            modules: None,
            kmap: Some(range(0xff80_0000, 0xffc0_0000)),
            local: Some(range(0xffc0_0000, 0xffe0_0000)),
            fixmap_end: VirtAddr::new(0xffff_f000),
        }
    }

    /// The same with PAE tables, whose leaf tables are half as wide: kmap has 512 pages.
    #[must_use]
    pub const fn x86_32_pae() -> Self {
        Self {
            kmap: Some(range(0xff80_0000, 0xffa0_0000)),
            ..Self::x86_32()
        }
    }

    /// Where the linear map holds `address`; `None` for high memory.
    #[doc(alias = "__va")]
    #[doc(alias = "phys_to_virt")]
    #[must_use]
    pub const fn va(&self, address: PhysAddr) -> Option<VirtAddr> {
        if address.as_u64() < self.linear_bytes {
            self.linear.checked_add(address.as_u64())
        } else {
            None
        }
    }

    /// What an address of the linear map stands for; `None` for any other.
    #[doc(alias = "__pa")]
    #[doc(alias = "virt_to_phys")]
    #[must_use]
    pub const fn pa(&self, address: VirtAddr) -> Option<PhysAddr> {
        match address.offset_from(self.linear) {
            Some(offset) if offset < self.linear_bytes => Some(PhysAddr::new(offset)),
            _ => None,
        }
    }

    /// The frames that the linear map may hold: low memory, the rest is high memory.
    #[must_use]
    pub const fn low_memory(&self) -> FrameRange {
        let frames = self.linear_bytes >> PAGE_SHIFT;
        let end = if frames > Frame::LIMIT {
            Frame::LIMIT
        } else {
            frames
        };
        match FrameRange::from_numbers(0, end) {
            Some(range) => range,
            None => FrameRange::EMPTY,
        }
    }

    /// The pages of the linear map of these frames, as far as it may hold them.
    #[must_use]
    pub const fn linear_pages(&self, frames: FrameRange) -> Option<PageRange> {
        let low = frames.intersection(self.low_memory());
        if low.is_empty() {
            return None;
        }
        match self.va(low.first().start()) {
            Some(start) => PageRange::with_count(Page::containing(start), low.count()),
            None => None,
        }
    }

    /// The part that an address is in; the fixmap and the kernel's image are none of them.
    #[must_use]
    pub const fn region(&self, address: VirtAddr) -> Option<KernelRegion> {
        let page = Page::containing(address);
        if self.pa(address).is_some() {
            return Some(KernelRegion::Linear);
        }
        if self.vmalloc.contains(page) {
            return Some(KernelRegion::Vmalloc);
        }
        match self.modules {
            Some(pages) if pages.contains(page) => return Some(KernelRegion::Modules),
            _ => {}
        }
        match self.kmap {
            Some(pages) if pages.contains(page) => return Some(KernelRegion::Kmap),
            _ => {}
        }
        match self.local {
            Some(pages) if pages.contains(page) => Some(KernelRegion::Local),
            _ => None,
        }
    }
}

const fn range(start: u64, end: u64) -> PageRange {
    let first = Page::containing(VirtAddr::new(start));
    let last = Page::containing(VirtAddr::new(end - PAGE_SIZE));
    match PageRange::new(first, last) {
        Some(range) => range,
        None => PageRange::single(first),
    }
}
