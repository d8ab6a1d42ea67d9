//! A quiescent table cannot be taken down while a cursor is in it.
//~ error[E0505]
//~ cannot move out of `table` because it is borrowed
use kmem_hal::{OwnedFrame, PageRange};
use kmem_paging::{Env, PageTable, format::X86_64};

fn misuse<E: Env>(mut table: PageTable<X86_64, E, OwnedFrame>, range: PageRange) {
    let mut cursor = table.quiesce().unwrap().cursor(range).unwrap();
    table.destroy(|_, _| {}, |_, _| {});
    let _ = cursor.next_run();
}

fn main() {}
