//! The slab system: one instance of the allocator, with its size classes and its registry of caches.
//!
//! Life: [`new`](SlabSystem::new) is const and holds nothing; [`init`](SlabSystem::init) takes the platform and the first frames;
//! caches join at their first use; [`teardown`](SlabSystem::teardown) gives every frame back.
//!
//! ```text
//!   SlabSystem ── rows[0] ──> one pointer per CPU ──> page of 64 heads      (a CPU's arrays; no lock)
//!       │                                                 └─> arrays
//!       ├── classes[47] ──> RawCache ── depot: arrays, slab lists           (one lock)
//!       │                                 └─> Slab descriptors ── bits      (one locked instruction per 64)
//!       └── registry: all caches                                └─> frames from the page source
//! ```
//!
//! Invariants
//! - `I1`: `rows[0]` is not null exactly while the system is ready; whoever sees it so (acquire) sees the platform and every class.
//! - `I2`: index `i` belongs to at most one cache at a time; its heads are empty while it belongs to none.
//! - `I3`: the head with index `GUARD` is used only for its busy flag, which guards the registry's lock against nesting.
//! - `I4`: nothing points at the `SlabSystem` itself: all shared objects lie in frames. So a value may be moved before or after `init`.

use core::fmt;
use core::mem::MaybeUninit;
use core::ptr::{self, NonNull};

use kmem_hal::sync::{AtomicPtr, AtomicU8, AtomicU64, Ordering, UnsafeCell};
use kmem_hal::{
    AllocError, Cpu, CpuId, Frame, FrameSlot, FrameTable, FrameTag, Lock, Order, PhysMap, Pinned,
    RawLock,
};

use crate::array::{Array, MAX_SLOTS};
use crate::block;
use crate::class::{CLASSES, LARGEST_ALIGN, NAMES, class_size};
use crate::geometry::Geometry;
use crate::head::{COLUMNS, Head, HeadPage, Row};
use crate::meta::MetaPool;
use crate::platform::Platform;
use crate::raw::{RawCache, Setup};
use crate::slab::Slab;

/// Rows of heads: 64 caches each.
const CHUNKS: usize = 16;

/// The index whose head guards the registry (`I3`).
const GUARD: u32 = COLUMNS as u32 - 1;

/// Pools of arrays: 8, 16, 32 and 64 slots.
const ARRAY_POOLS: usize = 4;

macro_rules! filled {
    ($count:expr, $value:expr) => {{
        #[cfg(not(loom))]
        let all = [const { $value }; $count];
        #[cfg(loom)]
        let all = core::array::from_fn(|_| $value);
        all
    }};
}

/// Why a system could not be initialised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum InitError {
    /// It was initialised before, or another CPU is doing it.
    Already,
    /// There was no memory for the first heads and classes; what was taken went back.
    Memory(AllocError),
}

impl fmt::Display for InitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Already => f.write_str("the slab system is initialised already"),
            Self::Memory(error) => write!(f, "the slab system cannot start: {error}"),
        }
    }
}

impl core::error::Error for InitError {}

/// The caches of a system.
pub(crate) struct Registry<L> {
    first: *mut RawCache<L>,
    used: [u64; CHUNKS],
}

// SAFETY: the caches belong to the system, and the list to the holder of its lock.
unsafe impl<L> Send for Registry<L> {}

/// An instance of the slab allocator.
///
/// # Contexts
///
/// Before `init` every allocation answers [`AllocError::NotInitialised`] (null from [`alloc`](Self::alloc)). Allocating and freeing
/// work in interrupts and NMIs; nothing spins on what it interrupted. Locks taken: one depot's at a time, then the page source's.
#[doc(alias = "kmem_cache")]
pub struct SlabSystem<P: Platform> {
    rows: [AtomicPtr<Row>; CHUNKS],
    classes: [AtomicPtr<RawCache<P::Lock>>; CLASSES],
    platform: UnsafeCell<MaybeUninit<P>>,
    state: AtomicU8,
    caches: MetaPool,
    descriptors: MetaPool,
    arrays: [MetaPool; ARRAY_POOLS],
    registry: Lock<Registry<P::Lock>, P::Lock>,
    /// Counts requests to drain; each CPU's head notes the last it has answered.
    pub(crate) drain: AtomicU64,
    /// Frames of heads and rows.
    own_frames: AtomicU64,
    /// Whole pages given out, in frames, and how many blocks.
    pub(crate) page_frames: AtomicU64,
    pub(crate) page_blocks: AtomicU64,
    /// Frees of addresses that nobody here knows.
    pub(crate) foreign: AtomicU64,
}

