//! Taking from and putting into the arrays of a CPU, with its `busy` flag set: the hits.
//!
//! ```text
//!   alloc   the hot block, if it is of this order and type   otherwise the newest entry of the array of the zone that served the
//!                                                            type last: it is lent
//!   free    the block that was lent last becomes hot         otherwise a block of the window goes into its array
//! ```
//!
//! A block that comes back before another one was taken is *hot*: it was checked when it was lent, so that neither its zone nor its
//! type has to be looked up. Everything else is no hit of the hot word, which the processor learns. A hot block that nobody asks
//! for would keep others from being lent: now and then it is put into its array.

use kmem_hal::sync::{Ordering, compiler_fence};

use super::CpuArea;
use super::zone_cache::{CACHED_TYPES, ZoneCache, stack_of};
use crate::zone::bits::{BLOCK_FRAMES, BLOCK_ORDER};
use crate::zone::kind::MigrateType;
use crate::zone::segment::Segment;

/// No block was lent.
pub(super) const NONE: u32 = 0;
/// The block was lent: taken from an array, or when it was hot.
const LENT: u32 = 1;
/// It came back and is free.
const HOT: u32 = 2;
/// The block's order, the rest of the lower half, which is all that a free compares.
const ORDER_SHIFT: u32 = 2;
/// Its migrate type, the upper half.
const TYPE_SHIFT: u32 = 16;
/// Allocations that a hot block of another order or type may outlast.
const PATIENCE: u32 = 64;

/// The hot word of a block.
#[inline(always)]
const fn key(order: usize, migrate: usize, state: u32) -> u32 {
    (order as u32) << ORDER_SHIFT | (migrate as u32) << TYPE_SHIFT | state
}

/// What follows is laid out beside the path of the hot block, which stays in one piece.
#[cold]
const fn beside() {}

/// The right to use a CPU's arrays.
pub(crate) struct Arrays<'a> {
    area: &'a CpuArea,
}

impl<'a> Arrays<'a> {
    /// The caller has set `busy`.
    #[inline(always)]
    pub(super) const fn of(area: &'a CpuArea) -> Self {
        Self { area }
    }
}

impl Arrays<'_> {
    /// Takes a block from the zone that served the type last.
    #[inline(always)]
    pub fn pop(&self, order: usize, migrate: MigrateType) -> Option<u64> {
        let area = self.area;
        let word = area.hot.get();
        let migrate = migrate as usize;
        if word == key(order, migrate, HOT) {
            area.hot.set(key(order, migrate, LENT));
            return Some(area.hot_first.get());
        }
        beside();
        if word & HOT != 0 {
            let missed = area.missed.get().wrapping_add(1);
            area.missed.set(missed);
            if missed.is_multiple_of(PATIENCE) {
                // The slow path puts it away.
                return None;
            }
        }
        let current = area.current.get(migrate)?;
        // SAFETY: null, or from a `&'static ZoneCache` in `new` or `serve_from`.
        let cache = unsafe { current.get().as_ref() }?;
        let first = cache.start + u64::from(cache.pop(stack_of(order, migrate))?);
        let lent = key(order, migrate, LENT);
        if word & HOT == 0 {
            area.hot.set(lent);
            area.hot_first.set(first);
        }
        Some(first)
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
        cache.pop_newest(stack_of(order, migrate as usize), out)
    }

    /// Notes which zone served a type.
    pub fn serve_from(&self, migrate: MigrateType, cache: &'static ZoneCache) {
        if let Some(current) = self.area.current.get(migrate as usize) {
            current.set(core::ptr::from_ref(cache).cast_mut());
        }
    }

    /// Keeps a block, hot or in the array that it belongs to; `false` where it is none of the window, its type is not
    /// that of the last block, or there is no room.
    ///
    /// The type is guessed to be the last one and then checked, so that the processor need not wait for the block's type before
    /// it looks at the array: the array's address would otherwise hang on two loads that hang on the frame's number.
    #[inline(always)]
    pub fn push(&self, first: u64, order: usize) -> bool {
        let area = self.area;
        let word = area.hot.get();
        // Both in one branch: whether the last lent block was of this order is a coin in mixed work.
        if (area.hot_first.get() == first) & (word as u16 == key(order, 0, LENT) as u16) {
            area.hot.set(word - LENT + HOT);
            return true;
        }
        beside();
        let Some(guess) = self.guess_of(first, order) else {
            return false;
        };
        // SAFETY: W1: the window is not empty, so this came from a `&'static ZoneCache` in `look_at`.
        let cache = unsafe { &*area.window_cache.get() };
        cache.push(stack_of(order, guess), (first - cache.start) as u32)
    }

    /// The guessed type, where a block is of the window and of this type, and aligned.
    #[inline(always)]
    fn guess_of(&self, first: u64, order: usize) -> Option<usize> {
        let area = self.area;
        let block = first.wrapping_sub(area.window_first.get()) >> BLOCK_ORDER;
        if block >= area.window_blocks.get() as u64 || first & ((1 << order) - 1) != 0 {
            return None;
        }
        // SAFETY: W1: the block is one of the window's, which has as many types.
        let migrate =
            unsafe { (*area.window_types.get().add(block as usize)).load(Ordering::Relaxed) };
        let guess = area.window_type.get();
        (u32::from(migrate) == guess).then_some(guess as usize)
    }

    /// Keeps blocks of one order as long as `push` would keep them in their array; how many.
    #[inline]
    pub fn push_some(&self, firsts: &[u64], order: usize) -> usize {
        // SAFETY: null, or from a `&'static ZoneCache` in `look_at`.
        let Some(cache) = (unsafe { self.area.window_cache.get().as_ref() }) else {
            return 0;
        };
        let stack = stack_of(order, self.area.window_type.get() as usize);
        let mut firsts = firsts.iter();
        cache.push_while(stack, || {
            let &first = firsts.next()?;
            self.guess_of(first, order)
                .map(|_| (first - cache.start) as u32)
        })
    }

    /// Takes the hot block away, and forgets what was lent; its first frame, order and type.
    pub fn take_hot(&self) -> Option<(u64, usize, usize)> {
        let word = self.area.hot.get();
        let hot = self.area.hot_block();
        self.area.hot.set(NONE);
        hot.map(|(first, order)| (first, order, (word >> TYPE_SHIFT) as usize))
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
        if first < end {
            let blocks = ((end - first) >> BLOCK_ORDER) as usize;
            let at = segment.block_of(first);
            if let Some(types) = segment.types.get(at..at + blocks) {
                area.window_first.set(first);
                area.window_blocks.set(blocks);
                area.window_types.set(types.as_ptr().cast_mut());
                area.window_cache.set(core::ptr::from_ref(cache).cast_mut());
            }
        }
    }

    #[inline(always)]
    pub fn zone(&self, zone: usize) -> Option<&'static ZoneCache> {
        self.area.caches.get(zone)
    }
}

impl CpuArea {
    /// The first frame and the order of the hot block. May be read by anybody, as a figure.
    pub fn hot_block(&self) -> Option<(u64, usize)> {
        let word = self.hot.get();
        let order = word as u16 >> ORDER_SHIFT;
        (word & HOT != 0).then(|| (self.hot_first.get(), order as usize))
    }
}

impl Drop for Arrays<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        compiler_fence(Ordering::SeqCst);
        self.area.busy.set(0);
    }
}
