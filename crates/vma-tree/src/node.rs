//! The memory of one node.

use kmem_hal::sync::AtomicU64;

/// A node of a tree: `W` words, 256 bytes by default.
///
/// Opaque; named only so that an allocator can say `ObjectAlloc<Node>`.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Node<const W: usize = 32> {
    pub(crate) words: [AtomicU64; W],
}
