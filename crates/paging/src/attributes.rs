//! What a leaf says about its page, in words that every format shares.
//!
//! A format turns [`Attributes`] into bits and back; nothing outside the formats knows a bit. What a format
//! cannot express it either widens (x86 has no write-only page, so any right implies reading) or refuses
//! (a protection key where there are none); [`Format`](crate::format::Format) says which for each.
//!
//! Invariants
//! - `A1`: `Rights::empty()` is a leaf that keeps its frame and gives nobody access (`PROT_NONE`): the processor
//!   sees an absent entry, this crate sees a leaf.
//! - `A2`: a [`Payload`] occupies its page like a leaf does, and holds no frame: a swap slot, a marker.

use core::fmt;
use core::marker::PhantomData;

use kmem_hal::{Frame, Order, Page, PageRange};

use crate::format::Format;

bitflags::bitflags! {
    /// Who may do what with a page.
    #[doc(alias = "pgprot")]
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct Rights: u8 {
        /// Data may be read.
        const READ = 1 << 0;
        /// Data may be written. Implies `READ` on x86.
        const WRITE = 1 << 1;
        /// Instructions may be fetched. Implies `READ` on x86, and is always there in formats without NX.
        const EXECUTE = 1 << 2;
        /// User mode may do all that as well.
        const USER = 1 << 3;
        /// The translation is the same in every space and survives a change of the root (kernel mappings).
        const GLOBAL = 1 << 4;
    }
}

impl Rights {
    /// Kernel data: read and write.
    pub const KERNEL_DATA: Self = Self::READ.union(Self::WRITE);
    /// User data: read and write.
    pub const USER_DATA: Self = Self::READ.union(Self::WRITE).union(Self::USER);
    /// User code: read and execute.
    pub const USER_CODE: Self = Self::READ.union(Self::EXECUTE).union(Self::USER);

    /// Whether anybody may do anything (`A1`).
    #[must_use]
    pub const fn grants_access(self) -> bool {
        self.intersects(Self::READ.union(Self::WRITE).union(Self::EXECUTE))
    }
}

/// How the processor caches a page.
///
/// Source: Intel SDM volume 3A, 12.3 and 12.12 (PAT). The two-bit types work with the PAT as it is after reset;
/// write combining needs the value that [`X86_PAT`](crate::format::X86_PAT) names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum MemoryType {
    /// Ordinary memory.
    #[default]
    WriteBack,
    /// Writes go to memory at once, reads are cached.
    WriteThrough,
    /// Device registers: nothing is cached, merged or reordered.
    Uncached,
    /// Frame buffers: writes are merged, nothing is cached.
    WriteCombining,
}

/// Software bits of a leaf: the hardware ignores them, the owner of the table gives them meaning.
///
/// Made only through [`SoftBit`], so that a format without room for a bit does not compile with it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct Soft(u16);

impl Soft {
    /// No bit.
    pub const NONE: Self = Self(0);

    pub(crate) const fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// The bits, bit `n` for [`SoftBit`] number `n`.
    #[must_use]
    pub const fn bits(self) -> u16 {
        self.0
    }

    /// Whether every bit of `other` is set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The bits of both.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The bits of `self` that are not in `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

impl core::ops::BitOr for Soft {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        self.union(other)
    }
}

impl fmt::Debug for Soft {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Soft({:#b})", self.0)
    }
}

/// Software bit number `N` of format `F`; does not compile where the format has no such bit.
///
/// # Examples
///
/// ```
/// use kmem_paging::{Soft, SoftBit, format::X86_64};
///
/// const COW: Soft = SoftBit::<X86_64, 0>::BIT;
/// const ZERO_PAGE: Soft = SoftBit::<X86_64, 1>::BIT;
/// assert!((COW | ZERO_PAGE).contains(COW));
/// ```
///
/// 32-bit tables have three:
///
/// ```compile_fail,E0080
/// use kmem_paging::{Soft, SoftBit, format::X86TwoLevel};
///
/// const TOO_MANY: Soft = SoftBit::<X86TwoLevel, 3>::BIT;
/// ```
#[derive(Debug)]
pub struct SoftBit<F, const N: u32>(PhantomData<F>);

impl<F: Format, const N: u32> SoftBit<F, N> {
    /// The bit.
    pub const BIT: Soft = {
        assert!(
            N < F::SOFT_BITS,
            "this page-table format has no room for that software bit"
        );
        Soft(1 << N)
    };
}

/// What an absent entry carries for its owner: a swap slot, a marker. Never zero bits of information in the
/// entry, so a payload of 0 is different from an empty entry.
///
/// On x86 the number is kept so that the address bits of the entry name no memory that exists, as the fault
/// called L1TF demands (CVE-2018-3620).
#[doc(alias = "swp_entry_t")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Payload(u64);

impl Payload {
    /// A payload for tables of format `F`; `None` if `number` needs more than [`Format::PAYLOAD_BITS`] bits.
    #[must_use]
    pub const fn new<F: Format>(number: u64) -> Option<Self> {
        if number >> F::PAYLOAD_BITS == 0 {
            Some(Self(number))
        } else {
            None
        }
    }

