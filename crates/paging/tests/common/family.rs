// Spaces that share tables since a fork, on a machine that forgets nothing: they write, fork, unmap, end, and are changed while no CPU runs
// them. What each page holds is known, and looked at through the MMU from every CPU: no write of one space is ever seen in another.
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

use kmem_hal::{
    Asid, DeviceFrame, Frame, FrameHandle, FrameRequest, FrameSink, FrameSource, Mmu, Order,
    OwnedFrame, Page, PageRange,
};
use kmem_mock_x86::{Adversary, Machine, MemoryMap, Registers, SeededRng, Stats};
use kmem_paging::format::X86_64;
use kmem_paging::{
    ChangeError, Divisible, ForkItem, ForkStep, Harvest, MapError, PageTable, QuiesceError,
    Replaced, Rights, UnshareStep,
};

use super::hostile_env::HostileEnv;

thread_local! {
    /// References by frame.
    static COUNTS: RefCell<HashMap<u64, u32>> = RefCell::default();
}

/// A counted reference to a page.
#[derive(Debug, PartialEq, Eq)]
struct Ref(u64);

impl Ref {
    fn to(frame: u64) -> Self {
        COUNTS.with_borrow_mut(|counts| *counts.entry(frame).or_default() += 1);
        Self(frame)
    }

    fn fresh(env: &HostileEnv) -> Self {
        let frame = env.pool.alloc(&FrameRequest::ONE).unwrap();
        Self::to(frame.into_raw().0.number())
    }

    fn give_back(self, env: &HostileEnv) {
        let left = COUNTS.with_borrow_mut(|counts| {
            let count = counts.get_mut(&self.0).expect("it is counted");
            *count -= 1;
            *count
        });
        if left == 0 {
            COUNTS.with_borrow_mut(|counts| counts.remove(&self.0));
            // SAFETY: O1: it was the last reference; O3: it came out of a commit, or was never mapped.
            env.pool
                .free(unsafe { OwnedFrame::from_raw(Frame::from_number(self.0), Order::ZERO) });
        }
    }

    fn count(frame: u64) -> u32 {
        COUNTS.with_borrow(|counts| counts.get(&frame).copied().unwrap_or(0))
    }
}

// SAFETY: H1, H2: the count passes through the numbers; single frames are aligned.
unsafe impl FrameHandle for Ref {
    fn into_entry(self) -> (Frame, Order) {
        DeviceFrame::new(Frame::from_number(self.0), Order::ZERO)
            .expect("aligned")
            .into_entry()
    }
    unsafe fn from_entry(first: Frame, _order: Order) -> Self {
        Self(first.number())
    }
}

// SAFETY: D1: always single frames.
unsafe impl Divisible for Ref {}

type Table = PageTable<X86_64, &'static HostileEnv, Ref>;

const CPUS: usize = 2;
const MOST: usize = 4;
/// The end of one level-2 table's pages and the beginning of the next one's.
const FIRST: u64 = (3 << 18) - 512;
const PAGES: u64 = 1024;
/// Pages in use: few in each leaf table, next to each other.
const USED: u64 = 48;

struct Space {
    table: Table,
    /// What each page holds; a page that was never written holds 0.
    model: BTreeMap<u64, u64>,
    asid: u16,
}

struct World {
    env: &'static HostileEnv,
    spaces: Vec<Space>,
    loaded: [usize; CPUS],
    rng: SeededRng,
    next: u64,
}

fn at(page: u64) -> Page {
    Page::new(page).unwrap()
}

fn span(first: u64, count: u64) -> PageRange {
    PageRange::with_count(at(first), count).unwrap()
}

fn all() -> PageRange {
    span(FIRST, PAGES)
}

const READ_ONLY: Rights = Rights::READ.union(Rights::USER);

