//! Typed caches: memory for objects of one type.
//!
//! A cache is const-constructible in a `static` or a field and joins its system at its first use. It may be moved: what the
//! system knows of it lies in a frame.
//!
//! Invariants
//! - `I1`: `raw` is null until the cache has joined, and never changes afterwards.
//! - `I2`: every object that the cache gives is memory for a `T`, aligned, from a slab of its own.

use core::fmt;
use core::marker::PhantomData;
use core::mem::MaybeUninit;
use core::panic::Location;
use core::ptr::{self, NonNull};

use kmem_hal::sync::{AtomicPtr, Ordering};
use kmem_hal::{AllocError, ObjectAlloc, Reserve};

use crate::bulk::Outgoing;
use crate::geometry::Geometry;
use crate::info::CacheInfo;
use crate::kmalloc::Flags;
use crate::platform::Platform;
use crate::policy::{Features, Policy};
use crate::raw::{Hooks, RawCache, Setup};
use crate::slab_box::{Full, SlabBox};
use crate::system::SlabSystem;
use crate::with_flags::WithFlags;

/// A cache of objects of type `T`.
///
/// `STABLE` caches keep their slabs until they are destroyed, so that lock-free readers may look at freed objects and doubt what they
/// read (`SLAB_TYPESAFE_BY_RCU`).
///
/// `H` is the cache's [`Policy`], the system's where it does not say otherwise.
///
/// Dropping a cache whose objects are all back gives its memory back; with objects still out (leaked boxes, raw pointers) the
/// memory stays, and the cache stays in `slabinfo`. [`destroy`](Self::destroy) says which of the two it was. A drop waits for nobody: where a walk
/// over the system's caches looks at this one at the moment, that walk gives the memory back when it goes on.
#[doc(alias = "kmem_cache")]
pub struct Cache<
    's,
    T,
    P: Platform,
    const STABLE: bool = false,
    H: Policy = <P as Platform>::Policy,
> {
    system: &'s SlabSystem<P>,
    raw: AtomicPtr<RawCache<P::Lock>>,
    name: &'static str,
    pub(crate) hooks: Option<Hooks>,
    _objects: PhantomData<fn(T, H) -> T>,
}

/// Objects were still out when a cache or a system was to be destroyed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaked {
    /// The name of the cache, or of the first of several.
    pub cache: &'static str,
    /// How many objects are out.
    pub objects: u64,
}

impl fmt::Display for Leaked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} objects of {} are still in use",
            self.objects, self.cache
        )
    }
}

impl core::error::Error for Leaked {}

impl<'s, T, P: Platform, H: Policy> Cache<'s, T, P, false, H> {
    kmem_hal::const_new! {
        /// A cache of `system`, called `name` in `slabinfo`.
        #[doc(alias = "kmem_cache_create")]
        pub fn new(system: &'s SlabSystem<P>, name: &'static str) -> Self {
            Self::with_hooks(system, name, None)
        }
    }
}

impl<'s, T, P: Platform, H: Policy> Cache<'s, T, P, true, H> {
    kmem_hal::const_new! {
        /// A cache whose memory stays memory for `T` until it is destroyed.
        #[doc(alias = "SLAB_TYPESAFE_BY_RCU")]
        pub fn new_stable(system: &'s SlabSystem<P>, name: &'static str) -> Self {
            Self::with_hooks(system, name, None)
        }
    }
}

impl<'s, T, P: Platform, const STABLE: bool, H: Policy> Cache<'s, T, P, STABLE, H> {
    const GEOMETRY: Geometry = {
        assert!(
            align_of::<T>() <= 4096,
            "a cache serves alignments up to a page"
        );
        match Geometry::new(
            size_of::<T>() + H::FEATURES.extra(align_of::<T>()),
            align_of::<T>(),
        ) {
            Some(geometry) => geometry,
            None => panic!("a cache serves objects up to 4 MiB"),
        }
    };

    /// Bytes in front of each object.
    const FRONT: usize = H::FEATURES.front(align_of::<T>());

    kmem_hal::const_new! {
        pub(crate) fn with_hooks(system: &'s SlabSystem<P>, name: &'static str, hooks: Option<Hooks>) -> Self {
            const { let _ = Self::GEOMETRY; };
            Self {
                system,
                raw: AtomicPtr::new(ptr::null_mut()),
                name,
                hooks,
                _objects: PhantomData,
            }
        }
    }

    /// The cache's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Joins the system now rather than at the first use; nothing where it has.
    ///
    /// # Errors
    ///
    /// [`AllocError`]: before `init`, without memory, from a context that interrupted another join, or beyond 975 typed caches.
    pub fn join(&self) -> Result<(), AllocError> {
        self.raw().map(|_| ())
    }

