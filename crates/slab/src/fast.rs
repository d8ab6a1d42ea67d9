//! The fast paths: one pin, one line of a head, one slot of an array. No locked instruction, and the object untouched.
//!
//! What a call costs when the array serves it: the load of the row, of the CPU's page pointer, then on one cache line the busy
//! flag (load, store, store), the top of the array (load, store), its bound (load) and the statistics (load, store); and one
//! slot. Everything else is in `refill`, `flush` and `direct`.

use core::ptr::NonNull;

use kmem_hal::sync::Ordering;
use kmem_hal::{AllocError, Cpu, FrameRequest};

use crate::head::{Busy, HeadPage, Row};
use crate::platform::Platform;
use crate::raw::RawCache;
use crate::system::SlabSystem;

impl<P: Platform> SlabSystem<P> {
    /// What `f` answers with the calling CPU's arrays; `None` where it has no heads or is not pinned at once, or was interrupted in these arrays.
    ///
    /// # Safety
    ///
    /// `row` is a row of this system, not null.
    #[inline(always)]
    unsafe fn with_arrays<R>(
        &self,
        row: *const Row,
        index: u32,
        f: impl FnOnce(&Busy<'_>) -> Option<R>,
    ) -> Option<R> {
        // SAFETY: a row exists, so the system is ready.
        let pin = unsafe { self.platform_unchecked() }.cpu().pin_at_once()?;
        // SAFETY: a row has a place for every CPU (hal C3).
        let page = unsafe { (*row.add(pin.id().index())).load(Ordering::Acquire) };
        // SAFETY: pages in a row live as long as the system.
        let page: &HeadPage = unsafe { page.as_ref() }?;
        f(&page.head(index).enter()?)
    }

    /// Takes an object from the calling CPU's loaded array.
    ///
    /// # Safety
    ///
    /// As [`with_arrays`](Self::with_arrays).
    #[inline(always)]
    pub(crate) unsafe fn pop_local(&self, row: *const Row, index: u32) -> Option<NonNull<u8>> {
        // SAFETY: the caller's promise.
        unsafe { self.with_arrays(row, index, |busy| busy.pop()) }
    }

    /// Puts an object into the calling CPU's loaded array; `false` where it has no room.
    ///
    /// # Safety
    ///
    /// `row` and `index` are those of the cache that the object belongs to, and the caller gives the object up.
    #[inline(always)]
    #[must_use]
    pub(crate) unsafe fn push_local(
        &self,
        row: *const Row,
        index: u32,
        object: NonNull<u8>,
    ) -> bool {
        // SAFETY: the caller's promise.
        unsafe { self.with_arrays(row, index, |busy| busy.push(object).then_some(())) }.is_some()
    }

    /// An object of `cache`.
    #[inline]
    pub(crate) fn alloc_object(
        &self,
        cache: &RawCache<P::Lock>,
        request: &FrameRequest,
    ) -> Result<NonNull<u8>, AllocError> {
        // SAFETY: the row of a cache of this system.
        match unsafe { self.pop_local(cache.row, cache.index) } {
            Some(object) => Ok(object),
            None => self.alloc_slow(cache, request),
        }
    }

    /// Takes an object of `cache` back.
    ///
    /// # Safety
    ///
    /// The object belongs to the cache, and the caller gives it up.
    #[inline]
    pub(crate) unsafe fn free_object(&self, cache: &RawCache<P::Lock>, object: NonNull<u8>) {
        // SAFETY: the caller's promise.
        if !unsafe { self.push_local(cache.row, cache.index, object) } {
            self.free_slow(cache, object);
        }
    }
}
