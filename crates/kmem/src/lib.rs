#![doc = include_str!("../README.md")]
#![no_std]

// The book's chapters on coming here compile.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/boot.md")]
pub mod chapter_boot {}
#[cfg(doctest)]
#[doc = include_str!("../../../docs/migration.md")]
pub mod chapter_migration {}

pub mod boot;
mod explain;
mod heap;
mod large;
mod memory;
mod shrinkers;
mod table;

pub use explain::Explanation;
pub use heap::{Heap, SlabReport};
pub use large::LateLarge;
pub use memory::{Frames, InitError, Memory, SlabParts};
pub use shrinkers::Shrinkers;

#[doc(no_inline)]
pub use kmem_buddy::{
    BootMap, BootMapError, Buddy, Config, EarlyAllocator, FreeError, RegionKind, Reservation,
    ZoneKind, ZoneLimits,
};
#[doc(no_inline)]
pub use kmem_hal::{
    AllocError, Context, Cpu, CpuCall, Frame, FrameRange, FrameRequest, FrameSink, FrameSource,
    IrqSafe, Mobility, NodeId, NodePolicy, OffsetMap, Order, OwnedFrame, PhysAddr, PhysMap,
    Pressure, RawLock, SingleCpu, VirtAddr,
};
#[doc(no_inline)]
pub use kmem_slab::{Cache, Flags, SlabSystem};

/// Page-frame allocator.
#[doc(inline)]
pub use kmem_buddy as buddy;
/// Address spaces.
#[doc(inline)]
pub use kmem_cow_mm as cow_mm;
/// Addresses, frames, contracts: what a kernel implements.
#[doc(inline)]
pub use kmem_hal as hal;
/// Page tables.
#[doc(inline)]
pub use kmem_paging as paging;
/// Object caches and kmalloc.
#[doc(inline)]
pub use kmem_slab as slab;
/// Ordered ranges.
#[doc(inline)]
pub use kmem_vma_tree as vma_tree;
/// Kernel virtual mappings.
#[doc(inline)]
pub use kmem_vmalloc as vmalloc;
