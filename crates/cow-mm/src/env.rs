//! What address spaces need of the machine, in one parameter.
//!
//! Page tables, frames, the MMU and grace periods come in through paging's environment; this trait adds the memory for
//! kmem's own objects and the lock that may sleep. One environment serves every address space of a kernel.

use kmem_hal::{ObjectAlloc, RawSleepLock};
use kmem_paging::Env as PagingEnv;
use kmem_paging::format::Format;
use kmem_vma_tree::Node;

use crate::object::Object;
use crate::vma::Vma;

/// The machine as address spaces see it.
///
/// # Safety
///
/// - `E1`: every call gives the same thing again, for as long as the environment exists.
/// - `E2`: the paging environment's frame table covers every frame that its source gives, and its map reaches them.
/// - `E3`: the environment stays where it is and outlives every space and object made with it.
pub unsafe trait Env: Sized {
    /// Page tables' environment.
    type Paging: PagingEnv;
    /// The format of user page tables.
    type Format: Format;
    /// Memory for nodes of the VMA tree and of page caches.
    type Nodes: ObjectAlloc<Node>;
    /// Memory for VMAs.
    type Vmas: ObjectAlloc<Vma>;
    /// Memory for the objects behind files and shared memory.
    type Objects: ObjectAlloc<Object<Self::Nodes, Self::Lock>>;
    /// The lock of an address space and of an object.
    type Lock: RawSleepLock;

    /// Page tables' environment.
    fn paging(&self) -> &Self::Paging;
    /// Memory for tree nodes.
    fn nodes(&self) -> &Self::Nodes;
    /// Memory for VMAs.
    fn vmas(&self) -> &Self::Vmas;
    /// Memory for objects.
    fn objects(&self) -> &Self::Objects;
}