    pub(crate) const fn from_number(number: u64) -> Self {
        Self(number)
    }

    /// The number.
    #[must_use]
    pub const fn number(self) -> u64 {
        self.0
    }

    /// Whether the format has room for it: it may have been made for another one.
    #[inline(always)]
    pub(crate) const fn fits<F: Format>(self) -> bool {
        Self::new::<F>(self.0).is_some()
    }
}

/// All that a leaf says about its page, the frame excepted.
///
/// # Examples
///
/// ```
/// use kmem_paging::{Attributes, MemoryType, Rights};
///
/// let registers = Attributes::new(Rights::KERNEL_DATA).memory_type(MemoryType::Uncached);
/// assert!(!registers.dirty);
/// // After a write fault both bits are known to be needed: set them and save the processor two writes.
/// let touched = Attributes::new(Rights::USER_DATA).accessed().dirty();
/// assert!(touched.accessed && touched.dirty);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Attributes {
    /// Who may do what.
    pub rights: Rights,
    /// How it is cached.
    pub memory_type: MemoryType,
    /// Software bits.
    pub soft: Soft,
    /// Protection key, 0..16; 0 where the format has none.
    pub pkey: u8,
    /// The page was used since the bit was last cleared.
    pub accessed: bool,
    /// The page was written since the bit was last cleared.
    pub dirty: bool,
}

impl Attributes {
    /// Ordinary memory with these rights, not yet accessed.
    #[must_use]
    pub const fn new(rights: Rights) -> Self {
        Self {
            rights,
            memory_type: MemoryType::WriteBack,
            soft: Soft::NONE,
            pkey: 0,
            accessed: false,
            dirty: false,
        }
    }

    /// With these rights instead.
    #[must_use]
    pub const fn rights(mut self, rights: Rights) -> Self {
        self.rights = rights;
        self
    }

    /// With this memory type instead.
    #[must_use]
    pub const fn memory_type(mut self, memory_type: MemoryType) -> Self {
        self.memory_type = memory_type;
        self
    }

    /// With these software bits instead.
    #[must_use]
    pub const fn soft(mut self, soft: Soft) -> Self {
        self.soft = soft;
        self
    }

    /// With this protection key instead.
    #[must_use]
    pub const fn pkey(mut self, pkey: u8) -> Self {
        self.pkey = pkey;
        self
    }

    /// Known to be accessed.
    #[must_use]
    pub const fn accessed(mut self) -> Self {
        self.accessed = true;
        self
    }

    /// Known to be written.
    #[must_use]
    pub const fn dirty(mut self) -> Self {
        self.dirty = true;
        self
    }

    /// All of it in one number, for comparison; never `u64::MAX`.
    #[inline(always)]
    pub(crate) const fn key(self) -> u64 {
        self.rights.bits() as u64
            | (self.memory_type as u64) << 8
            | (self.soft.bits() as u64) << 16
            | (self.pkey as u64) << 32
            | (self.accessed as u64) << 40
            | (self.dirty as u64) << 41
    }

    /// Without the right to write.
    #[must_use]
    pub const fn write_protected(mut self) -> Self {
        self.rights = self.rights.difference(Rights::WRITE);
        self
    }
}

impl From<Rights> for Attributes {
    fn from(rights: Rights) -> Self {
        Self::new(rights)
    }
}

/// A leaf as it was found: where it is, what it maps, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// The first page that the leaf covers.
    pub page: Page,
    /// The first frame that it maps.
    pub frame: Frame,
    /// log2 of the pages it covers.
    pub order: Order,
    /// The rest.
    pub attributes: Attributes,
}

impl Leaf {
    /// The pages that the leaf covers.
    #[must_use]
    pub fn range(&self) -> PageRange {
        // A leaf is naturally aligned inside the space, so its last page exists.
        let last = Page::from_number(self.page.number() + self.order.frames() - 1);
        PageRange::new(self.page, last).unwrap_or(PageRange::single(self.page))
    }

    /// The frame behind one of the leaf's pages; `None` for a page that it does not cover.
    #[must_use]
    pub fn frame_of(&self, page: Page) -> Option<Frame> {
        if self.range().contains(page) {
            self.frame.checked_add(page.number() - self.page.number())
        } else {
            None
        }
    }

    /// Whether the page may be written now, as far as the entry says.
    #[must_use]
    pub const fn is_writable(&self) -> bool {
        self.attributes.rights.contains(Rights::WRITE)
    }
}