// SAFETY: the platform is written once before it is shared (I1) and is itself Sync; the rest is atomic or locked.
unsafe impl<P: Platform + Sync> Sync for SlabSystem<P> where P::Lock: Send + Sync {}
// SAFETY: nothing is bound to a thread (I4).
unsafe impl<P: Platform + Send> Send for SlabSystem<P> where P::Lock: Send + Sync {}

const EMPTY: u8 = 0;
const STARTING: u8 = 1;
const READY: u8 = 2;

impl<P: Platform> SlabSystem<P> {
    kmem_hal::const_new! {
        /// A system that holds nothing and allocates nothing yet.
        pub fn new() -> Self {
            Self {
                rows: filled!(CHUNKS, AtomicPtr::new(ptr::null_mut())),
                classes: filled!(CLASSES, AtomicPtr::new(ptr::null_mut())),
                platform: UnsafeCell::new(MaybeUninit::uninit()),
                state: AtomicU8::new(EMPTY),
                caches: MetaPool::new(size_of::<RawCache<P::Lock>>().next_multiple_of(64)),
                descriptors: MetaPool::new(size_of::<Slab>().next_multiple_of(64)),
                arrays: [
                    MetaPool::new(Array::bytes(8).next_multiple_of(64)),
                    MetaPool::new(Array::bytes(16).next_multiple_of(64)),
                    MetaPool::new(Array::bytes(32).next_multiple_of(64)),
                    MetaPool::new(Array::bytes(MAX_SLOTS).next_multiple_of(64)),
                ],
                registry: Lock::new(Registry { first: ptr::null_mut(), used: [0; CHUNKS] }),
                drain: AtomicU64::new(0),
                own_frames: AtomicU64::new(0),
                page_frames: AtomicU64::new(0),
                page_blocks: AtomicU64::new(0),
                foreign: AtomicU64::new(0),
            }
        }
    }

    /// Starts the system: takes the platform, a page of heads for the calling CPU, and the size classes.
    ///
    /// Called once, at boot, on one CPU. Other CPUs may allocate when it has returned; each gets its heads at
    /// [`cpu_online`](Self::cpu_online) or at its first allocation.
    ///
    /// # Errors
    ///
    /// [`InitError`]; the platform is dropped then, and every frame that was taken is back.
    pub fn init(&self, platform: P) -> Result<(), InitError> {
        if self
            .state
            .compare_exchange(EMPTY, STARTING, Ordering::Acquire, Ordering::Relaxed)
            .is_err()
        {
            return Err(InitError::Already);
        }
        // SAFETY: only the winner of the exchange gets here, and nobody reads the platform before `rows[0]` is set (I1).
        let platform = self
            .platform
            .with_mut(|place| unsafe { (*place).write(platform) as &P });
        match self.start(platform) {
            Ok(row) => {
                self.rows[0].store(row.as_ptr(), Ordering::Release);
                self.state.store(READY, Ordering::Release);
                Ok(())
            }
            Err((error, row)) => {
                // SAFETY: nobody saw any of it: the system never became ready.
                unsafe { self.release_own(platform, row) };
                // SAFETY: the platform was written above and is not used any more.
                self.platform
                    .with_mut(|place| unsafe { (*place).assume_init_drop() });
                self.state.store(EMPTY, Ordering::Release);
                Err(InitError::Memory(error))
            }
        }
    }

