//! Which zones there are, where they end, and what the page blocks in them are for.

use core::fmt;

use kmem_hal::{Mobility, PAGE_SHIFT};

/// The kinds of zone, by rising restriction on what may use them.
///
/// Source: Linux Documentation/mm/physical_memory.rst.
#[doc(alias = "zone_type")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum ZoneKind {
    /// Below 16 MiB: for devices with 24 address lines.
    Dma = 0,
    /// Below 4 GiB: for devices with 32 address lines.
    Dma32 = 1,
    /// Memory that is always mapped.
    Normal = 2,
    /// Memory without a permanent mapping: user pages only.
    HighMem = 3,
    /// Memory that only holds what can move, so that it can be taken away.
    Movable = 4,
}

impl ZoneKind {
    /// All kinds, lowest first.
    pub const ALL: [Self; 5] = [
        Self::Dma,
        Self::Dma32,
        Self::Normal,
        Self::HighMem,
        Self::Movable,
    ];

    /// The name that Linux prints.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dma => "DMA",
            Self::Dma32 => "DMA32",
            Self::Normal => "Normal",
            Self::HighMem => "HighMem",
            Self::Movable => "Movable",
        }
    }

    /// The highest kind that frames of `mobility` may come from.
    #[doc(alias = "gfp_zone")]
    #[must_use]
    pub const fn highest_for(mobility: Mobility) -> Self {
        match mobility {
            Mobility::Movable => Self::Movable,
            Mobility::Unmovable | Mobility::Reclaimable => Self::Normal,
        }
    }
}

impl fmt::Display for ZoneKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Where zones end: exclusive frame numbers. A zone whose limit is `None` does not exist.
///
/// # Examples
///
/// ```
/// use kmem_buddy::{ZoneKind, ZoneLimits};
/// use kmem_hal::Frame;
///
/// let frame = Frame::new(0x38000).unwrap(); // 896 MiB
/// assert_eq!(ZoneLimits::X86_64.kind_of(frame).0, ZoneKind::Dma32);
/// assert_eq!(ZoneLimits::X86_32.kind_of(frame).0, ZoneKind::HighMem);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZoneLimits {
    /// The end of the DMA zone.
    pub dma: Option<u64>,
    /// The end of the DMA32 zone.
    pub dma32: Option<u64>,
    /// The end of permanently mapped memory; above it is HIGHMEM. `None`: all memory is mapped.
    pub normal: Option<u64>,
    /// The start of the MOVABLE zone, which takes everything from there. `None`: there is none.
    pub movable: Option<u64>,
}

impl ZoneLimits {
    /// 16 MiB, 4 GiB, everything mapped: x86-64.
    pub const X86_64: Self = Self {
        dma: Some((16 << 20) >> PAGE_SHIFT),
        dma32: Some((4 << 30) >> PAGE_SHIFT),
        normal: None,
        movable: None,
    };

    /// 16 MiB, 896 MiB: 32-bit x86 with 3 GiB for user space.
    pub const X86_32: Self = Self {
        dma: Some((16 << 20) >> PAGE_SHIFT),
        dma32: None,
        normal: Some((896 << 20) >> PAGE_SHIFT),
        movable: None,
    };

    /// One zone for everything.
    pub const NORMAL_ONLY: Self = Self {
        dma: None,
        dma32: None,
        normal: None,
        movable: None,
    };

    /// The kind of the zone that `frame` belongs to, and the frame number where that answer changes next.
    #[must_use]
    pub fn kind_of(&self, frame: kmem_hal::Frame) -> (ZoneKind, u64) {
        let number = frame.number();
        let end = kmem_hal::Frame::LIMIT;
        if let Some(start) = self.movable
            && number >= start
        {
            return (ZoneKind::Movable, end);
        }
        let end = self.movable.unwrap_or(end);
        let bounds = [
            (ZoneKind::Dma, self.dma),
            (ZoneKind::Dma32, self.dma32),
            (ZoneKind::Normal, self.normal.or(Some(u64::MAX))),
        ];
        for (kind, limit) in bounds {
            if let Some(limit) = limit
                && number < limit
            {
                return (kind, limit.min(end));
            }
        }
        (ZoneKind::HighMem, end)
    }

