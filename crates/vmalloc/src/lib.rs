#![doc = include_str!("../README.md")]
#![no_std]

mod adopt;
mod alloc;
mod area;
mod batch;
mod fixmap;
mod info;
mod kmap;
mod layout;
mod linear;
mod local;
mod nodes;
mod page;
mod purge;
mod ready;
mod request;
mod stacks;
mod vmalloc;
mod window;

pub use adopt::adopt;
pub use alloc::DmaBuffer;
pub use area::AreaKind;
pub use batch::BATCH;
pub use fixmap::{FixMap, FixMapError};
pub use info::{AreaInfo, VmallocInfo};
pub use kmap::{KMAP_PAGES, Kmap, KmapError, KmapSlot};
pub use layout::{KernelLayout, KernelRegion};
pub use linear::{LinearMapped, map_linear};
pub use local::{LOCAL_DEPTH, LocalMap, LocalPage, LocalSlots};
pub use page::KernelPage;
pub use purge::LazyLimit;
pub use request::{DmaMask, NotAnArea, Request, VmallocError};
pub use stacks::{StackCache, StackSlots};
pub use vmalloc::Vmalloc;