    #[inline]
    pub(crate) fn raw(&self) -> Result<&RawCache<P::Lock>, AllocError> {
        // SAFETY: a joined cache's raw one lives until this one is dropped (I1).
        match unsafe { self.raw.load(Ordering::Acquire).as_ref() } {
            Some(raw) => Ok(raw),
            None => self.join_now(),
        }
    }

    /// What the policy switches on here: freed objects of type-stable and reused ones keep their content.
    #[inline(always)]
    fn features(&self) -> Features {
        if STABLE || self.hooks.is_some() {
            H::FEATURES.keeping_content()
        } else {
            H::FEATURES
        }
    }

    #[cold]
    fn join_now(&self) -> Result<&RawCache<P::Lock>, AllocError> {
        let joined = self.system.join(Setup {
            name: self.name,
            geometry: Self::GEOMETRY,
            stable: STABLE,
            hooks: self.hooks,
            features: self.features(),
        })?;
        let won = self.raw.compare_exchange(
            ptr::null_mut(),
            joined.as_ptr(),
            Ordering::AcqRel,
            Ordering::Acquire,
        );
        match won {
            // SAFETY: joined, and lives until this cache is dropped.
            Ok(_) => Ok(unsafe { joined.as_ref() }),
            Err(other) => {
                // Another context joined meanwhile.
                // SAFETY: nobody but the registry knows the new one.
                unsafe { self.system.let_go(joined) };
                // SAFETY: as above.
                unsafe { other.as_ref() }.ok_or(AllocError::Busy)
            }
        }
    }

    /// Memory for one object, uninitialised.
    #[inline]
    #[track_caller]
    pub(crate) fn alloc_memory(&self, flags: Flags) -> Result<NonNull<T>, AllocError> {
        if size_of::<T>() == 0 {
            return Ok(NonNull::dangling());
        }
        let raw = self.raw()?;
        // SAFETY: the row of a cache of this system.
        let object = match unsafe { self.system.pop_local(raw.row, raw.index) } {
            Some(object) => object,
            None => self
                .system
                .alloc_slow(raw, &flags.request())
                .map_err(|error| self.system.tell_refused(size_of::<T>(), error, flags))?,
        };
        Ok(self.mark(raw, object, Location::caller()).cast())
    }

    /// As `alloc_memory`; refuses flags that limit the address, as a cache's objects lie anywhere.
    #[inline]
    #[track_caller]
    pub(crate) fn alloc_anywhere(&self, flags: Flags) -> Result<NonNull<T>, AllocError> {
        if flags.limited() {
            let error = AllocError::Unsatisfiable;
            return Err(self.system.tell_refused(size_of::<T>(), error, flags));
        }
        self.alloc_memory(flags)
    }

    /// Tells the policy of a slot that is given; answers the object in it.
    #[inline(always)]
    fn mark(
        &self,
        raw: &RawCache<P::Lock>,
        slot: NonNull<u8>,
        place: &'static Location<'static>,
    ) -> NonNull<u8> {
        self.system.on_alloc(
            self.features(),
            || Some(NonNull::from(raw)),
            raw.index,
            Self::FRONT,
            slot,
            size_of::<T>(),
            place,
        )
    }

    /// Takes the memory of one object back.
    ///
    /// # Safety
    ///
    /// The memory came from this cache, its value is gone, and the caller gives it up.
    #[inline]
    pub(crate) unsafe fn free_memory(&self, object: NonNull<T>) {
        if size_of::<T>() == 0 {
            return;
        }
        // SAFETY: a cache that gave an object has joined (I1).
        if let Some(raw) = unsafe { self.raw.load(Ordering::Acquire).as_ref() } {
            // SAFETY: the caller's promise.
            unsafe {
                let left = self.system.on_free(
                    self.features(),
                    || Some(NonNull::from(raw)),
                    raw.index,
                    Self::FRONT,
                    object.cast(),
                    Some(size_of::<T>()),
                );
                if let Some(object) = left {
                    self.system.free_object(raw, object);
                }
            }
        }
    }

