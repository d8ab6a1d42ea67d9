//! The slab system: one instance of the allocator, with its size classes and its registry of caches.
//!
//! Life: [`new`](SlabSystem::new) is const and holds nothing; [`init`](SlabSystem::init) takes the platform and the first frames;
//! caches join at their first use; [`teardown`](SlabSystem::teardown) gives every frame back.
//!
//! ```text
//!   SlabSystem ── rows[0] ──> one pointer per CPU ──> page of 64 heads      (a CPU's arrays; no lock)
//!       │                                                 └─> arrays
//!       ├── classes[48] ──> RawCache ── depot: arrays, slab lists           (one lock)
//!       │                                 └─> Slab descriptors ── bits      (one locked instruction per 64)
//!       └── registry: all caches                                └─> frames from the page source
//! ```
//!
//! Invariants
//! - `I1`: `rows[0]` is not null exactly while the system is ready; whoever sees it so (acquire) sees the platform and every class.
//! - `I2`: index `i` belongs to at most one cache at a time; its heads are empty while it belongs to none.
//! - `I3`: the head with index `GUARD` is used only for its busy flag, which guards the registry's lock against nesting, and for its count of
//!   allocations, which says when the policy `Guard` takes its turn: it needs no flag, as an interrupt that is counted twice or not at all moves that turn only.
//! - `I4`: nothing points at the `SlabSystem` itself: all shared objects lie in frames. So a value may be moved before or after `init`.

use core::fmt;
use core::mem::MaybeUninit;
use core::ptr::{self, NonNull};

use kmem_hal::sync::{
    AtomicPtr, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering, UnsafeCell,
};
use kmem_hal::{AllocError, Cpu, Lock};

use crate::array::{Array, SMALL_SLOTS};
use crate::class::{CLASSES, LARGEST_ALIGN, NAMES, class_size};
use crate::geometry::Geometry;
use crate::head::Row;
use crate::meta::{LARGEST, MetaPool};
use crate::node;
use crate::platform::Platform;
use crate::policy::Policy;
use crate::raw::{RawCache, Setup};
use crate::registry::{CHUNKS, GUARD, Registry};
use crate::slab::{MoreWords, Slab};

/// Pools of arrays: 8, 16, 32, 64 and 128 slots, and as many as a page has room for.
pub(crate) const ARRAY_POOLS: usize = 6;

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

/// An instance of the slab allocator.
///
/// # Contexts
///
/// Before `init` every allocation answers [`AllocError::NotInitialised`] (null from [`alloc`](Self::alloc)). Allocating and freeing
/// work in interrupts and NMIs; nothing spins on what it interrupted. Locks taken: one depot's at a time, then the page source's.
#[doc(alias = "kmem_cache")]
pub struct SlabSystem<P: Platform> {
    pub(crate) rows: [AtomicPtr<Row>; CHUNKS],
    pub(crate) classes: [AtomicPtr<RawCache<P::Lock>>; CLASSES],
    platform: UnsafeCell<MaybeUninit<P>>,
    state: AtomicU8,
    /// How many nodes have depots; written before the system is ready.
    nodes: AtomicU32,
    pub(crate) caches: MetaPool,
    pub(crate) descriptors: MetaPool,
    pub(crate) words: MetaPool,
    /// Counts requests that go to all nodes in turn.
    pub(crate) turns: AtomicU64,
    /// The pointers of mapped memory as far as looked up, for `Check`: the first, and the end. Each moves outwards only.
    pub(crate) mapped_first: AtomicUsize,
    pub(crate) mapped_end: AtomicUsize,
    pub(crate) arrays: [MetaPool; ARRAY_POOLS],
    pub(crate) registry: Lock<Registry<P::Lock>, P::Lock>,
    /// Counts requests to drain; each CPU's head notes the last it has answered.
    pub(crate) drain: AtomicU64,
    /// Frames of heads and rows.
    pub(crate) own_frames: AtomicU64,
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
                nodes: AtomicU32::new(1),
                caches: MetaPool::new(size_of::<RawCache<P::Lock>>().next_multiple_of(64)),
                descriptors: MetaPool::new(size_of::<Slab>().next_multiple_of(16)),
                words: MetaPool::new(size_of::<MoreWords>().next_multiple_of(16)),
                turns: AtomicU64::new(0),
                mapped_first: AtomicUsize::new(usize::MAX),
                mapped_end: AtomicUsize::new(0),
                arrays: [
                    MetaPool::new(Array::bytes(8).next_multiple_of(16)),
                    MetaPool::new(Array::bytes(16).next_multiple_of(16)),
                    MetaPool::new(Array::bytes(32).next_multiple_of(16)),
                    MetaPool::new(Array::bytes(64).next_multiple_of(16)),
                    MetaPool::new(Array::bytes(SMALL_SLOTS).next_multiple_of(16)),
                    MetaPool::new(LARGEST),
                ],
                registry: Lock::new(Registry::new()),
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
        self.nodes
            .store(u32::from(node::count(platform)), Ordering::Relaxed);
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
                    features: P::Policy::FEATURES,
                };
                let memory = self.caches.alloc(platform)?.cast::<RawCache<P::Lock>>();
                if class == 0 {
                    token = memory.as_ptr().cast_const().cast();
                }
                let row = self.parts_of(platform, row.as_ptr());
                let cache = RawCache::new(setup, &row, class as u32, token);
                // SAFETY: the pool gives memory of this size and alignment that belongs to this call; so does the column.
                unsafe {
                    cache.write_nodes();
                    memory.write(cache);
                }
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

    /// How many nodes have depots.
    pub(crate) fn nodes(&self) -> u16 {
        self.nodes.load(Ordering::Relaxed) as u16
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

    /// Forgets the platform after a teardown.
    ///
    /// # Safety
    ///
    /// Called once after `release_own`; nobody uses the system.
    pub(crate) unsafe fn forget_platform(&self) {
        // SAFETY: the platform was written by `init`, and nobody uses it any more by contract.
        self.platform
            .with_mut(|place| unsafe { (*place).assume_init_drop() });
        // The next one's map may reach other memory, and this one's may go away.
        self.mapped_first.store(usize::MAX, Ordering::Relaxed);
        self.mapped_end.store(0, Ordering::Relaxed);
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
