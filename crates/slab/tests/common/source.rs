//! A page source that an NMI may enter, over an arena of host memory with a frame table: for the tests that step through calls.

use std::alloc::{Layout, alloc_zeroed};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use kmem_hal::{
    AllocError, Frame, FrameRequest, FrameSink, FrameSource, FrameTable, LargeSource, OffsetMap,
    Order, OwnedFrame, Section,
};

pub const FRAMES: usize = 2048;

/// A page source that an NMI may enter: bits that are claimed by one exchange, and no lock.
pub struct Source {
    words: [AtomicU64; FRAMES / 64],
    base: usize,
}

impl Source {
    /// A source that is there for good, and a table of its frames.
    pub fn leaked() -> (&'static Self, &'static FrameTable) {
        let layout = Layout::from_size_align(FRAMES << 12, 1 << 21).unwrap();
        // SAFETY: the layout is not empty.
        let base = unsafe { alloc_zeroed(layout) }.expose_provenance();
        let slots = Layout::from_size_align(FrameTable::SECTION_BYTES, 64).unwrap();
        // SAFETY: the layout is not empty.
        let slots = NonNull::new(unsafe { alloc_zeroed(slots) }).unwrap();
        let directory = Box::leak(Box::new([Section::absent()]));
        // SAFETY: leaked memory of that size.
        unsafe { directory[0].set_memory(slots) };
        let table: &'static FrameTable = Box::leak(Box::new(FrameTable::new()));
        table.init(directory);
        let source = Box::leak(Box::new(Self {
            words: std::array::from_fn(|_| AtomicU64::new(0)),
            base,
        }));
        (source, table)
    }

    pub fn map(&self) -> OffsetMap {
        // SAFETY: the arena is there for good.
        unsafe { OffsetMap::new(self.base, FRAMES as u64) }
    }

    pub fn used(&self) -> u32 {
        self.words
            .iter()
            .map(|word| word.load(Ordering::Relaxed).count_ones())
            .sum()
    }
}

// SAFETY: a block is a run of bits that one exchange took from 0 to 1; runs are naturally aligned in words.
unsafe impl FrameSource for Source {
    fn alloc(&self, request: &FrameRequest) -> Result<OwnedFrame, AllocError> {
        let order = request.order;
        if order.index() > 6 {
            return Err(AllocError::Unsatisfiable);
        }
        let frames = order.frames();
        let run = u64::MAX >> (64 - frames);
        for (index, word) in self.words.iter().enumerate() {
            for at in (0..64).step_by(frames as usize) {
                let now = word.load(Ordering::Relaxed);
                let taken = now & run << at == 0
                    && word
                        .compare_exchange(now, now | run << at, Ordering::AcqRel, Ordering::Relaxed)
                        .is_ok();
                if taken {
                    let first = index as u64 * 64 + at;
                    if request.zeroed {
                        let bytes: *mut u8 = std::ptr::with_exposed_provenance_mut(
                            self.base + ((first as usize) << 12),
                        );
                        // SAFETY: inside the arena, just taken.
                        unsafe { bytes.write_bytes(0, order.bytes() as usize) };
                    }
                    // SAFETY: as above.
                    return Ok(unsafe { OwnedFrame::from_raw(Frame::from_number(first), order) });
                }
            }
        }
        Err(AllocError::OutOfMemory)
    }
}

impl FrameSink for Source {
    fn free(&self, frame: OwnedFrame) {
        let (first, order) = frame.into_raw();
        let run = u64::MAX >> (64 - order.frames()) << (first.number() % 64);
        let before = self.words[first.number() as usize / 64].fetch_and(!run, Ordering::AcqRel);
        assert_eq!(before & run, run, "frame {first} was free");
    }
}

/// Pages of another source's arena, as memory for large sizes that an NMI may ask for as well.
pub struct Pages(pub &'static Source);

impl Pages {
    fn frame(&self, memory: *const u8) -> Option<Frame> {
        let offset = memory.addr().checked_sub(self.0.base)?;
        (offset < FRAMES << 12).then(|| Frame::from_number(offset as u64 >> 12))
    }
}

// SAFETY: V1 to V3: the source gives each page once.
unsafe impl LargeSource for Pages {
    fn in_any_context(&self) -> bool {
        true
    }
    fn alloc_large(&self, size: usize, _align: usize) -> Result<NonNull<u8>, AllocError> {
        if size > 4096 {
            return Err(AllocError::OutOfMemory);
        }
        let (frame, _) = self.0.alloc(&FrameRequest::new(Order::ZERO))?.into_raw();
        let address = self.0.base + ((frame.number() as usize) << 12);
        Ok(NonNull::new(std::ptr::with_exposed_provenance_mut(address)).unwrap())
    }
    unsafe fn free_large(&self, memory: NonNull<u8>) {
        let frame = self.frame(memory.as_ptr()).expect("a page that was given");
        // SAFETY: the caller gives the page up, which `alloc_large` took.
        self.0
            .free(unsafe { OwnedFrame::from_raw(frame, Order::ZERO) });
    }
    fn contains(&self, address: *const u8) -> bool {
        self.frame(address).is_some_and(|frame| {
            let (word, bit) = (frame.number() as usize / 64, frame.number() % 64);
            self.0.words[word].load(Ordering::Relaxed) >> bit & 1 != 0
        })
    }
    fn size_of(&self, memory: NonNull<u8>) -> Option<usize> {
        let is_start = memory.as_ptr().addr().is_multiple_of(4096);
        (is_start && self.contains(memory.as_ptr())).then_some(4096)
    }
}
