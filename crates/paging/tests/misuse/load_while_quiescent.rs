//! Nobody gets the root to load it while a cursor stores plainly.
//~ error[E0502]
//~ cannot borrow `table` as immutable because it is also borrowed as mutable
use kmem_hal::{OwnedFrame, PageRange, Root};
use kmem_paging::{Env, PageTable, format::X86_64};

fn misuse<E: Env>(mut table: PageTable<X86_64, E, OwnedFrame>, range: PageRange) -> Root {
    let quiescent = table.quiesce().unwrap();
    let mut cursor = quiescent.cursor(range).unwrap();
    let root = table.root();
    let _ = cursor.next_run();
    root
}

fn main() {}
