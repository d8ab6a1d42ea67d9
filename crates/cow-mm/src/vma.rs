//! One mapping: `struct vm_area_struct`.
//!
//! Invariants
//! - `I1`: a VMA's range is exactly the range under which the space's tree holds it.
//! - `I2`: for private anonymous memory `offset` is the page number at which it was created, so that two parts that
//!   were one become one again; for files it is the page of the file at the range's first page.
//! - `I3`: `anon` is set once the VMA owns, or may own, anonymous pages: from its first write fault on.

use core::num::NonZeroU64;

use kmem_hal::PageRange;

use crate::flags::VmFlags;
use crate::names::NameId;
use crate::object::FileRef;

/// The identity of the reverse map that a VMA's anonymous pages hang on (`anon_vma`).
///
/// What merging needs to know of it: which one, and whether the VMA's chain is a single one, which it is not once the
/// VMA was inherited through fork.
#[doc(alias = "anon_vma")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AnonLink {
    /// Which anonymous reverse map.
    pub id: NonZeroU64,
    /// Whether it is the only one in the VMA's chain (`list_is_singular`).
    pub singular: bool,
}

/// A mapping of a run of pages with one protection and one backing object.
#[doc(alias = "vm_area_struct")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vma {
    /// The pages.
    pub range: PageRange,
    /// Protection and kind.
    pub flags: VmFlags,
    /// Page offset in the backing object, or the page number at creation (`I2`).
    #[doc(alias = "vm_pgoff")]
    pub offset: u64,
    /// The file or shared-memory object; `None` for private anonymous memory.
    #[doc(alias = "vm_file")]
    pub file: Option<FileRef>,
    /// The reverse map of its anonymous pages.
    pub anon: Option<AnonLink>,
    /// What stands in the name column of `maps` for a mapping without a file.
    pub label: Label,
}

/// The name of a mapping that is no file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Label {
    /// None.
    #[default]
    None,
    /// `[stack]`.
    Stack,
    /// `[heap]`: printed by position, never compared.
    Heap,
    /// `[vdso]`.
    Vdso,
    /// `[vvar]`.
    Vvar,
    /// `[vvar_vclock]`.
    VvarClock,
    /// `[vsyscall]`.
    Vsyscall,
    /// `[anon:name]`: a program named it (`PR_SET_VMA_ANON_NAME`).
    Named(NameId),
}

impl Label {
    /// As `maps` prints it; empty for none. A name that a program gave is printed whole by `maps` alone.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Stack => "[stack]",
            Self::Heap => "[heap]",
            Self::Vdso => "[vdso]",
            Self::Vvar => "[vvar]",
            Self::VvarClock => "[vvar_vclock]",
            Self::Vsyscall => "[vsyscall]",
            Self::Named(_) => "[anon]",
        }
    }
}

impl Vma {
    /// The addresses of its first byte and of the one after its last.
    #[must_use]
    pub const fn bounds(&self) -> (u64, u64) {
        let start = self.range.first().number() * kmem_hal::PAGE_SIZE;
        (start, start + self.range.count() * kmem_hal::PAGE_SIZE)
    }

    /// Whether it is private memory without a file.
    #[must_use]
    pub const fn is_anonymous(&self) -> bool {
        self.file.is_none()
    }

    /// Whether writes are seen by others.
    #[must_use]
    pub const fn is_shared(&self) -> bool {
        self.flags.contains(VmFlags::SHARED)
    }

    /// Whether its pages are the object's own, and never become copies: as `is_shared`, or mapped so from a file that was opened to be
    /// read.
    pub(crate) const fn shows_object(&self) -> bool {
        self.flags.contains(VmFlags::MAYSHARE)
    }

    /// Whether its pages are ordinary memory, of which each has its owner and its count: not a device's, nor `[vvar]`'s.
    #[doc(alias = "check_vma_flags")]
    pub(crate) const fn is_memory(&self) -> bool {
        !self.flags.intersects(VmFlags::IO.union(VmFlags::PFNMAP))
    }

    /// Whether the kernel put its pages there, for good: a program that gives them up finds them again as they were.
    pub(crate) const fn is_kernels(&self) -> bool {
        matches!(
            self.label,
            Label::Vdso | Label::Vvar | Label::VvarClock | Label::Vsyscall
        )
    }

    /// Whether what lies in a range may become a mapping of its own: what the kernel put there stays whole, or goes whole.
    #[doc(alias = "special_mapping_split")]
    pub(crate) fn may_cut(&self, range: PageRange) -> bool {
        !self.is_kernels() || self.range.intersection(range) == Some(self.range)
    }

    /// Whether a write copies the page first.
    #[doc(alias = "is_cow_mapping")]
    #[must_use]
    pub const fn is_cow(&self) -> bool {
        self.flags.contains(VmFlags::MAYWRITE) && !self.flags.contains(VmFlags::MAYSHARE)
    }

    /// The page of the object behind a page of the range.
    #[doc(alias = "linear_page_index")]
    #[must_use]
    pub const fn object_page(&self, page: kmem_hal::Page) -> u64 {
        self.offset + (page.number() - self.range.first().number())
    }

    /// The same mapping over a part of its range.
    #[must_use]
    pub const fn part(&self, range: PageRange) -> Self {
        Self {
            range,
            offset: self.object_page(range.first()),
            ..*self
        }
    }

    /// Pages that must stay unmapped below it (`vm_start_gap`).
    #[must_use]
    pub const fn guard_below(&self) -> u64 {
        if self.flags.contains(VmFlags::GROWSDOWN) {
            crate::layout::STACK_GUARD_PAGES
        } else {
            0
        }
    }
}
