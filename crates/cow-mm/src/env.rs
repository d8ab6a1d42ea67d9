//! What address spaces need of the machine, in one parameter.
//!
//! Page tables, frames, the MMU and grace periods come in through paging's environment; this trait adds the memory for
//! kmem's own objects and the lock that may sleep. One environment serves every address space of a kernel.

use core::marker::PhantomData;

use kmem_hal::{IoTicket, ObjectAlloc, RawSleepLock};
use kmem_paging::Env as PagingEnv;
use kmem_paging::format::Format;
use kmem_vma_tree::Node;

use crate::object::Object;
use crate::space::SpaceMemory;
use crate::vma_memory::VmaMemory;

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
    type Vmas: ObjectAlloc<VmaMemory>;
    /// Memory for the objects behind files and shared memory.
    type Objects: ObjectAlloc<Object<Self::Nodes, Self::Lock>>;
    /// Memory for address spaces.
    type Spaces: ObjectAlloc<SpaceMemory>;
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
    /// Memory for address spaces.
    fn spaces(&self) -> &Self::Spaces;

    /// Waits for I/O that a call cannot go on without; returns when the I/O of the ticket may be done, and the call asks its device then.
    ///
    /// A kernel with a scheduler lets the caller sleep here until the device interrupts. No lock is held that a fault of another space or a device
    /// needs. Where an object ends, no lock of a space, a mapping or a page is held.
    ///
    /// Calls that can be made again say what they wait for instead: faults, pins, `exec`, reads and writes of files.
    #[doc(alias = "io_schedule")]
    fn wait(&self, ticket: IoTicket) {
        spin(ticket);
    }
}

/// Waits without a scheduler.
fn spin(_: IoTicket) {
    kmem_hal::sync::spin_loop();
}

/// An [`Env`] of separate parts: values, or references to them.
///
/// See the crate's front page for one put together. `F` is the format of user page tables and `L` the lock.
#[derive(Debug)]
pub struct Parts<P, F, N, V, O, S, L> {
    paging: P,
    nodes: N,
    vmas: V,
    objects: O,
    spaces: S,
    wait: fn(IoTicket),
    kind: PhantomData<fn() -> (F, L)>,
}

impl<P, F, N, V, O, S, L> Parts<P, F, N, V, O, S, L> {
    /// Puts an environment together.
    ///
    /// # Safety
    ///
    /// `E2` of [`Env`] holds for `paging`, and the value is not moved once a space or object was made with it.
    pub const unsafe fn new(paging: P, nodes: N, vmas: V, objects: O, spaces: S) -> Self {
        Self {
            paging,
            nodes,
            vmas,
            objects,
            spaces,
            wait: spin,
            kind: PhantomData,
        }
    }

    /// The same with another way to [wait](Env::wait) for I/O.
    #[must_use]
    pub const fn with_wait(mut self, wait: fn(IoTicket)) -> Self {
        self.wait = wait;
        self
    }
}

// SAFETY: E1: fields never change; E2 and E3 were promised to `new`.
unsafe impl<P, F, N, V, O, S, L> Env for Parts<P, F, N, V, O, S, L>
where
    P: PagingEnv,
    F: Format,
    N: ObjectAlloc<Node>,
    V: ObjectAlloc<VmaMemory>,
    O: ObjectAlloc<Object<N, L>>,
    S: ObjectAlloc<SpaceMemory>,
    L: RawSleepLock,
{
    type Paging = P;
    type Format = F;
    type Nodes = N;
    type Vmas = V;
    type Objects = O;
    type Spaces = S;
    type Lock = L;

    fn paging(&self) -> &P {
        &self.paging
    }
    fn nodes(&self) -> &N {
        &self.nodes
    }
    fn vmas(&self) -> &V {
        &self.vmas
    }
    fn objects(&self) -> &O {
        &self.objects
    }
    fn spaces(&self) -> &S {
        &self.spaces
    }
    fn wait(&self, ticket: IoTicket) {
        (self.wait)(ticket);
    }
}
