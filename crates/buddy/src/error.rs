//! What can go wrong, apart from [`AllocError`](kmem_hal::AllocError).

use core::fmt;

use crate::boot::EarlyError;

/// Why the allocator could not be initialised. The boot map is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum InitError {
    /// It has been initialised already.
    Twice,
    /// The boot map has no usable memory.
    NoMemory,
    /// No room for the metadata.
    Metadata {
        /// Bytes needed in one piece.
        bytes: u64,
        /// Why they were not found.
        reason: EarlyError,
    },
    /// A zone spans more than 2^32 frames (16 TiB).
    ZoneTooLarge {
        /// Frames that it spans.
        frames: u64,
    },
    /// More CPUs than a [`CpuSet`](kmem_hal::CpuSet) can name: their caches could not be emptied.
    TooManyCpus {
        /// What `Cpu::count` says.
        count: u32,
    },
    /// More zones or page blocks than this build can number.
    TooMany {
        /// How many.
        count: u64,
    },
}

impl fmt::Display for InitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Twice => f.write_str("the allocator is initialised already"),
            Self::NoMemory => f.write_str("the boot map has no usable memory"),
            Self::Metadata { bytes, reason } => {
                write!(f, "{bytes} bytes of metadata: {reason}")
            }
            Self::ZoneTooLarge { frames } => {
                write!(f, "a zone of {frames:#x} frames: more than 2^32")
            }
            Self::TooManyCpus { count } => {
                write!(f, "{count} CPUs: more than {}", kmem_hal::CpuSet::CAPACITY)
            }
            Self::TooMany { count } => write!(f, "{count} zones or page blocks"),
        }
    }
}

impl core::error::Error for InitError {}

/// What is wrong with a block that was freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FreeError {
    /// The allocator has not been initialised.
    NotInitialised,
    /// No memory of this allocator: a hole, a device, another zone's end, a reserved frame.
    Foreign,
    /// Not aligned to its order.
    Misaligned,
    /// It is free already.
    DoubleFree,
    /// A part of it is free already: a wrong order, or a part was freed before.
    WrongOrder,
    /// The reserved run would be cut in two, and the list of reserved runs is full: release from its ends.
    ListFull,
}

impl FreeError {
    pub(crate) const ALL: [Self; 6] = [
        Self::NotInitialised,
        Self::Foreign,
        Self::Misaligned,
        Self::DoubleFree,
        Self::WrongOrder,
        Self::ListFull,
    ];
}

impl fmt::Display for FreeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotInitialised => "the allocator has not been initialised",
            Self::Foreign => "not a frame of this allocator",
            Self::Misaligned => "not aligned to its order",
            Self::DoubleFree => "free already",
            Self::ListFull => "the list of reserved runs is full",
            Self::WrongOrder => "partly free already: a wrong order or a double free",
        })
    }
}

impl core::error::Error for FreeError {}

/// A block that was freed wrongly and kept out of use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Misuse {
    /// What was wrong.
    pub error: FreeError,
    /// The block's first frame.
    pub first: kmem_hal::Frame,
    /// The block's order.
    pub order: kmem_hal::Order,
    /// How many blocks were freed wrongly since `init`.
    pub count: u64,
}

impl fmt::Display for Misuse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "frame {} of order {}: {} ({} so far)",
            self.first, self.order, self.error, self.count
        )
    }
}

/// Why a block at a fixed place was not given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PlaceError {
    /// The allocator has not been initialised.
    NotInitialised,
    /// Not wholly memory of one zone of this allocator.
    Foreign,
    /// Some of it is in use.
    InUse,
    /// Some of it is in use, or was free all along without being found: in the cache of a CPU that could not be asked, freed by a nested
    /// call and waiting for the call that it interrupted, or moved about by frees that overtook the look 16 times.
    InUseHere,
    /// A nested call met a state that only the interrupted code can finish, or a CPU that had to be asked could not be.
    Busy,
}

impl fmt::Display for PlaceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotInitialised => "the allocator has not been initialised",
            Self::Foreign => "not memory of one zone of this allocator",
            Self::InUse => "some of it is in use",
            Self::InUseHere => "some of it is in use or in the cache of a CPU that could not be asked",
            Self::Busy => "the allocator is busy in the code that was interrupted, or a CPU could not be asked",
        })
    }
}

impl core::error::Error for PlaceError {}
