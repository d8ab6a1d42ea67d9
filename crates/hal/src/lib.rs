//! What a kernel implements and what the kmem crates share: addresses, frames, traits, sync facade.
#![no_std]
