//! A frame has one owner.
use kmem_hal::OwnedFrame;

fn clone(frame: &OwnedFrame) -> OwnedFrame {
    frame.clone()
}

fn main() {}
