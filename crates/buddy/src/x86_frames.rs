//! kmem's frames for the mappers of the `x86_64` crate (feature `x86_64`).
//!
//! That crate's `FrameAllocator` and `FrameDeallocator` borrow their implementer exclusively and know three frame sizes. The
//! adapter is a copy of a reference: make one wherever a mapper asks for one.

use kmem_hal::{Frame, FrameRequest, FrameSink, FrameSource, Order, OwnedFrame};
use x86_64::PhysAddr;
use x86_64::structures::paging::{FrameAllocator, FrameDeallocator, PageSize, PhysFrame};

/// Frames of a kmem allocator for a mapper of the `x86_64` crate.
///
/// # Examples
///
/// ```
/// # use kmem_buddy::{BootMap, Buddy, Config, RegionKind, X86Frames};
/// # use kmem_hal::{OffsetMap, PhysAddr, SingleCpu};
/// # let arena = Box::leak(vec![0u8; 5 << 20].into_boxed_slice());
/// # let base = (arena.as_mut_ptr().expose_provenance() + 0xf_ffff) & !0xf_ffff;
/// # let mut map: BootMap = BootMap::new();
/// # map.push(PhysAddr::new(0), 4 << 20, RegionKind::Usable)?;
/// # let (memory, cpu) = unsafe { (OffsetMap::new(base, 1024), SingleCpu::new()) };
/// # let buddy: Buddy<_, _> = Buddy::new(memory, cpu);
/// # // SAFETY: X1: nobody else uses the memory of the map.
/// # unsafe { buddy.init(&mut map, &Config::new())? };
/// use x86_64::structures::paging::{FrameAllocator, FrameDeallocator, PhysFrame, Size4KiB};
///
/// let mut frames = X86Frames::new(&buddy);
/// let frame: PhysFrame<Size4KiB> = frames.allocate_frame().unwrap();
/// // SAFETY: nothing is mapped to the frame.
/// unsafe { frames.deallocate_frame(frame) };
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct X86Frames<'a, S: ?Sized> {
    frames: &'a S,
    request: FrameRequest,
}

impl<'a, S: ?Sized> X86Frames<'a, S> {
    /// Unmovable frames from anywhere, not zeroed: the mappers clear the tables that they make.
    #[must_use]
    pub const fn new(frames: &'a S) -> Self {
        Self::with(frames, FrameRequest::ONE)
    }

    /// Frames as `request` asks for; its order is not looked at.
    #[must_use]
    pub const fn with(frames: &'a S, request: FrameRequest) -> Self {
        Self { frames, request }
    }
}

impl<S: ?Sized> Clone for X86Frames<'_, S> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<S: ?Sized> Copy for X86Frames<'_, S> {}

// SAFETY: F1: a block that is given belongs to nobody else; blocks are as long as they are aligned.
unsafe impl<S: FrameSource + ?Sized, Z: PageSize> FrameAllocator<Z> for X86Frames<'_, S> {
    fn allocate_frame(&mut self) -> Option<PhysFrame<Z>> {
        let order = Order::for_bytes(Z::SIZE)?;
        let owned = self.frames.alloc(&FrameRequest {
            order,
            ..self.request
        });
        let (first, _) = owned.ok()?.into_raw();
        let address = PhysAddr::new(first.start().as_u64());
        Some(PhysFrame::containing_address(address))
    }
}

impl<S: FrameSink + ?Sized, Z: PageSize> FrameDeallocator<Z> for X86Frames<'_, S> {
    unsafe fn deallocate_frame(&mut self, frame: PhysFrame<Z>) {
        let first = Frame::containing(kmem_hal::PhysAddr::new(frame.start_address().as_u64()));
        if let Some(order) = Order::for_bytes(Z::SIZE) {
            // SAFETY: the caller of the trait's method promises that the frame is unused; it came from `allocate_frame` with
            // this size, and `PhysFrame` keeps it aligned.
            self.frames
                .free(unsafe { OwnedFrame::from_raw(first, order) });
        }
    }
}
