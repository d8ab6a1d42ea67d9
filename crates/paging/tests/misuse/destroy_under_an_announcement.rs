//! A table cannot be taken down while a change from outside waits for its flush.
//~ error[E0505]
//~ cannot move out of `table` because it is borrowed
use kmem_hal::{OwnedFrame, Page};
use kmem_paging::{Env, PageTable, format::X86_64};

fn misuse<E: Env>(table: PageTable<X86_64, E, OwnedFrame>, page: Page) {
    let announced = table.announce_foreign(page);
    table.destroy(|_, _| {}, |_, _| {});
    announced.commit();
}

fn main() {}
