//! What a leaf of the kernel's own table stands for: a frame that vmalloc owns, or one that nobody does.
//!
//! One table maps both memory and device registers, so its handle must be able to be either. The frame's slot tells them
//! apart when the mapping ends: a frame that vmalloc took carries the tag `Vmalloc`.
//!
//! Invariant `I1`: the slot of a block's first frame says `Vmalloc`, with the block's order, exactly while this crate owns the
//! block; each such block is in one leaf. Handles of borrowed memory that has slots are never [released](KernelPage::release).

use kmem_hal::{
    DeviceFrame, Frame, FrameHandle, FrameSink, FrameTable, FrameTag, Order, OwnedFrame,
};
use kmem_paging::Divisible;

/// A leaf of the kernel's table: memory of vmalloc's, or a window to something else.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a dropped handle leaks the frame that it may own"]
pub struct KernelPage {
    first: Frame,
    order: Order,
}

impl KernelPage {
    /// Memory, owned by the mapping from now on (`I1`).
    ///
    /// # Errors
    ///
    /// The frame, where the table has no slot for it.
    #[inline]
    pub fn owned(frame: OwnedFrame, slots: &FrameTable) -> Result<Self, OwnedFrame> {
        match slots.slot(frame.first()) {
            Some(slot) => {
                slot.claim(FrameTag::Vmalloc, frame.order());
                let (first, order) = frame.into_raw();
                Ok(Self { first, order })
            }
            None => Err(frame),
        }
    }

    /// A window to a device, or to memory that somebody else owns and keeps.
    pub const fn borrowed(frame: DeviceFrame) -> Self {
        Self {
            first: frame.first(),
            order: frame.order(),
        }
    }

    /// Ends the mapping: frees the frame if vmalloc owns it.
    #[inline]
    pub fn release(self, slots: &FrameTable, sink: &impl FrameSink) {
        let Some(slot) = slots
            .slot(self.first)
            .filter(|slot| slot.tag() == FrameTag::Vmalloc)
        else {
            return;
        };
        slot.release();
        // SAFETY: O1: the slot said that this crate owns the frame, and its only leaf is gone (`I1`); O2: it was taken with
        // this order; O3: a handle comes out of a table only after the flush.
        sink.free(unsafe { OwnedFrame::from_raw(self.first, self.order) });
    }
}

// SAFETY: H1, H2: the value is its numbers; ownership is in the slot.
unsafe impl FrameHandle for KernelPage {
    #[inline]
    fn into_entry(self) -> (Frame, Order) {
        (self.first, self.order)
    }

    #[inline]
    unsafe fn from_entry(first: Frame, order: Order) -> Self {
        Self { first, order }
    }
}

// SAFETY: D1: an owned block is unmapped and given other rights as a whole, so it is never divided; borrowed ones own nothing.
unsafe impl Divisible for KernelPage {}
