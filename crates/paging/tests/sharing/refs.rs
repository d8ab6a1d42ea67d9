//! References to pages: each is counted, and the counts tell at the end whether one was lost or left.

use std::cell::RefCell;
use std::collections::HashMap;

use kmem_hal::{DeviceFrame, Frame, FrameHandle, Order};
use kmem_paging::{Divisible, ForkItem, Leaf, UnshareStep};

thread_local! {
    /// References by frame.
    pub(super) static COUNTS: RefCell<HashMap<u64, u32>> = RefCell::default();
}

/// A reference to each page of a block.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Ref(pub(super) u64, Order);

impl Ref {
    pub(super) fn new(frame: u64) -> Self {
        Self::block(frame, Order::ZERO)
    }

    pub(super) fn block(frame: u64, order: Order) -> Self {
        COUNTS.with_borrow_mut(|counts| {
            for frame in frame..frame + order.frames() {
                *counts.entry(frame).or_default() += 1;
            }
        });
        Self(frame, order)
    }

    /// Another reference to what a leaf maps.
    pub(super) fn to(leaf: &Leaf) -> Self {
        Self::block(leaf.frame.number(), leaf.order)
    }

    /// What a copy of a shared table gets of each entry.
    pub(super) fn copied(item: ForkItem) -> UnshareStep<Self> {
        match item {
            ForkItem::Leaf(leaf) => UnshareStep::Protected(Self::to(&leaf)),
            ForkItem::Payload(..) => UnshareStep::Payload,
        }
    }

    pub(super) fn give_back(self) {
        COUNTS.with_borrow_mut(|counts| {
            for frame in self.0..self.0 + self.1.frames() {
                let count = counts.get_mut(&frame).expect("it is counted");
                *count -= 1;
                if *count == 0 {
                    counts.remove(&frame);
                }
            }
        });
    }
}

// SAFETY: H1, H2: the counts pass through the numbers; blocks are aligned.
unsafe impl FrameHandle for Ref {
    fn into_entry(self) -> (Frame, Order) {
        DeviceFrame::new(Frame::from_number(self.0), self.1)
            .expect("aligned")
            .into_entry()
    }
    unsafe fn from_entry(first: Frame, order: Order) -> Self {
        Self(first.number(), order)
    }
}

// SAFETY: D1: each page of a block is counted by itself.
unsafe impl Divisible for Ref {}
