//! kmem on the host, as the workloads use it: memory, CPUs, frames, a heap.
//!
//! ```text
//!   physical   4 GiB ......................... + size      all of it in one NORMAL zone
//!                 [ mmap'd, committed when touched ]       Region
//! ```
//!
//! Threads play CPUs by a number in a thread-local variable, which is what a kernel's per-CPU register costs or a little more. One
//! thread at a time has each number ([`run_as`]). The checks of the mock machine are not here: this is for measuring.

use std::cell::Cell;

use kmem_buddy::{BootMap, Buddy, Config, RegionKind};
use kmem_hal::{
    CachePadded, Cpu, CpuId, EpochArea, EpochGrace, FlushRequest, Frame, FrameRange, FrameRequest,
    FrameSink, FrameSlot, FrameSource, FrameTable, Mmu, NoLarge, Order, OwnedFrame, PhysAddr,
    PhysMap, Root, SECTION_FRAMES, Section, Spin,
};
use kmem_host::HostBarrier;
use kmem_slab::{Parts, Plain, Policy, SlabSystem};

use crate::mixed::Frames;

/// Where a [`Region`] begins in the physical address space, in frames: 4 GiB.
pub const BASE: u64 = 1 << 20;

/// Host memory that plays physical memory from [`BASE`] on.
#[derive(Debug)]
pub struct Region {
    mapped: *mut libc::c_void,
    length: usize,
    base: *mut u8,
    frames: u64,
}

// SAFETY: plain memory; whoever owns a frame owns its bytes.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

const ALIGN: usize = 1 << 21;

impl Region {
    /// So many frames, zero, committed by the host when touched, aligned to 2 MiB.
    ///
    /// # Panics
    ///
    /// Where the host has no such range of addresses.
    #[must_use]
    pub fn new(frames: u64) -> Self {
        let length = (frames as usize) * 4096 + ALIGN;
        // SAFETY: a new mapping that nothing else uses.
        let mapped = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        assert_ne!(mapped, libc::MAP_FAILED, "no room for {frames} frames");
        // A fork of this process, where one is measured, is not to copy what belongs to other workloads.
        // SAFETY: the mapping just made; no child uses it.
        let advised = unsafe { libc::madvise(mapped, length, libc::MADV_DONTFORK) };
        assert_eq!(advised, 0, "the host knows MADV_DONTFORK");
        let base = mapped.cast::<u8>();
        // SAFETY: `ALIGN` bytes more than needed are mapped.
        let base = unsafe { base.add(base.align_offset(ALIGN)) };
        base.expose_provenance();
        Self {
            mapped,
            length,
            base,
            frames,
        }
    }

