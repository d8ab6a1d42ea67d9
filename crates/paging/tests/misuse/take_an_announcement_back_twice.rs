//! An announcement of a change from outside is taken back once.
//~ error[E0382]
//~ use of moved value: `announced`
use kmem_hal::{OwnedFrame, Page};
use kmem_paging::{Env, PageTable, format::X86_64};

fn misuse<E: Env>(table: &PageTable<X86_64, E, OwnedFrame>, page: Page) {
    let announced = table.announce_foreign(page);
    announced.commit();
    announced.commit();
}

fn main() {}