    /// Makes the first row, the calling CPU's heads and the classes.
    ///
    /// On an error the row, if there was memory for one, is handed back to be released.
    fn start(&self, platform: &P) -> Result<NonNull<Row>, (AllocError, *mut Row)> {
        let row = self
            .new_row(platform)
            .map_err(|error| (error, ptr::null_mut()))?;
        let started = (|| {
            let pin = platform.cpu().pin();
            self.head_page(platform, row.as_ptr(), pin.id())
                .ok_or(AllocError::OutOfMemory)?;
            let mut registry = self.registry.lock();
            let mut token = ptr::null();
            for (class, &name) in NAMES.iter().enumerate() {
                let size = class_size(class).ok_or(AllocError::Unsatisfiable)?;
                let geometry =
                    Geometry::new(size, natural(size)).ok_or(AllocError::Unsatisfiable)?;
                let setup = Setup {
                    name,
                    geometry,
                    stable: false,
                    hooks: None,
                };
                let memory = self.caches.alloc(platform)?.cast::<RawCache<P::Lock>>();
                if class == 0 {
                    token = memory.as_ptr().cast_const().cast();
                }
                let cache = RawCache::new(setup, row.as_ptr(), class as u32, token);
                // SAFETY: the pool gives memory of this size and alignment that belongs to this call.
                unsafe { memory.write(cache) };
                registry.insert(memory);
                registry.used[0] |= 1 << class;
                self.classes[class].store(memory.as_ptr(), Ordering::Release);
            }
            registry.used[0] |= 1 << GUARD;
            Ok(())
        })();
        started.map(|()| row).map_err(|error| (error, row.as_ptr()))
    }

