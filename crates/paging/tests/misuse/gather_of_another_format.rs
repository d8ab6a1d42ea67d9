//! A gather of one format cannot take what a table of another gives.
//~ error[E0308]
//~ found `&mut Gather<
use kmem_hal::{OwnedFrame, PageRange};
use kmem_paging::{Cursor, Env, Gather, format::{X86_64, X86Pae}};

fn misuse<E: Env>(
    cursor: &mut Cursor<'_, X86_64, E, OwnedFrame>,
    range: PageRange,
    gather: &mut Gather<'_, X86Pae, E, OwnedFrame>,
) {
    let _ = cursor.unmap(range, gather);
}

fn main() {}
