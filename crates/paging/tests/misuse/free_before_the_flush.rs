//! Unmapping gives no frame: only the commit of the gather does.
//~ error[E0308]
//~ expected `OwnedFrame`, found `u64`
use kmem_hal::{FrameSink, OwnedFrame, PageRange};
use kmem_paging::{Cursor, Env, Gather, format::X86_64};

fn misuse<E: Env>(
    cursor: &mut Cursor<'_, X86_64, E, OwnedFrame>,
    range: PageRange,
    gather: &mut Gather<'_, X86_64, E, OwnedFrame>,
    sink: &impl FrameSink,
) {
    let unmapped: u64 = cursor.unmap(range, gather).unwrap();
    sink.free(unmapped);
}

fn main() {}