    /// Puts `value` into an object of the cache.
    ///
    /// # Errors
    ///
    /// [`Full`], which gives the value back.
    #[doc(alias = "kmem_cache_alloc")]
    #[inline]
    #[track_caller]
    pub fn alloc(&self, value: T) -> Result<SlabBox<'_, T, P, STABLE, H>, Full<T>> {
        self.alloc_with(value, Flags::empty())
    }

    /// As [`alloc`](Self::alloc), in a context that `flags` describe.
    ///
    /// # Errors
    ///
    /// [`Full`], which gives the value back; with [`AllocError::Unsatisfiable`] where the flags limit the address ([`DMA`](Flags::DMA),
    /// [`DMA32`](Flags::DMA32)): a cache's objects lie anywhere.
    #[inline]
    #[track_caller]
    pub fn alloc_with(
        &self,
        value: T,
        flags: Flags,
    ) -> Result<SlabBox<'_, T, P, STABLE, H>, Full<T>> {
        match self.alloc_anywhere(flags) {
            Ok(object) => {
                // SAFETY: memory for a `T` that belongs to this call (I2).
                unsafe { object.write(value) };
                // SAFETY: an initialised object of this cache that nobody else owns.
                Ok(unsafe { SlabBox::from_raw(self, object) })
            }
            Err(error) => Err(Full { value, error }),
        }
    }

    /// Builds a value in an object of the cache, without passing it through the stack: for large types. Types without bytes need no place and
    /// are refused at compile time.
    ///
    /// # Errors
    ///
    /// [`AllocError`]; `build` is not called then. [`AllocError::Unsatisfiable`] where `build` gave a reference to another value than the one
    /// in the place: that one stays where it is and its owner's, and what was written into the place is forgotten.
    #[track_caller]
    pub fn alloc_in_place(
        &self,
        build: impl FnOnce(&mut MaybeUninit<T>) -> &mut T,
    ) -> Result<SlabBox<'_, T, P, STABLE, H>, AllocError> {
        self.alloc_in_place_with(build, Flags::empty())
    }

    /// As [`alloc_in_place`](Self::alloc_in_place), in a context that `flags` describe.
    ///
    /// # Errors
    ///
    /// As there, and [`AllocError::Unsatisfiable`] where the flags limit the address.
    #[track_caller]
    pub fn alloc_in_place_with(
        &self,
        build: impl FnOnce(&mut MaybeUninit<T>) -> &mut T,
        flags: Flags,
    ) -> Result<SlabBox<'_, T, P, STABLE, H>, AllocError> {
        const { assert!(size_of::<T>() > 0, "a type without bytes needs no place") };
        let object = self.alloc_anywhere(flags)?;
        // SAFETY: memory for a `T` that belongs to this call (I2).
        let place = unsafe { object.cast::<MaybeUninit<T>>().as_mut() };
        let built = ptr::from_mut(build(place));
        if !ptr::eq(built, object.as_ptr()) {
            // Where `T` borrows something, a reference to another value may live as long as any place does. That value has an owner.
            // SAFETY: the object came from this cache, and nothing refers to it any more.
            unsafe { self.free_memory(object) };
            return Err(AllocError::Unsatisfiable);
        }
        // SAFETY: `build` returned a reference to the value in the place, which has bytes, so that no other value is there.
        Ok(unsafe { SlabBox::from_raw(self, object) })
    }

    /// The cache as an allocator whose calls are made in a context that `flags` describe: for [`Reserve::new`], bulk calls, and whoever takes an
    /// [`ObjectAlloc`].
    ///
    /// # Examples
    ///
    /// Five objects ahead of need, for which the page source may reclaim:
    ///
    /// ```
    /// use kmem_hal::{AllocError, Reserve};
    /// use kmem_slab::{Cache, Flags, Platform};
    ///
    /// fn prepare<P: Platform>(cache: &Cache<'_, [u64; 4], P>) -> Result<(), AllocError> {
    ///     let waiting = cache.with_flags(Flags::MAY_WAIT);
    ///     let reserve = Reserve::<_, _, 8>::new(&waiting, 5)?;
    ///     assert_eq!(reserve.len(), 5);
    ///     Ok(())
    /// }
    /// ```
    pub fn with_flags(&self, flags: Flags) -> WithFlags<'_, T, P, STABLE, H> {
        WithFlags { cache: self, flags }
    }

    /// Takes `count` objects ahead of need (at most `N`): as long as some are left, [`Reserve::take`] cannot fail.
    ///
    /// # Errors
    ///
    /// [`AllocError`]; nothing is held then.
    #[doc(alias = "kmem_cache_prefill_sheaf")]
    pub fn prefill<const N: usize>(
        &self,
        count: usize,
    ) -> Result<Reserve<'_, T, Self, N>, AllocError> {
        self.join()?;
        Reserve::new(self, count)
    }

    /// The figures of the cache; `None` before its first use.
    #[must_use]
    pub fn info(&self) -> Option<CacheInfo> {
        // SAFETY: a joined cache's raw one lives until this one is dropped (I1).
        let raw = unsafe { self.raw.load(Ordering::Acquire).as_ref() }?;
        Some(self.system.info_of(raw))
    }

    /// Gives empty slabs back; answers how many frames.
    #[doc(alias = "kmem_cache_shrink")]
    pub fn shrink(&self) -> u64 {
        // SAFETY: a joined cache's raw one lives until this one is dropped (I1).
        match unsafe { self.raw.load(Ordering::Acquire).as_ref() } {
            Some(raw) => self.system.shrink_cache(raw),
            None => 0,
        }
    }

    /// Gives all memory of the cache back and leaves the system.
    ///
    /// Waits for walks over the system's caches ([`caches`](SlabSystem::caches), [`shrink`](SlabSystem::shrink)) that look at this one at the
    /// moment: for tasks, and not from the callback of such a walk, where it waits for ever. Dropping the cache waits for nobody.
    ///
    /// # Errors
    ///
    /// [`Leaked`] where objects are still out: their memory stays theirs for ever, and the cache stays in `slabinfo`.
    /// They must not be freed any more, by [`kfree`](SlabSystem::kfree) neither.
    #[doc(alias = "kmem_cache_destroy")]
    pub fn destroy(mut self) -> Result<(), Leaked> {
        match self.part() {
            // SAFETY: the cache was borrowed exclusively and is gone.
            Some(raw) => unsafe { self.system.leave(raw) },
            None => Ok(()),
        }
    }

    /// What the system knows of the cache, which forgets it.
    fn part(&mut self) -> Option<NonNull<RawCache<P::Lock>>> {
        NonNull::new(self.raw.swap(ptr::null_mut(), Ordering::Acquire))
    }
}

