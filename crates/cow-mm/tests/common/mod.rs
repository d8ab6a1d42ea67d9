//! A mock machine with address spaces on it, for the tests of this crate.
#![allow(dead_code, reason = "each test binary uses a part")]

use core::marker::PhantomData;

pub mod changing_file;
pub mod counted;
pub mod driver;
pub mod elf;
pub mod held_pin;
pub mod host;
pub mod kept;
pub mod oracle_files;
pub mod recount;
pub mod shortage;

use kept::keep;
pub use recount::check_counters;

use kmem_cow_mm::{
    AddressSpace, Env, FileRef, Layout, MapFlags, MapRequest, Mm, Object, OpenFile, Outcome, Prot,
    Signal, SpaceMemory, SwapSlot, VmaMemory,
};
use kmem_hal::lock::SpinWait;
use kmem_hal::{
    Frame, FrameRequest, FrameSink, FrameSlot, FrameSource, FrameTable, Mmu, Page, SECTION_FRAMES,
    Section, SingleGrace, VirtAddr,
};
use kmem_mock_x86::{Disk, DiskImage, FramePool, Machine};
use kmem_paging::Parts;
use kmem_paging::format::{Format, X86_64};
use kmem_testkit::{FailPlan, Failing, HeapObjects};
use kmem_vma_tree::Node;

pub const PAGE: u64 = 4096;
pub const RW: Prot = Prot::READ.union(Prot::WRITE);

/// Frames, which fail as everything does and by a plan of their own.
pub type Frames = Failing<'static, Failing<'static, FramePool<'static>>>;
pub type Paging = Parts<
    'static,
    &'static Machine,
    Frames,
    &'static Machine,
    SingleGrace,
    &'static Machine,
    &'static Machine,
>;
pub type Nodes = Failing<'static, HeapObjects<Node>>;
pub type Space<F = X86_64> = AddressSpace<'static, World<F>>;

/// Everything that address spaces need, on one mock machine; `F` is the format of user page tables.
pub struct World<F = X86_64> {
    pub machine: &'static Machine,
    pub plan: &'static FailPlan,
    /// For frames alone.
    pub frame_plan: &'static FailPlan,
    paging: Paging,
    nodes: Nodes,
    vmas: Failing<'static, HeapObjects<VmaMemory>>,
    objects: Failing<'static, HeapObjects<Object<Nodes, SpinWait>>>,
    spaces: Failing<'static, HeapObjects<SpaceMemory>>,
    format: PhantomData<fn() -> F>,
    disk: std::sync::OnceLock<&'static Disk<'static>>,
    oracle_files: std::sync::OnceLock<&'static [oracle_files::OracleFile; 2]>,
    /// How often a call waited for I/O.
    pub waits: std::sync::atomic::AtomicU64,
}

// SAFETY: E1: fields never change; E2: the slots cover the machine's memory; E3: worlds are kept.
unsafe impl<F: Format> Env for World<F> {
    type Paging = Paging;
    type Format = F;
    type Nodes = Nodes;
    type Vmas = Failing<'static, HeapObjects<VmaMemory>>;
    type Objects = Failing<'static, HeapObjects<Object<Nodes, SpinWait>>>;
    type Spaces = Failing<'static, HeapObjects<SpaceMemory>>;
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
    fn objects(&self) -> &Self::Objects {
        &self.objects
    }
    fn spaces(&self) -> &Self::Spaces {
        &self.spaces
    }
    fn wait(&self, _ticket: kmem_hal::IoTicket) {
        let order = std::sync::atomic::Ordering::Relaxed;
        self.waits.fetch_add(1, order);
    }
}

impl World {
    /// A machine with 64 MiB of memory.
    pub fn new() -> &'static Self {
        let machine: &'static Machine = keep(Box::new(Machine::pc(64 << 20, 1)));
        Self::on(machine)
    }

    pub fn on(machine: &'static Machine) -> &'static Self {
        Self::with(machine)
    }
}

