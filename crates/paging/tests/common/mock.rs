// The environment of page tables on the mock machine, with faults that a test can plant in its MMU.
#![allow(dead_code)]

use std::cell::Cell;

use kmem_hal::{
    Completion, CpuId, CpuSet, Deferred, FlushRequest, FlushScope, FrameRange, FrameTable, Grace,
    Mmu, NoTrace, Root,
};
use kmem_mock_x86::{FramePool, Machine};
use kmem_paging::{Env, TableCache};
use kmem_testkit::SlotArena;

/// What the planted MMU does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    None,
    /// Forgets the own CPU.
    NoLocalFlush,
    /// Forgets the other CPUs.
    NoShootdown,
    /// Does not wait for their answers.
    NoWait,
    /// Flushes one page less than it is asked to.
    ShortRange,
    /// Leaves the walk caches alone when tables are freed: flushes single pages elsewhere.
    KeepsTables,
}

pub struct FaultyMmu {
    pub machine: &'static Machine,
    pub fault: Cell<Fault>,
}

impl FaultyMmu {
    fn bend(&self, request: &FlushRequest) -> FlushRequest {
        let mut request = *request;
        if self.fault.get() == Fault::ShortRange
            && let FlushScope::Pages { range, stride } = request.scope
        {
            let first = range.first().checked_add(stride).unwrap_or(range.first());
            if let Some(short) = kmem_hal::PageRange::new(first, range.last()) {
                request.scope = FlushScope::Pages {
                    range: short,
                    stride,
                };
            } else {
                request.scope = FlushScope::Pages {
                    range: kmem_hal::PageRange::single(kmem_hal::Page::ZERO),
                    stride: 1,
                };
            }
        }
        request
    }
}

// SAFETY: the machine's own MMU, except where a fault is planted: then the machine says so.
unsafe impl Mmu for FaultyMmu {
    unsafe fn load_root(&self, root: Root, keep: bool) {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.machine.load_root(root, keep) }
    }
    fn flush_local(&self, request: &FlushRequest) {
        if self.fault.get() != Fault::NoLocalFlush {
            self.machine.flush_local(&self.bend(request));
        }
    }
    fn active_cpus(&self, root: Root) -> CpuSet {
        self.machine.active_cpus(root)
    }
    fn is_loaded(&self, root: Root) -> bool {
        self.machine.is_loaded(root)
    }
    fn this_cpu(&self) -> CpuId {
        self.machine.this_cpu()
    }
    fn shootdown(&self, cpus: &CpuSet, request: &FlushRequest) -> Completion {
        match self.fault.get() {
            Fault::NoShootdown => Completion::DONE,
            Fault::KeepsTables if request.tables_freed => Completion::DONE,
            _ => self.machine.shootdown(cpus, &self.bend(request)),
        }
    }
    fn complete(&self, completion: Completion) {
        if self.fault.get() != Fault::NoWait {
            self.machine.complete(completion);
        }
    }
    fn asid_count(&self) -> u16 {
        self.machine.asid_count()
    }
}

/// Grace periods between coroutines of one host thread: where the real one would spin, the others run.
pub struct TurnGrace {
    machine: &'static Machine,
    /// Depth and number of the section, by CPU.
    readers: Vec<Cell<(u32, u64)>>,
}

pub struct TurnGuard<'a>(&'a Cell<(u32, u64)>);

impl Drop for TurnGuard<'_> {
    fn drop(&mut self) {
        let (depth, serial) = self.0.get();
        self.0.set((depth - 1, serial + u64::from(depth == 1)));
    }
}

// SAFETY: G1: calls are made at once, after `synchronize`; G2: `synchronize` returns when every section that was open at its start has
// ended; G3, G4: one host thread.
unsafe impl Grace for TurnGrace {
    type Guard<'a> = TurnGuard<'a>;

    fn read(&self) -> TurnGuard<'_> {
        let cell = &self.readers[self.machine.current_cpu()];
        let (depth, serial) = cell.get();
        cell.set((depth + 1, serial));
        TurnGuard(cell)
    }
    fn defer(&self, call: Deferred) -> Result<(), Deferred> {
        Err(call)
    }
    fn poll(&self) -> usize {
        0
    }
    fn synchronize(&self) {
        for reader in &self.readers {
            let (depth, serial) = reader.get();
            while depth > 0 && reader.get().1 == serial {
                self.machine.yield_now();
            }
        }
    }
    fn pending(&self) -> usize {
        0
    }
}

pub struct MockEnv {
    pub machine: &'static Machine,
    pub pool: FramePool<'static>,
    pub mmu: FaultyMmu,
    pub grace: TurnGrace,
    pub slots: SlotArena,
    pub cache: TableCache,
    pub trace: NoTrace,
}

impl MockEnv {
    /// An environment for ever, of a machine for ever; frames are given from number `first` on.
    pub fn new(machine: Machine, first: u64, cache: usize) -> &'static Self {
        let machine: &'static Machine = Box::leak(Box::new(machine));
        let limit = machine.memory().frame_limit();
        let slots = SlotArena::new(FrameRange::from_numbers(0, limit).unwrap());
        Box::leak(Box::new(Self {
            machine,
            pool: FramePool::new(machine, first),
            mmu: FaultyMmu {
                machine,
                fault: Cell::new(Fault::None),
            },
            grace: TurnGrace {
                machine,
                readers: (0..machine.cpu_count())
                    .map(|_| Cell::new((0, 0)))
                    .collect(),
            },
            slots,
            cache: TableCache::new(cache),
            trace: NoTrace,
        }))
    }
}

// SAFETY: E1: fields never change; E2: one frame table for all frames of the machine; E3: the machine's MMU walks the machine's memory;
// E4: the cache is this environment's own.
unsafe impl Env for MockEnv {
    type Map = Machine;
    type Frames = FramePool<'static>;
    type Mmu = FaultyMmu;
    type Grace = TurnGrace;
    type Cpu = Machine;
    type Trace = NoTrace;

    fn map(&self) -> &Machine {
        self.machine
    }
    fn frames(&self) -> &FramePool<'static> {
        &self.pool
    }
    fn mmu(&self) -> &FaultyMmu {
        &self.mmu
    }
    fn grace(&self) -> &TurnGrace {
        &self.grace
    }
    fn cpu(&self) -> &Machine {
        self.machine
    }
    fn trace(&self) -> &NoTrace {
        &self.trace
    }
    fn slots(&self) -> &FrameTable {
        &self.slots
    }
    fn cache(&self) -> &TableCache {
        &self.cache
    }
    fn relax(&self) {
        self.machine.yield_now();
    }
}
