//! The local interrupt controller: interrupts to other CPUs, and a timer.
//!
//! Source: processor manual volume 3, chapter 12.

use core::sync::atomic::{AtomicU64, Ordering};

use kmem::hal::CpuId;

use crate::console;
use crate::layout::DIRECT;

/// Where the registers are after reset, physically.
pub const PHYSICAL: u64 = 0xfee0_0000;
/// The vector by which one CPU asks another to run a function.
pub const CALL: u32 = 64;
/// The timer's vector.
pub const TIMER: u32 = 65;
/// Commands that start a CPU: INIT, and start-up at physical page 8.
pub const INIT: u32 = 0x4500;
/// See [`INIT`].
pub const START: u32 = 0x4608;

const END_OF_INTERRUPT: u64 = 0xb0;
const SPURIOUS: u64 = 0xf0;
const COMMAND_LOW: u64 = 0x300;
const COMMAND_HIGH: u64 = 0x310;
const TIMER_ENTRY: u64 = 0x320;
const TIMER_COUNT: u64 = 0x380;
const TIMER_DIVIDER: u64 = 0x3e0;
/// Ticks of 16 bus clocks (1 GHz in QEMU) between two interrupts: 2 ms.
const PERIOD: u32 = 125_000;

/// Where the registers are mapped: in the direct map until the fixmap exists.
static REGISTERS: AtomicU64 = AtomicU64::new(DIRECT + PHYSICAL);

/// Moves to another mapping of the registers.
pub fn set_registers(address: u64) {
    REGISTERS.store(address, Ordering::Release);
}

fn register(offset: u64) -> *mut u32 {
    (REGISTERS.load(Ordering::Acquire) + offset) as *mut u32
}

/// Switches this CPU's controller on, and interrupts.
///
/// # Safety
/// Once on each CPU, after `traps::install`.
pub unsafe fn start() {
    // SAFETY: the old controller (ports 0x21 and 0xa1) is silenced, whose timer would arrive as vector 8; firmware leaves
    // the new one at its reset address; nothing makes spurious interrupts.
    unsafe {
        console::outb(0x21, 0xff);
        console::outb(0xa1, 0xff);
        register(SPURIOUS).write_volatile(0x1ff);
        core::arch::asm!("sti", options(nomem, nostack));
    }
}

/// Starts this CPU's timer: an interrupt every 2 ms.
pub fn start_timer() {
    // SAFETY: the gate of the vector is installed.
    unsafe {
        register(TIMER_DIVIDER).write_volatile(0b0011); // by 16
        register(TIMER_ENTRY).write_volatile(TIMER | 1 << 17); // periodic
        register(TIMER_COUNT).write_volatile(PERIOD);
    }
}

/// Sends an interrupt: a vector, or a command that starts a CPU.
pub fn send(cpu: CpuId, command: u32) {
    // SAFETY: QEMU numbers interrupt controllers as we number CPUs; a command touches no memory of ours. Both halves are
    // written with interrupts off, so that an interrupt's own command does not come between.
    crate::cpu::without_interrupts(|| unsafe {
        register(COMMAND_HIGH).write_volatile(cpu.get() << 24);
        register(COMMAND_LOW).write_volatile(command | 0x4000);
        while register(COMMAND_LOW).read_volatile() & 1 << 12 != 0 {} // until it is delivered
    });
}

/// Tells the controller that the interrupt is served.
pub fn end_of_interrupt() {
    // SAFETY: touches no memory of ours.
    unsafe { register(END_OF_INTERRUPT).write_volatile(0) };
}
