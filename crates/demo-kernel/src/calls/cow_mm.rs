//! The calls of `kmem-cow-mm`, on four-level tables, with objects from fixed pools.

use core::fmt::Write;

use kmem_cow_mm::{
    AddressSpace, Advice, Env, Errno, ExecError, Image, Layout, LockAll, MapRequest, Mm, Object,
    Outcome, PagemapEntry, Prot, RemapFlags, SpaceMemory, Start, Status, Usage, VmaMemory,
};
use kmem_hal::lock::SpinWait;
use kmem_hal::{FaultCode, FixedPool, Page, PageFault, UserFault, VirtAddr};
use kmem_paging::format::X86_64;
use kmem_vma_tree::Node;

use crate::calls;
use crate::paging::Machine;

pub struct World {
    paging: Machine,
    nodes: FixedPool<Node, 64>,
    vmas: FixedPool<VmaMemory, 64>,
    objects: FixedPool<Object<FixedPool<Node, 64>, SpinWait>, 64>,
    spaces: FixedPool<SpaceMemory, 64>,
}

// SAFETY: E1 to E3: fields never change; nothing is ever run.
unsafe impl Env for World {
    type Paging = Machine;
    type Format = X86_64;
    type Nodes = FixedPool<Node, 64>;
    type Vmas = FixedPool<VmaMemory, 64>;
    type Objects = FixedPool<Object<FixedPool<Node, 64>, SpinWait>, 64>;
    type Spaces = FixedPool<SpaceMemory, 64>;
    type Lock = SpinWait;

    fn paging(&self) -> &Machine {
        &self.paging
    }
    fn nodes(&self) -> &Self::Nodes {
        &self.nodes
    }
    fn vmas(&self) -> &Self::Vmas {
        &self.vmas
    }
    fn objects(&self) -> &Self::Objects {
        &self.objects
    }
    fn spaces(&self) -> &Self::Spaces {
        &self.spaces
    }
}

type Space = AddressSpace<'static, World>;

calls! {
    call_cow_mm_mm_new(world: &'static World) -> Result<Mm<'static, World>, Errno> { Mm::new(world) }
    call_cow_mm_space_new(mm: &'static Mm<'static, World>, layout: Layout) -> Result<Space, Errno> {
        Space::new(mm, layout)
    }
    call_cow_mm_fault(space: &Space, fault: &PageFault) -> Outcome { space.fault(fault) }
    call_cow_mm_mmap(space: &Space, request: &MapRequest) -> Result<VirtAddr, Errno> { space.mmap(request) }
    call_cow_mm_munmap(space: &Space, start: u64, length: u64) -> Result<(), Errno> { space.munmap(start, length) }
    call_cow_mm_mprotect(space: &Space, start: u64, length: u64, prot: Prot) -> Result<(), Errno> {
        space.mprotect(start, length, prot)
    }
    call_cow_mm_mremap(space: &Space, old: [u64; 3], flags: RemapFlags, to: u64) -> Result<u64, Errno> {
        space.mremap(old[0], old[1], old[2], flags, to)
    }
    call_cow_mm_madvise(space: &Space, start: u64, length: u64, advice: Advice) -> Result<(), Errno> {
        space.madvise(start, length, advice)
    }
    call_cow_mm_mlock(space: &Space, start: u64, length: u64) -> Result<(), Errno> { space.mlock(start, length) }
    call_cow_mm_mlockall(space: &Space, flags: LockAll) -> Result<(), Errno> { space.mlockall(flags) }
    call_cow_mm_pkey_mprotect(space: &Space, start: u64, length: u64, prot: Prot, key: i32) -> Result<(), Errno> {
        space.pkey_mprotect(start, length, prot, key)
    }
    call_cow_mm_set_anon_name(space: &Space, start: u64, length: u64, name: &[u8]) -> Result<(), Errno> {
        space.set_anon_name(start, length, Some(name))
    }
    call_cow_mm_explain_fault(space: &Space, address: VirtAddr, code: FaultCode, to: &mut dyn Write) -> core::fmt::Result {
        write!(to, "{}", space.explain_fault(address, code))
    }
    call_cow_mm_smaps(space: &Space, to: &mut dyn Write) -> core::fmt::Result { write!(to, "{}", space.smaps()) }
    call_cow_mm_status(space: &Space) -> Status { space.status() }
    call_cow_mm_pagemap(space: &Space, first: Page, entries: &mut [PagemapEntry]) -> usize {
        space.pagemap(first, entries)
    }
    call_cow_mm_msync(space: &Space, start: u64, length: u64) -> Result<(), Errno> { space.msync(start, length) }
    call_cow_mm_brk(space: &Space, end: u64) -> u64 { space.brk(end) }
    call_cow_mm_fork(space: &Space) -> Result<Space, Errno> { space.fork() }
    call_cow_mm_exec(space: &Space, image: &Image<'_>) -> Result<Start, ExecError> { space.exec(image) }
    call_cow_mm_read_memory(space: &Space, from: VirtAddr, to: &mut [u8]) -> Result<(), UserFault> {
        space.read_memory(from, to)
    }
    call_cow_mm_write_memory(space: &Space, to: VirtAddr, from: &[u8]) -> Result<(), UserFault> {
        space.write_memory(to, from)
    }
    call_cow_mm_recount(space: &Space) -> Usage { space.recount() }
    call_cow_mm_exit(space: Space) { space.exit() }
}
