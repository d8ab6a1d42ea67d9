#![doc = include_str!("../README.md")]
#![no_std]

mod area;
mod fixmap;
mod info;
mod layout;
mod page;
mod purge;
mod vmalloc;

pub use area::AreaKind;
pub use fixmap::{FixMap, FixMapError};
pub use info::VmallocInfo;
pub use layout::KernelLayout;
pub use page::KernelPage;
pub use purge::{LAZY, LAZY_PAGES};
pub use vmalloc::{NotAnArea, Request, Vmalloc, VmallocError};
