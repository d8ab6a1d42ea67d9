//! Segmentation of protected mode: descriptor tables in memory, selectors, the hidden part of each segment register, and the checks
//! of limit, type and privilege that stand between an offset and a linear address.
//!
//! ```text
//!   selector:offset --(hidden part: base, limit, type)--> linear --(paging)--> physical
//!
//!   descriptor  63    56 55 54 53 52 51   48 47 46 45 44 43  40 39       32 31          16 15          0
//!               base     G  DB L  AVL limit  P  DPL   S  type   base 23..16 base 15..0     limit 15..0
//!               31..24                19..16
//! ```
//!
//! Linux makes every segment start at 0 and end at 4 GiB, so that offset and linear address are the same, and leaves protection to
//! paging: [`LINUX_GDT_32`] and [`LINUX_GDT_64`].
//!
//! Invariants
//! - `I1` a register's hidden part changes only when the register is loaded: a descriptor that is edited in memory has no effect
//!   before (SDM 3A 3.4.3).
//! - `I2` a load that faults changes no register; one that succeeds sets the descriptor's accessed bit (SDM 3A 3.4.5.1).
//! - `I3` the bases of FS and GS are those of their hidden parts: a load sets them (to 0 for a null selector, as Intel's processors do),
//!   and so do the MSRs, in all 64 bits (SDM 3A 3.4.4).
//!
//! Not handled: gates, task switches, 16-bit code, virtual-8086 mode.
//!
//! Source: SDM 3A 3.4, 3.5, 5.3 to 5.8 and the pages of MOV, LLDT and JMP in volume 2.

use std::fmt;

use crate::cpu::Fault;
use crate::manual::efer;
use crate::vcpu::VirtualCpu;
use crate::walker::AccessKind;

/// The GDT of Linux on 32-bit x86, from entry 12 on (arch/x86/include/asm/segment.h): kernel code, kernel data, user code, user
/// data, each from 0 to 4 GiB.
pub const LINUX_GDT_32: [u64; 4] = [
    0x00cf_9a00_0000_ffff,
    0x00cf_9200_0000_ffff,
    0x00cf_fa00_0000_ffff,
    0x00cf_f200_0000_ffff,
];

/// Where [`LINUX_GDT_32`] starts in the table.
pub const LINUX_GDT_32_FIRST: u16 = 12;

/// The GDT of Linux on x86-64, entries 1 to 6: 32-bit kernel code, kernel code, kernel data, 32-bit user code, user data, user
/// code. In 64-bit code only privilege and L matter.
pub const LINUX_GDT_64: [u64; 6] = [
    0x00cf_9b00_0000_ffff,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_fb00_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
];

/// A segment selector (SDM 3A 3.4.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Selector(pub u16);

impl Selector {
    /// The null selector.
    pub const NULL: Self = Self(0);

    /// A selector of entry `index` of the GDT with requested privilege `rpl`.
    pub const fn gdt(index: u16, rpl: u8) -> Self {
        Self(index << 3 | rpl as u16 & 3)
    }

    /// A selector of entry `index` of the LDT with requested privilege `rpl`.
    pub const fn ldt(index: u16, rpl: u8) -> Self {
        Self(index << 3 | 1 << 2 | rpl as u16 & 3)
    }

    /// The entry.
    pub const fn index(self) -> u16 {
        self.0 >> 3
    }

    /// Whether it names the LDT.
    pub const fn is_local(self) -> bool {
        self.0 & 4 != 0
    }

    /// The requested privilege level.
    pub const fn rpl(self) -> u8 {
        (self.0 & 3) as u8
    }

    /// Whether it names no segment: entry 0 of the GDT.
    pub const fn is_null(self) -> bool {
        self.0 & !3 == 0
    }

    /// What an exception's error code says of it: RPL cleared.
    const fn code(self) -> u16 {
        self.0 & !3
    }
}

/// A segment descriptor (SDM 3A 3.4.5), as eight bytes of memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Descriptor(pub u64);

impl Descriptor {
    /// A descriptor of a code or data segment. `limit` counts bytes if it fits 20 bits, else pages of 4 KiB (rounded down).
    ///
    /// `kind` is the type field: bit 3 code, bit 2 conforming or expand-down, bit 1 readable or writable, bit 0 accessed.
    pub const fn segment(base: u32, limit: u32, kind: u8, dpl: u8) -> Self {
        let (limit, granular) = if limit > 0xf_ffff {
            (limit >> 12, 1)
        } else {
            (limit, 0)
        };
        Self(Self::fields(base, limit, kind & 15 | 1 << 4, dpl, granular) | 1 << 54)
    }

