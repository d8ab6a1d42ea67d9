//! A table with a flat map that says what every access must come to. Between any two commits the TLBs are looked through for translations
//! that the tables no longer back: there must be none.

use std::collections::BTreeMap;

use kmem_hal::{FrameRequest, FrameSink, FrameSource, Mmu, OwnedFrame, Page, PageRange};
use kmem_mock_x86::{AccessKind, Adversary, Machine, MemoryMap, Registers, SeededRng};
use kmem_paging::format::Format;
use kmem_paging::{Attributes, Harvest, PageTable, Replaced, Rights, TableCache};

use super::mock::MockEnv;

pub(super) type Table<F> = PageTable<F, &'static MockEnv, OwnedFrame>;

const FIRST_FRAME: u64 = 0x400;

pub(super) fn env(registers: Registers, cpus: usize, seed: u64, cache: usize) -> &'static MockEnv {
    env_with(MemoryMap::pc(64 << 20), registers, cpus, seed, cache)
}

pub(super) fn env_with(
    memory: MemoryMap,
    registers: Registers,
    cpus: usize,
    seed: u64,
    cache: usize,
) -> &'static MockEnv {
    let machine = Machine::builder()
        .memory(memory)
        .cpus(cpus)
        .registers(registers)
        .seed(seed)
        .adversary(Adversary::FULL)
        .build()
        .unwrap();
    MockEnv::new(machine, FIRST_FRAME, cache)
}

/// What a page should be: the frame behind it, and the rights as the format can express them.
type Model = BTreeMap<u64, (u64, Rights)>;

/// A table with its model, loaded on some CPUs.
pub(super) struct World<F: Format> {
    pub(super) env: &'static MockEnv,
    pub(super) table: Table<F>,
    pub(super) model: Model,
    pub(super) rng: SeededRng,
    /// Where the tests play: several leaf tables, far apart.
    pub(super) areas: Vec<u64>,
}

impl<F: Format> World<F> {
    pub(super) fn new(env: &'static MockEnv, seed: u64) -> Self {
        Self::with(env, Table::<F>::new(env).unwrap(), seed)
    }

    pub(super) fn with(env: &'static MockEnv, table: Table<F>, seed: u64) -> Self {
        for cpu in 0..env.machine.cpu_count() {
            // SAFETY: the machine runs no code from these tables, and they are taken down after the last access.
            env.machine
                .on_cpu(cpu, || unsafe { env.mmu.load_root(table.root(), false) });
        }
        let top = F::canonical(table.levels()).lower_end().as_u64() >> 12;
        Self {
            env,
            table,
            model: Model::new(),
            rng: SeededRng::new(seed),
            areas: vec![0x400, 0x3f0, 0x2_0000, top - 700],
        }
    }

    pub(super) fn page(&mut self) -> u64 {
        let area = self.areas[self.rng.below(self.areas.len() as u64) as usize];
        area + self.rng.below(48)
    }

    fn rights(&mut self) -> Rights {
        let choice = [
            Rights::READ | Rights::USER,
            Rights::USER_DATA,
            Rights::USER_DATA,
            Rights::USER_CODE,
            Rights::KERNEL_DATA,
            Rights::empty(),
            Rights::all().difference(Rights::GLOBAL),
        ];
        choice[self.rng.below(choice.len() as u64) as usize]
    }

    fn expressed(rights: Rights) -> Rights {
        F::expressible(1, &Attributes::new(rights)).rights
    }

    /// One access of one CPU, held against the model.
    pub(super) fn access(&mut self) {
        let cpu = self.rng.below(self.env.machine.cpu_count() as u64) as usize;
        let page = self.page();
        let kind =
            [AccessKind::Read, AccessKind::Write, AccessKind::Fetch][self.rng.below(3) as usize];
        let user = self.rng.below(4) != 0;
        self.check(cpu, page, kind, user);
    }

    pub(super) fn check(&self, cpu: usize, page: u64, kind: AccessKind, user: bool) {
        let expected = self.model.get(&page).and_then(|&(frame, rights)| {
            let needed = match kind {
                AccessKind::Read => Rights::READ,
                AccessKind::Write => Rights::WRITE,
                _ => Rights::EXECUTE,
            };
            let allowed = rights.contains(needed)
                // SMEP and SMAP are off in these registers.
                && (!user || rights.contains(Rights::USER));
            allowed.then_some(frame)
        });
        let mut handle = self.env.machine.cpu(cpu);
        if user {
            handle = handle.user();
        }
        let linear = page << 12 | 0x123;
        // A fault from an entry that was stricter once is allowed, several in a row as well.
        let mut seen = handle.translate(linear, kind);
        for _ in 0..20 {
            if expected.is_none() || seen.is_ok() {
                break;
            }
            seen = handle.translate(linear, kind);
        }
        match expected {
            Some(frame) => assert_eq!(
                seen.ok(),
                Some(frame << 12 | 0x123),
                "page {page:#x} {kind:?} user {user}: {}",
                self.env.machine.explain(cpu, linear)
            ),
            None => assert!(
                seen.is_err(),
                "page {page:#x} {kind:?} user {user} should fault: {}",
                self.env.machine.explain(cpu, linear)
            ),
        }
    }

