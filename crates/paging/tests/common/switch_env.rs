// The environment of page tables on the mock machine, whose MMU is `AsidMmu` over the machine's own instructions.
#![allow(dead_code)]

use std::cell::Cell;

use kmem_hal::sync::AtomicU64;
use kmem_hal::{
    Asid, CachePadded, Cpu, CpuCall, CpuCallError, CpuId, CpuSet, FrameRange, FrameTable, NoTrace,
    Page, Root, Tlb,
};
use kmem_mock_x86::{FramePool, Machine, MachineGrace, MachinePin};
use kmem_paging::{AsidArea, AsidMmu, Env, TableCache};
use kmem_testkit::SlotArena;

/// The machine's CPUs, as a kernel with page-table isolation is entered by an interrupt: out of user mode by the trampoline, and back.
pub struct Entered {
    pub machine: &'static Machine,
    mmu: Cell<Option<&'static Mmu>>,
    /// Which CPUs are in user mode.
    pub in_user: Vec<Cell<bool>>,
    pub interrupts: Cell<u64>,
    /// Runs once, before the next interrupts are sent: what another CPU does meanwhile.
    pub meanwhile: Cell<Option<Box<dyn FnOnce()>>>,
}

// SAFETY: one host thread runs all CPUs.
unsafe impl Sync for Entered {}
// SAFETY: as above.
unsafe impl Send for Entered {}

/// The machine's instructions; an interrupt may come after a load of CR3 as well as before it.
#[derive(Clone, Copy)]
pub struct Interrupted(&'static Machine);

// SAFETY: the machine's own.
unsafe impl Tlb for Interrupted {
    fn tags(&self) -> u16 {
        self.0.tags()
    }
    unsafe fn load(&self, root: Root, keep: bool) {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.0.load(root, keep) };
        self.0.yield_now();
    }
    fn drop_page(&self, page: Page) {
        self.0.drop_page(page);
    }
    fn drop_page_of(&self, tag: Asid, page: Page) -> bool {
        self.0.drop_page_of(tag, page)
    }
    fn drop_current(&self) {
        self.0.drop_current();
    }
    fn drop_tag(&self, tag: Asid) -> bool {
        self.0.drop_tag(tag)
    }
    fn drop_all(&self) {
        self.0.drop_all();
    }
}

pub type Mmu = AsidMmu<'static, Interrupted, &'static Entered>;

// SAFETY: the machine's own.
unsafe impl Cpu for Entered {
    type Guard<'a> = MachinePin<'a>;
    fn raw_pin(&self) -> MachinePin<'_> {
        self.machine.raw_pin()
    }
    fn id<'a>(&'a self, guard: &MachinePin<'a>) -> CpuId {
        self.machine.id(guard)
    }
    fn count(&self) -> u32 {
        self.machine.count()
    }
}

// SAFETY: the machine's own, with the way in and out around the call.
unsafe impl CpuCall for Entered {
    fn run_on(&self, cpus: &CpuSet, f: &(dyn Fn(CpuId) + Sync)) -> Result<(), CpuCallError> {
        if let Some(other) = self.meanwhile.take() {
            other();
        }
        self.interrupts
            .set(self.interrupts.get() + u64::from(cpus.len()));
        self.machine.run_on(cpus, &|cpu| {
            let was_in_user = self.in_user[cpu.index()].get();
            if was_in_user {
                self.in_user[cpu.index()].set(false);
                // SAFETY: an interrupt runs with interrupts off; the CPU was in user mode.
                unsafe { self.mmu().enter_kernel() };
            }
            f(cpu);
            if was_in_user {
                // SAFETY: as above; the machine runs no code from the tables.
                unsafe { self.mmu().enter_user() };
                self.in_user[cpu.index()].set(true);
            }
        })
    }
}

impl Entered {
    fn mmu(&self) -> &'static Mmu {
        self.mmu.get().expect("made with the environment")
    }

    /// Goes to user mode on the current CPU.
    pub fn leave_kernel(&self) {
        let here = self.machine.current_cpu();
        let cpu = self.machine.cpu(here);
        let was_on = cpu.set_interrupts(false).unwrap();
        // SAFETY: interrupts are off, and the machine runs no code from the tables.
        unsafe { self.mmu().enter_user() };
        self.in_user[here].set(true);
        cpu.set_interrupts(was_on).unwrap();
    }

    /// Comes back from user mode on the current CPU.
    pub fn enter_kernel(&self) {
        let here = self.machine.current_cpu();
        let cpu = self.machine.cpu(here);
        let was_on = cpu.set_interrupts(false).unwrap();
        self.in_user[here].set(false);
        // SAFETY: as above.
        unsafe { self.mmu().enter_kernel() };
        cpu.set_interrupts(was_on).unwrap();
    }
}

pub struct SwitchEnv {
    pub machine: &'static Machine,
    pub cpus: &'static Entered,
    pub pool: FramePool<'static>,
    pub mmu: &'static Mmu,
    grace: MachineGrace<'static>,
    slots: SlotArena,
    pub cache: TableCache,
}

impl SwitchEnv {
    /// An environment for ever, of a machine for ever; frames are given from number `first` on.
    pub fn new(machine: Machine, first: u64, isolated: bool, generations: usize) -> &'static Self {
        let machine: &'static Machine = Box::leak(Box::new(machine));
        let limit = machine.memory().frame_limit();
        let slots = SlotArena::new(FrameRange::from_numbers(0, limit).unwrap());
        let count = machine.cpu_count();
        let cpus: &'static Entered = Box::leak(Box::new(Entered {
            machine,
            mmu: Cell::new(None),
            in_user: (0..count).map(|_| Cell::new(false)).collect(),
            interrupts: Cell::new(0),
            meanwhile: Cell::new(None),
        }));
        let areas: Vec<CachePadded<AsidArea>> = (0..count)
            .map(|_| CachePadded::new(AsidArea::new()))
            .collect();
        let counters: Vec<AtomicU64> = (0..generations).map(|_| AtomicU64::new(0)).collect();
        // SAFETY: an area a CPU, all of one machine; nothing else loads roots.
        let mut mmu = unsafe {
            AsidMmu::new(
                Interrupted(machine),
                cpus,
                Box::leak(areas.into_boxed_slice()),
                Box::leak(counters.into_boxed_slice()),
            )
        };
        if isolated {
            mmu = mmu.with_isolation();
        }
        let mmu: &'static Mmu = Box::leak(Box::new(mmu));
        cpus.mmu.set(Some(mmu));
        Box::leak(Box::new(Self {
            machine,
            cpus,
            pool: FramePool::new(machine, first),
            mmu,
            grace: MachineGrace::new(machine),
            slots,
            cache: TableCache::new(0),
        }))
    }
}

// SAFETY: E1: fields never change; E2: one frame table for all frames of the machine; E3: the machine's MMU walks the machine's memory;
// E4: the cache is this environment's own.
unsafe impl Env for SwitchEnv {
    type Map = Machine;
    type Frames = FramePool<'static>;
    type Mmu = Mmu;
    type Grace = MachineGrace<'static>;
    type Cpu = Machine;
    type Trace = NoTrace;

    fn map(&self) -> &Machine {
        self.machine
    }
    fn frames(&self) -> &FramePool<'static> {
        &self.pool
    }
    fn mmu(&self) -> &Mmu {
        self.mmu
    }
    fn grace(&self) -> &MachineGrace<'static> {
        &self.grace
    }
    fn cpu(&self) -> &Machine {
        self.machine
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
    fn relax(&self) {
        self.machine.yield_now();
    }
}
