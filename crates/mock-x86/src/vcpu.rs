//! One virtual CPU as its program sees it: memory accesses, control registers, flush instructions.
//!
//! Every call is one instruction and, under a scheduler, one yield point. An access that crosses a page
//! boundary translates both pages before it writes anything, as the processor does.

use crate::cpu::{CpuState, Fault, Flush, Invpcid, Registers};
use crate::engine::Core;
use crate::machine::Machine;
use crate::manual::rflags;
use crate::mode::{LONG4, LONG5};
use crate::sched;
use crate::walker::{Access, AccessKind};

/// A handle to a CPU with a privilege: [`Machine::cpu`] gives the kernel's, [`user`](Self::user) the program's.
#[derive(Debug, Clone, Copy)]
pub struct VirtualCpu<'m> {
    machine: &'m Machine,
    number: usize,
    user: bool,
    implicit: bool,
}

macro_rules! sized_access {
    ($($read:ident $write:ident $type:ty),*) => {$(
        /// Reads a value at a linear address, aligned or not.
        ///
        /// # Errors
        ///
        /// The fault it raises.
        pub fn $read(&self, linear: u64) -> Result<$type, Fault> {
            let mut bytes = [0; size_of::<$type>()];
            self.read_small(linear, &mut bytes)?;
            Ok(<$type>::from_le_bytes(bytes))
        }

        /// Writes a value at a linear address, aligned or not; nothing is written if it faults.
        ///
        /// # Errors
        ///
        /// The fault it raises.
        pub fn $write(&self, linear: u64, value: $type) -> Result<(), Fault> {
            self.write_small(linear, &value.to_le_bytes())
        }
    )*};
}

impl<'m> VirtualCpu<'m> {
    pub(crate) fn new(machine: &'m Machine, number: usize) -> Self {
        Self {
            machine,
            number,
            user: false,
            implicit: false,
        }
    }

    /// Its number.
    pub fn number(&self) -> usize {
        self.number
    }

    /// The same CPU at CPL 3, with IOPL 0: privileged instructions fault.
    pub fn user(self) -> Self {
        Self { user: true, ..self }
    }

    /// The same CPU making the processor's own accesses to system structures.
    pub fn implicit(self) -> Self {
        Self {
            implicit: true,
            ..self
        }
    }

