//! A lock for code that runs on virtual CPUs: where it would spin, it lets the other CPUs run.
//!
//! A plain spin lock would hang a schedule: the holder is a coroutine that needs this very thread. As the kernel's lock that keeps
//! interrupts out, this one also clears IF of the virtual CPU that takes it and restores it afterwards.
//!
//! Outside of a schedule a lock that is held is held by another thread of the host, or for ever.

use std::sync::atomic::{AtomicBool, Ordering};

use kmem_hal::RawLock;

use crate::sched;

/// A spin lock of the mock machine; keeps interrupts of its virtual CPU out.
#[derive(Debug)]
pub struct MachineLock {
    held: AtomicBool,
}

/// Whether interrupts were on before the lock was taken.
#[derive(Debug, Clone, Copy)]
pub struct MachineLockState {
    restore: bool,
}

fn interrupts_off() -> MachineLockState {
    let was_on = sched::with_current(|machine, cpu| machine.cpu(cpu).set_interrupts(false));
    MachineLockState {
        restore: was_on == Some(Ok(true)),
    }
}

fn interrupts_back(state: MachineLockState) {
    if state.restore {
        sched::with_current(|machine, cpu| machine.cpu(cpu).set_interrupts(true));
    }
}

// SAFETY: K1: only the exchange of false for true takes the lock; K2: its acquire pairs with the release of `unlock`; K3: IF
// of the virtual CPU is 0 from before the lock is taken until after it is let go.
unsafe impl RawLock for MachineLock {
    type State = MachineLockState;

    #[cfg(not(loom))]
    const INIT: Self = Self {
        held: AtomicBool::new(false),
    };

    #[cfg(loom)]
    fn init() -> Self {
        Self {
            held: AtomicBool::new(false),
        }
    }

    fn lock(&self) -> MachineLockState {
        loop {
            if let Some(state) = self.try_lock() {
                return state;
            }
            // Interrupts are on here, as the kernel's lock waits with them on.
            if !sched::spin_point() {
                std::thread::yield_now();
            }
        }
    }

    fn try_lock(&self) -> Option<MachineLockState> {
        let state = interrupts_off();
        if self
            .held
            .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
        {
            return Some(state);
        }
        interrupts_back(state);
        None
    }

    unsafe fn unlock(&self, state: MachineLockState) {
        self.held.store(false, Ordering::Release);
        interrupts_back(state);
    }
}
