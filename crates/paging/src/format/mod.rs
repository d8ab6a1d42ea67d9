//! Page-table formats: how entries are written, for one processor mode each.
//!
//! A format is a type with constants and pure functions on words. The logic of this crate is generic over it,
//! so a walk over four levels compiles to the four loads that a hand-written one would do.
//!
//! Levels count from the leaves. Linux counts from the root: its generic code always goes through five names, PGD, P4D, PUD,
//! PMD and PTE, and a machine with fewer levels *folds* the upper or middle ones: the folded level has one entry, which is
//! the entry of the level above, and costs nothing. Here nothing is folded: a table of `n` levels has the levels 1 to `n`, and
//! [`PageTable::with_levels`](crate::PageTable::with_levels) chooses `n` at run time.
//!
//! | level | here covers | x86-64 | LA57 | PAE | two-level | Sv39, Sv48, Sv57 | AArch64 (levels 4, 3) |
//! |---|---|---|---|---|---|---|---|
//! | 5 | 256 TiB | - | PML5E | - | - | -, -, leaf | - |
//! | 4 | 512 GiB | PML4E | PML4E | - | - | -, leaf, leaf | level 0, - |
//! | 3 | 1 GiB | PDPTE, leaf | same | PDPTE (4 entries) | - | leaf | level 1, leaf |
//! | 2 | 2 or 4 MiB | PDE, leaf | same | PDE, leaf | PDE, leaf (4 MiB) | leaf | level 2, leaf |
//! | 1 | 4 KiB | PTE | PTE | PTE | PTE | leaf | level 3 |
//!
//! The same levels under Linux's names (include/asm-generic/pgtable-nop4d.h, -nopud.h, -nopmd.h):
//!
//! | levels | 5 | 4 | 3 | 2 | 1 | folded in Linux |
//! |---|---|---|---|---|---|---|
//! | 5: LA57, Sv57 | PGD | P4D | PUD | PMD | PTE | nothing |
//! | 4: x86-64, Sv48, AArch64 with 48 bits | - | PGD | PUD | PMD | PTE | P4D into PGD |
//! | 3: Sv39, AArch64 with 39 bits, PAE | - | - | PGD | PMD | PTE | P4D and PUD into PGD |
//! | 2: two-level x86 | - | - | - | PGD | PTE | P4D, PUD and PMD into PGD |
//!
//! So `pgd_offset` is the index at the top level, whatever its number; `pmd_leaf` is a leaf of level 2; `pud_leaf` one of level 3.
//!
//! Invariants that every format keeps (the contract of [`Format`])
//! - `F1`: the word 0 is an empty entry at every level, and no other word is.
//! - `F2`: [`Format::leaf`], [`Format::table`] and [`Format::payload`] give words of pairwise different
//!   [`Kind`]s, and the reading functions invert them; leaves where [`Format::can_encode`] allows them: with given attributes
//!   all aligned frames below some limit, or none. So whether a large leaf can be said in parts is asked of the highest part alone.
//! - `F3`: a word whose kind is `Empty` or `Payload`, or a leaf whose rights grant no access, is not present to
//!   the hardware.
//! - `F4`: the hardware writes a word only where [`Format::is_settled`] is false for it, and then it only sets the
//!   accessed bit, or the dirty bit of a writable leaf.
//! - `F5`: level 1 covers single pages, each level above what a table below it covers, and a table fits in a frame. Looked at when the
//!   crate is compiled for the format.
//!
//! What a processor may lack is the caller's to know, and to leave out; a format says the same on all (record 010 has the reasons):
//!
//! | lacks | leave out |
//! |---|---|
//! | LA57 | the fifth level: `with_levels(env, 4)` |
//! | 1 GiB leaves; PSE | orders above 2 MiB; all huge leaves: the `largest` of [`map_divided`](crate::Cursor::map_divided) and `map_frames` |
//! | PGE, PKU; PCID, INVPCID | nothing: the bits are ignored; `X86Tlb::enable` asks |
//! | physical bits | frames above what it has |
//! | NX | x86-64 and PAE altogether: bit 63 is reserved there. [`X86TwoLevel`] has none |
//! | Svpbmt | every memory type but write-back |
//!
//! Does not handle: two spaces of different formats that share tables.

