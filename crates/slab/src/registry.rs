//! The caches of a system: join, leave, and a walk over all.
//!
//! Invariants
//! - `G1`: the list and the used indices belong to the holder of the registry's lock, who has set the busy flag of the head `GUARD` on its CPU
//!   first: a context that interrupts it answers `Busy` and never waits. Nobody asks for memory meanwhile.
//! - `G2`: a cache that is on the list is alive. One that a walk looks at by way of the list counts the walk in `users`; nobody takes it apart,
//!   and its index is not given to another cache, before every walk has left it.

use core::ptr::{self, NonNull};

use kmem_hal::sync::Ordering;
use kmem_hal::{AllocError, Cpu, RawLock};

use crate::cache::Leaked;
use crate::head::{COLUMNS, Row};
use crate::platform::Platform;
use crate::raw::{RawCache, Setup};
use crate::slab::Slab;
use crate::system::SlabSystem;

/// Rows of heads: 64 caches each.
pub(crate) const CHUNKS: usize = 16;

/// The index whose head guards the registry (`G1`).
pub(crate) const GUARD: u32 = COLUMNS as u32 - 1;

/// The caches of a system.
pub(crate) struct Registry<L> {
    pub(crate) first: *mut RawCache<L>,
    pub(crate) used: [u64; CHUNKS],
}

// SAFETY: the caches belong to the system, and the list to the holder of its lock.
unsafe impl<L> Send for Registry<L> {}

impl<P: Platform> SlabSystem<P> {
    /// Runs `f` under the registry's lock; `Busy` where this CPU was interrupted while it held it.
    fn with_registry<R>(
        &self,
        platform: &P,
        f: impl FnOnce(&mut Registry<P::Lock>) -> R,
    ) -> Result<R, AllocError> {
        let pin = platform.cpu().pin();
        let page = self
            .head_page(platform, self.first_row(), pin.id())
            .ok_or(AllocError::OutOfMemory)?;
        let _busy = page.head(GUARD).enter().ok_or(AllocError::Busy)?;
        Ok(f(&mut self.registry.lock()))
    }

    /// Adds a cache.
    pub(crate) fn join(&self, setup: Setup) -> Result<NonNull<RawCache<P::Lock>>, AllocError> {
        let platform = self.platform().ok_or(AllocError::NotInitialised)?;
        let memory = self.caches.alloc(platform)?.cast::<RawCache<P::Lock>>();
        let mut spare = None;
        let mut joined = self.join_with(platform, memory, setup, &mut spare);
        if joined == Ok(false) {
            // Memory without the lock (refill I2).
            joined = self.new_row(platform).and_then(|row| {
                spare = Some(row);
                self.join_with(platform, memory, setup, &mut spare)
            });
        }
        if let Some(row) = spare {
            // SAFETY: made above; another context made one meanwhile, or the registry refused, and nobody has seen this one.
            unsafe { self.give_row(platform, row) };
        }
        joined.map(|_| memory).inspect_err(|_| {
            // SAFETY: the memory came from this pool and was not published.
            unsafe { self.caches.free(memory.cast()) };
        })
    }

    /// Makes a cache in `memory` and links it; `false`, and nothing happened, where it takes a row and there is none in `spare`.
    fn join_with(
        &self,
        platform: &P,
        memory: NonNull<RawCache<P::Lock>>,
        setup: Setup,
        spare: &mut Option<NonNull<Row>>,
    ) -> Result<bool, AllocError> {
        self.with_registry(platform, |registry| {
            let index = registry.free_index().ok_or(AllocError::Unsatisfiable)?;
            let place = &self.rows[index as usize / COLUMNS];
            let mut row = place.load(Ordering::Acquire);
            if row.is_null() {
                let Some(made) = spare.take() else {
                    return Ok(false);
                };
                row = made.as_ptr();
                place.store(row, Ordering::Release);
            }
            let row = self.parts_of(platform, row);
            let cache = RawCache::new(setup, &row, index, self.token());
            // SAFETY: the pool gives memory of this size and alignment that belongs to this call; the index is free, so the column is
            // this call's as well (G2).
            unsafe {
                cache.write_nodes();
                memory.write(cache);
            }
            registry.used[index as usize / COLUMNS] |= 1 << (index as usize % COLUMNS);
            registry.insert(memory);
            Ok(true)
        })?
    }

    /// The owner of a cache lets go of it: its memory goes back, now or when the last walk that looks at it goes on.
    ///
    /// # Safety
    ///
    /// The cache belongs to this system, and nobody uses it any more except by way of the registry.
    pub(crate) unsafe fn let_go(&self, cache: NonNull<RawCache<P::Lock>>) {
        // SAFETY: the cache is alive until it is dismantled, here or by the last walk.
        if unsafe { cache.as_ref() }.users.let_go() {
            // SAFETY: this context has the cache alone (users U1).
            let _ = unsafe { self.dismantle(cache) };
        }
    }

    /// As [`let_go`](Self::let_go), but waits for the walks that look at the cache.
    ///
    /// # Errors
    ///
    /// [`Leaked`] where objects are out; the cache stays in the registry.
    ///
    /// # Safety
    ///
    /// As [`let_go`](Self::let_go).
    pub(crate) unsafe fn leave(&self, cache: NonNull<RawCache<P::Lock>>) -> Result<(), Leaked> {
        // SAFETY: the cache is alive until it is dismantled below.
        unsafe { cache.as_ref() }.users.wait_and_let_go();
        // SAFETY: this context has the cache alone (users U1).
        unsafe { self.dismantle(cache) }
    }

