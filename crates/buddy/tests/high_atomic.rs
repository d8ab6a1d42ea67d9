//! Page blocks that are kept for high-order requests that cannot wait: who makes them, who gets them, who ends them.
#![cfg(not(any(loom, shuttle)))]

mod common;

use common::machine::{MIB, Machine, map, one_zone, start};
use common::window::Window;
use kmem_hal::{
    AllocError, Context, FrameRange, FrameRequest, FrameSink, FrameSource, Order, OwnedFrame,
};

/// A machine of so many frames, of which the allocator keeps some back.
fn boot(frames: u64) -> &'static Machine<'static> {
    let window = Window::leaked(frames << 12, MIB);
    let config = one_zone().min_free_kib(16384);
    let mut map = map(&[(0, frames << 12)]);
    Box::leak(Box::new(start(window, &mut map, &config)))
}

/// Page blocks of type HighAtomic, as /proc/pagetypeinfo says.
fn kept(buddy: &Machine<'_>) -> u64 {
    let text = buddy.page_type_info().to_string();
    let column = text.lines().last().unwrap().split_whitespace().nth(4 + 3);
    column.unwrap().parse().unwrap()
}

fn waiting(order: u8) -> FrameRequest {
    FrameRequest::new(Order::new(order).unwrap()).context(Context::MayWait)
}

fn urgent(order: u8) -> FrameRequest {
    FrameRequest::new(Order::new(order).unwrap())
}

/// Takes frames that may wait until less than the low watermark is free.
fn run_low(buddy: &Machine<'_>, held: &mut Vec<OwnedFrame>) {
    loop {
        let zone = buddy.zones().next().unwrap();
        let Some(more) = (zone.free + 1).checked_sub(zone.marks[1]) else {
            return;
        };
        for _ in 0..more.max(1) {
            held.push(buddy.alloc(&waiting(0)).unwrap());
        }
        if zone.free < zone.marks[1] {
            return;
        }
    }
}

fn end(buddy: &Machine<'_>, held: Vec<OwnedFrame>) {
    buddy.check().unwrap();
    for frame in held {
        buddy.free(frame);
    }
    buddy.drain_local();
    assert_eq!(buddy.recount().free, buddy.mem_info().total);
    assert_eq!(buddy.misuse(), None);
    buddy.check().unwrap();
}

#[test]
fn a_block_is_kept_when_memory_is_short_and_serves_its_kind() {
    let buddy = boot(1 << 16);
    let mut held = Vec::new();
    held.push(buddy.alloc(&urgent(5)).unwrap());
    assert_eq!(kept(buddy), 0, "nothing is kept while there is enough");
    run_low(buddy, &mut held);
    let first = buddy.alloc(&urgent(5)).unwrap();
    assert_eq!(kept(buddy), 1);
    let block = first.first().align_down(Order::HUGE_2M);
    let second = buddy.alloc(&urgent(4)).unwrap();
    assert_eq!(second.first().align_down(Order::HUGE_2M), block);
    // Single frames and callers that can wait go elsewhere, as long as there is anything; arrays may have some from before.
    buddy.drain_local();
    for request in [urgent(0), waiting(4)] {
        let other = buddy.alloc(&request).unwrap();
        assert_ne!(other.first().align_down(Order::HUGE_2M), block);
        held.push(other);
    }
    buddy.check().unwrap();
    // What may wait is refused only after the block was let go.
    let refused = loop {
        match buddy.alloc(&waiting(0)) {
            Ok(frame) => held.push(frame),
            Err(error) => break error,
        }
    };
    assert_eq!(refused, AllocError::OutOfMemory);
    assert_eq!(kept(buddy), 0);
    held.extend([first, second]);
    end(buddy, held);
}

/// Who has another way ends no block that is kept for others.
#[test]
fn an_optional_request_leaves_kept_blocks_alone() {
    let buddy = boot(1 << 16);
    let mut held = Vec::new();
    run_low(buddy, &mut held);
    held.push(buddy.alloc(&urgent(5)).unwrap());
    assert_eq!(kept(buddy), 1);
    while let Ok(frame) = buddy.alloc(&waiting(0).optional()) {
        held.push(frame);
    }
    for order in [0, 9, 11] {
        assert!(buddy.alloc(&waiting(order).optional()).is_err());
        assert_eq!(kept(buddy), 1, "{order}");
    }
    assert!(buddy.alloc(&waiting(11)).is_err());
    assert_eq!(kept(buddy), 0);
    end(buddy, held);
}

