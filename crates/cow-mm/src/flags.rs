//! Protections and flags: those a program passes, and those a VMA keeps.
//!
//! The numbers that programs pass are Linux's for x86-64, so that a kernel hands its system-call arguments over as
//! they are. The bits that a VMA keeps ([`VmFlags`]) are kmem's own; their names are Linux's.
//!
//! Source: Linux `include/uapi/asm-generic/mman-common.h`, `include/linux/mm.h` (names and meanings).

use bitflags::bitflags;

bitflags! {
    /// What a mapping may be used for: `PROT_*`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct Prot: u32 {
        /// May be read.
        const READ = 1;
        /// May be written.
        const WRITE = 2;
        /// May be executed.
        const EXEC = 4;
        /// Atomic operations work there: always so, and ignored.
        const SEM = 8;
        /// For mprotect: from the beginning of the mapping on, which must be a stack.
        const GROWSDOWN = 0x0100_0000;
        /// For mprotect: up to the end of the mapping, which must grow up. On x86 none does.
        const GROWSUP = 0x0200_0000;
    }
}

impl Prot {
    /// The three bits that a mapping keeps.
    pub const ACCESS: Self = Self::READ.union(Self::WRITE).union(Self::EXEC);
}

bitflags! {
    /// How a mapping is made: `MAP_*`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct MapFlags: u32 {
        /// Writes are seen by everybody who maps the object.
        const SHARED = 0x01;
        /// Writes are the process's own.
        const PRIVATE = 0x02;
        /// Type 8: private memory whose pages may go at any time, and read as zeros then. Never in a child, a core dump or swap, and never
        /// counted against the commit limit (Linux 6.11 and later).
        const DROPPABLE = 0x08;
        /// Exactly at the address given; what is there goes.
        const FIXED = 0x10;
        /// No file.
        const ANONYMOUS = 0x20;
        /// In the low 2 GiB.
        const MAP_32BIT = 0x40;
        /// Grows towards lower addresses when touched below: a stack.
        const GROWSDOWN = 0x0100;
        /// Ignored, as in Linux.
        const DENYWRITE = 0x0800;
        /// Ignored, as in Linux.
        const EXECUTABLE = 0x1000;
        /// Every page present and kept.
        const LOCKED = 0x2000;
        /// Not counted against the commit limit.
        const NORESERVE = 0x4000;
        /// Every page present at once.
        const POPULATE = 0x8000;
        /// With POPULATE: only pages that need no I/O.
        const NONBLOCK = 0x0001_0000;
        /// For a thread's stack: keeps huge pages away (Linux 6.7 and later).
        const STACK = 0x0002_0000;
        /// Huge pages of a reserved pool: not supported.
        const HUGETLB = 0x0004_0000;
        /// Exactly at the address given; fails where something is there.
        const FIXED_NOREPLACE = 0x0010_0000;
    }
}

impl MapFlags {
    /// The low four bits are a number, not a set: 1 shared, 2 private, 3 shared with flags validated, 8 droppable.
    pub const TYPE_MASK: u32 = 0x0f;
    /// `MAP_SHARED_VALIDATE`.
    pub const SHARED_VALIDATE: u32 = 0x03;
    /// What a shared mapping whose flags are validated may say (`LEGACY_MAP_MASK`): the flags that were there before validation was, without
    /// `FIXED_NOREPLACE`. The upper ones are `MAP_ABOVE4G`, `MAP_UNINITIALIZED`, and sizes of huge pages.
    pub(crate) const VALIDATED: Self = Self::from_bits_retain(
        Self::all().difference(Self::FIXED_NOREPLACE).bits() | 0x80 | 0x7c00_0000,
    );

    /// The type of mapping: 1, 2, 3 or 8 where it is one that exists.
    #[must_use]
    pub const fn map_type(self) -> u32 {
        self.bits() & Self::TYPE_MASK
    }
}

bitflags! {
    /// How a mapping is moved: `MREMAP_*`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct RemapFlags: u32 {
        /// May be moved elsewhere.
        const MAYMOVE = 1;
        /// Must be moved to the address given.
        const FIXED = 2;
        /// Leaves the old range mapped and empty.
        const DONTUNMAP = 4;
    }
}

