//! Physical memory for a test, and the simplest frame source that can be trusted.
//!
//! ```text
//!  frames   0 ......... base ................ base + count ......
//!                        |  to_ptr: one offset  |
//!  host                  [ zeroed pages, committed when touched ]
//! ```
//!
//! [`Arena`] is the memory and its [`PhysMap`]. [`ArenaSource`] hands its frames out, lowest first, and is merciless: a
//! frame freed twice, freed by somebody who never got it, or still out at the end is a panic that names it. What it gives
//! is filled with junk unless zeroes were asked for, and what comes back is filled with other junk.
//!
//! Invariants
//! - `I1`: the arena's first frame is not 0, so that code that confuses frame numbers with offsets fails.
//! - `I2`: a frame is in `out` exactly while somebody owns it.
//!
//! Under loom, tables are served from arrays of loom's atomics, made at the first call of
//! [`PhysMap::words`] for a frame; make the arena inside the model.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;

use kmem_hal::{
    AllocError, Frame, FrameRange, FrameRequest, FrameSink, FrameSource, NodeId, NodePolicy, Order,
    OwnedFrame, PAGE_SIZE, PhysAddr, PhysMap,
};

/// What fills memory that was given without zeroes.
pub const JUNK_GIVEN: u8 = 0xa5;
/// What fills memory that came back.
pub const JUNK_FREED: u8 = 0x5a;

/// Host memory that plays physical memory.
///
/// # Examples
///
/// ```
/// use kmem_hal::{Frame, FrameRange, PhysMap};
/// use kmem_testkit::Arena;
///
/// let arena = Arena::at(FrameRange::new(Frame::from_number(1 << 20), 16).unwrap());
/// let pointer = arena.to_ptr(arena.reach().first().start());
/// assert_eq!(arena.to_phys(pointer), arena.reach().first().start());
/// ```
pub struct Arena {
    memory: *mut u8,
    layout: Layout,
    /// `memory` rounded up to a page.
    base: *mut u8,
    range: FrameRange,
    #[cfg(loom)]
    words: crate::arena::served::Served,
}

// SAFETY: the memory is plain bytes; whoever owns a frame owns its bytes, and the arena itself touches none.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    /// The first frame of an arena made by [`new`](Self::new): 1 MiB (`I1`).
    pub const FIRST: Frame = Frame::from_number(0x100);

    /// `frames` frames from [`FIRST`](Self::FIRST), all zero.
    ///
    /// # Panics
    ///
    /// Where the host has no such memory.
    #[must_use]
    pub fn new(frames: u64) -> Self {
        Self::at(FrameRange::new(Self::FIRST, frames).expect("the arena ends inside the space"))
    }

    /// Memory for these frames, all zero, committed by the host when touched.
    ///
    /// # Panics
    ///
    /// Where the host has no such memory, or `range` is empty.
    #[must_use]
    pub fn at(range: FrameRange) -> Self {
        assert!(!range.is_empty(), "an arena has at least one frame");
        let bytes = usize::try_from((range.count() + 1) * PAGE_SIZE).expect("fits the host");
        // Small alignment lets the host's allocator take untouched zero pages; the page is aligned by hand.
        let layout = Layout::from_size_align(bytes, 16).expect("a valid layout");
        // SAFETY: the layout is not empty.
        let memory = unsafe { alloc_zeroed(layout) };
        if memory.is_null() {
            handle_alloc_error(layout);
        }
        // SAFETY: one page more than needed was allocated.
        let base = unsafe { memory.add(memory.align_offset(PAGE_SIZE as usize)) };
        base.expose_provenance();
        Self {
            memory,
            layout,
            base,
            range,
            #[cfg(loom)]
            words: Default::default(),
        }
    }

    /// An arena that lives for ever, for what wants a `'static` map.
    #[must_use]
    pub fn leak(frames: u64) -> &'static Self {
        Box::leak(Box::new(Self::new(frames)))
    }

    /// The frames of the arena.
    #[must_use]
    pub fn range(&self) -> FrameRange {
        self.range
    }

    /// The arena's frame number `index`.
    ///
    /// # Panics
    ///
    /// Beyond the last one.
    #[must_use]
    pub fn frame(&self, index: u64) -> Frame {
        assert!(
            index < self.range.count(),
            "the arena has no frame {index}: it has {}",
            self.range.count()
        );
        Frame::from_number(self.range.first().number() + index)
    }

    /// What to set an [`OffsetMap`](kmem_hal::OffsetMap) to: the offset in bytes, and the end of its reach in frames.
    ///
    /// The reach of such a map starts at frame 0, where this arena has nothing: use it only for frames of the arena.
    #[must_use]
    pub fn offset(&self) -> (usize, u64) {
        let first = self.range.first().start().as_u64() as usize;
        (
            (self.base.addr()).wrapping_sub(first),
            self.range.end_number(),
        )
    }

    /// Fills frames with a byte.
    ///
    /// # Safety
    ///
    /// The caller owns the frames, and they are in the arena.
    pub unsafe fn fill(&self, range: FrameRange, byte: u8) {
        let bytes = (range.count() * PAGE_SIZE) as usize;
        // SAFETY: P1; the caller owns the frames.
        unsafe {
            self.to_ptr(range.first().start()).write_bytes(byte, bytes);
        }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `at`.
        unsafe { dealloc(self.memory, self.layout) }
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Arena({:?})", self.range)
    }
}

