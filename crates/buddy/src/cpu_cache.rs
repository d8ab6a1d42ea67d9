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
//! Costs: 1.8 KiB a CPU and zone, half a KiB a CPU. A hit is some twenty instructions, none of them locked.

use kmem_hal::sync::{
    AtomicBool, AtomicU8, AtomicU64, LocalBool, LocalPtr, LocalU32, LocalU64, LocalUsize, Ordering,
    compiler_fence,
};

use crate::zone::bits::{BLOCK_FRAMES, BLOCK_ORDER};
use crate::zone::kind::MigrateType;
use crate::zone::segment::Segment;

/// Orders that have arrays.
pub(crate) const CLASS_ORDERS: [usize; CLASSES] = [0, 1, 2, 3, 9];
/// How many orders have arrays.
pub(crate) const CLASSES: usize = 5;
/// Migrate types that have arrays: unmovable, movable, reclaimable.
pub(crate) const CACHED_TYPES: usize = 3;
/// Slots of an array by class and type. Reclaimable memory is mostly slabs of caches, which have arrays of their own.
#[cfg(not(loom))]
const CAPACITY: [[u32; CACHED_TYPES]; CLASSES] = [
    [128, 128, 16],
    [32, 32, 8],
    [16, 16, 8],
    [16, 16, 4],
    [2, 2, 2],
];
/// Small enough for a model.
#[cfg(loom)]
const CAPACITY: [[u32; CACHED_TYPES]; CLASSES] = [[2; CACHED_TYPES]; CLASSES];
const STACKS: usize = CLASSES * CACHED_TYPES;
const SLOTS: usize = STARTS[STACKS] as usize;
/// Where an array's slots begin; one more than there are arrays.
const STARTS: [u32; STACKS + 1] = {
    let mut starts = [0; STACKS + 1];
    let mut stack = 0;
    while stack < STACKS {
        starts[stack + 1] = starts[stack] + capacity(stack);
        stack += 1;
    }
    starts
};
/// Blocks that nested calls may leave behind.
#[cfg(not(loom))]
const PENDING: usize = 32;
#[cfg(loom)]
const PENDING: usize = 2;
/// The largest number of blocks that move at once.
pub(crate) const MAX_BATCH: usize = CAPACITY[0][0] as usize / 2;

/// How many slots an array has.
pub(crate) const fn capacity(stack: usize) -> u32 {
    CAPACITY[stack / CACHED_TYPES][stack % CACHED_TYPES]
}

/// The class of orders that have none: no array has its numbers.
const NO_CLASS: usize = CLASSES;
/// The first array's number by order: no branch on a hit.
const FIRST_STACK: [u8; 64] = {
    let mut first = [(NO_CLASS * CACHED_TYPES) as u8; 64];
    let mut class = 0;
    while class < CLASSES {
        first[CLASS_ORDERS[class]] = (class * CACHED_TYPES) as u8;
        class += 1;
    }
    first
};

/// The first of the arrays of an order: the unmovable one.
#[inline(always)]
const fn first_stack(order: usize) -> usize {
    FIRST_STACK[order % FIRST_STACK.len()] as usize
}

/// The class of an order, if it has one.
#[inline]
pub(crate) const fn class_of(order: usize) -> Option<usize> {
    match order {
        0..=3 => Some(order),
        9 => Some(4),
        _ => None,
    }
}

/// How many blocks of a class a CPU may hold in a zone of `managed` frames: 1/120 of it at most.
pub(crate) const fn class_limit(class: usize, managed: u64) -> u32 {
    let share = ((managed + managed / 16) >> 7) >> CLASS_ORDERS[class];
    if share < CAPACITY[class][0] as u64 {
        share as u32
    } else {
        CAPACITY[class][0]
    }
}

/// An array's number.
#[inline(always)]
pub(crate) const fn stack_of(class: usize, migrate: MigrateType) -> usize {
    class * CACHED_TYPES + migrate as usize
}

/// Where the entries of an array lie: `slots[bottom..top]`, the newest last, and `slots[top..end]` are room for more.
struct Head {
    top: LocalU32,
    end: LocalU32,
    bottom: u32,
}

/// The arrays of one CPU for one zone.
///
/// `A1`: array `s` has `bottom = STARTS[s] <= top <= end <= STARTS[s + 1]`.
#[repr(C, align(64))]
pub(crate) struct ZoneCache {
    /// The zone's first frame number.
    pub start: u64,
    heads: [Head; STACKS],
    slots: [LocalU32; SLOTS],
}

