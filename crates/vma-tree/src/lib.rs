#![doc = include_str!("../README.md")]
#![no_std]

mod build;
mod check;
mod cursor;
mod edit;
mod finger;
mod gap;
mod iter;
mod list;
mod lock;
mod node;
mod path;
mod plant;
mod reserve;
mod shared;
mod stock;
mod store;
mod tree;
mod value;
mod view;

pub use build::BuildError;
pub use check::{Broken, TreeStats};
pub use cursor::{Cursor, CursorMut};
pub use finger::Finger;
pub use gap::{Gap, GapRequest, Usable};
pub use iter::Iter;
pub use lock::{Lockable, LookupError, SpaceSeq, VmaLock, VmaReadGuard};
pub use node::Node;
#[cfg(loom)]
pub use plant::{LockPlant, Plant};
pub use reserve::Reserved;
pub use shared::{Entries, ReadSection, Readers, SharedTree, Writer};
pub use stock::{Exclusive, Shared, Sharing};
pub use store::{Change, MergeRule, Neighbours, Removed};
pub use tree::RangeTree;
pub use value::{Entry, Mergeable, Value};
pub use view::{Dump, LayoutSvg, NodesSvg};