// SAFETY: P1, P2: one offset into memory that lives as long as the arena; P3: subtraction undoes addition; P4: the reach
// is constant; P5: the default's temporary mappings are the mapping itself.
unsafe impl PhysMap for Arena {
    fn reach(&self) -> FrameRange {
        self.range
    }

    fn to_ptr(&self, address: PhysAddr) -> *mut u8 {
        let first = self.range.first().start().as_u64();
        self.base
            .wrapping_add(address.as_u64().wrapping_sub(first) as usize)
    }

    fn to_phys(&self, pointer: *const u8) -> PhysAddr {
        let first = self.range.first().start().as_u64();
        let offset = pointer.addr().wrapping_sub(self.base.addr());
        PhysAddr::new(first.wrapping_add(offset as u64))
    }

    #[cfg(loom)]
    unsafe fn words(&self, frame: Frame) -> &[kmem_hal::sync::AtomicU64] {
        self.words.words(frame)
    }

    #[cfg(loom)]
    unsafe fn words32(&self, frame: Frame) -> &[kmem_hal::sync::AtomicU32] {
        self.words.words32(frame)
    }

    #[cfg(loom)]
    unsafe fn zero(&self, range: FrameRange) {
        let bytes = (range.count() * PAGE_SIZE) as usize;
        // SAFETY: P1; the caller owns the frames.
        unsafe { self.to_ptr(range.first().start()).write_bytes(0, bytes) }
        self.words.zero(range);
    }
}

#[cfg(loom)]
mod served {
    //! Words of frames as loom's atomics, made when they are asked for.

    use std::collections::BTreeMap;
    use std::sync::Mutex;

    use kmem_hal::sync::{AtomicU32, AtomicU64, Ordering};
    use kmem_hal::{Frame, FrameRange};

    /// Arrays of atomics by frame. A frame is a table of one width or the other, never both.
    #[derive(Debug, Default)]
    pub struct Served {
        wide: Mutex<BTreeMap<u64, Box<[AtomicU64]>>>,
        narrow: Mutex<BTreeMap<u64, Box<[AtomicU32]>>>,
    }

    impl Served {
        pub fn words(&self, frame: Frame) -> &[AtomicU64] {
            let mut map = self.wide.lock().unwrap();
            let words = map
                .entry(frame.number())
                .or_insert_with(|| (0..512).map(|_| AtomicU64::new(0)).collect());
            let words: *const [AtomicU64] = &**words;
            // SAFETY: arrays are never removed while the arena lives, and boxes do not move.
            unsafe { &*words }
        }

        pub fn words32(&self, frame: Frame) -> &[AtomicU32] {
            let mut map = self.narrow.lock().unwrap();
            let words = map
                .entry(frame.number())
                .or_insert_with(|| (0..1024).map(|_| AtomicU32::new(0)).collect());
            let words: *const [AtomicU32] = &**words;
            // SAFETY: as above.
            unsafe { &*words }
        }

        pub fn zero(&self, range: FrameRange) {
            for frame in range.iter() {
                if self.wide.lock().unwrap().contains_key(&frame.number()) {
                    for word in self.words(frame) {
                        word.store(0, Ordering::Relaxed);
                    }
                }
                if self.narrow.lock().unwrap().contains_key(&frame.number()) {
                    for word in self.words32(frame) {
                        word.store(0, Ordering::Relaxed);
                    }
                }
            }
        }
    }
}

/// Hands out the frames of an [`Arena`], lowest first, and checks everything that comes back.
///
/// Slow and simple: a map of who owns what, behind a mutex.
///
/// # Examples
///
/// ```
/// use kmem_hal::{FrameRequest, FrameSink, FrameSource, Order};
/// use kmem_testkit::{Arena, ArenaSource};
///
/// let arena = Arena::new(8);
/// let source = ArenaSource::new(&arena);
/// let block = source.alloc(&FrameRequest::new(Order::new(2).unwrap())).unwrap();
/// assert_eq!(source.used(), 4);
/// source.free(block);
/// source.assert_all_free();
/// ```
#[derive(Debug)]
pub struct ArenaSource<'a> {
    arena: &'a Arena,
    frames: FrameRange,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Frames in somebody's hands (`I2`): first frame of each run of frames given together, and its length.
    out: BTreeMap<u64, u64>,
    used: u64,
    most_used: u64,
    allocations: u64,
}

