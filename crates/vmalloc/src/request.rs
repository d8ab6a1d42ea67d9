//! What is asked of [`Vmalloc`](crate::Vmalloc), and why it was refused.

use core::fmt;

use kmem_hal::{AllocError, PhysAddr, VirtAddr};
use kmem_paging::{Attributes, MapError, MemoryType, Rights};

use crate::area::AreaKind;

/// Why no range was mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VmallocError {
    /// A size of 0, a size larger than the window, more than 255 guard pages, or an alignment that is no power of two.
    BadSize,
    /// User rights, or the right to write and to execute at once.
    BadRights,
    /// No gap of that size is left, purging included.
    NoSpace,
    /// No frame, no table, or no tree node.
    Memory,
    /// The table refused the mapping: the window is not its, or the frame cannot be expressed.
    Table(MapError),
    /// Nothing was given at that address.
    NotAnArea,
}

impl fmt::Display for VmallocError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BadSize => f.write_str("the size or alignment cannot be had"),
            Self::BadRights => f.write_str("the kernel's window gives no such rights"),
            Self::NoSpace => f.write_str("no gap in the vmalloc window"),
            Self::Memory => f.write_str("out of memory"),
            Self::Table(error) => fmt::Display::fmt(error, f),
            Self::NotAnArea => f.write_str("no vmalloc area begins there"),
        }
    }
}

impl core::error::Error for VmallocError {}

impl From<AllocError> for VmallocError {
    fn from(_: AllocError) -> Self {
        Self::Memory
    }
}

/// No area was given at this address, or it was freed already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotAnArea(pub VirtAddr);

impl fmt::Display for NotAnArea {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no vmalloc area begins at {}", self.0)
    }
}

impl core::error::Error for NotAnArea {}

/// What kind of range is wanted.
///
/// # Examples
///
/// ```
/// use kmem_hal::PAGE_SIZE;
/// use kmem_vmalloc::{AreaKind, Request};
///
/// // 3 MiB for a table that must begin at a multiple of 16 KiB, zeroed, on small leaves only.
/// let request = Request::bytes(3 << 20).aligned(4).zeroed().small_leaves();
/// assert_eq!(request.pages, (3 << 20) / PAGE_SIZE);
/// assert_eq!(request.kind, AreaKind::Vmalloc);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Request {
    /// Mapped pages.
    pub pages: u64,
    /// Alignment of the first mapped page, in pages.
    pub alignment: u64,
    /// What for.
    pub kind: AreaKind,
    /// Pages to keep unmapped below, at most 255: 1 for a stack, which grows down. One page above always is.
    pub guard_below: u64,
    /// Who may do what, and how it is cached.
    pub attributes: Attributes,
    /// Whether every byte must be zero.
    pub zeroed: bool,
    /// Whether leaves larger than a page may be used where size and alignment allow it.
    #[doc(alias = "VM_ALLOW_HUGE_VMAP")]
    pub huge: bool,
}

impl Request {
    /// Readable and writable memory of so many pages.
    pub const fn new(pages: u64) -> Self {
        Self {
            pages,
            alignment: 1,
            kind: AreaKind::Vmalloc,
            guard_below: 0,
            attributes: Attributes::new(Rights::KERNEL_DATA.union(Rights::GLOBAL)),
            zeroed: false,
            huge: true,
        }
    }

    /// Readable and writable memory of `bytes` bytes, rounded up to pages.
    pub const fn bytes(bytes: u64) -> Self {
        Self::new(bytes.div_ceil(kmem_hal::PAGE_SIZE))
    }

    /// A kernel stack: a guard on both sides.
    pub const fn stack(pages: u64) -> Self {
        Self::new(pages).of(AreaKind::Stack).guarded(1)
    }

    /// For this purpose.
    pub const fn of(mut self, kind: AreaKind) -> Self {
        self.kind = kind;
        self
    }

    /// With its first mapped page at a multiple of `pages` pages.
    pub const fn aligned(mut self, pages: u64) -> Self {
        self.alignment = pages;
        self
    }

    /// With so many unmapped pages below.
    pub const fn guarded(mut self, pages: u64) -> Self {
        self.guard_below = pages;
        self
    }

    /// With these rights. [`Rights::GLOBAL`] is added: the kernel's mappings are in every space.
    pub const fn rights(mut self, rights: Rights) -> Self {
        self.attributes = self.attributes.rights(rights.union(Rights::GLOBAL));
        self
    }

    /// Cached in this way.
    pub const fn memory_type(mut self, memory_type: MemoryType) -> Self {
        self.attributes = self.attributes.memory_type(memory_type);
        self
    }

    /// With every byte zero.
    #[doc(alias = "vzalloc")]
    pub const fn zeroed(mut self) -> Self {
        self.zeroed = true;
        self
    }

    /// On leaves of one page each, so that each page can be given other rights later without a split.
    pub const fn small_leaves(mut self) -> Self {
        self.huge = false;
        self
    }

    pub(crate) const fn check(&self, window: u64) -> Result<(), VmallocError> {
        if self.pages == 0
            || self.pages > window
            || self.guard_below > crate::area::MAX_GUARD
            || !self.alignment.is_power_of_two()
        {
            return Err(VmallocError::BadSize);
        }
        check_rights(self.attributes.rights)
    }
}

/// Refuses what no kernel mapping should be: user pages, and pages that are written and executed.
pub(crate) const fn check_rights(rights: Rights) -> Result<(), VmallocError> {
    let both = Rights::WRITE.union(Rights::EXECUTE);
    if rights.contains(Rights::USER) || rights.contains(both) {
        return Err(VmallocError::BadRights);
    }
    Ok(())
}

/// Physical addresses that a device can reach: `0..=mask`.
///
/// Source: Linux Documentation/core-api/dma-api-howto.rst (`dma_set_mask`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaMask(u64);

impl DmaMask {
    /// A device with 24 address lines (ISA).
    pub const ISA: Self = Self::bits(24);
    /// A device with 32 address lines.
    pub const BITS_32: Self = Self::bits(32);
    /// A device that reaches everything.
    pub const ALL: Self = Self(u64::MAX);

    /// A device with so many address lines; 64 and more reach everything.
    #[doc(alias = "DMA_BIT_MASK")]
    #[must_use]
    pub const fn bits(lines: u32) -> Self {
        if lines >= 64 {
            Self::ALL
        } else {
            Self((1 << lines) - 1)
        }
    }

    /// The highest address that it reaches.
    #[must_use]
    pub const fn last(self) -> PhysAddr {
        PhysAddr::new(self.0)
    }
}
