//! Which part stands in which place: all type parameters of the stack, named once.

use super::counted::Counted;
use kmem_buddy::Buddy;
use kmem_cow_mm::{AddressSpace, Mm, Object, SpaceMemory, VmaMemory};
use kmem_hal::{CachePadded, EpochArea, EpochGrace, FrameTable, NoLarge, NoPressure};
use kmem_mock_x86::{Machine, MachineLock, MachineSleepLock, Tracked};
use kmem_paging::PageTable;
use kmem_paging::format::X86_64;
use kmem_slab::{Cache, SlabSystem};
use kmem_vma_tree::Node;
use kmem_vmalloc::{KernelPage, Vmalloc};

/// The machine; it lives as long as the program.
pub type Mach = &'static Machine;
/// The page-frame allocator.
pub type Frames = Buddy<Mach, Mach, MachineLock, Mach, NoPressure>;
/// The allocator as everybody else gets it: counted, and watched by the machine.
pub type Source = Counted<Tracked<'static, &'static Frames>>;
/// What object caches stand on.
pub type SlabParts =
    kmem_slab::Parts<&'static Source, Mach, Mach, MachineLock, NoLarge, &'static FrameTable>;
/// The object caches.
pub type Slabs = SlabSystem<SlabParts>;
/// Grace periods by per-CPU epochs.
pub type Grace = EpochGrace<'static, Mach, MachineLock>;
/// One CPU's part of them.
pub type GraceArea = CachePadded<EpochArea<MachineLock>>;
/// What page tables stand on.
pub type PagingParts =
    kmem_paging::Parts<'static, Mach, &'static Source, Mach, &'static Grace, Mach>;
/// The kernel's own tables: the map of all memory, which owns none of it, and vmalloc's areas.
pub type KernelTable = PageTable<X86_64, &'static PagingParts, KernelPage>;
/// Kernel virtual mappings.
pub type KernelAreas = Vmalloc<'static, X86_64, &'static PagingParts, Nodes, MachineLock>;
/// A cache of tree nodes.
pub type Nodes = Cache<'static, Node, SlabParts, true>;
/// A cache of VMAs.
pub type Vmas = Cache<'static, VmaMemory, SlabParts>;
/// The objects behind files and shared memory.
pub type MmObject = Object<Nodes, MachineSleepLock>;
/// A cache of them.
pub type Objects = Cache<'static, MmObject, SlabParts>;
/// A cache of address spaces.
pub type Spaces = Cache<'static, SpaceMemory, SlabParts>;
/// What all address spaces share.
pub type SharedMm = Mm<'static, Env>;
/// One address space.
pub type Space = AddressSpace<'static, Env>;

/// What address spaces stand on.
pub struct Env {
    /// Page tables' parts.
    pub paging: &'static PagingParts,
    /// Tree nodes.
    pub nodes: Nodes,
    /// VMAs.
    pub vmas: Vmas,
    /// Objects behind files.
    pub objects: Objects,
    /// Address spaces.
    pub spaces: Spaces,
}

// SAFETY: E1: fields never change; E2: the world's frame table covers all of the machine's memory, and its map reaches it;
// E3: the world puts the environment behind a `&'static`.
unsafe impl kmem_cow_mm::Env for Env {
    type Paging = PagingParts;
    type Format = X86_64;
    type Nodes = Nodes;
    type Vmas = Vmas;
    type Objects = Objects;
    type Spaces = Spaces;
    type Lock = MachineSleepLock;

    fn paging(&self) -> &PagingParts {
        self.paging
    }

    fn nodes(&self) -> &Nodes {
        &self.nodes
    }

    fn vmas(&self) -> &Vmas {
        &self.vmas
    }

    fn objects(&self) -> &Objects {
        &self.objects
    }

    fn spaces(&self) -> &Spaces {
        &self.spaces
    }
}
