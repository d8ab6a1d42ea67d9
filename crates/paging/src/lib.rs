#![doc = include_str!("../README.md")]
#![no_std]

mod asid;
mod attributes;
mod cache;
mod cursor;
mod dump;
mod env;
mod error;
mod fork;
pub mod format;
mod gather;
mod isolation;
mod locked;
#[cfg(kmem_mutants)]
pub mod mutants;
#[cfg(not(kmem_mutants))]
mod mutants;
mod node;
mod path;
mod quiescent;
mod table;
#[cfg(feature = "x86_64")]
mod x86_frames;

#[cfg(target_arch = "x86_64")]
pub use asid::X86Tlb;
pub use asid::{AsidArea, AsidMmu, NoKernelRoot};
pub use attributes::{Attributes, Leaf, MemoryType, Payload, Rights, Soft, SoftBit};
pub use cache::TableCache;
pub use cursor::UnshareStep;
pub use cursor::{
    Cleared, Cursor, Divisible, ForeignFlush, Harvest, Harvested, MapStopped, Replaced, Run,
};
pub use dump::{Dump, Graph};
pub use env::{Env, Parts};
pub use error::{
    ChangeError, ForkError, HugeError, MapError, MoveError, QuiesceError, RangeError, RootKnown,
    TableError, UnshareError,
};
pub use fork::{ForkItem, ForkStep};
pub use gather::{FLUSH_CEILING, Gather};
pub use locked::LockedEntry;
pub use path::{Path, Step};
pub use quiescent::{Live, Liveness, Quiescent, QuiescentTable};
pub use table::{Entry, PageTable};
#[cfg(feature = "x86_64")]
pub use x86_frames::FromX86Frames;
