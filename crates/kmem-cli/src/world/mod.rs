//! The machine and the memory manager on it, put together once and used by all commands.

pub mod provider;
