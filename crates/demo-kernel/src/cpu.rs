//! What each CPU has for itself, behind `gs`, and the few registers that only the kernel touches.

use core::arch::asm;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};

use crate::platform::{MAX_CPUS, this_cpu};
use crate::sched::Thread;

const EFER_STAR: u32 = 0xc000_0081;
const EFER_LSTAR: u32 = 0xc000_0082;
const EFER_FMASK: u32 = 0xc000_0084;
const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// One CPU's own words. `entry.s` and `platform.rs` know the first three.
#[repr(C)]
pub struct Area {
    id: u32,
    /// Top of the running thread's kernel stack.
    pub kernel_stack: AtomicU64,
    /// The user's stack pointer, for some instructions after SYSCALL.
    user_stack: AtomicU64,
    /// Where the CPU's own stack was left when a thread was switched to.
    pub own_stack: AtomicU64,
    /// The running thread; null where there is none.
    pub thread: AtomicPtr<Thread>,
    /// The timer says that the thread had its share.
    pub share_used: AtomicBool,
}

impl Area {
    const fn new(id: u32) -> Self {
        Self {
            id,
            kernel_stack: AtomicU64::new(0),
            user_stack: AtomicU64::new(0),
            own_stack: AtomicU64::new(0),
            thread: AtomicPtr::new(ptr::null_mut()),
            share_used: AtomicBool::new(false),
        }
    }
}

static AREAS: [Area; MAX_CPUS] = [Area::new(0), Area::new(1), Area::new(2), Area::new(3)];

/// The area of the CPU that runs this code.
pub fn area() -> &'static Area {
    &AREAS[this_cpu().index()]
}

/// The thread that this CPU runs.
pub fn thread() -> Option<&'static Thread> {
    let thread = area().thread.load(Ordering::Relaxed);
    // SAFETY: threads stand in a static table.
    unsafe { thread.as_ref() }
}

/// Tells this CPU its number, and where system calls go.
///
/// # Safety
/// Once on each CPU, before anything asks for the number, each with a number of its own.
pub unsafe fn install(cpu: usize) {
    unsafe extern "C" {
        static syscall_entry: u8;
    }
    // SAFETY: gs points to the area; the user's gs, exchanged by swapgs, is 0; SYSCALL loads selectors 0x08 and 0x10 and
    // clears IF, DF, TF and AC.
    unsafe {
        write_msr(GS_BASE, &raw const AREAS[cpu] as u64);
        write_msr(KERNEL_GS_BASE, 0);
        write_msr(EFER_STAR, 0x08 << 32);
        write_msr(EFER_LSTAR, &raw const syscall_entry as u64);
        write_msr(EFER_FMASK, 0x4_0700);
    }
}

/// Sets the user's `fs` base, where C keeps a thread's own data.
pub fn set_fs_base(address: u64) {
    // SAFETY: the caller checked that it is a user address; the kernel does not use fs.
    unsafe { write_msr(FS_BASE, address) };
}

unsafe fn write_msr(register: u32, value: u64) {
    // SAFETY: the caller knows the register.
    unsafe {
        asm!("wrmsr", in("ecx") register, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nostack, preserves_flags));
    }
}

/// Runs `work` with interrupts off on this CPU.
pub fn without_interrupts<R>(work: impl FnOnce() -> R) -> R {
    let flags: u64;
    // SAFETY: the flag is put back as it was.
    unsafe { asm!("pushfq", "pop {}", "cli", out(reg) flags) };
    let result = work();
    if flags & 1 << 9 != 0 {
        interrupts(true);
    }
    result
}

/// Switches interrupts on or off on this CPU.
pub fn interrupts(on: bool) {
    // SAFETY: whoever holds a lock that an interrupt may want has them off by `without_interrupts` or `IrqSafe`.
    unsafe {
        if on {
            asm!("sti", options(nomem, nostack));
        } else {
            asm!("cli", options(nomem, nostack));
        }
    }
}

/// Sleeps until the next interrupt, unless `wanted` says that there is work: asked with interrupts off.
pub fn sleep_unless(wanted: impl FnOnce() -> bool) {
    interrupts(false);
    if wanted() {
        interrupts(true);
    } else {
        // SAFETY: sti takes effect after the next instruction, so that no wake-up is lost in between.
        unsafe { asm!("sti", "hlt", options(nomem, nostack)) };
    }
}
