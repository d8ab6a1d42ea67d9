//! GDT, TSS, IDT, and the road of an exception: stub (boot.s) -> [`trap`] -> the scenario's page-fault
//! handler, or a report and the end.
//!
//! Each gate runs on an interrupt stack of its own. A gate must therefore not be re-entered on the same
//! stack: a page fault inside the page-fault handler is reported and ends the run.

use core::arch::asm;
use core::cell::UnsafeCell;
use core::mem::size_of;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::platform::MAX_CPUS;
use crate::{console, println};

/// Exceptions that the processor defines.
const EXCEPTIONS: usize = 22;
/// The vector by which one CPU asks another to run a function.
pub const CALL_VECTOR: u64 = 64;
const STUB_BYTES: usize = 16;
const STACK_BYTES: usize = 16384;
const BREAKPOINT: u64 = 3;
const PAGE_FAULT: u64 = 14;

/// Registers at an exception, as the stub pushed them (last pushed first) and as the CPU did.
#[repr(C)]
pub struct TrapFrame {
    registers: [u64; 15],
    vector: u64,
    /// The CPU's error code, or 0.
    pub error: u64,
    /// The interrupted instruction.
    pub rip: u64,
    cs: u64,
    rflags: u64,
    /// The interrupted stack pointer.
    pub rsp: u64,
    ss: u64,
}

/// Handles a page fault at a linear address with the CPU's error code; true when the access may be retried.
pub type PageFaultHandler = fn(address: u64, error: u64) -> bool;

/// The handler's address; 0 while there is none.
static HANDLER: AtomicUsize = AtomicUsize::new(0);
/// CPUs that are in the page-fault handler, a bit each.
static IN_PAGE_FAULT: AtomicU64 = AtomicU64::new(0);
/// Breakpoints taken so far: `boot` counts them.
pub static BREAKPOINTS: AtomicU64 = AtomicU64::new(0);

/// Installs the page-fault handler.
pub fn on_page_fault(handler: PageFaultHandler) {
    HANDLER.store(handler as usize, Ordering::Release);
}

#[unsafe(no_mangle)]
extern "C" fn trap(frame: &mut TrapFrame) {
    match frame.vector {
        BREAKPOINT => {
            BREAKPOINTS.fetch_add(1, Ordering::Relaxed);
            return;
        }
        CALL_VECTOR => {
            crate::smp::on_call_interrupt();
            return;
        }
        PAGE_FAULT => {
            let address: u64;
            // SAFETY: reading CR2 has no side effect.
            unsafe { asm!("mov {}, cr2", out(reg) address, options(nomem, nostack)) };
            let handler = HANDLER.load(Ordering::Acquire);
            let this = 1 << crate::platform::this_cpu().get();
            if handler != 0 && IN_PAGE_FAULT.fetch_or(this, Ordering::Relaxed) & this == 0 {
                // What was interrupted with interrupts on may wait for other CPUs, which may wait for this one.
                let interrupts = frame.rflags & 1 << 9 != 0;
                if interrupts {
                    // SAFETY: other gates have stacks of their own.
                    unsafe { asm!("sti", options(nomem, nostack)) };
                }
                // SAFETY: only `on_page_fault` stores there, and it stores such a function.
                let handler: PageFaultHandler = unsafe { core::mem::transmute(handler) };
                let handled = handler(address, frame.error);
                // SAFETY: the stub's way back must not be interrupted.
                unsafe { asm!("cli", options(nomem, nostack)) };
                IN_PAGE_FAULT.fetch_and(!this, Ordering::Relaxed);
                if handled {
                    return;
                }
            }
            console::force();
            println!(
                "unhandled page fault at {address:#x}, error {:#x}, rip {:#x}",
                frame.error, frame.rip
            );
        }
        vector => {
            console::force();
            println!(
                "exception {vector}, error {:#x}, rip {:#x}, rsp {:#x}",
                frame.error, frame.rip, frame.rsp
            );
        }
    }
    console::exit(false)
}

