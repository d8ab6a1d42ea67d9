//! The processor's bits, typed in from the manual and from nowhere else.
//!
//! Sources: Intel 64 and IA-32 Architectures Software Developer's Manual volume 3A, chapters 2.5 (control
//! registers), 4.2 to 4.6 (paging-structure entries and access rights), 4.7 (page-fault error code) and 6.13;
//! AMD64 Architecture Programmer's Manual volume 2, chapter 5, agrees on everything used here.
//!
//! This crate exists to disagree with a page-table library that has a wrong bit, so nothing here may be
//! imported from one, and nothing of this module is meant to be imported *by* one.

/// Bits of CR0 (SDM 3A 2.5).
pub mod cr0 {
    /// Protection enable.
    pub const PE: u64 = 1 << 0;
    /// Write protect: supervisor writes obey R/W.
    pub const WP: u64 = 1 << 16;
    /// Not write-through; without CD an invalid pair.
    pub const NW: u64 = 1 << 29;
    /// Cache disable.
    pub const CD: u64 = 1 << 30;
    /// Paging.
    pub const PG: u64 = 1 << 31;
}

/// Bits of CR3 (SDM 3A 2.5, 4.5).
pub mod cr3 {
    /// The process-context identifier, where CR4.PCIDE = 1.
    pub const PCID_MASK: u64 = 0xfff;
    /// In the operand of `MOV CR3` with CR4.PCIDE = 1: keep what is cached for the PCID.
    pub const NO_FLUSH: u64 = 1 << 63;
}

/// Bits of CR4 (SDM 3A 2.5).
pub mod cr4 {
    /// Page-size extensions: 4 MiB pages with 32-bit paging.
    pub const PSE: u64 = 1 << 4;
    /// Physical-address extension.
    pub const PAE: u64 = 1 << 5;
    /// Page-global enable.
    pub const PGE: u64 = 1 << 7;
    /// 57-bit linear addresses, five levels.
    pub const LA57: u64 = 1 << 12;
    /// PCID enable.
    pub const PCIDE: u64 = 1 << 17;
    /// Supervisor-mode execution prevention.
    pub const SMEP: u64 = 1 << 20;
    /// Supervisor-mode access prevention.
    pub const SMAP: u64 = 1 << 21;
    /// Protection keys for user-mode pages.
    pub const PKE: u64 = 1 << 22;
}

/// Bits of IA32_EFER (SDM 3A 2.2.1).
pub mod efer {
    /// IA-32e mode enable.
    pub const LME: u64 = 1 << 8;
    /// IA-32e mode active; set by the processor.
    pub const LMA: u64 = 1 << 10;
    /// Execute-disable bit enable.
    pub const NXE: u64 = 1 << 11;
}

/// Bits of RFLAGS (SDM 3A 2.3).
pub mod rflags {
    /// Interrupts are taken.
    pub const IF: u64 = 1 << 9;
    /// Alignment check; under CR4.SMAP, supervisor access to user pages is allowed (`STAC`, `CLAC`).
    pub const AC: u64 = 1 << 18;
}

/// Bits of a paging-structure entry (SDM 3A tables 4-5, 4-6, 4-8 to 4-20).
pub mod pte {
    /// Present.
    pub const P: u64 = 1 << 0;
    /// Writable.
    pub const RW: u64 = 1 << 1;
    /// User.
    pub const US: u64 = 1 << 2;
    /// Page-level write-through.
    pub const PWT: u64 = 1 << 3;
    /// Page-level cache disable.
    pub const PCD: u64 = 1 << 4;
    /// Accessed.
    pub const A: u64 = 1 << 5;
    /// Dirty; only in a leaf.
    pub const D: u64 = 1 << 6;
    /// Page size, in an entry above the last level: this entry is a leaf.
    pub const PS: u64 = 1 << 7;
    /// PAT in a last-level entry (the same position as PS).
    pub const PAT_4K: u64 = 1 << 7;
    /// Global; only in a leaf.
    pub const G: u64 = 1 << 8;
    /// PAT in a leaf above the last level.
    pub const PAT_LARGE: u64 = 1 << 12;
    /// Execute disable.
    pub const XD: u64 = 1 << 63;
    /// Position of the protection key (bits 62:59).
    pub const PKEY_SHIFT: u32 = 59;
    /// Mask of a protection key after the shift.
    pub const PKEY_MASK: u64 = 0xf;
}

/// Bits of the page-fault error code (SDM 3A 4.7).
pub mod pf {
    /// 0: a not-present entry; 1: a protection violation.
    pub const P: u32 = 1 << 0;
    /// The access was a write.
    pub const W: u32 = 1 << 1;
    /// The access was made in user mode (CPL = 3).
    pub const U: u32 = 1 << 2;
    /// A reserved bit was set in an entry.
    pub const RSVD: u32 = 1 << 3;
    /// The access was an instruction fetch (and NX or SMEP can tell).
    pub const I: u32 = 1 << 4;
    /// A protection key forbade the access.
    pub const PK: u32 = 1 << 5;
}
