//! A leaf that was found says which frame it maps; it does not own it.
//~ error[E0308]
//~ expected `OwnedFrame`, found `Frame`
use kmem_hal::{FrameSink, OwnedFrame, Page};
use kmem_paging::{Env, PageTable, format::X86_64};

fn misuse<E: Env>(table: &PageTable<X86_64, E, OwnedFrame>, page: Page, sink: &impl FrameSink) {
    if let Some(leaf) = table.query(page).leaf() {
        sink.free(leaf.frame);
    }
}

fn main() {}
