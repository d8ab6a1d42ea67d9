//! What ended threads hold serves a request before it is refused.
//!
//! A thread that ends leaves its arrays to the next holder of its number, which may never come. When memory runs short, they are emptied: the slab system's
//! own hook reaches the depots and the calling CPU, this one every number that nobody holds.
//!
//! Invariants
//! - `D1`: `memory` is null, or the memory manager that this is the hook of; that lives for ever.
//! - `D2`: one context at a time empties idle numbers, the holder of `busy`. Nobody waits for it: a request beneath the emptying, another thread's and a
//!   signal handler's go without.
//! - `D3`: `emptied` is set only by a walk that passed over no idle number. The numbers are the process's: another heap's walk, which empties another
//!   memory, may hold one meanwhile, and so may a [`shrink`](crate::HostHeap::shrink) of this one that could not empty it.
//!
//! Cost: one load where no thread has ended since the last time.

use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};

use kmem_hal::{FrameRequest, NodeId, Pressure, PressureLevel};

use crate::heap::HostMemory;
use crate::threads::ThreadCpu;

/// The pressure hook of a [`HostHeap`](crate::HostHeap)'s memory.
#[derive(Debug)]
pub struct IdleThreads {
    memory: AtomicPtr<HostMemory>,
    busy: AtomicBool,
    /// [`ThreadCpu::released`] when all idle numbers were last empty (`D3`).
    emptied: AtomicU64,
}

impl IdleThreads {
    /// Empties nothing until it is [connected](Self::connect).
    pub(crate) const fn new() -> Self {
        Self {
            memory: AtomicPtr::new(ptr::null_mut()),
            busy: AtomicBool::new(false),
            emptied: AtomicU64::new(0),
        }
    }

    /// This is the hook of `memory`, which may be called from now on.
    pub(crate) fn connect(&self, memory: &'static HostMemory) {
        let memory = ptr::from_ref(memory).cast_mut();
        self.memory.store(memory, Ordering::Release);
    }

    /// Empties the arrays of numbers that nobody holds; whether there may have been something.
    fn empty(&self) -> bool {
        // SAFETY: D1.
        let Some(memory) = (unsafe { self.memory.load(Ordering::Acquire).as_ref() }) else {
            return false;
        };
        let released = ThreadCpu.released();
        if self.emptied.load(Ordering::Relaxed) == released
            || self.busy.swap(true, Ordering::Acquire)
        {
            return false;
        }
        let mut all = true;
        let no_other = ThreadCpu.try_with_idle(|cpu| {
            // SAFETY: no thread has the number meanwhile, and this one sees what the last holder wrote. It cannot be this thread's: that is held.
            unsafe {
                all &= memory.slab().cpu_offline(cpu).is_ok();
                all &= memory.frames().cpu_offline(cpu);
            }
        });
        if all && no_other {
            self.emptied.store(released, Ordering::Relaxed);
        }
        self.busy.store(false, Ordering::Release);
        true
    }
}

impl Pressure for &'static IdleThreads {
    fn pressure(&self, node: NodeId, level: PressureLevel, request: &FrameRequest) -> bool {
        if level == PressureLevel::Low || request.optional || !self.empty() {
            return false;
        }
        // SAFETY: D1.
        if let Some(memory) = unsafe { self.memory.load(Ordering::Acquire).as_ref() } {
            // Slabs that are empty now and that caches would keep.
            memory.slab().pressure(node, level, request);
        }
        true
    }
}
