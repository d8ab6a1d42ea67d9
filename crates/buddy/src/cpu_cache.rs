//! What each CPU keeps for itself: small arrays of free blocks, reached without a locked instruction.
//!
//! ```text
//!   CpuArea (one a CPU)                  ZoneCache (one a CPU and zone)
//!     busy      a call is in the arrays    count[class][type]   limit
//!     holding   a call has a zone lock     slots   [ o0 unmovable | o0 movable | .. | o9 ]
//!     pending   blocks freed by nested calls that could not get the lock
//! ```
//!
//! A hit pops or pushes a 32-bit number: the frame's distance from the zone's start. Half an array moves from or to the
//! zone under one lock.
//!
//! Invariants (with hal's `C2`: only contexts that finish first interrupt the owner)
//! - `I1`: arrays are read and written only by the pinned owner, between setting and clearing `busy`. A nested call that
//!   finds `busy` set leaves them alone and goes to the zone.
//! - `I2`: a nested call that finds `holding` set never spins: it tries the lock, and if that fails it refuses an
//!   allocation or leaves a freed block in `pending`, which the interrupted call empties before it returns.
//! - `I3`: blocks in arrays are allocated as far as the zone knows.
//!
//! Costs: 2.4 KiB a CPU and zone. A hit is about ten instructions and no fence the processor sees.

use kmem_hal::sync::{
    AtomicBool, AtomicU64, LocalBool, LocalPtr, LocalU32, LocalU64, Ordering, compiler_fence,
};

use crate::zone::kind::MigrateType;
use crate::zone::segment::Segment;

/// Orders that have arrays.
pub(crate) const CLASS_ORDERS: [usize; CLASSES] = [0, 1, 2, 3, 9];
/// How many orders have arrays.
pub(crate) const CLASSES: usize = 5;
/// Migrate types that have arrays: unmovable, movable, reclaimable.
pub(crate) const CACHED_TYPES: usize = 3;
/// Slots of an array by class.
#[cfg(not(loom))]
const CAPACITY: [u32; CLASSES] = [128, 32, 16, 16, 2];
/// Small enough for a model.
#[cfg(loom)]
const CAPACITY: [u32; CLASSES] = [2, 2, 2, 2, 2];
const STACKS: usize = CLASSES * CACHED_TYPES;
const SLOTS: usize = {
    let mut sum = 0;
    let mut class = 0;
    while class < CLASSES {
        sum += CAPACITY[class] as usize * CACHED_TYPES;
        class += 1;
    }
    sum
};
const STARTS: [usize; STACKS] = {
    let mut starts = [0; STACKS];
    let mut next = 0;
    let mut stack = 0;
    while stack < STACKS {
        starts[stack] = next;
        next += CAPACITY[stack / CACHED_TYPES] as usize;
        stack += 1;
    }
    starts
};
/// Blocks that nested calls may leave behind.
#[cfg(not(loom))]
const PENDING: usize = 64;
#[cfg(loom)]
const PENDING: usize = 2;
/// The largest number of blocks that move at once.
pub(crate) const MAX_BATCH: usize = CAPACITY[0] as usize / 2;

/// The class of an order, if it has one.
#[inline]
pub(crate) const fn class_of(order: usize) -> Option<usize> {
    match order {
        0..=3 => Some(order),
        9 => Some(4),
        _ => None,
    }
}

/// How many blocks of a class a CPU may hold in a zone of `managed` frames: 1/128 of it at most.
pub(crate) const fn class_limit(class: usize, managed: u64) -> u32 {
    let share = (managed >> 7) >> CLASS_ORDERS[class];
    if share < 2 {
        0
    } else if share < CAPACITY[class] as u64 {
        share as u32
    } else {
        CAPACITY[class]
    }
}

/// An array's number.
#[inline]
pub(crate) const fn stack_of(class: usize, migrate: MigrateType) -> usize {
    class * CACHED_TYPES + migrate as usize
}

/// The arrays of one CPU for one zone.
#[repr(C, align(64))]
pub(crate) struct ZoneCache {
    /// The zone's first frame number.
    pub start: u64,
    counts: [LocalU32; STACKS],
    limits: [LocalU32; STACKS],
    slots: [LocalU32; SLOTS],
}

impl ZoneCache {
    pub fn new(start: u64) -> Self {
        Self {
            start,
            counts: core::array::from_fn(|_| LocalU32::new(0)),
            limits: core::array::from_fn(|_| LocalU32::new(0)),
            slots: core::array::from_fn(|_| LocalU32::new(0)),
        }
    }