    /// A descriptor of an LDT.
    pub const fn local_table(base: u32, limit: u32) -> Self {
        Self(Self::fields(base, limit, 2, 0, 0))
    }

    const fn fields(base: u32, limit: u32, access: u8, dpl: u8, granular: u64) -> u64 {
        let (base, limit) = (base as u64, limit as u64);
        limit & 0xffff
            | (base & 0xff_ffff) << 16
            | (access as u64) << 40
            | (dpl as u64 & 3) << 45
            | 1 << 47
            | (limit >> 16 & 0xf) << 48
            | granular << 55
            | base >> 24 << 56
    }

    /// The same, not present.
    #[must_use]
    pub const fn absent(self) -> Self {
        Self(self.0 & !(1 << 47))
    }

    /// The linear address of the segment's byte 0.
    pub const fn base(self) -> u32 {
        (self.0 >> 16 & 0xff_ffff | (self.0 >> 56) << 24) as u32
    }

    /// The last byte's offset (for a segment that expands down: the last that is *not* in it).
    pub const fn limit(self) -> u32 {
        let limit = (self.0 & 0xffff | (self.0 >> 48 & 0xf) << 16) as u32;
        if self.0 & 1 << 55 != 0 {
            limit << 12 | 0xfff
        } else {
            limit
        }
    }

    /// The type field.
    pub const fn kind(self) -> u8 {
        (self.0 >> 40 & 15) as u8
    }

    /// Whether it is a code or data segment, not a system one.
    pub const fn is_memory(self) -> bool {
        self.0 & 1 << 44 != 0
    }

    /// Whether it is a code segment.
    pub const fn is_code(self) -> bool {
        self.is_memory() && self.kind() & 8 != 0
    }

    /// Whether it is a code segment that less privileged code may run as it is.
    pub const fn is_conforming(self) -> bool {
        self.is_code() && self.kind() & 4 != 0
    }

    /// Whether it is a data segment that grows downwards.
    pub const fn expands_down(self) -> bool {
        self.is_memory() && self.kind() & 12 == 4
    }

    /// Whether data may be written through it.
    pub const fn is_writable(self) -> bool {
        self.is_memory() && self.kind() & 10 == 2
    }

    /// Whether data may be read through it.
    pub const fn is_readable(self) -> bool {
        self.is_memory() && self.kind() & 10 != 8
    }

    /// The descriptor's privilege level.
    pub const fn dpl(self) -> u8 {
        (self.0 >> 45 & 3) as u8
    }

    /// Whether the segment is present.
    pub const fn is_present(self) -> bool {
        self.0 & 1 << 47 != 0
    }

    /// Whether it is 64-bit code.
    pub const fn is_long(self) -> bool {
        self.0 & 1 << 53 != 0
    }

    /// Whether the bytes `offset` to `offset + bytes - 1` are inside.
    const fn holds(self, offset: u32, bytes: u32) -> bool {
        let Some(last) = offset.checked_add(bytes - 1) else {
            return false;
        };
        if self.expands_down() {
            let top = if self.0 & 1 << 54 != 0 {
                u32::MAX
            } else {
                0xffff
            };
            offset > self.limit() && last <= top
        } else {
            last <= self.limit()
        }
    }
}

impl fmt::Debug for Descriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Descriptor({:#x}: base {:#x}, limit {:#x}, type {:#x}, DPL {})",
            self.0,
            self.base(),
            self.limit(),
            self.kind(),
            self.dpl()
        )
    }
}

/// A segment register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum SegmentRegister {
    Es,
    Cs,
    Ss,
    Ds,
    Fs,
    Gs,
}

/// What a segment register holds: the selector that code sees, and the descriptor that it was loaded from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Segment {
    /// The visible part.
    pub selector: Selector,
    /// The hidden part (`I1`); `None` after a null selector.
    pub hidden: Option<Descriptor>,
}

/// A CPU's segment state.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Segmentation {
    gdtr: (u64, u16),
    ldtr: Segment,
    registers: [Segment; 6],
    /// Bases of FS and GS (`I3`).
    bases: [u64; 2],
}

impl Segmentation {
    /// Where FS or GS keeps its base.
    fn own_base(&mut self, register: SegmentRegister) -> Option<&mut u64> {
        match register {
            SegmentRegister::Fs => Some(&mut self.bases[0]),
            SegmentRegister::Gs => Some(&mut self.bases[1]),
            _ => None,
        }
    }

