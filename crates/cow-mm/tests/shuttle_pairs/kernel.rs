//! What the schedules run on: the mock machine with a CPU for each thread of the model, page tables, swap, and one `Mm`.

use std::sync::atomic::{AtomicBool, Ordering};

use kmem_cow_mm::{AddressSpace, Mm, Parts, SpaceMemory, SwapSlot, VmaMemory};
use kmem_hal::lock::{IrqSafe, SpinWait};
use kmem_hal::sync::CachePadded;
use kmem_hal::{
    Completion, Cpu, CpuId, CpuSet, EpochArea, EpochGrace, FlushRequest, Frame, FrameRange,
    FrameRequest, FrameSink, FrameSource, FrameTable, Grace, IoState, Mmu, NoTrace, PageProvider,
    Root,
};
use kmem_mock_x86::{Disk, FramePool, Machine, MemoryMap};
use kmem_paging::TableCache;
use kmem_paging::format::X86_64;
use kmem_testkit::{HeapObjects, SlotArena};
use kmem_vma_tree::Node;

use crate::changing_file::ChangingFile;

/// Slots of the area of swap.
pub const SLOTS: usize = 64;

/// The CPU of a thread of the model: the machine knows only one at a time, and is told at every call.
#[derive(Clone, Copy)]
pub struct Hardware(pub &'static Machine);

impl Hardware {
    fn me(self) -> usize {
        usize::from(shuttle::current::me()) % self.0.cpu_count()
    }

    pub fn here<R>(self, f: impl FnOnce() -> R) -> R {
        self.0.on_cpu(self.me(), f)
    }
}

// SAFETY: C1 to C5: each thread of a model is a CPU of its own, and stays so.
unsafe impl Cpu for Hardware {
    type Guard<'a> = ();

    fn raw_pin(&self) {}
    fn id(&self, (): &()) -> CpuId {
        CpuId::new(self.me() as u32)
    }
    fn count(&self) -> u32 {
        self.0.cpu_count() as u32
    }
}

// SAFETY: M1 to M5: the machine's, asked as the CPU of the thread that calls; a CPU that runs no task of a scheduler answers at once.
unsafe impl Mmu for Hardware {
    unsafe fn load_root(&self, root: Root, keep: bool) {
        // SAFETY: the caller's promise is passed on.
        self.here(|| unsafe { self.0.load_root(root, keep) });
    }
    fn flush_local(&self, request: &FlushRequest) {
        self.here(|| self.0.flush_local(request));
    }
    fn active_cpus(&self, root: Root) -> CpuSet {
        self.here(|| self.0.active_cpus(root))
    }
    fn is_loaded(&self, root: Root) -> bool {
        self.0.is_loaded(root)
    }
    fn this_cpu(&self) -> CpuId {
        CpuId::new(self.me() as u32)
    }
    fn shootdown(&self, cpus: &CpuSet, request: &FlushRequest) -> Completion {
        self.here(|| self.0.shootdown(cpus, request))
    }
    fn complete(&self, completion: Completion) {
        self.here(|| self.0.complete(completion));
    }
}

pub type Epochs = EpochGrace<'static, Hardware, IrqSafe, 32>;

pub struct Tables {
    pub hardware: Hardware,
    pub frames: FramePool<'static>,
    pub grace: Epochs,
    slots: SlotArena,
    cache: TableCache,
    /// Whether each use of the map of memory is a step of its own, so that a thread may stand still before it looks at bytes.
    pub stops_at_the_map: AtomicBool,
    step: shuttle::sync::atomic::AtomicBool,
}

// SAFETY: E1: fields never change; E2: one frame table for all frames of the machine; E3: the machine's MMU walks the machine's memory;
// E4: the cache is this environment's own; E5: there is one environment.
unsafe impl kmem_paging::Env for Tables {
    type Map = Machine;
    type Frames = FramePool<'static>;
    type Mmu = Hardware;
    type Grace = Epochs;
    type Cpu = Hardware;
    type Trace = NoTrace;

    fn map(&self) -> &Machine {
        if self.stops_at_the_map.load(Ordering::Relaxed) {
            let _ = self.step.load(Ordering::SeqCst);
        }
        self.hardware.0
    }
    fn frames(&self) -> &FramePool<'static> {
        &self.frames
    }
    fn mmu(&self) -> &Hardware {
        &self.hardware
    }
    fn grace(&self) -> &Epochs {
        &self.grace
    }
    fn cpu(&self) -> &Hardware {
        &self.hardware
    }
    fn trace(&self) -> &NoTrace {
        &NoTrace
    }
    fn slots(&self) -> &FrameTable {
        &self.slots
    }
    fn cache(&self) -> &TableCache {
        &self.cache
    }
}