impl ZoneCache {
    pub fn new(start: u64) -> Self {
        Self {
            start,
            heads: core::array::from_fn(|stack| Head {
                top: LocalU32::new(STARTS[stack]),
                end: LocalU32::new(STARTS[stack]),
                bottom: STARTS[stack],
            }),
            slots: core::array::from_fn(|_| LocalU32::new(0)),
        }
    }

    /// The slots of an array.
    fn slots(&self, stack: usize) -> &[LocalU32] {
        &self.slots[STARTS[stack] as usize..STARTS[stack + 1] as usize]
    }

    /// Takes the newest entry.
    #[inline(always)]
    pub fn pop(&self, stack: usize) -> Option<u32> {
        let head = self.heads.get(stack)?;
        let top = head.top.get();
        if top == head.bottom {
            return None;
        }
        head.top.set(top - 1);
        // SAFETY: A1: top is above bottom and at most the number of slots.
        Some(unsafe { self.slots.get_unchecked(top as usize - 1) }.get())
    }

    /// Adds an entry; `false` where the array is at its limit.
    #[inline(always)]
    pub fn push(&self, stack: usize, entry: u32) -> bool {
        let Some(head) = self.heads.get(stack) else {
            return false;
        };
        let top = head.top.get();
        if top == head.end.get() {
            return false;
        }
        // SAFETY: A1: top is below end, which is at most the number of slots.
        unsafe { self.slots.get_unchecked(top as usize) }.set(entry);
        head.top.set(top + 1);
        true
    }

    /// Takes the newest entries that end at or below `limit` (in frames from the zone's start) as long as there are
    /// any and `most` is not reached, handing each to `give`; how many.
    #[inline]
    pub fn pop_batch(
        &self,
        stack: usize,
        frames: u64,
        limit: u64,
        most: usize,
        mut give: impl FnMut(u32),
    ) -> usize {
        let held = self.count(stack) as usize;
        let slots = &self.slots(stack)[..held];
        let mut taken = 0;
        for slot in slots.iter().rev().take(most) {
            let entry = slot.get();
            if u64::from(entry) + frames > limit {
                break;
            }
            give(entry);
            taken += 1;
        }
        self.set_count(stack, held - taken);
        taken
    }

    #[inline]
    pub fn count(&self, stack: usize) -> u32 {
        self.heads[stack].top.get() - STARTS[stack]
    }

    fn set_count(&self, stack: usize, count: usize) {
        self.heads[stack].top.set(STARTS[stack] + count as u32);
    }

    /// Sets how many entries the array may hold, which is at least what it holds.
    pub fn set_limit(&self, stack: usize, limit: u32) {
        let limit = limit.min(capacity(stack)).max(self.count(stack));
        self.heads[stack].end.set(STARTS[stack] + limit);
    }

    /// How many entries the array may hold.
    pub fn limit(&self, stack: usize) -> u32 {
        self.heads[stack].end.get() - STARTS[stack]
    }

    /// Begins to add up to `most` entries, as far as there is room.
    pub fn refill(&self, stack: usize, most: usize) -> Refill<'_> {
        let held = self.count(stack) as usize;
        let room = (self.limit(stack) as usize).saturating_sub(held).min(most);
        Refill {
            slots: &self.slots(stack)[held..held + room],
            added: 0,
            head: &self.heads[stack],
        }
    }

    /// Takes the oldest `out.len()` entries, which it has.
    pub fn take_oldest(&self, stack: usize, out: &mut [u32]) {
        let count = self.count(stack) as usize;
        let slots = &self.slots(stack)[..count];
        for (entry, slot) in out.iter_mut().zip(slots) {
            *entry = slot.get();
        }
        let taken = out.len().min(count);
        for at in taken..count {
            slots[at - taken].set(slots[at].get());
        }
        self.set_count(stack, count - taken);
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

/// Entries on their way into an array: given ascending, so that the lowest is the newest in the end.
///
/// They are written from the end of the room downwards, and moved where fewer came than there was room for.
pub(crate) struct Refill<'a> {
    slots: &'a [LocalU32],
    added: usize,
    head: &'a Head,
}

impl Refill<'_> {
    /// How many more entries fit.
    #[inline]
    pub fn room(&self) -> usize {
        self.slots.len() - self.added
    }

    /// Adds `count` entries, `step` apart; those that do not fit are left out.
    #[inline]
    pub fn push(&mut self, first: u32, count: usize, step: u32) {
        let room = self.room();
        let count = count.min(room);
        let mut entry = first;
        for slot in self.slots[room - count..room].iter().rev() {
            slot.set(entry);
            entry = entry.wrapping_add(step);
        }
        self.added += count;
    }
}

