// The processor modes that the hostile runs go through: registers, and the format that they walk.
#[path = "absent.rs"]
mod absent;

pub use absent::X86Absent;
use kmem_hal::{FrameRequest, Order, PhysAddr};
use kmem_mock_x86::manual::{cr4, efer};
use kmem_mock_x86::{MemoryKind, MemoryMap, MemoryRange, Registers};
use kmem_paging::format::Format;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Long,
    /// With process-context identifiers, protection keys, SMEP and SMAP.
    Tagged,
    La57,
    Pae,
    TwoLevel,
    /// Two levels, and memory above 4 GiB that leaves of 4 MiB alone can name.
    Pse36,
    /// Long mode on a processor that remembers absent entries.
    Absent,
}

impl Kind {
    pub const ALL: [Self; 7] = [
        Self::Long,
        Self::Tagged,
        Self::La57,
        Self::Pae,
        Self::TwoLevel,
        Self::Pse36,
        Self::Absent,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Long => "long",
            Self::Tagged => "tagged",
            Self::La57 => "la57",
            Self::Pae => "pae",
            Self::TwoLevel => "two-level",
            Self::Pse36 => "pse-36",
            Self::Absent => "absent",
        }
    }

    pub fn registers(self) -> Registers {
        let protected = Registers {
            cr0: Registers::LONG.cr0,
            ..Registers::PROTECTED
        };
        match self {
            Self::Long | Self::Absent => Registers::LONG,
            Self::Tagged => Registers {
                cr4: Registers::LONG_PCID.cr4 | cr4::PKE | cr4::SMEP | cr4::SMAP,
                ..Registers::LONG_PCID
            },
            Self::La57 => Registers {
                cr4: Registers::LONG.cr4 | cr4::LA57,
                ..Registers::LONG
            },
            Self::Pae => Registers {
                cr4: cr4::PAE | cr4::PGE,
                efer: efer::NXE,
                ..protected
            },
            Self::TwoLevel | Self::Pse36 => Registers {
                cr4: cr4::PSE | cr4::PGE,
                ..protected
            },
        }
    }
}

/// Whether small leaves name fewer frames than huge ones: of entries of 32 bits, those with PSE-36 (SDM 3A, tables 4-4 and 4-6).
pub fn names_high_frames_huge<F: Format>() -> bool {
    F::LEVELS[0].bits == 10 && F::FRAME_LIMIT > 1 << 20
}

/// The memory of a machine for a format: 64 MiB, or where that is of use a part of it above 4 GiB. What is below has room for one block of 4 MiB
/// or two, so that some huge leaves can be split and others cannot.
pub fn memory<F: Format>() -> MemoryMap {
    const MIB: u64 = 1 << 20;
    if !names_high_frames_huge::<F>() {
        return MemoryMap::pc(64 * MIB);
    }
    let ram = |start, end| MemoryRange {
        start,
        end,
        kind: MemoryKind::Ram,
        node: 0,
    };
    let mut ranges = vec![ram(0, 12 * MIB), ram(4096 * MIB, 4160 * MIB)];
    // No block of 4 MiB, as the first frame of each is missing.
    ranges.extend((3..9).map(|block| ram(block * 4 * MIB + 4096, (block + 1) * 4 * MIB)));
    MemoryMap::new(&ranges).unwrap()
}

/// A request for a block that a leaf of its order can name.
pub fn request<F: Format>(order: Order) -> FrameRequest {
    let request = FrameRequest::new(order);
    if order > Order::ZERO || !names_high_frames_huge::<F>() {
        return request;
    }
    FrameRequest {
        max_address: PhysAddr::new((1 << 32) - 1),
        ..request
    }
}

/// Runs an expression with the format of a mode.
macro_rules! with_format {
    ($kind:expr, $format:ident => $run:expr) => {
        match $kind {
            $crate::modes::Kind::Long | $crate::modes::Kind::Tagged => {
                type $format = kmem_paging::format::X86_64;
                $run
            }
            $crate::modes::Kind::La57 => {
                type $format = kmem_paging::format::X86_64La57;
                $run
            }
            $crate::modes::Kind::Pae => {
                type $format = kmem_paging::format::X86Pae;
                $run
            }
            $crate::modes::Kind::TwoLevel => {
                type $format = kmem_paging::format::X86TwoLevel;
                $run
            }
            $crate::modes::Kind::Pse36 => {
                type $format = kmem_paging::format::X86Pse36;
                $run
            }
            $crate::modes::Kind::Absent => {
                type $format = $crate::modes::X86Absent;
                $run
            }
        }
    };
}
pub(crate) use with_format;
