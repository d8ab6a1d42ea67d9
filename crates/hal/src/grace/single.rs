//! Grace periods on one CPU: a reader is whatever the writer interrupted.
//!
//! On one CPU without preemption a read section runs to its end before anything else does, interrupts excepted.
//! A writer in normal code therefore finds no reader: the grace period is over at once. A writer in an interrupt
//! may have interrupted a reader; then the call is queued, and made by the next `poll` outside every section.
//!
//! Invariants
//! - `I1`: `depth` is the number of guards alive.
//! - `I2`: a queued call is made only while `depth` is 0.

use core::marker::PhantomData;

use super::{Deferred, Grace};
use crate::sync::{LocalUsize, UnsafeCell};

const QUEUE: usize = 64;

/// [`Grace`] for one CPU.
#[derive(Debug)]
pub struct SingleGrace {
    depth: LocalUsize,
    queued: LocalUsize,
    queue: UnsafeCell<[Option<Deferred>; QUEUE]>,
}

// SAFETY: `new` demands that one CPU uses the value, so nothing is shared between threads that run at once.
unsafe impl Sync for SingleGrace {}

impl SingleGrace {
    crate::const_new! {
        /// Grace periods of one CPU.
        ///
        /// # Safety
        ///
        /// Only one CPU uses the value, and code that may use it is not preempted by other code that may, except
        /// interrupts that finish first and do not defer while they interrupt a `defer`, `poll` or `synchronize`.
        pub unsafe fn new() -> Self {
            Self {
                depth: LocalUsize::new(0),
                queued: LocalUsize::new(0),
                queue: UnsafeCell::new([const { None }; QUEUE]),
            }
        }
    }
}

// SAFETY: G1, G2: a call is made only at depth 0 (`I2`), when no guard exists; G3: one CPU sees its own order;
// G4: `read` adds to a word of its own.
unsafe impl Grace for SingleGrace {
    type Guard<'a> = SingleGuard<'a>;

    #[inline]
    fn read(&self) -> SingleGuard<'_> {
        self.depth.set(self.depth.get() + 1);
        SingleGuard {
            depth: &self.depth,
            _thread: PhantomData,
        }
    }

    fn defer(&self, call: Deferred) -> Result<(), Deferred> {
        if self.depth.get() == 0 {
            // SAFETY: no guard exists (`I1`), so every grace period is over.
            unsafe { call.run() };
            return Ok(());
        }
        let at = self.queued.get();
        if at == QUEUE {
            return Err(call);
        }
        // SAFETY: `new`: nothing else is in the queue now.
        self.queue
            .with_mut(|queue| unsafe { (*queue)[at] = Some(call) });
        self.queued.set(at + 1);
        Ok(())
    }

    #[inline]
    fn poll(&self) -> usize {
        if self.depth.get() != 0 {
            return 0;
        }
        let mut made = 0;
        while let Some(at) = self.queued.get().checked_sub(1) {
            self.queued.set(at);
            // SAFETY: `new`: nothing else is in the queue now.
            let call = self
                .queue
                .with_mut(|queue| unsafe { (&mut *queue)[at].take() });
            if let Some(call) = call {
                // SAFETY: no guard exists (`I2`).
                unsafe { call.run() };
                made += 1;
            }
        }
        made
    }

    #[inline]
    fn synchronize(&self) {
        self.poll();
    }

    fn pending(&self) -> usize {
        self.queued.get()
    }
}

/// A read section on one CPU.
#[derive(Debug)]
pub struct SingleGuard<'a> {
    depth: &'a LocalUsize,
    _thread: PhantomData<*mut ()>,
}

impl Drop for SingleGuard<'_> {
    #[inline]
    fn drop(&mut self) {
        self.depth.set(self.depth.get() - 1);
    }
}
