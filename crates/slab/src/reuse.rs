//! Caches that keep built objects: Bonwick's original idea.
//!
//! Building an object (its locks, its lists, its reference counts) may cost more than finding memory for it. Such a cache
//! builds every object of a slab once, when the slab is made; a free resets it and leaves it built; it is taken apart when its slab
//! goes back.
//!
//! Invariants
//! - `R1`: every object of a live slab holds a built `T`, in use or not.
//! - `R2`: `T` is `Send` and `'static`: any CPU may use, reset and take apart what another has built, at any time.
//!
//! Source: Bonwick, "The Slab Allocator: An Object-Caching Kernel Memory Allocator", USENIX Summer 1994.

use core::fmt;
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;

use kmem_hal::AllocError;

use crate::cache::{Cache, Leaked};
use crate::info::CacheInfo;
use crate::kmalloc::Flags;
use crate::platform::Platform;
use crate::raw::Hooks;
use crate::system::SlabSystem;

/// A cache of built objects of type `T`.
///
/// A built object goes from user to user and from CPU to CPU without being rebuilt, and is taken apart wherever its slab goes back,
/// which may be after the cache is gone (one that was forgotten, or dropped while a walk looked at it), and beneath any allocation that may wait
/// and finds memory short: `T`'s destructor takes no lock that such a caller may hold. So `T` is [`Send`] and borrows nothing:
///
/// ```
/// # use kmem_slab::{Platform, ReuseCache, SlabSystem};
/// # use std::sync::Arc;
/// fn shared<P: Platform>(system: &SlabSystem<P>) -> ReuseCache<'_, Arc<u8>, P> {
///     ReuseCache::new(system, "shared", || Arc::new(1), |_| {})
/// }
/// ```
///
/// ```compile_fail,E0277
/// # use kmem_slab::{Platform, ReuseCache, SlabSystem};
/// # use std::rc::Rc;
/// // Two CPUs would count one `Rc` at once.
/// fn shared<P: Platform>(system: &SlabSystem<P>) -> ReuseCache<'_, Rc<u8>, P> {
///     ReuseCache::new(system, "shared", || Rc::new(1), |_| {})
/// }
/// ```
///
/// ```compile_fail
/// # use kmem_slab::{Platform, ReuseCache, SlabSystem};
/// // What a user leaves in the object may be gone when the next one looks.
/// fn borrowing<'a, P: Platform>(system: &'a SlabSystem<P>) -> ReuseCache<'a, Option<&'a u8>, P> {
///     ReuseCache::new(system, "borrowing", || None, |_| {})
/// }
/// ```
pub struct ReuseCache<'s, T, P: Platform> {
    cache: Cache<'s, T, P>,
    reset: fn(&mut T),
}

unsafe fn construct<T>(context: *const (), object: *mut u8) {
    // SAFETY: the context is the function pointer that `new` stored.
    let build = unsafe { core::mem::transmute::<*const (), fn() -> T>(context) };
    // SAFETY: memory for a `T` that belongs to the caller.
    unsafe { object.cast::<T>().write(build()) };
}

unsafe fn destruct<T>(object: *mut u8) {
    // SAFETY: a built object (R1) that nobody uses.
    unsafe { object.cast::<T>().drop_in_place() };
}

impl<'s, T: Send + 'static, P: Platform> ReuseCache<'s, T, P> {
    kmem_hal::const_new! {
        /// A cache whose objects `build` makes once and `reset` makes ready for the next user when they are freed.
        ///
        /// `build` runs where the slab is made, so it must not allocate from this cache.
        pub fn new(system: &'s SlabSystem<P>, name: &'static str, build: fn() -> T, reset: fn(&mut T)) -> Self {
            const { assert!(size_of::<T>() > 0, "a type without state needs no building") };
            let hooks = Hooks {
                construct: construct::<T>,
                destruct: destruct::<T>,
                context: build as *const (),
            };
            Self { cache: Cache::with_hooks(system, name, Some(hooks)), reset }
        }
    }

    /// A built object.
    ///
    /// # Errors
    ///
    /// [`AllocError`].
    #[track_caller]
    pub fn alloc(&self) -> Result<Reused<'_, T, P>, AllocError> {
        self.alloc_with(Flags::empty())
    }

    /// As [`alloc`](Self::alloc), in a context that `flags` describe.
    ///
    /// # Errors
    ///
    /// [`AllocError`]; [`AllocError::Unsatisfiable`] where the flags limit the address.
    #[track_caller]
    pub fn alloc_with(&self, flags: Flags) -> Result<Reused<'_, T, P>, AllocError> {
        let object = self.cache.alloc_anywhere(flags)?;
        Ok(Reused {
            cache: self,
            object,
        })
    }

    /// The figures of the cache; `None` before its first use.
    #[must_use]
    pub fn info(&self) -> Option<CacheInfo> {
        self.cache.info()
    }

    /// Gives empty slabs back, taking their objects apart; answers how many frames.
    pub fn shrink(&self) -> u64 {
        self.cache.shrink()
    }

    /// Takes every object apart and leaves the system.
    ///
    /// # Errors
    ///
    /// [`Leaked`] where objects are still out: they stay as they are.
    pub fn destroy(self) -> Result<(), Leaked> {
        self.cache.destroy()
    }
}

impl<T, P: Platform> fmt::Debug for ReuseCache<'_, T, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.cache, f)
    }
}

/// A built object of a cache; dropping it resets the object and gives it back built.
pub struct Reused<'c, T, P: Platform> {
    cache: &'c ReuseCache<'c, T, P>,
    object: NonNull<T>,
}

// SAFETY: the handle owns its object; the cache is shared by all CPUs.
unsafe impl<T: Send, P: Platform + Sync> Send for Reused<'_, T, P> where P::Lock: Send + Sync {}
// SAFETY: as above.
unsafe impl<T: Sync, P: Platform + Sync> Sync for Reused<'_, T, P> where P::Lock: Send + Sync {}

impl<T, P: Platform> Deref for Reused<'_, T, P> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: a built object (R1) that this handle owns.
        unsafe { self.object.as_ref() }
    }
}

impl<T, P: Platform> DerefMut for Reused<'_, T, P> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: a built object (R1) that this handle owns, borrowed exclusively.
        unsafe { self.object.as_mut() }
    }
}

impl<T, P: Platform> Drop for Reused<'_, T, P> {
    fn drop(&mut self) {
        (self.cache.reset)(self);
        // SAFETY: the handle owned the object, which stays built (R1).
        unsafe { self.cache.cache.free_memory(self.object) };
    }
}

impl<T: fmt::Debug, P: Platform> fmt::Debug for Reused<'_, T, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}
