//! A gather of device frames cannot take what a table of owned frames gives.
//~ error[E0308]
//~ found `&mut Gather<
use kmem_hal::{DeviceFrame, OwnedFrame, PageRange};
use kmem_paging::{Cursor, Env, Gather, format::X86_64};

fn misuse<E: Env>(
    cursor: &mut Cursor<'_, X86_64, E, OwnedFrame>,
    range: PageRange,
    gather: &mut Gather<'_, X86_64, E, DeviceFrame>,
) {
    let _ = cursor.unmap(range, gather);
}

fn main() {}
