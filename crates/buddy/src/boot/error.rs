//! What is wrong with an entry of a boot map, in words that name the entry.

use core::fmt;

/// Which of a boot map's lists an entry belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BootList {
    /// Regions that firmware listed.
    Regions,
    /// Reservations inside usable memory.
    Reservations,
    /// Node assignments (SRAT).
    Nodes,
}

impl fmt::Display for BootList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Regions => "region",
            Self::Reservations => "reservation",
            Self::Nodes => "node range",
        })
    }
}

/// Why a boot map refused an entry. The map is as it was before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BootMapError {
    /// The entry has no bytes.
    ZeroLength {
        /// The list.
        list: BootList,
        /// The number of the entry in the order of the calls, from 0.
        index: usize,
        /// Its base address in bytes.
        base: u64,
    },
    /// `base + length` passes 2^64.
    Wraps {
        /// The list.
        list: BootList,
        /// The number of the entry, from 0.
        index: usize,
        /// Its base address in bytes.
        base: u64,
        /// Its length in bytes.
        length: u64,
    },
    /// The entry ends beyond the physical addresses that the processor has.
    TooHigh {
        /// The list.
        list: BootList,
        /// The number of the entry, from 0.
        index: usize,
        /// Its last address.
        last: u64,
        /// The first address that does not exist.
        limit: u64,
    },
    /// Too many disjoint pieces for the map's capacity.
    Full {
        /// The list.
        list: BootList,
        /// The number of the entry, from 0.
        index: usize,
        /// How many pieces would be needed.
        count: usize,
        /// How many there may be.
        capacity: usize,
    },
    /// Two nodes claim the same bytes.
    NodeOverlap {
        /// The number of the entry, from 0.
        index: usize,
        /// An address that both claim.
        address: u64,
        /// The node that has it already.
        owner: u16,
        /// The node that claims it now.
        node: u16,
    },
}

impl fmt::Display for BootMapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::ZeroLength { list, index, base } => {
                write!(f, "{list} {index}: length: 0x0 bytes at base {base:#x}")
            }
            Self::Wraps {
                list,
                index,
                base,
                length,
            } => write!(
                f,
                "{list} {index}: length: {length:#x} from base {base:#x} wraps around the address space"
            ),
            Self::TooHigh {
                list,
                index,
                last,
                limit,
            } => write!(
                f,
                "{list} {index}: end: {last:#x} is beyond the last physical address {:#x}",
                limit.wrapping_sub(1)
            ),
            Self::Full {
                list,
                index,
                count,
                capacity,
            } => write!(
                f,
                "{list} {index}: count: {count} disjoint entries, and the map holds {capacity}"
            ),
            Self::NodeOverlap {
                index,
                address,
                owner,
                node,
            } => write!(
                f,
                "node range {index}: base: {address:#x} belongs to node {owner} already, not to node {node}"
            ),
        }
    }
}

impl core::error::Error for BootMapError {}

/// Why the early allocator gave nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EarlyError {
    /// No free piece of that size below the limit.
    NoSpace {
        /// Bytes asked for.
        bytes: u64,
        /// The address below which they were sought.
        limit: u64,
    },
    /// The alignment is not a power of two, or the size is 0.
    BadRequest {
        /// Bytes asked for.
        bytes: u64,
        /// Alignment asked for.
        align: u64,
    },
    /// The list of reservations has no room for another piece.
    Full {
        /// How many pieces there may be.
        capacity: usize,
    },
}

impl fmt::Display for EarlyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NoSpace { bytes, limit } => {
                write!(f, "no {bytes} free bytes in one piece below {limit:#x}")
            }
            Self::BadRequest { bytes, align } => {
                write!(f, "{bytes} bytes aligned to {align}: not a request")
            }
            Self::Full { capacity } => write!(f, "more than {capacity} reservations"),
        }
    }
}

impl core::error::Error for EarlyError {}