    pub(super) fn range(&self, first: u64, count: u64) -> PageRange {
        PageRange::with_count(Page::new(first).unwrap(), count).unwrap()
    }

    pub(super) fn alloc(&self) -> OwnedFrame {
        self.env.pool.alloc(&FrameRequest::ONE).unwrap()
    }

    /// Maps one page, or refuses where the model says that there is one.
    pub(super) fn map(&mut self, page: u64, rights: Rights) {
        let frame = self.alloc();
        let number = frame.first().number();
        let mut attributes = Attributes::new(rights);
        if self.rng.below(2) == 0 {
            attributes = attributes.accessed().dirty();
        }
        let result = self.table.cursor(self.range(page, 1)).unwrap().map(
            Page::new(page).unwrap(),
            frame,
            attributes,
        );
        match result {
            Ok(()) => {
                let before = self.model.insert(page, (number, Self::expressed(rights)));
                assert_eq!(before, None);
            }
            Err((_, frame)) => {
                assert!(self.model.contains_key(&page));
                self.env.pool.free(frame);
            }
        }
    }

    pub(super) fn step(&mut self) {
        let page = self.page();
        let count = 1 + self.rng.below(12);
        let range = self.range(page, count);
        match self.rng.below(12) {
            0..=4 => {
                let rights = self.rights();
                self.map(page, rights);
            }
            5 | 6 => {
                let mut gather = self.table.gather::<16>();
                let mut cursor = self.table.cursor(range).unwrap();
                cursor.unmap(range, &mut gather).unwrap();
                drop(cursor);
                gather.commit_to(&self.env.pool);
                drop(gather);
                for page in page..page + count {
                    self.model.remove(&page);
                }
            }
            7 | 8 => {
                let rights = self.rights();
                let mut gather = self.table.gather::<1>();
                let mut cursor = self.table.cursor(range).unwrap();
                cursor.protect(range, rights, &mut gather).unwrap();
                drop(cursor);
                gather.commit(drop);
                drop(gather);
                for (_, entry) in self.model.range_mut(page..page + count) {
                    entry.1 = Self::expressed(rights);
                }
            }
            9 => {
                let rights = self.rights();
                let frame = self.alloc();
                let number = frame.first().number();
                let mut cursor = self.table.cursor(range).unwrap();
                match cursor
                    .replace(Page::new(page).unwrap(), frame, rights)
                    .unwrap()
                {
                    Replaced::Leaf(leaf, old) => {
                        assert_eq!(self.model[&page].0, leaf.frame.number());
                        self.env.pool.free(old);
                    }
                    Replaced::Nothing => assert!(!self.model.contains_key(&page)),
                    Replaced::Payload(_) => unreachable!(),
                }
                drop(cursor);
                self.model.insert(page, (number, Self::expressed(rights)));
            }
            10 => {
                let mut gather = self.table.gather::<1>();
                let mut cursor = self.table.cursor(range).unwrap();
                cursor
                    .harvest(range, Harvest::all(), &mut gather, |_| {})
                    .unwrap();
                drop(cursor);
                gather.commit(drop);
            }
            _ => {
                // To another area, where that is empty.
                let to = self.page();
                let mut gather = self.table.gather::<1>();
                let moved = self
                    .table
                    .move_range(range, Page::new(to).unwrap(), &mut gather);
                gather.commit(drop);
                drop(gather);
                if moved.is_ok() {
                    for offset in 0..count {
                        if let Some(entry) = self.model.remove(&(page + offset)) {
                            assert_eq!(self.model.insert(to + offset, entry), None);
                        }
                    }
                }
            }
        }
        let stale = self.env.machine.audit(0, u64::MAX);
        assert!(stale.is_empty(), "{}", stale[0]);
    }

    pub(super) fn finish(self) {
        let Self {
            env, table, model, ..
        } = self;
        let mut seen = Model::new();
        // Off every CPU first, as `load_root` demands.
        let other = Table::<F>::new(env).unwrap();
        for cpu in 0..env.machine.cpu_count() {
            // SAFETY: as in `new`.
            env.machine
                .on_cpu(cpu, || unsafe { env.mmu.load_root(other.root(), false) });
        }
        table.destroy(
            |leaf, frame| {
                seen.insert(
                    leaf.page.number(),
                    (leaf.frame.number(), leaf.attributes.rights),
                );
                env.pool.free(frame);
            },
            |_, _| {},
        );
        assert_eq!(seen, model);
        other.destroy(|_, _| {}, |_, _| {});
        TableCache::shrink(&env, usize::MAX);
        assert_eq!(env.pool.in_use(), 0, "frames leaked");
    }
}
