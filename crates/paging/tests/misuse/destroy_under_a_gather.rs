//! A table cannot be taken down while a gather waits for its flush.
//~ error[E0505]
//~ cannot move out of `table` because it is borrowed
use kmem_hal::OwnedFrame;
use kmem_paging::{Env, PageTable, format::X86_64};

fn misuse<E: Env>(table: PageTable<X86_64, E, OwnedFrame>) {
    let mut gather = table.gather::<8>();
    table.destroy(|_, _| {}, |_, _| {});
    gather.commit(drop);
}

fn main() {}
