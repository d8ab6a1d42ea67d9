//! What lies where in physical address space: the machine's own list, as firmware would report it.
//!
//! ```text
//!  0        9fc00  e0000 100000             bffe0000      fec00000   1_0000_0000
//!  |--- RAM ---|hole|-ROM-|------ RAM ---------|-- ACPI --| hole |dev| hole |------ RAM (node 1) ----
//! ```
//!
//! Invariants (checked by [`MemoryMap::new`])
//! - `I1` ranges are sorted, not empty, do not overlap and end at or below 2^52.
//! - `I2` at least one range is RAM.
//!
//! This is deliberately not hal's boot map: that one has to survive any nonsense a boot loader reports, this one
//! says what the simulated hardware really has.

use std::fmt;

/// Bytes of a frame.
pub const FRAME_BYTES: u64 = 4096;

/// What a range of physical addresses is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MemoryKind {
    /// Memory for any use.
    Ram,
    /// Memory that the firmware keeps (it answers like memory).
    Reserved,
    /// ACPI tables, memory again once they are read.
    AcpiReclaimable,
    /// ACPI non-volatile storage.
    AcpiNvs,
    /// Broken memory: an access is a violation.
    Unusable,
    /// Registers of a device: no memory behind it.
    Device,
}

impl MemoryKind {
    /// Returns whether bytes stored in such a range can be read back.
    pub fn is_backed(self) -> bool {
        !matches!(self, MemoryKind::Unusable | MemoryKind::Device)
    }
}

/// A range of physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRange {
    /// First byte.
    pub start: u64,
    /// The byte after the last.
    pub end: u64,
    /// What is there.
    pub kind: MemoryKind,
    /// The NUMA node it belongs to.
    pub node: u8,
}

/// The physical address space of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryMap {
    ranges: Vec<MemoryRange>,
}

/// Why a list of ranges is no memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MemoryMapError {
    /// A range is empty or wraps (its position in the list as given).
    EmptyRange(usize),
    /// A range ends above 2^52 (its position).
    BeyondPhysical(usize),
    /// Two ranges overlap: the address where the second begins.
    Overlap(u64),
    /// There is no RAM.
    NoRam,
}

impl fmt::Display for MemoryMapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EmptyRange(index) => {
                write!(f, "range {index} of the memory map is empty or wraps")
            }
            Self::BeyondPhysical(index) => {
                write!(f, "range {index} of the memory map ends above 2^52")
            }
            Self::Overlap(at) => write!(f, "two ranges of the memory map overlap at {at:#x}"),
            Self::NoRam => write!(f, "the memory map has no RAM"),
        }
    }
}

impl std::error::Error for MemoryMapError {}

impl MemoryMap {
    /// Makes a map from ranges in any order.
    ///
    /// # Errors
    ///
    /// [`MemoryMapError`] names the first range that breaks `I1`, or says that there is no RAM.
    ///
    /// # Examples
    ///
    /// ```
    /// use kmem_mock_x86::{MemoryKind, MemoryMap, MemoryRange};
    ///
    /// let ram = MemoryRange { start: 0, end: 64 << 20, kind: MemoryKind::Ram, node: 0 };
    /// let map = MemoryMap::new(&[ram])?;
    /// assert_eq!(map.ram_bytes(), 64 << 20);
    /// # Ok::<(), kmem_mock_x86::MemoryMapError>(())
    /// ```
    pub fn new(ranges: &[MemoryRange]) -> Result<Self, MemoryMapError> {
        for (index, range) in ranges.iter().enumerate() {
            if range.start >= range.end {
                return Err(MemoryMapError::EmptyRange(index));
            }
            if range.end > 1 << 52 {
                return Err(MemoryMapError::BeyondPhysical(index));
            }
        }
        let mut sorted = ranges.to_vec();
        sorted.sort_by_key(|range| range.start);
        for pair in sorted.windows(2) {
            if pair[1].start < pair[0].end {
                return Err(MemoryMapError::Overlap(pair[1].start));
            }
        }
        if !sorted.iter().any(|range| range.kind == MemoryKind::Ram) {
            return Err(MemoryMapError::NoRam);
        }
        Ok(Self { ranges: sorted })
    }