#[repr(C, align(16))]
struct Stack([u8; STACK_BYTES]);

/// Processor manual volume 3, section 9.7 (64-bit TSS).
#[repr(C, packed(4))]
struct Tss {
    reserved0: u32,
    rsp: [u64; 3],
    reserved1: u64,
    ist: [u64; 7],
    reserved2: u64,
    reserved3: u16,
    io_map: u16,
}

#[repr(C, align(16))]
#[derive(Clone, Copy)]
struct Gate([u64; 2]);

#[repr(C, align(16))]
struct Tables {
    gdt: [u64; 4],
    idt: [Gate; CALL_VECTOR as usize + 1],
    tss: Tss,
    /// 0 for the page fault, 1 for double fault and NMI, 2 for the rest.
    stacks: [Stack; 3],
}

struct PerCpu(UnsafeCell<Tables>);
// SAFETY: element `i` is written once, by CPU `i` in `install`, before it loads it.
unsafe impl Sync for PerCpu {}
static TABLES: [PerCpu; MAX_CPUS] = [const {
    PerCpu(UnsafeCell::new(Tables {
        gdt: [0; 4],
        idt: [Gate([0; 2]); CALL_VECTOR as usize + 1],
        tss: Tss {
            reserved0: 0,
            rsp: [0; 3],
            reserved1: 0,
            ist: [0; 7],
            reserved2: 0,
            reserved3: 0,
            io_map: size_of::<Tss>() as u16,
        },
        stacks: [const { Stack([0; STACK_BYTES]) }; 3],
    }))
}; MAX_CPUS];

#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: u64,
}

/// Builds and loads GDT, TSS and IDT of one CPU.
///
/// # Safety
/// Called once on each CPU, with its own number and interrupts off.
pub unsafe fn install(cpu: usize) {
    unsafe extern "C" {
        static trap_stubs: [u8; (EXCEPTIONS + 1) * STUB_BYTES];
    }
    // SAFETY: called once a CPU, so that no other reference to the element exists.
    let tables = unsafe { &mut *TABLES[cpu].0.get() };
    for slot in 0..tables.stacks.len() {
        tables.tss.ist[slot] = tables.stacks[slot].0.as_ptr_range().end as u64;
    }
    let (tss, limit) = (&raw const tables.tss as u64, size_of::<Tss>() as u64 - 1);
    tables.gdt[1] = 0x00af_9b00_0000_ffff; // 0x08: 64-bit code, as in boot.s
    tables.gdt[2] = limit | (tss & 0xff_ffff) << 16 | 0x89 << 40 | (tss >> 24 & 0xff) << 56; // 0x10: TSS
    tables.gdt[3] = tss >> 32;
    for slot in 0..=EXCEPTIONS {
        let stub = &raw const trap_stubs as u64 + (slot * STUB_BYTES) as u64;
        let (vector, stack) = match slot {
            14 => (14, 1),
            2 | 8 => (slot, 2),
            EXCEPTIONS => (CALL_VECTOR as usize, 3),
            _ => (slot, 3),
        };
        let low =
            stub & 0xffff | 0x08 << 16 | stack << 32 | 0x8e00 << 32 | (stub >> 16 & 0xffff) << 48;
        tables.idt[vector] = Gate([low, stub >> 32]);
    }
    let gdt = Pointer {
        limit: (size_of_val(&tables.gdt) - 1) as u16,
        base: tables.gdt.as_ptr() as u64,
    };
    let idt = Pointer {
        limit: (size_of_val(&tables.idt) - 1) as u16,
        base: tables.idt.as_ptr() as u64,
    };
    // SAFETY: the tables are complete, static, and give code the selector it runs with.
    unsafe {
        asm!("lgdt [{}]", "lidt [{}]", "ltr {:x}", in(reg) &gdt, in(reg) &idt, in(reg) 0x10u64,
            options(nostack));
    }
}