type Nodes = HeapObjects<Node>;
pub type World = Parts<
    Tables,
    X86_64,
    Nodes,
    HeapObjects<VmaMemory>,
    HeapObjects<kmem_cow_mm::Object<Nodes, SpinWait>>,
    HeapObjects<SpaceMemory>,
    SpinWait,
>;
pub type Space = AddressSpace<'static, World>;

pub fn forever<T>(value: T) -> &'static T {
    Box::leak(Box::new(value))
}

/// What all schedules of a test run on: each gives back what it took.
#[derive(Clone, Copy)]
pub struct Kernel {
    pub mm: &'static Mm<'static, World>,
    pub hardware: Hardware,
    pub disk: &'static Disk<'static>,
    pub slots: &'static [SwapSlot],
}

thread_local! {
    static KERNEL: std::cell::Cell<Option<Kernel>> = const { std::cell::Cell::new(None) };
}

impl Kernel {
    pub fn get() -> Self {
        if let Some(kernel) = KERNEL.get() {
            return kernel;
        }
        let kernel = Self::new();
        KERNEL.set(Some(kernel));
        kernel
    }

    fn new() -> Self {
        let machine = Machine::builder().memory(MemoryMap::pc(2 << 20)).cpus(4);
        let machine = forever(machine.build().unwrap());
        let hardware = Hardware(machine);
        let frames = FrameRange::new(Frame::ZERO, machine.memory().frame_limit()).unwrap();
        let tables = Tables {
            hardware,
            frames: FramePool::new(machine, 256),
            grace: Epochs::new(hardware),
            slots: SlotArena::new(frames),
            cache: TableCache::new(8),
            stops_at_the_map: AtomicBool::new(false),
            step: shuttle::sync::atomic::AtomicBool::new(false),
        };
        // SAFETY: the table covers the machine's memory, whose MMU walks the tables; the world is never moved.
        let world = forever(unsafe {
            World::new(
                tables,
                HeapObjects::new(),
                HeapObjects::new(),
                HeapObjects::new(),
                HeapObjects::new(),
            )
        });
        let areas: Vec<_> = (0..4).map(|_| CachePadded::new(EpochArea::new())).collect();
        kmem_cow_mm::Env::paging(world).grace.init(areas.leak());
        let mm = forever(Mm::new(world).unwrap());
        let disk = forever(Disk::in_memory(machine, SLOTS as u64));
        let slots: Vec<SwapSlot> = (0..SLOTS).map(|_| SwapSlot::new()).collect();
        let slots: &'static [SwapSlot] = slots.leak();
        Self {
            mm,
            hardware,
            disk,
            slots,
        }
    }

    pub fn tables(self) -> &'static Tables {
        kmem_cow_mm::Env::paging(self.mm.env())
    }

    /// Frames in use once every grace period is over.
    pub fn used_frames(self) -> u64 {
        while self.tables().grace.poll() > 0 {}
        self.tables().grace.synchronize();
        while self.tables().grace.poll() > 0 {}
        TableCache::shrink(self.tables(), usize::MAX);
        self.tables().frames.in_use()
    }

    pub fn on_disk(self, provider: &ChangingFile, page: u64, word: usize) -> u64 {
        let frame = self.tables().frames.alloc(&FrameRequest::ONE).unwrap();
        let mut state = provider.image.read(page, frame.first()).unwrap();
        while let IoState::Pending(ticket) = state {
            state = provider.image.poll(ticket).unwrap();
        }
        let mut bytes = [0; 8];
        let at = frame.first().start().as_u64() + 8 * word as u64;
        assert!(self.hardware.0.memory().read(at, &mut bytes));
        self.tables().frames.free(frame);
        u64::from_le_bytes(bytes)
    }
}