impl Drop for Refill<'_> {
    fn drop(&mut self) {
        let room = self.room();
        if room > 0 {
            for at in 0..self.added {
                self.slots[at].set(self.slots[room + at].get());
            }
        }
        let top = &self.head.top;
        top.set(top.get() + self.added as u32);
    }
}

/// What belongs to one CPU.
///
/// ```text
///   window     the whole page blocks of one segment, where frees go without a search
///     first    number of the first block's first frame        blocks   how many
///     types    their migrate types                            cache    the arrays of their zone
/// ```
///
/// `W1`: the words of the window are written together by a call that has the arrays (`I1`), and read by such calls only; `types`
/// points at `blocks` bytes, one for each page block from `first` on, each of them wholly in one segment of the zone of `cache`.
#[repr(C)]
pub(crate) struct CpuArea {
    busy: LocalBool,
    holding: LocalBool,
    pending_any: AtomicBool,
    /// The type of the block that was freed last: less than `CACHED_TYPES`.
    window_type: LocalU32,
    /// The arrays of the zone that served last, by migrate type.
    current: [LocalPtr<ZoneCache>; CACHED_TYPES],
    window_first: LocalU64,
    window_blocks: LocalUsize,
    window_types: LocalPtr<AtomicU8>,
    window_cache: LocalPtr<ZoneCache>,
    /// The segment that was used last; null before the first use.
    last_segment: LocalPtr<Segment>,
    pub node: LocalU32,
    /// Where interleaved requests go next.
    pub interleave: LocalU32,
    /// Calls that had to leave the arrays alone.
    pub nested: LocalU64,
    pending: [AtomicU64; PENDING],
    pub caches: &'static [ZoneCache],
}

impl CpuArea {
    pub fn new(
        node: u32,
        caches: &'static [ZoneCache],
        first: [Option<&'static ZoneCache>; CACHED_TYPES],
    ) -> Self {
        let null = || LocalPtr::new(core::ptr::null_mut());
        let current = |cache: Option<&'static ZoneCache>| {
            LocalPtr::new(cache.map_or(core::ptr::null_mut(), |cache| {
                core::ptr::from_ref(cache).cast_mut()
            }))
        };
        Self {
            busy: LocalBool::new(false),
            holding: LocalBool::new(false),
            pending_any: AtomicBool::new(false),
            window_type: LocalU32::new(0),
            node: LocalU32::new(node),
            current: first.map(current),
            window_first: LocalU64::new(0),
            window_blocks: LocalUsize::new(0),
            window_types: LocalPtr::new(core::ptr::null_mut()),
            window_cache: null(),
            last_segment: LocalPtr::new(core::ptr::null_mut()),
            interleave: LocalU32::new(0),
            nested: LocalU64::new(0),
            pending: core::array::from_fn(|_| AtomicU64::new(0)),
            caches,
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
            return None;
        }
        self.busy.set(true);
        compiler_fence(Ordering::SeqCst);
        Some(Arrays { area: self })
    }

    /// The same for slow paths, which count those that were kept out.
    pub fn enter_or_note(&self) -> Option<Arrays<'_>> {
        let arrays = self.enter();
        if arrays.is_none() {
            self.nested.set(self.nested.get() + 1);
        }
        arrays
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
    /// Takes a block from the zone that served the type last.
    #[inline(always)]
    pub fn pop(&self, order: usize, migrate: MigrateType) -> Option<u64> {
        let current = self.area.current.get(migrate as usize)?;
        // SAFETY: null, or from a `&'static ZoneCache` in `new` or `serve_from`.
        let cache = unsafe { current.get().as_ref() }?;
        let entry = cache.pop(first_stack(order) + migrate as usize)?;
        Some(cache.start + u64::from(entry))
    }

    /// Takes up to `out.len()` blocks from the zone that served the type last; how many.
    #[inline]
    pub fn pop_some(&self, order: usize, migrate: MigrateType, out: &mut [u64]) -> usize {
        let Some(current) = self.area.current.get(migrate as usize) else {
            return 0;
        };
        // SAFETY: as in `pop`.
        let Some(cache) = (unsafe { current.get().as_ref() }) else {
            return 0;
        };
        let stack = first_stack(order) + migrate as usize;
        if stack >= STACKS {
            return 0;
        }
        let held = cache.count(stack) as usize;
        let taken = held.min(out.len());
        let slots = &cache.slots(stack)[held - taken..held];
        for (place, slot) in out.iter_mut().zip(slots.iter().rev()) {
            *place = cache.start + u64::from(slot.get());
        }
        cache.set_count(stack, held - taken);
        taken
    }

