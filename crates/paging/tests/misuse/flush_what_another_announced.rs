//! Only who announced a change from outside takes it back: there is nothing to call without the value.
//~ error[E0599]
//~ no method named `flush_foreign` found
use kmem_hal::{OwnedFrame, Page};
use kmem_paging::{Env, PageTable, format::X86_64};

fn misuse<E: Env>(table: &PageTable<X86_64, E, OwnedFrame>, page: Page) {
    table.flush_foreign(page);
}

fn main() {}
