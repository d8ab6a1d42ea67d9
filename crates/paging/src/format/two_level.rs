//! The 80386's two levels of 32-bit entries, with the Pentium's 4 MiB leaves (PSE).
//!
//! No NX, no protection keys, three software bits, frames below 4 GiB. A payload has 28 bits: 20 where the address
//! would be, 8 above the bits that tell the kinds apart.
//!
//! Does not handle: PSE-36 (4 MiB leaves above 4 GiB).
//!
//! Source: Intel SDM volume 3A, 4.3 and tables 4-3 to 4-6.

use kmem_hal::{Canonical, Frame};

use super::x86::{Mode, PRESENT, USER, WRITE};
use super::{Format, Kind, Level};
use crate::attributes::{Attributes, Payload, Rights};

const MODE: Mode = Mode {
    address: 0xffff_f000,
    no_execute: false,
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
    const LEVELS: &'static [Level] = &[
        Level {
            shift: 0,
            bits: 10,
            leaf: true,
        },
        Level {
            shift: 10,
            bits: 10,
            leaf: true,
        },
    ];
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
