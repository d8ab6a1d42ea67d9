//! Zones: runs of memory of one node that serve the same kinds of request.

pub(crate) mod bitmap;
pub(crate) mod bits;
pub(crate) mod core;
pub(crate) mod kind;
pub(crate) mod segment;

use kmem_hal::sync::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use kmem_hal::{Lock, NodeId, RawLock};

use self::core::Core;
use self::segment::Segment;
use crate::cpu_cache::{CACHED_ORDERS, order_limit};
use kind::ZoneKind;

/// A watermark's place in [`Zone::marks`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    Min = 0,
    Low = 1,
    High = 2,
}

/// One zone. What changes at every call is behind the lock; the counts beside it are copies for readers.
pub(crate) struct Zone<L> {
    pub node: NodeId,
    pub kind: ZoneKind,
    /// First frame number that the zone spans.
    pub start: u64,
    /// Frames that it spans, holes included.
    pub spanned: u64,
    /// Frames that are memory.
    pub present: u64,
    /// Frames that were ever given to the allocator.
    pub managed: AtomicU64,
    /// Its segments, ascending.
    pub segments: &'static [Segment],
    /// The types of its page blocks, written under the lock.
    pub types: &'static [AtomicU8],
    core: Lock<Core, L>,
    free: AtomicU64,
    free_cma: AtomicU64,
    /// Frames of the page blocks that are kept for high-order requests that cannot wait.
    high_atomic: AtomicU64,
    /// Frames by which the low and high watermarks are raised for a while.
    boost: AtomicU64,
    /// min, low, high in frames.
    pub marks: [AtomicU64; 3],
    /// Frames kept from requests that could also use a zone of kind i.
    pub protection: [AtomicU64; 5],
    /// How many CPUs share it: those that have arrays.
    cpus: AtomicU32,
    /// How many blocks of each type a CPU may cache, by order.
    pub limits: [AtomicU32; CACHED_ORDERS],
}

impl<L: RawLock> Zone<L> {
    pub fn new(
        node: NodeId,
        kind: ZoneKind,
        span: (u64, u64),
        present: u64,
        cpus: u32,
        core: Core,
    ) -> Self {
        Self {
            node,
            kind,
            start: span.0,
            spanned: span.1 - span.0,
            present,
            managed: AtomicU64::new(0),
            segments: core.segments,
            types: core.types,
            core: Lock::new(core),
            free: AtomicU64::new(0),
            free_cma: AtomicU64::new(0),
            high_atomic: AtomicU64::new(0),
            boost: AtomicU64::new(0),
            cpus: AtomicU32::new(cpus),
            marks: [const_zero(), const_zero(), const_zero()],
            protection: ::core::array::from_fn(|_| const_zero()),
            limits: ::core::array::from_fn(|_| AtomicU32::new(0)),
        }
    }

    /// Runs `f` under the lock.
    pub fn locked<R>(&self, f: impl FnOnce(&mut Core) -> R) -> R {
        let mut core = self.core.lock();
        self.run(&mut core, f)
    }

    /// Runs `f` under the lock if it can be taken within `tries` looks.
    pub fn try_locked<R>(&self, tries: u32, f: impl FnOnce(&mut Core) -> R) -> Option<R> {
        for _ in 0..tries {
            if let Some(mut core) = self.core.try_lock() {
                return Some(self.run(&mut core, f));
            }
            kmem_hal::sync::spin_loop();
        }
        None
    }

    fn run<R>(&self, core: &mut Core, f: impl FnOnce(&mut Core) -> R) -> R {
        let result = f(core);
        self.free.store(core.free, Ordering::Relaxed);
        self.free_cma.store(core.free_cma, Ordering::Relaxed);
        let kept = core.high_atomic * bits::BLOCK_FRAMES;
        self.high_atomic.store(kept, Ordering::Relaxed);
        if core.stolen > 0 {
            self.raise(::core::mem::take(&mut core.stolen));
        }
        result
    }