    /// Notes which zone served a type.
    pub fn serve_from(&self, migrate: MigrateType, cache: &'static ZoneCache) {
        if let Some(current) = self.area.current.get(migrate as usize) {
            current.set(core::ptr::from_ref(cache).cast_mut());
        }
    }

    /// Puts a block of the window into the array that it belongs to; `false` where it is none of the window, its type is not that
    /// of the last block, or the array is full.
    ///
    /// The type is guessed to be the last one and then checked, so that the processor need not wait for the block's type before
    /// it looks at the array: the array's address would otherwise hang on two loads that hang on the frame's number.
    #[inline(always)]
    pub fn push(&self, first: u64, order: usize) -> bool {
        let area = self.area;
        let guess = area.window_type.get();
        let block = first.wrapping_sub(area.window_first.get()) >> BLOCK_ORDER;
        if block >= area.window_blocks.get() as u64 {
            return false;
        }
        if first & ((1 << order) - 1) != 0 {
            return false;
        }
        // SAFETY: W1: the block is one of the window's, which has as many types.
        let migrate =
            unsafe { (*area.window_types.get().add(block as usize)).load(Ordering::Relaxed) };
        if u32::from(migrate) != guess {
            return false;
        }
        // SAFETY: W1: the window is not empty, so this came from a `&'static ZoneCache` in `look_at`.
        let cache = unsafe { &*area.window_cache.get() };
        cache.push(
            first_stack(order) + guess as usize,
            (first - cache.start) as u32,
        )
    }

    /// Guesses the type of the block that holds a frame from now on, where that is one of the window's.
    pub fn guess_for(&self, first: u64) {
        let area = self.area;
        let block = first.wrapping_sub(area.window_first.get()) >> BLOCK_ORDER;
        if block < area.window_blocks.get() as u64 {
            // SAFETY: W1: the block is one of the window's, which has as many types.
            let migrate = unsafe { &*area.window_types.get().add(block as usize) };
            let migrate = migrate.load(Ordering::Relaxed);
            // Types without arrays, and blocks that are in part not the allocator's, are greater.
            if usize::from(migrate) < CACHED_TYPES {
                area.window_type.set(u32::from(migrate));
            }
        }
    }

    /// Makes the whole page blocks of a segment the window, and a type that has arrays the guess.
    pub fn look_at(&self, segment: &'static Segment, cache: &'static ZoneCache, migrate: usize) {
        let area = self.area;
        area.window_type.set(migrate as u32);
        let first = segment.first.next_multiple_of(BLOCK_FRAMES);
        let end = segment.end & !(BLOCK_FRAMES - 1);
        if first >= end {
            return;
        }
        let blocks = ((end - first) >> BLOCK_ORDER) as usize;
        let at = segment.block_of(first);
        let Some(types) = segment.types.get(at..at + blocks) else {
            return;
        };
        area.window_first.set(first);
        area.window_blocks.set(blocks);
        area.window_types.set(types.as_ptr().cast_mut());
        area.window_cache.set(core::ptr::from_ref(cache).cast_mut());
    }

    #[inline(always)]
    pub fn zone(&self, zone: usize) -> Option<&'static ZoneCache> {
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
        assert!(
            area.enter_or_note().is_none(),
            "two calls have one CPU's arrays"
        );
        assert!(
            area.enter_or_note().is_none(),
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
            assert_eq!(count, capacity(stack));
            assert_eq!(stack / CACHED_TYPES, class);
        }
        let total: u64 = ZoneCache::stacks()
            .map(|(stack, order)| u64::from(capacity(stack)) << order)
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
            let most = capacity(stack);
            let expected: Vec<u32> = (2..most).rev().collect();
            assert_eq!(rest, expected);
            assert_eq!(cache.pop(stack), None);
            let mut refill = cache.refill(stack, 100);
            let room = refill.room() as u32;
            refill.push(0, room as usize - 1, 1);
            refill.push(room - 1, 7, 1);
            drop(refill);
            assert_eq!(cache.count(stack), most.min(100));
            let mut popped = Vec::new();
            assert_eq!(
                cache.pop_batch(stack, 1, 1, 100, |entry| popped.push(entry)),
                1
            );
            let rest = cache.pop_batch(stack, 1, 100, 100, |entry| popped.push(entry));
            assert_eq!(rest as u32 + 1, most.min(100));
            assert!(popped.is_sorted(), "the lowest is the newest");
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