    /// Whether `init` has succeeded.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        !self.rows[0].load(Ordering::Acquire).is_null()
            && self.state.load(Ordering::Acquire) == READY
    }

    /// The platform; `None` before `init`.
    #[inline(always)]
    pub(crate) fn platform(&self) -> Option<&P> {
        if self.rows[0].load(Ordering::Acquire).is_null() {
            return None;
        }
        // SAFETY: the row is set after the platform was written (I1).
        Some(unsafe { self.platform_unchecked() })
    }

    /// The platform.
    ///
    /// # Safety
    ///
    /// The caller has seen the system ready, for example because it holds a cache of it.
    #[inline(always)]
    pub(crate) unsafe fn platform_unchecked(&self) -> &P {
        // SAFETY: written before the system became ready (I1), by contract.
        self.platform
            .with(|place| unsafe { (*place).assume_init_ref() })
    }

    /// The first row, null before `init`.
    #[inline(always)]
    pub(crate) fn first_row(&self) -> *const Row {
        self.rows[0].load(Ordering::Acquire)
    }

    /// The cache of a class; `None` before `init`.
    #[inline]
    pub(crate) fn class(&self, class: usize) -> Option<&RawCache<P::Lock>> {
        // SAFETY: classes live as long as the system.
        unsafe { self.classes.get(class)?.load(Ordering::Acquire).as_ref() }
    }

    /// What the system's caches carry to be told from another system's.
    pub(crate) fn token(&self) -> *const () {
        // The first object of the pool of caches: it lies in a frame and does not move with the system (I4).
        self.classes[0].load(Ordering::Acquire).cast_const().cast()
    }

    /// Prepares heads for a CPU that is about to run.
    ///
    /// Optional: a CPU gets its heads at its first allocation as well, from whichever context that is in.
    ///
    /// # Errors
    ///
    /// [`AllocError`] where there is no memory; [`AllocError::Unsatisfiable`] for a CPU beyond the platform's count.
    pub fn cpu_online(&self, cpu: CpuId) -> Result<(), AllocError> {
        let platform = self.platform().ok_or(AllocError::NotInitialised)?;
        if cpu.get() >= platform.cpu().count() {
            return Err(AllocError::Unsatisfiable);
        }
        for row in &self.rows {
            let row = row.load(Ordering::Acquire);
            if !row.is_null() && self.head_page(platform, row, cpu).is_none() {
                return Err(AllocError::OutOfMemory);
            }
        }
        Ok(())
    }

    fn new_row(&self, platform: &P) -> Result<NonNull<Row>, AllocError> {
        let cpus = platform.cpu().count() as usize;
        let order =
            Order::for_bytes((cpus * size_of::<Row>()) as u64).ok_or(AllocError::Unsatisfiable)?;
        let (_, memory) = block::take(platform, order)?;
        let row = memory.cast::<Row>();
        for cpu in 0..cpus {
            // SAFETY: the block holds `cpus` pointers and belongs to this call.
            unsafe { row.add(cpu).write(Row::new(ptr::null_mut())) };
        }
        self.own_frames.fetch_add(order.frames(), Ordering::Relaxed);
        Ok(row)
    }

    /// The page of heads of `cpu` in `row`, made if it is missing; `None` where there is no memory.
    pub(crate) fn head_page(&self, platform: &P, row: *const Row, cpu: CpuId) -> Option<&HeadPage> {
        // SAFETY: a row has a place for every CPU below `count` (hal C3), and lives as long as the system.
        let place = unsafe { &*row.add(cpu.index()) };
        let page = place.load(Ordering::Acquire);
        // SAFETY: pages in a row live as long as the system.
        if let Some(page) = unsafe { page.as_ref() } {
            return Some(page);
        }
        let order = Order::for_bytes(size_of::<HeadPage>() as u64)?;
        let (frame, memory) = block::take(platform, order).ok()?;
        let made = memory.cast::<HeadPage>();
        // SAFETY: the block is large enough, page-aligned, and belongs to this call.
        unsafe { HeadPage::write_to(made) };
        let placed = place.compare_exchange(
            ptr::null_mut(),
            made.as_ptr(),
            Ordering::AcqRel,
            Ordering::Acquire,
        );
        match placed {
            Ok(_) => {
                self.own_frames.fetch_add(order.frames(), Ordering::Relaxed);
                // SAFETY: in a row now.
                Some(unsafe { made.as_ref() })
            }
            Err(other) => {
                // SAFETY: nobody saw the page that lost.
                unsafe { block::give(platform, frame, order) };
                // SAFETY: an interrupt on this CPU, or `cpu_online`, put this one there.
                unsafe { other.as_ref() }
            }
        }
    }

    /// The pinned CPU's head of `cache`, made if it is missing; `None` where there is no memory for it.
    pub(crate) fn head<'s>(
        &'s self,
        cache: &RawCache<P::Lock>,
        pin: &Pinned<'_, P::Cpu>,
    ) -> Option<&'s Head> {
        // SAFETY: a cache exists, so the system is ready.
        let platform = unsafe { self.platform_unchecked() };
        Some(
            self.head_page(platform, cache.row, pin.id())?
                .head(cache.column),
        )
    }

    /// The head of `cache` on `cpu`, if that CPU has one.
    pub(crate) fn head_of(&self, cache: &RawCache<P::Lock>, cpu: u32) -> Option<&Head> {
        // SAFETY: callers pass CPUs below `count`; the row and its pages live as long as the system.
        let page = unsafe {
            (*cache.row.add(cpu as usize))
                .load(Ordering::Acquire)
                .as_ref()
        }?;
        Some(page.head(cache.column))
    }

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
        let joined = self.with_registry(platform, |registry| {
            let index = registry.free_index().ok_or(AllocError::Unsatisfiable)?;
            let place = &self.rows[index as usize / COLUMNS];
            let mut row = place.load(Ordering::Acquire);
            if row.is_null() {
                row = self.new_row(platform)?.as_ptr();
                place.store(row, Ordering::Release);
            }
            // SAFETY: the pool gives memory of this size and alignment that belongs to this call.
            unsafe { memory.write(RawCache::new(setup, row, index, self.token())) };
            registry.used[index as usize / COLUMNS] |= 1 << (index as usize % COLUMNS);
            registry.insert(memory);
            Ok(memory)
        });
        let joined = joined.and_then(|inner| inner);
        if joined.is_err() {
            // SAFETY: the memory came from this pool and was not published.
            unsafe { self.caches.free(memory.cast()) };
        }
        joined
    }

    /// Takes a cache out of the registry and gives its memory back.
    ///
    /// # Safety
    ///
    /// The cache belongs to this system, nobody uses it any more except by way of the registry, it has no slab, and its heads
    /// and depot have no arrays.
    pub(crate) unsafe fn leave(&self, cache: NonNull<RawCache<P::Lock>>) -> Result<(), AllocError> {
        let platform = self.platform().ok_or(AllocError::NotInitialised)?;
        // SAFETY: the cache is alive until its memory goes back below.
        let (index, users) = unsafe { (cache.as_ref().index, &cache.as_ref().users) };
        self.with_registry(platform, |registry| {
            registry.remove(cache);
            registry.used[index as usize / COLUMNS] &= !(1 << (index as usize % COLUMNS));
        })?;
        // Nobody finds it any more; wait for those who had.
        while users.load(Ordering::Acquire) != 0 {
            kmem_hal::sync::spin_loop();
        }
        let mut pool_of_descriptors: *mut Slab = ptr::null_mut();
        // SAFETY: alive as above.
        unsafe { cache.as_ref() }.for_each_slab(|slab| {
            slab.next.set(pool_of_descriptors);
            pool_of_descriptors = ptr::from_ref(slab).cast_mut();
            true
        });
        while let Some(slab) = NonNull::new(pool_of_descriptors) {
            // SAFETY: the chain was made above of descriptors that nobody uses any more.
            unsafe {
                pool_of_descriptors = slab.as_ref().next.get();
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
            // SAFETY: `find` counted this context as a user, so `leave` waits.
            let cache = unsafe { cache.as_ref() };
            from = cache.index + 1;
            let _user = User(cache);
            each(cache);
        }
    }

    /// An empty array of `slots` slots.
    pub(crate) fn new_array(&self, slots: usize) -> Result<NonNull<Array>, AllocError> {
        // SAFETY: called with a cache at hand, so the system is ready.
        let platform = unsafe { self.platform_unchecked() };
        let memory = self.array_pool(slots).alloc(platform)?;
        // SAFETY: the pool's objects have room for the slots and are aligned to 64.
        Ok(unsafe { Array::construct(memory, slots) })
    }

    /// Takes an empty array back.
    ///
    /// # Safety
    ///
    /// The array came from [`new_array`](Self::new_array) and nobody uses it any more.
    pub(crate) unsafe fn free_array(&self, array: NonNull<Array>) {
        // SAFETY: the caller owns the array.
        let slots = unsafe { array.as_ref() }.capacity();
        // SAFETY: it came from the pool of its size.
        unsafe { self.array_pool(slots).free(array.cast()) };
    }

    fn array_pool(&self, slots: usize) -> &MetaPool {
        &self.arrays[match slots {
            0..=8 => 0,
            9..=16 => 1,
            17..=32 => 2,
            _ => 3,
        }]
    }

    /// A new descriptor of `cache`, dead and on no list.
    pub(crate) fn new_descriptor(
        &self,
        cache: &RawCache<P::Lock>,
    ) -> Result<NonNull<Slab>, AllocError> {
        // SAFETY: a cache exists, so the system is ready.
        let platform = unsafe { self.platform_unchecked() };
        let slab = self.descriptors.alloc(platform)?.cast::<Slab>();
        // SAFETY: the pool gives memory of this size and alignment that belongs to this call.
        unsafe { slab.write(Slab::new(cache.opaque())) };
        // SAFETY: just written; descriptors live as long as the cache.
        cache.remember(unsafe { slab.as_ref() });
        Ok(slab)
    }

    /// Frames that hold the allocator's own objects: heads, rows, descriptors, arrays, caches.
    #[must_use]
    pub fn overhead_frames(&self) -> u64 {
        self.own_frames.load(Ordering::Relaxed)
            + self.caches.frames()
            + self.descriptors.frames()
            + self.arrays.iter().map(MetaPool::frames).sum::<u64>()
    }

    /// The slot of the frame that `address` lies in, where the map reaches it.
    #[inline]
    pub(crate) fn slot_of(platform: &P, address: *const u8) -> Option<(Frame, &FrameSlot)> {
        let table: &FrameTable = platform.table();
        let frame = Frame::containing(platform.map().to_phys(address));
        Some((frame, table.slot(frame)?))
    }

    /// The descriptor of the slab that `address` lies in; `None` where it lies in none.
    #[inline]
    pub(crate) fn slab_of(platform: &P, address: *const u8) -> Option<&Slab> {
        let (_, slot) = Self::slot_of(platform, address)?;
        if slot.tag() != FrameTag::Slab {
            return None;
        }
        let owner = slot.owner().load(Ordering::Relaxed) as usize;
        // SAFETY: the owner word of a slab's frame is the exposed address of its descriptor, which lives as long as its
        // cache; a frame whose slot still says "slab" belongs to a live one.
        unsafe { ptr::with_exposed_provenance::<Slab>(owner).as_ref() }
    }

    /// Gives back rows (with `extra`, which may be null and is in no place), head pages and pools.
    ///
    /// # Safety
    ///
    /// Nobody uses the system, nor will.
    pub(crate) unsafe fn release_own(&self, platform: &P, extra: *mut Row) {
        let cpus = platform.cpu().count() as usize;
        let give = |memory: *mut u8, bytes: usize| {
            let frame = Frame::containing(platform.map().to_phys(memory));
            if let Some(order) = Order::for_bytes(bytes as u64) {
                // SAFETY: the block was taken by `new_row` or `head_page`, and nobody uses it by contract.
                unsafe { block::give(platform, frame, order) };
            }
        };
        let rows = self
            .rows
            .iter()
            .map(|row| row.swap(ptr::null_mut(), Ordering::Acquire));
        for row in rows.chain([extra]) {
            if row.is_null() {
                continue;
            }
            for cpu in 0..cpus {
                // SAFETY: a row has `cpus` places.
                let page = unsafe { &*row.add(cpu) }.load(Ordering::Acquire);
                if !page.is_null() {
                    give(page.cast(), size_of::<HeadPage>());
                }
            }
            give(row.cast(), cpus * size_of::<Row>());
        }
        for class in &self.classes {
            class.store(ptr::null_mut(), Ordering::Relaxed);
        }
        *self.registry.lock() = Registry {
            first: ptr::null_mut(),
            used: [0; CHUNKS],
        };
        for pool in [&self.caches, &self.descriptors]
            .into_iter()
            .chain(&self.arrays)
        {
            // SAFETY: the caller's promise.
            unsafe { pool.destroy(platform) };
        }
        self.own_frames.store(0, Ordering::Relaxed);
    }

    /// Forgets the platform after a teardown.
    ///
    /// # Safety
    ///
    /// Called once after `release_own`; nobody uses the system.
    pub(crate) unsafe fn forget_platform(&self) {
        // SAFETY: the platform was written by `init`, and nobody uses it any more by contract.
        self.platform
            .with_mut(|place| unsafe { (*place).assume_init_drop() });
        self.state.store(EMPTY, Ordering::Release);
    }
}