    /// Gives all memory of a cache back and takes it out of the registry; leaves it there where objects are out.
    ///
    /// In a context that interrupted the registry, or has no memory for its CPU's head there, the empty cache stays as well until the next walk.
    ///
    /// # Safety
    ///
    /// The caller has the cache alone (users `U1`).
    unsafe fn dismantle(&self, cache: NonNull<RawCache<P::Lock>>) -> Result<(), Leaked> {
        // SAFETY: the cache is alive until its memory goes back below.
        let raw = unsafe { cache.as_ref() };
        // SAFETY: the caller has the cache alone.
        unsafe { self.empty(raw) };
        let info = self.info_of(raw);
        if info.slabs > 0 {
            raw.users.stay();
            return Err(Leaked {
                cache: raw.setup.name,
                objects: info.active_objects,
            });
        }
        // SAFETY: a cache exists, so the system is ready.
        let platform = unsafe { self.platform_unchecked() };
        let index = raw.index as usize;
        // Only now may the index, and with it the heads, become another cache's (G2).
        let removed = self.with_registry(platform, |registry| {
            self.reset_heads(raw);
            registry.remove(cache);
            registry.used[index / COLUMNS] &= !(1 << (index % COLUMNS));
        });
        if removed.is_err() {
            raw.users.abandon();
            return Ok(());
        }
        let mut pool_of_descriptors: *mut Slab = ptr::null_mut();
        raw.for_each_slab(|slab| {
            slab.next.set(pool_of_descriptors);
            pool_of_descriptors = ptr::from_ref(slab).cast_mut();
            true
        });
        while let Some(slab) = NonNull::new(pool_of_descriptors) {
            // SAFETY: the chain was made above of descriptors that nobody uses any more.
            unsafe {
                pool_of_descriptors = slab.as_ref().next.get();
                if let Some(words) = NonNull::new(slab.as_ref().more()) {
                    self.words.free(words.cast());
                }
                self.descriptors.free(slab.cast());
            }
        }
        // SAFETY: nobody points at the cache any more; it came from this pool.
        unsafe {
            cache.drop_in_place();
            self.caches.free(cache.cast());
        }
        Ok(())
    }

    /// Calls `each` with every cache in the order of their index. No lock is held during the call.
    pub(crate) fn for_each_cache(
        &self,
        mut each: impl FnMut(&RawCache<P::Lock>),
    ) -> Result<(), AllocError> {
        let platform = self.platform().ok_or(AllocError::NotInitialised)?;
        let mut from = 0;
        loop {
            let found = self.with_registry(platform, |registry| registry.find(from))?;
            let Some(cache) = found else { return Ok(()) };
            let walk = Walk {
                system: self,
                cache,
            };
            // SAFETY: `find` counted this walk, so the cache stays (G2).
            let cache = unsafe { cache.as_ref() };
            from = cache.index + 1;
            each(cache);
            drop(walk);
        }
    }
}

/// A walk that looks at a cache; counted off when dropped, a panic of the callback included.
struct Walk<'s, P: Platform> {
    system: &'s SlabSystem<P>,
    cache: NonNull<RawCache<P::Lock>>,
}

impl<P: Platform> Drop for Walk<'_, P> {
    fn drop(&mut self) {
        // SAFETY: alive until this walk is counted off (G2), and after that only where this call has it alone (users U1).
        unsafe {
            if self.cache.as_ref().users.exit() {
                let _ = self.system.dismantle(self.cache);
            }
        }
    }
}

impl<L> Registry<L> {
    /// No caches.
    pub(crate) const fn new() -> Self {
        Self {
            first: ptr::null_mut(),
            used: [0; CHUNKS],
        }
    }
}

impl<L: RawLock> Registry<L> {
    pub(crate) fn insert(&mut self, cache: NonNull<RawCache<L>>) {
        // SAFETY: the cache was just written and belongs to the registry from now on.
        unsafe { cache.as_ref() }.next.set(self.first);
        self.first = cache.as_ptr();
    }

    fn remove(&mut self, cache: NonNull<RawCache<L>>) {
        // SAFETY: caches on the list are alive, and the list belongs to the holder of its lock.
        let next = unsafe { cache.as_ref() }.next.get();
        if self.first == cache.as_ptr() {
            self.first = next;
            return;
        }
        let mut at = self.first;
        // SAFETY: as above.
        while let Some(before) = unsafe { at.as_ref() } {
            if before.next.get() == cache.as_ptr() {
                before.next.set(next);
                return;
            }
            at = before.next.get();
        }
    }

    fn free_index(&self) -> Option<u32> {
        self.used.iter().enumerate().find_map(|(chunk, &used)| {
            let index = (!used).trailing_zeros();
            (index < 64).then_some(chunk as u32 * 64 + index)
        })
    }

    /// The cache with the lowest index from `from` whose owner is there; this walk is counted.
    fn find(&self, mut from: u32) -> Option<NonNull<RawCache<L>>> {
        loop {
            let mut best: Option<&RawCache<L>> = None;
            let mut at = self.first;
            // SAFETY: caches on the list are alive, and the list belongs to the holder of its lock.
            while let Some(cache) = unsafe { at.as_ref() } {
                if cache.index >= from && best.is_none_or(|best| cache.index < best.index) {
                    best = Some(cache);
                }
                at = cache.next.get();
            }
            let best = best?;
            if best.users.enter() {
                return Some(NonNull::from(best));
            }
            from = best.index + 1;
        }
    }
}