    /// Takes the newest entry.
    #[inline]
    pub fn pop(&self, stack: usize) -> Option<u32> {
        let count = self.counts[stack].get().checked_sub(1)?;
        let slot = self.slots.get(STARTS[stack] + count as usize)?;
        self.counts[stack].set(count);
        Some(slot.get())
    }

    /// The newest entry.
    #[inline]
    pub fn peek(&self, stack: usize) -> Option<u32> {
        let count = self.counts[stack].get().checked_sub(1)?;
        Some(self.slots.get(STARTS[stack] + count as usize)?.get())
    }

    /// Adds an entry; `false` where the array is at its limit.
    #[inline]
    pub fn push(&self, stack: usize, entry: u32) -> bool {
        let count = self.counts[stack].get();
        if count >= self.limits[stack].get() {
            return false;
        }
        let Some(slot) = self.slots.get(STARTS[stack] + count as usize) else {
            return false;
        };
        slot.set(entry);
        self.counts[stack].set(count + 1);
        true
    }

    pub fn count(&self, stack: usize) -> u32 {
        self.counts[stack].get()
    }

    /// Sets how many entries the array may hold, which is at least what it holds.
    pub fn set_limit(&self, stack: usize, limit: u32) {
        let limit = limit.min(CAPACITY[stack / CACHED_TYPES]);
        self.limits[stack].set(limit.max(self.count(stack)));
    }

    /// Takes the oldest `out.len()` entries, which it has.
    pub fn take_oldest(&self, stack: usize, out: &mut [u32]) {
        let count = self.counts[stack].get() as usize;
        let slots = &self.slots[STARTS[stack]..STARTS[stack] + count];
        for (entry, slot) in out.iter_mut().zip(slots) {
            *entry = slot.get();
        }
        let taken = out.len().min(count);
        for at in taken..count {
            slots[at - taken].set(slots[at].get());
        }
        self.counts[stack].set((count - taken) as u32);
    }

    /// Frames in all arrays.
    pub fn frames(&self) -> u64 {
        (0..STACKS)
            .map(|stack| u64::from(self.count(stack)) << CLASS_ORDERS[stack / CACHED_TYPES])
            .sum()
    }

    /// Arrays with their order.
    pub fn stacks() -> impl Iterator<Item = (usize, usize)> {
        (0..STACKS).map(|stack| (stack, CLASS_ORDERS[stack / CACHED_TYPES]))
    }
}

/// What belongs to one CPU.
pub(crate) struct CpuArea {
    busy: LocalBool,
    holding: LocalBool,
    pub node: LocalU32,
    /// The segment that was used last; null before the first use.
    last_segment: LocalPtr<Segment>,
    /// Where interleaved requests go next.
    pub interleave: LocalU32,
    /// Calls that had to leave the arrays alone.
    pub nested: LocalU64,
    pending_any: AtomicBool,
    pending: [AtomicU64; PENDING],
    pub caches: &'static [ZoneCache],
    /// The arrays of the zone that is asked first, by migrate type.
    first: [Option<&'static ZoneCache>; CACHED_TYPES],
}

impl CpuArea {
    pub fn new(
        node: u32,
        caches: &'static [ZoneCache],
        first: [Option<&'static ZoneCache>; CACHED_TYPES],
    ) -> Self {
        Self {
            busy: LocalBool::new(false),
            holding: LocalBool::new(false),
            node: LocalU32::new(node),
            last_segment: LocalPtr::new(core::ptr::null_mut()),
            interleave: LocalU32::new(0),
            nested: LocalU64::new(0),
            pending_any: AtomicBool::new(false),
            pending: core::array::from_fn(|_| AtomicU64::new(0)),
            caches,
            first,
        }
    }

    /// The segment that was used last.
    #[inline(always)]
    pub fn last_segment(&self) -> Option<&'static Segment> {
        // SAFETY: null, or from a `&'static Segment` in `set_last_segment`.
        unsafe { self.last_segment.get().as_ref() }
    }

    pub fn set_last_segment(&self, segment: &'static Segment) {
        self.last_segment
            .set(core::ptr::from_ref(segment).cast_mut());
    }

    /// Makes the arrays the caller's (`I1`); `None` where the caller interrupted their user.
    ///
    /// The caller is pinned to this CPU for as long as the value lives.
    #[inline(always)]
    pub fn enter(&self) -> Option<Arrays<'_>> {
        if self.busy.get() {
            self.nested.set(self.nested.get() + 1);
            return None;
        }
        self.busy.set(true);
        compiler_fence(Ordering::SeqCst);
        Some(Arrays { area: self })
    }

