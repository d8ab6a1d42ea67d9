//! The 80386's two levels of 32-bit entries, with the Pentium's 4 MiB leaves (PSE).
//!
//! No NX, no protection keys, three software bits, frames below 4 GiB. A payload has 28 bits: 20 where the address
//! would be, 8 above the bits that tell the kinds apart.
//!
//! Does not handle: 4 MiB leaves above 4 GiB; [`X86Pse36`](super::X86Pse36) does.
//!
//! Source: Intel SDM volume 3A, 4.3 and tables 4-3 to 4-6.

use kmem_hal::{Canonical, Frame};

use super::x86::{Mode, PRESENT, USER, WRITE, by_mode};
use super::{Format, Kind, Level};
use crate::attributes::{Attributes, Payload, Rights};

pub(super) const MODE: Mode = Mode {
    address: 0xffff_f000,
    no_execute: false,
    levels_with_rights: 2,
    high_soft_bits: 0,
    keys: false,
    leaf_shift: [0, 0, 10, 0],
    payload_low_bits: 20,
    payload_high_shift: 4,
    payload_high_bits: 8,
};

/// 32-bit addresses through two levels: leaves of 4 KiB and 4 MiB.
#[derive(Clone, Copy, Debug)]
pub struct X86TwoLevel;

// SAFETY: F1 to F3 as in long mode: the words are built by the same `Mode` and fit in 32 bits, since the address mask
// does, no bit above 31 is set without NX, keys and high software bits. F4: SDM 4.8.
unsafe impl Format for X86TwoLevel {
    type Word = u32;
    const NAME: &'static str = "x86, two levels";
    const LEVELS: &'static [Level] = &[Level::new(0, 10, true), Level::new(10, 10, true)];
    const MIN_LEVELS: usize = 2;
    const SOFT_BITS: u32 = MODE.soft_bits();
    const PAYLOAD_BITS: u32 = MODE.payload_bits();
    const FRAME_LIMIT: u64 = 1 << 20;
    const TABLE_FRAME_LIMIT: u64 = 1 << 20;
    const ROOT_FRAME_LIMIT: u64 = 1 << 20;
    const CACHES_ABSENT: bool = false;
    const FIXED_TOP: bool = false;

    fn canonical(_levels: usize) -> Canonical {
        Canonical::X86_32
    }

    #[inline(always)]
    fn table(_level: usize, frame: Frame) -> u64 {
        frame.start().as_u64() | PRESENT | WRITE | USER
    }

    by_mode!(MODE);
}