bitflags! {
    /// What a VMA knows of itself: `VM_*`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct VmFlags: u32 {
        /// May be read now.
        const READ = 1 << 0;
        /// May be written now.
        const WRITE = 1 << 1;
        /// May be executed now.
        const EXEC = 1 << 2;
        /// Writes are shared.
        const SHARED = 1 << 3;
        /// mprotect may allow reading.
        const MAYREAD = 1 << 4;
        /// mprotect may allow writing.
        const MAYWRITE = 1 << 5;
        /// mprotect may allow execution.
        const MAYEXEC = 1 << 6;
        /// Was mapped as shared (a read-only file mapped shared keeps this and not SHARED).
        const MAYSHARE = 1 << 7;
        /// A stack that grows down.
        const GROWSDOWN = 1 << 8;
        /// Kept in memory.
        const LOCKED = 1 << 9;
        /// Counted against the commit limit.
        const ACCOUNT = 1 << 10;
        /// Mapped with MAP_NORESERVE.
        const NORESERVE = 1 << 11;
        /// Not copied by fork.
        const DONTCOPY = 1 << 12;
        /// May not grow by mremap.
        const DONTEXPAND = 1 << 13;
        /// Left out of core dumps.
        const DONTDUMP = 1 << 14;
        /// Empty in the child after fork.
        const WIPEONFORK = 1 << 15;
        /// Huge pages wanted.
        const HUGEPAGE = 1 << 16;
        /// Huge pages not wanted.
        const NOHUGEPAGE = 1 << 17;
        /// Will be read from front to back.
        const SEQ_READ = 1 << 18;
        /// Will be read here and there.
        const RAND_READ = 1 << 19;
        /// Equal pages may be merged (KSM).
        const MERGEABLE = 1 << 20;
        /// Maps frames that are no ordinary pages: device memory, `[vvar]`.
        const PFNMAP = 1 << 21;
        /// Changed since it was last asked (`VM_SOFTDIRTY`); merging does not look at it.
        const SOFTDIRTY = 1 << 22;
        /// Locked page by page, when they are touched.
        const LOCKONFAULT = 1 << 23;
        /// The four bits of its protection key ([`VmFlags::key`]).
        const KEY_BITS = 0xf << 24;
        /// Had a guard region once: a child inherits its tables. Sticks to whatever it merges with.
        const MAYBE_GUARD = 1 << 28;
        /// Accesses may have effects: device memory.
        const IO = 1 << 29;
        /// Its pages may go at any time ([`MapFlags::DROPPABLE`]).
        const DROPPABLE = 1 << 30;
        /// What it maps stays mapped as it is ([`mseal`](crate::AddressSpace::mseal)).
        const SEALED = 1 << 31;
    }
}

impl VmFlags {
    /// The three bits that mprotect changes.
    pub const ACCESS: Self = Self::READ.union(Self::WRITE).union(Self::EXEC);
    /// What a child does not inherit, and munlock takes away (`VM_LOCKED_MASK`).
    pub const LOCKED_MASK: Self = Self::LOCKED.union(Self::LOCKONFAULT);
    /// A VMA with one of these never merges (`VM_SPECIAL`).
    pub const SPECIAL: Self = Self::DONTEXPAND.union(Self::PFNMAP).union(Self::IO);
    /// Bits that do not keep two VMAs from merging.
    pub const IGNORED_BY_MERGE: Self = Self::SOFTDIRTY.union(Self::MAYBE_GUARD);
    /// Bits that a merged VMA has if any of its parts had them (`VM_STICKY`).
    pub const STICKY: Self = Self::IGNORED_BY_MERGE;

    /// The protection key, 0 to 15.
    #[doc(alias = "vma_pkey")]
    #[must_use]
    pub const fn key(self) -> u8 {
        (self.bits() >> 24 & 0xf) as u8
    }

    /// The same with another protection key; its low four bits count.
    #[must_use]
    pub const fn with_key(self, key: u8) -> Self {
        let bits = self.bits() & !Self::KEY_BITS.bits() | ((key & 0xf) as u32) << 24;
        Self::from_bits_retain(bits)
    }

    /// The access bits of a protection; others are passed over, as mmap does.
    #[must_use]
    pub const fn from_prot(prot: Prot) -> Self {
        Self::from_bits_retain(prot.bits() & Prot::ACCESS.bits())
    }