    /// Loads a register (`I3`).
    fn put(&mut self, register: SegmentRegister, segment: Segment) {
        self.registers[register as usize] = segment;
        if let Some(base) = self.own_base(register) {
            *base = segment.hidden.map_or(0, |hidden| hidden.base().into());
        }
    }

    fn code(&self) -> Option<Descriptor> {
        self.registers[SegmentRegister::Cs as usize].hidden
    }

    /// Whether CS was ever loaded.
    pub(crate) fn has_code(&self) -> bool {
        self.code().is_some()
    }

    /// Whether CS holds 64-bit code.
    pub(crate) fn is_long(&self) -> bool {
        self.code().is_some_and(Descriptor::is_long)
    }
}

/// Which fault a refused load raises.
fn refused(code: u16) -> Fault {
    Fault::Selector { vector: 13, code }
}

/// A CPU whose accesses go through its segments; see [`VirtualCpu::segments`].
#[derive(Clone, Copy, Debug)]
pub struct SegmentedCpu<'m>(VirtualCpu<'m>);

impl<'m> SegmentedCpu<'m> {
    pub(crate) fn new(cpu: VirtualCpu<'m>) -> Self {
        Self(cpu)
    }

    fn state(&self) -> Segmentation {
        self.0.with_segments(|state| *state)
    }

    fn is_long(&self) -> bool {
        self.0.registers().efer & efer::LMA != 0 && self.state().is_long()
    }

    /// The current privilege level: the RPL of CS.
    pub fn cpl(&self) -> u8 {
        self.register(SegmentRegister::Cs).selector.rpl()
    }

    /// What a register holds.
    pub fn register(&self, register: SegmentRegister) -> Segment {
        self.state().registers[register as usize]
    }

    fn demand_kernel(&self) -> Result<(), Fault> {
        self.0.demand_kernel()?;
        if self.cpl() == 0 {
            Ok(())
        } else {
            Err(refused(0))
        }
    }

    /// `LGDT`: the table's linear address and the offset of its last byte.
    ///
    /// # Errors
    ///
    /// `#GP(0)` outside of CPL 0, and in 64-bit mode for an address that is not canonical; elsewhere it has 32 bits.
    pub fn lgdt(&self, base: u64, limit: u16) -> Result<(), Fault> {
        self.demand_kernel()?;
        let base = if self.is_long() {
            self.0.demand_canonical(base)?;
            base
        } else {
            base & 0xffff_ffff
        };
        self.0.with_segments(|state| state.gdtr = (base, limit));
        Ok(())
    }

    /// `LLDT`: the LDT by its selector in the GDT.
    ///
    /// # Errors
    ///
    /// `#GP` for a selector that names no LDT of the GDT or outside of CPL 0, `#NP` for one that is not present.
    pub fn lldt(&self, selector: Selector) -> Result<(), Fault> {
        self.demand_kernel()?;
        let mut loaded = Segment {
            selector,
            hidden: None,
        };
        if !selector.is_null() {
            if selector.is_local() {
                return Err(refused(selector.code()));
            }
            let (descriptor, _) = self.fetch(selector)?;
            if descriptor.is_memory() || descriptor.kind() != 2 {
                return Err(refused(selector.code()));
            }
            if !descriptor.is_present() {
                return Err(Fault::Selector {
                    vector: 11,
                    code: selector.code(),
                });
            }
            loaded.hidden = Some(descriptor);
        }
        self.0.with_segments(|state| state.ldtr = loaded);
        Ok(())
    }

    /// Reads a descriptor through paging, as the processor itself; gives its linear address too.
    fn fetch(&self, selector: Selector) -> Result<(Descriptor, u64), Fault> {
        let state = self.state();
        let (base, limit) = if selector.is_local() {
            let table = state.ldtr.hidden.ok_or(refused(selector.code()))?;
            (u64::from(table.base()), table.limit())
        } else {
            (state.gdtr.0, u32::from(state.gdtr.1))
        };
        let offset = u32::from(selector.index()) * 8;
        if offset + 7 > limit {
            return Err(refused(selector.code()));
        }
        let linear = base.wrapping_add(offset.into());
        Ok((Descriptor(self.0.implicit().read_u64(linear)?), linear))
    }

