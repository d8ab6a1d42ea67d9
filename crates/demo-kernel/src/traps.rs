//! GDT, TSS, IDT, and the road of an exception: stub (entry.s) -> [`trap`] -> whoever answers.
//!
//! | vector | stack in kernel mode | answered by |
//! |---|---|---|
//! | page fault | the one in use | the process's address space, a scenario, or the copy to user memory that it cuts short |
//! | double fault, NMI | interrupt stack 1 | a report, and the end |
//! | timer, calls of other CPUs | interrupt stack 2 | `sched`, `platform` |
//! | others | interrupt stack 3 | a signal to the process, or a report and the end |
//!
//! A page fault needs no stack of its own: the kernel faults only where it means to, and never inside the prebuilt core,
//! which keeps data below rsp. So a kernel stack that runs into its guard page faults while it pushes, and the double
//! fault that follows has a stack to stand on.

use core::arch::asm;
use core::cell::UnsafeCell;
use core::mem::size_of;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::plant::{self, Plant};
use crate::platform::{MAX_CPUS, answer_calls};
use crate::{apic, console, cpu, differential, println, process, sched, smp, syscall};

/// Exceptions that the processor defines.
const EXCEPTIONS: usize = 22;
const STUBS: usize = EXCEPTIONS + 2;
const STUB_BYTES: usize = 16;
const STACK_BYTES: usize = 32768;
const BREAKPOINT: u64 = 3;
const DOUBLE_FAULT: u64 = 8;
const PAGE_FAULT: u64 = 14;
const TIMER: u64 = apic::TIMER as u64;
const CALL: u64 = apic::CALL as u64;
/// The vector that `entry.s` gives a system call.
const SYSTEM_CALL: u64 = 256;
/// Interrupts are on, in rflags.
const IF: u64 = 1 << 9;

/// Selectors of user mode, as on Linux.
pub const USER_CODE: u64 = 0x33;
/// See [`USER_CODE`].
pub const USER_DATA: u64 = 0x2b;