impl State {
    /// Whether any frame of `first .. first + count` is out; answers where to look next.
    fn blocked(&self, first: u64, count: u64) -> Option<u64> {
        let (&start, &length) = self.out.range(..first + count).next_back()?;
        (start + length > first).then_some(start + length)
    }

    fn take(&mut self, first: u64, count: u64) {
        self.out.insert(first, count);
        self.used += count;
        self.most_used = self.most_used.max(self.used);
        self.allocations += 1;
    }

    /// Takes `count` frames from the run that holds them all; `false` where there is none.
    fn put_back(&mut self, first: u64, count: u64) -> bool {
        let Some((&start, &length)) = self.out.range(..=first).next_back() else {
            return false;
        };
        if start + length < first + count {
            return false;
        }
        self.out.remove(&start);
        if first > start {
            self.out.insert(start, first - start);
        }
        if start + length > first + count {
            self.out
                .insert(first + count, start + length - first - count);
        }
        self.used -= count;
        true
    }
}

impl<'a> ArenaSource<'a> {
    /// Hands out every frame of the arena.
    #[must_use]
    pub fn new(arena: &'a Arena) -> Self {
        Self::of(arena, arena.range())
    }

    /// Hands out only `frames` of the arena: the others are the test's.
    ///
    /// # Panics
    ///
    /// Where they are not in the arena.
    #[must_use]
    pub fn of(arena: &'a Arena, frames: FrameRange) -> Self {
        assert!(arena.range().contains_range(frames), "frames of the arena");
        Self {
            arena,
            frames,
            state: Mutex::default(),
        }
    }

    /// The memory.
    #[must_use]
    pub fn arena(&self) -> &'a Arena {
        self.arena
    }

    /// Frames in somebody's hands.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.lock().used
    }

    /// Frames that can be given.
    #[must_use]
    pub fn free_frames(&self) -> u64 {
        self.frames.count() - self.used()
    }

    /// The most frames that were out at once.
    #[must_use]
    pub fn most_used(&self) -> u64 {
        self.lock().most_used
    }

    /// Blocks given so far.
    #[must_use]
    pub fn allocations(&self) -> u64 {
        self.lock().allocations
    }

    /// Whether this frame is in somebody's hands.
    #[must_use]
    pub fn is_out(&self, frame: Frame) -> bool {
        self.lock().blocked(frame.number(), 1).is_some()
    }

    /// Panics, naming the frames, unless every frame is back.
    ///
    /// # Panics
    ///
    /// Where frames are out.
    #[track_caller]
    pub fn assert_all_free(&self) {
        let state = self.lock();
        assert!(
            state.out.is_empty(),
            "leaked {} frames: {}",
            state.used,
            state
                .out
                .iter()
                .map(|(first, count)| format!("{first:#x}+{count}"))
                .collect::<Vec<_>>()
                .join(" ")
        );
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // A panic of the test under the lock leaves plain counts behind.
        self.state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn find(&self, request: &FrameRequest) -> Result<Frame, AllocError> {
        let align = request.order.max(request.alignment).frames();
        let count = request.order.frames();
        let limit = request.max_address.as_u64();
        let fits = |first: u64| {
            first
                .checked_add(count)
                .is_some_and(|end| end <= self.frames.end_number())
                && (first + count - 1)
                    .checked_mul(PAGE_SIZE)
                    .is_some_and(|start| start + (PAGE_SIZE - 1) <= limit)
        };
        let mut first = self.frames.first().number().next_multiple_of(align);
        if !fits(first) || matches!(request.node, NodePolicy::Strict(n) if n != NodeId::ZERO) {
            return Err(AllocError::Unsatisfiable);
        }
        let mut state = self.lock();
        while fits(first) {
            match state.blocked(first, count) {
                None => {
                    state.take(first, count);
                    return Ok(Frame::from_number(first));
                }
                Some(next) => first = next.next_multiple_of(align),
            }
        }
        Err(AllocError::OutOfMemory)
    }
}

// SAFETY: F1: `take` notes the frames as out before they are given, and only frames that were not are given; no MMU
// translates to host memory. F2: `find` checks alignment and limit, and memory is zeroed here. F3: nothing changes on
// failure.
unsafe impl FrameSource for ArenaSource<'_> {
    fn alloc(&self, request: &FrameRequest) -> Result<OwnedFrame, AllocError> {
        let first = self.find(request)?;
        // SAFETY: O1: `find` took the frames; O2: aligned; O3: no TLB knows host memory.
        let block = unsafe { OwnedFrame::from_raw(first, request.order) };
        if request.zeroed {
            // SAFETY: the frames are owned and in the arena.
            unsafe { self.arena.zero(block.range()) }
        } else {
            // SAFETY: as above.
            unsafe { self.arena.fill(block.range(), JUNK_GIVEN) }
        }
        Ok(block)
    }
}

