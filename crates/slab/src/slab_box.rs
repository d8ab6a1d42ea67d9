//! An owned object of a cache, and the refusal that gives the value back.

use core::fmt;
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;

use kmem_hal::AllocError;

use crate::cache::Cache;
use crate::platform::Platform;
use crate::policy::Policy;

/// A value in an object of a cache; dropping it drops the value and gives the object back.
///
/// The borrow of the cache keeps the cache alive:
///
/// ```compile_fail,E0505
/// fn outlive<P: kmem_slab::Platform>(cache: kmem_slab::Cache<'_, u64, P>) {
///     let boxed = cache.alloc(1).unwrap();
///     drop(cache);
///     drop(boxed);
/// }
/// ```
pub struct SlabBox<
    'c,
    T,
    P: Platform,
    const STABLE: bool = false,
    H: Policy = <P as Platform>::Policy,
> {
    cache: &'c Cache<'c, T, P, STABLE, H>,
    object: NonNull<T>,
}

// SAFETY: the box owns its value; the cache is shared by all CPUs.
unsafe impl<T: Send, P: Platform + Sync, const STABLE: bool, H: Policy> Send
    for SlabBox<'_, T, P, STABLE, H>
where
    P::Lock: Send + Sync,
{
}
// SAFETY: as above.
unsafe impl<T: Sync, P: Platform + Sync, const STABLE: bool, H: Policy> Sync
    for SlabBox<'_, T, P, STABLE, H>
where
    P::Lock: Send + Sync,
{
}

impl<'c, T, P: Platform, const STABLE: bool, H: Policy> SlabBox<'c, T, P, STABLE, H> {
    /// Makes a box of an object.
    ///
    /// # Safety
    ///
    /// `object` came from `cache`, holds a value, and nobody else owns it.
    #[inline]
    pub unsafe fn from_raw(cache: &'c Cache<'c, T, P, STABLE, H>, object: NonNull<T>) -> Self {
        Self { cache, object }
    }

    /// Gives up the box and keeps the object: it is freed by making a box of it again.
    #[must_use = "the object is leaked unless the pointer is kept"]
    pub fn into_raw(boxed: Self) -> NonNull<T> {
        let object = boxed.object;
        core::mem::forget(boxed);
        object
    }

    /// Takes the value out and gives the object back.
    pub fn into_inner(boxed: Self) -> T {
        let (cache, object) = (boxed.cache, Self::into_raw(boxed));
        // SAFETY: the box owned the value; it is read once, and the object goes back without it.
        unsafe {
            let value = object.read();
            cache.free_memory(object);
            value
        }
    }
}

impl<T, P: Platform, const STABLE: bool, H: Policy> Deref for SlabBox<'_, T, P, STABLE, H> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: the box owns an initialised object.
        unsafe { self.object.as_ref() }
    }
}

impl<T, P: Platform, const STABLE: bool, H: Policy> DerefMut for SlabBox<'_, T, P, STABLE, H> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the box owns an initialised object and is borrowed exclusively.
        unsafe { self.object.as_mut() }
    }
}

impl<T, P: Platform, const STABLE: bool, H: Policy> Drop for SlabBox<'_, T, P, STABLE, H> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: the box owned the value and the object; neither is used afterwards.
        unsafe {
            self.object.drop_in_place();
            self.cache.free_memory(self.object);
        }
    }
}

impl<T: fmt::Debug, P: Platform, const STABLE: bool, H: Policy> fmt::Debug
    for SlabBox<'_, T, P, STABLE, H>
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl<T: fmt::Display, P: Platform, const STABLE: bool, H: Policy> fmt::Display
    for SlabBox<'_, T, P, STABLE, H>
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&**self, f)
    }
}

/// There was no memory for a value; here it is back.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Full<T> {
    /// The value that found no place.
    pub value: T,
    /// Why.
    pub error: AllocError,
}

impl<T> Full<T> {
    /// The value.
    pub fn into_inner(self) -> T {
        self.value
    }
}

impl<T> fmt::Debug for Full<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Full({:?})", self.error)
    }
}

impl<T> fmt::Display for Full<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no object for the value: {}", self.error)
    }
}

impl<T> core::error::Error for Full<T> {}
