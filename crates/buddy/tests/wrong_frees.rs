//! Wrong frees in the default build: what no policy watches is refused, or stays out of use.
#![cfg(not(any(loom, shuttle)))]

mod common;

use common::machine::{MIB, boot};
use common::window::Window;
use kmem_buddy::{FreeError, Reservation};
use kmem_hal::{Frame, FrameRange, FrameRequest, FrameSource, Order, OwnedFrame};

#[test]
fn a_wrong_order_does_not_free_what_is_reserved_beside_the_block() {
    let window = Window::new(64 * MIB, 64 * MIB);
    // The block that is freed is wholly the allocator's; the kernel has one further up in the run that is given back for it.
    for (order, reserved) in [(10, 1), (11, 1), (11, 2), (11, 3), (12, 7)] {
        let first = Frame::new(0x1000).unwrap();
        let kernel = FrameRange::new(first.checked_add(reserved * 512).unwrap(), 512).unwrap();
        let buddy = boot(&window, &[(kernel, Reservation::KernelImage)]);
        let run = FrameRange::of_order(first, Order::new(order).unwrap()).unwrap();
        let mut held = Vec::new();
        for block in 0..run.count() / 512 {
            let block = first.checked_add(block * 512).unwrap();
            if !kernel.contains(block) {
                held.push(buddy.alloc_at(block, Order::HUGE_2M).unwrap());
            }
        }
        let free = buddy.mem_info().free;
        // SAFETY: none; the wrong free is what is tested.
        let wrong = unsafe { OwnedFrame::from_raw(first, Order::new(order).unwrap()) };
        let (error, _) = buddy.try_free(wrong).unwrap_err();
        assert_eq!(error, FreeError::Foreign, "order {order}");
        assert_eq!(buddy.mem_info().free, free);
        while let Ok(frame) = buddy.alloc(&FrameRequest::ONE) {
            assert!(!run.contains(frame.first()), "{frame:?} is somebody's");
        }
        buddy.check().unwrap();
    }
}
