#![doc = include_str!("../README.md")]
#![no_std]

mod gap;
mod node;
mod tree;
mod value;

pub use gap::{Gap, GapRequest};
pub use node::Node;
pub use tree::{Iter, Neighbours, RangeTree, Reserved};
pub use value::{Entry, Mergeable, Value};