impl World {
    fn new(seed: u64) -> Self {
        COUNTS.with_borrow_mut(HashMap::clear);
        let machine = Machine::builder()
            .memory(MemoryMap::pc(32 << 20))
            .cpus(CPUS)
            .registers(Registers::LONG_PCID)
            .seed(seed)
            .adversary(Adversary::FULL)
            .caching(std::env::var_os("KMEM_MOCK_WITHOUT_TLB").is_none())
            .build()
            .unwrap();
        let env = HostileEnv::new(machine, 0x400, 0);
        let mut table = Table::new(env).unwrap();
        table.set_asid(Asid::new(1)).unwrap();
        let mut world = Self {
            env,
            spaces: vec![Space {
                table,
                model: BTreeMap::new(),
                asid: 1,
            }],
            loaded: [0; CPUS],
            rng: SeededRng::new(seed),
            next: 0,
        };
        for cpu in 0..CPUS {
            world.load(cpu, 0);
        }
        world.fill(0);
        world
    }

    fn load(&mut self, cpu: usize, space: usize) {
        let root = self.spaces[space].table.root();
        let env = self.env;
        // SAFETY: no code runs from the tables; `exit` takes CPUs off first.
        env.machine
            .on_cpu(cpu, || unsafe { env.mmu.load_root(root, true) });
        self.loaded[cpu] = space;
    }

    fn page(&mut self) -> u64 {
        let leaf = self.rng.below(2) * 512;
        let first = if leaf == 0 { 512 - USED } else { 512 };
        FIRST + first + self.rng.below(USED)
    }

    fn unshare(&self, space: usize, page: Page) {
        let table = &self.spaces[space].table;
        let mut gather = table.gather::<4>();
        let mut cursor = table.cursor(all()).unwrap();
        let copied = cursor.unshare(
            page,
            &mut gather,
            |item| match item {
                ForkItem::Leaf(leaf) => UnshareStep::Protected(Ref::to(leaf.frame.number())),
                ForkItem::Payload(..) => UnshareStep::Payload,
            },
            |handle| handle.give_back(self.env),
        );
        copied.unwrap();
        drop(cursor);
        gather.commit(|handle| handle.give_back(self.env));
    }

    /// What a kernel does about a write that faulted.
    fn make_writable(&mut self, space: usize, page: u64) {
        let env = self.env;
        let table = &self.spaces[space].table;
        let one = span(page, 1);
        let Some(leaf) = table.query(at(page)).leaf() else {
            let mut handle = Ref::fresh(env);
            env.machine.memory().store(handle.0 << 12, 8, 0);
            loop {
                let mut cursor = table.cursor(all()).unwrap();
                match cursor.map(at(page), handle, Rights::USER_DATA) {
                    Ok(()) => break,
                    Err((MapError::Shared, back)) => handle = back,
                    Err((error, _)) => panic!("{error}"),
                }
                drop(cursor);
                self.unshare(space, at(page));
            }
            self.spaces[space].model.insert(page, 0);
            return;
        };
        if leaf.attributes.rights.contains(Rights::WRITE) {
            return;
        }
        if let Some(mut entry) = table.lock_entry(at(page))
            && Ref::count(leaf.frame.number()) == 1
        {
            // In a table of the space's own, as a fault does it.
            assert!(entry.relax(Rights::USER_DATA, true));
            return;
        }
        self.unshare(space, at(page));
        let mut cursor = table.cursor(one).unwrap();
        if Ref::count(leaf.frame.number()) == 1 {
            let mut gather = table.gather::<1>();
            cursor.protect(one, Rights::USER_DATA, &mut gather).unwrap();
            return;
        }
        let copy = Ref::fresh(env);
        let old = env
            .machine
            .memory()
            .load(leaf.frame.number() << 12, 8)
            .unwrap();
        env.machine.memory().store(copy.0 << 12, 8, old);
        match cursor.replace(at(page), copy, Rights::USER_DATA).unwrap() {
            Replaced::Leaf(_, old) => {
                drop(cursor);
                old.give_back(env);
            }
            other => panic!("{other:?}"),
        }
    }

