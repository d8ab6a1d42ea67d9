//! A virtual CPU's registers, and what writing each of them does to the caches.
//!
//! Invariants
//! - `I1` every register write is checked as the processor checks it (`#GP` otherwise) before anything changes.
//! - `I2` a flush drops exactly what SDM 3A 4.10.4.1 says it must.
//! - `I3` every root loaded under a tag is remembered until everything of the tag was dropped; the loaded one always is.
//!
//! | operation | must drop |
//! |---|---|
//! | `INVLPG a` | page of `a` in the current PCID, its global entries; all walk-cache entries of the PCID |
//! | `INVPCID 0` | page of `a` in the given PCID, not global; the walk-cache entries used for `a` |
//! | `INVPCID 1` | everything of the given PCID, not global |
//! | `INVPCID 2` / `3` | everything / everything but global entries |
//! | `MOV CR3`, bit 63 = 0 | everything of the new PCID (PCID 0 without PCIDE), not global |
//! | `MOV CR3`, bit 63 = 1 | nothing |
//! | `MOV CR4` | PGE changed, PCIDE 1 to 0: everything; PAE changed, SMEP 0 to 1: everything of the current PCID |
//! | `MOV CR0` | PG 1 to 0: everything |
//! | page fault | page of the address in the current PCID, its global entries; the walk-cache entries used for it |

use std::collections::{BTreeSet, VecDeque};
use std::fmt;

use crate::manual::{cr0, cr3, cr4, efer, rflags};
use crate::memory::PhysMemory;
use crate::mode::{Mode, ReservedInputs, bits};
use crate::tlb::Caches;
use crate::walker::WalkContext;

/// What the processor model can do: what CPUID would say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// MAXPHYADDR, 32 to 52.
    pub max_phys_bits: u32,
    /// 1 GiB pages.
    pub gigabyte_pages: bool,
    /// Process-context identifiers, and INVPCID.
    pub pcid: bool,
    /// 57-bit linear addresses.
    pub la57: bool,
}

impl Default for Features {
    fn default() -> Self {
        Self {
            max_phys_bits: 46,
            gigabyte_pages: true,
            pcid: true,
            la57: true,
        }
    }
}

/// The registers that decide how an address is translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Registers {
    /// CR0.
    pub cr0: u64,
    /// CR2: the linear address of the last page fault.
    pub cr2: u64,
    /// CR3 without bit 63.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// RFLAGS (IF and AC matter here).
    pub rflags: u64,
    /// PKRU.
    pub pkru: u32,
    /// The four PDPTE registers of PAE paging.
    pub pdptes: [u64; 4],
}

impl Registers {
    /// A CPU in IA-32e mode with paging, WP, NX, global pages and interrupts on, CR3 = 0.
    pub const LONG: Self = Self {
        cr0: cr0::PE | cr0::PG | cr0::WP,
        cr2: 0,
        cr3: 0,
        cr4: cr4::PAE | cr4::PGE,
        efer: efer::LME | efer::LMA | efer::NXE,
        rflags: rflags::IF,
        pkru: 0,
        pdptes: [0; 4],
    };

    /// The same with process-context identifiers.
    pub const LONG_PCID: Self = Self {
        cr4: Self::LONG.cr4 | cr4::PCIDE,
        ..Self::LONG
    };

    /// A CPU in protected mode without paging.
    pub const PROTECTED: Self = Self {
        cr0: cr0::PE,
        cr4: 0,
        efer: 0,
        ..Self::LONG
    };
}

