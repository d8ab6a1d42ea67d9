//! The fixmap: addresses known when the kernel is compiled, mappings made when it runs.
//!
//! ```text
//!   end - 1 page   index 0
//!   end - 2 pages  index 1
//!   ...            index N - 1
//! ```
//!
//! For what must have an address before any allocator works, or a constant one for ever: the local APIC, an early
//! console, a page being patched. The tables of the fixmap exist from [`FixMap::new`] on and stay: each page that maps nothing holds
//! a payload, so that no table is ever empty. So setting never needs memory, and clearing frees none.
//!
//! Source: Linux `arch/x86/include/asm/fixmap.h`.

use core::fmt;

use kmem_hal::{DeviceFrame, Order, PAGE_SIZE, Page, PageRange, PhysAddr, VirtAddr};
use kmem_paging::format::Format;
use kmem_paging::{Attributes, ChangeError, Env, MapError, MemoryType, PageTable, Rights};

use crate::page::KernelPage;
use crate::window::{Window, vacancy};

/// `N` fixed pages that end below `END`.
pub struct FixMap<'a, F: Format, E: Env, const END: u64, const N: usize> {
    table: &'a PageTable<F, E, KernelPage>,
}

/// Why a fixed page was not set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FixMapError {
    /// No such index.
    BadIndex,
    /// The table refused it.
    Table(MapError),
    /// The address is not a page's.
    Misaligned,
}

impl fmt::Display for FixMapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BadIndex => f.write_str("the fixmap has no such index"),
            Self::Misaligned => {
                f.write_str("the physical address is not a multiple of the page size")
            }
            Self::Table(error) => fmt::Display::fmt(error, f),
        }
    }
}

impl core::error::Error for FixMapError {}

impl<'a, F: Format, E: Env, const END: u64, const N: usize> FixMap<'a, F, E, END, N> {
    const LAYOUT: () =
        assert!(END.is_multiple_of(PAGE_SIZE) && N > 0 && END >= N as u64 * PAGE_SIZE);

    /// The fixmap of a kernel's table, with the tables that it needs. Nothing is mapped in its pages, and nobody else uses them.
    ///
    /// # Errors
    ///
    /// [`FixMapError::Table`]; nothing changed.
    pub fn new(table: &'a PageTable<F, E, KernelPage>) -> Result<Self, FixMapError> {
        const { Self::LAYOUT };
        let last = Page::containing(Self::address(0));
        let pages = PageRange::new(Page::containing(Self::address(N - 1)), last);
        let pages = pages.ok_or(FixMapError::Table(MapError::OutOfRange))?;
        Window::<F>::new(table, pages).map_err(FixMapError::Table)?;
        Ok(Self { table })
    }

    /// The address of a fixed page, at compile time.
    ///
    /// # Panics
    ///
    /// Where the index is not below `N`; in a constant this is a compile-time error.
    #[doc(alias = "__fix_to_virt")]
    #[must_use]
    pub const fn address(index: usize) -> VirtAddr {
        assert!(index < N, "the fixmap has no such index");
        VirtAddr::new(END - (index as u64 + 1) * PAGE_SIZE)
    }

    fn page(index: usize) -> Result<Page, FixMapError> {
        if index >= N {
            return Err(FixMapError::BadIndex);
        }
        Ok(Page::containing(Self::address(index)))
    }

    /// Maps the frame at `address` at a fixed page; what was there goes, flushed.
    ///
    /// # Errors
    ///
    /// [`FixMapError`]; nothing changed.
    #[doc(alias = "__set_fixmap")]
    pub fn set(
        &self,
        index: usize,
        address: PhysAddr,
        memory_type: MemoryType,
    ) -> Result<VirtAddr, FixMapError> {
        let page = Self::page(index)?;
        let frame = kmem_hal::Frame::starting_at(address).ok_or(FixMapError::Misaligned)?;
        let device = DeviceFrame::new(frame, Order::ZERO).ok_or(FixMapError::Misaligned)?;
        let attributes =
            Attributes::new(Rights::KERNEL_DATA.union(Rights::GLOBAL)).memory_type(memory_type);
        let range = PageRange::single(page);
        let mut cursor = self
            .table
            .cursor(range)
            .map_err(|_| FixMapError::Table(MapError::OutOfRange))?;
        match cursor.replace(page, KernelPage::borrowed(device), attributes) {
            Ok(_) => Ok(page.start()),
            Err((error, _)) => Err(FixMapError::Table(error)),
        }
    }

    /// Unmaps a fixed page, flushed.
    ///
    /// # Errors
    ///
    /// [`FixMapError::BadIndex`]; [`FixMapError::Table`] where somebody else changed the page.
    #[doc(alias = "clear_fixmap")]
    pub fn clear(&self, index: usize) -> Result<(), FixMapError> {
        let range = PageRange::single(Self::page(index)?);
        let mut cursor = self
            .table
            .cursor(range)
            .map_err(|_| FixMapError::Table(MapError::OutOfRange))?;
        let mut gather = self.table.gather::<1>();
        // One page: the gather has room for it.
        let vacancy = vacancy::<F>().ok_or(FixMapError::Table(MapError::Unencodable))?;
        let cleared = cursor.set_payload(range.first(), vacancy, &mut gather);
        drop(cursor);
        // Fixed pages own nothing.
        gather.commit(|page: KernelPage| {
            let _ = page;
        });
        match cleared {
            Ok(_) => Ok(()),
            Err(ChangeError::Memory(error)) => Err(FixMapError::Table(MapError::Memory(error))),
            Err(_) => Err(FixMapError::Table(MapError::Occupied)),
        }
    }
}

impl<F: Format, E: Env, const END: u64, const N: usize> fmt::Debug for FixMap<'_, F, E, END, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FixMap({N} pages below {END:#x})")
    }
}
