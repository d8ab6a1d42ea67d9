//! One access, in the kernel or in user mode, whose fault is an answer and not an accident.
//!
//! ```text
//!   probe_run ──┬─ kernel: the access ──────────────────────┬─> probe_done
//!               └─ iretq ─> user: the access, then SYSCALL ─┤
//!                             a fault on the way ───────────┘   (`intercept` sends both here)
//! ```

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use kmem::VirtAddr;
use kmem::hal::{FlushRequest, FlushScope, Mmu, Root};

use super::steps::{Access, Kind, Outcome, Processor, STUB};
use crate::cpu;
use crate::platform::Machine;
use crate::traps::TrapFrame;

// rdi = which (0 read, 1 write, 2 execute, +4 in user mode), rsi = address, rdx = value, rcx = user rip, r8 = AC
global_asm!(
    ".globl probe_run, probe_done, probe_user, probe_user_end",
    "probe_run:",
    "push rbx; push rbp; push r12; push r13; push r14; push r15",
    "mov [rip + PROBE_STACK], rsp",
    "test dil, 4",
    "jnz 4f",
    "test r8, r8",
    "jz 1f",
    "stac",
    "1: cmp edi, 1",
    "je 2f",
    "ja 3f",
    "mov rax, [rsi]",
    "jmp probe_done",
    "2: mov [rsi], rdx",
    "xor eax, eax",
    "jmp probe_done",
    "3: call rsi",
    "jmp probe_done",
    "4: push 0x2b; push 0; push 2; push 0x33; push rcx",
    "swapgs",
    "iretq",
    "probe_done: clac",
    "mov rsp, [rip + PROBE_STACK]",
    "pop r15; pop r14; pop r13; pop r12; pop rbp; pop rbx",
    "ret",
    // What user mode runs, 16 bytes each: it is copied to a page of its own.
    ".p2align 4",
    "probe_user: mov rax, [rsi]; syscall",
    ".p2align 4",
    "mov [rsi], rdx; xor eax, eax; syscall",
    ".p2align 4",
    "probe_user_end:"
);

#[unsafe(no_mangle)]
static PROBE_STACK: AtomicU64 = AtomicU64::new(0);
static ACTIVE: AtomicBool = AtomicBool::new(false);
static FAULT: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];
const NO_FAULT: u64 = u64::MAX;
/// In an error code: a reserved bit was set.
const RESERVED: u64 = 1 << 3;

/// The code of user mode.
pub fn user_code() -> &'static [u8] {
    unsafe extern "C" {
        static probe_user: u8;
        static probe_user_end: u8;
    }
    let (start, end) = (&raw const probe_user, &raw const probe_user_end);
    // SAFETY: the two labels above.
    unsafe { core::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

/// Ends a probe's access; true where there was one.
pub fn intercept(frame: &mut TrapFrame, address: u64, is_fault: bool) -> bool {
    unsafe extern "C" {
        static probe_done: u8;
    }
    if !ACTIVE.load(Ordering::Relaxed) {
        return false;
    }
    if is_fault {
        FAULT[0].store(frame.error, Ordering::Relaxed);
        FAULT[1].store(address, Ordering::Relaxed);
    }
    frame.rip = &raw const probe_done as u64;
    frame.rsp = PROBE_STACK.load(Ordering::Relaxed);
    (frame.cs, frame.ss, frame.rflags) = (0x08, 0, 2);
    true
}

/// The processor that runs this kernel.
pub struct Here {
    /// What is loaded while programs run.
    pub root: Root,
}

impl Processor for Here {
    fn access(&mut self, access: Access, address: u64, value: u64) -> Outcome {
        unsafe extern "C" {
            fn probe_run(which: u64, address: u64, value: u64, rip: u64, ac: bool) -> u64;
        }
        let which = match access.kind {
            Kind::Read => 0,
            Kind::Write => 1,
            Kind::Execute => 2,
        };
        let rip = if access.kind == Kind::Execute {
            address
        } else {
            STUB + 16 * which
        };
        cpu::without_interrupts(|| {
            FAULT[0].store(NO_FAULT, Ordering::Relaxed);
            ACTIVE.store(true, Ordering::Relaxed);
            let mode = if access.user { 4 } else { 0 };
            // SAFETY: whatever the access does, `intercept` brings the CPU back; it reaches the bench's memory alone.
            let value = unsafe { probe_run(which | mode, address, value, rip, access.ac) };
            ACTIVE.store(false, Ordering::Relaxed);
            let at = FAULT[1].load(Ordering::Relaxed);
            match FAULT[0].load(Ordering::Relaxed) {
                NO_FAULT => Outcome::Value(value),
                // "Bit 3 can be set only if bit 0 is also set" (processor manual 3A, 4.7). QEMU 7.2 leaves bit 0 clear.
                code if code & RESERVED != 0 => Outcome::Fault(code as u32 | 1, at),
                code => Outcome::Fault(code as u32, at),
            }
        })
    }

    fn control(&mut self, wp: bool, smep: bool, smap: bool) {
        let (cr0, cr4): (u64, u64);
        // SAFETY: reading has no effect; the kernel touches user memory in `access` alone meanwhile.
        unsafe {
            asm!("mov {}, cr0", "mov {}, cr4", out(reg) cr0, out(reg) cr4, options(nostack));
            let cr0 = cr0 & !(1 << 16) | u64::from(wp) << 16;
            let cr4 = cr4 & !(3 << 20) | u64::from(smep) << 20 | u64::from(smap) << 21;
            asm!("mov cr0, {}", "mov cr4, {}", in(reg) cr0, in(reg) cr4, options(nostack));
        }
    }

    fn invlpg(&mut self, address: u64) {
        // SAFETY: drops cached translations; no effect on memory.
        unsafe { asm!("invlpg [{}]", in(reg) VirtAddr::new(address).as_u64(), options(nostack)) };
    }

    fn flush_all(&mut self) {
        Machine.flush_local(&FlushRequest {
            root: self.root,
            scope: FlushScope::Everything,
            global: true,
            tables_freed: true,
        });
    }
}
