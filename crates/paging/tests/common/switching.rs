// CPUs that switch between more spaces than they have tags, borrow them for kernel threads, go to user mode and back, and change, end and
// make spaces meanwhile; as coroutines, switched in the middle of everything.
//
// What must hold, and is looked for at every access: a page that nobody is changing is exactly as the flat map says, from whatever CPU and
// by whatever root; nothing reaches a free frame or table (the machine sees to that); user mode sees nothing of the kernel.
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use kmem_hal::{FrameRequest, FrameSink, FrameSource, Mmu, OwnedFrame, Page, PageRange, VirtAddr};
use kmem_mock_x86::manual::cr4;
use kmem_mock_x86::{
    Adversary, Machine, MemoryMap, Registers, Scheduler, SeededRng, Stats, VirtualCpu,
};
use kmem_paging::format::{Format, X86_64};
use kmem_paging::{Attributes, PageTable, Rights};

use super::switch_env::SwitchEnv;

pub type Table = PageTable<X86_64, &'static SwitchEnv, OwnedFrame>;

const CPUS: usize = 3;
/// More than a CPU deals out tags for; the first ones are busy.
const SPACES: usize = 9;
const BUSY: u64 = 2;
/// Pages of each space: two leaf tables below two top entries.
const PAGES: [u64; 8] = [
    0x400, 0x401, 0x402, 0x403, 0x800_0400, 0x800_0401, 0x800_0402, 0x800_0403,
];
/// Pages of the kernel's that change.
const KERNEL_PAGES: u64 = 4;
/// What the trampoline's page holds.
const TRAMPOLINE: u8 = 0x77;

#[derive(Clone, Copy, Debug)]
struct State {
    frame: u64,
    writable: bool,
}

struct Space {
    table: Table,
    pages: RefCell<BTreeMap<u64, State>>,
    /// Pages that somebody is changing.
    pending: RefCell<Vec<u64>>,
    /// CPUs that run it, lazy ones excepted, and those that change it.
    users: Cell<u32>,
    /// A page that no other space has, and which so may be global.
    own: u64,
}

pub struct World {
    pub env: &'static SwitchEnv,
    pub kernel: Table,
    pub trampoline: Table,
    pub first_kernel_page: u64,
    spaces: Vec<RefCell<Option<std::rc::Rc<Space>>>>,
    kernel_pages: RefCell<BTreeMap<u64, u64>>,
    kernel_pending: RefCell<Vec<u64>>,
    isolated: bool,
}

fn at(page: u64) -> Page {
    Page::new(page).unwrap()
}

fn linear(page: u64) -> u64 {
    at(page).start().as_u64()
}

impl World {
    pub fn new(seed: u64, isolated: bool, registers: Registers, adversary: Adversary) -> Self {
        // A global page of the kernel's would be there in user mode as well.
        let pge = if isolated { cr4::PGE } else { 0 };
        let registers = Registers {
            cr4: registers.cr4 & !pge,
            ..registers
        };
        let machine = Machine::builder()
            .memory(MemoryMap::pc(32 << 20))
            .cpus(CPUS)
            .registers(registers)
            .seed(seed)
            .adversary(adversary)
            .caching(std::env::var_os("KMEM_MOCK_WITHOUT_TLB").is_none())
            .build()
            .unwrap();
        // Few counters, so that spaces share some; or many, so that none is flushed by chance.
        let env = SwitchEnv::new(
            machine,
            0x400,
            isolated,
            if seed.is_multiple_of(2) { 5 } else { 64 },
        );
        let kernel = Table::new(env).unwrap();
        let upper = X86_64::canonical(4).upper_start().unwrap();
        let first = Page::containing(upper);
        let trampoline = Table::new(env).unwrap();
        kernel.lend_from(first).unwrap();
        trampoline.lend_from(first).unwrap();
        let first_kernel_page = first.number() + 0x10;
        let world = Self {
            env,
            kernel,
            trampoline,
            first_kernel_page,
            spaces: (0..SPACES).map(|_| RefCell::new(None)).collect(),
            kernel_pages: RefCell::default(),
            kernel_pending: RefCell::default(),
            isolated,
        };
        world.map_trampoline(first.number());
        // SAFETY: it is never freed, and no code runs from it.
        unsafe { env.mmu.set_kernel_root(world.kernel.root()) };
        for cpu in 0..CPUS {
            // SAFETY: as above.
            env.machine.on_cpu(cpu, || unsafe {
                env.mmu.load_root(world.kernel.root(), false)
            });
        }
        world
    }