/// An exception that an instruction raised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Fault {
    /// `#PF`: CR2 and the error code.
    Page {
        /// The linear address, as CR2 holds it.
        address: u64,
        /// The error code (bits in [`manual::pf`](crate::manual::pf)).
        code: u32,
    },
    /// `#GP(0)`: an address that is not canonical, or a register value that is not allowed.
    GeneralProtection {
        /// The address or value.
        value: u64,
    },
    /// `#NP` (vector 11), `#SS` (12) or `#GP` (13) of a segment: the error code is the selector without its RPL, or 0.
    Selector {
        /// The vector.
        vector: u8,
        /// The error code.
        code: u16,
    },
    /// `#UD`: an instruction that the processor does not have.
    InvalidOpcode,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Page { address, code } => {
                write!(f, "#PF at {address:#x}, error code {code:#x} (")?;
                let names = ["P", "W", "U", "RSVD", "I", "PK"];
                let mut first = true;
                for (bit, name) in names.iter().enumerate() {
                    if code & (1 << bit) != 0 {
                        write!(f, "{}{name}", if first { "" } else { " " })?;
                        first = false;
                    }
                }
                write!(f, ")")
            }
            Self::GeneralProtection { value } => write!(f, "#GP(0) for {value:#x}"),
            Self::Selector { vector, code } => {
                let name = match vector {
                    11 => "#NP",
                    12 => "#SS",
                    _ => "#GP",
                };
                write!(f, "{name}({code:#x})")
            }
            Self::InvalidOpcode => write!(f, "#UD"),
        }
    }
}

impl std::error::Error for Fault {}

/// A flush that a CPU has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Flush {
    /// `INVLPG` of an address.
    Page(u64),
    /// `INVPCID` type 0: an address in a PCID.
    PageOf(u16, u64),
    /// `INVPCID` type 1: a PCID.
    Context(u16),
    /// `INVPCID` type 2: everything.
    All,
    /// `INVPCID` type 3: everything but global entries.
    AllButGlobal,
    /// `MOV CR3` that dropped a PCID's entries.
    RootLoad(u16),
    /// `MOV CR3` that kept them.
    RootLoadKept(u16),
    /// A write to CR0 or CR4 that dropped everything.
    Control,
}

impl Flush {
    /// Returns whether it dropped a non-global translation of `linear` with this PCID.
    pub fn covers(self, linear: u64, pcid: u16, shift: u32) -> bool {
        match self {
            Self::Page(at) => at >> shift == linear >> shift,
            Self::PageOf(tag, at) => tag == pcid && at >> shift == linear >> shift,
            Self::Context(tag) | Self::RootLoad(tag) => tag == pcid,
            Self::All | Self::AllButGlobal | Self::Control => true,
            Self::RootLoadKept(_) => false,
        }
    }
}

impl fmt::Display for Flush {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Page(at) => write!(f, "invlpg {at:#x}"),
            Self::PageOf(pcid, at) => write!(f, "invpcid of {at:#x} in PCID {pcid}"),
            Self::Context(pcid) => write!(f, "invpcid of PCID {pcid}"),
            Self::All => write!(f, "invpcid of everything"),
            Self::AllButGlobal => write!(f, "invpcid of everything but global entries"),
            Self::RootLoad(pcid) => write!(f, "load of CR3 with PCID {pcid}"),
            Self::RootLoadKept(pcid) => write!(f, "load of CR3 with PCID {pcid} and no flush"),
            Self::Control => write!(f, "change of CR0 or CR4"),
        }
    }
}

/// The type of an `INVPCID` (SDM 2A).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Invpcid {
    /// Type 0: one address in one PCID.
    Address {
        /// The PCID.
        pcid: u16,
        /// The linear address.
        linear: u64,
    },
    /// Type 1: one PCID.
    Context {
        /// The PCID.
        pcid: u16,
    },
    /// Type 2: every PCID, global entries included.
    AllWithGlobal,
    /// Type 3: every PCID, global entries kept.
    All,
}

const FLUSH_LOG: usize = 64;

/// One virtual CPU.
#[derive(Debug)]
pub(crate) struct CpuState {
    pub regs: Registers,
    pub features: Features,
    pub caches: Caches,
    /// Segment registers and tables.
    pub segments: crate::segment::Segmentation,
    /// A mode of the tester's own, in place of the one that the registers select.
    pub own_mode: Option<&'static Mode>,
    /// The last flushes, with their steps: evidence for stories.
    pub flushes: VecDeque<(u64, Flush)>,
    /// The tags and roots whose translations may be cached (`I3`): several of one tag after loads that kept its entries.
    held_roots: BTreeSet<(u16, u64)>,
}

impl CpuState {
    pub(crate) fn new(regs: Registers, features: Features) -> Self {
        let mut cpu = Self {
            regs,
            features,
            caches: Caches::new(),
            segments: crate::segment::Segmentation::default(),
            own_mode: None,
            flushes: VecDeque::new(),
            held_roots: BTreeSet::new(),
        };
        cpu.keep_roots(|_| false);
        cpu
    }

