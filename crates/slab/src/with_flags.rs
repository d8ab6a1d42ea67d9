//! A typed cache whose calls are made in a context that flags describe.
//!
//! [`ObjectAlloc`] has no flags, and a [`Cache`] that is used as one never waits, as it may be called in an interrupt. A caller who may wait says
//! so once, by [`Cache::with_flags`], and hands this on in the cache's place.
//!
//! Invariants
//! - `W1`: memory goes back to the cache itself, deferred or not: nothing remembers this value, which may end before its objects do.
//!
//! Does not handle: limits of the address ([`Flags::DMA`], [`Flags::DMA32`]), as a cache's objects lie anywhere, and [`Flags::ZERO`], as the
//! memory is not initialised yet.

use core::fmt;
use core::mem::MaybeUninit;
use core::ptr::NonNull;

use kmem_hal::{AllocError, Grace, ObjectAlloc};

use crate::cache::Cache;
use crate::kmalloc::Flags;
use crate::platform::Platform;
use crate::policy::Policy;

/// A [`Cache`] in a context that flags describe.
pub struct WithFlags<
    'c,
    T,
    P: Platform,
    const STABLE: bool = false,
    H: Policy = <P as Platform>::Policy,
> {
    pub(crate) cache: &'c Cache<'c, T, P, STABLE, H>,
    pub(crate) flags: Flags,
}

// SAFETY: B1 to B3 are the cache's, which gives and takes all objects.
unsafe impl<T, P: Platform, const STABLE: bool, H: Policy> ObjectAlloc<T>
    for WithFlags<'_, T, P, STABLE, H>
{
    const TYPE_STABLE: bool = STABLE;

    #[inline]
    #[track_caller]
    fn alloc(&self) -> Result<NonNull<T>, AllocError> {
        self.cache.alloc_anywhere(self.flags)
    }

    #[inline]
    unsafe fn free(&self, object: NonNull<T>) {
        // SAFETY: the caller's promise.
        unsafe { self.cache.free_memory(object) }
    }

    #[track_caller]
    fn alloc_bulk(&self, out: &mut [MaybeUninit<NonNull<T>>]) -> usize {
        if self.flags.limited() {
            return 0;
        }
        self.cache.fill(out, self.flags)
    }

    unsafe fn free_deferred<G: Grace>(
        &self,
        object: NonNull<T>,
        grace: &G,
    ) -> Result<(), NonNull<T>> {
        // SAFETY: the caller's promise; W1.
        unsafe { self.cache.free_deferred(object, grace) }
    }
}

impl<T, P: Platform, const STABLE: bool, H: Policy> fmt::Debug for WithFlags<'_, T, P, STABLE, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WithFlags")
            .field("cache", self.cache)
            .field("flags", &self.flags)
            .finish()
    }
}
