#![doc = include_str!("../README.md")]

mod arena;
mod barrier;
mod heap;
mod lock;
mod ranges;
mod threads;

pub use arena::{Arena, ArenaError};
pub use barrier::HostBarrier;
pub use heap::{HostHeap, HostMemory};
pub use lock::HostLock;
pub use ranges::Ranges;
pub use threads::{HostGuard, MAX_THREADS, ThreadCpu};
