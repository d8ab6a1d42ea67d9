// The environment of page tables on a hostile machine: it yields in the middle of operations, its kernel accesses are
// watched, and a test can plant faults in what a kernel provides.
#![allow(dead_code)]

use std::cell::Cell;

use kmem_hal::{
    Completion, CpuId, CpuSet, FlushRequest, FlushScope, FrameRange, FrameTable, Mmu, PageRange,
    PhysAddr, PhysMap, Root, Trace, TraceEvent,
};
use kmem_mock_x86::{FramePool, Machine, MachineGrace, SeededRng};
use kmem_paging::{Env, TableCache};
use kmem_testkit::SlotArena;

/// What the kernel around the page tables does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    Right,
    /// Forgets its own CPU.
    NoLocalFlush,
    /// Forgets the other CPUs.
    NoShootdown,
    /// Does not wait for their answers.
    NoWait,
    /// Flushes all pages but the first.
    ShortRange,
    /// Flushes one page where a range was named.
    FirstPageOnly,
    /// Takes every page for a small one.
    WrongStride,
    /// Flushes under another tag.
    WrongTag,
    /// Leaves global translations.
    KeepsGlobal,
    /// Flushes the space alone where everything was asked for.
    SpaceForEverything,
    /// Does not pass on that tables were freed.
    KeepsTables,
    /// Interrupts one CPU of several.
    OneCpu,
    /// Takes for active only the CPUs that run the space now, tags or not.
    LoadedOnly,
}

impl Caller {
    pub const FAULTS: [Self; 12] = [
        Self::NoLocalFlush,
        Self::NoShootdown,
        Self::NoWait,
        Self::ShortRange,
        Self::FirstPageOnly,
        Self::WrongStride,
        Self::WrongTag,
        Self::KeepsGlobal,
        Self::SpaceForEverything,
        Self::KeepsTables,
        Self::OneCpu,
        Self::LoadedOnly,
    ];
}

pub struct HostileMmu {
    machine: &'static Machine,
    pub caller: Cell<Caller>,
    /// Whether spaces may have user roots: for who never loads one.
    pub isolates: Cell<bool>,
    /// The last requests, for tests that count them.
    pub flushes: Cell<u64>,
    pub interrupted: Cell<u64>,
}

impl HostileMmu {
    fn bend(&self, request: &FlushRequest) -> Option<FlushRequest> {
        let mut request = *request;
        match (self.caller.get(), request.scope) {
            (Caller::ShortRange, FlushScope::Pages { range, stride }) => {
                let first = range.first().checked_add(stride)?;
                let range = PageRange::new(first, range.last())?;
                request.scope = FlushScope::Pages { range, stride };
            }
            (Caller::FirstPageOnly, FlushScope::Pages { range, .. }) => {
                let range = PageRange::single(range.first());
                request.scope = FlushScope::Pages { range, stride: 1 };
            }
            (Caller::WrongStride, FlushScope::Pages { range, .. }) => {
                request.scope = FlushScope::Pages {
                    range,
                    stride: range.count(),
                };
            }
            (Caller::WrongTag, _) => {
                request.root.asid = kmem_hal::Asid::new(request.root.asid.get() ^ 0x40);
            }
            (Caller::KeepsGlobal, _) => {
                request.global = false;
                if !matches!(request.scope, FlushScope::Pages { .. }) {
                    request.scope = FlushScope::Space;
                }
            }
            (Caller::SpaceForEverything, FlushScope::Everything) => {
                request.scope = FlushScope::Space;
                request.global = false;
            }
            (Caller::KeepsTables, FlushScope::Space | FlushScope::Everything)
                if request.tables_freed =>
            {
                return None;
            }
            _ => {}
        }
        Some(request)
    }
}

// SAFETY: the machine's own MMU, except where a fault is planted: then the machine says so.
unsafe impl Mmu for HostileMmu {
    unsafe fn load_root(&self, root: Root, keep: bool) {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.machine.load_root(root, keep) }
    }
    fn flush_local(&self, request: &FlushRequest) {
        self.flushes.set(self.flushes.get() + 1);
        if self.caller.get() != Caller::NoLocalFlush
            && let Some(request) = self.bend(request)
        {
            self.machine.flush_local(&request);
        }
    }
    fn active_cpus(&self, root: Root) -> CpuSet {
        let mut cpus = self.machine.active_cpus(root);
        if self.caller.get() == Caller::LoadedOnly {
            for cpu in 0..self.machine.cpu_count() {
                if self.machine.loaded_root(cpu).frame != root.frame {
                    cpus.remove(CpuId::new(cpu as u32));
                }
            }
        }
        cpus
    }
    fn is_loaded(&self, root: Root) -> bool {
        self.machine.is_loaded(root)
    }
    fn this_cpu(&self) -> CpuId {
        self.machine.this_cpu()
    }
    fn shootdown(&self, cpus: &CpuSet, request: &FlushRequest) -> Completion {
        self.interrupted
            .set(self.interrupted.get() + cpus.iter().count() as u64);
        let mut cpus = *cpus;
        match self.caller.get() {
            Caller::NoShootdown => return Completion::DONE,
            Caller::OneCpu => {
                let first = cpus.iter().next();
                if let Some(first) = first {
                    cpus = CpuSet::EMPTY;
                    cpus.insert(first);
                }
            }
            _ => {}
        }
        match self.bend(request) {
            Some(request) => self.machine.shootdown(&cpus, &request),
            None => Completion::DONE,
        }
    }
    fn complete(&self, completion: Completion) {
        if self.caller.get() != Caller::NoWait {
            self.machine.complete(completion);
        }
    }
    fn isolates(&self) -> bool {
        self.isolates.get()
    }
    fn asid_count(&self) -> u16 {
        self.machine.asid_count()
    }
}

