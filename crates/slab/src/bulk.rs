//! Many objects in one call: one pin and one busy section per array instead of one per object.

use core::mem::MaybeUninit;
use core::ptr::NonNull;

use kmem_hal::{Cpu, FrameRequest};

use crate::head::Head;
use crate::platform::Platform;
use crate::raw::RawCache;
use crate::system::SlabSystem;

impl<P: Platform> SlabSystem<P> {
    /// Fills `out` from its start; answers how many objects it got. `request` is what a new slab is asked for with.
    pub(crate) fn alloc_many<T>(
        &self,
        cache: &RawCache<P::Lock>,
        out: &mut [MaybeUninit<NonNull<T>>],
        request: &FrameRequest,
    ) -> usize {
        // SAFETY: a cache exists, so the system is ready.
        let platform = unsafe { self.platform_unchecked() };
        let mut given = 0;
        while given < out.len() {
            {
                let pin = platform.cpu().pin();
                if let Some(busy) = self.head(cache, &pin).and_then(Head::enter) {
                    given += busy.pop_many(&mut out[given..]);
                }
            }
            if given == out.len() {
                break;
            }
            // Refills the array, so that the next turn takes many again.
            match self.alloc_object(cache, request) {
                Ok(object) => {
                    out[given].write(object.cast());
                    given += 1;
                }
                Err(_) => break,
            }
        }
        given
    }

    /// Takes many objects back.
    ///
    /// # Safety
    ///
    /// Each belongs to the cache, and the caller gives it up.
    pub(crate) unsafe fn free_many<T>(
        &self,
        cache: &RawCache<P::Lock>,
        mut objects: &[NonNull<T>],
    ) {
        // SAFETY: a cache exists, so the system is ready.
        let platform = unsafe { self.platform_unchecked() };
        while let Some((first, rest)) = objects.split_first() {
            {
                let pin = platform.cpu().pin();
                if let Some(busy) = self.head(cache, &pin).and_then(Head::enter) {
                    let taken = busy.push_many(objects);
                    if taken > 0 {
                        objects = &objects[taken..];
                        continue;
                    }
                }
            }
            // Makes room, so that the next turn takes many again.
            // SAFETY: the caller's promise.
            unsafe { self.free_object(cache, first.cast()) };
            objects = rest;
        }
    }
}
