//! AArch64 stage 1 with 4 KiB pages: four levels for 48-bit addresses, or three for 39-bit ones.
//!
//! ```text
//!   leaf        63..59 58..56 55    54  53  52 51  50 49..48 47 .... 12 11 10 9..8 7   6   5 4..2 1 0
//!               0      soft   dirty UXN PXN 0  DBM 0  0      address    nG AF 11   RO  EL0 0 type x 1   x: 1 at level 1, else 0
//!   table       0 ........................................   address    0 .................... 0  1 1
//!   of others   62: none writes; 61: none of EL0; 60 UXN; 59 PXN: for all below
//!   no access   the same as a leaf, with the rights in ..                                         1 0
//!   payload     63 ................................... 12               0 ................ 1 (bit 2) 0 0
//! ```
//!
//! A leaf that may be written has DBM = 1. The hardware (TCR_EL1.HD) or the kernel's fault handler clears RO on the first
//! write, which is this format's dirty bit; a leaf that may not be written keeps what is known in a software bit, as
//! Linux does. AF is the accessed bit (TCR_EL1.HA), and treated as if the hardware set it, which is right where it traps
//! instead.
//!
//! One root serves both halves of the address space: with T0SZ = T1SZ = 17 (26 for three levels) TTBR0_EL1 is the root
//! and TTBR1_EL1 the root plus 2048, so that the upper half of the root table is the kernel's.
//!
//! Entries that fault are never cached, so filling a hole needs no flush; but a cached right is used until it is dropped,
//! so that adding one needs a flush too (Arm ARM, D8.13).
//!
//! Does not handle: 16 KiB and 64 KiB granules, LPA2, contiguous leaves, stage 2, shadow or guarded pages; break-before-make in two
//! places: a block that is split, on processors without FEAT_BBM level 2, and a leaf that gets another memory type or becomes global, on all. Split a
//! block before it is used; unmap such a leaf and commit before it is mapped again. Replacing and merging break first.
//! Not run on hardware.
//!
//! Source: Arm Architecture Reference Manual for A-profile (DDI 0487), D8.3 (descriptor formats), D8.4 (access control, what tables deny),
//! D8.5 (hardware updates), D8.6 (memory attributes), D8.13 (maintenance).

use kmem_hal::{Canonical, Frame};

use super::absent::{self, NO_ACCESS, PAYLOAD};
use super::{Format, Kind, Level};
use crate::attributes::{Attributes, MemoryType, Payload, Rights, Soft};

const VALID: u64 = 1 << 0;
/// In a valid word: a table above level 1, a page at level 1.
const TABLE_OR_PAGE: u64 = 1 << 1;
const TYPE_SHIFT: u32 = 2;
const TYPE_MASK: u64 = 7 << TYPE_SHIFT;
const EL0: u64 = 1 << 6;
const READ_ONLY: u64 = 1 << 7;
const INNER_SHAREABLE: u64 = 3 << 8;
const ACCESSED: u64 = 1 << 10;
const NOT_GLOBAL: u64 = 1 << 11;
const ADDRESS: u64 = 0x0000_ffff_ffff_f000;
const WRITABLE: u64 = 1 << 51;
const KERNEL_NO_EXECUTE: u64 = 1 << 53;
const USER_NO_EXECUTE: u64 = 1 << 54;
const DIRTY: u64 = 1 << 55;
const SOFT_SHIFT: u32 = 56;
const SOFT_BITS: u32 = 3;

/// In a table's word, for every leaf below: APTable (nobody writes; EL0 has no access), UXNTable, PXNTable.
const BELOW_READ_ONLY: u64 = 1 << 62;
const BELOW_NOT_EL0: u64 = 1 << 61;
const BELOW_USER_NO_EXECUTE: u64 = 1 << 60;
const BELOW_KERNEL_NO_EXECUTE: u64 = 1 << 59;

/// The value of MAIR_EL1 under which the memory types mean what they say: write-back, write-through, Device-nGnRnE,
/// normal non-cacheable.
#[doc(alias = "MAIR_EL1")]
pub const AARCH64_MAIR: u64 = 0x4400_bbff;