    /// Every page that is in use, so that tables are worth detaching whole.
    fn fill(&mut self, cpu: usize) {
        for page in FIRST + 512 - USED..FIRST + 512 + USED {
            self.write_to(cpu, page);
        }
    }

    fn write(&mut self) {
        let cpu = self.rng.below(CPUS as u64) as usize;
        let page = self.page();
        self.write_to(cpu, page);
    }

    fn write_to(&mut self, cpu: usize, page: u64) {
        let space = self.loaded[cpu];
        self.next += 1;
        let value = self.next;
        for _ in 0..40 {
            let user = self.env.machine.cpu(cpu).user();
            if user.write_u64(page << 12, value).is_ok() {
                self.spaces[space].model.insert(page, value);
                return;
            }
            let env = self.env;
            env.machine.on_cpu(cpu, || self.make_writable(space, page));
        }
        panic!("page {page:#x} of space {space} stays read-only");
    }

    /// Every CPU sees what its space should hold.
    fn look(&mut self) {
        for cpu in 0..CPUS {
            let page = self.page();
            let expected = self.spaces[self.loaded[cpu]].model.get(&page).copied();
            let user = self.env.machine.cpu(cpu).user();
            let mut seen = user.read_u64(page << 12).ok();
            for _ in 0..20 {
                if seen.is_some() || expected.is_none() {
                    break;
                }
                seen = user.read_u64(page << 12).ok();
            }
            assert_eq!(seen, expected, "CPU {cpu}, page {page:#x}");
        }
    }

    fn fork(&mut self, space: usize) {
        if self.spaces.len() == MOST {
            return;
        }
        let env = self.env;
        let parent = &self.spaces[space];
        let mut child = Table::empty_like(env, &parent.table).unwrap();
        let taken = |asid: &u16| self.spaces.iter().all(|space| space.asid != *asid);
        let asid = (1..).find(taken).unwrap();
        child.set_asid(Asid::new(asid)).unwrap();
        let most = 1 + self.rng.below(2) as usize;
        let range = span(2 << 18, 2 << 18);
        let mut gather = parent.table.gather::<4>();
        // SAFETY: no cursor is open, and nothing runs before the commit.
        let outcome = unsafe {
            parent
                .table
                .fork_sharing(&child, range, most, &mut gather, |item| {
                    let ForkItem::Leaf(leaf) = item else {
                        return ForkStep::Skip;
                    };
                    ForkStep::Leaf {
                        handle: Ref::to(leaf.frame.number()),
                        child: leaf.attributes.write_protected(),
                        parent: Some(leaf.attributes.write_protected()),
                    }
                })
        };
        outcome.unwrap();
        gather.commit(|handle| handle.give_back(env));
        drop(gather);
        let model = parent.model.clone();
        self.spaces.push(Space {
            table: child,
            model,
            asid,
        });
    }

    fn exit(&mut self, space: usize) {
        if self.spaces.len() == 1 {
            return;
        }
        let last = self.spaces.len() - 1;
        for cpu in 0..CPUS {
            if self.loaded[cpu] == space {
                self.load(cpu, usize::from(space == 0));
            }
        }
        let gone = self.spaces.swap_remove(space);
        for loaded in &mut self.loaded {
            if *loaded == last {
                *loaded = space;
            }
        }
        let env = self.env;
        gone.table
            .destroy(|_, handle| handle.give_back(env), |_, _| {});
    }

    fn unmap(&mut self, space: usize) {
        let (first, count) = (self.page(), 1 + self.rng.below(USED));
        let count = if self.rng.below(4) == 0 { PAGES } else { count };
        let first = if count == PAGES { FIRST } else { first };
        let range = span(first, count.min(FIRST + PAGES - first));
        let env = self.env;
        let mut rest = range;
        loop {
            let table = &self.spaces[space].table;
            let mut gather = table.gather::<8>();
            let mut cursor = table.cursor(rest).unwrap();
            let outcome = cursor.unmap(rest, &mut gather);
            drop(cursor);
            gather.commit(|handle| handle.give_back(env));
            drop(gather);
            let next = match outcome {
                Ok(_) => break,
                Err(ChangeError::Full { next }) => next,
                Err(ChangeError::Shared { at }) => {
                    self.unshare(space, at);
                    at
                }
                Err(error) => panic!("{error}"),
            };
            rest = PageRange::new(next, rest.last()).unwrap();
        }
        let model = &mut self.spaces[space].model;
        model.retain(|&page, _| !range.contains(at(page)));
    }

