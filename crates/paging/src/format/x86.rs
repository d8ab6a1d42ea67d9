//! The bits that all x86 modes share, and how a word that is not present is used.
//!
//! ```text
//!   present leaf   63 62..59  58..52 51 ........... 12 11..9  8  7   6 5  4   3   2  1  0
//!                  NX  pkey   soft   address           soft   G PAT  D A PCD PWT  U  W  1     level 1
//!                                               12=PAT          PS=1                          above
//!   no access      NX  pkey   soft   ~address          soft   G PAT  D A PCD PWT  0  1  0
//!   payload        0 ....... payload ~payload               0 ................ 0  1  0  0
//!                  60..... 52 = bits 40.. of the payload; 51..12 = its low 40 bits, inverted
//! ```
//!
//! The address bits of words that are not present are inverted, so that a processor that speculates through such a
//! word (L1TF) looks at addresses at the top of its physical space, where no memory is.
//!
//! Source: Intel SDM volume 3A, 4.3 to 4.6 and tables 4-5 to 4-20; L1TF: Linux Documentation/admin-guide/hw-vuln/l1tf.rst.

use kmem_hal::Frame;

use super::absent::{self, NO_ACCESS, PAYLOAD};
use super::{Kind, Patch};
use crate::attributes::{Attributes, MemoryType, Payload, Rights, Soft};
use crate::mutants::mutant;

pub(super) const PRESENT: u64 = 1 << 0;
pub(super) const WRITE: u64 = 1 << 1;
pub(super) const USER: u64 = 1 << 2;
const PWT: u64 = 1 << 3;
const PCD: u64 = 1 << 4;
pub(super) const ACCESSED: u64 = 1 << 5;
pub(super) const DIRTY: u64 = 1 << 6;
const PAGE_SIZE: u64 = 1 << 7;
const PAT_SMALL: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
const SOFT_LOW_SHIFT: u32 = 9;
const SOFT_LOW_BITS: u32 = 3;
const PAT_LARGE: u64 = 1 << 12;
const SOFT_HIGH_SHIFT: u32 = 52;
const PKEY_SHIFT: u32 = 59;
const NO_EXECUTE: u64 = 1 << 63;

/// The value of the PAT register (MSR 0x277) under which all four memory types mean what they say.
///
/// It differs from the value after reset in entry 5 alone: write combining instead of write through. A kernel that
/// leaves the register alone gets write through for write combining, which is correct and slower.
#[doc(alias = "IA32_PAT")]
pub const X86_PAT: u64 = 0x0007_0106_0007_0406;

/// What differs between the modes.
#[derive(Clone, Copy)]
pub(super) struct Mode {
    /// The address bits of a level-1 leaf and of an entry that points to a table.
    pub address: u64,
    /// Bits 52 and above mean something: NX.
    pub no_execute: bool,
    /// The highest level whose entries have W, U and, where there is one, NX.
    pub levels_with_rights: usize,
    /// Software bits above bit 51, and protection keys.
    pub high_soft_bits: u32,
    /// Whether there are protection keys.
    pub keys: bool,
    /// log2 of the pages of a leaf, by level.
    pub leaf_shift: [u32; 4],
    /// Where the low part of a payload ends and where the high part starts and ends.
    pub payload_low_bits: u32,
    /// The lowest bit of the high part of a payload.
    pub payload_high_shift: u32,
    /// Bits of the high part.
    pub payload_high_bits: u32,
}

impl Mode {
    pub const fn soft_bits(self) -> u32 {
        SOFT_LOW_BITS + self.high_soft_bits
    }

    pub const fn payload_bits(self) -> u32 {
        self.payload_low_bits + self.payload_high_bits
    }

    /// The address bits of a leaf of `level`.
    #[inline(always)]
    const fn leaf_address(self, level: usize) -> u64 {
        self.address & !((1 << (12 + self.leaf_shift[level])) - 1)
    }

    #[inline(always)]
    pub fn can_encode(self, level: usize, frame: Frame, attributes: &Attributes) -> bool {
        let address = frame.start().as_u64();
        address & !self.leaf_address(level) == 0
            && attributes.soft.bits() >> self.soft_bits() == 0
            && (attributes.pkey == 0 || self.keys && attributes.pkey < 16)
    }