impl<T, P: Platform, const STABLE: bool, H: Policy> Drop for Cache<'_, T, P, STABLE, H> {
    fn drop(&mut self) {
        // Leaked objects keep their memory; `slabinfo` shows them.
        if let Some(raw) = self.part() {
            // SAFETY: the cache is borrowed exclusively and is gone afterwards.
            unsafe { self.system.let_go(raw) };
        }
    }
}

// SAFETY: B1: objects come from slabs of this cache, sized and aligned for `T` (I2), each out once (slab I1); B2: a refusal changes nothing
// that can be seen; B3: slabs of a STABLE cache go back only when it is destroyed.
unsafe impl<T, P: Platform, const STABLE: bool, H: Policy> ObjectAlloc<T>
    for Cache<'_, T, P, STABLE, H>
{
    const TYPE_STABLE: bool = STABLE;

    #[inline]
    #[track_caller]
    fn alloc(&self) -> Result<NonNull<T>, AllocError> {
        self.alloc_memory(Flags::empty())
    }

    #[inline]
    unsafe fn free(&self, object: NonNull<T>) {
        // SAFETY: the caller's promise.
        unsafe { self.free_memory(object) }
    }

    #[track_caller]
    fn alloc_bulk(&self, out: &mut [MaybeUninit<NonNull<T>>]) -> usize {
        self.fill(out, Flags::empty())
    }
}

impl<T, P: Platform, const STABLE: bool, H: Policy> Cache<'_, T, P, STABLE, H> {
    /// Fills `out` from its start with memory that is asked for with `flags`; answers how many objects it got.
    #[track_caller]
    pub(crate) fn fill(&self, out: &mut [MaybeUninit<NonNull<T>>], flags: Flags) -> usize {
        if size_of::<T>() == 0 {
            for place in out.iter_mut() {
                place.write(NonNull::dangling());
            }
            return out.len();
        }
        let Ok(raw) = self.raw() else {
            return 0;
        };
        let given = self.system.alloc_many(raw, out, &flags.request());
        if H::FEATURES.check {
            let place = Location::caller();
            let outgoing = Outgoing {
                system: self.system,
                cache: raw,
                slots: &mut out[..given],
                marked: 0,
            };
            outgoing.mark_all(|slot| self.mark(raw, slot, place));
        }
        given
    }

    /// Takes back the memory of many objects at once.
    ///
    /// # Safety
    ///
    /// As [`ObjectAlloc::free`] for each of them.
    #[doc(alias = "kmem_cache_free_bulk")]
    pub unsafe fn free_bulk(&self, objects: &[NonNull<T>]) {
        if size_of::<T>() == 0 {
            return;
        }
        if H::FEATURES.check {
            for &object in objects {
                // SAFETY: the caller's promise.
                unsafe { self.free_memory(object) };
            }
            return;
        }
        // SAFETY: a cache that gave objects has joined (I1).
        if let Some(raw) = unsafe { self.raw.load(Ordering::Acquire).as_ref() } {
            // SAFETY: the caller's promise.
            unsafe { self.system.free_many(raw, objects) };
        }
    }
}

impl<T, P: Platform, const STABLE: bool, H: Policy> fmt::Debug for Cache<'_, T, P, STABLE, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cache({}, {} bytes)", self.name, Self::GEOMETRY.size())
    }
}
