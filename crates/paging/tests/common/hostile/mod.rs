// A kernel's day on a hostile machine: several spaces and CPUs, every operation, gathers left open for a while, and
// after each step accesses of all CPUs that are held against a flat map.
//
// What must hold, and is looked for all the time:
// - an access comes to what the flat map says, except on pages whose change waits for its flush;
// - no cached translation leads to a free frame, ever; where nothing waits, none differs from the tables;
// - the dirty bit says exactly whether the page was written; tables, counted from the map, are as many as there are.
//
// Here: how a world is put together, what a step is, and how it ends. What the tables should say is in `model.rs`, the operations are in
// `fill.rs`, `change.rs`, `huge.rs`, `fork.rs` and `kernel.rs`, the looks in `access.rs` and `compare.rs`.

mod access;
mod change;
mod compare;
mod fill;
mod fork;
mod gathers;
mod huge;
mod kernel;
mod model;

use std::collections::BTreeSet;

use kmem_hal::{Asid, Mmu, OwnedFrame, Page, PageRange};
use kmem_mock_x86::{Adversary, Machine, Registers, SeededRng, Stats};
use kmem_paging::format::Format;
use kmem_paging::{Gather, PageTable, TableCache};

use super::hostile_env::{Caller, HostileEnv};
use super::modes::memory;
use model::Model;

pub type Table<F> = PageTable<F, &'static HostileEnv, OwnedFrame>;

type Pending<F> = Gather<'static, F, &'static HostileEnv, OwnedFrame, 16>;

const FIRST_FRAME: u64 = 0x400;

/// A page whose key every CPU refuses, and one whose key no CPU writes.
const NO_ACCESS_KEY: u8 = 3;

const NO_WRITE_KEY: u8 = 9;

/// How a run is put together.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub registers: Registers,
    pub cpus: usize,
    pub adversary: Adversary,
    pub caching: bool,
    pub caches_absent: bool,
    /// Whether spaces share a kernel's part.
    pub kernel: bool,
    pub caller: Caller,
}

impl Setup {
    /// As a format wants the machine.
    pub fn new<F: Format>(registers: Registers) -> Self {
        Self {
            registers,
            cpus: 3,
            adversary: Adversary::FULL,
            caching: std::env::var_os("KMEM_MOCK_WITHOUT_TLB").is_none(),
            caches_absent: F::CACHES_ABSENT,
            kernel: true,
            caller: Caller::Right,
        }
    }
}

/// A table, what it must say, and what waits for a flush.
struct Space<F: Format> {
    table: &'static Table<F>,
    model: Model,
    gathers: Vec<Pending<F>>,
    /// Pages whose change has not been flushed.
    waiting: BTreeSet<u64>,
    asid: u16,
}

pub struct World<F: Format> {
    pub env: &'static HostileEnv,
    setup: Setup,
    spaces: Vec<Space<F>>,
    kernel: Option<Space<F>>,
    /// The first page of the kernel's part.
    kernel_base: u64,
    /// Which space each CPU runs.
    loaded: Vec<usize>,
    free_asids: Vec<u16>,
    rng: SeededRng,
    areas: Vec<u64>,
    operations: u64,
    leaked: u64,
    /// What the last operation changed: space, first page, pages.
    last: (usize, u64, u64),
    /// Allocations of the running operation that succeed; `None` for all.
    fuse: Option<u64>,
}

fn at(number: u64) -> Page {
    Page::new(number).unwrap()
}

fn pages(first: u64, count: u64) -> PageRange {
    PageRange::with_count(at(first), count).unwrap()
}