const LEVELS: [Level; 4] = [
    Level::new(0, 9, true),
    Level::new(9, 9, true),
    Level::new(18, 9, true),
    Level::new(27, 9, false),
];

/// AArch64, 4 KiB granule: 48-bit addresses through four levels, or 39-bit ones through three; leaves of 4 KiB, 2 MiB and
/// 1 GiB.
#[derive(Clone, Copy, Debug)]
pub struct Aarch64;

const fn type_index(memory_type: MemoryType) -> u64 {
    match memory_type {
        MemoryType::WriteBack => 0,
        MemoryType::WriteThrough => 1,
        MemoryType::Uncached => 2,
        MemoryType::WriteCombining => 3,
    }
}

/// A leaf may have been written: by the hardware's bit where it may be written, else by the software's.
const fn is_dirty(word: u64) -> bool {
    word & DIRTY != 0 || word & WRITABLE != 0 && word & READ_ONLY == 0
}

// SAFETY: F1: every constructor sets one of the bits 0 to 2. F2: valid words are tables where bit 1 is set above level 1, else
// leaves; of the others, bit 1 tells leaves from payloads. F3: bit 0. F4: DDI 0487, D8.5: AF, and RO of a leaf with DBM.
unsafe impl Format for Aarch64 {
    type Word = u64;
    const NAME: &'static str = "AArch64, 4 KiB granule";
    const LEVELS: &'static [Level] = &LEVELS;
    const MIN_LEVELS: usize = 3;
    const SOFT_BITS: u32 = SOFT_BITS;
    const PAYLOAD_BITS: u32 = 52;
    const FRAME_LIMIT: u64 = 1 << 36;
    const TABLE_FRAME_LIMIT: u64 = 1 << 36;
    const ROOT_FRAME_LIMIT: u64 = 1 << 36;
    const CACHES_ABSENT: bool = false;
    const TELLS_GAINS: bool = true;
    const FIXED_TOP: bool = false;

    fn canonical(levels: usize) -> Canonical {
        if levels == 3 {
            Canonical::sign_extended(39)
        } else {
            Canonical::AARCH64_48
        }
    }

    #[inline(always)]
    fn can_encode(level: usize, frame: Frame, attributes: &Attributes) -> bool {
        frame.number() < Self::FRAME_LIMIT
            && frame.is_aligned(LEVELS[level - 1].order())
            && attributes.soft.bits() >> SOFT_BITS == 0
            && attributes.pkey == 0
    }

    #[inline(always)]
    fn leaf(level: usize, frame: Frame, attributes: &Attributes) -> u64 {
        let rights = attributes.rights;
        let mut word = frame.start().as_u64() & ADDRESS;
        word |= type_index(attributes.memory_type) << TYPE_SHIFT | INNER_SHAREABLE;
        word |= u64::from(attributes.soft.bits()) << SOFT_SHIFT;
        if attributes.accessed {
            word |= ACCESSED;
        }
        if !rights.contains(Rights::GLOBAL) {
            word |= NOT_GLOBAL;
        }
        if rights.contains(Rights::WRITE) {
            word |= WRITABLE;
            if !attributes.dirty {
                word |= READ_ONLY;
            }
        } else {
            word |= READ_ONLY;
            if attributes.dirty {
                word |= DIRTY;
            }
        }
        if rights.contains(Rights::USER) {
            word |= EL0;
        }
        // Who executes user code is the user alone.
        let (user, execute) = (
            rights.contains(Rights::USER),
            rights.contains(Rights::EXECUTE),
        );
        if !execute || user {
            word |= KERNEL_NO_EXECUTE;
        }
        if !execute || !user {
            word |= USER_NO_EXECUTE;
        }
        if !rights.grants_access() {
            return word & !EL0 | NO_ACCESS;
        }
        if level == 1 {
            word |= TABLE_OR_PAGE;
        }
        word | VALID
    }