/// Registers at an entry to the kernel, as the stub pushed them (last pushed first) and as the CPU did.
#[derive(Clone, Copy, Default)]
#[repr(C)]
#[allow(missing_docs)]
pub struct TrapFrame {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rbp: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rbx: u64,
    pub rax: u64,
    pub vector: u64,
    /// The CPU's error code; 0 where it has none, and the number of a system call.
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

impl TrapFrame {
    /// Whether user mode was left.
    pub fn is_user(&self) -> bool {
        self.cs & 3 != 0
    }
}

/// Handles a page fault at a linear address with the CPU's error code; true when the access may be retried.
pub type PageFaultHandler = fn(address: u64, error: u64) -> bool;

/// A scenario's handler for faults in kernel memory; 0 while there is none.
static HANDLER: AtomicUsize = AtomicUsize::new(0);
/// Breakpoints taken so far: `boot` counts them.
pub static BREAKPOINTS: AtomicU64 = AtomicU64::new(0);
/// What a scenario runs in every timer interrupt; 0 while there is nothing.
static ON_TIMER: AtomicUsize = AtomicUsize::new(0);
/// Timer interrupts taken.
pub static TICKS: AtomicU64 = AtomicU64::new(0);
/// What a scenario wants to see of a double fault: given CR2, it ends the run. 0 while none is expected.
static ON_DOUBLE_FAULT: AtomicUsize = AtomicUsize::new(0);

/// Installs a handler for page faults in kernel memory.
pub fn on_page_fault(handler: PageFaultHandler) {
    HANDLER.store(handler as usize, Ordering::Release);
}

/// Has `work` run in every timer interrupt.
pub fn on_timer(work: fn()) {
    ON_TIMER.store(work as usize, Ordering::Release);
}

/// Expects a double fault.
pub fn on_double_fault(report: fn(address: u64, stack: u64) -> bool) {
    ON_DOUBLE_FAULT.store(report as usize, Ordering::Release);
}

#[unsafe(no_mangle)]
extern "C" fn trap(frame: &mut TrapFrame) {
    match frame.vector {
        SYSTEM_CALL => {
            if !differential::intercept(frame, 0, false) {
                cpu::interrupts(true);
                syscall::call(frame);
            }
        }
        PAGE_FAULT => page_fault(frame),
        TIMER => {
            apic::end_of_interrupt();
            let tick = TICKS.fetch_add(1, Ordering::Relaxed);
            cpu::area().share_used.store(true, Ordering::Relaxed);
            smp::do_posted(tick);
            let work = ON_TIMER.load(Ordering::Acquire);
            if work != 0 {
                // SAFETY: only `on_timer` stores there.
                unsafe { core::mem::transmute::<usize, fn()>(work)() };
            }
        }
        CALL => {
            answer_calls();
            apic::end_of_interrupt();
        }
        DOUBLE_FAULT => double_fault(frame),
        BREAKPOINT if !frame.is_user() => {
            BREAKPOINTS.fetch_add(1, Ordering::Relaxed);
        }
        _ if frame.is_user() => {
            cpu::interrupts(true);
            process::exception(frame);
        }
        vector => die(frame, format_args!("exception {vector}")),
    }
    if frame.is_user() {
        cpu::interrupts(true);
        sched::before_user();
    }
}

fn fault_address() -> u64 {
    let address: u64;
    // SAFETY: reading CR2 has no side effect.
    unsafe { asm!("mov {}, cr2", out(reg) address, options(nomem, nostack)) };
    address
}

fn page_fault(frame: &mut TrapFrame) {
    unsafe extern "C" {
        static user_copy: u8;
        static user_copy_end: u8;
    }
    let address = fault_address();
    if differential::intercept(frame, address, true) {
        return;
    }
    // What was interrupted with interrupts on may wait for other CPUs, which may wait for this one.
    if frame.rflags & IF != 0 {
        cpu::interrupts(true);
    }
    if plant::is(Plant::WrongErrorBit) {
        frame.error &= !2;
    }
    if (address >> 63 == 0 || frame.is_user()) && process::page_fault(frame, address) {
        return;
    }
    let copying = &raw const user_copy as u64..&raw const user_copy_end as u64;
    if !frame.is_user() && copying.contains(&frame.rip) {
        frame.rip = copying.end; // rcx says how many bytes are left
        return;
    }
    let handler = HANDLER.load(Ordering::Acquire);
    if handler != 0 && !frame.is_user() {
        // SAFETY: only `on_page_fault` stores there, and it stores such a function.
        let handler: PageFaultHandler = unsafe { core::mem::transmute(handler) };
        if handler(address, frame.error) {
            return;
        }
    }
    die(
        frame,
        format_args!(
            "unhandled page fault at {address:#x}, error {:#x}",
            frame.error
        ),
    )
}

fn double_fault(frame: &TrapFrame) -> ! {
    let address = fault_address();
    let report = ON_DOUBLE_FAULT.load(Ordering::Acquire);
    if report != 0 {
        // SAFETY: only `on_double_fault` stores there.
        let report = unsafe { core::mem::transmute::<usize, fn(u64, u64) -> bool>(report) };
        console::force();
        let success = report(address, frame.rsp);
        println!("{}", if success { "OK" } else { "FAILED" });
        console::exit(success);
    }
    die(frame, format_args!("double fault, CR2 {address:#x}"))
}

fn die(frame: &TrapFrame, what: core::fmt::Arguments<'_>) -> ! {
    console::force();
    println!(
        "{what} on CPU {}, rip {:#x}, rsp {:#x}, error {:#x}",
        crate::platform::this_cpu(),
        frame.rip,
        frame.rsp,
        frame.error
    );
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
    gdt: [u64; 9],
    idt: [Gate; apic::TIMER as usize + 1],
    tss: Tss,
    /// 0 for double fault and NMI, 1 for interrupts, 2 for the rest.
    stacks: [Stack; 3],
}

struct PerCpu(UnsafeCell<Tables>);
// SAFETY: element `i` is written by CPU `i` alone: in `install`, and `rsp[0]` with interrupts off.
unsafe impl Sync for PerCpu {}
static TABLES: [PerCpu; MAX_CPUS] = [const {
    PerCpu(UnsafeCell::new(Tables {
        gdt: [0; 9],
        idt: [Gate([0; 2]); apic::TIMER as usize + 1],
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

/// Says where the CPU pushes when it leaves user mode.
pub fn set_kernel_stack(top: u64) {
    cpu::area().kernel_stack.store(top, Ordering::Relaxed);
    let tables = TABLES[crate::platform::this_cpu().index()].0.get();
    // SAFETY: this CPU's own TSS; the CPU reads it only when it comes from user mode.
    unsafe { (&raw mut (*tables).tss.rsp[0]).write_unaligned(top) };
}

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
        static trap_stubs: [u8; STUBS * STUB_BYTES];
    }
    // SAFETY: called once a CPU, so that no other reference to the element exists.
    let tables = unsafe { &mut *TABLES[cpu].0.get() };
    for slot in 0..tables.stacks.len() {
        tables.tss.ist[slot] = tables.stacks[slot].0.as_ptr_range().end as u64;
    }
    let (tss, limit) = (&raw const tables.tss as u64, size_of::<Tss>() as u64 - 1);
    tables.gdt[1] = 0x00af_9b00_0000_ffff; // 0x08: kernel code, as in boot.s
    tables.gdt[2] = 0x00cf_9300_0000_ffff; // 0x10: kernel data
    tables.gdt[3] = 0x00cf_9b00_0000_ffff; // 0x18: 32-bit kernel code
    tables.gdt[5] = 0x00cf_f300_0000_ffff; // 0x28: user data
    tables.gdt[6] = 0x00af_fb00_0000_ffff; // 0x30: user code
    tables.gdt[7] = limit | (tss & 0xff_ffff) << 16 | 0x89 << 40 | (tss >> 24 & 0xff) << 56; // 0x38: TSS
    tables.gdt[8] = tss >> 32;
    for slot in 0..STUBS {
        let stub = &raw const trap_stubs as u64 + (slot * STUB_BYTES) as u64;
        let (vector, stack) = match slot {
            14 => (14, 0),
            2 | 8 => (slot, 1),
            EXCEPTIONS => (apic::CALL as usize, 2),
            23 => (apic::TIMER as usize, 2),
            _ => (slot, 3),
        };
        let stack = plant::interrupt_stack(vector, stack);
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
        asm!("lgdt [{}]", "lidt [{}]", "ltr {:x}", in(reg) &gdt, in(reg) &idt, in(reg) 0x38u64,
            options(nostack));
    }
}
