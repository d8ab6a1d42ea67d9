//! Sizes above the largest block: ranges of frames.
//!
//! A kernel plugs vmalloc in here. A host's arena is contiguous, so a range of frames serves as well. The head frame's slot
//! says `Vmalloc` and holds the number of frames.

use std::ptr::NonNull;

use kmem::{
    AllocError, Frame, FrameRange, FrameRequest, FrameSink, Frames, OffsetMap, Order, OwnedFrame,
    PhysMap,
};
use kmem_hal::sync::Ordering;
use kmem_hal::{
    FrameTable, FrameTag, LargeSource, NoCpuCall, NodeId, PAGE_SIZE, Pressure, PressureLevel,
};

use crate::idle::IdleThreads;
use crate::lock::HostLock;
use crate::threads::ThreadCpu;

type HostFrames = Frames<OffsetMap, ThreadCpu, HostLock, NoCpuCall, &'static IdleThreads>;

/// A source of sizes above 4 MiB; smaller ones are left to the page-frame allocator's blocks.
#[derive(Clone, Copy, Debug)]
pub struct Ranges {
    frames: &'static HostFrames,
    table: &'static FrameTable,
}

impl Ranges {
    pub(crate) fn new(frames: &'static HostFrames, table: &'static FrameTable) -> Self {
        Self { frames, table }
    }

    fn find(&self, memory: *const u8) -> Option<FrameRange> {
        let first = Frame::starting_at(self.frames.memory().to_phys(memory))?;
        let slot = self.table.slot(first)?;
        if slot.tag() != FrameTag::Vmalloc {
            return None;
        }
        FrameRange::new(first, slot.index().load(Ordering::Relaxed))
    }
}

// SAFETY: V1: a range of frames that the allocator gave; V2: the slots of heads say `Vmalloc` exactly while they are out; V3: the
// page-frame allocator's ranges are taken and given back in any context.
unsafe impl LargeSource for Ranges {
    fn in_any_context(&self) -> bool {
        true
    }

    fn alloc_large(&self, size: usize, align: usize) -> Result<NonNull<u8>, AllocError> {
        if size as u64 <= Order::MAX_BUDDY.bytes() {
            return Err(AllocError::Unsatisfiable);
        }
        let alignment = Order::for_bytes(align as u64).ok_or(AllocError::Unsatisfiable)?;
        let frames = (size as u64).div_ceil(PAGE_SIZE);
        let (request, hook) = (FrameRequest::ONE, self.frames.pressure().kernel());
        let take = || self.frames.alloc_range(frames, alignment, &request);
        let owned = match take() {
            // Nobody else asks for what threads that ended hold: the page-frame allocator has its hook for blocks alone.
            Err(AllocError::OutOfMemory | AllocError::OutOfMemoryHere)
                if hook.pressure(NodeId::ZERO, PressureLevel::Refusing, &request) =>
            {
                take()?
            }
            taken => taken?,
        };
        // The owner is given up here; the slot's number of frames makes owners of its blocks again.
        let range = owned.range();
        let slot = self
            .table
            .slot(range.first())
            .ok_or(AllocError::Unsatisfiable)?;
        slot.claim(FrameTag::Vmalloc, Order::ZERO);
        slot.index().store(range.count(), Ordering::Relaxed);
        NonNull::new(self.frames.memory().to_ptr(range.first().start()))
            .ok_or(AllocError::Unsatisfiable)
    }

    unsafe fn free_large(&self, memory: NonNull<u8>) {
        if let Some(range) = self.find(memory.as_ptr()) {
            if let Some(slot) = self.table.slot(range.first()) {
                slot.release();
            }
            for (first, order) in range.blocks(Order::MAX_BUDDY) {
                // SAFETY: O1: the frames are those that `alloc_large` gave up, and the caller gives the memory up; O2: `blocks`
                // aligns; O3: mapped nowhere but in the arena.
                self.frames
                    .free(unsafe { OwnedFrame::from_raw(first, order) });
            }
        }
    }

    fn contains(&self, address: *const u8) -> bool {
        self.find(address).is_some()
    }

    fn size_of(&self, memory: NonNull<u8>) -> Option<usize> {
        let range = self.find(memory.as_ptr())?;
        usize::try_from(range.count() * PAGE_SIZE).ok()
    }
}