    /// The lowest and the end frame number that a zone of `kind` may have.
    pub(crate) fn bounds(&self, kind: ZoneKind) -> (u64, u64) {
        let end = kmem_hal::Frame::LIMIT;
        let movable = self.movable.unwrap_or(end);
        let dma = self.dma.unwrap_or(0);
        let dma32 = self.dma32.unwrap_or(0).max(dma);
        let normal = self.normal.unwrap_or(end).max(dma32);
        let (low, high) = match kind {
            ZoneKind::Dma => (0, dma),
            ZoneKind::Dma32 => (dma, dma32),
            ZoneKind::Normal => (dma32, normal),
            ZoneKind::HighMem => (normal, end),
            ZoneKind::Movable => return (movable, end),
        };
        (low.min(movable), high.min(movable))
    }
}

impl Default for ZoneLimits {
    fn default() -> Self {
        Self::X86_64
    }
}

/// The bit beside a block's type that says that some of its frames are reserved or out of reach.
pub(crate) const UNMANAGED: u8 = 0x80;

/// What a page block holds: allocations of one kind are kept together, so that what cannot move does not spread.
///
/// Source: Linux `enum migratetype`; the printing order is that of /proc/pagetypeinfo.
#[doc(alias = "migratetype")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum MigrateType {
    /// Stays where it is.
    Unmovable = 0,
    /// Can be moved.
    Movable = 1,
    /// Can be dropped.
    Reclaimable = 2,
    /// Kept for requests that cannot wait.
    HighAtomic = 3,
    /// Lent to movable users until its owner claims it.
    Cma = 4,
    /// Being emptied: nothing is allocated from it.
    Isolate = 5,
}

impl MigrateType {
    /// All types in the order of /proc/pagetypeinfo.
    pub const ALL: [Self; 6] = [
        Self::Unmovable,
        Self::Movable,
        Self::Reclaimable,
        Self::HighAtomic,
        Self::Cma,
        Self::Isolate,
    ];

    /// The name that Linux prints.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unmovable => "Unmovable",
            Self::Movable => "Movable",
            Self::Reclaimable => "Reclaimable",
            Self::HighAtomic => "HighAtomic",
            Self::Cma => "CMA",
            Self::Isolate => "Isolate",
        }
    }

    /// The type that serves requests of `mobility`.
    #[must_use]
    pub const fn of(mobility: Mobility) -> Self {
        match mobility {
            Mobility::Unmovable => Self::Unmovable,
            Mobility::Reclaimable => Self::Reclaimable,
            Mobility::Movable => Self::Movable,
        }
    }

    /// The type behind a byte; only bytes that were made from a type are ever stored.
    pub(crate) const fn from_byte(byte: u8) -> Self {
        match byte & !UNMANAGED {
            0 => Self::Unmovable,
            1 => Self::Movable,
            2 => Self::Reclaimable,
            3 => Self::HighAtomic,
            4 => Self::Cma,
            _ => Self::Isolate,
        }
    }

    /// Which set of hint bitmaps lists blocks of this type; `None` where nothing may be allocated.
    pub(crate) const fn hint_set(self) -> Option<usize> {
        match self {
            Self::Unmovable | Self::Reclaimable | Self::HighAtomic => Some(0),
            Self::Movable | Self::Cma => Some(1),
            Self::Isolate => None,
        }
    }

    /// The types whose blocks a request of this type may take from when its own have nothing, best first.
    pub(crate) const fn fallbacks(self) -> &'static [Self] {
        match self {
            Self::Unmovable => &[Self::Reclaimable, Self::Movable],
            Self::Reclaimable => &[Self::Unmovable, Self::Movable],
            Self::Movable => &[Self::Reclaimable, Self::Unmovable],
            _ => &[],
        }
    }
}

impl fmt::Display for MigrateType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
