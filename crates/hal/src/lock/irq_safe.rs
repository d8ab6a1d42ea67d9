//! The default lock: saves and disables interrupts, then spins.
//!
//! On x86 in ring 0 the interrupt flag is saved and cleared before the spin and restored after the release, which is
//! contract `K3` for locks that interrupts take. Outside ring 0 (a host) `cli` would fault; the code segment's
//! privilege level tells, and the lock only spins: signal handlers are the host's interrupts, and kmem's paths
//! never spin on what they interrupted. Each guard puts the flag back to what it found, so locks that are held together are released
//! in the reverse order of their taking. On other processors the lock only spins: bring a lock of your own.

use super::{RawLock, Spin};

/// A spin lock that keeps interrupts out while it is held.
///
/// # Contexts
///
/// Any. Where one CPU holds several, they are released last taken first, as scopes do by themselves: dropping the guard of the first early
/// switches interrupts on while the second is held.
#[derive(Debug)]
pub struct IrqSafe {
    spin: Spin,
}

/// Whether interrupts were on before the lock was taken.
#[derive(Clone, Copy, Debug)]
pub struct InterruptState {
    restore: bool,
}

// SAFETY: K1 and K2 are `Spin`'s; K3: interrupts are off from before the lock is taken until after it is released,
// where locks held together are released last taken first (see the type's contexts).
unsafe impl RawLock for IrqSafe {
    type State = InterruptState;

    #[cfg(not(loom))]
    const INIT: Self = Self { spin: Spin::INIT };

    #[cfg(loom)]
    fn init() -> Self {
        Self { spin: Spin::init() }
    }

    #[inline]
    fn lock(&self) -> InterruptState {
        let state = hardware::disable();
        self.spin.lock();
        state
    }

    #[inline]
    fn try_lock(&self) -> Option<InterruptState> {
        let state = hardware::disable();
        if self.spin.try_lock().is_some() {
            Some(state)
        } else {
            hardware::restore(state);
            None
        }
    }

    #[inline]
    unsafe fn unlock(&self, state: InterruptState) {
        // SAFETY: the caller holds this lock and so the inner one.
        unsafe { self.spin.unlock(()) };
        hardware::restore(state);
    }
}

#[cfg(all(
    any(target_arch = "x86_64", target_arch = "x86"),
    not(any(loom, shuttle))
))]
mod hardware {
    //! The interrupt flag of an x86 processor (Intel SDM volume 3A, 7.8.1).

    use core::arch::asm;

    use super::InterruptState;

    const INTERRUPT_FLAG: usize = 1 << 9;

    fn in_ring_0() -> bool {
        let selector: u16;
        // SAFETY: reads a register that every privilege level may read.
        unsafe {
            asm!("mov {0:x}, cs", out(reg) selector, options(nomem, nostack, preserves_flags))
        };
        selector & 3 == 0
    }

    #[inline]
    pub fn disable() -> InterruptState {
        if !in_ring_0() {
            return InterruptState { restore: false };
        }
        let flags: usize;
        // SAFETY: ring 0 may clear the interrupt flag; the push and pop balance. The stack is used, so no `nostack`.
        unsafe { asm!("pushf", "pop {}", "cli", out(reg) flags, options(preserves_flags)) };
        InterruptState {
            restore: flags & INTERRUPT_FLAG != 0,
        }
    }

    #[inline]
    pub fn restore(state: InterruptState) {
        if state.restore {
            // SAFETY: `restore` is set only where `disable` cleared the flag in ring 0.
            unsafe { asm!("sti", options(nostack)) };
        }
    }
}

#[cfg(not(all(
    any(target_arch = "x86_64", target_arch = "x86"),
    not(any(loom, shuttle))
)))]
mod hardware {
    //! No interrupt flag is known here: the lock only spins.

    use super::InterruptState;

    pub fn disable() -> InterruptState {
        InterruptState { restore: false }
    }

    pub fn restore(state: InterruptState) {
        // `disable` never asks for it here.
        debug_assert!(!state.restore);
    }
}
