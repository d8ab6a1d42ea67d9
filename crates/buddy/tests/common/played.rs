//! CPUs that the one thread of a test plays in turn.

use std::cell::Cell;
use std::rc::Rc;

use kmem_hal::{Cpu, CpuCall, CpuCallError, CpuId, CpuSet};

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

/// How CPUs that one thread plays call each other: those that are offline are not reached, and at times nobody is.
#[derive(Clone, Default)]
pub struct Calls(Rc<(Cell<CpuSet>, Cell<bool>)>);

impl Calls {
    /// The CPUs that are offline.
    pub fn offline(&self) -> CpuSet {
        self.0.0.get()
    }

    pub fn set_offline(&self, cpus: CpuSet) {
        self.0.0.set(cpus);
    }

    /// Whether nobody can be called.
    pub fn is_deaf(&self) -> bool {
        self.0.1.get()
    }

    /// Whether nobody can be called from now on; what it was.
    pub fn set_deaf(&self, deaf: bool) -> bool {
        self.0.1.replace(deaf)
    }
}

// SAFETY: R1 to R3: the thread plays each named CPU that is online in turn until `f` has returned, or none.
unsafe impl CpuCall for Calls {
    fn run_on(&self, cpus: &CpuSet, f: &(dyn Fn(CpuId) + Sync)) -> Result<(), CpuCallError> {
        if self.is_deaf() {
            return Err(CpuCallError::Unsupported);
        }
        let me = CURRENT.get();
        for cpu in cpus.iter().filter(|&cpu| !self.offline().contains(cpu)) {
            become_cpu(cpu.get());
            f(cpu);
        }
        become_cpu(me);
        Ok(())
    }
}
