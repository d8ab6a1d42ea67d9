//! CPUs that the one thread of a test plays in turn.

use std::cell::Cell;

use kmem_hal::{Cpu, CpuId, CpuSet};

thread_local! {
    static CURRENT: Cell<u32> = const { Cell::new(0) };
}

/// So many CPUs.
#[derive(Clone, Copy)]
pub struct Played<const CPUS: u32>;

/// As many as a set can name.
pub const MANY: Played<{ CpuSet::CAPACITY }> = Played;

/// From now on the thread plays this one.
pub fn become_cpu(id: u32) {
    CURRENT.set(id);
}

// SAFETY: one thread plays one CPU at a time, and changes it only between calls (C1, C2); it plays none from `CPUS` on, of which a set
// can name all but where a refusal is tested (C3).
unsafe impl<const CPUS: u32> Cpu for Played<CPUS> {
    type Guard<'a> = ();
    fn raw_pin(&self) {}
    fn id(&self, (): &()) -> CpuId {
        CpuId::new(CURRENT.get())
    }
    fn count(&self) -> u32 {
        CPUS
    }
}