/// The natural alignment of a class: the largest power of two that divides its size, up to a page.
const fn natural(size: usize) -> usize {
    let align = 1 << size.trailing_zeros();
    if align > LARGEST_ALIGN {
        LARGEST_ALIGN
    } else {
        align
    }
}

/// A context that looks at a cache by way of the registry; counted off when dropped, a panic of the callback included.
struct User<'c, L>(&'c RawCache<L>);

impl<L> Drop for User<'_, L> {
    fn drop(&mut self) {
        self.0.users.fetch_sub(1, Ordering::Release);
    }
}

impl<L: RawLock> Registry<L> {
    fn insert(&mut self, cache: NonNull<RawCache<L>>) {
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

    /// The cache with the lowest index from `from`, counted as used.
    fn find(&self, from: u32) -> Option<NonNull<RawCache<L>>> {
        let mut best: Option<NonNull<RawCache<L>>> = None;
        let mut at = self.first;
        // SAFETY: caches on the list are alive, and the list belongs to the holder of its lock.
        while let Some(cache) = unsafe { at.as_ref() } {
            // SAFETY: as above.
            let better = best.is_none_or(|best| cache.index < unsafe { best.as_ref() }.index);
            if cache.index >= from && better {
                best = Some(NonNull::from(cache));
            }
            at = cache.next.get();
        }
        if let Some(best) = best {
            // SAFETY: as above.
            unsafe { best.as_ref() }
                .users
                .fetch_add(1, Ordering::Acquire);
        }
        best
    }
}

impl<P: Platform> Default for SlabSystem<P> {
    fn default() -> Self {
        Self::new()
    }
}

impl<P: Platform> fmt::Debug for SlabSystem<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SlabSystem(ready: {})", self.is_ready())
    }
}
