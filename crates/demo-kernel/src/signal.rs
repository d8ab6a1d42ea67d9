//! SIGSEGV: a handler in the program that may repair what was wrong and go on.
//!
//! ```text
//!   user stack   | interrupted frames | 128 bytes red zone | vector registers | rt_sigframe | <- rsp in the handler
//!                                                                              return address, ucontext, siginfo
//! ```
//!
//! The frame is Linux's `struct rt_sigframe` for x86-64, so that handlers written for Linux find the registers where
//! they look for them (`ucontext_t`), and change what they go on with.

use kmem::hal::{UserAccess, VirtAddr};

use crate::error::Error;
use crate::platform::Machine;
use crate::process;
use crate::traps::{TrapFrame, USER_CODE, USER_DATA};

/// The signal that ends a process without memory.
pub const SIGKILL: u32 = 9;
/// The signal of a bad access.
pub const SIGSEGV: u32 = 11;
/// The signal of an access beyond the end of a file.
pub const SIGBUS: u32 = 7;
/// The signals of other exceptions, which end the process.
pub const SIGILL: u32 = 4;
/// See [`SIGILL`].
pub const SIGTRAP: u32 = 5;
/// See [`SIGILL`].
pub const SIGFPE: u32 = 8;

/// `struct sigaction` as the system call takes it.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Action {
    handler: u64,
    flags: u64,
    restorer: u64,
    mask: u64,
}

impl Action {
    /// The process ends.
    pub const DEFAULT: Self = Self {
        handler: 0,
        flags: 0,
        restorer: 0,
        mask: 0,
    };
}

/// `struct rt_sigframe`, without the vector registers, which lie above.
#[derive(Clone, Copy)]
#[repr(C)]
struct SignalFrame {
    return_address: u64,
    /// flags, link, stack (3 words).
    context: [u64; 5],
    /// r8 .. r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip, eflags, selectors, error, vector, mask, cr2.
    registers: [u64; 23],
    vectors: u64,
    reserved: [u64; 8],
    mask: u64,
    /// signo and errno, code, address, and room.
    info: [u64; 16],
}

fn bytes_of<T: Copy>(value: &T) -> &[u8] {
    // SAFETY: the callers' types are `repr(C)` and consist of words.
    unsafe { core::slice::from_raw_parts(core::ptr::from_ref(value).cast(), size_of::<T>()) }
}

fn bytes_of_mut<T: Copy>(value: &mut T) -> &mut [u8] {
    // SAFETY: as above; every pattern of bits is a value.
    unsafe { core::slice::from_raw_parts_mut(core::ptr::from_mut(value).cast(), size_of::<T>()) }
}

/// Has the program's handler run; false where it has none or its stack cannot be written.
pub fn deliver(frame: &mut TrapFrame, number: u32, code: u64, address: u64) -> bool {
    let (thread, process) = process::current();
    let action = *process.action.lock();
    if action.handler <= 1 || number != SIGSEGV {
        return false;
    }
    let number = u64::from(number);
    let f = *frame;
    let vectors = (f.rsp - 128 - 512) & !63;
    let mut info = [0; 16];
    info[..3].copy_from_slice(&[number, code, address]);
    let signal_frame = SignalFrame {
        return_address: action.restorer,
        context: [0; 5],
        registers: [
            f.r8,
            f.r9,
            f.r10,
            f.r11,
            f.r12,
            f.r13,
            f.r14,
            f.r15,
            f.rdi,
            f.rsi,
            f.rbp,
            f.rbx,
            f.rdx,
            f.rax,
            f.rcx,
            f.rsp,
            f.rip,
            f.rflags,
            f.cs | f.ss << 48,
            f.error,
            f.vector,
            0,
            address,
        ],
        vectors,
        reserved: [0; 8],
        mask: 0,
        info,
    };
    // At the handler's first instruction rsp is 8 below a multiple of 16, as after a call.
    let at = ((vectors - size_of::<SignalFrame>() as u64) & !15) - 8;
    // SAFETY: the thread stands in the kernel, above its saved vector registers.
    let saved = unsafe { &*thread.vectors() };
    let written = Machine
        .copy_to_user(VirtAddr::new(vectors), saved)
        .and_then(|()| Machine.copy_to_user(VirtAddr::new(at), bytes_of(&signal_frame)));
    if written.is_err() {
        return false;
    }
    frame.rip = action.handler;
    frame.rsp = at;
    frame.rdi = number;
    frame.rsi = at + core::mem::offset_of!(SignalFrame, info) as u64;
    frame.rdx = at + core::mem::offset_of!(SignalFrame, context) as u64;
    frame.rax = 0;
    true
}

/// rt_sigreturn: goes on with the registers that the handler left in its frame.
pub fn sigreturn(frame: &mut TrapFrame) -> Result<(), Error> {
    let (thread, _) = process::current();
    let mut saved = SignalFrame {
        return_address: 0,
        context: [0; 5],
        registers: [0; 23],
        vectors: 0,
        reserved: [0; 8],
        mask: 0,
        info: [0; 16],
    };
    // The handler's return took the first word.
    Machine.copy_from_user(bytes_of_mut(&mut saved), VirtAddr::new(frame.rsp - 8))?;
    let mut vectors = [0; 512];
    Machine.copy_from_user(&mut vectors, VirtAddr::new(saved.vectors))?;
    vectors[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes()); // a bad MXCSR would fault in the kernel
    // SAFETY: as in `deliver`.
    unsafe { thread.vectors().write(vectors) };
    let r = saved.registers;
    [
        frame.r8, frame.r9, frame.r10, frame.r11, frame.r12, frame.r13, frame.r14, frame.r15,
    ] = [r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7]];
    [frame.rdi, frame.rsi, frame.rbp, frame.rbx, frame.rdx] = [r[8], r[9], r[10], r[11], r[12]];
    [frame.rax, frame.rcx, frame.rsp, frame.rip] = [r[13], r[14], r[15], r[16]];
    frame.rflags = r[17] & 0xcd5 | 1 << 9 | 2; // arithmetic flags and direction; interrupts on
    (frame.cs, frame.ss) = (USER_CODE, USER_DATA);
    Ok(())
}

/// rt_sigaction: for SIGSEGV; other signals never come, so that their actions need not be kept.
pub fn sigaction(number: u64, new: u64, old: u64) -> Result<(), Error> {
    let (_, process) = process::current();
    let segv = number == u64::from(SIGSEGV);
    if old != 0 {
        let action = if segv {
            *process.action.lock()
        } else {
            Action::DEFAULT
        };
        Machine.copy_to_user(VirtAddr::new(old), bytes_of(&action))?;
    }
    if new != 0 {
        let mut action = Action::DEFAULT;
        Machine.copy_from_user(bytes_of_mut(&mut action), VirtAddr::new(new))?;
        if segv {
            *process.action.lock() = action;
        }
    }
    Ok(())
}
