//! Two levels with PSE-36: 4 MiB leaves above 4 GiB in 32-bit tables.
//!
//! ```text
//!   4 MiB leaf   31 ..... 22  21 20 ......... 13  12  11..9  8  7   6 5  4   3   2  1  0
//!                address      0  address 39..32  PAT  soft   G  1   D A PCD PWT  U  W  1
//! ```
//!
//! Tables and 4 KiB leaves stay below 4 GiB: only a huge leaf has the spare bits. As elsewhere, the address bits of a leaf
//! without access are inverted.
//!
//! Does not handle: processors with fewer than 40 physical bits, which reserve the bits that they do not have; give such a
//! machine no frames above.
//!
//! Source: Intel SDM volume 3A, 4.3 and table 4-4.

use kmem_hal::{Canonical, Frame};

use super::two_level::{MODE, X86TwoLevel};
use super::x86::{Mode, PRESENT, by_mode};
use super::{Format, Kind, Level};
use crate::attributes::{Attributes, Payload, Rights};

/// Where a 4 MiB leaf has bits 39..32 of its address.
const HIGH_SHIFT: u32 = 13;
const HIGH_BITS: u64 = 0xff;

/// The bits of a level-2 leaf that carry the high part of the address.
#[inline(always)]
const fn high_bits(frame: Frame) -> u64 {
    (frame.number() >> 20 & HIGH_BITS) << HIGH_SHIFT
}

/// 32-bit addresses through two levels: leaves of 4 KiB below 4 GiB, and of 4 MiB below 1 TiB.
#[derive(Clone, Copy, Debug)]
pub struct X86Pse36;

// SAFETY: F1 to F4 as for `X86TwoLevel`; the high address bits of a level-2 leaf lie where that format has zeros (or ones
// where they are inverted), and tell no kinds apart.
unsafe impl Format for X86Pse36 {
    type Word = u32;
    const NAME: &'static str = "x86, two levels, PSE-36";
    const LEVELS: &'static [Level] = X86TwoLevel::LEVELS;
    const MIN_LEVELS: usize = 2;
    const SOFT_BITS: u32 = X86TwoLevel::SOFT_BITS;
    const PAYLOAD_BITS: u32 = X86TwoLevel::PAYLOAD_BITS;
    const FRAME_LIMIT: u64 = 1 << 28;
    const TABLE_FRAME_LIMIT: u64 = 1 << 20;
    const ROOT_FRAME_LIMIT: u64 = 1 << 20;
    const CACHES_ABSENT: bool = false;
    const FIXED_TOP: bool = false;

    fn canonical(levels: usize) -> Canonical {
        X86TwoLevel::canonical(levels)
    }

    #[inline(always)]
    fn table(level: usize, frame: Frame) -> u64 {
        X86TwoLevel::table(level, frame)
    }

    #[inline(always)]
    fn can_encode(level: usize, frame: Frame, attributes: &Attributes) -> bool {
        let low = Frame::from_number(frame.number() & 0xf_ffff);
        let low = if level == 2 { low } else { frame };
        frame.number() < Self::FRAME_LIMIT && MODE.can_encode(level, low, attributes)
    }

    #[inline(always)]
    fn leaf(level: usize, frame: Frame, attributes: &Attributes) -> u64 {
        let low = Frame::from_number(frame.number() & 0xf_ffff);
        let word = MODE.leaf(level, low, attributes);
        if level == 1 {
            word
        } else if word & PRESENT != 0 {
            word | high_bits(frame)
        } else {
            word | HIGH_BITS << HIGH_SHIFT & !high_bits(frame)
        }
    }

    #[inline(always)]
    fn leaf_frame(level: usize, word: u64) -> Frame {
        let low = MODE.leaf_frame(level, word).number();
        if level == 1 {
            return Frame::from_number(low);
        }
        let address = if word & PRESENT != 0 { word } else { !word };
        Frame::from_number(low | (address >> HIGH_SHIFT & HIGH_BITS) << 20)
    }

    #[inline(always)]
    fn relocate(level: usize, template: u64, frame: Frame) -> u64 {
        let low = Frame::from_number(frame.number() & 0xf_ffff);
        let word = MODE.relocate(level, template, low);
        if level == 1 {
            word
        } else {
            word ^ high_bits(frame)
        }
    }

    #[inline(always)]
    fn with_rights(level: usize, word: u64, rights: Rights) -> u64 {
        if word & PRESENT != 0 && rights.grants_access() {
            return MODE.with_rights(level, word, rights);
        }
        let attributes = MODE.attributes(level, word).rights(rights);
        Self::leaf(level, Self::leaf_frame(level, word), &attributes)
    }

    by_mode!(@words MODE);
}