    /// The same CPU, with accesses through its segments.
    pub fn segments(self) -> crate::segment::SegmentedCpu<'m> {
        crate::segment::SegmentedCpu::new(self)
    }

    pub(crate) fn with_segments<R>(
        &self,
        run: impl FnOnce(&mut crate::segment::Segmentation) -> R,
    ) -> R {
        self.machine
            .with(|inner| run(&mut inner.core.cpus[self.number].segments))
    }

    /// An access of the port space, which is the kernel's.
    pub(crate) fn at_port<R>(
        &self,
        run: impl FnOnce(&mut crate::bus::Bus) -> R,
    ) -> Result<R, Fault> {
        self.demand_kernel()?;
        sched::yield_point(self.machine);
        Ok(self.machine.with(|inner| run(&mut inner.core.bus)))
    }

    /// `#GP(0)` for an instruction that CPL 3 must not execute (SDM 3A 5.9).
    pub(crate) fn demand_kernel(&self) -> Result<(), Fault> {
        if self.user {
            return Err(Fault::Selector {
                vector: 13,
                code: 0,
            });
        }
        Ok(())
    }

    /// `#GP(0)` for a base that is no address of the processor's: whether it has 57-bit addresses counts, not CR4.LA57.
    pub(crate) fn demand_canonical(&self, base: u64) -> Result<(), Fault> {
        let la57 = self
            .machine
            .with(|inner| inner.core.cpus[self.number].features.la57);
        let widest = if la57 { &LONG5 } else { &LONG4 };
        if widest.is_canonical(base) {
            Ok(())
        } else {
            Err(Fault::GeneralProtection { value: base })
        }
    }

    fn access(&self, kind: AccessKind) -> Access {
        Access {
            kind,
            user: self.user,
            implicit: self.implicit,
        }
    }

    /// Translates one access, with all its effects, and returns the physical address.
    ///
    /// # Errors
    ///
    /// The fault it raises.
    pub fn translate(&self, linear: u64, kind: AccessKind) -> Result<u64, Fault> {
        sched::yield_point(self.machine);
        let access = self.access(kind);
        self.machine
            .with(|inner| inner.core.translate(self.number, linear, access))
    }

    /// What a load sees that runs ahead of its permission check, as on processors with the Meltdown flaw (CVE-2017-5754): the byte behind
    /// whatever translation there is, the kernel's too. `None` where nothing is mapped under the CPU's root and tag. The program never
    /// gets the value as such, but can tell it by timing.
    pub fn transient_read(&self, linear: u64) -> Option<u8> {
        sched::yield_point(self.machine);
        let physical = self
            .machine
            .with(|inner| inner.core.transient(self.number, linear))?;
        let value = self.machine.memory().load(physical, 1)?;
        Some(value as u8)
    }

    /// Fetches an instruction byte.
    ///
    /// # Errors
    ///
    /// The fault it raises.
    pub fn fetch(&self, linear: u64) -> Result<u8, Fault> {
        let mut byte = [0];
        self.chunks(
            linear,
            1,
            AccessKind::Fetch,
            |core, cpu, at, physical, _| {
                core.read_memory(cpu, at, physical, &mut byte);
            },
        )
        .map_err(|(_, fault)| fault)?;
        Ok(byte[0])
    }

    sized_access!(read_u8 write_u8 u8, read_u16 write_u16 u16, read_u32 write_u32 u32, read_u64 write_u64 u64);

    /// Compares and exchanges 8 aligned bytes; `Ok(Err(seen))` if they were not `old`.
    ///
    /// # Errors
    ///
    /// The fault it raises; `#GP` for an address that is not aligned to 8 (split locks are refused).
    pub fn compare_exchange_u64(
        &self,
        linear: u64,
        old: u64,
        new: u64,
    ) -> Result<Result<u64, u64>, Fault> {
        if !linear.is_multiple_of(8) {
            return Err(Fault::GeneralProtection { value: linear });
        }
        sched::yield_point(self.machine);
        let access = self.access(AccessKind::Write);
        self.machine.with(|inner| {
            let physical = inner.core.translate(self.number, linear, access)?;
            let seen = inner.core.memory.load(physical, 8).unwrap_or(u64::MAX);
            if seen != old {
                return Ok(Err(seen));
            }
            inner
                .core
                .write_memory(self.number, linear, physical, &new.to_le_bytes());
            Ok(Ok(seen))
        })
    }

    fn read_small(&self, linear: u64, into: &mut [u8]) -> Result<(), Fault> {
        sched::yield_point(self.machine);
        let access = self.access(AccessKind::Read);
        self.machine.with(|inner| {
            let core = &mut inner.core;
            let first = first_part(linear, into.len());
            let low = core.translate(self.number, linear, access)?;
            if first == into.len() {
                core.read_memory(self.number, linear, low, into);
                return Ok(());
            }
            let next = linear.wrapping_add(first as u64);
            let high = core.translate(self.number, next, access)?;
            core.read_memory(self.number, linear, low, &mut into[..first]);
            core.read_memory(self.number, next, high, &mut into[first..]);
            Ok(())
        })
    }

    fn write_small(&self, linear: u64, from: &[u8]) -> Result<(), Fault> {
        sched::yield_point(self.machine);
        let access = self.access(AccessKind::Write);
        self.machine.with(|inner| {
            let core = &mut inner.core;
            let first = first_part(linear, from.len());
            let low = core.translate(self.number, linear, access)?;
            if first == from.len() {
                core.write_memory(self.number, linear, low, from);
                return Ok(());
            }
            let next = linear.wrapping_add(first as u64);
            let high = core.translate(self.number, next, access)?;
            core.write_memory(self.number, linear, low, &from[..first]);
            core.write_memory(self.number, next, high, &from[first..]);
            Ok(())
        })
    }

    /// Reads bytes, page by page.
    ///
    /// # Errors
    ///
    /// How many bytes were read before the fault, and the fault.
    pub fn read(&self, linear: u64, into: &mut [u8]) -> Result<(), (usize, Fault)> {
        self.chunks(
            linear,
            into.len(),
            AccessKind::Read,
            |core, cpu, at, physical, range| {
                core.read_memory(cpu, at, physical, &mut into[range]);
            },
        )
    }

    /// Writes bytes, page by page.
    ///
    /// # Errors
    ///
    /// How many bytes were written before the fault, and the fault.
    pub fn write(&self, linear: u64, from: &[u8]) -> Result<(), (usize, Fault)> {
        self.chunks(
            linear,
            from.len(),
            AccessKind::Write,
            |core, cpu, at, physical, range| {
                core.write_memory(cpu, at, physical, &from[range]);
            },
        )
    }

    fn chunks(
        &self,
        linear: u64,
        length: usize,
        kind: AccessKind,
        mut each: impl FnMut(&mut Core, usize, u64, u64, std::ops::Range<usize>),
    ) -> Result<(), (usize, Fault)> {
        let access = self.access(kind);
        let mut done = 0;
        while done < length {
            sched::yield_point(self.machine);
            let at = linear.wrapping_add(done as u64);
            let part = first_part(at, length - done);
            self.machine.with(|inner| {
                let physical = inner
                    .core
                    .translate(self.number, at, access)
                    .map_err(|fault| (done, fault))?;
                each(
                    &mut inner.core,
                    self.number,
                    at,
                    physical,
                    done..done + part,
                );
                Ok(())
            })?;
            done += part;
        }
        Ok(())
    }

    /// As [`instruction`](Self::instruction), for one of the kernel's.
    fn privileged(
        &self,
        run: impl FnOnce(&mut CpuState, &crate::memory::PhysMemory, u64) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        self.demand_kernel()?;
        self.instruction(run)
    }

    fn instruction<R>(
        &self,
        run: impl FnOnce(&mut CpuState, &crate::memory::PhysMemory, u64) -> R,
    ) -> R {
        sched::yield_point(self.machine);
        self.machine.with(|inner| {
            let core = &mut inner.core;
            core.step += 1;
            core.stats.flushes += 1;
            let (step, memory) = (core.step, &core.memory);
            run(&mut core.cpus[self.number], memory, step)
        })
    }

    /// Its registers.
    pub fn registers(&self) -> Registers {
        self.machine.with(|inner| inner.core.cpus[self.number].regs)
    }

    /// `MOV CR3`.
    ///
    /// # Errors
    ///
    /// `#GP` at CPL 3, for a value with reserved bits, or for PDPTEs with reserved bits under PAE.
    pub fn write_cr3(&self, value: u64) -> Result<(), Fault> {
        self.privileged(|cpu, memory, step| cpu.write_cr3(memory, step, value))
    }

    /// `MOV CR4`.
    ///
    /// # Errors
    ///
    /// `#GP` at CPL 3, and for a value that the manual refuses.
    pub fn write_cr4(&self, value: u64) -> Result<(), Fault> {
        self.privileged(|cpu, memory, step| cpu.write_cr4(memory, step, value))
    }

    /// `MOV CR0`.
    ///
    /// # Errors
    ///
    /// `#GP` at CPL 3, and for a value that the manual refuses.
    pub fn write_cr0(&self, value: u64) -> Result<(), Fault> {
        self.privileged(|cpu, memory, step| cpu.write_cr0(memory, step, value))
    }

    /// `WRMSR` of IA32_EFER.
    ///
    /// # Errors
    ///
    /// `#GP` at CPL 3, and for a value that the manual refuses.
    pub fn write_efer(&self, value: u64) -> Result<(), Fault> {
        self.privileged(|cpu, _, _| cpu.write_efer(value))
    }

    /// `WRPKRU`, at any privilege.
    ///
    /// # Errors
    ///
    /// `#UD` while CR4.PKE = 0.
    pub fn write_pkru(&self, value: u32) -> Result<(), Fault> {
        self.instruction(|cpu, _, _| cpu.write_pkru(value))
    }

    /// `INVLPG`.
    ///
    /// # Errors
    ///
    /// `#GP(0)` at CPL 3.
    pub fn invlpg(&self, linear: u64) -> Result<(), Fault> {
        self.privileged(|cpu, _, step| {
            cpu.invlpg(step, linear);
            Ok(())
        })
    }

    /// `INVPCID`.
    ///
    /// # Errors
    ///
    /// `#UD` on a processor without it, `#GP` at CPL 3 and for an operand that the manual refuses.
    pub fn invpcid(&self, kind: Invpcid) -> Result<(), Fault> {
        self.instruction(|cpu, _, step| {
            if cpu.features.pcid {
                self.demand_kernel()?;
            }
            cpu.invpcid(step, kind)
        })
    }

    fn set_flag(&self, flag: u64, on: bool) -> bool {
        self.machine.with(|inner| {
            let flags = &mut inner.core.cpus[self.number].regs.rflags;
            let was = *flags & flag != 0;
            *flags = if on { *flags | flag } else { *flags & !flag };
            was
        })
    }

    /// `STAC` (`true`) or `CLAC` (`false`); returns what AC was.
    ///
    /// # Errors
    ///
    /// `#UD` at CPL 3.
    pub fn set_ac(&self, on: bool) -> Result<bool, Fault> {
        if self.user {
            return Err(Fault::InvalidOpcode);
        }
        Ok(self.set_flag(rflags::AC, on))
    }

    /// `STI` (`true`) or `CLI` (`false`); returns what IF was. While IF is 0 no interrupt is taken.
    ///
    /// # Errors
    ///
    /// `#GP(0)` at CPL 3.
    pub fn set_interrupts(&self, on: bool) -> Result<bool, Fault> {
        self.demand_kernel()?;
        let was = self.set_flag(rflags::IF, on);
        if on && !was {
            sched::yield_point(self.machine);
        }
        Ok(was)
    }

    /// The last flush it did that dropped a 4 KiB translation of an address in a PCID, with its step (the last 64 are remembered).
    pub fn last_flush(&self, linear: u64, pcid: u16) -> Option<(u64, Flush)> {
        self.machine
            .with(|inner| inner.core.cpus[self.number].last_flush(linear, pcid, 12))
    }

    /// How many entries its TLBs and walk caches hold.
    pub fn cached_entries(&self) -> u64 {
        self.machine
            .with(|inner| inner.core.cpus[self.number].caches.len())
    }

    /// Whether its TLBs hold an entry that it could use for this address now.
    pub fn holds(&self, linear: u64) -> bool {
        self.machine.with(|inner| {
            let cpu = &inner.core.cpus[self.number];
            cpu.caches.hits(linear, cpu.pcid()).1 > 0
        })
    }
}

