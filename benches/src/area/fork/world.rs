//! What kmem's side of the workloads runs on: a whole machine of its own, and a process there.

use kmem_cow_mm::{
    AddressSpace, Env, Layout, MapRequest, Mm, Object, Outcome, Prot, SpaceMemory, VmaMemory,
};
use kmem_hal::{FaultCode, Frame, Page, PageFault, SpinWait, VirtAddr};
use kmem_paging::Parts;
use kmem_paging::format::X86_64;
use kmem_slab::Cache;
use kmem_vma_tree::Node;

use super::PAGE;
use crate::platform::{
    HostBuddy, HostGrace, Machine, NoWalks, Region, SlabParts, ThreadCpus, grace,
};

pub(super) type Paging =
    Parts<'static, &'static Region, &'static HostBuddy, NoWalks, &'static HostGrace, ThreadCpus>;
pub(super) type Nodes = Cache<'static, Node, SlabParts>;
pub(super) type Objects = Cache<'static, Object<Nodes, SpinWait>, SlabParts>;
pub(super) type Spaces = Cache<'static, SpaceMemory, SlabParts>;
pub(super) type Space = AddressSpace<'static, World>;

/// What address spaces need: kmem's own stack over one region.
#[derive(Debug)]
pub struct World {
    pub(super) machine: &'static Machine,
    paging: Paging,
    nodes: Nodes,
    vmas: Cache<'static, VmaMemory, SlabParts>,
    objects: Objects,
    spaces: Spaces,
}

// SAFETY: E1: fields never change; E2: table and map cover the machine's region; E3: worlds are leaked.
unsafe impl Env for World {
    type Paging = Paging;
    type Format = X86_64;
    type Nodes = Nodes;
    type Vmas = Cache<'static, VmaMemory, SlabParts>;
    type Objects = Objects;
    type Spaces = Spaces;
    type Lock = SpinWait;

    fn paging(&self) -> &Paging {
        &self.paging
    }
    fn nodes(&self) -> &Nodes {
        &self.nodes
    }
    fn vmas(&self) -> &Self::Vmas {
        &self.vmas
    }
    fn objects(&self) -> &Objects {
        &self.objects
    }
    fn spaces(&self) -> &Spaces {
        &self.spaces
    }
}

impl World {
    pub(super) fn leak(region: Region) -> &'static Mm<'static, Self> {
        let machine = Machine::leak(region);
        // SAFETY: the machine's only frame table, and no MMU walks.
        let paging = unsafe {
            Parts::new(
                machine.region,
                machine.buddy,
                NoWalks,
                grace(),
                ThreadCpus::all(),
                machine.table,
            )
        };
        let world: &'static Self = Box::leak(Box::new(Self {
            machine,
            paging,
            nodes: Cache::new(&machine.slab, "vma_node"),
            vmas: Cache::new(&machine.slab, "vma"),
            objects: Cache::new(&machine.slab, "object"),
            spaces: Cache::new(&machine.slab, "mm_struct"),
        }));
        Box::leak(Box::new(Mm::new(world).expect("memory for the zero page")))
    }
}

/// Memory management of kmem's over a region; it lives for ever.
///
/// # Panics
///
/// Where it does not start.
#[must_use]
pub fn mm(region: Region) -> &'static Mm<'static, World> {
    World::leak(region)
}

/// A process of kmem's: a space with one anonymous mapping.
#[derive(Debug)]
pub struct Process {
    pub(super) space: Space,
    pub(super) start: u64,
    pub(super) pages: u64,
}

impl Process {
    /// A process that has touched nothing.
    ///
    /// # Panics
    ///
    /// Without memory for its root.
    #[must_use]
    pub fn new(mm: &'static Mm<'static, World>, pages: u64) -> Self {
        let space = AddressSpace::new(mm, Layout::x86_64()).expect("memory for a root");
        let request = MapRequest::anonymous(pages * PAGE, Prot::READ | Prot::WRITE);
        let start = space.mmap(&request).expect("room for a mapping").as_u64();
        Self {
            space,
            start,
            pages,
        }
    }

    /// A process that has written to all of its `pages` pages.
    ///
    /// # Panics
    ///
    /// Without memory for them.
    #[must_use]
    pub fn touched(mm: &'static Mm<'static, World>, pages: u64) -> Self {
        let process = Self::new(mm, pages);
        process.write(0..pages, FaultCode::empty());
        process.check();
        process
    }

    /// A write fault at each of these pages.
    #[inline]
    pub fn write(&self, pages: impl Iterator<Item = u64>, present: FaultCode) {
        for page in pages {
            let outcome = self.space.fault(&PageFault {
                address: VirtAddr::new(self.start + page * PAGE),
                code: FaultCode::WRITE | FaultCode::USER | present,
            });
            assert_eq!(outcome, Outcome::Handled);
        }
    }

    /// A child.
    ///
    /// # Panics
    ///
    /// Without memory for its tables.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self {
            space: self.space.fork().expect("memory for a child"),
            start: self.start,
            pages: self.pages,
        }
    }

    /// All pages are there.
    pub fn check(&self) {
        let table = self.space.page_tables();
        for page in (0..self.pages).step_by((self.pages / 64).max(1) as usize) {
            let page = Page::containing(VirtAddr::new(self.start + page * PAGE));
            assert!(table.query(page).leaf().is_some(), "a page is missing");
        }
    }

    pub(super) fn frame(&self, page: u64) -> Option<Frame> {
        let page = Page::containing(VirtAddr::new(self.start + page * PAGE));
        Some(self.space.page_tables().query(page).leaf()?.frame)
    }
}
