//! The end of a system: every frame goes back, or it is said why not.

use core::ptr;

use kmem_hal::sync::Ordering;

use crate::cache::Leaked;
use crate::platform::Platform;
use crate::system::SlabSystem;

impl<P: Platform> SlabSystem<P> {
    /// Gives every frame back to the page source; the system is then as new and may be initialised again.
    ///
    /// # Errors
    ///
    /// [`Leaked`] where objects or whole pages are still out; the system goes on working then.
    pub fn teardown(&mut self) -> Result<(), Leaked> {
        // SAFETY: the exclusive borrow keeps every call and every cache away.
        unsafe { self.teardown_shared() }
    }

    /// As [`teardown`](Self::teardown), for a system in a `static`.
    ///
    /// # Errors
    ///
    /// As [`teardown`](Self::teardown).
    ///
    /// # Safety
    ///
    /// Nobody is in a call on the system or on a cache of it, and no such cache is used again.
    pub unsafe fn teardown_shared(&self) -> Result<(), Leaked> {
        if !self.is_ready() {
            return Ok(());
        }
        // SAFETY: ready.
        let platform = unsafe { self.platform_unchecked() };
        let blocks = self.page_blocks.load(Ordering::Relaxed);
        let mut leaked = (blocks > 0).then_some(Leaked {
            cache: "pages",
            objects: blocks,
        });
        let walked = self.for_each_cache(|cache| {
            // SAFETY: nobody is in a call on the system by contract.
            unsafe { self.empty(cache) };
            if self.info_of(cache).slabs > 0 && leaked.is_none() {
                leaked = Some(Leaked {
                    cache: cache.setup.name,
                    objects: self.info_of(cache).active_objects,
                });
            }
        });
        debug_assert!(walked.is_ok(), "an exclusive borrow interrupts nothing");
        if let Some(leaked) = leaked {
            return Err(leaked);
        }
        // SAFETY: no object and no block is out, and nobody uses the system by contract.
        unsafe {
            self.release_own(platform, ptr::null_mut());
            self.forget_platform();
        }
        Ok(())
    }
}