    #[inline(always)]
    pub fn leaf(self, level: usize, frame: Frame, attributes: &Attributes) -> u64 {
        let rights = attributes.rights;
        let address = frame.start().as_u64() & self.leaf_address(level);
        let mut word = Self::memory_type_bits(level, attributes.memory_type);
        word |= (u64::from(attributes.soft.bits()) & 7) << SOFT_LOW_SHIFT;
        if self.high_soft_bits > 0 {
            let high = u64::from(attributes.soft.bits()) >> SOFT_LOW_BITS;
            word |= (high & ((1 << self.high_soft_bits) - 1)) << SOFT_HIGH_SHIFT;
        }
        if self.keys {
            word |= u64::from(attributes.pkey & 15) << PKEY_SHIFT;
        }
        if self.no_execute && !rights.contains(Rights::EXECUTE) && !mutant!("format-forgets-nx") {
            word |= NO_EXECUTE;
        }
        if rights.contains(Rights::GLOBAL) {
            word |= GLOBAL;
        }
        if attributes.accessed {
            word |= ACCESSED;
        }
        if attributes.dirty && !mutant!("format-loses-dirty") {
            word |= DIRTY;
        }
        if level > 1 || mutant!("format-small-leaf-has-ps") {
            word |= PAGE_SIZE;
        }
        if !rights.grants_access() && !mutant!("format-none-is-present") {
            let address = match mutant!("format-none-names-memory") {
                true => address,
                false => !address,
            };
            return word | NO_ACCESS | (address & self.leaf_address(level));
        }
        if rights.contains(Rights::WRITE) {
            word |= WRITE;
        }
        if rights.contains(Rights::USER) && !mutant!("format-user-forgotten") {
            word |= USER;
        }
        word | PRESENT | address
    }

    /// Moves a leaf of frame 0 to another frame: its address bits are all 0, or all 1 where they are inverted.
    #[inline(always)]
    pub fn relocate(self, level: usize, template: u64, frame: Frame) -> u64 {
        let word = template ^ (frame.start().as_u64() & self.leaf_address(level));
        if mutant!("relocate-drops-a-bit") {
            return word & !(1 << 12);
        }
        word
    }

    /// What an entry that points to a table leaves of a leaf's rights: W and U must be set at every level, NX at none (SDM 4.6.1).
    pub fn rights_below(self, level: usize, word: u64, rights: Rights) -> Rights {
        let mut denied = Rights::empty();
        if level <= self.levels_with_rights {
            denied.set(Rights::WRITE, word & WRITE == 0);
            denied.set(Rights::USER, word & USER == 0);
            denied.set(Rights::EXECUTE, self.no_execute && word & NO_EXECUTE != 0);
        }
        rights.difference(denied)
    }

    /// Exchanges the rights of a leaf.
    #[inline(always)]
    pub fn with_rights(self, level: usize, word: u64, rights: Rights) -> u64 {
        if word & PRESENT == 0 || !rights.grants_access() {
            let attributes = self.attributes(level, word).rights(rights);
            return self.leaf(level, self.leaf_frame(level, word), &attributes);
        }
        self.rights_patch(rights).apply(word)
    }

    /// Exchanges the rights of a leaf and sets its accessed bit, and the dirty bit where asked for. Both have their places in leaves
    /// without access too.
    #[inline(always)]
    pub fn touched(self, level: usize, word: u64, rights: Rights, dirty: bool) -> u64 {
        self.with_rights(level, word, rights) | ACCESSED | if dirty { DIRTY } else { 0 }
    }

    /// What gives present leaves these rights.
    #[inline(always)]
    pub fn rights_patch(self, rights: Rights) -> Patch {
        let mut keep = !(WRITE | USER | GLOBAL);
        let mut set = 0;
        if mutant!("format-protect-keeps-write") {
            keep |= WRITE;
        }
        if mutant!("format-protect-loses-dirty") {
            keep &= !DIRTY;
        }
        if self.no_execute {
            keep &= !NO_EXECUTE;
            if !rights.contains(Rights::EXECUTE) && !mutant!("format-protect-forgets-nx") {
                set |= NO_EXECUTE;
            }
        }
        if rights.contains(Rights::WRITE) {
            set |= WRITE;
        }
        if rights.contains(Rights::USER) {
            set |= USER;
        }
        if rights.contains(Rights::GLOBAL) {
            set |= GLOBAL;
        }
        let (lost, gained) = self.told();
        Patch {
            keep,
            set,
            lost: lost & !keep & !set,
            gained: gained & set,
        }
    }

