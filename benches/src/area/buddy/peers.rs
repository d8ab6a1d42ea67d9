//! Adapters of the other page-frame allocators, each behind one spin lock.

use bitmap_allocator::{BitAlloc, BitAlloc1M};
use buddy_slab_allocator::buddy::BuddyAllocator;
use buddy_system_allocator::FrameAllocator;

use crate::lock::Locked;
use crate::mixed::Frames;
use crate::platform::{BASE, Region};

/// rCore's buddy system over B-trees.
pub(super) struct BuddySystem(Locked<FrameAllocator>);

impl BuddySystem {
    pub fn new(frames: u64) -> Self {
        let mut inner = FrameAllocator::new();
        inner.add_frame(BASE as usize, (BASE + frames) as usize);
        Self(Locked::new(inner))
    }
}

impl Frames for BuddySystem {
    #[inline(always)]
    fn alloc(&self, order: u8) -> Option<u64> {
        Some(self.0.with(|inner| inner.alloc(1 << order))? as u64)
    }
    #[inline(always)]
    fn free(&self, frame: u64, order: u8) {
        self.0
            .with(|inner| inner.dealloc(frame as usize, 1 << order));
    }
}

/// The bitmap of 16-way cascades that ArceOS uses.
pub(super) struct Bitmap(Locked<Box<BitAlloc1M>>);

impl Bitmap {
    pub fn new(frames: u64) -> Self {
        let mut inner: Box<BitAlloc1M> = Box::default();
        inner.insert(0..frames as usize);
        Self(Locked::new(inner))
    }
}

impl Frames for Bitmap {
    #[inline(always)]
    fn alloc(&self, order: u8) -> Option<u64> {
        let first = self.0.with(|inner| match order {
            0 => inner.alloc(),
            _ => inner.alloc_contiguous(None, 1 << order, usize::from(order)),
        })?;
        Some(first as u64 + BASE)
    }
    #[inline(always)]
    fn free(&self, frame: u64, order: u8) {
        let first = (frame - BASE) as usize;
        let freed = self.0.with(|inner| match order {
            0 => inner.dealloc(first),
            _ => inner.dealloc_contiguous(first, 1 << order),
        });
        assert!(freed, "frame {frame:#x} was free");
    }
}

/// The list buddy of buddy-slab-allocator; it keeps its table inside its region.
pub(super) struct ListBuddy {
    inner: Locked<BuddyAllocator>,
    offset: u64,
    _region: Region,
}

impl ListBuddy {
    pub fn new(frames: u64) -> Self {
        let table = BuddyAllocator::<4096>::required_meta_size(frames as usize * 4096);
        let region = Region::new(frames + (table as u64).div_ceil(4096));
        let mut inner = BuddyAllocator::new();
        // SAFETY: the region is this value's, mapped until it is dropped.
        let memory = unsafe { std::slice::from_raw_parts_mut(region.base(), region.bytes()) };
        // SAFETY: as above; nobody else uses the region.
        unsafe { inner.init(memory) }.expect("the region is large enough");
        // Its blocks are aligned from the start of its heap, which comes after the table: frames are numbered from there.
        let start = inner.section(0).expect("one region was given").start;
        let offset = BASE.wrapping_sub(start as u64 / 4096);
        Self {
            inner: Locked::new(inner),
            offset,
            _region: region,
        }
    }
}

impl Frames for ListBuddy {
    #[inline(always)]
    fn alloc(&self, order: u8) -> Option<u64> {
        let address = self
            .inner
            .with(|inner| inner.alloc_pages(1 << order, 4096))
            .ok()?;
        Some((address as u64 / 4096).wrapping_add(self.offset))
    }
    #[inline(always)]
    fn free(&self, frame: u64, order: u8) {
        let address = frame.wrapping_sub(self.offset) as usize * 4096;
        self.inner
            .with(|inner| inner.dealloc_pages(address, 1 << order));
    }
}