mod aarch64;
mod absent;
mod keys;
mod pae;
mod pse36;
mod riscv;
mod two_level;
mod word;
mod x86;
mod x86_64;

pub use aarch64::{AARCH64_MAIR, Aarch64};
pub use keys::ProtectionKey;
pub use pae::X86Pae;
pub use pse36::X86Pse36;
pub use riscv::{RiscvSv39, RiscvSv48, RiscvSv57};
pub use two_level::X86TwoLevel;
pub use word::Word;
pub use x86::X86_PAT;
pub use x86_64::{X86_64, X86_64La57};

use kmem_hal::{Canonical, Frame, Order, PAGE_SIZE};

use crate::attributes::{Attributes, Payload, Rights};
use crate::table::MAX_LEVELS;

/// One level of a format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    /// log2 of the pages that one entry covers.
    pub shift: u32,
    /// log2 of the entries in a table.
    pub bits: u32,
    /// Whether an entry may be a leaf.
    pub leaf: bool,
}

impl Level {
    /// A level whose entries cover `1 << shift` pages each, in tables of `1 << bits` entries.
    #[must_use]
    pub const fn new(shift: u32, bits: u32, leaf: bool) -> Self {
        Self { shift, bits, leaf }
    }

    /// Entries in a table of this level.
    #[must_use]
    pub const fn entries(self) -> usize {
        1 << self.bits
    }

    /// The order of a leaf of this level.
    #[must_use]
    pub const fn order(self) -> Order {
        match Order::new(self.shift as u8) {
            Some(order) => order,
            None => Order::MAX,
        }
    }
}

/// What a word is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing.
    Empty,
    /// No frame, but something of the owner's.
    Payload,
    /// A mapped block, accessible or not.
    Leaf,
    /// A table of the next lower level.
    Table,
}

/// A change of present leaves that is the same for all of them: bits to keep, and bits to set. What the hardware writes is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patch {
    /// Bits that stay as they are.
    pub keep: u64,
    /// Bits that are set.
    pub set: u64,
    /// A leaf that has one of these must be flushed: it loses a bit that CPUs rely on.
    pub lost: u64,
    /// A leaf that lacks one of these must be flushed: it gets a bit that forbids something.
    pub gained: u64,
}

impl Patch {
    /// The word after the change.
    #[inline(always)]
    #[must_use]
    pub const fn apply(self, word: u64) -> u64 {
        word & self.keep | self.set
    }

    /// Whether some leaf among those whose words have this union and this intersection must be flushed.
    #[inline(always)]
    #[must_use]
    pub const fn needs_flush(self, union: u64, common: u64) -> bool {
        union & self.lost | !common & self.gained != 0
    }
}

