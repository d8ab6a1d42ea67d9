//! What each CPU keeps for itself: small arrays of free blocks, reached without a locked instruction.
//!
//! ```text
//!   CpuArea (one a CPU)                        ZoneCache (one a CPU and zone)
//!     busy      a call is in the arrays          heads[order][type]
//!     hot       the block that came back last   slots   [ o0 unmovable | o0 movable | .. | o9 ]
//!     window    where frees go without a search
//!     holding   a call has a zone lock             bare: the same, from the time before the CPU had an area
//! ```
//!
//! A hit takes the hot block, or pops or pushes a 32-bit number: the frame's distance from the zone's start. Half an array moves from
//! or to the zone under one lock.
//!
//! Invariants (with hal's `C2`: only contexts that finish first interrupt the owner)
//! - `I1`: arrays, the hot block and the window are read and written only by the pinned owner, between setting and clearing `busy`. A
//!   nested call that finds `busy` set leaves them alone and goes to the zone.
//! - `I2`: whoever takes a zone's lock has set `holding` of the CPU that it runs on (`bare` where that has no area), views and those who
//!   empty the arrays of another CPU too. A nested call that finds it set never spins: it tries the lock, and if that fails it refuses an
//!   allocation or leaves a freed block in the pool of
//!   [`crate::pending`], which the interrupted call empties before it returns.
//! - `I3`: blocks in arrays, and the hot one, are allocated as far as the zone knows.
//! - `I4`: a block is lent from an array, or when it is hot, so that it is of a zone that served plain requests of its type. Emptying
//!   the arrays forgets what was lent.
//!
//! Costs: 3.2 KiB a CPU and zone, a quarter KiB a CPU. A hit is some twenty instructions, none of them locked.

mod arrays;
mod zone_cache;

use kmem_hal::sync::{
    AtomicU8, LocalBool, LocalPtr, LocalU32, LocalU64, LocalUsize, Ordering, compiler_fence,
};

use crate::zone::segment::Segment;

pub(crate) use arrays::Arrays;
pub(crate) use zone_cache::{
    CACHED_ORDERS, CACHED_TYPES, MAX_BATCH, Refill, ZoneCache, is_cached, is_fetched_ahead,
    order_limit, stack_of,
};

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
    /// 1 or 0; as wide as what is stored beside it.
    busy: LocalU32,
    /// Order, type and state of the block that was lent last (`arrays::key`). In the 16 bytes of `busy`: stores of one call to one
    /// such place are merged.
    hot: LocalU32,
    /// Its first frame.
    hot_first: LocalU64,
    pub holding: LocalBool,
    /// Allocations that were not for the hot block.
    missed: LocalU32,
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
    /// Which array was refilled or flushed last: one more than twice its number, or two more where it was flushed.
    moved: LocalU32,
    pub node: LocalU32,
    /// Where interleaved requests go next.
    pub interleave: LocalU32,
    /// Calls that had to leave the arrays alone.
    pub nested: LocalU64,
    /// Stands for `holding` where a call began before the area was there.
    bare: Option<&'static LocalBool>,
    pub caches: &'static [ZoneCache],
}

impl CpuArea {
    pub fn new(
        node: u32,
        bare: Option<&'static LocalBool>,
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
            busy: LocalU32::new(0),
            hot: LocalU32::new(arrays::NONE),
            hot_first: LocalU64::new(0),
            missed: LocalU32::new(0),
            holding: LocalBool::new(false),
            window_type: LocalU32::new(0),
            node: LocalU32::new(node),
            current: first.map(current),
            window_first: LocalU64::new(0),
            window_blocks: LocalUsize::new(0),
            window_types: LocalPtr::new(core::ptr::null_mut()),
            window_cache: null(),
            last_segment: LocalPtr::new(core::ptr::null_mut()),
            moved: LocalU32::new(0),
            interleave: LocalU32::new(0),
            nested: LocalU64::new(0),
            bare,
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

    /// Notes that an array is refilled; whether it was refilled last time too: its CPU only takes now.
    pub fn note_refill(&self, stack: usize) -> bool {
        self.note_move(2 * stack as u32 + 1)
    }

    /// Notes that an array is flushed; whether it was flushed last time too: its CPU only frees now.
    pub fn note_flush(&self, stack: usize) -> bool {
        self.note_move(2 * stack as u32 + 2)
    }

    fn note_move(&self, moved: u32) -> bool {
        let before = self.moved.get();
        self.moved.set(moved);
        before == moved
    }

    /// Makes the arrays the caller's (`I1`); `None` where the caller interrupted their user.
    ///
    /// The caller is pinned to this CPU for as long as the value lives.
    #[inline(always)]
    pub fn enter(&self) -> Option<Arrays<'_>> {
        if self.busy.get() != 0 {
            return None;
        }
        self.busy.set(1);
        compiler_fence(Ordering::SeqCst);
        Some(Arrays::of(self))
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
        self.holding.get() || self.bare.is_some_and(LocalBool::get)
    }
}

/// Notes whether the CPU of this flag is inside a zone lock (`I2`).
pub(crate) fn set_holding(flag: &LocalBool, holding: bool) {
    compiler_fence(Ordering::SeqCst);
    flag.set(holding);
    compiler_fence(Ordering::SeqCst);
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    extern crate std;
    use super::*;

    #[test]
    fn a_nested_call_is_kept_out_of_the_arrays() {
        let area = CpuArea::new(0, None, &[], [None; 3]);
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

    /// A hot block that nobody asks for keeps others from being lent; it goes away after as many allocations as it has patience for.
    #[test]
    fn a_hot_block_that_nobody_asks_for_is_put_away() {
        let mut place = std::boxed::Box::new(core::mem::MaybeUninit::uninit());
        ZoneCache::build(&mut place, 0);
        // SAFETY: `build` wrote all of it.
        let cache = unsafe { place.assume_init() };
        let caches: &'static [ZoneCache] = std::slice::from_ref(std::boxed::Box::leak(cache));
        let migrate = crate::zone::kind::MigrateType::Unmovable;
        for (order, count) in [(0, 128), (3, 1)] {
            let stack = stack_of(order, migrate as usize);
            caches[0].set_limit(stack, count);
            (0..count).for_each(|entry| assert!(caches[0].push(stack, entry << order)));
        }
        let area = CpuArea::new(0, None, caches, [Some(&caches[0]); 3]);
        let arrays = area.enter().unwrap();
        let block = arrays.pop(3, migrate).unwrap();
        assert!(arrays.push(block, 3), "what comes back at once is kept");
        for taken in 1..64 {
            assert!(arrays.pop(0, migrate).is_some(), "{taken}");
        }
        assert_eq!(arrays.pop(0, migrate), None, "the slow path puts it away");
        assert_eq!(arrays.take_hot(), Some((block, 3, migrate as usize)));
        assert!(arrays.pop(0, migrate).is_some());
    }
}