    /// The tag of what this CPU caches now.
    #[inline]
    pub(crate) fn pcid(&self) -> u16 {
        if self.regs.cr4 & cr4::PCIDE != 0 {
            (self.regs.cr3 & cr3::PCID_MASK) as u16
        } else {
            0
        }
    }

    pub(crate) fn mode(&self) -> Option<&'static Mode> {
        let selected = Mode::of(self.regs.cr0, self.regs.cr4, self.regs.efer)?;
        Some(self.own_mode.unwrap_or(selected))
    }

    /// Whether it runs 64-bit code: in IA-32e mode, unless CS was loaded with a segment of compatibility mode.
    pub(crate) fn is_64_bit(&self) -> bool {
        self.regs.efer & efer::LMA != 0 && (self.segments.is_long() || !self.segments.has_code())
    }

    /// What decides a walk now; `None` while paging is off.
    #[inline]
    pub(crate) fn context(&self) -> Option<WalkContext> {
        let regs = &self.regs;
        Some(WalkContext {
            mode: self.mode()?,
            cr3: regs.cr3,
            pdptes: regs.pdptes,
            inputs: ReservedInputs {
                max_phys_bits: self.features.max_phys_bits,
                nxe: regs.efer & efer::NXE != 0,
                pse: regs.cr4 & cr4::PSE != 0,
                gigabyte: self.features.gigabyte_pages,
            },
            wp: regs.cr0 & cr0::WP != 0,
            smep: regs.cr4 & cr4::SMEP != 0,
            smap: regs.cr4 & cr4::SMAP != 0,
            ac: regs.rflags & rflags::AC != 0,
            pge: regs.cr4 & cr4::PGE != 0,
            pkru: (regs.cr4 & cr4::PKE != 0 && self.mode()?.has_pkey).then_some(regs.pkru),
        })
    }

    fn log(&mut self, step: u64, flush: Flush) {
        if self.flushes.len() == FLUSH_LOG {
            self.flushes.pop_front();
        }
        self.flushes.push_back((step, flush));
    }

    /// `MOV CR3`.
    pub(crate) fn write_cr3(
        &mut self,
        memory: &PhysMemory,
        step: u64,
        value: u64,
    ) -> Result<(), Fault> {
        let refused = Err(Fault::GeneralProtection { value });
        let pcide = self.regs.cr4 & cr4::PCIDE != 0;
        let keep = pcide && value & cr3::NO_FLUSH != 0;
        let plain = if pcide { value & !cr3::NO_FLUSH } else { value };
        let long = self.regs.efer & efer::LMA != 0;
        if long && plain & bits(self.features.max_phys_bits, 63) != 0 {
            return refused;
        }
        let mut pdptes = self.regs.pdptes;
        if self.mode().is_some_and(|mode| !mode.levels[0].accessed) {
            pdptes = self.load_pdptes(memory, plain)?;
        }
        self.regs.pdptes = pdptes;
        self.regs.cr3 = if long { plain } else { plain & 0xffff_ffff };
        let pcid = self.pcid();
        self.keep_roots(|tag| keep || tag != pcid);
        if keep {
            self.log(step, Flush::RootLoadKept(pcid));
        } else {
            self.caches.invalidate_tag(pcid);
            self.log(step, Flush::RootLoad(pcid));
        }
        Ok(())
    }

    /// Loads the four PDPTE registers of PAE paging; `#GP` if a present one has a reserved bit set (SDM 3A 4.4.1).
    fn load_pdptes(&self, memory: &PhysMemory, cr3_value: u64) -> Result<[u64; 4], Fault> {
        let inputs = ReservedInputs {
            max_phys_bits: self.features.max_phys_bits,
            nxe: self.regs.efer & efer::NXE != 0,
            pse: true,
            gigabyte: false,
        };
        let mut pdptes = [0; 4];
        for (index, register) in pdptes.iter_mut().enumerate() {
            let address = (cr3_value & 0xffff_ffe0) + index as u64 * 8;
            let entry = memory.load(address, 8).unwrap_or(u64::MAX);
            if entry & 1 != 0 && entry & crate::mode::PAE.reserved(0, entry, &inputs) != 0 {
                return Err(Fault::GeneralProtection { value: cr3_value });
            }
            *register = entry;
        }
        Ok(pdptes)
    }

    /// `MOV CR4`.
    pub(crate) fn write_cr4(
        &mut self,
        memory: &PhysMemory,
        step: u64,
        value: u64,
    ) -> Result<(), Fault> {
        let refused = Err(Fault::GeneralProtection { value });
        const KNOWN: u64 = cr4::PSE
            | cr4::PAE
            | cr4::PGE
            | cr4::LA57
            | cr4::PCIDE
            | cr4::SMEP
            | cr4::SMAP
            | cr4::PKE;
        let long = self.regs.efer & efer::LMA != 0;
        let old = self.regs.cr4;
        let changed = old ^ value;
        let turned_on = value & changed;
        if value & !KNOWN != 0
            || (value & cr4::PCIDE != 0 && !self.features.pcid)
            || (value & cr4::LA57 != 0 && !self.features.la57)
            // PCIDE turns on only in IA-32e mode and with PCID 0 (SDM 3A 4.10.1).
            || (turned_on & cr4::PCIDE != 0 && (!long || self.regs.cr3 & cr3::PCID_MASK != 0))
            // In IA-32e mode PAE cannot be cleared and LA57 not changed.
            || (long && (value & cr4::PAE == 0 || changed & cr4::LA57 != 0))
        {
            return refused;
        }
        let pae_paging_loads = self.regs.cr0 & cr0::PG != 0
            && !long
            && value & cr4::PAE != 0
            && changed & (cr4::PAE | cr4::PGE | cr4::PSE | cr4::SMEP) != 0;
        let pdptes = if pae_paging_loads {
            self.load_pdptes(memory, self.regs.cr3)?
        } else {
            self.regs.pdptes
        };
        let pcid = self.pcid();
        self.regs.cr4 = value;
        self.regs.pdptes = pdptes;
        if changed & cr4::PGE != 0 || (changed & cr4::PCIDE != 0 && value & cr4::PCIDE == 0) {
            self.caches.invalidate_all();
            self.keep_roots(|_| false);
            self.log(step, Flush::Control);
        } else if changed & cr4::PAE != 0 || turned_on & cr4::SMEP != 0 {
            self.caches.invalidate_tag(pcid);
            self.keep_roots(|tag| tag != pcid);
            self.log(step, Flush::Context(pcid));
        }
        Ok(())
    }

    /// `MOV CR0`.
    pub(crate) fn write_cr0(
        &mut self,
        memory: &PhysMemory,
        step: u64,
        value: u64,
    ) -> Result<(), Fault> {
        let refused = Err(Fault::GeneralProtection { value });
        let regs = &self.regs;
        let turns_paging_on = regs.cr0 & cr0::PG == 0 && value & cr0::PG != 0;
        let turns_paging_off = regs.cr0 & cr0::PG != 0 && value & cr0::PG == 0;
        let long = regs.efer & efer::LME != 0;
        // SDM 3A 2.5, and the exceptions of `MOV` to control registers in 2B.
        if value >> 32 != 0
            || (value & cr0::PG != 0 && value & cr0::PE == 0)
            || (value & cr0::NW != 0 && value & cr0::CD == 0)
            || (turns_paging_on && long && (regs.cr4 & cr4::PAE == 0 || self.segments.is_long()))
            // IA-32e mode is left from compatibility mode, without PCIDs (SDM 3A 9.8.5.4).
            || (turns_paging_off && (regs.cr4 & cr4::PCIDE != 0 || self.is_64_bit()))
        {
            return refused;
        }
        let pae = turns_paging_on && !long && regs.cr4 & cr4::PAE != 0;
        let pdptes = if pae {
            self.load_pdptes(memory, regs.cr3)?
        } else {
            regs.pdptes
        };
        self.regs.pdptes = pdptes;
        self.regs.cr0 = value;
        if turns_paging_on && long {
            self.regs.efer |= efer::LMA;
        }
        if turns_paging_off {
            self.regs.efer &= !efer::LMA;
            self.caches.invalidate_all();
            self.keep_roots(|_| false);
            self.log(step, Flush::Control);
        }
        Ok(())
    }

    /// `WRPKRU`.
    pub(crate) fn write_pkru(&mut self, value: u32) -> Result<(), Fault> {
        if self.regs.cr4 & cr4::PKE == 0 {
            return Err(Fault::InvalidOpcode);
        }
        self.regs.pkru = value;
        Ok(())
    }

    /// `WRMSR` of IA32_EFER (LMA is the processor's).
    pub(crate) fn write_efer(&mut self, value: u64) -> Result<(), Fault> {
        let lme_changes = (self.regs.efer ^ value) & efer::LME != 0;
        if (lme_changes && self.regs.cr0 & cr0::PG != 0)
            || value & !(efer::LME | efer::LMA | efer::NXE | 1) != 0
        {
            return Err(Fault::GeneralProtection { value });
        }
        self.regs.efer = value & !efer::LMA | self.regs.efer & efer::LMA;
        Ok(())
    }

    /// `INVLPG`: an address that is not canonical is a no-op (SDM 2A).
    pub(crate) fn invlpg(&mut self, step: u64, linear: u64) {
        let pcid = self.pcid();
        if let Some(mode) = self.mode() {
            if !mode.is_canonical(linear) {
                return;
            }
            self.caches.invlpg(mode.wrap(linear), pcid);
        }
        self.log(step, Flush::Page(linear));
    }

    /// `INVPCID`.
    pub(crate) fn invpcid(&mut self, step: u64, kind: Invpcid) -> Result<(), Fault> {
        if !self.features.pcid {
            return Err(Fault::InvalidOpcode);
        }
        let pcide = self.regs.cr4 & cr4::PCIDE != 0;
        match kind {
            Invpcid::Address { pcid, linear } => {
                let canonical = self.mode().is_none_or(|mode| mode.is_canonical(linear));
                if pcid > 0xfff || !canonical || (!pcide && pcid != 0) {
                    return Err(Fault::GeneralProtection { value: linear });
                }
                self.caches.invalidate_address(linear, pcid);
                self.log(step, Flush::PageOf(pcid, linear));
            }
            Invpcid::Context { pcid } => {
                if pcid > 0xfff || (!pcide && pcid != 0) {
                    return Err(Fault::GeneralProtection { value: pcid.into() });
                }
                self.caches.invalidate_tag(pcid);
                self.keep_roots(|tag| tag != pcid);
                self.log(step, Flush::Context(pcid));
            }
            Invpcid::AllWithGlobal => {
                self.caches.invalidate_all();
                self.keep_roots(|_| false);
                self.log(step, Flush::All);
            }
            Invpcid::All => {
                self.caches.invalidate_not_global();
                self.keep_roots(|_| false);
                self.log(step, Flush::AllButGlobal);
            }
        }
        Ok(())
    }

    /// Forgets the roots of the tags that were dropped, but the loaded one (`I3`).
    fn keep_roots(&mut self, kept: impl Fn(u16) -> bool) {
        self.held_roots.retain(|&(tag, _)| kept(tag));
        let loaded = (self.pcid(), self.regs.cr3 & !cr3::PCID_MASK);
        self.held_roots.insert(loaded);
    }

    /// Whether it may hold translations of the space with this root table: loaded now, or left without a flush.
    pub(crate) fn may_hold(&self, root: u64) -> bool {
        self.held_roots.iter().any(|&(_, held)| held == root)
    }

    /// The last flush in the log that dropped a translation of this address and PCID.
    pub(crate) fn last_flush(&self, linear: u64, pcid: u16, shift: u32) -> Option<(u64, Flush)> {
        self.flushes
            .iter()
            .rev()
            .copied()
            .find(|(_, flush)| flush.covers(linear, pcid, shift))
    }

    /// Takes a page fault that came from a cached absence: CR2 alone, since on such a processor a fault drops nothing.
    pub(crate) fn fault(&mut self, linear: u64, code: u32) -> Fault {
        self.regs.cr2 = linear;
        Fault::Page {
            address: linear,
            code,
        }
    }

    /// Takes a page fault: CR2, and what the fault itself drops (SDM 3A 4.10.4.1, last paragraphs).
    pub(crate) fn page_fault(&mut self, linear: u64, code: u32) -> Fault {
        self.regs.cr2 = linear;
        let pcid = self.pcid();
        self.caches.page_fault(linear, pcid);
        Fault::Page {
            address: linear,
            code,
        }
    }
}