/// How one processor mode writes its page tables. Words travel as `u64` whatever their size in memory.
///
/// # Safety
///
/// The implementer promises `F1` to `F5` of the [module](self), and that the words mean to the hardware what the
/// functions say.
pub unsafe trait Format: Copy + Send + Sync + core::fmt::Debug + 'static {
    /// The word in memory.
    type Word: Word;
    /// For people.
    const NAME: &'static str;
    /// The levels; index 0 is level 1, the leaf tables.
    const LEVELS: &'static [Level];
    /// The fewest levels that the format can be used with (the top ones are left away).
    const MIN_LEVELS: usize;
    /// Software bits in a leaf.
    const SOFT_BITS: u32;
    /// Bits of a [`Payload`].
    const PAYLOAD_BITS: u32;
    /// How many protection keys a leaf can name, key 0 included; 1 where the format has none.
    const PROTECTION_KEYS: u8 = 1;
    /// Leaves can name frames below this number.
    const FRAME_LIMIT: u64;
    /// Tables must lie in frames below this number.
    const TABLE_FRAME_LIMIT: u64;
    /// The root must lie in a frame below this number.
    const ROOT_FRAME_LIMIT: u64;
    /// Whether the hardware may remember that an entry was not present (RISC-V without Svvptc): then filling a
    /// hole and raising a right need a flush too.
    const CACHES_ABSENT: bool;
    /// Whether CPUs must be told of a right, or of an accessed or dirty bit, that a leaf gets: they may go on refusing by what they remember.
    const TELLS_GAINS: bool = Self::CACHES_ABSENT;
    /// Whether the processor reads the top entries only when the root is loaded (PAE): then they are filled when the
    /// table is made and never change.
    const FIXED_TOP: bool;

    /// Which addresses a table of `levels` levels translates.
    fn canonical(levels: usize) -> Canonical;

    /// Whether a leaf of `level` can say this of `frame`; if so, it can say it of every lower frame with the alignment of the level (`F2`).
    fn can_encode(level: usize, frame: Frame, attributes: &Attributes) -> bool;

    /// A leaf in a table of `level`. Meaningful where [`can_encode`](Self::can_encode) holds.
    fn leaf(level: usize, frame: Frame, attributes: &Attributes) -> u64;

    /// An entry of a table of `level` that points to a table of `level - 1`. As permissive as can be: leaves decide.
    fn table(level: usize, frame: Frame) -> u64;

    /// An entry that points to a table, with the right to write taken away from everything below: the table is shared with another
    /// space. `None` where the format cannot say so at this level, whatever the word; then tables are copied.
    ///
    /// Nothing is shared in a format that [tells gains](Self::TELLS_GAINS), as the right comes back without a word to anybody; nor a table whose
    /// copy could not say that it shares those below it.
    #[inline(always)]
    fn shared_table(level: usize, word: u64) -> Option<u64> {
        let _ = (level, word);
        None
    }

    /// Whether [`shared_table`](Self::shared_table) made this entry of kind `Table`.
    #[inline(always)]
    fn is_shared_table(level: usize, word: u64) -> bool {
        let _ = (level, word);
        false
    }

    /// Undoes [`shared_table`](Self::shared_table).
    #[inline(always)]
    fn own_table(level: usize, word: u64) -> u64 {
        let _ = level;
        word
    }

    /// A leaf without the right to write, all else as it is.
    #[inline(always)]
    fn write_protected(level: usize, word: u64) -> u64 {
        let rights = Self::attributes(level, word).rights;
        Self::with_rights(level, word, rights.difference(Rights::WRITE))
    }

    /// A word that is not present and carries `payload`.
    fn payload(payload: Payload) -> u64;

    /// What a word in a table of `level` is.
    fn kind(level: usize, word: u64) -> Kind;

    /// Whether a word in a table of `level` is of kind `Table`.
    #[inline(always)]
    fn is_table(level: usize, word: u64) -> bool {
        level > 1 && Self::kind(level, word) == Kind::Table
    }

    /// The table that an entry of kind `Table` points to.
    fn table_frame(word: u64) -> Frame;

    /// What is left of the rights that a leaf grants, below an entry of kind `Table` in a table of `level`.
    ///
    /// All of them below what [`table`](Self::table) makes, and in formats whose upper entries say nothing of rights: for tables that
    /// somebody else made.
    #[inline(always)]
    fn rights_below(level: usize, word: u64, rights: Rights) -> Rights {
        let _ = (level, word);
        rights
    }

    /// The first frame of a leaf.
    fn leaf_frame(level: usize, word: u64) -> Frame;

    /// The attributes of a leaf.
    fn attributes(level: usize, word: u64) -> Attributes;

    /// The payload of an entry of kind `Payload`.
    fn payload_of(word: u64) -> Payload;

    /// Whether the hardware has nothing left to write into this word (`F4`), so that whoever holds the table's lock
    /// may change it by a plain store.
    fn is_settled(word: u64) -> bool;

    /// A leaf made by [`leaf`](Self::leaf) for frame 0, for another frame.
    #[inline(always)]
    fn relocate(level: usize, template: u64, frame: Frame) -> u64 {
        Self::leaf(level, frame, &Self::attributes(level, template))
    }

    /// A leaf with other rights and all else as it is; rights that cannot be expressed are widened.
    #[inline(always)]
    fn with_rights(level: usize, word: u64, rights: Rights) -> u64 {
        let attributes = Self::attributes(level, word).rights(rights);
        Self::leaf(level, Self::leaf_frame(level, word), &attributes)
    }

    /// A leaf with other rights that was accessed, with `dirty` written to as well, and all else as it is.
    #[inline(always)]
    fn touched(level: usize, word: u64, rights: Rights, dirty: bool) -> u64 {
        let mut attributes = Self::attributes(level, word).rights(rights).accessed();
        attributes.dirty |= dirty;
        Self::leaf(level, Self::leaf_frame(level, word), &attributes)
    }

    /// What gives present leaves of `level` these rights, where that takes no more than bits.
    #[inline(always)]
    fn rights_patch(level: usize, rights: Rights) -> Option<Patch> {
        let _ = (level, rights);
        None
    }

    /// Whether the hardware sees the word as present.
    #[inline(always)]
    fn is_present(level: usize, word: u64) -> bool {
        match Self::kind(level, word) {
            Kind::Empty | Kind::Payload => false,
            Kind::Table => true,
            Kind::Leaf => Self::attributes(level, word).rights.grants_access(),
        }
    }

    /// Whether a CPU that remembers the leaf `old` may go on in a way that `new`, of the same frame, forbids, or lose a
    /// dirty bit; whether it remembers it under a tag, where a flush of `new`, which is global, does not look; or, where absent entries are
    /// remembered, whether it may refuse what `new` allows, for a right or for an accessed or dirty bit that `old` lacks.
    #[inline(always)]
    fn needs_flush(level: usize, old: u64, new: u64) -> bool {
        let (old, new) = (Self::attributes(level, old), Self::attributes(level, new));
        if !old.rights.grants_access() {
            return Self::CACHES_ABSENT && new.rights.grants_access();
        }
        !old.rights.difference(new.rights).is_empty()
            || old.memory_type != new.memory_type
            || old.pkey != new.pkey
            || old.dirty && !new.dirty
            || new.rights.difference(old.rights).contains(Rights::GLOBAL)
            || Self::CACHES_ABSENT
                && (old.rights != new.rights
                    || new.accessed && !old.accessed
                    || new.dirty && !old.dirty)
    }

    /// Whether a leaf is global.
    #[inline(always)]
    fn is_global(level: usize, word: u64) -> bool {
        Self::attributes(level, word)
            .rights
            .contains(Rights::GLOBAL)
    }

    /// What `attributes` become when they pass through a leaf of this format: rights widened to what it can express.
    #[must_use]
    fn expressible(level: usize, attributes: &Attributes) -> Attributes {
        Self::attributes(level, Self::leaf(level, Frame::ZERO, attributes))
    }
}