    /// One page that the kernel and user mode's roots both have.
    fn map_trampoline(&self, page: u64) {
        let frame = self.env.pool.alloc(&FrameRequest::ONE).unwrap();
        let number = frame.first().number();
        self.env
            .machine
            .memory()
            .store(number << 12, 1, u64::from(TRAMPOLINE));
        let range = PageRange::single(at(page));
        let again = self.env.pool.alloc(&FrameRequest::ONE).unwrap();
        self.env
            .machine
            .memory()
            .store(again.first().number() << 12, 1, u64::from(TRAMPOLINE));
        let rights = Rights::READ | Rights::EXECUTE;
        self.kernel
            .cursor(range)
            .unwrap()
            .map(at(page), frame, rights)
            .unwrap();
        self.trampoline
            .cursor(range)
            .unwrap()
            .map(at(page), again, rights)
            .unwrap();
    }

    pub fn new_space(&self) -> Table {
        let first = Page::containing(VirtAddr::new(linear(self.first_kernel_page - 0x10)));
        if self.isolated {
            Table::isolated(self.env, &self.kernel, &self.trampoline, first).unwrap()
        } else {
            Table::sharing(self.env, &self.kernel, first).unwrap()
        }
    }

    fn space(&self, number: usize) -> std::rc::Rc<Space> {
        let mut place = self.spaces[number].borrow_mut();
        place
            .get_or_insert_with(|| {
                std::rc::Rc::new(Space {
                    table: self.new_space(),
                    pages: RefCell::default(),
                    pending: RefCell::default(),
                    users: Cell::new(0),
                    own: 0x600 + number as u64,
                })
            })
            .clone()
    }

    fn kernel_rights(&self, rng: &mut SeededRng) -> Rights {
        if rng.below(2) == 0 {
            Rights::KERNEL_DATA
        } else {
            Rights::KERNEL_DATA | Rights::GLOBAL
        }
    }
}

/// One CPU's work.
struct Worker<'a> {
    world: &'a World,
    cpu: usize,
    me: VirtualCpu<'static>,
    rng: SeededRng,
    /// The space that it runs; `None` in the kernel's root or a borrowed one.
    runs: Option<std::rc::Rc<Space>>,
    /// The space that it ran last, and may have borrowed.
    last: usize,
    /// Whether the CPUs meet in few pages of few spaces.
    hot: bool,
}