/// How many of `length` bytes at `linear` lie in its page.
fn first_part(linear: u64, length: usize) -> usize {
    length.min(4096 - (linear & 0xfff) as usize)
}

impl Core {
    /// The bus: reads bytes inside one frame. Where nothing answers it reads ones, and that is a violation.
    pub(crate) fn read_memory(&mut self, cpu: usize, linear: u64, physical: u64, into: &mut [u8]) {
        let length = into.len() as u64;
        let aligned = matches!(length, 1 | 2 | 4 | 8) && physical.is_multiple_of(length);
        let answered = if aligned {
            let value = self.memory.load(physical, length);
            into.copy_from_slice(&value.unwrap_or(u64::MAX).to_le_bytes()[..into.len()]);
            value.is_some()
        } else {
            let answered = self.memory.read(physical, into);
            if !answered {
                into.fill(0xff);
            }
            answered
        };
        if !answered && !self.bus.read(physical, into) {
            self.no_memory(cpu, linear, physical, "page");
        }
    }

    /// The bus: writes bytes inside one frame. Where nothing answers they are lost, and that is a violation.
    pub(crate) fn write_memory(&mut self, cpu: usize, linear: u64, physical: u64, from: &[u8]) {
        let length = from.len() as u64;
        let aligned = matches!(length, 1 | 2 | 4 | 8) && physical.is_multiple_of(length);
        let answered = if aligned {
            let mut word = [0; 8];
            word[..from.len()].copy_from_slice(from);
            self.memory
                .store(physical, length, u64::from_le_bytes(word))
        } else {
            self.memory.write(physical, from)
        };
        if !answered && !self.bus.write(physical, from) {
            self.no_memory(cpu, linear, physical, "page");
        }
    }
}
