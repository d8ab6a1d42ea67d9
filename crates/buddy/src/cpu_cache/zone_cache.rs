//! The arrays of one CPU for one zone: free blocks by order and migrate type, as 32-bit distances from the zone's start.
//!
//! ```text
//!   heads [order][type]    bottom .. top    the entries, the newest last
//!                          top .. end       room for more
//!   slots   [ o0 unmovable | o0 movable | o0 reclaimable | o1 .. | o9 ]
//! ```
//!
//! Half an array moves from or to the zone under one lock; a whole one where the same array moved the same way last time. Arrays of
//! orders 4 to 6 are filled by frees alone.
//!
//! Invariant `A1`: array `s` has `bottom = STARTS[s] <= top <= end <= STARTS[s + 1]`.
//!
//! Costs: 3.2 KiB.

use core::mem::MaybeUninit;

use kmem_hal::sync::LocalU32;

/// Orders are counted up to the largest that has arrays.
pub(crate) const CACHED_ORDERS: usize = 10;
/// Migrate types that have arrays: unmovable, movable, reclaimable.
pub(crate) const CACHED_TYPES: usize = 3;
/// Slots of an array by order and type. Reclaimable memory is mostly slabs of caches, which have arrays of their own. What is freed of
/// orders 7 and 8 is seen by the zone at once: two such blocks make a page block whole again.
#[cfg(not(loom))]
const CAPACITY: [[u32; CACHED_TYPES]; CACHED_ORDERS] = [
    [128, 128, 16],
    [96, 96, 8],
    [64, 64, 8],
    [32, 32, 4],
    [16, 16, 4],
    [8, 8, 2],
    [4, 4, 2],
    [0; 3],
    [0; 3],
    [4, 4, 2],
];
/// Small enough for a model.
#[cfg(loom)]
const CAPACITY: [[u32; CACHED_TYPES]; CACHED_ORDERS] = [
    [2; 3], [2; 3], [2; 3], [2; 3], [0; 3], [0; 3], [0; 3], [0; 3], [0; 3], [2; 3],
];
const STACKS: usize = CACHED_ORDERS * CACHED_TYPES;
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
/// The largest number of blocks that move at once.
pub(crate) const MAX_BATCH: usize = CAPACITY[0][0] as usize;

/// How many slots an array has.
pub(crate) const fn capacity(stack: usize) -> u32 {
    CAPACITY[stack / CACHED_TYPES][stack % CACHED_TYPES]
}

/// Whether blocks of an order are kept in arrays.
#[inline(always)]
pub(crate) const fn is_cached(order: usize) -> bool {
    matches!(order, 0..=6 | 9)
}

/// Whether more blocks of an order are fetched than a request needs. Arrays of others are filled by frees alone, so that no long run
/// is broken up for blocks that nobody asked for.
pub(crate) const fn is_fetched_ahead(order: usize) -> bool {
    matches!(order, 0..=3 | 9)
}

/// How many blocks of an order one of `cpus` CPUs may hold in a zone of `managed` frames: 1/120 of it at most, and less than that
/// where many CPUs share it.
pub(crate) const fn order_limit(order: usize, managed: u64, cpus: u32) -> u32 {
    let sharers = if cpus < 4 { 1 } else { cpus as u64 / 2 };
    let share = (((managed + managed / 16) >> 7) / sharers) >> order;
    if share < CAPACITY[order][0] as u64 {
        share as u32
    } else {
        CAPACITY[order][0]
    }
}

/// An array's number; none has that of an order without arrays.
#[inline(always)]
pub(crate) const fn stack_of(order: usize, migrate: usize) -> usize {
    order * CACHED_TYPES + migrate
}

/// Where the entries of an array lie: `slots[bottom..top]`, the newest last, and `slots[top..end]` are room for more. The bottom is that
/// of [`STARTS`].
struct Head {
    top: LocalU32,
    end: LocalU32,
}

/// The arrays of one CPU for one zone.
#[repr(C)]
pub(crate) struct ZoneCache {
    /// The zone's first frame number.
    pub start: u64,
    heads: [Head; STACKS],
    slots: [LocalU32; SLOTS],
}