    /// Whether this CPU is inside a zone lock, or about to be.
    pub fn is_holding(&self) -> bool {
        self.holding.get()
    }

    /// Notes whether this CPU is inside a zone lock.
    pub fn set_holding(&self, holding: bool) {
        compiler_fence(Ordering::SeqCst);
        self.holding.set(holding);
        compiler_fence(Ordering::SeqCst);
    }

    /// Leaves a block for the interrupted call (`I2`); `false` where there is no room.
    pub fn leave_pending(&self, first: u64, order: usize) -> bool {
        let entry = first << 8 | (order as u64) << 1 | 1;
        let left = self.pending.iter().any(|slot| {
            slot.compare_exchange(0, entry, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        });
        self.pending_any.store(true, Ordering::Release);
        left
    }

    /// Whether nested calls left blocks.
    #[inline]
    pub fn has_pending(&self) -> bool {
        self.pending_any.load(Ordering::Relaxed)
    }

    /// Takes what nested calls left: first frame and order.
    pub fn take_pending(&self, mut give: impl FnMut(u64, usize)) {
        self.pending_any.store(false, Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
        for slot in &self.pending {
            let entry = slot.swap(0, Ordering::AcqRel);
            if entry != 0 {
                give(entry >> 8, (entry >> 1 & 0x7f) as usize);
            }
        }
    }
}

/// The right to use a CPU's arrays.
pub(crate) struct Arrays<'a> {
    area: &'a CpuArea,
}

impl Arrays<'_> {
    /// The arrays of the zone that requests of a type ask first.
    #[inline(always)]
    pub fn first(&self, migrate: MigrateType) -> Option<&ZoneCache> {
        *self.area.first.get(migrate as usize)?
    }

    #[inline(always)]
    pub fn zone(&self, zone: usize) -> Option<&ZoneCache> {
        self.area.caches.get(zone)
    }
}

impl Drop for Arrays<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        compiler_fence(Ordering::SeqCst);
        self.area.busy.set(false);
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    extern crate std;
    use std::boxed::Box;
    use std::vec::Vec;

    use super::*;

    #[test]
    fn a_nested_call_is_kept_out_of_the_arrays() {
        let area = CpuArea::new(0, &[], [None; 3]);
        let outer = area.enter().unwrap();
        assert!(area.enter().is_none(), "two calls have one CPU's arrays");
        assert!(
            area.enter().is_none(),
            "a refused call lets the next one in"
        );
        drop(outer);
        assert!(area.enter().is_some());
        assert_eq!(area.nested.get(), 2);
    }

    #[test]
    fn arrays_keep_order_and_bounds() {
        let caches: &'static [ZoneCache] = Box::leak(Box::new([ZoneCache::new(0)]));
        let cache = &caches[0];
        for (stack, order) in ZoneCache::stacks() {
            let class = class_of(order).unwrap();
            assert!(!cache.push(stack, 1), "no limit was set yet");
            cache.set_limit(stack, u32::MAX);
            let mut count = 0;
            while cache.push(stack, (stack as u32) << 16 | count) {
                count += 1;
            }
            assert_eq!(count, CAPACITY[class]);
            assert_eq!(stack / CACHED_TYPES, class);
        }
        let total: u64 = (0..CLASSES)
            .map(|class| (3 * u64::from(CAPACITY[class])) << CLASS_ORDERS[class])
            .sum();
        assert_eq!(cache.frames(), total);
        for (stack, _) in ZoneCache::stacks() {
            let mut oldest = [0; 2];
            cache.take_oldest(stack, &mut oldest);
            assert_eq!(oldest, [(stack as u32) << 16, (stack as u32) << 16 | 1]);
            let mut rest = Vec::new();
            while let Some(entry) = cache.pop(stack) {
                rest.push(entry & 0xffff);
            }
            let expected: Vec<u32> = (2..CAPACITY[stack / CACHED_TYPES]).rev().collect();
            assert_eq!(rest, expected);
            assert_eq!(cache.pop(stack), None);
        }
    }

    #[test]
    fn pending_blocks_wait_until_they_are_taken() {
        let area = CpuArea::new(0, &[], [None; 3]);
        for first in 0..PENDING as u64 {
            assert!(area.leave_pending(first << 3, 3));
        }
        assert!(!area.leave_pending(1 << 20, 0), "there is no room for more");
        assert!(area.has_pending());
        let mut seen = Vec::new();
        area.take_pending(|first, order| seen.push((first, order)));
        assert_eq!(
            seen,
            (0..PENDING as u64).map(|n| (n << 3, 3)).collect::<Vec<_>>()
        );
        assert!(!area.has_pending());
    }
}
