//! x86-64: four levels, or five with LA57.
//!
//! Source: Intel SDM volume 3A, 4.5 and tables 4-14 to 4-20.

use kmem_hal::{Canonical, Frame};

use super::x86::{ACCESSED, DIRTY, Mode, PRESENT, USER, WRITE, by_mode};
use super::{Format, Kind, Level};
use crate::attributes::{Attributes, Payload, Rights};

const MODE: Mode = Mode {
    address: 0x000f_ffff_ffff_f000,
    no_execute: true,
    levels_with_rights: 5,
    high_soft_bits: 7,
    keys: true,
    leaf_shift: [0, 0, 9, 18],
    payload_low_bits: 40,
    payload_high_shift: 52,
    payload_high_bits: 8,
};

const LEVELS: [Level; 5] = [
    Level::new(0, 9, true),
    Level::new(9, 9, true),
    Level::new(18, 9, true),
    Level::new(27, 9, false),
    Level::new(36, 9, false),
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
            const PROTECTION_KEYS: u8 = 16;
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
            fn shared_table(_level: usize, word: u64) -> Option<u64> {
                Some(word & !WRITE)
            }

            #[inline(always)]
            fn is_shared_table(_level: usize, word: u64) -> bool {
                word & WRITE == 0
            }

            #[inline(always)]
            fn own_table(_level: usize, word: u64) -> u64 {
                word | WRITE
            }

            #[inline(always)]
            fn write_protected(_level: usize, word: u64) -> u64 {
                if word & PRESENT == 0 {
                    word
                } else {
                    word & !WRITE
                }
            }

            #[inline(always)]
            fn table(_level: usize, frame: Frame) -> u64 {
                // With A set the processor has nothing to write into it; D means nothing here, and says so to `is_settled`.
                frame.start().as_u64() | PRESENT | WRITE | USER | ACCESSED | DIRTY
            }

            by_mode!(MODE);
        }
    };
}

long_mode!(X86_64, "x86-64, four levels", {
    const FOUR: [Level; 4] = [LEVELS[0], LEVELS[1], LEVELS[2], LEVELS[3]];
    &FOUR
});
long_mode!(X86_64La57, "x86-64, five levels", &LEVELS);
