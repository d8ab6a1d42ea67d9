//! PAE: three levels of 64-bit entries for 32-bit addresses.
//!
//! The top table has four entries, which the processor reads when CR3 is loaded and at no other time; a kernel that
//! changed one would have to reload CR3 on every CPU. So all four are filled when the table is made (`FIXED_TOP`).
//! Bits 62..52 are reserved in every entry, so there are three software bits.
//!
//! Source: Intel SDM volume 3A, 4.4 and tables 4-7 to 4-11.

use kmem_hal::{Canonical, Frame};

use super::x86::{Mode, PRESENT, USER, WRITE, by_mode};
use super::{Format, Kind, Level};
use crate::attributes::{Attributes, Payload, Rights};
use crate::mutants::mutant;

const MODE: Mode = Mode {
    address: 0x000f_ffff_ffff_f000,
    no_execute: true,
    levels_with_rights: 2,
    high_soft_bits: 0,
    keys: false,
    leaf_shift: [0, 0, 9, 18],
    payload_low_bits: 40,
    payload_high_shift: 52,
    payload_high_bits: 8,
};

/// 32-bit addresses through three levels: leaves of 4 KiB and 2 MiB anywhere in 52 bits of physical memory.
#[derive(Clone, Copy, Debug)]
pub struct X86Pae;

// SAFETY: F1 to F3 as in long mode: the words are built by the same `Mode`; top entries have bit 0 alone. F4: SDM 4.8.
unsafe impl Format for X86Pae {
    type Word = u64;
    const NAME: &'static str = "x86 PAE";
    const LEVELS: &'static [Level] = &[
        Level::new(0, 9, true),
        Level::new(9, 9, true),
        Level::new(18, 2, false),
    ];
    const MIN_LEVELS: usize = 3;
    const SOFT_BITS: u32 = MODE.soft_bits();
    const PAYLOAD_BITS: u32 = MODE.payload_bits();
    const FRAME_LIMIT: u64 = 1 << 40;
    const TABLE_FRAME_LIMIT: u64 = 1 << 40;
    /// CR3 has 32 bits.
    const ROOT_FRAME_LIMIT: u64 = 1 << 20;
    const CACHES_ABSENT: bool = false;
    const FIXED_TOP: bool = true;

    fn canonical(_levels: usize) -> Canonical {
        Canonical::X86_32
    }

    #[inline(always)]
    fn table(level: usize, frame: Frame) -> u64 {
        let address = frame.start().as_u64() | PRESENT;
        // In the four entries at the top the bits W and U are reserved.
        if level == 3 && !mutant!("pae-top-has-w-and-u") {
            address
        } else {
            address | WRITE | USER
        }
    }

    by_mode!(MODE);
}
