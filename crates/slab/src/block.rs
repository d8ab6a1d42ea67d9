//! Blocks of frames for the allocator's own use: taken, checked, given back.

use core::ptr::NonNull;

use kmem_hal::{
    AllocError, Frame, FrameRange, FrameRequest, FrameSink, FrameSource, FrameTag, Order,
    OwnedFrame, PhysMap,
};

use crate::platform::Platform;

/// Takes a block for bookkeeping, from any context.
pub fn take<P: Platform>(platform: &P, order: Order) -> Result<(Frame, NonNull<u8>), AllocError> {
    take_for(platform, &FrameRequest::new(order), FrameTag::Kernel)
}

/// Takes a block that the map reaches and the table covers, and marks its head's slot with `tag`.
///
/// A block that is out of reach goes back, and the request counts as unsatisfiable.
pub fn take_for<P: Platform>(
    platform: &P,
    request: &FrameRequest,
    tag: FrameTag,
) -> Result<(Frame, NonNull<u8>), AllocError> {
    let owned = platform.frames().alloc(request)?;
    let range = owned.range();
    let (first, order) = (owned.first(), owned.order());
    let table = platform.table();
    let reached = platform.map().reach().contains_range(range) && table.covers(range);
    let memory = NonNull::new(platform.map().to_ptr(first.start()));
    let (true, Some(memory), Some(slot)) = (reached, memory, table.slot(first)) else {
        platform.frames().free(owned);
        return Err(AllocError::Unsatisfiable);
    };
    slot.claim(tag, order);
    let _ = owned.into_raw();
    Ok((first, memory))
}

/// Gives a block back; every slot of it says "free" again.
///
/// # Safety
///
/// The block came from [`take_for`] or a part of such a block, and nobody uses it any more.
pub unsafe fn give<P: Platform>(platform: &P, first: Frame, order: Order) {
    if let Some(range) = FrameRange::of_order(first, order) {
        for frame in range.iter() {
            if let Some(slot) = platform.table().slot(frame) {
                slot.release();
            }
        }
    }
    // SAFETY: O1: the caller owned the block and gives it up; O2: it is a naturally aligned block;
    // O3: it was never mapped anywhere but in the linear map.
    platform
        .frames()
        .free(unsafe { OwnedFrame::from_raw(first, order) });
}

/// Gives back the frames of a block from `first + keep` on, which nobody has used yet.
pub fn trim<P: Platform>(platform: &P, first: Frame, order: Order, keep: u64) {
    let rest = FrameRange::from_numbers(first.number() + keep, first.number() + order.frames());
    for (frame, order) in rest.unwrap_or(FrameRange::EMPTY).blocks(order) {
        // SAFETY: O1: part of a block that the caller owns and has given to nobody; O2: `blocks` aligns; O3: never mapped.
        platform
            .frames()
            .free(unsafe { OwnedFrame::from_raw(frame, order) });
    }
}

/// Gives back so many frames, which need not be a block; every slot of them says "free" again.
///
/// # Safety
///
/// As [`give`], for what [`trim`] has left.
pub unsafe fn give_pages<P: Platform>(platform: &P, first: Frame, pages: u64) {
    let range = FrameRange::new(first, pages).unwrap_or(FrameRange::EMPTY);
    for (frame, order) in range.blocks(Order::MAX_BUDDY) {
        // SAFETY: a part of what the caller gives up, aligned by `blocks`.
        unsafe { give(platform, frame, order) };
    }
}
