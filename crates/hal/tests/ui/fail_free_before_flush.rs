//! What an entry held is numbers; only a flush, which is unsafe to claim, makes a frame of them.
use kmem_hal::{FrameHandle, FrameSink, OwnedFrame};

fn free_unflushed(sink: &impl FrameSink, frame: OwnedFrame) {
    let (first, order) = frame.into_entry();
    sink.free(OwnedFrame::from_entry(first, order));
}

fn main() {}
