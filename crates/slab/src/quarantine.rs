//! What is freed under [`Quarantine`](crate::Quarantine) waits before it is given again: the last objects of each cache, in an array of the first node's
//! depot, oldest first.
//!
//! Nothing waits where the lock or memory for the array cannot be had: a free never fails for it.
//!
//! Costs: the depot's lock once a free; the array comes with the first.

use core::ptr::{self, NonNull};

use kmem_hal::Cpu;
use kmem_hal::sync::Ordering;

use crate::array::SMALL_SLOTS;
use crate::head::Head;
use crate::platform::Platform;
use crate::policy::Features;
use crate::raw::RawCache;
use crate::system::SlabSystem;

impl<P: Platform> SlabSystem<P> {
    /// Lets an object wait, at the first node whatever node it is of; answers the one that has waited longest, where the quarantine is full. A context that cannot have the lock, and one
    /// without memory for the quarantine, get theirs back at once.
    pub(crate) fn quarantine(
        &self,
        cache: &RawCache<P::Lock>,
        features: Features,
        object: NonNull<u8>,
    ) -> Option<NonNull<u8>> {
        let most = usize::from(features.quarantine);
        let parked = self.with_depot(cache, &cache.first, |depot| depot.park(object, most));
        match parked {
            Some(Some(oldest)) => return oldest,
            // The lock cannot be had.
            None => return Some(object),
            Some(None) => {}
        }
        // I2 of refill: memory without the lock.
        let Ok(array) = self.new_array(SMALL_SLOTS) else {
            return Some(object);
        };
        let mut is_kept = false;
        let parked = self.with_depot(cache, &cache.first, |depot| {
            is_kept = depot.waiting.is_null();
            if is_kept {
                depot.waiting = array.as_ptr();
            }
            depot.park(object, most)
        });
        if !is_kept {
            // SAFETY: just made, and nobody else knows it.
            unsafe { self.free_array(array) };
        }
        parked.flatten().unwrap_or(Some(object))
    }

    /// Gives the objects in quarantine to their slabs. Nothing where this CPU has no head or was interrupted there, unless the caller is `alone`
    /// with the cache.
    pub(crate) fn end_quarantine(&self, cache: &RawCache<P::Lock>, alone: bool) {
        if cache.setup.features.quarantine == 0 {
            return;
        }
        // SAFETY: a cache exists, so the system is ready.
        let pin = unsafe { self.platform_unchecked() }.cpu().pin();
        let busy = self.head(cache, &pin).and_then(Head::enter);
        if busy.is_none() && !alone {
            return;
        }
        let waiting = {
            let mut depot = cache.first.depot.lock(); // refill I1: busy is set, or alone
            depot.oldest = 0;
            core::mem::replace(&mut depot.waiting, ptr::null_mut())
        };
        if let Some(array) = NonNull::new(waiting) {
            // SAFETY: the array left the depot and is this call's; the flag is set, or the caller is alone with the cache.
            unsafe {
                let n = self.flush_array(cache, array);
                cache.direct_frees.fetch_add(n as u64, Ordering::Relaxed);
                self.free_array(array);
            }
        }
    }
}
