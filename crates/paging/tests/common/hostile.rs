// A kernel's day on a hostile machine: several spaces and CPUs, every operation, gathers left open for a while, and
// after each step accesses of all CPUs that are held against a flat map.
//
// What must hold, and is looked for all the time:
// - an access comes to what the flat map says, except on pages whose change waits for its flush;
// - no cached translation leads to a free frame, ever; where nothing waits, none differs from the tables;
// - the dirty bit says exactly whether the page was written; tables, counted from the map, are as many as there are.
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};

use kmem_hal::{
    Asid, Frame, FrameRequest, FrameSink, FrameSource, Mmu, Order, OwnedFrame, Page, PageRange,
};
use kmem_mock_x86::walker::{Stop, Touch, WalkContext, walk};
use kmem_mock_x86::{
    AccessKind, Adversary, Machine, MemoryMap, Mode, Registers, ReservedInputs, SeededRng, Stats,
    Violation, ViolationKind, manual,
};
use kmem_paging::format::Format;
use kmem_paging::{
    Attributes, ChangeError, Cleared, Entry, ForkError, ForkItem, ForkStep, Gather, Harvest,
    Harvested, HugeError, Leaf, MapError, MemoryType, MoveError, PageTable, Payload, Replaced,
    Rights, Run, SoftBit, TableCache,
};

use super::hostile_env::{Caller, HostileEnv};

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

/// What a page has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Item {
    Leaf {
        frame: u64,
        order: Order,
        /// As the format expresses them; accessed and dirty are clear here.
        attributes: Attributes,
        /// Whether it was written; `None` where a write may have been missed legally.
        dirty: Option<bool>,
    },
    Payload(u64),
}

impl Item {
    fn pages(&self) -> u64 {
        match self {
            Self::Leaf { order, .. } => order.frames(),
            Self::Payload(_) => 1,
        }
    }
}

type Model = BTreeMap<u64, Item>;

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

fn find(model: &Model, page: u64) -> Option<(u64, Item)> {
    let (&first, &item) = model.range(..=page).next_back()?;
    (first + (item.pages() - 1) >= page).then_some((first, item))
}

fn orders<F: Format>(levels: usize) -> Vec<Order> {
    F::LEVELS[..levels]
        .iter()
        .filter(|level| level.leaf)
        .map(|level| level.order())
        .collect()
}

fn split_item<F: Format>(model: &mut Model, first: u64) {
    let Some(Item::Leaf {
        frame,
        order,
        attributes,
        dirty,
    }) = model.remove(&first)
    else {
        panic!("no leaf to split")
    };
    let orders = orders::<F>(F::LEVELS.len());
    let position = orders.iter().position(|&other| other == order).unwrap();
    let part = orders[position - 1];
    for index in 0..order.frames() / part.frames() {
        let offset = index * part.frames();
        let item = Item::Leaf {
            frame: frame + offset,
            order: part,
            attributes,
            dirty,
        };
        model.insert(first + offset, item);
    }
}

/// Cuts leaves at `page`, as operations do at the ends of their ranges.
fn cut<F: Format>(model: &mut Model, page: u64) {
    while let Some((first, Item::Leaf { .. })) = find(model, page) {
        if first == page {
            return;
        }
        split_item::<F>(model, first);
    }
}

fn inside<F: Format>(model: &mut Model, first: u64, count: u64) -> Vec<(u64, Item)> {
    cut::<F>(model, first);
    cut::<F>(model, first + count);
    let found = model.range(first..first + count);
    found.map(|(&page, &item)| (page, item)).collect()
}

fn is_free(model: &Model, first: u64, count: u64) -> bool {
    find(model, first).is_none() && model.range(first..first + count).next().is_none()
}

fn level_of<F: Format>(order: Order) -> usize {
    F::LEVELS
        .iter()
        .position(|level| level.order() == order)
        .unwrap()
        + 1
}

/// What becomes of attributes in a leaf, by the manual alone: any access includes reading, and where there is no XD,
/// executing; a leaf without access keeps nothing but G. Accessed and dirty are clear in the model.
fn expressed<F: Format>(attributes: &Attributes) -> Attributes {
    let has_xd = F::LEVELS[0].bits == 9;
    let mut rights = attributes.rights & Rights::GLOBAL;
    if attributes.rights.grants_access() {
        rights = attributes.rights | Rights::READ;
        if !has_xd {
            rights |= Rights::EXECUTE;
        }
    }
    Attributes {
        rights,
        accessed: false,
        dirty: false,
        ..*attributes
    }
}

fn same(first: u64, item: &Item, leaf: &Leaf) {
    let Item::Leaf {
        frame,
        order,
        attributes,
        dirty,
    } = *item
    else {
        panic!("{item:?} is no leaf: {leaf:?}")
    };
    let mut found = leaf.attributes;
    if let Some(dirty) = dirty {
        assert_eq!(found.dirty, dirty, "dirty bit of {leaf:?}");
    }
    (found.accessed, found.dirty) = (false, false);
    assert_eq!(
        (leaf.page.number(), leaf.frame.number(), leaf.order, found),
        (first, frame, order, attributes)
    );
}

impl<F: Format> Space<F> {
    fn new(table: Table<F>, asid: u16) -> Self {
        Self {
            table: Box::leak(Box::new(table)),
            model: Model::new(),
            gathers: Vec::new(),
            waiting: BTreeSet::new(),
            asid,
        }
    }

    fn wait(&mut self, first: u64, count: u64) {
        self.waiting.extend(first..first + count);
    }

    /// The tables that the model asks for: emptied ones must be gone, others must be there.
    fn expected_tables(&self) -> usize {
        let levels = self.table.levels();
        let mut tables = BTreeSet::new();
        for (&page, item) in &self.model {
            let order = match item {
                Item::Leaf { order, .. } => *order,
                Item::Payload(_) => Order::ZERO,
            };
            for number in level_of::<F>(order)..levels {
                let level = F::LEVELS[number - 1];
                tables.insert((number, page >> (level.shift + level.bits)));
            }
        }
        tables.len() + 1
    }

