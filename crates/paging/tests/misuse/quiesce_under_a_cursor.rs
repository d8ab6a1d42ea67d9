//! A table is not quiescent while somebody has a live cursor in it.
//~ error[E0502]
//~ cannot borrow `table` as mutable because it is also borrowed as immutable
use kmem_hal::{OwnedFrame, PageRange};
use kmem_paging::{Env, PageTable, format::X86_64};

fn misuse<E: Env>(mut table: PageTable<X86_64, E, OwnedFrame>, range: PageRange) {
    let mut cursor = table.cursor(range).unwrap();
    let _ = table.quiesce();
    let _ = cursor.next_run();
}

fn main() {}