impl<F: Format> World<F> {
    pub fn new(setup: Setup, seed: u64) -> Self {
        let machine = Machine::builder()
            .memory(memory::<F>())
            .cpus(setup.cpus)
            .registers(Registers {
                pkru: 1 << (2 * NO_ACCESS_KEY) | 2 << (2 * NO_WRITE_KEY),
                ..setup.registers
            })
            .seed(seed)
            .adversary(setup.adversary)
            .caching(setup.caching)
            .caches_absent(setup.caches_absent)
            .watch_kernel(true)
            .history(1 << 14)
            .build()
            .unwrap();
        let mut rng = SeededRng::new(seed ^ 0x0bad_cafe);
        // Without a cache of tables, a table that is freed too early is a free frame that is walked.
        let cache = [0, 0, 16][rng.below(3) as usize];
        let env = HostileEnv::new(machine, FIRST_FRAME, cache);
        env.mmu.caller.set(setup.caller);
        let canonical = F::canonical(F::LEVELS.len());
        let top = *F::LEVELS.last().unwrap();
        let has_kernel = setup.kernel;
        let kernel_base = match canonical.upper_start() {
            Some(start) => start.as_u64() >> 12,
            // The last of four gigabytes.
            None if has_kernel => 3 << (top.shift + top.bits - 2),
            None => Page::LIMIT,
        };
        let kernel = has_kernel.then(|| {
            let table = Table::<F>::new(env).unwrap();
            table.lend_from(at(kernel_base)).unwrap();
            Space::new(table, 0)
        });
        let end = (canonical.lower_end().as_u64() >> 12).min(kernel_base - 1);
        let mut world = Self {
            env,
            setup,
            spaces: Vec::new(),
            kernel,
            kernel_base,
            loaded: vec![0; setup.cpus],
            free_asids: if env.mmu.asid_count() > 1 {
                vec![1, 2, 3, 4, 5]
            } else {
                Vec::new()
            },
            rng,
            // Several leaf tables, near and far; the third area is where huge leaves live.
            areas: vec![0x400, 0x3f0, 0x2_0000, end - 700],
            operations: 0,
            leaked: 0,
            last: (0, 0x400, 1),
            fuse: None,
        };
        world.add_space(None);
        world.add_space(None);
        for cpu in 0..setup.cpus {
            let space = world.rng.below(2) as usize;
            world.load(cpu, space);
        }
        world
    }

    fn add_space(&mut self, table: Option<Table<F>>) -> usize {
        self.env.pool.set_fuse(None);
        let mut table = table.unwrap_or_else(|| match &self.kernel {
            Some(kernel) => {
                Table::<F>::sharing(self.env, kernel.table, at(self.kernel_base)).unwrap()
            }
            None => Table::<F>::new(self.env).unwrap(),
        });
        let asid = if self.free_asids.is_empty() {
            0
        } else {
            self.free_asids.remove(0)
        };
        table.set_asid(Asid::new(asid)).unwrap();
        self.spaces.push(Space::new(table, asid));
        self.spaces.len() - 1
    }

    fn load(&mut self, cpu: usize, space: usize) {
        self.loaded[cpu] = space;
        let keep = self.rng.below(4) != 0;
        let root = self.spaces[space].table.root();
        // SAFETY: the machine runs no code from these tables, and they are taken down after the last access.
        self.env
            .machine
            .on_cpu(cpu, || unsafe { self.env.mmu.load_root(root, keep) });
    }

    fn lower(&self) -> PageRange {
        let canonical = F::canonical(F::LEVELS.len());
        let end = (canonical.lower_end().as_u64() >> 12).min(self.kernel_base - 1);
        PageRange::new(Page::ZERO, at(end)).unwrap()
    }

    pub fn step(&mut self) {
        self.operations += 1;
        // The operation runs on any CPU.
        let cpu = self.rng.below(self.setup.cpus as u64) as usize;
        let machine = self.env.machine;
        if self.rng.below(6) == 0 {
            self.fuse = Some(self.rng.below(4));
        }
        self.env.pool.set_fuse(self.fuse);
        machine.on_cpu(cpu, || self.operate());
        self.fuse = None;
        self.env.pool.set_fuse(None);
        self.revisit();
        for _ in 0..16 {
            self.access();
        }
        if self.operations.is_multiple_of(4) {
            self.audit();
        }
        if self.operations.is_multiple_of(64) {
            self.compare();
        }
    }

