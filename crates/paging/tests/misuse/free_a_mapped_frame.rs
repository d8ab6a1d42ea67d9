//! A frame that was mapped is gone: it cannot be freed as well.
//~ error[E0382]
//~ use of moved value: `frame`
use kmem_hal::{FrameSink, OwnedFrame, Page};
use kmem_paging::{Cursor, Env, Rights, format::X86_64};

fn misuse<E: Env>(cursor: &mut Cursor<'_, X86_64, E, OwnedFrame>, page: Page, frame: OwnedFrame, sink: &impl FrameSink) {
    let _ = cursor.map(page, frame, Rights::USER_DATA);
    sink.free(frame);
}

fn main() {}