impl Worker<'_> {
    fn set_users(space: &Space, more: i32) {
        space.users.set(space.users.get().wrapping_add_signed(more));
    }

    fn stop_running(&mut self) {
        if let Some(space) = self.runs.take() {
            Self::set_users(&space, -1);
        }
    }

    fn choose(&mut self) -> usize {
        let among = if !self.hot && self.rng.below(3) == 0 {
            SPACES as u64
        } else {
            BUSY
        };
        self.rng.below(among) as usize
    }

    fn run_space(&mut self) {
        let number = if self.rng.below(2) == 0 {
            self.last
        } else {
            self.choose()
        };
        self.last = number;
        let space = self.world.space(number);
        // Before the load: nobody takes it down from here on.
        Self::set_users(&space, 1);
        let keep = self.rng.below(8) != 0;
        // SAFETY: no code runs from the tables; `users` keeps them.
        unsafe { self.world.env.mmu.load_root(space.table.root(), keep) };
        self.stop_running();
        self.runs = Some(space);
    }

    fn go_lazy(&mut self) {
        self.world.env.mmu.enter_lazy().unwrap();
        self.stop_running();
    }

    /// Back to the last space or to another.
    fn run_kernel(&mut self) {
        // SAFETY: the kernel's root is for ever.
        unsafe { self.world.env.mmu.load_root(self.world.kernel.root(), true) };
        self.stop_running();
    }

    /// Accesses of the space that it runs, held against the map.
    fn look(&mut self) {
        let Some(space) = self.runs.clone() else {
            // A kernel thread; what the processor does ahead of it goes through the borrowed space.
            for _ in 0..4 {
                self.check_kernel();
            }
            return;
        };
        let user = self.world.isolated && self.rng.below(4) != 0 || self.rng.below(2) == 0;
        if user && self.world.isolated {
            self.world.env.cpus.leave_kernel();
        }
        for _ in 0..1 + self.rng.below(4) {
            let page = self.any_page(&space);
            let write = self.rng.below(3) == 0;
            self.check(&space, page, user, write);
        }
        if user {
            let at = self.world.first_kernel_page + self.rng.below(KERNEL_PAGES);
            let seen = self.me.user().transient_read(linear(at));
            if self.world.isolated {
                assert_eq!(seen, None, "user mode sees the kernel's page {at:#x}");
            }
        } else {
            self.check_kernel();
        }
        if user && self.world.isolated {
            self.world.env.cpus.enter_kernel();
        }
    }

    /// One of the pages that all spaces have, or the one that this space has alone.
    fn any_page(&mut self, space: &Space) -> u64 {
        let among = if self.hot { 2 } else { PAGES.len() as u64 + 1 };
        let choice = self.rng.below(among) as usize;
        PAGES.get(choice).copied().unwrap_or(space.own)
    }

    fn check(&self, space: &Space, page: u64, user: bool, write: bool) {
        let me = if user { self.me.user() } else { self.me };
        let value = self.cpu as u64 + 1;
        let mut outcome = Err(());
        for _ in 0..24 {
            let result = if write {
                me.write_u64(linear(page) + 8, value).map(|()| 0)
            } else {
                me.read_u64(linear(page))
            };
            // No yield from here to the look into the map.
            outcome = result.map_err(drop);
            if outcome.is_ok() {
                break;
            }
            if space.pending.borrow().contains(&page) || !space.pages.borrow().contains_key(&page) {
                break;
            }
        }
        if space.pending.borrow().contains(&page) {
            return;
        }
        let state = space.pages.borrow().get(&page).copied();
        let story = || self.world.env.machine.explain(self.cpu, linear(page));
        match (state, write) {
            (None, _) => assert!(outcome.is_err(), "page {page:#x} is gone: {}", story()),
            (Some(state), false) => {
                assert_eq!(outcome, Ok(state.frame), "page {page:#x}: {}", story());
            }
            (Some(state), true) => {
                // CR0.WP is set.
                assert_eq!(
                    outcome.is_ok(),
                    state.writable,
                    "page {page:#x}: {}",
                    story()
                );
            }
        }
    }

    fn check_kernel(&self) {
        for page in self.world.first_kernel_page..self.world.first_kernel_page + KERNEL_PAGES {
            let mut outcome = self.me.read_u64(linear(page)).ok();
            for _ in 0..24 {
                if outcome.is_some() || !self.world.kernel_pages.borrow().contains_key(&page) {
                    break;
                }
                outcome = self.me.read_u64(linear(page)).ok();
            }
            if self.world.kernel_pending.borrow().contains(&page) {
                continue;
            }
            let frame = self.world.kernel_pages.borrow().get(&page).copied();
            assert_eq!(outcome, frame, "the kernel's page {page:#x}");
        }
    }

    fn rights(&mut self, may_be_global: bool) -> (bool, Rights) {
        let writable = self.rng.below(2) == 0;
        let mut rights = if writable {
            Rights::USER_DATA
        } else {
            Rights::READ | Rights::USER
        };
        if may_be_global && !self.world.isolated {
            rights |= Rights::GLOBAL;
        }
        (writable, rights)
    }

    /// Changes one page of some space, running or not.
    fn change(&mut self) {
        let number = self.choose();
        let space = self.world.space(number);
        let page = self.any_page(&space);
        if space.pending.borrow().contains(&page) {
            return;
        }
        Self::set_users(&space, 1);
        space.pending.borrow_mut().push(page);
        let env = self.world.env;
        let range = PageRange::single(at(page));
        let state = space.pages.borrow().get(&page).copied();
        match state {
            None => {
                let frame = env.pool.alloc(&FrameRequest::ONE).unwrap();
                let number = frame.first().number();
                env.machine.memory().store(number << 12, 8, number);
                let (writable, rights) = self.rights(page == space.own);
                space
                    .table
                    .cursor(range)
                    .unwrap()
                    .map(at(page), frame, rights)
                    .unwrap();
                space.pages.borrow_mut().insert(
                    page,
                    State {
                        frame: number,
                        writable,
                    },
                );
            }
            Some(State { frame, .. }) if self.rng.below(3) == 0 => {
                let (writable, rights) = self.rights(page == space.own);
                let mut gather = space.table.gather::<1>();
                let mut cursor = space.table.cursor(range).unwrap();
                cursor.protect(range, rights, &mut gather).unwrap();
                drop(cursor);
                gather.commit(drop);
                drop(gather);
                space
                    .pages
                    .borrow_mut()
                    .insert(page, State { frame, writable });
            }
            Some(_) => {
                let mut gather = space.table.gather::<4>();
                let mut cursor = space.table.cursor(range).unwrap();
                cursor.unmap(range, &mut gather).unwrap();
                drop(cursor);
                gather.commit_to(&env.pool);
                drop(gather);
                space.pages.borrow_mut().remove(&page);
            }
        }
        space.pending.borrow_mut().retain(|&other| other != page);
        Self::set_users(&space, -1);
    }

    /// Maps or unmaps a page of the kernel's.
    fn change_kernel(&mut self) {
        let page = self.world.first_kernel_page + self.rng.below(KERNEL_PAGES);
        if self.world.kernel_pending.borrow().contains(&page) {
            return;
        }
        self.world.kernel_pending.borrow_mut().push(page);
        let env = self.world.env;
        let range = PageRange::single(at(page));
        let table = &self.world.kernel;
        if self.world.kernel_pages.borrow().contains_key(&page) {
            let mut gather = table.gather::<4>();
            let mut cursor = table.cursor(range).unwrap();
            cursor.unmap(range, &mut gather).unwrap();
            drop(cursor);
            gather.commit_to(&env.pool);
            drop(gather);
            self.world.kernel_pages.borrow_mut().remove(&page);
        } else {
            let frame = env.pool.alloc(&FrameRequest::ONE).unwrap();
            let number = frame.first().number();
            env.machine.memory().store(number << 12, 8, number);
            let rights = self.world.kernel_rights(&mut self.rng);
            table
                .cursor(range)
                .unwrap()
                .map(at(page), frame, rights)
                .unwrap();
            self.world.kernel_pages.borrow_mut().insert(page, number);
        }
        self.world
            .kernel_pending
            .borrow_mut()
            .retain(|&other| other != page);
    }

    /// Takes a space down that nobody runs or changes; some CPU may have borrowed it.
    fn end_space(&mut self) {
        let number = self.rng.below(SPACES as u64) as usize;
        let place = &self.world.spaces[number];
        let Some(space) = place.borrow_mut().take() else {
            return;
        };
        match std::rc::Rc::try_unwrap(space) {
            Ok(space) if space.users.get() == 0 => {
                let env = self.world.env;
                space
                    .table
                    .destroy(|_, frame| env.pool.free(frame), |_, _| {});
            }
            Ok(space) => *place.borrow_mut() = Some(std::rc::Rc::new(space)),
            Err(space) => *place.borrow_mut() = Some(space),
        }
    }

    /// One CPU changes a page of two spaces now and then, the others switch between the spaces and look: a change that comes in the middle
    /// of a switch finds what it changes still cached.
    fn hot_step(&mut self) {
        match self.rng.below(16) {
            _ if self.cpu == 0 => {
                for _ in 0..self.rng.below(60) {
                    self.world.env.machine.yield_now();
                }
                self.change();
            }
            0 => self.go_lazy(),
            1..=12 => {
                self.run_space();
                self.look();
            }
            _ => self.look(),
        }
    }

    fn step(&mut self) {
        if self.hot {
            return self.hot_step();
        }
        match self.rng.below(32) {
            0..=5 => self.run_space(),
            6 | 7 => self.go_lazy(),
            8 => self.run_kernel(),
            9..=16 => self.change(),
            17 => self.change_kernel(),
            18 | 19 => self.end_space(),
            _ => self.look(),
        }
    }
}