    #[inline(always)]
    fn table(_level: usize, frame: Frame) -> u64 {
        frame.start().as_u64() | TABLE_OR_PAGE | VALID
    }

    #[inline(always)]
    fn payload(payload: Payload) -> u64 {
        payload.number() << 12 | PAYLOAD
    }

    #[inline(always)]
    fn kind(level: usize, word: u64) -> Kind {
        if word & VALID != 0 {
            if level > 1 && word & TABLE_OR_PAGE != 0 {
                Kind::Table
            } else {
                Kind::Leaf
            }
        } else {
            absent::kind(word)
        }
    }

    #[inline(always)]
    fn table_frame(word: u64) -> Frame {
        Frame::from_number((word & ADDRESS) >> 12)
    }

    /// What the hierarchical attributes deny, which TCR_ELx.HPD may turn off. A leaf that the user may no longer touch is not the kernel's to
    /// execute.
    #[inline(always)]
    fn rights_below(_level: usize, word: u64, rights: Rights) -> Rights {
        let user = rights.contains(Rights::USER);
        let no_execute = if user {
            BELOW_USER_NO_EXECUTE | BELOW_NOT_EL0
        } else {
            BELOW_KERNEL_NO_EXECUTE
        };
        let mut denied = Rights::empty();
        denied.set(Rights::WRITE, word & BELOW_READ_ONLY != 0);
        denied.set(Rights::USER, word & BELOW_NOT_EL0 != 0);
        denied.set(Rights::EXECUTE, word & no_execute != 0);
        rights.difference(denied)
    }

    #[inline(always)]
    fn leaf_frame(_level: usize, word: u64) -> Frame {
        Frame::from_number((word & ADDRESS) >> 12)
    }

    #[inline(always)]
    fn attributes(_level: usize, word: u64) -> Attributes {
        let mut rights = Rights::empty();
        if word & VALID != 0 {
            rights |= Rights::READ;
            if word & WRITABLE != 0 {
                rights |= Rights::WRITE;
            }
            if word & EL0 != 0 {
                rights |= Rights::USER;
            }
            if word & (KERNEL_NO_EXECUTE | USER_NO_EXECUTE) != KERNEL_NO_EXECUTE | USER_NO_EXECUTE {
                rights |= Rights::EXECUTE;
            }
        }
        if word & NOT_GLOBAL == 0 {
            rights |= Rights::GLOBAL;
        }
        Attributes {
            rights,
            memory_type: match (word & TYPE_MASK) >> TYPE_SHIFT {
                0 => MemoryType::WriteBack,
                1 => MemoryType::WriteThrough,
                3 => MemoryType::WriteCombining,
                _ => MemoryType::Uncached,
            },
            soft: Soft::from_bits((word >> SOFT_SHIFT & ((1 << SOFT_BITS) - 1)) as u16),
            pkey: 0,
            accessed: word & ACCESSED != 0,
            dirty: is_dirty(word),
        }
    }

    #[inline(always)]
    fn payload_of(word: u64) -> Payload {
        Payload::from_number(word >> 12)
    }

    /// Nothing is left to write where the word is not valid, or where AF is set and RO either is clear or stays.
    #[inline(always)]
    fn is_settled(word: u64) -> bool {
        word & VALID == 0 || word & ACCESSED != 0 && (word & READ_ONLY == 0 || word & WRITABLE == 0)
    }

    #[inline(always)]
    fn is_present(_level: usize, word: u64) -> bool {
        word & VALID != 0
    }

    /// Any change of what a valid leaf allows, AF excepted: a cached right, more or less, is used until it is dropped.
    #[inline(always)]
    fn needs_flush(_level: usize, old: u64, new: u64) -> bool {
        let kept = ACCESSED | ((1 << SOFT_BITS) - 1) << SOFT_SHIFT;
        // What is dirty by the hardware's bit may become dirty by the software's only together with the right to write.
        old & VALID != 0 && (old ^ new) & !kept != 0
    }

    #[inline(always)]
    fn is_global(_level: usize, word: u64) -> bool {
        word & NOT_GLOBAL == 0
    }
}
