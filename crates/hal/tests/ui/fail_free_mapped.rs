//! A frame that was mapped is nobody's to free.
use kmem_hal::{FrameHandle, FrameSink, OwnedFrame};

fn free_mapped(sink: &impl FrameSink, frame: OwnedFrame) {
    let _entry = frame.into_entry();
    sink.free(frame);
}

fn main() {}