    /// A small PC: RAM below 640 KiB, the hole up to 1 MiB, then RAM to `bytes` (rounded up to 2 MiB, at least 2 MiB
    /// more than the hole) and from 4 GiB on what does not fit below 3 GiB.
    pub fn pc(bytes: u64) -> Self {
        const MIB: u64 = 1 << 20;
        const GIB: u64 = 1 << 30;
        let bytes = bytes.max(4 * MIB).next_multiple_of(2 * MIB);
        let below = bytes.min(3 * GIB);
        let ram = |start, end| MemoryRange {
            start,
            end,
            kind: MemoryKind::Ram,
            node: 0,
        };
        let mut ranges = vec![
            ram(0, 0x9_fc00),
            MemoryRange {
                start: 0x9_fc00,
                end: 0xa_0000,
                kind: MemoryKind::Reserved,
                node: 0,
            },
            MemoryRange {
                start: 0xf_0000,
                end: MIB,
                kind: MemoryKind::Reserved,
                node: 0,
            },
            ram(MIB, below),
        ];
        if bytes > below {
            ranges.push(ram(4 * GIB, 4 * GIB + (bytes - below)));
        }
        Self { ranges }
    }

    /// The ranges, sorted.
    pub fn ranges(&self) -> &[MemoryRange] {
        &self.ranges
    }

    /// The byte after the last one that is backed by memory.
    pub fn end(&self) -> u64 {
        let backed = self.ranges.iter().filter(|range| range.kind.is_backed());
        backed.map(|range| range.end).max().unwrap_or(0)
    }

    /// Bytes of RAM.
    pub fn ram_bytes(&self) -> u64 {
        let ram = self
            .ranges
            .iter()
            .filter(|range| range.kind == MemoryKind::Ram);
        ram.map(|range| range.end - range.start).sum()
    }

    /// The range that holds `address`, if any.
    pub fn find(&self, address: u64) -> Option<&MemoryRange> {
        let after = self.ranges.partition_point(|range| range.start <= address);
        let range = self.ranges.get(after.checked_sub(1)?)?;
        (address < range.end).then_some(range)
    }

    /// The highest node number, plus one.
    pub fn nodes(&self) -> usize {
        self.ranges
            .iter()
            .map(|range| usize::from(range.node) + 1)
            .max()
            .unwrap_or(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64, kind: MemoryKind) -> MemoryRange {
        MemoryRange {
            start,
            end,
            kind,
            node: 0,
        }
    }

    #[test]
    fn refuses_what_is_no_map() {
        use MemoryKind::{Device, Ram};
        assert_eq!(MemoryMap::new(&[]), Err(MemoryMapError::NoRam));
        assert_eq!(
            MemoryMap::new(&[range(0, 4096, Device)]),
            Err(MemoryMapError::NoRam)
        );
        assert_eq!(
            MemoryMap::new(&[range(8, 8, Ram)]),
            Err(MemoryMapError::EmptyRange(0))
        );
        let high = [range(0, 8, Ram), range(8, (1 << 52) + 1, Ram)];
        assert_eq!(
            MemoryMap::new(&high),
            Err(MemoryMapError::BeyondPhysical(1))
        );
        let twice = [range(4096, 8192, Ram), range(0, 4097, Ram)];
        assert_eq!(MemoryMap::new(&twice), Err(MemoryMapError::Overlap(4096)));
    }

    #[test]
    fn finds_ranges_and_holes() {
        let map = MemoryMap::pc(4 << 30);
        assert_eq!(map.find(0).unwrap().kind, MemoryKind::Ram);
        assert_eq!(map.find(0x9_fbff).unwrap().kind, MemoryKind::Ram);
        assert_eq!(map.find(0x9_fc00).unwrap().kind, MemoryKind::Reserved);
        assert!(map.find(0xa_0000).is_none());
        assert!(map.find(3 << 30).is_none());
        assert_eq!(map.end(), 5 << 30);
        assert!(map.find(5 << 30).is_none());
    }
}
