#![doc = include_str!("../README.md")]

mod arena;
mod barrier;
mod heap;
mod idle;
mod lock;
mod ranges;
mod threads;

pub use arena::{Arena, ArenaError};
pub use barrier::HostBarrier;
pub use heap::{HostHeap, HostMemory};
pub use idle::IdleThreads;
pub use lock::HostLock;
pub use ranges::Ranges;
pub use threads::{HostGuard, MAX_THREADS, ThreadCpu};