/// Whether the levels of a format fit together (`F5`), with words of so many bytes.
pub(crate) const fn is_sound(levels: &[Level], least: usize, word: usize) -> bool {
    let mut covered = 0;
    let mut number = 0;
    while number < levels.len() {
        let Level { shift, bits, .. } = levels[number];
        if shift != covered || bits >= 16 || word << bits > PAGE_SIZE as usize {
            return false;
        }
        covered += bits;
        number += 1;
    }
    1 <= least && least <= levels.len() && levels.len() <= MAX_LEVELS
}

const _: () = {
    assert!(is_sound(X86_64::LEVELS, 4, 8));
    assert!(!is_sound(X86_64::LEVELS, 0, 8) && !is_sound(X86_64::LEVELS, 5, 8));
    assert!(!is_sound(X86TwoLevel::LEVELS, 2, 8), "tables of two frames");
    assert!(!is_sound(&[Level::new(1, 9, true)], 1, 8));
    let gap = [Level::new(0, 9, true), Level::new(10, 9, true)];
    assert!(!is_sound(&gap, 2, 8));
};

/// The level with this number, 1 for leaf tables.
#[inline(always)]
pub(crate) const fn level<F: Format>(number: usize) -> Level {
    F::LEVELS[number - 1]
}

/// The level whose leaves have this order; `None` where there is none among the lowest `levels`.
#[inline(always)]
pub(crate) fn leaf_level<F: Format>(levels: usize, order: Order) -> Option<usize> {
    (1..=levels).find(|&number| {
        let level = level::<F>(number);
        level.leaf && level.shift == u32::from(order.get())
    })
}
