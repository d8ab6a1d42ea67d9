#![doc = include_str!("../README.md")]
#![no_std]

mod build;
mod check;
mod edit;
mod gap;
mod iter;
mod list;
mod node;
mod path;
mod stock;
mod store;
mod tree;
mod value;

pub use build::BuildError;
pub use check::{Broken, TreeStats};
pub use gap::{Gap, GapRequest, Usable};
pub use iter::Iter;
pub use node::Node;
pub use stock::{Exclusive, Shared, Sharing};
pub use store::{Change, MergeRule, Neighbours, Removed, Reserved};
pub use tree::RangeTree;
pub use value::{Entry, Mergeable, Value};