impl FrameSink for ArenaSource<'_> {
    /// Takes a block back.
    ///
    /// # Panics
    ///
    /// Where the block is not in anybody's hands: a double or a wild free.
    #[track_caller]
    fn free(&self, block: OwnedFrame) {
        let (first, order) = block.into_raw();
        let range = FrameRange::of_order(first, order).expect("a block inside the space");
        assert!(
            self.frames.contains_range(range),
            "freed {range:?}, which is not in {:?}",
            self.frames
        );
        if self.lock().blocked(first.number(), 1).is_some() {
            // Before it is free for others; a wild free of a part of it is caught below.
            // SAFETY: the caller gave the ownership up to us.
            unsafe { self.arena.fill(range, JUNK_FREED) }
        }
        assert!(
            self.lock().put_back(first.number(), order.frames()),
            "freed {range:?} (order {order}) twice, or without owning it"
        );
    }
}

/// The order of a block, for tests: panics above the highest.
///
/// # Panics
///
/// Above [`Order::MAX`].
#[must_use]
pub fn order(n: u8) -> Order {
    Order::new(n).expect("an order up to 51")
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn gives_lowest_aligned_block_and_refuses_honestly() {
        let arena = Arena::at(FrameRange::new(Frame::from_number(3), 9).unwrap());
        let source = ArenaSource::new(&arena);
        let block = source.alloc(&FrameRequest::new(order(2))).unwrap();
        assert_eq!(block.first().number(), 4);
        let one = source.alloc(&FrameRequest::ONE).unwrap();
        assert_eq!(one.first().number(), 3);
        let second = source.alloc(&FrameRequest::new(order(2))).unwrap();
        assert_eq!(second.first().number(), 8);
        assert_eq!(
            source.alloc(&FrameRequest::ONE),
            Err(AllocError::OutOfMemory)
        );
        assert_eq!(
            source.alloc(&FrameRequest::new(order(4))),
            Err(AllocError::Unsatisfiable)
        );
        let low = FrameRequest::ONE.below(PhysAddr::new(0x3fff));
        assert_eq!(source.alloc(&low), Err(AllocError::Unsatisfiable));
        for block in [block, one, second] {
            source.free(block);
        }
        source.assert_all_free();
        assert_eq!((source.most_used(), source.allocations()), (9, 3));
    }

    #[test]
    fn splits_come_back_in_any_order() {
        let arena = Arena::new(8);
        let source = ArenaSource::new(&arena);
        let block = source.alloc(&FrameRequest::new(order(2))).unwrap();
        let (low, high) = block.split().unwrap();
        let (a, b) = high.split().unwrap();
        source.free(a);
        assert_eq!(source.used(), 3);
        source.free(low);
        source.free(b);
        source.assert_all_free();
    }

    #[test]
    fn memory_is_zero_only_on_request() {
        let arena = Arena::new(2);
        let source = ArenaSource::new(&arena);
        let read = |frame: &OwnedFrame| {
            // SAFETY: the test owns the frame.
            unsafe { *arena.to_ptr(frame.first().start()).add(4095) }
        };
        let dirty = source.alloc(&FrameRequest::ONE).unwrap();
        assert_eq!(read(&dirty), JUNK_GIVEN);
        source.free(dirty);
        let clean = source.alloc(&FrameRequest::ONE.zeroed()).unwrap();
        assert_eq!(read(&clean), 0);
        source.free(clean);
    }

    #[test]
    #[should_panic(expected = "twice")]
    fn double_free_is_caught() {
        let arena = Arena::new(4);
        let source = ArenaSource::new(&arena);
        let block = source.alloc(&FrameRequest::ONE).unwrap();
        let first = block.first();
        source.free(block);
        // SAFETY: none: this is the misuse that the source must catch.
        source.free(unsafe { OwnedFrame::from_raw(first, Order::ZERO) });
    }

    #[test]
    #[should_panic(expected = "leaked 2 frames: 0x100+1 0x102+1")]
    fn leaks_are_named() {
        let arena = Arena::new(4);
        let source = ArenaSource::new(&arena);
        let blocks: Vec<_> = (0..3)
            .map(|_| source.alloc(&FrameRequest::ONE).unwrap())
            .collect();
        for (index, block) in blocks.into_iter().enumerate() {
            if index == 1 {
                source.free(block);
            } else {
                let _ = block.into_raw();
            }
        }
        source.assert_all_free();
    }
}
