//! Memory for objects of one type: what a tree takes its nodes from.
//!
//! The slab crate implements [`ObjectAlloc`] with its typed caches, and [`FixedPool`] implements it with an array, so
//! that a tree can live in a `static` with no allocator at all. Allocation always may fail. Code that must not fail
//! half-way takes a [`Reserve`] first and then uses objects that it already holds.
//!
//! Invariants of the pool
//! - `I1`: `used` bit `i` is set exactly while object `i` is handed out.
//! - `I2`: memory of a pool stays of type `T` for ever (type-stable): a stale reader reads an old or another `T`.

use core::fmt;
use core::mem::MaybeUninit;
use core::ptr::NonNull;

use crate::grace::{Deferred, Grace};
use crate::source::AllocError;
use crate::sync::{AtomicU64, Ordering, UnsafeCell};

/// Gives and takes memory for objects of type `T`.
///
/// # Safety
///
/// - `B1`: memory that was given is valid for a `T`, aligned, and given to nobody else until it is freed.
/// - `B2`: a failed call changes nothing.
/// - `B3`: where `TYPE_STABLE` is true, freed memory holds a `T` or an unused object of this allocator for as long as
///   the allocator lives, so that a lock-free reader may still read it and must only doubt what it reads.
/// - `B4`: [`alloc_bulk`](Self::alloc_bulk) writes the first `n` places, `n` being its answer and at most `out.len()`.
#[doc(alias = "kmem_cache")]
pub unsafe trait ObjectAlloc<T> {
    /// Whether freed memory stays memory for `T` (`SLAB_TYPESAFE_BY_RCU`).
    #[doc(alias = "SLAB_TYPESAFE_BY_RCU")]
    const TYPE_STABLE: bool;

    /// Memory for one object, uninitialised.
    ///
    /// # Errors
    ///
    /// [`AllocError`] where there is none.
    #[doc(alias = "kmem_cache_alloc")]
    fn alloc(&self) -> Result<NonNull<T>, AllocError>;

    /// Takes one object's memory back at once.
    ///
    /// # Safety
    ///
    /// `object` came from this allocator, is not freed twice, its value was dropped or needs no drop, and no reader may
    /// still look at it, unless `TYPE_STABLE` and readers doubt what they read.
    #[doc(alias = "kmem_cache_free")]
    unsafe fn free(&self, object: NonNull<T>);

    /// Fills `out` from its start; gives how many objects it got.
    #[doc(alias = "kmem_cache_alloc_bulk")]
    fn alloc_bulk(&self, out: &mut [MaybeUninit<NonNull<T>>]) -> usize {
        for (given, place) in out.iter_mut().enumerate() {
            match self.alloc() {
                Ok(object) => {
                    place.write(object);
                }
                Err(_) => return given,
            }
        }
        out.len()
    }

    /// Takes one object's memory back after a grace period.
    ///
    /// # Errors
    ///
    /// Gives the object back where the queue of `grace` is full.
    ///
    /// # Safety
    ///
    /// As [`free`](Self::free), but readers under a guard of `grace` may still look at the object. The allocator
    /// outlives the grace period.
    #[doc(alias = "kfree_rcu")]
    unsafe fn free_deferred<G: Grace>(
        &self,
        object: NonNull<T>,
        grace: &G,
    ) -> Result<(), NonNull<T>>
    where
        Self: Sized,
    {
        unsafe fn run<T, A: ObjectAlloc<T>>(context: *const (), object: NonNull<()>) {
            // SAFETY: `context` is the allocator, which outlives the grace period by contract.
            let allocator = unsafe { &*context.cast::<A>() };
            // SAFETY: the grace period is over: no reader looks at the object any more.
            unsafe { allocator.free(object.cast()) }
        }
        let context = core::ptr::from_ref(self).cast::<()>();
        // SAFETY: freeing once, from anywhere, is sound after the grace period.
        let call = unsafe { Deferred::new(run::<T, Self>, context, object.cast()) };
        grace.defer(call).map_err(|_| object)
    }
}

// SAFETY: a reference forwards to an allocator that keeps the contract.
unsafe impl<T, A: ObjectAlloc<T>> ObjectAlloc<T> for &A {
    const TYPE_STABLE: bool = A::TYPE_STABLE;