/// The machine's memory; every eighth look at it, by seed, lets other CPUs run.
pub struct HostileMap {
    machine: &'static Machine,
    rng: Cell<u64>,
}

// SAFETY: the machine's own map.
unsafe impl PhysMap for HostileMap {
    fn reach(&self) -> FrameRange {
        self.machine.reach()
    }
    fn to_ptr(&self, address: PhysAddr) -> *mut u8 {
        let mut rng = SeededRng::new(self.rng.get());
        self.rng.set(rng.next());
        match rng.below(128) {
            0 => (0..60).for_each(|_| self.machine.yield_now()),
            1..16 => self.machine.yield_now(),
            _ => {}
        }
        self.machine.to_ptr(address)
    }
    fn to_phys(&self, pointer: *const u8) -> PhysAddr {
        self.machine.to_phys(pointer)
    }
}

/// Lets other CPUs run at every event, in the middle of the operation that reports it.
pub struct YieldingTrace(&'static Machine);

impl Trace for YieldingTrace {
    fn event(&self, _event: TraceEvent) {
        self.0.yield_now();
    }
}

pub struct HostileEnv {
    pub machine: &'static Machine,
    pub pool: FramePool<'static>,
    pub mmu: HostileMmu,
    map: HostileMap,
    grace: MachineGrace<'static>,
    slots: SlotArena,
    pub cache: TableCache,
    trace: YieldingTrace,
    /// Turns of waiting until somebody gives up; `None` for never.
    patience: Cell<Option<u64>>,
}

impl HostileEnv {
    /// An environment that lives until [`retire`](Self::retire); frames are given from number `first` on.
    pub fn new(machine: Machine, first: u64, cache: usize) -> &'static Self {
        #[cfg(kmem_mutants)]
        select_mutant();
        let machine: &'static Machine = Box::leak(Box::new(machine));
        let limit = machine.memory().frame_limit();
        let slots = SlotArena::new(FrameRange::from_numbers(0, limit).unwrap());
        Box::leak(Box::new(Self {
            machine,
            pool: FramePool::new(machine, first),
            mmu: HostileMmu {
                machine,
                caller: Cell::new(Caller::Right),
                isolates: Cell::new(false),
                flushes: Cell::new(0),
                interrupted: Cell::new(0),
            },
            map: HostileMap {
                machine,
                rng: Cell::new(machine.seed() ^ 0x5eed),
            },
            grace: MachineGrace::new(machine),
            slots,
            cache: TableCache::new(cache),
            trace: YieldingTrace(machine),
            patience: Cell::new(None),
        }))
    }

    /// Makes whoever waits for a lock panic after so many turns of all who wait: for tests of what may wait for ever.
    pub fn give_up_after(&self, turns: Option<u64>) {
        self.patience.set(turns);
    }

    /// Takes everything down that `new` made.
    ///
    /// # Safety
    ///
    /// No table, gather or reference of this environment is left.
    pub unsafe fn retire(&'static self) {
        let machine = self.machine;
        // SAFETY: leaked by `new`, and by the caller's promise used by nobody; the machine last, since the others refer to it.
        unsafe {
            drop(Box::from_raw(std::ptr::from_ref(self).cast_mut()));
            drop(Box::from_raw(std::ptr::from_ref(machine).cast_mut()));
        }
    }
}

/// Chooses the mutant that the environment variable names, where it is one of the library's: those of the caller are in `HostileMmu`.
#[cfg(kmem_mutants)]
pub fn select_mutant() {
    if let Ok(name) = std::env::var("KMEM_MUTANT")
        && !name.starts_with("caller-")
    {
        kmem_paging::mutants::select(&name);
    }
}

// SAFETY: E1: fields never change; E2: one frame table for all frames of the machine; E3: the machine's MMU walks the machine's memory;
// E4: the cache is this environment's own.
unsafe impl Env for HostileEnv {
    type Map = HostileMap;
    type Frames = FramePool<'static>;
    type Mmu = HostileMmu;
    type Grace = MachineGrace<'static>;
    type Cpu = Machine;
    type Trace = YieldingTrace;

    fn map(&self) -> &HostileMap {
        &self.map
    }
    fn frames(&self) -> &FramePool<'static> {
        &self.pool
    }
    fn mmu(&self) -> &HostileMmu {
        &self.mmu
    }
    fn grace(&self) -> &MachineGrace<'static> {
        &self.grace
    }
    fn cpu(&self) -> &Machine {
        self.machine
    }
    fn trace(&self) -> &YieldingTrace {
        &self.trace
    }
    fn slots(&self) -> &FrameTable {
        &self.slots
    }
    fn cache(&self) -> &TableCache {
        &self.cache
    }
    fn relax(&self) {
        if let Some(left) = self.patience.get() {
            self.patience.set(left.checked_sub(1));
            assert!(left > 0, "somebody waits for a lock for ever");
        }
        self.machine.yield_now();
    }
}
