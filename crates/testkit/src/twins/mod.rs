//! Readable textbook twins of kmem's algorithms: what a course shows, complete, small, slow.
//!
//! A twin is read first and trusted afterwards: it says in a page what the fast version must do, and serves as the reference
//! model of its tests. Each stands alone on the standard library.
//!
//! | twin | of | the textbook's name |
//! |---|---|---|
//! | [`ListBuddy`] | `kmem-buddy` | Knuth's buddy system with `free_area[11]` lists |
//! | [`BonwickCache`] | `kmem-slab` | Bonwick's slab allocator: empty, partial and full slabs, constructors, colours |
//! | [`LineCache`] | the processor's cache | sets, ways, tags, least recently used |
//! | [`ListVmas`], [`TreeVmas`] | `kmem-vma-tree` | the list of VMAs, and the red-black tree (as `BTreeMap`) |
//! | [`FlatMap`] | `kmem-paging` | the page table as one flat array |
//! | [`SpaceModel`] | `kmem-cow-mm` | processes that copy everything at fork |
//! | [`ClockCache`], [`Fifo`], [`Lru`], [`Optimal`] | cow-mm's reclaim | page replacement |

mod buddy;
mod cache;
mod page_map;
mod replacement;
mod slab;
mod space;
mod vma;

pub use buddy::ListBuddy;
pub use cache::LineCache;
pub use page_map::{FlatEntry, FlatMap};
pub use replacement::{ClockCache, Fifo, Lru, Optimal, Replacement, faults};
pub use slab::BonwickCache;
pub use space::{ProcessId, SpaceModel};
pub use vma::{ListVmas, RangeModel, TreeVmas};