impl ZoneCache {
    /// Empty arrays, written where they are to be: they are too large for the stack of whoever brings a CPU up.
    pub fn build(place: &mut MaybeUninit<Self>, start: u64) {
        let cache = place.as_mut_ptr();
        // SAFETY: every field is written, each in its place, which `place` owns.
        unsafe {
            (&raw mut (*cache).start).write(start);
            for (stack, &bottom) in STARTS.iter().take(STACKS).enumerate() {
                (&raw mut (*cache).heads[stack]).write(Head {
                    top: LocalU32::new(bottom),
                    end: LocalU32::new(bottom),
                });
            }
            for slot in 0..SLOTS {
                (&raw mut (*cache).slots[slot]).write(LocalU32::new(0));
            }
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
        if top == STARTS[stack] {
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

    /// Takes the newest entries, in frame numbers, as far as they and `out` go; how many.
    #[inline]
    pub fn pop_newest(&self, stack: usize, out: &mut [u64]) -> usize {
        if stack >= STACKS {
            return 0;
        }
        let held = self.count(stack) as usize;
        let taken = held.min(out.len());
        let slots = &self.slots(stack)[held - taken..held];
        for (place, slot) in out.iter_mut().zip(slots.iter().rev()) {
            *place = self.start + u64::from(slot.get());
        }
        self.set_count(stack, held - taken);
        taken
    }

    /// Adds entries as long as `next` gives some and there is room; how many.
    #[inline]
    pub fn push_while(&self, stack: usize, mut next: impl FnMut() -> Option<u32>) -> usize {
        if stack >= STACKS {
            return 0;
        }
        let (held, limit) = (self.count(stack) as usize, self.limit(stack) as usize);
        let mut added = 0;
        for slot in &self.slots(stack)[held..limit] {
            let Some(entry) = next() else { break };
            slot.set(entry);
            added += 1;
        }
        self.set_count(stack, held + added);
        added
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

    /// The oldest `count` entries, or all.
    pub fn oldest(&self, stack: usize, count: usize) -> &[LocalU32] {
        &self.slots(stack)[..count.min(self.count(stack) as usize)]
    }

    /// Removes the oldest `taken` entries, which it has.
    pub fn remove_oldest(&self, stack: usize, taken: usize) {
        let count = self.count(stack) as usize;
        let slots = &self.slots(stack)[..count];
        for at in taken..count {
            slots[at - taken].set(slots[at].get());
        }
        self.set_count(stack, count - taken);
    }

    /// Frames in all arrays.
    pub fn frames(&self) -> u64 {
        (0..STACKS)
            .map(|stack| u64::from(self.count(stack)) << (stack / CACHED_TYPES))
            .sum()
    }

    /// Arrays with their order.
    pub fn stacks() -> impl Iterator<Item = (usize, usize)> {
        (0..STACKS)
            .map(|stack| (stack, stack / CACHED_TYPES))
            .filter(|&(_, order)| is_cached(order))
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
        let mut write = |slots: &[LocalU32]| {
            for slot in slots.iter().rev() {
                slot.set(entry);
                entry = entry.wrapping_add(step);
            }
        };
        // Several in each turn of the loop: compilers do not do that with atomics by themselves.
        let (rest, chunks) = self.slots[room - count..room].as_rchunks::<8>();
        chunks.iter().rev().for_each(|chunk| write(chunk));
        write(rest);
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

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    extern crate std;
    use std::boxed::Box;
    use std::vec::Vec;

    use super::*;

    #[test]
    fn arrays_keep_order_and_bounds() {
        let caches: &'static [ZoneCache] = Box::leak(Box::new([{
            let mut place = MaybeUninit::uninit();
            ZoneCache::build(&mut place, 0);
            // SAFETY: `build` wrote all of it.
            unsafe { place.assume_init() }
        }]));
        let cache = &caches[0];
        for (stack, order) in ZoneCache::stacks() {
            assert!(!cache.push(stack, 1), "no limit was set yet");
            if capacity(stack) == 0 {
                continue;
            }
            cache.set_limit(stack, u32::MAX);
            let mut count = 0;
            while cache.push(stack, (stack as u32) << 16 | count) {
                count += 1;
            }
            assert_eq!(count, capacity(stack));
            assert_eq!(stack / CACHED_TYPES, order);
        }
        let total: u64 = ZoneCache::stacks()
            .map(|(stack, order)| u64::from(capacity(stack)) << order)
            .sum();
        assert_eq!(cache.frames(), total);
        for (stack, _) in ZoneCache::stacks().filter(|&(stack, _)| capacity(stack) > 0) {
            let oldest: Vec<u32> = cache.oldest(stack, 2).iter().map(LocalU32::get).collect();
            assert_eq!(oldest, [(stack as u32) << 16, (stack as u32) << 16 | 1]);
            cache.remove_oldest(stack, 2);
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
    fn many_cpus_share_a_zone() {
        assert_eq!(order_limit(0, 1 << 18, 2), 128);
        assert_eq!(order_limit(9, 1 << 18, 2), 4);
        assert_eq!(
            order_limit(9, 1 << 18, 64),
            0,
            "64 CPUs do not keep 4 MiB each of 1 GiB"
        );
        assert_eq!(
            order_limit(0, 32, 1),
            0,
            "a zone of 32 frames has no arrays"
        );
    }
}