    /// Free frames, those in CPU caches apart.
    pub fn free(&self) -> u64 {
        self.free.load(Ordering::Relaxed)
    }

    /// Free frames that only movable requests may have.
    pub fn free_cma(&self) -> u64 {
        self.free_cma.load(Ordering::Relaxed)
    }

    /// Frames of the page blocks that are kept for high-order requests that cannot wait, free or not.
    pub fn high_atomic(&self) -> u64 {
        self.high_atomic.load(Ordering::Relaxed)
    }

    /// How many page blocks may be kept for them: 1 % of the zone, none of a small one or where watermarks are off.
    ///
    /// Source: Linux mm/page_alloc.c, `reserve_highatomic_pageblock`.
    pub fn most_high_atomic(&self) -> u64 {
        let share = self.managed() / 100;
        if share < bits::BLOCK_FRAMES || self.mark(Mark::Low) == 0 {
            0
        } else {
            share.div_ceil(bits::BLOCK_FRAMES)
        }
    }

    pub fn managed(&self) -> u64 {
        self.managed.load(Ordering::Relaxed)
    }

    /// Notes that `frames` frames more are the allocator's.
    pub fn add_managed(&self, frames: u64) {
        self.managed.fetch_add(frames, Ordering::Relaxed);
        self.set_limits();
    }

    /// Notes that `cpus` CPUs have arrays. The caller keeps others who change the limits away.
    pub fn share_among(&self, cpus: u32) {
        self.cpus.store(cpus, Ordering::Relaxed);
        self.set_limits();
    }

    fn set_limits(&self) {
        let (managed, cpus) = (self.managed(), self.cpus.load(Ordering::Relaxed));
        for (order, limit) in self.limits.iter().enumerate() {
            limit.store(order_limit(order, managed, cpus), Ordering::Relaxed);
        }
    }

    /// A watermark; the low and the high one with their boost.
    pub fn mark(&self, mark: Mark) -> u64 {
        let boost = if mark == Mark::Min { 0 } else { self.boost() };
        self.marks[mark as usize].load(Ordering::Relaxed) + boost
    }

    /// Frames by which the low and high watermarks are raised until reclaim has been told.
    pub fn boost(&self) -> u64 {
        self.boost.load(Ordering::Relaxed)
    }

    /// Raises the watermarks by a page block for each that changed its type, to 250 % of the high one at most: types mix where memory
    /// is short, so reclaim is to begin earlier.
    ///
    /// The min watermark stays, so that nothing is refused for it. Source: Linux mm/page_alloc.c, `boost_watermark`, and
    /// vm.watermark_boost_factor in Documentation/admin-guide/sysctl/vm.rst.
    #[cold]
    fn raise(&self, blocks: u64) {
        let most = self.marks[Mark::High as usize].load(Ordering::Relaxed) / 2 * 3;
        let boost = (self.boost() + blocks * bits::BLOCK_FRAMES).min(most);
        self.boost.store(boost, Ordering::Relaxed);
    }

    /// Reclaim has been told: the watermarks are what they were.
    pub fn calm(&self) {
        self.boost.store(0, Ordering::Relaxed);
    }

    /// How many frames may be taken before fewer than `mark` and the reserve for requests that could use `class` are left.
    ///
    /// Source: Linux mm/page_alloc.c, `__zone_watermark_ok`.
    pub fn spare(&self, mark: u64, class: ZoneKind, movable: bool) -> u64 {
        let lent = if movable { 0 } else { self.free_cma() };
        let reserve = self.protection[class as usize].load(Ordering::Relaxed);
        self.free()
            .saturating_sub(lent)
            .saturating_sub(mark + reserve)
    }

    /// One past the last frame number it spans.
    pub fn end(&self) -> u64 {
        self.start + self.spanned
    }
}

fn const_zero() -> AtomicU64 {
    AtomicU64::new(0)
}