#[test]
fn at_most_a_hundredth_is_kept() {
    let buddy = boot(1 << 16);
    let mut held = Vec::new();
    run_low(buddy, &mut held);
    for order in [9, 9, 9, 9] {
        if let Ok(block) = buddy.alloc(&urgent(order)) {
            held.push(block);
        }
    }
    assert!(kept(buddy) <= 2, "2 page blocks are 1 % of 256 MiB");
    end(buddy, held);

    let small = boot(1 << 15);
    let mut held = Vec::new();
    run_low(small, &mut held);
    held.push(small.alloc(&urgent(2)).unwrap());
    assert_eq!(kept(small), 0, "a small zone keeps nothing");
    end(small, held);
}

#[test]
fn a_single_frame_that_cannot_wait_gets_the_last_of_a_kept_block() {
    let buddy = boot(1 << 16);
    let mut held = Vec::new();
    run_low(buddy, &mut held);
    held.push(buddy.alloc(&urgent(3)).unwrap());
    assert_eq!(kept(buddy), 1);
    let min = buddy.zones().next().unwrap().marks[0];
    // Down to half the min watermark, whatever the frames are kept for.
    while let Ok(frame) = buddy.alloc(&urgent(0)) {
        held.push(frame);
    }
    buddy.drain_local();
    assert!(buddy.recount().free <= min / 2 + 1);
    end(buddy, held);
}

/// A page block that is kept, and a machine that is short of memory.
fn short(held: &mut Vec<OwnedFrame>) -> (&'static Machine<'static>, FrameRange) {
    let buddy = boot(1 << 16);
    run_low(buddy, held);
    let first = buddy.alloc(&urgent(5)).unwrap();
    assert_eq!(kept(buddy), 1);
    let block = first.first().align_down(Order::HUGE_2M);
    held.push(first);
    (buddy, FrameRange::of_order(block, Order::HUGE_2M).unwrap())
}

#[test]
fn ranges_for_callers_that_can_wait_leave_kept_blocks_alone() {
    for align in [0, 5] {
        let mut held = Vec::new();
        let (buddy, block) = short(&mut held);
        // The highest blocks come first, so that the kept one is the lowest that has anything.
        let align = Order::new(align).unwrap();
        let mut refused = None;
        while refused.is_none() {
            match buddy.alloc_range(24, align, &waiting(0)) {
                Ok(range) => {
                    let of_it = !range.range().intersection(block).is_empty();
                    assert!(!of_it || kept(buddy) == 0, "{range:?} of {block:?}");
                    held.extend(range.into_blocks(Order::MAX_BUDDY));
                }
                Err(error) => refused = Some(error),
            }
        }
        assert_eq!(refused, Some(AllocError::OutOfMemory));
        assert_eq!(kept(buddy), 0, "refused before it was let go");
        end(buddy, held);
    }
    // Single frames of an alignment beyond their order are found by place as well.
    let mut held = Vec::new();
    let (buddy, block) = short(&mut held);
    loop {
        let request = waiting(0).aligned(Order::new(3).unwrap());
        match buddy.alloc(&request) {
            Ok(frame) => {
                let of_it = block.contains(frame.first());
                assert!(!of_it || kept(buddy) == 0, "{frame:?} of {block:?}");
                held.push(frame);
            }
            Err(error) => break assert_eq!(error, AllocError::OutOfMemory),
        }
    }
    assert_eq!(kept(buddy), 0);
    end(buddy, held);
}

#[test]
fn kept_frames_count_as_used_for_others() {
    let mut held = Vec::new();
    let (buddy, _) = short(&mut held);
    let before = held.len();
    loop {
        held.push(buddy.alloc(&waiting(0)).unwrap());
        let zone = buddy.zones().next().unwrap();
        if kept(buddy) == 0 {
            break;
        }
        assert!(zone.free >= zone.marks[0] + 512, "{} are free", zone.free);
    }
    assert!(held.len() > before + 1);
    end(buddy, held);
}
