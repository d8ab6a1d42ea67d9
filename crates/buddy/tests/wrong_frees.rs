//! Wrong frees in the default build: what no policy watches is refused, or stays out of use.
#![cfg(not(any(loom, shuttle)))]

mod common;

use common::window::Window;
use kmem_buddy::{BootMap, Buddy, Config, FreeError, RegionKind, Reservation, ZoneLimits};
use kmem_hal::{
    Frame, FrameRange, FrameRequest, FrameSource, Order, OwnedFrame, PhysAddr, SingleCpu, Spin,
};

const FRAMES: u64 = 0x4000;

type Machine<'a> = Buddy<&'a Window, SingleCpu, Spin>;

/// 64 MiB, of which the kernel image has these frames.
fn boot(window: &Window, kernel: FrameRange) -> Machine<'_> {
    let mut map: BootMap = BootMap::new();
    map.push(PhysAddr::new(0), FRAMES << 12, RegionKind::Usable)
        .unwrap();
    map.reserve(
        kernel.first().start(),
        kernel.count() << 12,
        Reservation::KernelImage,
    )
    .unwrap();
    // SAFETY: one thread.
    let buddy = Machine::new(window, unsafe { SingleCpu::new() });
    let config = Config::new()
        .limits(ZoneLimits::NORMAL_ONLY)
        .min_free_kib(0);
    // SAFETY: X1: the test's own memory, which only this allocator has.
    unsafe { buddy.init(&mut map, &config) }.unwrap();
    buddy
}

#[test]
fn a_wrong_order_does_not_free_what_is_reserved_beside_the_block() {
    let window = Window::new(FRAMES << 12, FRAMES << 12);
    // The block that is freed is wholly the allocator's; the kernel has one further up in the run that is given back for it.
    for (order, reserved) in [(10, 1), (11, 1), (11, 2), (11, 3), (12, 7)] {
        let first = Frame::new(0x1000).unwrap();
        let kernel = FrameRange::new(first.checked_add(reserved * 512).unwrap(), 512).unwrap();
        let buddy = boot(&window, kernel);
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
