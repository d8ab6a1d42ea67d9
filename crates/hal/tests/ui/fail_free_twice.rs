//! A frame is freed once.
use kmem_hal::{FrameSink, OwnedFrame};

fn free_twice(sink: &impl FrameSink, frame: OwnedFrame) {
    sink.free(frame);
    sink.free(frame);
}

fn main() {}