    fn operate(&mut self) {
        let choice = self.rng.below(64);
        if choice < 6 && self.kernel.is_some() {
            self.operate_kernel();
            return;
        }
        match choice {
            6..=8 => {
                let cpu = self.rng.below(self.setup.cpus as u64) as usize;
                let space = self.rng.below(self.spaces.len() as u64) as usize;
                self.load(cpu, space);
                return;
            }
            9 => return self.fork(),
            10 if self.spaces.len() > 2 => {
                let victim = self.rng.below(self.spaces.len() as u64) as usize;
                return self.destroy(victim);
            }
            11 if self.spaces.len() < 4 => {
                self.add_space(None);
                return;
            }
            12..=14 => {
                let space = self.rng.below(self.spaces.len() as u64) as usize;
                return self.commit_all(space);
            }
            _ => {}
        }
        let space = self.rng.below(self.spaces.len() as u64) as usize;
        let page = self.page();
        let count = 1 + self.rng.below(8);
        self.last = (space, page, count);
        match choice {
            15..=24 => self.map(space, page),
            25..=26 => self.map_huge(space),
            27..=32 => self.map_range(space, page, count),
            33 => {
                // Whole leaf tables, or all but a little of them.
                let (first, order) = self.huge_page();
                let skip = [0, 0, 0, 1, 30][self.rng.below(5) as usize];
                let count = order.frames() - skip + self.rng.below(3);
                self.map_range(space, first + skip, count);
            }
            34 => {
                let (first, order) = self.huge_page();
                let skip = [0, 0, 0, 1, 480][self.rng.below(5) as usize];
                let count = order.frames() * (1 + self.rng.below(2)) - skip;
                self.unmap(space, first + skip, count);
            }
            35..=39 => self.unmap(space, page, count),
            40..=45 => self.change(space, page, count, choice < 43),
            46..=48 => self.replace(space, page),
            49 => self.payload(space, page),
            50..=51 => self.session(space, page),
            52..=53 => self.harvest(space, page, count),
            54..=55 => self.split(space),
            56..=58 => self.merge(space),
            _ => self.relocate(space, page, count),
        }
    }

    /// Takes everything down; nothing may be left but the kernel's tables.
    pub fn finish(mut self) -> Stats {
        for space in 0..self.spaces.len() {
            self.commit_all(space);
        }
        self.compare();
        self.audit();
        let idle = match &self.kernel {
            Some(kernel) => {
                Table::<F>::sharing(self.env, kernel.table, at(self.kernel_base)).unwrap()
            }
            None => Table::<F>::new(self.env).unwrap(),
        };
        for cpu in 0..self.setup.cpus {
            // SAFETY: as in `load`.
            self.env.machine.on_cpu(cpu, || unsafe {
                self.env.mmu.load_root(idle.root(), false)
            });
        }
        self.loaded = vec![usize::MAX; self.setup.cpus];
        while !self.spaces.is_empty() {
            self.destroy(0);
        }
        idle.destroy(|_, _| {}, |_, _| {});
        let mut kept = 0;
        if let Some(kernel) = self.kernel.take() {
            // A lender's tables stay; what it maps goes.
            let range = pages(self.kernel_base, 64);
            let mut gather = kernel.table.gather::<64>();
            kernel
                .table
                .cursor(range)
                .unwrap()
                .unmap(range, &mut gather)
                .unwrap();
            gather.commit_to(&self.env.pool);
            drop(gather);
            kept = kernel.table.table_count() as u64;
        }
        TableCache::shrink(&self.env, usize::MAX);
        assert_eq!(
            self.env.pool.in_use(),
            kept + self.leaked,
            "frames leaked or lost"
        );
        let stats = self.env.machine.stats();
        // SAFETY: the tables are gone, but for the kernel's, which nobody reaches any more.
        unsafe { self.env.retire() };
        stats
    }
}

/// Adds what a machine did to what others did.
#[allow(dead_code)]
pub fn add(total: &mut Stats, more: &Stats) {
    total.accesses += more.accesses;
    total.tlb_hits += more.tlb_hits;
    total.walks += more.walks;
    total.short_walks += more.short_walks;
    total.faults += more.faults;
    total.stale_hits += more.stale_hits;
    total.stale_dirty += more.stale_dirty;
    total.stale_faults += more.stale_faults;
    total.evictions += more.evictions;
    total.speculative_fills += more.speculative_fills;
    total.early_accessed += more.early_accessed;
    total.transient_reads += more.transient_reads;
    total.fractures += more.fractures;
    total.absent_fills += more.absent_fills;
    total.stale_absent += more.stale_absent;
    total.flushes += more.flushes;
    total.interrupts += more.interrupts;
    total.delayed_interrupts += more.delayed_interrupts;
    total.switches += more.switches;
}