/// A run of three CPUs.
pub fn switching(
    seed: u64,
    steps: u64,
    isolated: bool,
    registers: Registers,
    adversary: Adversary,
) -> Stats {
    let world = World::new(seed, isolated, registers, adversary);
    let env = world.env;
    let mut scheduler = Scheduler::new(env.machine, seed);
    for cpu in 0..CPUS {
        let world = &world;
        scheduler.spawn(cpu, move || {
            let mut worker = Worker {
                world,
                cpu,
                me: world.env.machine.cpu(cpu),
                rng: SeededRng::new(seed.wrapping_mul(31) + cpu as u64),
                runs: None,
                last: cpu,
                hot: seed % 3 == 2,
            };
            for _ in 0..steps {
                worker.step();
            }
            worker.run_kernel();
        });
    }
    scheduler.run();
    for place in &world.spaces {
        if let Some(space) = place.borrow_mut().take() {
            let space = std::rc::Rc::into_inner(space).expect("nobody runs it");
            space
                .table
                .destroy(|_, frame| env.pool.free(frame), |_, _| {});
        }
    }
    let kernel = world.kernel.table_count() + world.trampoline.table_count();
    let rest = world.kernel_pages.borrow().len() + 2;
    assert_eq!(env.pool.in_use() as usize, kernel + rest, "frames leaked");
    env.machine.stats()
}