impl<F: Format> World<F> {
    pub fn with(machine: &'static Machine) -> &'static Self {
        let sections = machine.memory().frame_limit().div_ceil(SECTION_FRAMES) as usize;
        let directory: &'static [Section] =
            keep((0..sections).map(|_| Section::absent()).collect());
        for section in directory {
            section.set_ready(keep(
                (0..SECTION_FRAMES).map(|_| FrameSlot::new()).collect(),
            ));
        }
        let table: &'static FrameTable = keep(Box::new(FrameTable::new()));
        table.init(directory);
        let plan: &'static FailPlan = keep(Box::new(FailPlan::new()));
        let frame_plan: &'static FailPlan = keep(Box::new(FailPlan::new()));
        let frames = Failing::new(FramePool::new(machine, 256), frame_plan);
        let frames = Failing::new(frames, plan);
        // SAFETY: one thread runs each test's machine.
        let grace = unsafe { SingleGrace::new() };
        // SAFETY: the table covers the machine's memory, whose MMU walks these tables.
        let paging = unsafe { Parts::new(machine, frames, machine, grace, machine, table) }
            .with_trace(machine);
        keep(Box::new(Self {
            machine,
            plan,
            frame_plan,
            paging,
            nodes: Failing::new(HeapObjects::new(), plan),
            vmas: Failing::new(HeapObjects::new(), plan),
            objects: Failing::new(HeapObjects::new(), plan),
            spaces: Failing::new(HeapObjects::new(), plan),
            format: PhantomData,
            disk: std::sync::OnceLock::new(),
            oracle_files: std::sync::OnceLock::new(),
            waits: std::sync::atomic::AtomicU64::new(0),
        }))
    }

    pub fn mm(&'static self) -> &'static Mm<'static, Self> {
        keep(Box::new(Mm::new(self).unwrap()))
    }

    /// Frames in use, the cache of empty tables apart.
    pub fn used_frames(&self) -> u64 {
        kmem_paging::TableCache::shrink(&self.paging, usize::MAX);
        self.frames_in_use()
    }

    /// Frames that somebody has, kept tables included.
    pub fn frames_in_use(&self) -> u64 {
        use kmem_paging::Env as _;
        self.paging.frames().inner().inner().in_use()
    }

    /// Frames that are free: takes them all, and gives them back.
    pub fn free_frames(&self) -> u64 {
        let frames = self.frames();
        let mut taken = Vec::new();
        while let Ok(frame) = frames.alloc(&FrameRequest::ONE) {
            taken.push(frame);
        }
        let count = taken.len() as u64;
        taken.into_iter().for_each(|frame| frames.free(frame));
        count
    }

    /// A device for swap, which is made at the first call.
    pub fn disk(&self, mm: &'static Mm<'static, Self>, slots: usize) -> &'static Disk<'static> {
        self.disk.get_or_init(|| {
            let disk: &'static Disk<'static> =
                keep(Box::new(Disk::in_memory(self.machine, slots as u64)));
            let slots: &'static [SwapSlot] = keep((0..slots).map(|_| SwapSlot::new()).collect());
            mm.swap_on(disk, slots).unwrap();
            disk
        })
    }

    /// The frames that address spaces take theirs from.
    pub fn frames(&self) -> &Frames {
        use kmem_paging::Env as _;
        self.paging.frames()
    }

    pub fn file(
        &'static self,
        mm: &'static Mm<'static, Self>,
        bytes: &[u8],
    ) -> (&'static DiskImage<'static>, OpenFile) {
        let image: &'static DiskImage<'static> =
            keep(Box::new(DiskImage::from_bytes(self.machine, bytes)));
        let file = mm.open_file(image, "/bin/test", 42).unwrap();
        (
            image,
            OpenFile {
                file,
                readable: true,
                writable: true,
            },
        )
    }
}

/// A program in a space: accesses go through the mock MMU and fault into the space.
///
/// Programs are spread over the machine's CPUs, and each access may be made by another one: threads.
pub struct Program<F: Format = X86_64> {
    pub space: Space<F>,
    turn: core::cell::Cell<usize>,
}

impl<F: Format> Program<F> {
    pub fn new(mm: &'static Mm<'static, World<F>>) -> Self {
        Self {
            space: AddressSpace::new(mm, Layout::x86_64()).unwrap(),
            turn: core::cell::Cell::new(0),
        }
    }

