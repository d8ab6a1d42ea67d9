//! Sizes beyond the classes: whole pages, and the source of large sizes.
//!
//! ```text
//!   8 KiB < size <= 64 KiB     pages, then the large source
//!   64 KiB < size              the large source, then pages (up to 4 MiB)
//! ```
//!
//! Where neither has any, what caches hold beyond need goes back, and both are asked once more.
//!
//! A large source that is for tasks (vmalloc) is asked only where the flags say that the caller may wait. So what was allocated without such
//! a flag never comes from there, and can be freed in any context.
//!
//! Pages are taken as a power of two and the frames beyond the size go back at once (Linux's `alloc_pages_exact`), so 9 KiB cost
//! 12 KiB and not 16.
//!
//! Invariants
//! - `I1`: the head frame's slot says `Large`, its index word holds the number of frames; the slots of the others say `Tail`.
//! - `I2`: the frames of an allocation are `first .. first + count`, with `first` aligned to the order that covers them.

use core::ptr::NonNull;

use kmem_hal::sync::Ordering;
use kmem_hal::{
    AllocError, Context, Frame, FrameRequest, FrameTag, LargeSource, NodePolicy, Order, PAGE_SIZE,
};

use crate::block;
use crate::platform::Platform;
use crate::system::SlabSystem;

/// Up to this size pages come first, above it the large source.
const PAGES_FIRST: usize = 64 << 10;

impl<P: Platform> SlabSystem<P> {
    /// Memory in whole pages.
    #[cold]
    pub(crate) fn alloc_large(
        &self,
        size: usize,
        align: usize,
        request: &FrameRequest,
    ) -> Result<NonNull<u8>, AllocError> {
        let platform = self.platform().ok_or(AllocError::NotInitialised)?;
        let pages = || self.alloc_pages(platform, size, align, request);
        // The large source maps whatever frames it finds: not for requests below an address limit or from a node.
        let limited = request.max_address.as_u64() != u64::MAX || request.node != NodePolicy::Local;
        let large = || {
            let memory = platform.large().alloc_large(size, align)?;
            if request.zeroed {
                let usable = platform.large().size_of(memory).unwrap_or(size);
                // SAFETY: the source gave `size` bytes to this call (V1), and says how many of them and more may be used.
                unsafe { memory.write_bytes(0, usable.max(size)) };
            }
            Ok(memory)
        };
        let asks_large = !limited && self.may_ask_large(platform, request.context);
        let either = || {
            if !asks_large {
                pages()
            } else if size <= PAGES_FIRST {
                pages().or_else(|refused| large().map_err(|_: AllocError| refused))
            } else {
                large().or_else(|refused| match pages() {
                    // No block is so large: what the source says is all there is to say.
                    Err(AllocError::Unsatisfiable) => Err(refused),
                    served => served,
                })
            }
        };
        match either() {
            Err(AllocError::Unsatisfiable) => Err(AllocError::Unsatisfiable),
            Err(_) if self.shrink_for(request.context) > 0 => either(),
            served => served,
        }
    }

    /// Whether a caller in this context may be served by the large source.
    pub(crate) fn may_ask_large(&self, platform: &P, context: Context) -> bool {
        context != Context::Atomic || platform.large().in_any_context()
    }

    fn alloc_pages(
        &self,
        platform: &P,
        size: usize,
        align: usize,
        request: &FrameRequest,
    ) -> Result<NonNull<u8>, AllocError> {
        let frames = (size as u64).div_ceil(PAGE_SIZE).max(1);
        let (Some(order), Some(aligned)) =
            (Order::for_frames(frames), Order::for_bytes(align as u64))
        else {
            return Err(AllocError::Unsatisfiable);
        };
        let order = order.max(aligned);
        if order > Order::MAX_BUDDY {
            return Err(AllocError::Unsatisfiable);
        }
        let request = FrameRequest { order, ..*request };
        let (first, memory) = block::take_for(platform, &request, FrameTag::Large)?;
        block::trim(platform, first, order, frames);
        for tail in 1..frames {
            if let Some(slot) = first
                .checked_add(tail)
                .and_then(|tail| platform.table().slot(tail))
            {
                slot.claim(FrameTag::Tail, Order::ZERO);
            }
        }
        if let Some(slot) = platform.table().slot(first) {
            slot.index().store(frames, Ordering::Relaxed);
        }
        self.page_frames.fetch_add(frames, Ordering::Relaxed);
        self.page_blocks.fetch_add(1, Ordering::Relaxed);
        Ok(memory)
    }

    /// How many frames the allocation at `memory` has; `None` where it is not one of whole pages.
    pub(crate) fn page_count(&self, platform: &P, memory: *const u8) -> Option<(Frame, u64)> {
        let (frame, slot) = Self::slot_of(platform, memory)?;
        let whole = memory.addr().is_multiple_of(PAGE_SIZE as usize);
        (whole && slot.tag() == FrameTag::Large)
            .then(|| (frame, slot.index().load(Ordering::Relaxed)))
    }

    /// Frees an allocation of whole pages.
    ///
    /// # Safety
    ///
    /// `first` and `frames` are what `page_count` says of an allocation that the caller gives up.
    pub(crate) unsafe fn free_pages(&self, platform: &P, first: Frame, frames: u64) {
        self.page_frames.fetch_sub(frames, Ordering::Relaxed);
        self.page_blocks.fetch_sub(1, Ordering::Relaxed);
        // SAFETY: the allocation (I2), which the caller gives up.
        unsafe { block::give_pages(platform, first, frames) };
    }
}
