//! The two instructions of kmem that valgrind does not know: CLI and STI.
//!
//! [`IrqSafe`](kmem_hal::IrqSafe) asks CS for the privilege level. Valgrind shows a 0 there, as if in a kernel, and stops the program at the
//! CLI that follows. [`skip_interrupt_flag`] has a signal handler go on behind it, so that page tables, which use that lock, can be
//! counted: with the kernel's side of the lock, and with the handler's dozen instructions for each.
//!
//! Invariant `V1`: the handler changes nothing but the address to go on at, and that only where one of the two stands. Any
//! other illegal instruction ends the program.
//!
//! Source: Intel SDM volume 2, CLI (FA) and STI (FB); System V ABI for x86-64, `ucontext_t`.

const CLI: u8 = 0xfa;
const STI: u8 = 0xfb;

/// Lets CLI and STI do nothing where they are illegal.
///
/// # Panics
///
/// Where the host takes no handler.
pub fn skip_interrupt_flag() {
    // SAFETY: all zeros is an action; the handler has the signature that SA_SIGINFO asks for, and keeps `V1`.
    let set = unsafe {
        let mut action: libc::sigaction = core::mem::zeroed();
        action.sa_sigaction = on_illegal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGILL, &action, core::ptr::null_mut())
    };
    assert_eq!(set, 0, "a handler for SIGILL");
}

extern "C" fn on_illegal(_: i32, _: *mut libc::siginfo_t, context: *mut core::ffi::c_void) {
    // SAFETY: the kernel gives the handler the context of the interrupted thread, which nobody else reads or writes.
    let saved = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let next = &mut saved[libc::REG_RIP as usize];
    // SAFETY: an instruction was fetched there.
    let byte = unsafe { core::ptr::with_exposed_provenance::<u8>(*next as usize).read() };
    if byte != CLI && byte != STI {
        // SAFETY: ends the process; safe in a handler.
        unsafe { libc::abort() }
    }
    *next += 1;
}