pub fn plain(isolated: bool) -> World {
    World::new(1, isolated, Registers::LONG_PCID, Adversary::OFF)
}

pub fn run(world: &World, cpu: usize, table: &Table) {
    // SAFETY: no code runs from the tables; each test takes them down after the last access.
    world.env.machine.on_cpu(cpu, || unsafe {
        world.env.mmu.load_root(table.root(), true)
    });
}

pub fn map(world: &World, table: &Table, page: u64) {
    let frame = world.env.pool.alloc(&FrameRequest::ONE).unwrap();
    let page = Page::new(page).unwrap();
    let mut cursor = table.cursor(PageRange::single(page)).unwrap();
    cursor.map(page, frame, Rights::USER_DATA).unwrap();
}

pub fn unmap(world: &World, table: &Table, page: u64) {
    let range = PageRange::single(Page::new(page).unwrap());
    let mut gather = table.gather::<1>();
    table
        .cursor(range)
        .unwrap()
        .unmap(range, &mut gather)
        .unwrap();
    gather.commit_to(&world.env.pool);
}

/// Two CPUs change a page each of a space that a third one runs, and the interrupt of the second comes first: the third CPU has missed a change
/// then, whose own interrupt finds it up to date. The first change is a copy on write, which nobody announces.
pub fn overtaken() {
    let world = plain(false);
    let env = world.env;
    let space: &'static Table = Box::leak(Box::new(world.new_space()));
    let world: &'static World = Box::leak(Box::new(world));
    // In two leaf tables, of which none becomes empty.
    for page in [0x400, 0x600, 0x601] {
        map(world, space, page);
    }
    for cpu in 0..3 {
        run(world, cpu, space);
    }
    let third = |page: u64| env.machine.cpu(1).read_u64(page << 12);
    for page in [0x400, 0x600, 0x601] {
        assert!(third(page).is_ok());
    }
    let copy = env.pool.alloc(&FrameRequest::ONE).unwrap();
    let at = copy.first().number() << 12;
    env.machine.memory().store(at, 8, 0xc0b1);
    let other = move || env.machine.on_cpu(2, || unmap(world, space, 0x600));
    env.cpus.meanwhile.set(Some(Box::new(other)));
    let entry = space.lock_entry(Page::new(0x400).unwrap()).unwrap();
    let attributes = Attributes::from(Rights::USER_DATA);
    let (_, old) = entry.replace(copy, attributes).unwrap();
    assert_eq!(third(0x400).unwrap(), 0xc0b1, "the first change was missed");
    env.pool.free(old);
    assert!(third(0x600).is_err());
    assert!(third(0x601).is_ok());
}