    fn alloc(&self) -> Result<NonNull<T>, AllocError> {
        (**self).alloc()
    }
    unsafe fn free(&self, object: NonNull<T>) {
        // SAFETY: the caller's promise is passed on.
        unsafe { (**self).free(object) }
    }
    fn alloc_bulk(&self, out: &mut [MaybeUninit<NonNull<T>>]) -> usize {
        (**self).alloc_bulk(out)
    }
    // Forwarded, so that the deferred call keeps the allocator's address and not that of this reference.
    unsafe fn free_deferred<G: Grace>(
        &self,
        object: NonNull<T>,
        grace: &G,
    ) -> Result<(), NonNull<T>> {
        // SAFETY: the caller's promise is passed on.
        unsafe { (**self).free_deferred(object, grace) }
    }
}

/// Objects taken ahead of need: as long as some are left, [`take`](Self::take) cannot fail.
///
/// Holds up to `N` objects on the stack; what is left over is freed on drop.
///
/// # Examples
///
/// ```
/// use kmem_hal::{FixedPool, ObjectAlloc, Reserve};
///
/// static NODES: FixedPool<[u64; 4], 8> = FixedPool::new();
/// let mut reserve = Reserve::<_, _, 8>::new(&NODES, 3).unwrap();
/// let node = reserve.take().unwrap();
/// drop(reserve); // two go back
/// assert_eq!(NODES.in_use(), 1);
/// // SAFETY: `node` came from NODES and needs no drop.
/// unsafe { NODES.free(node) };
/// ```
pub struct Reserve<'a, T, A: ObjectAlloc<T>, const N: usize = 40> {
    allocator: &'a A,
    objects: [MaybeUninit<NonNull<T>>; N],
    count: usize,
}

impl<'a, T, A: ObjectAlloc<T>, const N: usize> Reserve<'a, T, A, N> {
    /// Takes `count` objects from `allocator`.
    ///
    /// # Errors
    ///
    /// [`AllocError::OutOfMemory`] where there are fewer, all of which are given back;
    /// [`AllocError::Unsatisfiable`] where `count` is more than `N`.
    pub fn new(allocator: &'a A, count: usize) -> Result<Self, AllocError> {
        if count > N {
            return Err(AllocError::Unsatisfiable);
        }
        let mut reserve = Self {
            allocator,
            objects: [const { MaybeUninit::uninit() }; N],
            count: 0,
        };
        reserve.count = allocator
            .alloc_bulk(&mut reserve.objects[..count])
            .min(count);
        if reserve.count < count {
            Err(AllocError::OutOfMemory)
        } else {
            Ok(reserve)
        }
    }

    /// One object's memory; `None` where the reserve is used up.
    pub fn take(&mut self) -> Option<NonNull<T>> {
        self.count = self.count.checked_sub(1)?;
        // SAFETY: the first `count` places were written by `alloc_bulk` and not taken since.
        Some(unsafe { self.objects[self.count].assume_init() })
    }

    /// How many objects are left.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether none is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

impl<T, A: ObjectAlloc<T>, const N: usize> Drop for Reserve<'_, T, A, N> {
    fn drop(&mut self) {
        while let Some(object) = self.take() {
            // SAFETY: the object came from this allocator, was never used, and is freed once.
            unsafe { self.allocator.free(object) }
        }
    }
}

impl<T, A: ObjectAlloc<T>, const N: usize> fmt::Debug for Reserve<'_, T, A, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reserve({} of {N})", self.count)
    }
}

/// A fixed array of `N` objects (at most 4096) as an [`ObjectAlloc`].
pub struct FixedPool<T, const N: usize> {
    used: [AtomicU64; 64],
    objects: UnsafeCell<[MaybeUninit<T>; N]>,
}

// SAFETY: the pool hands out each object to one owner at a time (`I1`) and never touches its bytes.
unsafe impl<T: Send, const N: usize> Sync for FixedPool<T, N> {}
// SAFETY: as above.
unsafe impl<T: Send, const N: usize> Send for FixedPool<T, N> {}

impl<T, const N: usize> FixedPool<T, N> {
    const FITS: () = {
        assert!(N <= 64 * 64, "a FixedPool holds at most 4096 objects");
        assert!(size_of::<T>() > 0, "objects of no size need no pool");
    };

    /// A pool with every object free.
    #[cfg(not(loom))]
    #[must_use]
    pub const fn new() -> Self {
        const { Self::FITS };
        Self {
            used: [const { AtomicU64::new(0) }; 64],
            objects: UnsafeCell::new([const { MaybeUninit::uninit() }; N]),
        }
    }

    /// A pool with every object free.
    #[cfg(loom)]
    #[must_use]
    pub fn new() -> Self {
        const { Self::FITS };
        Self {
            used: core::array::from_fn(|_| AtomicU64::new(0)),
            objects: UnsafeCell::new([const { MaybeUninit::uninit() }; N]),
        }
    }

