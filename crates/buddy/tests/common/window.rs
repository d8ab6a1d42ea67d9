//! Physical memory of any size of which only the top is backed: enough for the allocator's own tables.

use std::alloc::{Layout, alloc_zeroed, dealloc};

use kmem_hal::{Frame, FrameRange, PhysAddr, PhysMap};

/// All frames below `end` are in reach; the last `size` bytes are memory. Accessing others panics.
#[derive(Debug)]
pub struct Window {
    memory: *mut u8,
    size: u64,
    end: u64,
    reach: std::sync::atomic::AtomicU64,
}

const ALIGN: usize = 1 << 21;

impl Window {
    pub fn new(end: u64, size: u64) -> Self {
        let size = size.min(end);
        let layout = Layout::from_size_align(size as usize, ALIGN).unwrap();
        // SAFETY: the layout has a size.
        let memory = unsafe { alloc_zeroed(layout) };
        assert!(!memory.is_null());
        let reach = (end >> 12).into();
        Self {
            memory,
            size,
            end,
            reach,
        }
    }

    /// One that is there until the test's program ends.
    pub fn leaked(end: u64, size: u64) -> &'static Self {
        Box::leak(Box::new(Self::new(end, size)))
    }

    /// One past the last byte.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Makes only the frames below `frames` reachable (the window must lie below).
    pub fn set_reach(&self, frames: u64) {
        self.reach
            .store(frames, std::sync::atomic::Ordering::SeqCst);
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: from `new`.
        unsafe {
            dealloc(
                self.memory,
                Layout::from_size_align(self.size as usize, ALIGN).unwrap(),
            );
        }
    }
}

// SAFETY: P1 to P5 for the frames of the window; tests touch no others, and `to_ptr` says so.
unsafe impl PhysMap for Window {
    fn reach(&self) -> FrameRange {
        let frames = self.reach.load(std::sync::atomic::Ordering::SeqCst);
        FrameRange::new(Frame::ZERO, frames).unwrap()
    }

    fn to_ptr(&self, address: PhysAddr) -> *mut u8 {
        let low = self.end - self.size;
        assert!(
            address.as_u64() >= low && address.as_u64() < self.end,
            "{address} is not backed by the window"
        );
        self.memory.wrapping_add((address.as_u64() - low) as usize)
    }

    fn to_phys(&self, pointer: *const u8) -> PhysAddr {
        PhysAddr::new(pointer as u64 - self.memory as u64 + self.end - self.size)
    }
}

// SAFETY: plain memory; the allocator keeps accesses apart.
unsafe impl Sync for Window {}
// SAFETY: as above.
unsafe impl Send for Window {}
