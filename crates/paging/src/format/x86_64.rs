//! x86-64: four levels, or five with LA57.
//!
//! Source: Intel SDM volume 3A, 4.5 and tables 4-14 to 4-20.

use kmem_hal::{Canonical, Frame};

use super::x86::{Mode, PRESENT, USER, WRITE};
use super::{Format, Kind, Level};
use crate::attributes::{Attributes, Payload, Rights};

const MODE: Mode = Mode {
    address: 0x000f_ffff_ffff_f000,
    no_execute: true,
    high_soft_bits: 7,
    keys: true,
    leaf_shift: [0, 0, 9, 18],
    payload_low_bits: 40,
    payload_high_shift: 52,
    payload_high_bits: 8,
};

const LEVELS: [Level; 5] = [
    Level {
        shift: 0,
        bits: 9,
        leaf: true,
    },
    Level {
        shift: 9,
        bits: 9,
        leaf: true,
    },
    Level {
        shift: 18,
        bits: 9,
        leaf: true,
    },
    Level {
        shift: 27,
        bits: 9,
        leaf: false,
    },
    Level {
        shift: 36,
        bits: 9,
        leaf: false,
    },
];

/// x86-64 with four levels: 48-bit addresses, leaves of 4 KiB, 2 MiB and 1 GiB.
#[doc(alias = "PML4")]
#[derive(Clone, Copy, Debug)]
pub struct X86_64;

/// x86-64 with LA57: 57-bit addresses, or 48-bit ones if made with four levels (CR4.LA57 is known at run time only).
#[doc(alias = "PML5")]
#[derive(Clone, Copy, Debug)]
pub struct X86_64La57;

macro_rules! long_mode {
    ($format:ident, $name:literal, $levels:expr) => {
        // SAFETY: F1: every constructor sets a low bit. F2: present words differ from the others in bit 0, tables
        // from leaves in bit 7, leaves without access from payloads in bit 1 (`Mode`). F3: bit 0. F4: SDM 4.8.
        unsafe impl Format for $format {
            type Word = u64;
            const NAME: &'static str = $name;
            const LEVELS: &'static [Level] = $levels;
            const MIN_LEVELS: usize = 4;
            const SOFT_BITS: u32 = MODE.soft_bits();
            const PAYLOAD_BITS: u32 = MODE.payload_bits();
            const FRAME_LIMIT: u64 = 1 << 40;
            const TABLE_FRAME_LIMIT: u64 = 1 << 40;
            const ROOT_FRAME_LIMIT: u64 = 1 << 40;
            const CACHES_ABSENT: bool = false;
            const FIXED_TOP: bool = false;

            fn canonical(levels: usize) -> Canonical {
                if levels == 5 {
                    Canonical::X86_57
                } else {
                    Canonical::X86_48
                }
            }

            #[inline(always)]
            fn can_encode(level: usize, frame: Frame, attributes: &Attributes) -> bool {
                MODE.can_encode(level, frame, attributes)
            }

            #[inline(always)]
            fn leaf(level: usize, frame: Frame, attributes: &Attributes) -> u64 {
                MODE.leaf(level, frame, attributes)
            }

            #[inline(always)]
            fn table(_level: usize, frame: Frame) -> u64 {
                frame.start().as_u64() | PRESENT | WRITE | USER
            }

            #[inline(always)]
            fn payload(payload: Payload) -> u64 {
                MODE.payload(payload)
            }

            #[inline(always)]
            fn kind(level: usize, word: u64) -> Kind {
                MODE.kind(level, word)
            }

            #[inline(always)]
            fn table_frame(word: u64) -> Frame {
                MODE.table_frame(word)
            }

            #[inline(always)]
            fn leaf_frame(level: usize, word: u64) -> Frame {
                MODE.leaf_frame(level, word)
            }

            #[inline(always)]
            fn attributes(level: usize, word: u64) -> Attributes {
                MODE.attributes(level, word)
            }

            #[inline(always)]
            fn payload_of(word: u64) -> Payload {
                MODE.payload_of(word)
            }

            #[inline(always)]
            fn is_settled(word: u64) -> bool {
                Mode::is_settled(word)
            }

            #[inline(always)]
            fn rights_patch(_level: usize, rights: Rights) -> Option<(u64, u64)> {
                rights.grants_access().then(|| MODE.rights_patch(rights))
            }

            #[inline(always)]
            fn is_present(_level: usize, word: u64) -> bool {
                word & PRESENT != 0
            }

            #[inline(always)]
            fn relocate(level: usize, template: u64, frame: Frame) -> u64 {
                MODE.relocate(level, template, frame)
            }

            #[inline(always)]
            fn with_rights(level: usize, word: u64, rights: Rights) -> u64 {
                MODE.with_rights(level, word, rights)
            }

            #[inline(always)]
            fn needs_flush(level: usize, old: u64, new: u64) -> bool {
                MODE.needs_flush(level, old, new)
            }

            #[inline(always)]
            fn is_global(_level: usize, word: u64) -> bool {
                Mode::is_global(word)
            }
        }
    };
}

long_mode!(X86_64, "x86-64, four levels", {
    const FOUR: [Level; 4] = [LEVELS[0], LEVELS[1], LEVELS[2], LEVELS[3]];
    &FOUR
});
long_mode!(X86_64La57, "x86-64, five levels", &LEVELS);