    /// Objects handed out.
    #[must_use]
    pub fn in_use(&self) -> usize {
        self.used
            .iter()
            .map(|word| word.load(Ordering::Relaxed).count_ones() as usize)
            .sum()
    }

    fn base(&self) -> *mut T {
        // Only the address is taken here; the bytes are their owner's (`I1`).
        self.objects.with(|objects| objects.cast_mut().cast::<T>())
    }
}

impl<T, const N: usize> Default for FixedPool<T, N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T, const N: usize> fmt::Debug for FixedPool<T, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FixedPool({} of {N})", self.in_use())
    }
}

// SAFETY: B1: a compare-and-exchange from clear to set hands an object out once (`I1`), inside the array; B2: nothing
// is set on failure; B3: the memory belongs to the pool for ever (`I2`).
unsafe impl<T, const N: usize> ObjectAlloc<T> for FixedPool<T, N> {
    const TYPE_STABLE: bool = true;

    fn alloc(&self) -> Result<NonNull<T>, AllocError> {
        for (index, word) in self.used.iter().enumerate().take(N.div_ceil(64)) {
            let valid = if (index + 1) * 64 <= N {
                u64::MAX
            } else {
                (1 << (N % 64)) - 1
            };
            let found = word.fetch_update(Ordering::Acquire, Ordering::Relaxed, |used| {
                let free = !used & valid;
                if free == 0 {
                    None
                } else {
                    Some(used | (free & free.wrapping_neg()))
                }
            });
            if let Ok(used) = found {
                let bit = (!used & valid).trailing_zeros() as usize;
                // SAFETY: the bit is below N, so the object is inside the array.
                let object = unsafe { self.base().add(index * 64 + bit) };
                return NonNull::new(object).ok_or(AllocError::OutOfMemory);
            }
        }
        Err(AllocError::OutOfMemory)
    }

    unsafe fn free(&self, object: NonNull<T>) {
        // SAFETY: by contract the object came from this array; FITS rules out types of no size.
        let index = unsafe { object.as_ptr().offset_from_unsigned(self.base()) };
        self.used[index / 64].fetch_and(!(1 << (index % 64)), Ordering::Release);
    }
}

/// Memory for sizes that the object allocator does not serve: vmalloc plugs in here.
///
/// # Safety
///
/// - `V1`: memory that was given is valid for `size` bytes, aligned to `align`, and given to nobody else until freed.
/// - `V2`: `contains` is true exactly for the addresses of memory that was given and not freed.
/// - `V3`: where `in_any_context` says `true`, every call works in interrupts and NMIs, whatever they interrupted.
pub unsafe trait LargeSource {
    /// Whether memory may be taken and given back in any context, or only in tasks, as is true of what maps memory. Once `true`, always `true`.
    #[inline]
    fn in_any_context(&self) -> bool {
        false
    }

    /// `size` bytes aligned to `align` (a power of two).
    ///
    /// # Errors
    ///
    /// [`AllocError`] where there is no room.
    #[doc(alias = "vmalloc")]
    fn alloc_large(&self, size: usize, align: usize) -> Result<NonNull<u8>, AllocError>;

    /// Takes memory back.
    ///
    /// # Safety
    ///
    /// `memory` came from `alloc_large` of this source and is not freed twice.
    #[doc(alias = "vfree")]
    unsafe fn free_large(&self, memory: NonNull<u8>);

    /// Whether the address lies in memory that this source gave (`is_vmalloc_addr`).
    #[doc(alias = "is_vmalloc_addr")]
    fn contains(&self, address: *const u8) -> bool;

    /// The usable size of memory that this source gave; `None` for any other address.
    fn size_of(&self, memory: NonNull<u8>) -> Option<usize>;
}

/// The absence of a source for large sizes.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoLarge;

// SAFETY: V1 to V3: nothing is ever given.
unsafe impl LargeSource for NoLarge {
    #[inline]
    fn in_any_context(&self) -> bool {
        true
    }
    fn alloc_large(&self, _size: usize, _align: usize) -> Result<NonNull<u8>, AllocError> {
        Err(AllocError::Unsatisfiable)
    }
    unsafe fn free_large(&self, _memory: NonNull<u8>) {}
    fn contains(&self, _address: *const u8) -> bool {
        false
    }
    fn size_of(&self, _memory: NonNull<u8>) -> Option<usize> {
        None
    }
}
