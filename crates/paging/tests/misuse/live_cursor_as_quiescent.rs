//! A cursor over a live table is not one that may store plainly.
//~ error[E0308]
//~ expected struct `kmem_paging::Cursor<'t, _, _, _, Quiescent>`
//~    found struct `kmem_paging::Cursor<'_, _, _, _, Live>`
use kmem_hal::{OwnedFrame, PageRange};
use kmem_paging::{Cursor, Env, PageTable, Quiescent, format::X86_64};

fn misuse<'t, E: Env>(
    table: &'t PageTable<X86_64, E, OwnedFrame>,
    range: PageRange,
) -> Cursor<'t, X86_64, E, OwnedFrame, Quiescent> {
    table.cursor(range).unwrap()
}

fn main() {}
