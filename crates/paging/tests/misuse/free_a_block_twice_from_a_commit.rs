//! The commit hands each block over once.
//~ error[E0382]
//~ use of moved value: `frame`
use kmem_hal::{FrameSink, OwnedFrame};
use kmem_paging::{Env, Gather, format::X86_64};

fn misuse<E: Env>(mut gather: Gather<'_, X86_64, E, OwnedFrame>, sink: &impl FrameSink) {
    gather.commit(|frame| {
        sink.free(frame);
        sink.free(frame);
    });
}

fn main() {}