    /// A program in a space of another layout.
    pub fn with_layout(mm: &'static Mm<'static, World<F>>, layout: Layout) -> Self {
        Self {
            space: AddressSpace::new(mm, layout).unwrap(),
            turn: core::cell::Cell::new(0),
        }
    }

    /// Maps private memory that may be read and written; where it is.
    pub fn map(&self, pages: u64) -> u64 {
        let request = MapRequest::anonymous(pages * PAGE, RW);
        self.space.mmap(&request).unwrap().as_u64()
    }

    /// The frame behind an address, if a page is mapped there.
    pub fn frame_at(&self, address: u64) -> Option<Frame> {
        self.space
            .frame_at(Page::containing(VirtAddr::new(address)))
    }

    /// Maps the first pages of a file.
    pub fn map_file(&self, file: OpenFile, pages: u64, prot: Prot, flags: MapFlags) -> u64 {
        let request = MapRequest {
            flags,
            file: Some(file),
            ..MapRequest::anonymous(pages * PAGE, prot)
        };
        self.space.mmap(&request).unwrap().as_u64()
    }

    fn machine(&self) -> &'static Machine {
        self.space.mm().env().machine
    }

    /// Lets a CPU run the program until it runs another.
    pub fn run_on(&self, cpu: usize) {
        let machine = self.machine();
        // SAFETY: the mock's kernel code does not run in the tables.
        machine.on_cpu(cpu, || unsafe {
            machine.load_root(self.space.root(), false)
        });
    }

    /// The next access's CPU, which runs in this space from now on.
    fn next_cpu(&self) -> usize {
        let machine = self.machine();
        let cpu = self.turn.get() % machine.cpu_count();
        self.turn.set(cpu + 1);
        if machine.loaded_root(cpu) != self.space.root() {
            self.run_on(cpu);
        }
        cpu
    }

    fn retry<R>(
        &self,
        access: impl Fn(kmem_mock_x86::VirtualCpu<'static>) -> Result<R, kmem_mock_x86::Fault>,
    ) -> Result<R, Outcome> {
        let machine = self.machine();
        let cpu = self.next_cpu();
        machine.on_cpu(cpu, || {
            for _ in 0..64 {
                match access(machine.cpu(cpu).user()) {
                    Ok(value) => return Ok(value),
                    Err(fault) => match self
                        .space
                        .fault(&fault.as_page_fault().expect("a page fault"))
                    {
                        Outcome::Handled | Outcome::NeedIo(_) => {}
                        other => return Err(other),
                    },
                }
            }
            panic!("the access faults for ever");
        })
    }

    pub fn store(&self, address: u64, value: u64) -> Result<(), Outcome> {
        self.retry(|cpu| cpu.write_u64(address, value))
    }

    pub fn load(&self, address: u64) -> Result<u64, Outcome> {
        self.retry(|cpu| cpu.read_u64(address))
    }

    pub fn execute(&self, address: u64) -> Result<u8, Outcome> {
        self.retry(|cpu| cpu.fetch(address))
    }

    pub fn fork(&self) -> Result<Self, kmem_cow_mm::Errno> {
        Ok(Self {
            space: self.space.fork()?,
            turn: core::cell::Cell::new(self.turn.get() + 1),
        })
    }

    /// Another program in the same space: a thread.
    pub fn share(&self) -> Self {
        Self {
            space: self.space.share().unwrap(),
            turn: core::cell::Cell::new(self.turn.get() + 1),
        }
    }

    /// Ends the program; no CPU runs it any more.
    pub fn exit(self) {
        let machine = self.machine();
        let nothing = kmem_hal::Root {
            frame: kmem_hal::Frame::ZERO,
            asid: kmem_hal::Asid::ZERO,
        };
        for cpu in 0..machine.cpu_count() {
            if machine.loaded_root(cpu).frame == self.space.root().frame {
                // SAFETY: the mock's kernel code does not run in any tables.
                machine.on_cpu(cpu, || unsafe { machine.load_root(nothing, false) });
            }
        }
    }
}

pub fn signal(signal: Signal, address: u64) -> Outcome {
    Outcome::Signal {
        signal,
        address: VirtAddr::new(address),
    }
}

pub fn reopen(mm: &Mm<'static, World>, file: FileRef) -> FileRef {
    mm.reopen(file)
}
