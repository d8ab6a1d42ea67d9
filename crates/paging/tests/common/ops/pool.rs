// The frames that a run maps: nobody has memory for them, and none is out twice.

use std::collections::BTreeMap;

use kmem_hal::{Frame, Order, OwnedFrame};

/// Frames that nobody has memory for: only their ownership is watched.
#[derive(Default)]
pub(super) struct Pool {
    /// First frame and count of each run that is out.
    pub(super) out: BTreeMap<u64, u64>,
    pub(super) free: BTreeMap<u8, Vec<u64>>,
    pub(super) next: u64,
}

impl Pool {
    pub(super) fn alloc(&mut self, order: Order) -> OwnedFrame {
        let count = order.frames();
        let first = self
            .free
            .entry(order.get())
            .or_default()
            .pop()
            .unwrap_or_else(|| {
                let first = self.next.max(0x1_0000).next_multiple_of(count);
                self.next = first + count;
                first
            });
        self.out.insert(first, count);
        // SAFETY: O1: the pool gives a number to one owner at a time, and nobody reads such memory.
        unsafe { OwnedFrame::from_raw(Frame::from_number(first), order) }
    }

    pub(super) fn free(&mut self, frame: OwnedFrame) {
        // A part of what was given, or several neighbours that a merged leaf made one.
        let (first, end) = (frame.first().number(), frame.range().end_number());
        let mut at = first;
        while at < end {
            let (&start, &length) = self.out.range(..=at).next_back().expect("freed by nobody");
            let stop = end.min(start + length);
            assert!(at < stop, "freed twice: {frame:?}");
            self.out.remove(&start);
            if start < at {
                self.out.insert(start, at - start);
            }
            if stop < start + length {
                self.out.insert(stop, start + length - stop);
            }
            at = stop;
        }
        self.free
            .entry(frame.order().get())
            .or_default()
            .push(first);
        let _ = frame.into_raw();
    }
}