    /// Bits whose loss a CPU must be told of, and those whose gain.
    #[inline(always)]
    fn told(self) -> (u64, u64) {
        let mut lost = PRESENT | WRITE | USER | DIRTY | GLOBAL;
        if mutant!("flush-not-for-write") {
            lost &= !WRITE;
        }
        if mutant!("flush-not-for-user") {
            lost &= !USER;
        }
        if mutant!("flush-not-for-dirty") {
            lost &= !DIRTY;
        }
        if mutant!("flush-not-for-global") {
            lost &= !GLOBAL;
        }
        // Under SMEP and SMAP a page that becomes the user's is no longer the kernel's to run or touch (SDM 4.10.4.2).
        let mut gained = USER;
        if self.no_execute && !mutant!("flush-not-for-nx") {
            gained |= NO_EXECUTE;
        }
        // What is cached under a tag stays there, where a flush of a global page does not look (SDM 4.10.4.1: INVLPG drops global
        // entries, and those of the current tag).
        if !mutant!("flush-not-for-becoming-global") {
            gained |= GLOBAL;
        }
        (lost, gained)
    }

    /// Bits whose loss, gain or change a CPU must be told of.
    #[inline(always)]
    pub fn needs_flush(self, level: usize, old: u64, new: u64) -> bool {
        if old & PRESENT == 0 {
            return false;
        }
        let pat = if level > 1 { PAT_LARGE } else { PAT_SMALL };
        let mut changed = pat | PCD | PWT;
        if mutant!("flush-not-for-memory-type") {
            changed = 0;
        }
        if self.keys && !mutant!("flush-not-for-key") {
            changed |= 15 << PKEY_SHIFT;
        }
        let (lost, gained) = self.told();
        (old & !new & lost) | ((old ^ new) & changed) | (new & !old & gained) != 0
    }

    #[inline(always)]
    pub fn is_global(word: u64) -> bool {
        word & GLOBAL != 0 && !mutant!("format-global-unseen")
    }

    #[inline(always)]
    fn memory_type_bits(level: usize, memory_type: MemoryType) -> u64 {
        let pat = if level > 1 && !mutant!("format-pat-at-the-small-place") {
            PAT_LARGE
        } else {
            PAT_SMALL
        };
        match memory_type {
            MemoryType::WriteBack => 0,
            MemoryType::WriteThrough => PWT,
            MemoryType::Uncached if mutant!("format-pcd-forgotten") => PWT,
            MemoryType::Uncached => PCD | PWT,
            MemoryType::WriteCombining => pat | PWT,
        }
    }

    #[inline(always)]
    pub fn kind(self, level: usize, word: u64) -> Kind {
        if word & PRESENT != 0 {
            if level == 1 || word & PAGE_SIZE != 0 {
                Kind::Leaf
            } else {
                Kind::Table
            }
        } else {
            absent::kind(word)
        }
    }

    /// Whether a word above level 1 points to a table.
    #[inline(always)]
    pub const fn is_table(word: u64) -> bool {
        word & (PRESENT | PAGE_SIZE) == PRESENT
    }

    #[inline(always)]
    pub fn table_frame(self, word: u64) -> Frame {
        Frame::from_number((word & self.address) >> 12)
    }

    #[inline(always)]
    pub fn leaf_frame(self, level: usize, word: u64) -> Frame {
        let as_it_is = word & PRESENT != 0 || mutant!("format-none-names-memory");
        let address = if as_it_is { word } else { !word };
        Frame::from_number((address & self.leaf_address(level)) >> 12)
    }

    #[inline(always)]
    pub fn attributes(self, level: usize, word: u64) -> Attributes {
        let mut rights = Rights::empty();
        if word & PRESENT != 0 {
            rights |= Rights::READ;
            if word & WRITE != 0 {
                rights |= Rights::WRITE;
            }
            if word & USER != 0 {
                rights |= Rights::USER;
            }
            if !self.no_execute || word & NO_EXECUTE == 0 {
                rights |= Rights::EXECUTE;
            }
        }
        if word & GLOBAL != 0 {
            rights |= Rights::GLOBAL;
        }
        let pat = if level > 1 { PAT_LARGE } else { PAT_SMALL };
        let memory_type = match (word & pat != 0, word & PCD != 0, word & PWT != 0) {
            (true, false, true) => MemoryType::WriteCombining,
            (_, true, _) => MemoryType::Uncached,
            (_, false, true) => MemoryType::WriteThrough,
            (_, false, false) => MemoryType::WriteBack,
        };
        let mut soft = word >> SOFT_LOW_SHIFT & 7;
        if self.high_soft_bits > 0 {
            let high = word >> SOFT_HIGH_SHIFT & ((1 << self.high_soft_bits) - 1);
            soft |= high << SOFT_LOW_BITS;
        }
        Attributes {
            rights,
            memory_type,
            soft: Soft::from_bits(soft as u16),
            pkey: if self.keys {
                (word >> PKEY_SHIFT & 15) as u8
            } else {
                0
            },
            accessed: word & ACCESSED != 0,
            dirty: word & DIRTY != 0,
        }
    }

