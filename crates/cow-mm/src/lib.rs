#![doc = include_str!("../README.md")]
#![no_std]

mod brk;
mod env;
mod errno;
mod exec;
mod fault;
mod flags;
mod fork;
mod handle;
mod layout;
mod madvise;
mod maps;
pub mod merge;
mod mm;
mod mmap;
mod mremap;
mod munmap;
mod object;
mod place;
#[allow(dead_code, reason = "reverse maps walk it")]
mod registry;
mod space;
mod tables;
mod user;
mod vma;
mod vma_set;

pub use env::{Env, Parts};
pub use errno::Errno;
pub use exec::{ExecError, Image, Start};
pub use fault::{Outcome, Signal};
pub use flags::{Advice, MapFlags, Prot, RemapFlags, VmFlags};
pub use fork::LEVEL2_FROM;
pub use handle::Handle;
pub use layout::{Layout, MAX_MAP_COUNT, STACK_GUARD_PAGES, mmap_base};
pub use maps::{Maps, permissions};
pub use mm::{Mm, PageRef};
pub use mmap::{MapRequest, OpenFile};
pub use object::{Borrowed, FileRef, Object, ObjectInfo};
pub use space::{AddressSpace, Brk, Limits, SpaceMemory, State, Usage};
pub use vma::{AnonLink, Label, Vma};