    /// `MOV` to a data segment register or SS.
    ///
    /// # Errors
    ///
    /// `#GP`, `#NP` or `#SS` with the selector, by limit of the table, type, privilege and presence; `#UD` for CS.
    pub fn load(&self, register: SegmentRegister, selector: Selector) -> Result<(), Fault> {
        let is_stack = match register {
            SegmentRegister::Cs => return Err(Fault::InvalidOpcode),
            other => other == SegmentRegister::Ss,
        };
        let cpl = self.cpl();
        if selector.is_null() {
            // 64-bit code but the program's may run without a stack segment (SDM 2B, MOV).
            if is_stack && !(self.is_long() && cpl < 3 && selector.rpl() == cpl) {
                return Err(refused(0));
            }
            return self.set(register, selector, None);
        }
        let (descriptor, linear) = self.fetch(selector)?;
        let code = selector.code();
        let allowed = if is_stack {
            selector.rpl() == cpl && descriptor.is_writable() && descriptor.dpl() == cpl
        } else {
            descriptor.is_readable()
                && (descriptor.is_conforming() || selector.rpl().max(cpl) <= descriptor.dpl())
        };
        if !allowed {
            return Err(refused(code));
        }
        if !descriptor.is_present() {
            let vector = if is_stack { 12 } else { 11 };
            return Err(Fault::Selector { vector, code });
        }
        self.set(register, selector, Some((descriptor, linear)))
    }

    /// A far `JMP` without a gate: another code segment of the same privilege.
    ///
    /// # Errors
    ///
    /// `#GP` or `#NP` with the selector.
    pub fn far_jump(&self, selector: Selector) -> Result<(), Fault> {
        if selector.is_null() {
            return Err(refused(0));
        }
        let cpl = self.cpl();
        let (descriptor, linear) = self.fetch(selector)?;
        let allowed = descriptor.is_code()
            && if descriptor.is_conforming() {
                descriptor.dpl() <= cpl
            } else {
                selector.rpl() <= cpl && descriptor.dpl() == cpl
            };
        if !allowed {
            return Err(refused(selector.code()));
        }
        if !descriptor.is_present() {
            return Err(Fault::Selector {
                vector: 11,
                code: selector.code(),
            });
        }
        let now = Selector(selector.code() | u16::from(cpl));
        self.set(SegmentRegister::Cs, now, Some((descriptor, linear)))
    }

    /// `IRET` to outer privilege: code and stack of level 3, say. Data segments that it may not use become null.
    ///
    /// # Errors
    ///
    /// `#GP` or `#NP` with the selector that does not fit.
    pub fn iret(&self, code: Selector, stack: Selector) -> Result<(), Fault> {
        let (cs, cs_at) = self.fetch(code)?;
        let (ss, ss_at) = self.fetch(stack)?;
        let level = code.rpl();
        let code_fits = cs.is_code() && level >= self.cpl() && {
            if cs.is_conforming() {
                cs.dpl() <= level
            } else {
                cs.dpl() == level
            }
        };
        if !code_fits {
            return Err(refused(code.code()));
        }
        if stack.rpl() != level || !ss.is_writable() || ss.dpl() != level {
            return Err(refused(stack.code()));
        }
        for (descriptor, selector, vector) in [(cs, code, 11), (ss, stack, 12)] {
            if !descriptor.is_present() {
                return Err(Fault::Selector {
                    vector,
                    code: selector.code(),
                });
            }
        }
        // Both may fault, so before either register changes (`I2`).
        let code = self.mark_accessed(code, cs, cs_at)?;
        let stack = self.mark_accessed(stack, ss, ss_at)?;
        self.0.with_segments(|state| {
            use SegmentRegister::{Cs, Ds, Es, Fs, Gs, Ss};
            state.put(Cs, code);
            state.put(Ss, stack);
            for register in [Es, Ds, Fs, Gs] {
                let segment = state.registers[register as usize];
                if segment
                    .hidden
                    .is_some_and(|hidden| !hidden.is_conforming() && hidden.dpl() < level)
                {
                    state.put(register, Segment::default());
                }
            }
        });
        Ok(())
    }

    /// `I2`.
    fn set(
        &self,
        register: SegmentRegister,
        selector: Selector,
        found: Option<(Descriptor, u64)>,
    ) -> Result<(), Fault> {
        let segment = match found {
            Some((descriptor, linear)) => self.mark_accessed(selector, descriptor, linear)?,
            None => Segment {
                selector,
                hidden: None,
            },
        };
        self.0.with_segments(|state| state.put(register, segment));
        Ok(())
    }

