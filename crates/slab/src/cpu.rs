//! CPUs that go: nothing they held is stranded.

use kmem_hal::{AllocError, Cpu, CpuId};

use crate::platform::Platform;
use crate::system::SlabSystem;

impl<P: Platform> SlabSystem<P> {
    /// Empties the arrays of a CPU that runs nothing any more: its objects go to their slabs, its arrays to the depots.
    ///
    /// The CPU may come back later; its heads stay.
    ///
    /// # Errors
    ///
    /// [`AllocError::NotInitialised`]; [`AllocError::Unsatisfiable`] for a CPU beyond the platform's count;
    /// [`AllocError::Busy`] in a context that interrupted the registry or a cache on this CPU; [`AllocError::OutOfMemory`] where this CPU has no heads of
    /// some cache and there is no memory for them. Whatever could be emptied was: the call may be repeated.
    ///
    /// # Safety
    ///
    /// No code runs as `cpu`, nor will before the call returns; what it wrote is visible to the caller; the caller runs on another.
    #[doc(alias = "slab_cpu_dead")]
    pub unsafe fn cpu_offline(&self, cpu: CpuId) -> Result<(), AllocError> {
        let platform = self.platform().ok_or(AllocError::NotInitialised)?;
        if cpu.get() >= platform.cpu().count() {
            return Err(AllocError::Unsatisfiable);
        }
        let mut emptied = Ok(());
        self.for_each_cache(|cache| {
            // SAFETY: the caller's promise; the number was checked.
            let drained = unsafe { self.drain_idle(cache, cpu.get()) };
            emptied = emptied.and(drained);
        })?;
        emptied
    }
}