    #[inline(always)]
    pub fn payload(self, payload: Payload) -> u64 {
        let number = match mutant!("format-payload-names-memory") {
            true => payload.number(),
            false => !payload.number(),
        };
        let low = number & ((1 << self.payload_low_bits) - 1);
        let high = payload.number() >> self.payload_low_bits;
        let payload = if mutant!("format-payload-is-present") {
            PAYLOAD | PRESENT
        } else {
            PAYLOAD
        };
        payload | low << 12 | high << self.payload_high_shift
    }

    #[inline(always)]
    pub fn payload_of(self, word: u64) -> Payload {
        let address = match mutant!("format-payload-names-memory") {
            true => word >> 12,
            false => !(word >> 12),
        };
        let low = address & ((1 << self.payload_low_bits) - 1);
        let high = word >> self.payload_high_shift & ((1 << self.payload_high_bits) - 1);
        Payload::from_number(high << self.payload_low_bits | low)
    }

    /// Nothing is left to write where the word is not present, or where A is set and either D is set too or the page
    /// cannot be written. (Supervisor writes with CR0.WP clear are excluded: kmem runs with WP set.)
    #[inline(always)]
    pub fn is_settled(word: u64) -> bool {
        if mutant!("settled-too-early") {
            return true;
        }
        word & PRESENT == 0 || word & ACCESSED != 0 && (word & DIRTY != 0 || word & WRITE == 0)
    }
}

/// The functions of [`Format`](super::Format) that every x86 mode answers by its [`Mode`] alone.
macro_rules! by_mode {
    ($mode:expr) => {
        by_mode!(@leaves $mode);
        by_mode!(@words $mode);
    };
    (@leaves $mode:expr) => {
        #[inline(always)]
        fn can_encode(level: usize, frame: Frame, attributes: &Attributes) -> bool {
            $mode.can_encode(level, frame, attributes)
        }

        #[inline(always)]
        fn leaf(level: usize, frame: Frame, attributes: &Attributes) -> u64 {
            $mode.leaf(level, frame, attributes)
        }

        #[inline(always)]
        fn leaf_frame(level: usize, word: u64) -> Frame {
            $mode.leaf_frame(level, word)
        }

        #[inline(always)]
        fn relocate(level: usize, template: u64, frame: Frame) -> u64 {
            $mode.relocate(level, template, frame)
        }

        #[inline(always)]
        fn with_rights(level: usize, word: u64, rights: Rights) -> u64 {
            $mode.with_rights(level, word, rights)
        }

        #[inline(always)]
        fn touched(level: usize, word: u64, rights: Rights, dirty: bool) -> u64 {
            $mode.touched(level, word, rights, dirty)
        }
    };
    (@words $mode:expr) => {
        #[inline(always)]
        fn payload(payload: Payload) -> u64 {
            $mode.payload(payload)
        }

        #[inline(always)]
        fn kind(level: usize, word: u64) -> Kind {
            $mode.kind(level, word)
        }

        #[inline(always)]
        fn is_table(level: usize, word: u64) -> bool {
            level > 1 && Mode::is_table(word)
        }

        #[inline(always)]
        fn table_frame(word: u64) -> Frame {
            $mode.table_frame(word)
        }

        #[inline(always)]
        fn rights_below(level: usize, word: u64, rights: Rights) -> Rights {
            $mode.rights_below(level, word, rights)
        }

        #[inline(always)]
        fn attributes(level: usize, word: u64) -> Attributes {
            $mode.attributes(level, word)
        }

        #[inline(always)]
        fn payload_of(word: u64) -> Payload {
            $mode.payload_of(word)
        }

        #[inline(always)]
        fn is_settled(word: u64) -> bool {
            Mode::is_settled(word)
        }

        #[inline(always)]
        fn rights_patch(_level: usize, rights: Rights) -> Option<$crate::format::Patch> {
            rights.grants_access().then(|| $mode.rights_patch(rights))
        }

        #[inline(always)]
        fn is_present(_level: usize, word: u64) -> bool {
            word & PRESENT != 0
        }

        #[inline(always)]
        fn needs_flush(level: usize, old: u64, new: u64) -> bool {
            $mode.needs_flush(level, old, new)
        }

        #[inline(always)]
        fn is_global(_level: usize, word: u64) -> bool {
            Mode::is_global(word)
        }
    };
}
pub(super) use by_mode;
