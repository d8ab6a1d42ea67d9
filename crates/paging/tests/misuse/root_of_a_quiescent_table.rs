//! Nobody gets the root by way of the cursor that stores plainly.
//~ error[E0599]
//~ no method named `table` found
use kmem_hal::{OwnedFrame, PageRange, Root};
use kmem_paging::{Env, PageTable, format::X86_64};

fn misuse<E: Env>(mut table: PageTable<X86_64, E, OwnedFrame>, range: PageRange) -> Root {
    let quiescent = table.quiesce().unwrap();
    let cursor = quiescent.cursor(range).unwrap();
    cursor.table().root()
}

fn main() {}
