//! The symbols that a `core` prebuilt for a hosted target expects to find.
//!
//! The five memory functions are `rep` instructions (whole words first: QEMU takes them one by one) or volatile loops:
//! a plain Rust loop would be compiled back into a call of the function itself. The two unwinding symbols are never
//! reached with `panic = "abort"`, but the linker asks for them.

use core::arch::asm;

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
    // SAFETY: C's contract: both ranges hold `n` bytes and do not overlap.
    unsafe {
        asm!("rep movsq", "mov rcx, rdx", "rep movsb", inout("rcx") n / 8 => _, in("rdx") n % 8,
            inout("rdi") to => _, inout("rsi") from => _, options(nostack, preserves_flags));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= n {
        // SAFETY: `to` does not lie inside the source, so that copying upwards reads each byte before it is
        // overwritten.
        return unsafe { memcpy(to, from, n) };
    }
    // SAFETY: as above, downwards; n > 0 here.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") n => _,
            inout("rdi") to.wrapping_add(n).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(n).wrapping_sub(1) => _, options(nostack));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, n: usize) -> *mut u8 {
    // SAFETY: C's contract: the range holds `n` bytes.
    unsafe {
        asm!("rep stosq", "mov rcx, rdx", "rep stosb", inout("rcx") n / 8 => _, in("rdx") n % 8,
            inout("rdi") to => _, in("rax") u64::from(byte as u8) * 0x0101_0101_0101_0101,
            options(nostack, preserves_flags));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    for i in 0..n {
        // SAFETY: C's contract: both ranges hold `n` bytes.
        let (x, y) = unsafe { (a.add(i).read_volatile(), b.add(i).read_volatile()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    // SAFETY: the same contract.
    unsafe { memcmp(a, b, n) }
}

#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    // SAFETY: stops the CPU's progress with #UD, which the kernel reports.
    unsafe { asm!("ud2", options(noreturn)) }
}

#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
