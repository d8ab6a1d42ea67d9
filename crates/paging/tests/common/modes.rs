// The processor modes that the hostile runs go through: registers, and the format that they walk.
#[path = "absent.rs"]
mod absent;

pub use absent::X86Absent;
use kmem_mock_x86::Registers;
use kmem_mock_x86::manual::{cr4, efer};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Long,
    /// With process-context identifiers, protection keys, SMEP and SMAP.
    Tagged,
    La57,
    Pae,
    TwoLevel,
    /// Long mode on a processor that remembers absent entries.
    Absent,
}

impl Kind {
    pub const ALL: [Self; 6] = [
        Self::Long,
        Self::Tagged,
        Self::La57,
        Self::Pae,
        Self::TwoLevel,
        Self::Absent,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Long => "long",
            Self::Tagged => "tagged",
            Self::La57 => "la57",
            Self::Pae => "pae",
            Self::TwoLevel => "two-level",
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
            Self::TwoLevel => Registers {
                cr4: cr4::PSE | cr4::PGE,
                ..protected
            },
        }
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
            $crate::modes::Kind::Absent => {
                type $format = $crate::modes::X86Absent;
                $run
            }
        }
    };
}
pub(crate) use with_format;
