//! Page blocks change their migrate type where most of them is free.

mod common;

use common::machine::{MIB, Machine, boot};
use common::window::Window;
use kmem_hal::{FrameRequest, FrameSource, Order, OwnedFrame};

const MEMORY: u64 = 6 * MIB;
/// Frames of a page block.
const BLOCK: u64 = Order::HUGE_2M.frames();

/// Page blocks of type Unmovable, as /proc/pagetypeinfo says.
fn unmovable(buddy: &Machine<'_>) -> u64 {
    let text = buddy.page_type_info().to_string();
    let column = text.lines().last().unwrap().split_whitespace().nth(4);
    column.unwrap().parse().unwrap()
}

/// All memory is in movable use but `free` frames of one block; whether that block is another type's once a frame of that was asked for.
fn changes(free: usize) -> bool {
    let window = Window::new(MEMORY, MEMORY);
    let buddy = boot(&window, &[]);
    assert_eq!(unmovable(&buddy), 0, "blocks are movable at first");
    let mut held = Vec::new();
    while let Ok(frame) = buddy.alloc(&FrameRequest::ONE.movable()) {
        held.push(frame);
    }
    assert_eq!(buddy.recount().free + buddy.recount().cached, 0);
    // Of the first block a frame is reserved, and the tables are in the last.
    let (mut block, rest): (Vec<_>, Vec<OwnedFrame>) = held
        .into_iter()
        .partition(|frame| frame.first().number() / BLOCK == 1);
    assert_eq!(block.len() as u64, BLOCK);
    buddy.free_bulk(block.drain(..free));
    buddy.drain_local();
    let frame = buddy.alloc(&FrameRequest::ONE).unwrap();
    let changed = unmovable(&buddy) == 1;
    buddy.free_bulk(block.into_iter().chain(rest).chain([frame]));
    buddy.check().unwrap();
    changed
}

/// Source: Linux mm/page_alloc.c, `try_to_claim_block`: half of the block.
#[test]
fn a_block_that_is_free_by_half_becomes_the_type_that_asks() {
    assert!(!changes(255));
    assert!(changes(256));
}
