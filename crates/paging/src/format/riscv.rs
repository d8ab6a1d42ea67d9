//! RISC-V: Sv39, Sv48 and Sv57 with page-based memory types (Svpbmt).
//!
//! ```text
//!   leaf        63 62..61 60..54 53 ........ 10 9..8 7 6 5 4 3 2 1 0
//!               0   PBMT    0      frame        soft D A G U X W R 1     one of R, W, X set
//!   table       0     0     0      frame          0  0 0 0 0 0 0 0 1
//!   no access   0   PBMT    0      frame        soft D A G 0 0 0 1 0
//!   payload     63 ....................... 10     0  0 0 0 0 0 1 0 0
//! ```
//!
//! Every level may hold leaves. Two software bits. The hardware may remember that an entry was not valid (unless Svvptc
//! promises otherwise), so filling a hole and adding a right flush as well. Accessed and dirty bits are treated as if the
//! hardware set them (Svadu). Where it traps instead (Svade), a CPU may go on with the entry that lacked the bit, so setting one by hand
//! flushes too.
//!
//! Does not handle: contiguous leaves (Svnapot), processors without Svpbmt for any type but write-back, write-through.
//! Not run on hardware.
//!
//! Source: The RISC-V Instruction Set Manual volume II, 12.3 to 12.6 (Sv32 to Sv57), 13 (Svnapot), 14 (Svpbmt).

use kmem_hal::{Canonical, Frame};

use super::absent::{self, NO_ACCESS, PAYLOAD};
use super::{Format, Kind, Level};
use crate::attributes::{Attributes, MemoryType, Payload, Rights, Soft};

const VALID: u64 = 1 << 0;
const READ: u64 = 1 << 1;
const WRITE: u64 = 1 << 2;
const EXECUTE: u64 = 1 << 3;
const USER: u64 = 1 << 4;
const GLOBAL: u64 = 1 << 5;
const ACCESSED: u64 = 1 << 6;
const DIRTY: u64 = 1 << 7;
const SOFT_SHIFT: u32 = 8;
const SOFT_BITS: u32 = 2;
const FRAME_SHIFT: u32 = 10;
const FRAME_BITS: u32 = 44;
const FRAME_MASK: u64 = (1 << FRAME_BITS) - 1;
const PBMT_NON_CACHEABLE: u64 = 1 << 61;
const PBMT_IO: u64 = 2 << 61;
const PBMT: u64 = 3 << 61;

const LEVELS: [Level; 5] = [
    Level::new(0, 9, true),
    Level::new(9, 9, true),
    Level::new(18, 9, true),
    Level::new(27, 9, true),
    Level::new(36, 9, true),
];

fn leaf(frame: Frame, attributes: &Attributes) -> u64 {
    let rights = attributes.rights;
    let mut word = frame.number() << FRAME_SHIFT;
    word |= u64::from(attributes.soft.bits()) << SOFT_SHIFT;
    word |= match attributes.memory_type {
        MemoryType::WriteBack | MemoryType::WriteThrough => 0,
        MemoryType::WriteCombining => PBMT_NON_CACHEABLE,
        MemoryType::Uncached => PBMT_IO,
    };
    if attributes.accessed {
        word |= ACCESSED;
    }
    if attributes.dirty {
        word |= DIRTY;
    }
    if rights.contains(Rights::GLOBAL) {
        word |= GLOBAL;
    }
    if !rights.grants_access() {
        return word | NO_ACCESS;
    }
    word |= VALID;
    if rights.contains(Rights::READ) {
        word |= READ;
    }
    if rights.contains(Rights::WRITE) {
        // Writing without reading is a reserved encoding.
        word |= READ | WRITE;
    }
    if rights.contains(Rights::EXECUTE) {
        word |= EXECUTE;
    }
    if rights.contains(Rights::USER) {
        word |= USER;
    }
    word
}

