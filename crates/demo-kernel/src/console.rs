//! The serial port as `println!`, and the way out of QEMU.

use core::arch::asm;
use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};

/// QEMU's first serial port.
const COM1: u16 = 0x3f8;
/// The `isa-debug-exit` device of the runner's command line; QEMU ends with `(value << 1) | 1`.
const DEBUG_EXIT: u16 = 0xf4;

/// Sets the port up, which QEMU does not ask for: bytes of 8 bits, and the transmitter's queue of 16.
pub fn start() {
    // SAFETY: COM1's line control (+3) and queue control (+2) touch no memory.
    unsafe {
        outb(COM1 + 3, 3);
        outb(COM1 + 2, 1);
    }
}

/// Writes a byte to an I/O port.
///
/// # Safety
/// The device behind `port` must take `value` without harm to memory.
pub unsafe fn outb(port: u16, value: u8) {
    // SAFETY: the caller's promise.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) }
}

/// Reads a byte from an I/O port.
///
/// # Safety
/// Reading `port` must have no effect on memory.
unsafe fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: the caller's promise.
    unsafe { asm!("in al, dx", out("al") value, in("dx") port, options(nomem, nostack)) }
    value
}

/// The serial port, for `write!`.
pub struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // The transmitter takes 16 bytes at a time.
        for bytes in text.as_bytes().chunks(16) {
            // SAFETY: COM1's line status (+5, bit 5: transmitter empty) and data register touch no memory.
            unsafe {
                while inb(COM1 + 5) & 0x20 == 0 {}
                bytes.iter().for_each(|byte| outb(COM1, *byte));
            }
        }
        Ok(())
    }
}

/// Keeps the lines of two CPUs apart. A panic takes it by force.
static BUSY: AtomicBool = AtomicBool::new(false);

/// Writes formatted text as one piece; `println!` calls it.
pub fn write(text: fmt::Arguments<'_>) {
    while BUSY.swap(true, Ordering::Acquire) {
        core::hint::spin_loop();
    }
    let _ = fmt::Write::write_fmt(&mut Serial, text);
    BUSY.store(false, Ordering::Release);
}

/// Writes bytes as they are.
pub fn write_bytes(bytes: &[u8]) {
    match core::str::from_utf8(bytes) {
        Ok(text) => write(format_args!("{text}")),
        Err(_) => write(format_args!("{bytes:?}")),
    }
}

static TRACE: AtomicBool = AtomicBool::new(false);

/// Has every system call printed, as strace does.
pub fn trace_calls() {
    TRACE.store(true, Ordering::Relaxed);
}

/// Whether system calls shall be printed.
pub fn traces_calls() -> bool {
    TRACE.load(Ordering::Relaxed)
}

/// Frees the serial port whoever holds it, so that a panic inside `println!` is seen.
pub fn force() {
    BUSY.store(false, Ordering::Release);
}

/// Ends QEMU: status 33 says success, 35 failure.
pub fn exit(success: bool) -> ! {
    end(if success { 0x10 } else { 0x11 })
}

/// Ends QEMU with status 37: something that the scenario needs is missing.
pub fn skip(why: &str) -> ! {
    crate::println!("SKIPPED: {why}");
    end(0x12)
}

fn end(code: u8) -> ! {
    // SAFETY: the exit device ends the machine.
    unsafe { outb(DEBUG_EXIT, code) };
    halt()
}

/// Stops this CPU for good.
pub fn halt() -> ! {
    loop {
        // SAFETY: nothing is expected to happen any more.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) }
    }
}

/// Prints a line on the serial port.
#[macro_export]
macro_rules! println {
    ($($part:tt)*) => { $crate::console::write(format_args!("{}\n", format_args!($($part)*))) };
}

/// Prints on the serial port.
#[macro_export]
macro_rules! print {
    ($($part:tt)*) => { $crate::console::write(format_args!($($part)*)) };
}
