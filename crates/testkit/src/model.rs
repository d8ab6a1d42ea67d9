//! What models of loom and shuttle share: CPUs for their threads, and a bounded run.
//!
//! A model's threads play CPUs. Each says which one it is with [`ModelCpu::bind`]; a pin is then free, because a model's
//! threads are never moved. Two threads must not bind one number while both run: that would be a CPU that runs two
//! things at once, which contract `C2` of [`Cpu`] forbids.

use std::cell::Cell;

use kmem_hal::{Cpu, CpuId};

#[cfg(loom)]
use loom::thread_local as model_local;
#[cfg(all(shuttle, not(loom)))]
use shuttle::thread_local as model_local;

model_local! {
    static CPU: Cell<u32> = Cell::new(0);
}

/// The CPUs of a model: as many as its threads.
#[derive(Clone, Copy, Debug)]
pub struct ModelCpu {
    count: u32,
}

impl ModelCpu {
    /// `count` CPUs.
    #[must_use]
    pub const fn new(count: u32) -> Self {
        Self { count }
    }

    /// The calling thread is CPU `number` from now on; a thread that never says so is CPU 0.
    pub fn bind(number: u32) {
        CPU.with(|cpu| cpu.set(number));
    }
}

// SAFETY: C1: a thread keeps its number; C2: two threads have different ones, as the module demands; C3: `id` checks it;
// C4: there is nothing to nest; C5: a number is used by one thread.
unsafe impl Cpu for ModelCpu {
    type Guard<'a> = ();

    fn raw_pin(&self) {}

    fn id<'a>(&'a self, (): &()) -> CpuId {
        let id = CPU.with(Cell::get);
        assert!(id < self.count, "the model has no CPU {id}");
        CpuId::new(id)
    }

    fn count(&self) -> u32 {
        self.count
    }
}

/// Explores the model with at most `preemptions` involuntary switches on each path, which finds nearly every bug in a
/// small part of the time of all interleavings. `LOOM_MAX_PREEMPTIONS` overrides it.
#[cfg(loom)]
pub fn explore(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    if builder.preemption_bound.is_none() {
        builder.preemption_bound = Some(preemptions);
    }
    builder.check(model);
}