fn attributes(word: u64) -> Attributes {
    let mut rights = Rights::empty();
    if word & VALID != 0 {
        for (bit, right) in [
            (READ, Rights::READ),
            (WRITE, Rights::WRITE),
            (EXECUTE, Rights::EXECUTE),
            (USER, Rights::USER),
        ] {
            if word & bit != 0 {
                rights |= right;
            }
        }
    }
    if word & GLOBAL != 0 {
        rights |= Rights::GLOBAL;
    }
    Attributes {
        rights,
        memory_type: match word & PBMT {
            PBMT_NON_CACHEABLE => MemoryType::WriteCombining,
            PBMT_IO => MemoryType::Uncached,
            _ => MemoryType::WriteBack,
        },
        soft: Soft::from_bits((word >> SOFT_SHIFT & ((1 << SOFT_BITS) - 1)) as u16),
        pkey: 0,
        accessed: word & ACCESSED != 0,
        dirty: word & DIRTY != 0,
    }
}

macro_rules! riscv {
    ($(#[$meta:meta])* $format:ident, $name:literal, $count:literal, $canonical:expr, $levels:expr) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug)]
        pub struct $format;

        // SAFETY: F1: every constructor sets one of the bits 0 to 2. F2: valid words are leaves where R, W or X is set and tables
        // where none is; of the others, bit 1 tells leaves from payloads. F3: bit 0. F4: volume II, 12.3.1.
        unsafe impl Format for $format {
            type Word = u64;
            const NAME: &'static str = $name;
            const LEVELS: &'static [Level] = $levels;
            const MIN_LEVELS: usize = $count;
            const SOFT_BITS: u32 = SOFT_BITS;
            const PAYLOAD_BITS: u32 = 64 - FRAME_SHIFT;
            const FRAME_LIMIT: u64 = 1 << FRAME_BITS;
            const TABLE_FRAME_LIMIT: u64 = 1 << FRAME_BITS;
            const ROOT_FRAME_LIMIT: u64 = 1 << FRAME_BITS;
            const CACHES_ABSENT: bool = true;
            const FIXED_TOP: bool = false;

            fn canonical(_levels: usize) -> Canonical {
                $canonical
            }

            fn can_encode(level: usize, frame: Frame, attributes: &Attributes) -> bool {
                frame.number() <= FRAME_MASK
                    && frame.is_aligned(LEVELS[level - 1].order())
                    && attributes.soft.bits() >> SOFT_BITS == 0
                    && attributes.pkey == 0
                    && attributes.memory_type != MemoryType::WriteThrough
            }

            fn leaf(_level: usize, frame: Frame, attributes: &Attributes) -> u64 {
                leaf(frame, attributes)
            }

            fn table(_level: usize, frame: Frame) -> u64 {
                frame.number() << FRAME_SHIFT | VALID
            }

            fn payload(payload: Payload) -> u64 {
                payload.number() << FRAME_SHIFT | PAYLOAD
            }

            #[inline(always)]
            fn kind(_level: usize, word: u64) -> Kind {
                if word & VALID != 0 {
                    if word & (READ | WRITE | EXECUTE) == 0 {
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
                Frame::from_number(word >> FRAME_SHIFT & FRAME_MASK)
            }

            #[inline(always)]
            fn leaf_frame(_level: usize, word: u64) -> Frame {
                Frame::from_number(word >> FRAME_SHIFT & FRAME_MASK)
            }

            fn attributes(_level: usize, word: u64) -> Attributes {
                attributes(word)
            }

            fn payload_of(word: u64) -> Payload {
                Payload::from_number(word >> FRAME_SHIFT)
            }

            #[inline(always)]
            fn is_settled(word: u64) -> bool {
                word & VALID == 0
                    || word & ACCESSED != 0 && (word & DIRTY != 0 || word & WRITE == 0)
            }
        }
    };
}

riscv!(
    /// Three levels, 39-bit addresses: leaves of 4 KiB, 2 MiB and 1 GiB.
    RiscvSv39,
    "RISC-V Sv39",
    3,
    Canonical::SV39,
    {
        const THREE: [Level; 3] = [LEVELS[0], LEVELS[1], LEVELS[2]];
        &THREE
    }
);
riscv!(
    /// Four levels, 48-bit addresses: leaves up to 512 GiB.
    RiscvSv48,
    "RISC-V Sv48",
    4,
    Canonical::SV48,
    {
        const FOUR: [Level; 4] = [LEVELS[0], LEVELS[1], LEVELS[2], LEVELS[3]];
        &FOUR
    }
);
riscv!(
    /// Five levels, 57-bit addresses: leaves up to 256 TiB.
    RiscvSv57,
    "RISC-V Sv57",
    5,
    Canonical::SV57,
    &LEVELS
);
