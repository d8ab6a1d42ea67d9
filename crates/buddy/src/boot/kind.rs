//! What firmware says about a region, and why a usable one is taken already.

use core::fmt;

use super::pieces::Rank;

/// What a boot protocol says a region of physical addresses is.
///
/// Where regions overlap, the later one in this list wins: reserved wins over usable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegionKind {
    /// Memory, free to use.
    Usable,
    /// Memory that holds what the boot loader or firmware left behind: free once the kernel has read it.
    BootReclaimable,
    /// Persistent memory.
    Persistent,
    /// ACPI tables, free once they have been read (E820 type 3); not counted as present, as in Linux.
    AcpiData,
    /// Kept by firmware across sleep (E820 type 4).
    AcpiNvs,
    /// A type this crate has no name for: treated as reserved.
    Other(u32),
    /// Not memory, or somebody else's.
    Reserved,
    /// Memory with defects (E820 type 5).
    Unusable,
}

impl RegionKind {
    /// The kind of an E820 type (ACPI 6.5, 15.1: 1 usable, 2 reserved, 3 ACPI data, 4 NVS, 5 unusable, 7 persistent).
    #[must_use]
    pub const fn from_e820(number: u32) -> Self {
        match number {
            1 => Self::Usable,
            2 => Self::Reserved,
            3 => Self::AcpiData,
            4 => Self::AcpiNvs,
            5 => Self::Unusable,
            7 => Self::Persistent,
            other => Self::Other(other),
        }
    }

    /// Whether the region is memory that zones span: usable now or after boot.
    #[must_use]
    pub const fn is_present(self) -> bool {
        matches!(self, Self::Usable | Self::BootReclaimable)
    }
}

impl Rank for RegionKind {
    fn rank(self) -> u32 {
        match self {
            Self::Usable => 0,
            Self::BootReclaimable => 1,
            Self::Persistent => 2,
            Self::AcpiData => 3,
            Self::AcpiNvs => 4,
            Self::Other(_) => 5,
            Self::Reserved => 6,
            Self::Unusable => 7,
        }
    }
}

impl fmt::Display for RegionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usable => f.write_str("usable"),
            Self::BootReclaimable => f.write_str("boot reclaimable"),
            Self::Persistent => f.write_str("persistent (type 7)"),
            Self::AcpiData => f.write_str("ACPI data"),
            Self::AcpiNvs => f.write_str("ACPI NVS"),
            Self::Other(number) => write!(f, "type {number}"),
            Self::Reserved => f.write_str("reserved"),
            Self::Unusable => f.write_str("unusable"),
        }
    }
}

/// Why memory that is present is not free at boot.
///
/// Where reservations overlap, the later one in this list wins, so that init sections can be named inside the kernel
/// image, and what the early allocator gave out is never freed with the boot structures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Reservation {
    /// What the boot loader left: free once read.
    BootStructures,
    /// An initial ramdisk: free once unpacked.
    Initrd,
    /// The kernel's code and data: never freed.
    KernelImage,
    /// Code and data of the kernel that is needed at boot only (`__init`).
    InitSections,
    /// Given out by the early allocator.
    Early,
    /// Anything else that must not be touched.
    Other,
    /// The page-frame allocator's own tables: never freed, not even by [`release`](crate::Buddy::release).
    Tables,
}

impl Reservation {
    /// The reason behind a byte that was made from one.
    pub(crate) const fn from_byte(byte: u8) -> Self {
        match byte {
            0 => Self::BootStructures,
            1 => Self::Initrd,
            2 => Self::KernelImage,
            3 => Self::InitSections,
            4 => Self::Early,
            6 => Self::Tables,
            _ => Self::Other,
        }
    }
}

impl Rank for Reservation {
    fn rank(self) -> u32 {
        self as u32
    }
}

impl fmt::Display for Reservation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BootStructures => "boot structures",
            Self::Initrd => "initrd",
            Self::KernelImage => "kernel image",
            Self::InitSections => "init sections",
            Self::Early => "early allocations",
            Self::Other => "reserved",
            Self::Tables => "allocator",
        })
    }
}