    /// What a register holds after a load of this descriptor, whose accessed bit is now set in memory.
    fn mark_accessed(
        &self,
        selector: Selector,
        descriptor: Descriptor,
        linear: u64,
    ) -> Result<Segment, Fault> {
        let accessed = Descriptor(descriptor.0 | 1 << 40);
        if accessed != descriptor {
            self.0.implicit().write_u64(linear, accessed.0)?;
        }
        Ok(Segment {
            selector,
            hidden: Some(accessed),
        })
    }

    /// `WRMSR` of IA32_FS_BASE or IA32_GS_BASE; nothing for a register that has no such MSR.
    ///
    /// # Errors
    ///
    /// `#GP` outside of CPL 0 and for an address that is not canonical.
    pub fn set_base(&self, register: SegmentRegister, base: u64) -> Result<(), Fault> {
        self.demand_kernel()?;
        self.0.demand_canonical(base)?;
        self.0.with_segments(|state| {
            if let Some(own) = state.own_base(register) {
                *own = base;
            }
        });
        Ok(())
    }

    /// The linear address of `bytes` bytes (at least 1) at an offset of a segment, after the checks.
    ///
    /// # Errors
    ///
    /// `#GP(0)`, or `#SS(0)` for the stack: a null selector, a type that forbids the access, or bytes beyond the limit.
    pub fn linear(
        &self,
        register: SegmentRegister,
        offset: u64,
        bytes: u32,
        kind: AccessKind,
    ) -> Result<u64, Fault> {
        let mut state = self.state();
        let own_base = state.own_base(register).copied();
        if self.is_long() {
            // Bases but of FS and GS count as 0, and there are no limits (SDM 3A 3.2.4).
            return Ok(offset.wrapping_add(own_base.unwrap_or(0)));
        }
        let fault = if register == SegmentRegister::Ss {
            Fault::Selector {
                vector: 12,
                code: 0,
            }
        } else {
            refused(0)
        };
        let segment = state.registers[register as usize];
        let descriptor = segment.hidden.ok_or(refused(0))?;
        let allowed = match kind {
            AccessKind::Read => descriptor.is_readable(),
            AccessKind::Write => descriptor.is_writable(),
            AccessKind::Fetch => descriptor.is_code(),
        };
        if !allowed {
            return Err(refused(0));
        }
        let offset = offset as u32;
        if !descriptor.holds(offset, bytes) {
            return Err(fault);
        }
        let base = own_base.map_or(descriptor.base(), |base| base as u32);
        Ok(u64::from(base.wrapping_add(offset)))
    }

    /// The CPU at the current privilege.
    fn at_cpl(&self) -> VirtualCpu<'m> {
        if self.cpl() == 3 {
            self.0.user()
        } else {
            self.0
        }
    }

    /// Reads four bytes at an offset of a segment.
    ///
    /// # Errors
    ///
    /// As [`linear`](Self::linear), or what paging says.
    pub fn read_u32(&self, register: SegmentRegister, offset: u64) -> Result<u32, Fault> {
        let linear = self.linear(register, offset, 4, AccessKind::Read)?;
        self.at_cpl().read_u32(linear)
    }

    /// Writes four bytes at an offset of a segment.
    ///
    /// # Errors
    ///
    /// As [`read_u32`](Self::read_u32).
    pub fn write_u32(
        &self,
        register: SegmentRegister,
        offset: u64,
        value: u32,
    ) -> Result<(), Fault> {
        let linear = self.linear(register, offset, 4, AccessKind::Write)?;
        self.at_cpl().write_u32(linear, value)
    }

    /// Fetches an instruction byte at an offset of CS.
    ///
    /// # Errors
    ///
    /// As [`read_u32`](Self::read_u32).
    pub fn fetch_at(&self, offset: u64) -> Result<u8, Fault> {
        let linear = self.linear(SegmentRegister::Cs, offset, 1, AccessKind::Fetch)?;
        self.at_cpl().fetch(linear)
    }

    /// Starts with these code and stack segments, as the processor's reset or a boot loader does: no checks.
    pub fn start(&self, code: (Selector, Descriptor), stack: (Selector, Descriptor)) {
        self.0.with_segments(|state| {
            for (register, (selector, descriptor)) in
                [(SegmentRegister::Cs, code), (SegmentRegister::Ss, stack)]
            {
                state.registers[register as usize] = Segment {
                    selector,
                    hidden: Some(descriptor),
                };
            }
        });
    }
}