    /// Everything that the table says of `range`, held against the model.
    fn compare(&self, range: PageRange) {
        let mut cursor = self.table.cursor(range).unwrap();
        let mut seen = Model::new();
        while let Some(run) = cursor.next_run() {
            match run {
                Run::Absent(_) => {}
                Run::Payload(page, payload) => {
                    seen.insert(page.number(), Item::Payload(payload.number()));
                }
                Run::Leaves { range, first } => {
                    let step = first.order.frames();
                    for index in 0..range.count() / step {
                        let page = first.page.number() + index * step;
                        let leaf = Leaf {
                            page: at(page),
                            frame: Frame::from_number(first.frame.number() + index * step),
                            ..first
                        };
                        let item = self.model.get(&page);
                        same(page, item.expect("a leaf that nobody mapped"), &leaf);
                        seen.insert(page, *item.unwrap());
                    }
                }
                _ => {}
            }
        }
        drop(cursor);
        let expected = self
            .model
            .range(range.first().number()..=range.last().number());
        for (page, item) in expected {
            assert_eq!(seen.get(page), Some(item), "page {page:#x}");
        }
    }
}

impl<F: Format> World<F> {
    pub fn new(setup: Setup, seed: u64) -> Self {
        let machine = Machine::builder()
            .memory(MemoryMap::pc(64 << 20))
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
        let has_kernel = setup.kernel && !top.leaf;
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

    fn page(&mut self) -> u64 {
        let area = self.areas[self.rng.below(self.areas.len() as u64) as usize];
        area + self.rng.below(24)
    }

    /// A page that the space of a CPU has, most of the time.
    fn used_page(&mut self, cpu: usize) -> u64 {
        let page = self.page();
        if self.rng.below(8) == 0 {
            return page;
        }
        let model = &self.spaces[self.loaded[cpu]].model;
        match model.range(page..).next() {
            Some((&first, item)) if item.pages() == 1 => first,
            Some((&first, item)) => first + self.rng.next() % item.pages(),
            None => page,
        }
    }

    fn attributes(&mut self) -> Attributes {
        let rights = [
            Rights::READ | Rights::USER,
            Rights::USER_DATA,
            Rights::USER_DATA,
            Rights::USER_DATA,
            Rights::USER_CODE,
            Rights::KERNEL_DATA,
            Rights::empty(),
            Rights::all().difference(Rights::GLOBAL),
        ][self.rng.below(8) as usize];
        let mut attributes = Attributes::new(rights);
        let seed = self.rng.next();
        if seed & 3 == 0 {
            attributes = attributes.accessed();
        }
        if seed & 12 == 0 {
            attributes = attributes.accessed().dirty();
        }
        if seed & 0x30 == 0 {
            attributes = attributes.soft(SoftBit::<F, 1>::BIT);
        }
        if seed & 0xc0 == 0 {
            attributes = attributes.memory_type(
                [
                    MemoryType::Uncached,
                    MemoryType::WriteThrough,
                    MemoryType::WriteCombining,
                ][(seed >> 8) as usize % 3],
            );
        }
        if F::PROTECTION_KEYS > 1 && seed & 0x7000 == 0 {
            attributes =
                attributes.pkey([NO_ACCESS_KEY, NO_WRITE_KEY, 15][(seed >> 16) as usize % 3]);
        }
        if !F::can_encode(1, Frame::ZERO, &attributes) {
            attributes = attributes.memory_type(MemoryType::WriteBack);
        }
        attributes
    }

    /// Whether an access may pass, by the manual's rules for these registers.
    fn allows(&self, attributes: &Attributes, kind: AccessKind, user: bool) -> bool {
        use kmem_mock_x86::manual::cr4;
        let rights = attributes.rights;
        let on = |bit| self.setup.registers.cr4 & bit != 0;
        let is_user = rights.contains(Rights::USER);
        let needed = match kind {
            AccessKind::Read => Rights::READ,
            AccessKind::Write => Rights::WRITE,
            AccessKind::Fetch => Rights::EXECUTE,
        };
        let refused = user && !is_user
            || !user && is_user && kind == AccessKind::Fetch && on(cr4::SMEP)
            || !user && is_user && kind != AccessKind::Fetch && on(cr4::SMAP)
            || on(cr4::PKE)
                && is_user
                && (attributes.pkey == NO_ACCESS_KEY && kind != AccessKind::Fetch
                    || attributes.pkey == NO_WRITE_KEY && kind == AccessKind::Write);
        rights.contains(needed) && !refused
    }

    fn access(&mut self) {
        let cpu = self.rng.below(self.setup.cpus as u64) as usize;
        let kind =
            [AccessKind::Read, AccessKind::Write, AccessKind::Fetch][self.rng.below(3) as usize];
        if self.kernel.is_some() && self.rng.below(6) == 0 {
            let page = self.kernel_page();
            self.check(cpu, page, kind, false);
            return;
        }
        let page = self.used_page(cpu);
        // Mostly what a program would do, and again and again.
        let user = self.rng.below(8) != 0;
        let kind = match find(&self.spaces[self.loaded[cpu]].model, page) {
            Some((_, Item::Leaf { attributes, .. })) if self.rng.below(8) != 0 => {
                if attributes.rights.contains(Rights::WRITE) && self.rng.below(2) == 0 {
                    AccessKind::Write
                } else {
                    AccessKind::Read
                }
            }
            _ => kind,
        };
        for _ in 0..1 + self.rng.below(3) {
            self.check(cpu, page, kind, user);
        }
    }

    /// One access of one CPU, held against the model.
    fn check(&mut self, cpu: usize, page: u64, kind: AccessKind, user: bool) {
        let (model, waiting) = {
            let space = match &self.kernel {
                Some(kernel) if page >= self.kernel_base => kernel,
                _ => &self.spaces[self.loaded[cpu]],
            };
            (find(&space.model, page), space.waiting.contains(&page))
        };
        let expected = match model {
            Some((
                first,
                Item::Leaf {
                    frame, attributes, ..
                },
            )) if self.allows(&attributes, kind, user) => Some(frame + (page - first)),
            _ => None,
        };
        let mut handle = self.env.machine.cpu(cpu);
        if user {
            handle = handle.user();
        }
        let linear = page << 12 | 0x123;
        // A fault from an entry that was stricter once is allowed, several in a row as well; not for ever.
        let mut seen = handle.translate(linear, kind);
        for _ in 0..20 {
            if expected.is_none() || seen.is_ok() {
                break;
            }
            seen = handle.translate(linear, kind);
        }
        if waiting {
            // Either is allowed until the flush; a write may be one that a cached dirty bit swallowed.
            if kind == AccessKind::Write && seen.is_ok() {
                self.wrote(cpu, page, None);
            }
            return;
        }
        match expected {
            Some(frame) => assert_eq!(
                seen.ok(),
                Some(frame << 12 | 0x123),
                "CPU {cpu} page {page:#x} {kind:?} user {user} {model:?}: {}",
                self.env.machine.explain(cpu, linear)
            ),
            None => assert!(
                seen.is_err(),
                "CPU {cpu} page {page:#x} {kind:?} user {user} {model:?} should fault: {}",
                self.env.machine.explain(cpu, linear)
            ),
        }
        if kind == AccessKind::Write && expected.is_some() {
            self.wrote(cpu, page, Some(true));
        }
    }

    fn wrote(&mut self, cpu: usize, page: u64, how: Option<bool>) {
        let model = match &mut self.kernel {
            Some(kernel) if page >= self.kernel_base => &mut kernel.model,
            _ => &mut self.spaces[self.loaded[cpu]].model,
        };
        if let Some((first, _)) = find(model, page)
            && let Some(Item::Leaf { dirty, .. }) = model.get_mut(&first)
            && *dirty != Some(true)
        {
            *dirty = how;
        }
    }

    /// A frame of the caller's, which the fuse does not count.
    fn alloc(&self, order: Order) -> Option<OwnedFrame> {
        self.env.pool.set_fuse(None);
        let frame = self.env.pool.alloc(&FrameRequest::new(order)).ok();
        self.env.pool.set_fuse(self.fuse);
        frame
    }

    /// After a refusal for want of memory: all is as it was.
    fn unchanged(&self, space: usize) {
        let of = &self.spaces[space];
        of.compare(self.lower());
        if !F::FIXED_TOP {
            assert_eq!(of.table.table_count(), of.expected_tables(), "tables");
        }
    }

    /// Commits a gather, now or some operations later.
    fn settle(&mut self, space: usize, gather: Pending<F>, first: u64, count: u64) {
        let patience = self.rng.below(4) == 0;
        let of = &mut self.spaces[space];
        if patience && of.gathers.len() < 2 {
            if !gather.is_empty() {
                of.wait(first, count);
                of.gathers.push(gather);
            }
            return;
        }
        self.commit(space, gather);
    }

    fn commit(&mut self, space: usize, mut gather: Pending<F>) {
        let of = &mut self.spaces[space];
        let flushes = !gather.is_empty();
        gather.commit_to(&self.env.pool);
        if flushes {
            // Where others wait, a commit flushes their pages too.
            of.waiting.clear();
        }
    }

    fn commit_all(&mut self, space: usize) {
        while let Some(gather) = self.spaces[space].gathers.pop() {
            self.commit(space, gather);
        }
        self.spaces[space].waiting.clear();
    }

    /// Looks through all caches.
    fn audit(&self) {
        let all_quiet = self
            .spaces
            .iter()
            .chain(&self.kernel)
            .all(|space| space.waiting.is_empty());
        let is_crime = |violation: &&Violation| {
            all_quiet
                || matches!(
                    violation.kind,
                    ViolationKind::FreedFrame | ViolationKind::FreedTable
                )
        };
        let found = self.env.machine.audit(0, u64::MAX);
        if let Some(story) = found.iter().find(is_crime) {
            panic!("{story}");
        }
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

    /// Some CPU comes back to the space that was changed, with what it has cached under its tag, and looks there.
    fn revisit(&mut self) {
        let (space, first, count) = self.last;
        if space >= self.spaces.len() {
            return;
        }
        if self.rng.below(3) == 0 {
            let cpu = self.rng.below(self.setup.cpus as u64) as usize;
            if self.loaded[cpu] != space {
                self.load(cpu, space);
                self.audit();
            }
        }
        for cpu in 0..self.setup.cpus {
            if self.loaded[cpu] == space {
                let page = first + self.rng.below(count);
                let kind = [AccessKind::Read, AccessKind::Write][self.rng.below(2) as usize];
                self.check(cpu, page, kind, true);
            }
        }
    }

    fn compare(&self) {
        let lower = self.lower();
        for space in &self.spaces {
            space.compare(lower);
            self.agree(space);
            if !F::FIXED_TOP {
                assert_eq!(space.table.table_count(), space.expected_tables(), "tables");
            }
        }
        if let Some(kernel) = &self.kernel {
            kernel.compare(pages(self.kernel_base, 1024));
            self.agree(kernel);
        }
    }

    /// Holds the tables of a space, read as the manual says, against the model.
    fn agree(&self, space: &Space<F>) {
        let memory = self.env.machine.memory();
        let registers = self.setup.registers;
        let mode = Mode::of(registers.cr0, registers.cr4, registers.efer).unwrap();
        let root = space.table.root().frame.start().as_u64();
        let register = |index: u64| match mode.levels[0].accessed {
            true => 0,
            false => memory.load(root + index * 8, 8).unwrap(),
        };
        let context = WalkContext {
            mode,
            cr3: root,
            pdptes: [register(0), register(1), register(2), register(3)],
            inputs: ReservedInputs {
                max_phys_bits: 46,
                nxe: registers.efer & manual::efer::NXE != 0,
                pse: registers.cr4 & manual::cr4::PSE != 0,
                gigabyte: true,
            },
            wp: true,
            smep: false,
            smap: false,
            ac: false,
            pge: true,
            pkru: None,
        };
        for (&page, item) in &space.model {
            let walk = walk(
                memory,
                &context,
                mode.wrap(page << 12),
                None,
                Touch::Nothing,
            );
            let Item::Leaf {
                frame,
                order,
                attributes,
                dirty,
            } = *item
            else {
                assert_eq!(walk.outcome, Err(Stop::NotPresent), "payload at {page:#x}");
                continue;
            };
            if !attributes.rights.grants_access() {
                assert_eq!(
                    walk.outcome,
                    Err(Stop::NotPresent),
                    "no access at {page:#x}"
                );
                continue;
            }
            let found = walk
                .outcome
                .unwrap_or_else(|stop| panic!("page {page:#x}: {stop:?}: {:x?}", walk.steps()));
            // SDM 3A 12.12.2 and table 12-10, with the value that the crate asks kernels to give the register.
            let memory_type = match 0x0007_0106_0007_0406u64 >> (8 * found.pat) & 0xff {
                6 => MemoryType::WriteBack,
                4 => MemoryType::WriteThrough,
                0 => MemoryType::Uncached,
                1 => MemoryType::WriteCombining,
                other => panic!("memory type {other}"),
            };
            let has = |right| attributes.rights.contains(right);
            assert_eq!(
                (
                    found.page,
                    found.shift,
                    found.rights.writable,
                    found.rights.user,
                    found.rights.executable,
                    found.global,
                    found.key,
                    memory_type
                ),
                (
                    frame << 12,
                    12 + u32::from(order.get()),
                    has(Rights::WRITE),
                    has(Rights::USER),
                    has(Rights::EXECUTE),
                    has(Rights::GLOBAL),
                    attributes.pkey,
                    attributes.memory_type
                ),
                "page {page:#x}: {attributes:?}: {:x?}",
                walk.steps()
            );
            if let Some(dirty) = dirty {
                assert_eq!(found.dirty, dirty, "page {page:#x}");
            }
        }
    }

    fn kernel_page(&mut self) -> u64 {
        self.kernel_base + self.rng.below(24)
    }

    /// What the kernel does in its own part, which all spaces see.
    fn operate_kernel(&mut self) {
        let page = self.kernel_page();
        let count = 1 + self.rng.below(4);
        let range = pages(page, count);
        let global = if self.rng.below(2) == 0 {
            Rights::GLOBAL
        } else {
            Rights::empty()
        };
        let rights = [
            Rights::KERNEL_DATA,
            Rights::READ,
            Rights::READ | Rights::EXECUTE,
        ][self.rng.below(3) as usize]
            | global;
        let frame = self.alloc(Order::ZERO);
        let choice = self.rng.below(5);
        let env = self.env;
        let kernel = self.kernel.as_mut().unwrap();
        let mut gather = kernel.table.gather::<16>();
        let mut cursor = kernel.table.cursor(range).unwrap();
        match (choice, frame) {
            (0..=1, Some(frame)) => {
                let number = frame.first().number();
                match cursor.map(range.first(), frame, rights) {
                    Ok(()) => {
                        let before = kernel.model.insert(
                            page,
                            Item::Leaf {
                                frame: number,
                                order: Order::ZERO,
                                attributes: expressed::<F>(&rights.into()),
                                dirty: Some(false),
                            },
                        );
                        assert_eq!(before, None);
                    }
                    Err((error, frame)) => {
                        match error {
                            MapError::Occupied => assert!(kernel.model.contains_key(&page)),
                            MapError::Memory(_) => {}
                            other => panic!("{other}"),
                        }
                        env.pool.free(frame);
                    }
                }
            }
            (2, frame) => {
                if let Some(frame) = frame {
                    env.pool.free(frame);
                }
                cursor.unmap(range, &mut gather).unwrap();
                for page in page..page + count {
                    kernel.model.remove(&page);
                }
            }
            (_, frame) => {
                if let Some(frame) = frame {
                    env.pool.free(frame);
                }
                cursor.protect(range, rights, &mut gather).unwrap();
                for (_, item) in kernel.model.range_mut(page..page + count) {
                    if let Item::Leaf { attributes, .. } = item {
                        *attributes = expressed::<F>(&attributes.rights(rights));
                    }
                }
            }
        }
        drop(cursor);
        gather.commit_to(&env.pool);
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

    /// A filled hole is what it says at once, whatever waits.
    fn filled(&mut self, space: usize, page: u64, count: u64) {
        for page in page..page + count {
            self.spaces[space].waiting.remove(&page);
        }
    }

    fn map(&mut self, space: usize, page: u64) {
        let attributes = self.attributes();
        let Some(frame) = self.alloc(Order::ZERO) else {
            return;
        };
        let number = frame.first().number();
        let of = &mut self.spaces[space];
        let mut cursor = of.table.cursor(pages(page, 1)).unwrap();
        match cursor.map(at(page), frame, attributes) {
            Ok(()) => {
                assert!(is_free(&of.model, page, 1));
                let item = Item::Leaf {
                    frame: number,
                    order: Order::ZERO,
                    attributes: expressed::<F>(&attributes),
                    dirty: Some(attributes.dirty),
                };
                of.model.insert(page, item);
                drop(cursor);
                self.filled(space, page, 1);
            }
            Err((error, frame)) => {
                self.env.pool.free(frame);
                match error {
                    MapError::Occupied => assert!(find(&of.model, page).is_some()),
                    MapError::Memory(_) => {
                        drop(cursor);
                        self.unchanged(space);
                    }
                    other => panic!("{other}"),
                }
            }
        }
    }

    /// Where huge leaves of the second level live: two of them.
    fn huge_page(&mut self) -> (u64, Order) {
        let order = F::LEVELS[1].order();
        let first = self.areas[2] + self.rng.below(2) * order.frames();
        (first, order)
    }

    fn map_huge(&mut self, space: usize) {
        let (page, order) = self.huge_page();
        let attributes = self.attributes();
        if !is_free(&self.spaces[space].model, page, order.frames()) {
            // Make room: what lives there goes.
            return self.unmap(space, page, order.frames());
        }
        let Some(block) = self.alloc(order) else {
            return;
        };
        let number = block.first().number();
        let of = &mut self.spaces[space];
        let mut cursor = of.table.cursor(pages(page, order.frames())).unwrap();
        match cursor.map(at(page), block, attributes) {
            Ok(()) => {
                let item = Item::Leaf {
                    frame: number,
                    order,
                    attributes: expressed::<F>(&attributes),
                    dirty: Some(attributes.dirty),
                };
                of.model.insert(page, item);
                drop(cursor);
                self.filled(space, page, order.frames());
            }
            Err((error, block)) => {
                assert!(matches!(error, MapError::Memory(_)), "{error}");
                self.env.pool.free(block);
                drop(cursor);
                self.unchanged(space);
            }
        }
    }

    fn map_range(&mut self, space: usize, page: u64, count: u64) {
        let attributes = self.attributes();
        let env = self.env;
        let of = &mut self.spaces[space];
        let range = pages(page, count);
        let mut given = Vec::new();
        let mut cursor = of.table.cursor(range).unwrap();
        let result = cursor.map_range(range, Order::ZERO, attributes, |page, _| {
            let frame = env.pool.alloc(&FrameRequest::ONE).ok()?;
            given.push((page.number(), frame.first().number()));
            Some(frame)
        });
        drop(cursor);
        let end = match result {
            Ok(()) => page + count,
            Err(stopped) => {
                if let Some(frame) = stopped.handle {
                    env.pool.free(frame);
                }
                match stopped.error {
                    MapError::Occupied => {
                        assert!(find(&of.model, stopped.at.number()).is_some())
                    }
                    MapError::Memory(_) => assert_eq!((stopped.at, given.len()), (at(page), 0)),
                    MapError::OutOfRange => {}
                    other => panic!("{other}"),
                }
                stopped.at.number()
            }
        };
        for (page, frame) in given.into_iter().filter(|&(page, _)| page < end) {
            assert!(is_free(&of.model, page, 1));
            let item = Item::Leaf {
                frame,
                order: Order::ZERO,
                attributes: expressed::<F>(&attributes),
                dirty: Some(attributes.dirty),
            };
            of.model.insert(page, item);
        }
        self.filled(space, page, end - page);
    }

    fn unmap(&mut self, space: usize, page: u64, count: u64) {
        let mut gather = self.spaces[space].table.gather::<16>();
        let mut first = page;
        let end = page + count;
        let mut cleared = Vec::new();
        // Shown one by one, or not: then whole tables may go at once.
        let shown = self.rng.below(2) == 0;
        loop {
            let of = &mut self.spaces[space];
            let range = pages(first, end - first);
            let mut cursor = of.table.cursor(range).unwrap();
            let result = if shown {
                cursor.unmap_with(range, &mut gather, |item| cleared.push(item))
            } else {
                cursor.unmap(range, &mut gather)
            };
            drop(cursor);
            match result {
                Ok(_) => break,
                Err(ChangeError::Full { next }) => {
                    // What is pending is flushed and given back; then it goes on.
                    gather.commit_to(&self.env.pool);
                    self.spaces[space].waiting.clear();
                    first = next.number();
                }
                Err(ChangeError::Memory(_)) => {
                    drop(gather);
                    self.unchanged(space);
                    return;
                }
                Err(other) => panic!("{other}"),
            }
        }
        let of = &mut self.spaces[space];
        let expected = inside::<F>(&mut of.model, page, count);
        for (first, _) in &expected {
            of.model.remove(first);
        }
        if shown {
            assert_eq!(cleared.len(), expected.len(), "what was cleared");
        }
        for ((first, item), cleared) in expected.iter().zip(cleared) {
            match cleared {
                Cleared::Leaf(leaf) => same(*first, item, &leaf),
                Cleared::Payload(page, payload) => assert_eq!(
                    (*first, *item),
                    (page.number(), Item::Payload(payload.number()))
                ),
            }
        }
        let (from, to) = self.touched(page, count);
        self.settle(space, gather, from, to - from);
    }

    /// The pages that a change of a range may have left stale: whole huge leaves that it cut.
    fn touched(&self, page: u64, count: u64) -> (u64, u64) {
        let order = F::LEVELS[1].order();
        let (first, end) = (page, page + count);
        (
            first >> order.get() << order.get(),
            end.next_multiple_of(order.frames()),
        )
    }

    /// Changes rights alone, or everything.
    fn change(&mut self, space: usize, page: u64, count: u64, rights_only: bool) {
        let attributes = self.attributes();
        let of = &mut self.spaces[space];
        let range = pages(page, count);
        let mut gather = of.table.gather::<16>();
        let mut cursor = of.table.cursor(range).unwrap();
        let result = if rights_only {
            cursor.protect(range, attributes.rights, &mut gather)
        } else {
            cursor.update(range, &mut gather, |leaf| {
                let keep = leaf.attributes;
                Some(Attributes {
                    accessed: keep.accessed,
                    dirty: keep.dirty,
                    ..attributes
                })
            })
        };
        drop(cursor);
        if let Err(error) = result {
            assert!(matches!(error, ChangeError::Memory(_)), "{error}");
            drop(gather);
            return self.unchanged(space);
        }
        for (first, item) in inside::<F>(&mut of.model, page, count) {
            if let Item::Leaf {
                frame,
                order,
                attributes: old,
                dirty,
            } = item
            {
                let new = if rights_only {
                    old.rights(attributes.rights)
                } else {
                    attributes
                };
                let attributes = expressed::<F>(&new);
                let item = Item::Leaf {
                    frame,
                    order,
                    attributes,
                    dirty,
                };
                of.model.insert(first, item);
            }
        }
        let (from, to) = self.touched(page, count);
        self.settle(space, gather, from, to - from);
    }

    /// Single pages through one cursor, which keeps the table that it is in.
    fn session(&mut self, space: usize, page: u64) {
        let area = pages(page & !0xf, 64);
        let turns = 2 + self.rng.below(12);
        let table = self.spaces[space].table;
        let mut cursor = table.cursor(area).unwrap();
        let mut gather = table.gather::<16>();
        for _ in 0..turns {
            let page = area.first().number() + self.rng.below(24);
            let attributes = self.attributes();
            let choice = self.rng.below(4);
            let frame = self.alloc(Order::ZERO);
            let of = &mut self.spaces[space];
            let old = find(&of.model, page);
            if matches!(old, Some((_, Item::Leaf { order, .. })) if order > Order::ZERO) {
                if let Some(frame) = frame {
                    self.env.pool.free(frame);
                }
                continue;
            }
            match (choice, frame) {
                (0..=1, Some(frame)) => {
                    let number = frame.first().number();
                    // What this gather has taken away is flushed by whoever fills the hole.
                    match cursor.map(at(page), frame, attributes) {
                        Ok(()) => {
                            assert_eq!(old, None);
                            of.model.insert(
                                page,
                                Item::Leaf {
                                    frame: number,
                                    order: Order::ZERO,
                                    attributes: expressed::<F>(&attributes),
                                    dirty: Some(attributes.dirty),
                                },
                            );
                            of.waiting.remove(&page);
                        }
                        Err((error, frame)) => {
                            self.env.pool.free(frame);
                            match error {
                                MapError::Occupied => assert!(old.is_some()),
                                MapError::Memory(_) => {}
                                other => panic!("{other}"),
                            }
                        }
                    }
                }
                (2, frame) => {
                    if let Some(frame) = frame {
                        self.env.pool.free(frame);
                    }
                    let cleared = cursor.unmap(pages(page, 1), &mut gather).unwrap();
                    assert_eq!(cleared == 1, old.is_some());
                    of.model.remove(&page);
                    of.waiting.insert(page);
                }
                (_, frame) => {
                    if let Some(frame) = frame {
                        self.env.pool.free(frame);
                    }
                    cursor
                        .protect(pages(page, 1), attributes.rights, &mut gather)
                        .unwrap();
                    if let Some(Item::Leaf {
                        attributes: old, ..
                    }) = of.model.get_mut(&page)
                    {
                        *old = expressed::<F>(&old.rights(attributes.rights));
                    }
                    of.waiting.insert(page);
                }
            }
            assert_eq!(
                cursor.query(at(page)) == Entry::Empty,
                !self.spaces[space].model.contains_key(&page)
            );
        }
        drop(cursor);
        let idle = gather.is_empty();
        self.settle(space, gather, page, 1);
        if idle && self.spaces[space].gathers.is_empty() {
            self.spaces[space].waiting.clear();
        }
    }

    fn replace(&mut self, space: usize, page: u64) {
        let attributes = self.attributes();
        let Some(frame) = self.alloc(Order::ZERO) else {
            return;
        };
        let number = frame.first().number();
        let env = self.env;
        let of = &mut self.spaces[space];
        let mut cursor = of.table.cursor(pages(page, 1)).unwrap();
        let old = find(&of.model, page);
        match cursor.replace(at(page), frame, attributes) {
            Ok(before) => {
                match (before, old) {
                    (Replaced::Nothing, None) => {}
                    (Replaced::Payload(payload), Some((_, Item::Payload(number)))) => {
                        assert_eq!(payload.number(), number)
                    }
                    (Replaced::Leaf(leaf, old), Some((first, item))) => {
                        same(first, &item, &leaf);
                        assert_eq!(leaf.frame, old.first());
                        env.pool.free(old);
                    }
                    other => panic!("{other:?}"),
                }
                let item = Item::Leaf {
                    frame: number,
                    order: Order::ZERO,
                    attributes: expressed::<F>(&attributes),
                    dirty: Some(attributes.dirty),
                };
                of.model.insert(page, item);
                drop(cursor);
                self.filled(space, page, 1);
                // What was there is flushed before the new one is seen.
                self.audit();
            }
            Err((error, frame)) => {
                env.pool.free(frame);
                match error {
                    MapError::Occupied => {
                        assert!(
                            matches!(old, Some((_, Item::Leaf { order, .. })) if order > Order::ZERO)
                        )
                    }
                    MapError::Memory(_) => {}
                    other => panic!("{other}"),
                }
            }
        }
    }

    fn payload(&mut self, space: usize, page: u64) {
        let payload = Payload::new::<F>(self.rng.below(1 << 28)).unwrap();
        let of = &mut self.spaces[space];
        let mut gather = of.table.gather::<16>();
        let mut cursor = of.table.cursor(pages(page, 1)).unwrap();
        let result = cursor.set_payload(at(page), payload, &mut gather);
        drop(cursor);
        match (result, find(&of.model, page)) {
            (Ok(Entry::Empty), None) => {}
            (Ok(Entry::Payload(old)), Some((_, Item::Payload(number)))) => {
                assert_eq!(old.number(), number)
            }
            (Ok(Entry::Leaf(leaf)), Some((first, item))) => same(first, &item, &leaf),
            (Err(ChangeError::Unencodable { .. }), Some((_, Item::Leaf { order, .. })))
                if order > Order::ZERO =>
            {
                return;
            }
            (Err(ChangeError::Memory(_)), None) => return,
            other => panic!("{other:?}"),
        }
        of.model.insert(page, Item::Payload(payload.number()));
        self.settle(space, gather, page, 1);
    }

    fn harvest(&mut self, space: usize, page: u64, count: u64) {
        let bits = Harvest::from_bits_truncate(1 + self.rng.below(3) as u8);
        let of = &mut self.spaces[space];
        let range = pages(page, count);
        let mut gather = of.table.gather::<16>();
        let mut cursor = of.table.cursor(range).unwrap();
        let mut dirty_pages = BTreeSet::new();
        let result = cursor.harvest(range, bits, &mut gather, |leaf| {
            if leaf.attributes.dirty {
                dirty_pages.insert(leaf.page.number());
            }
        });
        drop(cursor);
        if let Err((error, found)) = result {
            assert!(matches!(error, ChangeError::Memory(_)), "{error}");
            assert_eq!(found, Harvested::default());
            drop(gather);
            return self.unchanged(space);
        }
        for (first, item) in inside::<F>(&mut of.model, page, count) {
            if let Item::Leaf {
                frame,
                order,
                attributes,
                dirty,
            } = item
                && bits.contains(Harvest::DIRTY)
            {
                if let Some(dirty) = dirty {
                    assert_eq!(dirty_pages.contains(&first), dirty, "page {first:#x}");
                }
                let item = Item::Leaf {
                    frame,
                    order,
                    attributes,
                    dirty: Some(false),
                };
                of.model.insert(first, item);
            }
        }
        let (from, to) = self.touched(page, count);
        self.settle(space, gather, from, to - from);
    }

    fn split(&mut self, space: usize) {
        let (page, order) = self.huge_page();
        let page = page + self.rng.below(order.frames());
        let of = &mut self.spaces[space];
        let mut gather = of.table.gather::<16>();
        let mut cursor = of.table.cursor(pages(page, 1)).unwrap();
        let result = cursor.split(at(page), &mut gather);
        drop(cursor);
        match (result, find(&of.model, page)) {
            (Ok(()), Some((first, Item::Leaf { order, .. }))) if order > Order::ZERO => {
                split_item::<F>(&mut of.model, first);
            }
            (Err(HugeError::NotPossible), Some((_, item))) => assert_eq!(item.pages(), 1),
            (Err(HugeError::NotPossible), None) | (Err(HugeError::Memory(_)), _) => {}
            other => panic!("{other:?}"),
        }
        let (from, to) = self.touched(page, 1);
        self.settle(space, gather, from, to - from);
    }

    fn merge(&mut self, space: usize) {
        let (page, order) = self.huge_page();
        let quiet = self
            .spaces
            .iter()
            .chain(&self.kernel)
            .all(|space| space.waiting.is_empty());
        let of = &mut self.spaces[space];
        let mut gather = of.table.gather::<16>();
        let mut cursor = of.table.cursor(pages(page, order.frames())).unwrap();
        let result = cursor.merge(at(page), order, &mut gather);
        drop(cursor);
        match (result, mergeable(&of.model, page, order)) {
            (Ok(()), Some(mut item)) => {
                // With one dirty page all of it is dirty; where one is not known, nothing is.
                for offset in 0..order.frames() {
                    of.model.remove(&(page + offset));
                }
                if let Item::Leaf { attributes, .. } = &mut item {
                    *attributes = expressed::<F>(attributes);
                }
                of.model.insert(page, item);
                if quiet {
                    // Every translation of the small leaves is gone before the large one is there, and before the commit.
                    let found = self
                        .env
                        .machine
                        .audit(page << 12, (page + order.frames()) << 12);
                    assert!(found.is_empty(), "{}", found[0]);
                }
            }
            (Err(HugeError::NotPossible), None) => {}
            other => panic!("{other:?}"),
        }
        self.settle(space, gather, page, order.frames());
    }

    /// Moves a range to other pages.
    fn relocate(&mut self, space: usize, page: u64, count: u64) {
        let to = self.page();
        let lower = self.lower();
        let of = &mut self.spaces[space];
        let mut gather = of.table.gather::<16>();
        let result = of.table.move_range(pages(page, count), at(to), &mut gather);
        let apart = to + count <= page || page + count <= to;
        let fits = to + count <= lower.last().number() + 1;
        if result.is_ok() {
            assert!(apart && fits && is_free(&of.model, to, count));
            let distance = to.wrapping_sub(page);
            let mut from = inside::<F>(&mut of.model, page, count);
            while let Some(&(first, _)) = from
                .iter()
                .find(|(_, item)| distance & (item.pages() - 1) != 0)
            {
                split_item::<F>(&mut of.model, first);
                from = inside::<F>(&mut of.model, page, count);
            }
            for (first, _) in &from {
                of.model.remove(first);
            }
            for (first, item) in from {
                of.model.insert(first.wrapping_add(distance), item);
            }
        } else if apart && fits && is_free(&of.model, to, count) {
            assert!(matches!(result, Err(MoveError::Memory(_))), "{result:?}");
            drop(gather);
            return self.unchanged(space);
        }
        let (from, end) = self.touched(page, count);
        // The target may still be what it was before, if that waits.
        if !self.spaces[space].waiting.is_empty() || !gather.is_empty() {
            self.spaces[space].wait(to, count);
        }
        self.settle(space, gather, from, end - from);
        if self.spaces[space].gathers.is_empty() {
            self.spaces[space].waiting.clear();
        }
    }

    /// A child with copies of what the parent has in one area; both lose the right to write.
    fn fork(&mut self) {
        if self.spaces.len() >= 4 {
            return;
        }
        let parent = self.rng.below(self.spaces.len() as u64) as usize;
        let Ok(child) = Table::<F>::empty_like(self.env, self.spaces[parent].table) else {
            return;
        };
        let child = self.add_space(Some(child));
        let page = self.areas[self.rng.below(2) as usize];
        let count = 48;
        let env = self.env;
        let keep_parent = self.rng.below(2) == 0;
        let mut copies = Vec::new();
        let mut gather = self.spaces[parent].table.gather::<16>();
        let out_of_frames = Cell::new(false);
        let fuse = self.fuse;
        let result = self.spaces[parent].table.fork_into(
            self.spaces[child].table,
            pages(page, count),
            &mut gather,
            |item| match item {
                ForkItem::Payload(page, payload) => {
                    copies.push((page.number(), Item::Payload(payload.number())));
                    ForkStep::Payload(payload)
                }
                ForkItem::Leaf(leaf) => {
                    // Frames of pages are the caller's: the fuse is for tables.
                    env.pool.set_fuse(None);
                    let frame = env.pool.alloc(&FrameRequest::new(leaf.order));
                    env.pool.set_fuse(fuse.map(|_| 0));
                    let Ok(handle) = frame else {
                        out_of_frames.set(true);
                        return ForkStep::Stop;
                    };
                    let child = leaf.attributes.write_protected();
                    let item = Item::Leaf {
                        frame: handle.first().number(),
                        order: leaf.order,
                        attributes: expressed::<F>(&child),
                        dirty: Some(child.dirty),
                    };
                    copies.push((leaf.page.number(), item));
                    ForkStep::Leaf {
                        handle,
                        child,
                        parent: (!keep_parent).then_some(leaf.attributes.write_protected()),
                    }
                }
            },
        );
        if let Err((ForkError::Memory(_), _)) = result {
            drop(gather);
            self.unchanged(parent);
            assert!(copies.is_empty());
            assert_eq!(self.spaces[child].table.table_count(), 1);
            return;
        }
        if let Err((error, handle)) = result {
            assert!(out_of_frames.get(), "tables were reserved: {error}");
            // Out of memory on the way: the child goes again, and the parent keeps what it lost.
            if let Some(handle) = handle {
                env.pool.free(handle);
            }
            gather.commit_to(&env.pool);
            drop(gather);
            self.spaces[parent].waiting.clear();
            self.reload(parent);
            let of = self.spaces.remove(child);
            self.free_asids.push(of.asid);
            self.free_asids.retain(|&asid| asid != 0);
            // SAFETY: leaked by `Space::new`, and forgotten by everybody.
            let table = *unsafe { Box::from_raw(std::ptr::from_ref(of.table).cast_mut()) };
            table.destroy(|_, frame| env.pool.free(frame), |_, _| {});
            return;
        }
        let of = &mut self.spaces[parent];
        let mut expected = inside::<F>(&mut of.model, page, count);
        expected.retain(|(first, _)| (page..page + count).contains(first));
        assert_eq!(expected.len(), copies.len(), "what was copied");
        for ((first, item), (page, _)) in expected.iter().zip(&copies) {
            assert_eq!(first, page);
            if let Item::Leaf {
                frame,
                order,
                attributes,
                dirty,
            } = *item
                && !keep_parent
            {
                let attributes = expressed::<F>(&attributes.write_protected());
                let item = Item::Leaf {
                    frame,
                    order,
                    attributes,
                    dirty,
                };
                of.model.insert(*first, item);
            }
        }
        self.spaces[child].model.extend(copies);
        let (from, to) = self.touched(page, count);
        self.settle(parent, gather, from, to - from);
    }

    /// Takes the model of a space from its table, after an operation that stopped half way.
    fn reload(&mut self, space: usize) {
        let lower = self.lower();
        let of = &mut self.spaces[space];
        let mut cursor = of.table.cursor(lower).unwrap();
        let mut model = Model::new();
        while let Some(run) = cursor.next_run() {
            match run {
                Run::Payload(page, payload) => {
                    model.insert(page.number(), Item::Payload(payload.number()));
                }
                Run::Leaves { range, first } => {
                    let step = first.order.frames();
                    for index in 0..range.count() / step {
                        let item = Item::Leaf {
                            frame: first.frame.number() + index * step,
                            order: first.order,
                            attributes: expressed::<F>(&first.attributes),
                            dirty: Some(first.attributes.dirty),
                        };
                        model.insert(first.page.number() + index * step, item);
                    }
                }
                _ => {}
            }
        }
        drop(cursor);
        of.model = model;
    }

    /// Takes a space down; its tag and its frames go to others at once.
    fn destroy(&mut self, victim: usize) {
        self.commit_all(victim);
        self.spaces[victim].compare(self.lower());
        let last = self.spaces.len() - 1;
        let other = if victim == 0 { last } else { 0 };
        for cpu in 0..self.setup.cpus {
            if self.loaded[cpu] == victim {
                self.load(cpu, other);
            }
        }
        let of = self.spaces.remove(victim);
        for loaded in &mut self.loaded {
            if *loaded > victim {
                *loaded -= 1;
            }
        }
        let mut left = of.model;
        let env = self.env;
        // SAFETY: leaked by `Space::new`, and forgotten by everybody: its gathers are committed.
        let table = *unsafe { Box::from_raw(std::ptr::from_ref(of.table).cast_mut()) };
        let mut payloads = Vec::new();
        table.destroy(
            |leaf, frame| {
                let item = left.remove(&leaf.page.number()).expect("in the model");
                same(leaf.page.number(), &item, &leaf);
                assert_eq!((frame.first(), frame.order()), (leaf.frame, leaf.order));
                env.pool.free(frame);
            },
            |page, payload| payloads.push((page.number(), payload.number())),
        );
        for (page, number) in payloads {
            assert_eq!(left.remove(&page), Some(Item::Payload(number)));
        }
        assert!(left.is_empty(), "{left:?} were not given back");
        if of.asid != 0 {
            self.free_asids.insert(0, of.asid);
        }
        self.audit();
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

/// The leaf that merging the small ones from `first` on gives.
fn mergeable(model: &Model, first: u64, order: Order) -> Option<Item> {
    let mut joined: Option<(u64, Attributes)> = None;
    let (mut any_dirty, mut unknown) = (false, false);
    for offset in 0..order.frames() {
        let Some(&Item::Leaf {
            frame,
            order: found,
            attributes,
            dirty,
        }) = model.get(&(first + offset))
        else {
            return None;
        };
        let (base, all) = *joined.get_or_insert((frame, attributes));
        any_dirty |= dirty == Some(true);
        unknown |= dirty.is_none();
        if found != Order::ZERO || frame != base + offset || attributes != all {
            return None;
        }
    }
    let (frame, attributes) = joined?;
    frame.is_multiple_of(order.frames()).then_some(Item::Leaf {
        frame,
        order,
        attributes,
        dirty: if any_dirty {
            Some(true)
        } else if unknown {
            None
        } else {
            Some(false)
        },
    })
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
    total.fractures += more.fractures;
    total.absent_fills += more.absent_fills;
    total.stale_absent += more.stale_absent;
    total.flushes += more.flushes;
    total.interrupts += more.interrupts;
    total.delayed_interrupts += more.delayed_interrupts;
    total.switches += more.switches;
}
