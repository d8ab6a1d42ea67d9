#![doc = include_str!("../README.md")]
#![no_std]
#![cfg_attr(feature = "nightly", feature(allocator_api))]

#[cfg(any(
    feature = "allocator-api2-02",
    feature = "allocator-api2-04",
    feature = "nightly"
))]
mod api;
mod array;
mod block;
mod bulk;
mod cache;
mod class;
mod cpu;
mod depot;
mod direct;
mod fast;
mod flush;
mod geometry;
mod grow;
mod harden;
mod head;
mod info;
mod kmalloc;
mod meta;
mod misuse;
mod node;
mod own;
mod owners;
mod pages;
mod pending;
mod picture;
mod platform;
mod policy;
mod quarantine;
mod raw;
mod refill;
mod registry;
mod reuse;
mod row;
mod shrink;
mod slab;
mod slab_box;
mod system;
mod teardown;
mod users;
mod with_flags;

pub use cache::{Cache, Leaked};
pub use class::{CLASSES, LARGEST_CLASS, class_of, class_size};
pub use geometry::Geometry;
pub use info::{CacheInfo, SlabInfo, SlabTotals};
pub use kmalloc::Flags;
pub use misuse::Misuse;
pub use owners::{Owned, OwnerCount};
pub use picture::Picture;
pub use platform::{Parts, Platform};
pub use policy::{
    Check, Features, Guard, Owner, Plain, Poison, Policy, Quarantine, Redzone, Shuffle,
};
pub use reuse::{ReuseCache, Reused};
pub use slab_box::{Full, SlabBox};
pub use system::{InitError, SlabSystem};
pub use with_flags::WithFlags;

#[cfg(any(loom, shuttle))]
#[doc(hidden)]
pub mod model {
    //! What the loom and shuttle models take apart.
    pub use crate::array::{Array, ArrayStack};
    pub use crate::depot::Depot;
    pub use crate::head::{Busy, Head};
    pub use crate::pending::Pending;
    pub use crate::slab::Slab;
    pub use crate::users::Users;
}
