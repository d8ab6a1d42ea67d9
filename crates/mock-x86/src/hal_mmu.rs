//! hal's `Mmu` on the machine: what a kernel's own few lines of assembly would be.
//!
//! | call | on the machine |
//! |---|---|
//! | `load_root` | `MOV CR3`, with bit 63 for `keep` where CR4.PCIDE = 1 |
//! | `flush_local` | `INVLPG` per page up to 33 pages, else `INVPCID` or a load of CR3; CR4.PGE toggles on processors without `INVPCID` |
//! | `shootdown` | one interrupt per CPU, taken at its next yield point or later |
//! | `active_cpus` | CPUs with the root loaded, or left under its PCID without a flush since |

use kmem_hal::{
    Asid, Completion, CpuId, CpuSet, FlushRequest, FlushScope, Frame, Mmu, Page, Root, Tlb,
};

use crate::cpu::Invpcid;
use crate::hal_cpu::cpu_id;
use crate::interrupt::{FlushWhat, FlushWork};
use crate::machine::Machine;
use crate::manual::{cr3, cr4};
use crate::sched;

impl From<&FlushRequest> for FlushWork {
    fn from(request: &FlushRequest) -> Self {
        let what = match request.scope {
            FlushScope::Pages { range, stride } => FlushWhat::Range {
                first: range.start().as_u64(),
                last: range.last().start().as_u64(),
                stride: stride.saturating_mul(4096),
            },
            FlushScope::Space => FlushWhat::Space,
            // Whatever a later hal adds is flushed too widely, never too narrowly.
            _ => FlushWhat::Everything,
        };
        FlushWork {
            root: request.root.frame.start().as_u64(),
            pcid: request.root.asid.get(),
            what,
            global: request.global,
            tables_freed: request.tables_freed,
        }
    }
}

// SAFETY: M1: `Inner::flush` drops what the request names, by the manual's table in `cpu`; M2: a ticket closes when the last CPU has
// done so; M3: `may_hold` remembers every root loaded since the CPU's last flush of its PCID; M4: walks read the memory that
// entries are stored to, in program order of one host thread; M5: CR3 of each CPU is looked at.
unsafe impl Mmu for Machine {
    unsafe fn load_root(&self, root: Root, keep: bool) {
        let cpu = self.cpu(self.current_cpu());
        let mut value = root.frame.start().as_u64();
        if cpu.registers().cr4 & cr4::PCIDE != 0 {
            value |= u64::from(root.asid.get()) & cr3::PCID_MASK;
            if keep {
                value |= cr3::NO_FLUSH;
            }
        }
        if let Err(fault) = cpu.write_cr3(value) {
            panic!("loading root {root:?}: {fault}");
        }
    }

    fn flush_local(&self, request: &FlushRequest) {
        self.flush_cpu(self.current_cpu(), &request.into());
    }

    fn active_cpus(&self, root: Root) -> CpuSet {
        let address = root.frame.start().as_u64();
        let holders = self.with(|inner| {
            let cpus = inner.core.cpus.iter().enumerate();
            cpus.filter(|(_, cpu)| cpu.may_hold(address))
                .map(|(number, _)| number)
                .collect::<Vec<_>>()
        });
        let mut set: CpuSet = holders.into_iter().map(cpu_id).collect();
        set.insert(self.this_cpu());
        set
    }

    fn is_loaded(&self, root: Root) -> bool {
        let address = root.frame.start().as_u64();
        self.with(|inner| {
            let mut cpus = inner.core.cpus.iter();
            cpus.any(|cpu| cpu.regs.cr3 & !cr3::PCID_MASK == address)
        })
    }

    fn this_cpu(&self) -> CpuId {
        cpu_id(self.current_cpu())
    }

    fn shootdown(&self, cpus: &CpuSet, request: &FlushRequest) -> Completion {
        let me = self.current_cpu();
        let numbers: Vec<usize> = cpus
            .iter()
            .map(CpuId::index)
            .filter(|&cpu| cpu < self.cpu_count() && cpu != me)
            .collect();
        Completion::new(self.send_flush(&numbers, request.into()))
    }

    fn complete(&self, completion: Completion) {
        sched::yield_point(self);
        self.wait_for(completion.ticket());
    }

    fn asid_count(&self) -> u16 {
        if self.cpu(0).registers().cr4 & cr4::PCIDE != 0 {
            4096
        } else {
            1
        }
    }
}

// SAFETY: T1 to T5: each is one instruction, which drops what the manual says (`cpu`); T6: one host thread, in program order.
unsafe impl Tlb for Machine {
    fn tags(&self) -> u16 {
        Mmu::asid_count(self)
    }

    unsafe fn load(&self, root: Root, keep: bool) {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.load_root(root, keep) }
    }

    fn drop_page(&self, page: Page) {
        let done = self.cpu(self.current_cpu()).invlpg(page.start().as_u64());
        debug_assert!(done.is_ok(), "the kernel's CPU");
    }

    fn drop_page_of(&self, tag: Asid, page: Page) -> bool {
        self.drop_tagged(Invpcid::Address {
            pcid: tag.get(),
            linear: page.start().as_u64(),
        })
    }

    fn drop_current(&self) {
        let cpu = self.cpu(self.current_cpu());
        let value = cpu.registers().cr3;
        if let Err(fault) = cpu.write_cr3(value) {
            panic!("CR3 {value:#x} again: {fault}");
        }
    }

    fn drop_tag(&self, tag: Asid) -> bool {
        self.drop_tagged(Invpcid::Context { pcid: tag.get() })
    }

    fn drop_all(&self) {
        if self.drop_tagged(Invpcid::AllWithGlobal) {
            return;
        }
        let cpu = self.cpu(self.current_cpu());
        let value = cpu.registers().cr4;
        for value in [value ^ cr4::PGE, value] {
            if let Err(fault) = cpu.write_cr4(value) {
                panic!("CR4 {value:#x}: {fault}");
            }
        }
    }
}

impl Machine {
    /// `INVPCID` on the current CPU, if it has that instruction.
    fn drop_tagged(&self, kind: Invpcid) -> bool {
        self.cpu(self.current_cpu()).invpcid(kind).is_ok()
    }

    /// The root that a CPU translates through, as hal names it.
    pub fn loaded_root(&self, cpu: usize) -> Root {
        let (value, pcid) = self.with(|inner| {
            let state = &inner.core.cpus[cpu];
            (state.regs.cr3, state.pcid())
        });
        Root {
            frame: Frame::from_number(value >> 12),
            asid: Asid::new(pcid),
        }
    }
}