    /// Changes a space by plain stores, if no CPU runs it; else it is refused.
    fn change_quiescent(&mut self, space: usize) {
        let env = self.env;
        let (page, kind) = (self.page(), self.rng.below(3));
        let loaded = self.loaded.contains(&space);
        let mut shared = None;
        match self.spaces[space].table.quiesce() {
            Err(error) => {
                assert_eq!(error, QuiesceError::Loaded);
                assert!(loaded);
            }
            Ok(quiescent) => {
                assert!(!loaded, "a CPU runs it");
                let mut gather = quiescent.gather::<64>();
                let mut cursor = quiescent.cursor(all()).unwrap();
                let range = span(page, 32.min(FIRST + PAGES - page));
                let outcome = match kind {
                    0 => cursor.protect(range, READ_ONLY, &mut gather).map(drop),
                    1 => cursor.unmap(range, &mut gather).map(drop),
                    _ => cursor
                        .harvest(range, Harvest::all(), &mut gather, |_| {})
                        .map(drop)
                        .map_err(|(error, _)| error),
                };
                drop(cursor);
                gather.commit(|handle| handle.give_back(env));
                drop(gather);
                if kind == 0 && outcome.is_ok() {
                    for page in range.iter() {
                        let leaf = quiescent.query(page).leaf();
                        assert!(leaf.is_none_or(|leaf| leaf.attributes.rights == READ_ONLY));
                    }
                }
                if let Err(ChangeError::Shared { at }) = outcome {
                    shared = Some(at);
                }
                let end = shared.map_or(range.last().number() + 1, Page::number);
                if kind == 1 {
                    let model = &mut self.spaces[space].model;
                    model.retain(|&other, _| other < page || other >= end);
                }
            }
        }
        if let Some(at) = shared {
            self.unshare(space, at);
        }
    }

    fn step(&mut self) {
        let space = self.rng.below(self.spaces.len() as u64) as usize;
        match self.rng.below(24) {
            0..=9 => self.write(),
            10 | 11 => self.fork(space),
            12 => self.exit(space),
            21 => self.fill(0),
            13 => self.unmap(space),
            14..=17 => self.change_quiescent(space),
            18..=20 => {
                let cpu = self.rng.below(CPUS as u64) as usize;
                self.load(cpu, space);
            }
            _ => {}
        }
        self.look();
        let stale = self.env.machine.audit(0, u64::MAX);
        assert!(stale.is_empty(), "{}", stale[0]);
    }

    fn finish(mut self) -> Stats {
        while self.spaces.len() > 1 {
            self.exit(0);
        }
        let env = self.env;
        let idle = Table::new(env).unwrap();
        for cpu in 0..CPUS {
            // SAFETY: as in `load`.
            env.machine
                .on_cpu(cpu, || unsafe { env.mmu.load_root(idle.root(), false) });
        }
        let last = self.spaces.pop().unwrap();
        last.table
            .destroy(|_, handle| handle.give_back(env), |_, _| {});
        idle.destroy(|_, _| {}, |_, _| {});
        assert_eq!(env.pool.in_use(), 0, "frames leaked");
        let stats = env.machine.stats();
        // SAFETY: everything that used the environment is gone.
        unsafe { env.retire() };
        stats
    }
}

/// A run of so many steps.
pub fn family(seed: u64, steps: u64) -> Stats {
    let mut world = World::new(seed);
    for _ in 0..steps {
        world.step();
    }
    world.finish()
}
