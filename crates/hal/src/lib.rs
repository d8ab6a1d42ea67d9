#![doc = include_str!("../README.md")]
#![no_std]

mod addr;
mod cpu;
mod frame;
mod frame_table;
mod grace;
mod io;
pub mod lock;
mod mmu;
#[cfg(kmem_mutants)]
#[doc(hidden)]
pub mod mutants;
mod object;
mod owned;
mod page;
mod physmap;
mod platform;
mod source;
pub mod sync;
mod tlb;

pub use addr::{Canonical, PAGE_SHIFT, PAGE_SIZE, PhysAddr, VirtAddr};
pub use cpu::{Cpu, CpuCall, CpuCallError, CpuId, CpuSet, NoCpuCall, PerCpu, Pinned, SingleCpu};
pub use frame::{Blocks, Frame, FrameRange, Order};
pub use frame_table::{
    CountError, FrameSlot, FrameTable, FrameTag, SECTION_FRAMES, Section, SlabSlot, SlotFlags,
    SlotGuard, TableOwner, TableSlot, UserSlot,
};
#[cfg(loom)]
#[doc(hidden)]
pub use grace::Plant;
pub use grace::{
    Barrier, CallBarrier, Deferred, EpochArea, EpochGrace, EpochGuard, FullBarrier, Grace,
    SingleGrace, SingleGuard,
};
pub use io::{BlockDevice, IoError, IoState, IoTicket, PageProvider};
pub use lock::{IrqSafe, Lock, LockGuard, RawLock, RawSleepLock, SleepLock, Spin, SpinWait, Wait};
pub use mmu::{
    Access, Asid, Completion, FaultCode, FlushRequest, FlushScope, Mmu, PageFault, Root,
};
pub use object::{FixedPool, LargeSource, NoLarge, ObjectAlloc, Reserve};
pub use owned::{DeviceFrame, FrameHandle, OwnedFrame};
pub use page::{Page, PageRange};
pub use physmap::{OffsetMap, PhysMap};
pub use platform::{Clock, NoClock, NoRng, NoTrace, Rng, Trace, TraceEvent, UserAccess, UserFault};
pub use source::{
    AllocError, Context, FrameRequest, FrameSink, FrameSource, Migrate, MigrateError, Mobility,
    NoPressure, NodeId, NodePolicy, Pressure, PressureLevel, Shrink,
};
pub use sync::CachePadded;
pub use tlb::Tlb;
