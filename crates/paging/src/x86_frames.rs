//! Frames of an allocator of the `x86_64` crate for kmem's tables (feature `x86_64`).
//!
//! That crate's `FrameAllocator` is what boot loaders and many kernels have already. [`FromX86Frames`] makes a [`FrameSource`] and
//! [`FrameSink`] of it, so that page tables can be made before, or without, an allocator of kmem's. The other way round, frames of kmem's for
//! that crate's mappers, is `kmem_buddy::X86Frames`.
//!
//! Handles single frames alone: a request of another order is [`AllocError::Unsatisfiable`].

use core::fmt;

use kmem_hal::lock::{IrqSafe, Lock};
use kmem_hal::{
    AllocError, Frame, FrameRequest, FrameSink, FrameSource, Order, OwnedFrame, PhysMap,
};
use x86_64::PhysAddr;
use x86_64::structures::paging::{FrameAllocator, FrameDeallocator, PhysFrame, Size4KiB};

/// An allocator of the `x86_64` crate behind a lock, as a source of frames.
///
/// # Examples
///
/// ```
/// # mod machine { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/machine.rs")); }
/// use kmem_hal::{FrameRequest, FrameSink, FrameSource};
/// use kmem_paging::FromX86Frames;
/// use x86_64::PhysAddr;
/// use x86_64::structures::paging::{FrameAllocator, FrameDeallocator, PhysFrame, Size4KiB};
///
/// /// What a boot loader hands over.
/// struct Boot(Vec<u64>);
/// // SAFETY: each frame is given once.
/// unsafe impl FrameAllocator<Size4KiB> for Boot {
///     fn allocate_frame(&mut self) -> Option<PhysFrame> {
///         Some(PhysFrame::containing_address(PhysAddr::new(self.0.pop()?)))
///     }
/// }
/// impl FrameDeallocator<Size4KiB> for Boot {
///     unsafe fn deallocate_frame(&mut self, frame: PhysFrame) {
///         self.0.push(frame.start_address().as_u64());
///     }
/// }
///
/// # let machine = machine::Machine::new(4);
/// # let map = machine.map;
/// // `map` is the kernel's `PhysMap`.
/// // SAFETY: nothing is mapped to these frames, and they lie in reach of the map.
/// let frames = unsafe { FromX86Frames::new(Boot(vec![0x1000, 0x2000]), map) };
/// let frame = frames.alloc(&FrameRequest::ONE.zeroed())?;
/// assert_eq!(frame.first().number(), 2);
/// frames.free(frame);
/// # Ok::<(), kmem_hal::AllocError>(())
/// ```
pub struct FromX86Frames<A, M> {
    allocator: Lock<A, IrqSafe>,
    map: M,
}

impl<A, M: PhysMap> FromX86Frames<A, M> {
    /// Wraps an allocator; `map` is where its frames are zeroed.
    ///
    /// # Safety
    ///
    /// What the allocator gives, no TLB translates to; and it has a kmem slot where it becomes a table.
    pub unsafe fn new(allocator: A, map: M) -> Self {
        Self {
            allocator: Lock::new(allocator),
            map,
        }
    }
}

// SAFETY: F1: the allocator gives a frame to one owner alone (that is its trait's promise), and `new` says the rest. F2: order 0, and what does not
// fit goes back. F3: a failed call gave back what it took.
unsafe impl<A, M> FrameSource for FromX86Frames<A, M>
where
    A: FrameAllocator<Size4KiB> + FrameDeallocator<Size4KiB>,
    M: PhysMap,
{
    fn alloc(&self, request: &FrameRequest) -> Result<OwnedFrame, AllocError> {
        if request.order != Order::ZERO {
            return Err(AllocError::Unsatisfiable);
        }
        let mut allocator = self.allocator.lock();
        let given = allocator.allocate_frame().ok_or(AllocError::OutOfMemory)?;
        let start = given.start_address().as_u64();
        let frame = Frame::from_number(start >> kmem_hal::PAGE_SHIFT);
        let fits =
            start | 0xfff <= request.max_address.as_u64() && frame.is_aligned(request.alignment);
        if !fits || request.zeroed && !self.map.reach().contains(frame) {
            // SAFETY: it was just given, and nobody has used it.
            unsafe { allocator.deallocate_frame(given) };
            return Err(AllocError::OutOfMemory);
        }
        drop(allocator);
        if request.zeroed {
            // SAFETY: the frame is nobody else's and in reach.
            unsafe { self.map.to_ptr(frame.start()).write_bytes(0, 4096) };
        }
        // SAFETY: O1 to O3: F1; order 0.
        Ok(unsafe { OwnedFrame::from_raw(frame, Order::ZERO) })
    }
}

impl<A: FrameDeallocator<Size4KiB>, M> FrameSink for FromX86Frames<A, M> {
    fn free(&self, frame: OwnedFrame) {
        let (first, order) = frame.into_raw();
        let mut allocator = self.allocator.lock();
        for number in first.number()..first.number() + order.frames() {
            let start = PhysAddr::new(number << kmem_hal::PAGE_SHIFT);
            // SAFETY: an owned frame is in use by nobody else.
            unsafe { allocator.deallocate_frame(PhysFrame::containing_address(start)) };
        }
    }
}

impl<A, M> fmt::Debug for FromX86Frames<A, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FromX86Frames")
    }
}