    /// A region that lives for ever.
    #[must_use]
    pub fn leak(frames: u64) -> &'static Self {
        Box::leak(Box::new(Self::new(frames)))
    }

    /// Asks the host to map it in pages of 2 MiB, as kernels map their memory (x86-64 Linux's direct map has 2 MiB and 1 GiB pages).
    ///
    /// Advice: a host that does not have them, or not now, maps it as before.
    #[must_use]
    pub fn huge(self) -> Self {
        // SAFETY: advice on the own mapping; it changes no byte.
        unsafe { libc::madvise(self.base.cast(), self.bytes(), libc::MADV_HUGEPAGE) };
        self
    }

    /// Commits all of it now, so that no page fault of the host is measured later.
    #[must_use]
    pub fn touched(self) -> Self {
        for frame in 0..self.frames {
            // SAFETY: inside the region, which is not shared yet.
            unsafe { self.base.add(frame as usize * 4096).write_volatile(0) };
        }
        self
    }

    /// Its first byte.
    #[must_use]
    pub fn base(&self) -> *mut u8 {
        self.base
    }

    /// Its size in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.frames as usize * 4096
    }

    /// Its frames.
    #[must_use]
    pub fn range(&self) -> FrameRange {
        FrameRange::from_numbers(BASE, BASE + self.frames).expect("it ends inside the space")
    }

    /// A boot map in which all of it is usable.
    #[must_use]
    pub fn boot_map(&self) -> BootMap {
        let mut map = BootMap::new();
        map.push(
            self.range().first().start(),
            self.bytes() as u64,
            RegionKind::Usable,
        )
        .expect("one entry fits");
        map
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`; nobody uses it any more.
        unsafe { libc::munmap(self.mapped, self.length) };
    }
}

// SAFETY: P1 to P5: one mapping at a fixed offset for as long as the region lives.
unsafe impl PhysMap for Region {
    fn reach(&self) -> FrameRange {
        self.range()
    }
    #[inline]
    fn to_ptr(&self, address: PhysAddr) -> *mut u8 {
        self.base
            .wrapping_add((address.as_u64() - BASE * 4096) as usize)
    }
    #[inline]
    fn to_phys(&self, pointer: *const u8) -> PhysAddr {
        PhysAddr::new(pointer as u64 - self.base as u64 + BASE * 4096)
    }
}

thread_local! {
    static CPU: Cell<u32> = const { Cell::new(0) };
}

/// Threads as CPUs.
#[derive(Clone, Copy, Debug)]
pub struct ThreadCpus(u32);

impl ThreadCpus {
    /// The CPUs of every machine here.
    #[must_use]
    pub const fn all() -> Self {
        Self(CPUS)
    }
}

/// The calling thread is CPU `cpu` from now on, of every machine; no other thread is at the same time.
pub fn run_as(cpu: usize) {
    CPU.set(cpu as u32);
}

/// The CPU that the calling thread plays.
#[must_use]
pub fn this_cpu() -> usize {
    CPU.get() as usize
}

// SAFETY: C1 to C5: a thread keeps its number, and `run_as` demands that no other has it; threads are joined before a number is
// given again.
unsafe impl Cpu for ThreadCpus {
    type Guard<'a> = ();
    #[inline]
    fn raw_pin(&self) {}
    #[inline]
    fn id(&self, _guard: &()) -> CpuId {
        CpuId::new(CPU.get())
    }
    fn count(&self) -> u32 {
        self.0
    }
}

/// CPUs of every machine here.
pub const CPUS: u32 = 2;

/// The page-frame allocator that the workloads use.
pub type HostBuddy = Buddy<&'static Region, ThreadCpus, Spin>;

/// A page-frame allocator over a new region of so many frames.
///
/// # Panics
///
/// Where it does not start.
#[must_use]
pub fn buddy(region: &'static Region) -> &'static HostBuddy {
    let buddy = Box::leak(Box::new(HostBuddy::new(region, ThreadCpus::all())));
    // The last frame can be had, as with the peers, which have no watermarks.
    // SAFETY: X1: the memory is this run's alone, and only this allocator has it.
    unsafe { buddy.init(&mut region.boot_map(), &Config::new().min_free_kib(0)) }
        .expect("buddy starts");
    buddy
}

impl Frames for HostBuddy {
    #[inline(always)]
    fn alloc(&self, order: u8) -> Option<u64> {
        let order = Order::new(order)?;
        let frame = FrameSource::alloc(self, &FrameRequest::new(order)).ok()?;
        Some(frame.into_raw().0.number())
    }
    #[inline(always)]
    fn free(&self, frame: u64, order: u8) {
        let order = Order::new(order).expect("an order that was allocated");
        // SAFETY: O1 to O3: the workload owns the block that `alloc` gave, and nothing maps it.
        FrameSink::free(self, unsafe {
            OwnedFrame::from_raw(Frame::from_number(frame), order)
        });
    }
    fn alloc_frame(&self, movable: bool) -> Option<u64> {
        let request = if movable {
            FrameRequest::ONE.movable()
        } else {
            FrameRequest::ONE
        };
        let frame = FrameSource::alloc(self, &request).ok()?;
        Some(frame.into_raw().0.number())
    }
    fn alloc_batch(&self, out: &mut Vec<u64>, count: usize) -> usize {
        let give = |frame: OwnedFrame| out.push(frame.into_raw().0.number());
        self.alloc_bulk(&FrameRequest::ONE, count, give)
            .unwrap_or(0)
    }
    fn free_batch(&self, frames: &mut Vec<u64>) {
        // SAFETY: as in `free`.
        let block = |frame| unsafe { OwnedFrame::from_raw(Frame::from_number(frame), Order::ZERO) };
        self.free_bulk(frames.drain(..).rev().map(block));
    }
    fn settle(&self) {
        self.drain_local();
    }
}

/// Slots for the frames of a region.
#[must_use]
pub fn frame_table(region: &Region) -> &'static FrameTable {
    let sections = region.range().end_number().div_ceil(SECTION_FRAMES);
    let first = BASE / SECTION_FRAMES;
    let directory: &'static [Section] =
        Box::leak((0..sections).map(|_| Section::absent()).collect());
    for section in &directory[first as usize..] {
        section.set_ready(Box::leak(
            (0..SECTION_FRAMES).map(|_| FrameSlot::new()).collect(),
        ));
    }
    let table = Box::leak(Box::new(FrameTable::new()));
    table.init(directory);
    table
}

/// The parts of [`HostSlab`].
pub type SlabParts = PolicyParts<Plain>;

/// The same with a hardening policy.
pub type PolicyParts<H> =
    Parts<&'static HostBuddy, &'static Region, ThreadCpus, Spin, NoLarge, &'static FrameTable, H>;

/// The slab system that the workloads use.
pub type HostSlab = SlabSystem<SlabParts>;

/// Frames and slab over one region: kmem's own stack.
#[derive(Debug)]
pub struct Machine {
    /// The memory.
    pub region: &'static Region,
    /// Its frames.
    pub buddy: &'static HostBuddy,
    /// Its slots.
    pub table: &'static FrameTable,
    /// Its heap.
    pub slab: HostSlab,
}

impl Machine {
    /// A machine over this memory; it lives for ever.
    ///
    /// # Panics
    ///
    /// Where it does not start.
    #[must_use]
    pub fn leak(region: Region) -> &'static Self {
        let region: &'static Region = Box::leak(Box::new(region));
        let buddy = buddy(region);
        let table = frame_table(region);
        let machine = Box::leak(Box::new(Self {
            region,
            buddy,
            table,
            slab: SlabSystem::new(),
        }));
        // SAFETY: S2, S3: table and map cover the region, and only its allocator's owners write slots.
        let parts = unsafe { Parts::new(buddy, region, ThreadCpus::all(), table) };
        machine.slab.init(parts).expect("slab starts");
        for cpu in 1..CPUS {
            machine
                .slab
                .cpu_online(CpuId::new(cpu))
                .expect("memory for a second CPU");
        }
        machine
    }

    /// A slab system with a hardening policy over the frames of this machine, which lives for ever as well.
    ///
    /// # Panics
    ///
    /// Where it does not start.
    #[must_use]
    pub fn with_policy<H: Policy>(&self) -> &'static SlabSystem<PolicyParts<H>> {
        let slab = Box::leak(Box::new(SlabSystem::new()));
        // SAFETY: S2, S3: as in `leak`.
        let parts = unsafe { Parts::new(self.buddy, self.region, ThreadCpus::all(), self.table) };
        slab.init(parts).expect("slab starts");
        slab
    }

    /// Frames that are not free.
    #[must_use]
    pub fn used_frames(&self) -> u64 {
        let info = self.buddy.mem_info();
        info.total - info.free - info.cached
    }
}

/// No processor walks the tables, so that nothing is ever cached.
#[derive(Clone, Copy, Debug)]
pub struct NoWalks;

// SAFETY: M1 to M5: there are no translations.
unsafe impl Mmu for NoWalks {
    unsafe fn load_root(&self, _root: Root, _keep: bool) {}
    fn is_loaded(&self, _root: Root) -> bool {
        false
    }
    fn flush_local(&self, request: &FlushRequest) {
        std::hint::black_box(request);
    }
}

/// Grace periods of the threads that play CPUs.
pub type HostGrace = EpochGrace<'static, ThreadCpus, Spin, 32, HostBarrier>;

/// Grace periods that live for ever.
#[must_use]
pub fn grace() -> &'static HostGrace {
    let grace: &'static HostGrace = Box::leak(Box::new(EpochGrace::with_barrier(
        ThreadCpus::all(),
        HostBarrier::new(),
    )));
    let area = |_| CachePadded::new(EpochArea::new());
    grace.init(Box::leak((0..CPUS).map(area).collect()));
    grace
}
