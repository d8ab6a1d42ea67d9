//! **What kmem asks of a kernel, on x86-64.** Copy this file and change what is marked.
//!
//! | hal's trait | here | contract |
//! |---|---|---|
//! | `PhysMap` | [`phys`], hal's own `OffsetMap` | physical memory is mapped at [`DIRECT`] |
//! | `Cpu` | [`Machine`] | the number stands in a per-CPU word behind `gs` |
//! | `CpuCall` | [`Machine`] | an interrupt to each CPU (`smp.rs`) |
//! | `Mmu` | [`Machine`] | CR3, `invlpg`, and a call to the other CPUs |
//! | `RawLock` | hal's own `IrqSafe` | `cli` and spin |
//!
//! A kernel with one CPU needs none of this but `load_root` and `flush_local`: hal has `SingleCpu`.

use core::arch::asm;

use kmem::hal::{
    Completion, Cpu, CpuCall, CpuCallError, CpuId, CpuSet, FlushRequest, FlushScope, Mmu,
    OffsetMap, Root,
};

/// CPUs that this kernel can run. *Change it to what your tables have room for.*
pub const MAX_CPUS: usize = 4;
/// Where `boot.s` maps physical memory (top-table entry 256). *Yours may come from the boot loader.*
pub const DIRECT: u64 = 0xffff_8000_0000_0000;
/// Physical memory that is mapped there from boot on, in bytes.
pub const DIRECT_BYTES: u64 = 4 << 30;
/// Linear minus physical address of the image (`kernel.ld`).
pub const IMAGE_BASE: u64 = 0xffff_ffff_8000_0000;

/// Physical memory, as kmem reaches it.
pub const fn phys() -> OffsetMap {
    // SAFETY: P1, P2: boot.s maps frames 0 to 2^20 there, write-back; kmem touches only what the memory map calls usable.
    unsafe { OffsetMap::new(DIRECT as usize, DIRECT_BYTES >> 12) }
}

/// The processors of this machine. No state of its own.
#[derive(Clone, Copy, Debug)]
pub struct Machine;

/// Behind `gs` on each CPU.
#[repr(C)]
struct Area {
    id: u32,
}
static AREAS: [Area; MAX_CPUS] = [
    Area { id: 0 },
    Area { id: 1 },
    Area { id: 2 },
    Area { id: 3 },
];

/// Tells this CPU its number.
///
/// # Safety
/// Once on each CPU, before anything asks for the number, each with a number of its own.
pub unsafe fn set_this_cpu(cpu: usize) {
    let area = &raw const AREAS[cpu] as u64;
    // SAFETY: IA32_GS_BASE takes any canonical address; nothing else here uses gs.
    unsafe {
        asm!("wrmsr", in("ecx") 0xc000_0101u32, in("eax") area as u32, in("edx") (area >> 32) as u32,
            options(nostack, preserves_flags));
    }
}

/// The CPU that runs this code.
pub fn this_cpu() -> CpuId {
    let id: u32;
    // SAFETY: `set_this_cpu` made gs point to an `Area`, whose first word is the number.
    unsafe { asm!("mov {:e}, gs:[0]", out(reg) id, options(nostack, preserves_flags, readonly)) };
    CpuId::new(id)
}

// SAFETY: C1, C2, C4: this kernel never moves or preempts code, so that a pin needs nothing. *With a scheduler, count
// preemption here.* C3: ids are below MAX_CPUS. C5: a CPU sees its own stores.
unsafe impl Cpu for Machine {
    type Guard<'a> = ();

    fn raw_pin(&self) {}

    fn id(&self, _guard: &()) -> CpuId {
        this_cpu()
    }

    fn count(&self) -> u32 {
        MAX_CPUS as u32
    }
}

// SAFETY: R1 to R3: `smp::call` returns when every CPU has run `f` and answered with a release store.
unsafe impl CpuCall for Machine {
    fn run_on(&self, cpus: &CpuSet, f: &(dyn Fn(CpuId) + Sync)) -> Result<(), CpuCallError> {
        crate::smp::call(cpus, f);
        Ok(())
    }
}

// SAFETY: M1: invlpg and a write to CR3 are serialising and drop paging-structure caches too. M2: `shootdown` returns
// when every CPU has flushed. M3: all CPUs share the one kernel space, so that all online ones are active. M4: an
// interrupt arrives after the stores made before it was sent.
unsafe impl Mmu for Machine {
    unsafe fn load_root(&self, root: Root, _keep: bool) {
        // SAFETY: the caller's promise: the tables map what runs. No PCIDs here, so that nothing is kept.
        unsafe { asm!("mov cr3, {}", in(reg) root.frame.start().as_u64(), options(nostack)) };
    }

    fn flush_local(&self, request: &FlushRequest) {
        match request.scope {
            FlushScope::Pages { range, stride } if range.count() / stride.max(1) <= 32 => {
                for page in range.iter().step_by(stride.max(1) as usize) {
                    // SAFETY: drops cached translations; no effect on memory.
                    unsafe { asm!("invlpg [{}]", in(reg) page.start().as_u64(), options(nostack)) };
                }
            }
            FlushScope::Space if !request.global => {
                // SAFETY: the same root again.
                unsafe { asm!("mov {0}, cr3", "mov cr3, {0}", out(reg) _, options(nostack)) };
            }
            // Global entries survive a write to CR3: switch CR4.PGE (bit 7) off and on.
            _ => {
                // SAFETY: the bit is set again at once; interrupts do no harm in between.
                unsafe {
                    asm!("mov {0}, cr4", "mov {1}, {0}", "and {1}, -129", "mov cr4, {1}", "mov cr4, {0}",
                        out(reg) _, out(reg) _, options(nostack));
                }
            }
        }
    }

    fn active_cpus(&self, _root: Root) -> CpuSet {
        crate::smp::online()
    }

    fn this_cpu(&self) -> CpuId {
        this_cpu()
    }

    fn shootdown(&self, cpus: &CpuSet, request: &FlushRequest) -> Completion {
        crate::smp::shootdown(cpus, &|_| self.flush_local(request));
        Completion::DONE
    }
}

/// The root table that is loaded.
pub fn current_root() -> u64 {
    let root: u64;
    // SAFETY: reading CR3 has no effect.
    unsafe { asm!("mov {}, cr3", out(reg) root, options(nostack, nomem)) };
    root & !0xfff
}

/// The root table of `boot.s`.
pub fn boot_root() -> u64 {
    unsafe extern "C" {
        static boot_pml4: u8;
    }
    &raw const boot_pml4 as u64
}

/// A pointer to physical memory below 4 GiB.
pub fn direct(physical: u64) -> *mut u8 {
    assert!(
        physical < DIRECT_BYTES,
        "{physical:#x} is beyond the direct map"
    );
    (DIRECT + physical) as *mut u8
}

/// The first physical byte after the image.
pub fn image_end() -> u64 {
    unsafe extern "C" {
        static __image_end: u8;
    }
    &raw const __image_end as u64 - IMAGE_BASE
}

/// Switches the identity map of `boot.s` (top-table entry 0) off or on again.
///
/// # Safety
/// To switch it off, nothing may run or point below the direct map any more.
pub unsafe fn identity_map(on: bool) {
    // SAFETY: entries 0 and 256 of boot.s's top table reach the same tables; the caller's promise; loading CR3 again
    // flushes.
    unsafe {
        let top = direct(boot_root()).cast::<u64>();
        let entry = if on { top.add(256).read_volatile() } else { 0 };
        top.write_volatile(entry);
        asm!("mov {0}, cr3", "mov cr3, {0}", out(reg) _, options(nostack));
    }
}
