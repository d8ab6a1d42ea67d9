//! Many objects in one call: one pin and one busy section per array instead of one per object.

use core::mem::MaybeUninit;
use core::ptr::NonNull;

use kmem_hal::{Cpu, FrameRequest};

use crate::head::Head;
use crate::platform::Platform;
use crate::raw::RawCache;
use crate::system::SlabSystem;

/// Slots of one call on their way to the caller, who gets them all: where a report in between panics, they are given back.
pub(crate) struct Outgoing<'c, T, P: Platform> {
    pub system: &'c SlabSystem<P>,
    pub cache: &'c RawCache<P::Lock>,
    pub slots: &'c mut [MaybeUninit<NonNull<T>>],
    /// How many of them are objects in use by now.
    pub marked: usize,
}

impl<T, P: Platform> Outgoing<'_, T, P> {
    /// Makes each slot what `mark` says.
    #[inline]
    pub(crate) fn mark_all(mut self, mark: impl Fn(NonNull<u8>) -> NonNull<u8>) {
        while let Some(place) = self.slots.get_mut(self.marked) {
            // SAFETY: the slots were written.
            let slot = unsafe { place.assume_init() };
            place.write(mark(slot.cast()).cast());
            self.marked += 1;
        }
        core::mem::forget(self);
    }
}

impl<T, P: Platform> Drop for Outgoing<'_, T, P> {
    fn drop(&mut self) {
        let front = self.cache.front();
        for (number, place) in self.slots.iter().enumerate() {
            // SAFETY: the slots were written.
            let slot: NonNull<u8> = unsafe { place.assume_init() }.cast();
            let left = match number {
                // SAFETY: marked, and nobody has it.
                _ if number < self.marked => unsafe {
                    self.system.take_back(self.cache, front, slot)
                },
                // Whoever wrote to what the report is about may do so again.
                _ if number == self.marked => None,
                _ => Some(slot),
            };
            if let Some(slot) = left {
                // SAFETY: a free slot of the cache, which is this call's.
                unsafe { self.system.free_object(self.cache, slot) };
            }
        }
    }
}

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