    /// The protection that the access bits stand for.
    #[must_use]
    pub const fn prot(self) -> Prot {
        Prot::from_bits_truncate(self.bits() & Self::ACCESS.bits())
    }
}

/// What madvise is asked for: the numbers of Linux.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Advice {
    /// No special treatment.
    Normal = 0,
    /// Random access: no read-ahead.
    Random = 1,
    /// Sequential access.
    Sequential = 2,
    /// Will be needed soon.
    WillNeed = 3,
    /// The contents may go at once.
    DontNeed = 4,
    /// The contents may go when memory is short.
    Free = 8,
    /// The contents go from the object itself, for all who map it.
    Remove = 9,
    /// Not copied by fork.
    DontFork = 10,
    /// Copied by fork again.
    DoFork = 11,
    /// Equal pages may be merged.
    Mergeable = 12,
    /// Equal pages may not be merged.
    Unmergeable = 13,
    /// Huge pages wanted.
    HugePage = 14,
    /// Huge pages not wanted.
    NoHugePage = 15,
    /// Left out of core dumps.
    DontDump = 16,
    /// In core dumps again.
    DoDump = 17,
    /// Empty in the child after fork.
    WipeOnFork = 18,
    /// Kept over fork again.
    KeepOnFork = 19,
    /// Not needed soon.
    Cold = 20,
    /// May be written out now.
    PageOut = 21,
    /// Read faults now, so that none come later.
    PopulateRead = 22,
    /// Write faults now, so that none come later.
    PopulateWrite = 23,
    /// As [`DontNeed`](Self::DontNeed), in locked memory too.
    DontNeedLocked = 24,
    /// Huge pages now.
    Collapse = 25,
    /// The pages' memory is broken: a test of the handling of memory failures.
    HwPoison = 100,
    /// The pages' memory is going to break.
    SoftOffline = 101,
    /// Accesses fault for good, without a mapping of their own.
    GuardInstall = 102,
    /// Accesses find pages again, empty ones.
    GuardRemove = 103,
}

impl Advice {
    /// Every advice, in the order of the numbers. Not to be tried out on a real kernel: [`HwPoison`](Self::HwPoison) and
    /// [`SoftOffline`](Self::SoftOffline) take memory from it.
    pub const ALL: [Self; 27] = [
        Self::Normal,
        Self::Random,
        Self::Sequential,
        Self::WillNeed,
        Self::DontNeed,
        Self::Free,
        Self::Remove,
        Self::DontFork,
        Self::DoFork,
        Self::Mergeable,
        Self::Unmergeable,
        Self::HugePage,
        Self::NoHugePage,
        Self::DontDump,
        Self::DoDump,
        Self::WipeOnFork,
        Self::KeepOnFork,
        Self::Cold,
        Self::PageOut,
        Self::PopulateRead,
        Self::PopulateWrite,
        Self::DontNeedLocked,
        Self::Collapse,
        Self::HwPoison,
        Self::SoftOffline,
        Self::GuardInstall,
        Self::GuardRemove,
    ];

    /// The advice with this number; `None` for numbers that Linux answers with EINVAL.
    #[must_use]
    pub fn from_number(number: i32) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|advice| *advice as i32 == number)
    }

    /// Why the advice, though accepted, has not its full effect; `None` where it has.
    ///
    /// `kmem replay --unsupported` prints this table.
    #[must_use]
    pub const fn missing_effect(self) -> Option<&'static str> {
        match self {
            Self::Remove => Some("EOPNOTSUPP for files: no hole is punched into them"),
            Self::HwPoison | Self::SoftOffline => {
                Some("EPERM, as to a caller without CAP_SYS_ADMIN; no memory failure is made")
            }
            Self::Collapse => Some("EINVAL, as from a Linux without transparent huge pages"),
            Self::Mergeable | Self::Unmergeable => {
                Some("noted in the VMA; equal pages are not merged")
            }
            Self::HugePage | Self::NoHugePage => {
                Some("noted in the VMA; no transparent huge pages")
            }
            Self::DontDump | Self::DoDump => Some("noted in the VMA; there are no core dumps"),
            _ => None,
        }
    }
}
