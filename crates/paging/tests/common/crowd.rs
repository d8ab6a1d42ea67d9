// Several CPUs at once in one table, switched in the middle of operations: each changes pages of its own, which share leaf
// tables with those of the others, and looks at everybody's.
//
// Its own pages must be as it left them at every access; no CPU may use what is gone; at the end every table that was
// emptied is gone, and every frame is back.
use std::collections::BTreeMap;

use kmem_hal::{FrameRequest, FrameSink, FrameSource, Mmu, Order, OwnedFrame, Page, PageRange};
use kmem_mock_x86::{
    Adversary, Machine, MemoryMap, Registers, Scheduler, SeededRng, Stats, VirtualCpu,
};
use kmem_paging::format::X86_64;
use kmem_paging::{
    Cleared, Entry, Harvest, MapError, PageTable, Payload, Replaced, Rights, TableCache,
};

use super::hostile_env::{Caller, HostileEnv};

type Table = PageTable<X86_64, &'static HostileEnv, OwnedFrame>;

const CPUS: u64 = 3;
/// Where each CPU has a huge page of its own.
const HUGE: u64 = 0x4_0000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Item {
    Leaf {
        frame: u64,
        rights: Rights,
        dirty: bool,
    },
    Payload(u64),
}

/// One CPU's work.
struct Worker<'a> {
    env: &'static HostileEnv,
    table: &'a Table,
    cpu: u64,
    me: VirtualCpu<'static>,
    rng: SeededRng,
    model: BTreeMap<u64, Item>,
    /// First frame of the huge page, if there is one.
    huge: Option<u64>,
    /// Leaf tables in use; with few, each is emptied and made again and again.
    tables: u64,
    /// Pages that one CPU has in each leaf table, next to each other.
    own: u64,
}

fn at(page: u64) -> Page {
    Page::new(page).unwrap()
}

impl Worker<'_> {
    fn first_of(&self, cpu: u64, table: u64) -> u64 {
        0x400 + table * 0x200 + cpu * self.own
    }

    fn segment(&mut self, cpu: u64) -> u64 {
        let table = self.rng.below(self.tables);
        self.first_of(cpu, table)
    }

    fn page(&mut self) -> u64 {
        let segment = self.segment(self.cpu);
        segment + self.rng.below(self.own)
    }

    fn alloc(&self) -> OwnedFrame {
        self.env.pool.alloc(&FrameRequest::ONE).unwrap()
    }

    fn rights(&mut self) -> Rights {
        [Rights::USER_DATA, Rights::READ | Rights::USER][self.rng.below(2) as usize]
    }

    fn leaf(frame: u64, rights: Rights) -> Item {
        Item::Leaf {
            frame,
            rights,
            dirty: false,
        }
    }

    fn found(item: Option<Item>, leaf: &kmem_paging::Leaf) {
        let Some(Item::Leaf {
            frame,
            rights,
            dirty,
        }) = item
        else {
            panic!("{item:?} against {leaf:?}")
        };
        assert_eq!(
            (frame, rights, dirty),
            (
                leaf.frame.number(),
                leaf.attributes.rights,
                leaf.attributes.dirty
            )
        );
    }

    fn operate(&mut self) {
        let page = self.page();
        let one = PageRange::single(at(page));
        let table = self.table;
        let env = self.env;
        match self.rng.below(16) {
            4 => self.locked(page),
            0..=3 => {
                let frame = self.alloc();
                let number = frame.first().number();
                let rights = self.rights();
                match table.cursor(one).unwrap().map(at(page), frame, rights) {
                    Ok(()) => {
                        let before = self.model.insert(page, Self::leaf(number, rights));
                        assert_eq!(before, None);
                    }
                    Err((error, frame)) => {
                        assert_eq!(error, MapError::Occupied);
                        assert!(self.model.contains_key(&page));
                        env.pool.free(frame);
                    }
                }
            }
            5 => {
                // A whole segment, as a range.
                let first = self.segment(self.cpu);
                let range = PageRange::with_count(at(first), self.own).unwrap();
                let rights = self.rights();
                let mut given = Vec::new();
                let mut cursor = table.cursor(range).unwrap();
                let result = cursor.map_range(range, Order::ZERO, rights, |page, _| {
                    let frame = env.pool.alloc(&FrameRequest::ONE).unwrap();
                    given.push((page.number(), frame.first().number()));
                    Some(frame)
                });
                drop(cursor);
                let end = match result {
                    Ok(()) => first + self.own,
                    Err(stopped) => {
                        assert_eq!(stopped.error, MapError::Occupied);
                        env.pool.free(stopped.handle.unwrap());
                        stopped.at.number()
                    }
                };
                for (page, frame) in given.into_iter().filter(|given| given.0 < end) {
                    let before = self.model.insert(page, Self::leaf(frame, rights));
                    assert_eq!(before, None);
                }
            }
            6..=8 => {
                let first = self.segment(self.cpu);
                let range = PageRange::with_count(at(first), self.own).unwrap();
                let mut cleared = Vec::new();
                let mut gather = table.gather::<4>();
                let mut cursor = table.cursor(range).unwrap();
                cursor
                    .unmap_with(range, &mut gather, |item| cleared.push(item))
                    .unwrap();
                drop(cursor);
                gather.commit_to(&env.pool);
                for item in cleared {
                    match item {
                        Cleared::Leaf(leaf) => {
                            Self::found(self.model.remove(&leaf.page.number()), &leaf);
                        }
                        Cleared::Payload(page, payload) => assert_eq!(
                            self.model.remove(&page.number()),
                            Some(Item::Payload(payload.number()))
                        ),
                    }
                }
                for page in first..first + self.own {
                    assert_eq!(self.model.get(&page), None);
                }
            }
            9 | 10 => {
                let rights = self.rights();
                let mut gather = table.gather::<1>();
                let mut cursor = table.cursor(one).unwrap();
                cursor.protect(one, rights, &mut gather).unwrap();
                drop(cursor);
                gather.commit(drop);
                if let Some(Item::Leaf { rights: old, .. }) = self.model.get_mut(&page) {
                    *old = rights;
                }
            }
            11 => {
                let frame = self.alloc();
                let number = frame.first().number();
                let rights = self.rights();
                let replaced = table
                    .cursor(one)
                    .unwrap()
                    .replace(at(page), frame, rights)
                    .unwrap();
                let before = self.model.insert(page, Self::leaf(number, rights));
                match replaced {
                    Replaced::Nothing => assert_eq!(before, None),
                    Replaced::Payload(payload) => {
                        assert_eq!(before, Some(Item::Payload(payload.number())))
                    }
                    Replaced::Leaf(leaf, frame) => {
                        Self::found(before, &leaf);
                        env.pool.free(frame);
                    }
                }
            }
            12 => {
                let payload = Payload::new::<X86_64>(self.rng.below(1 << 30)).unwrap();
                let mut gather = table.gather::<1>();
                let mut cursor = table.cursor(one).unwrap();
                let before = cursor.set_payload(at(page), payload, &mut gather).unwrap();
                drop(cursor);
                gather.commit_to(&env.pool);
                let model = self.model.insert(page, Item::Payload(payload.number()));
                match before {
                    Entry::Empty => assert_eq!(model, None),
                    Entry::Payload(old) => assert_eq!(model, Some(Item::Payload(old.number()))),
                    Entry::Leaf(leaf) => Self::found(model, &leaf),
                }
            }
            13 => {
                let mut gather = table.gather::<1>();
                let mut cursor = table.cursor(one).unwrap();
                let found = cursor
                    .harvest(one, Harvest::all(), &mut gather, |_| {})
                    .unwrap();
                drop(cursor);
                gather.commit(drop);
                let expected = match self.model.get_mut(&page) {
                    Some(Item::Leaf { dirty, .. }) => std::mem::take(dirty),
                    _ => false,
                };
                assert_eq!(found.dirty, u64::from(expected), "page {page:#x}");
            }
            14 => {
                let (from, to) = (self.segment(self.cpu), self.segment(self.cpu));
                let mut gather = table.gather::<1>();
                let range = PageRange::with_count(at(from), self.own).unwrap();
                let moved = table.move_range(range, at(to), &mut gather);
                gather.commit(drop);
                let free = (to..to + self.own).all(|page| !self.model.contains_key(&page));
                assert_eq!(moved.is_ok(), free && from != to, "{moved:?}");
                if moved.is_ok() {
                    for offset in 0..self.own {
                        if let Some(item) = self.model.remove(&(from + offset)) {
                            self.model.insert(to + offset, item);
                        }
                    }
                }
            }
            _ => self.huge(),
        }
    }

    /// One entry, without a cursor: a page where nothing is, another in place of a page, or a page marked as used.
    fn locked(&mut self, page: u64) {
        let Some(mut entry) = self.table.lock_entry(at(page)) else {
            return;
        };
        let rights = self.rights();
        let Some(leaf) = entry.get().leaf() else {
            let frame = self.alloc();
            let number = frame.first().number();
            match entry.map(frame, rights.into()) {
                Ok(()) => {
                    let before = self.model.insert(page, Self::leaf(number, rights));
                    assert_eq!(before, None);
                }
                Err((error, frame)) => {
                    assert_eq!(error, MapError::Occupied);
                    assert!(matches!(self.model.get(&page), Some(Item::Payload(_))));
                    self.env.pool.free(frame);
                }
            }
            return;
        };
        if self.rng.below(2) == 0 {
            let more = entry.relax(rights, false);
            drop(entry);
            let Some(Item::Leaf { rights: old, .. }) = self.model.get_mut(&page) else {
                panic!("no leaf was mapped here")
            };
            assert_eq!(more, rights.contains(*old), "{leaf:?}");
            if more {
                *old = rights;
            }
            return;
        }
        let frame = self.alloc();
        let number = frame.first().number();
        let (leaf, old) = entry.replace(frame, rights.into()).unwrap();
        let before = self.model.insert(page, Self::leaf(number, rights));
        Self::found(before, &leaf);
        self.env.pool.free(old);
    }

    /// A huge page appears, is split, used, merged again, and goes.
    fn huge(&mut self) {
        let first = HUGE + self.cpu * 512;
        let all = PageRange::with_count(at(first), 512).unwrap();
        let table = self.table;
        let env = self.env;
        let mut cursor = table.cursor(all).unwrap();
        let mut gather = table.gather::<4>();
        let Some(frame) = self.huge else {
            let Ok(block) = env.pool.alloc(&FrameRequest::new(Order::HUGE_2M)) else {
                return;
            };
            self.huge = Some(block.first().number());
            cursor.map(at(first), block, Rights::USER_DATA).unwrap();
            return;
        };
        let touch = |page: u64| {
            let seen = (0..40)
                .map(|_| {
                    self.me
                        .translate(page << 12, kmem_mock_x86::AccessKind::Write)
                })
                .find(Result::is_ok);
            assert_eq!(seen, Some(Ok((frame + page - first) << 12)));
        };
        touch(first + 9);
        cursor.split(at(first), &mut gather).unwrap();
        touch(first + 9);
        cursor.release();
        gather.commit(drop);
        touch(first + 300);
        for page in [9, 300] {
            let leaf = cursor.query(at(first + page)).leaf().unwrap();
            assert!(leaf.attributes.dirty && leaf.order == Order::ZERO);
        }
        cursor
            .merge(at(first), Order::HUGE_2M, &mut gather)
            .unwrap();
        touch(first + 10);
        cursor.release();
        gather.commit(drop);
        let leaf = cursor.query(at(first)).leaf().unwrap();
        assert!(leaf.attributes.dirty && leaf.order == Order::HUGE_2M);
        if self.rng.below(2) == 0 {
            cursor.unmap(all, &mut gather).unwrap();
            cursor.release();
            gather.commit_to(&env.pool);
            self.huge = None;
        }
    }

    fn look(&mut self) {
        for _ in 0..4 {
            let page = self.page();
            let write = self.rng.below(2) == 0;
            let needed = if write { Rights::WRITE } else { Rights::READ };
            let expected = match self.model.get(&page) {
                Some(Item::Leaf { frame, rights, .. }) if rights.contains(needed) => Some(*frame),
                _ => None,
            };
            let kind = if write {
                kmem_mock_x86::AccessKind::Write
            } else {
                kmem_mock_x86::AccessKind::Read
            };
            let seen = (0..40)
                .map(|_| self.me.translate(page << 12, kind))
                .find(|seen| seen.is_ok() || expected.is_none())
                .and_then(Result::ok);
            assert_eq!(
                seen,
                expected.map(|frame| frame << 12),
                "page {page:#x} of CPU {}",
                self.cpu
            );
            if write
                && expected.is_some()
                && let Some(Item::Leaf { dirty, .. }) = self.model.get_mut(&page)
            {
                *dirty = true;
            }
            // And at what others have, which may be gone at any moment.
            let other = self.rng.below(CPUS);
            let other = self.segment(other) + self.rng.below(self.own);
            let _ = self.me.read_u64(other << 12);
            let other = HUGE + self.rng.below(CPUS * 512);
            let _ = self.me.read_u64(other << 12);
        }
        // Without a lock.
        for _ in 0..4 {
            let other = self.rng.below(CPUS);
            let page = self.segment(other) + self.rng.below(self.own);
            if let Entry::Leaf(leaf) = self.table.query(at(page)) {
                assert_eq!(leaf.page.number(), page);
            }
        }
        let own = self.page();
        let seen = self.table.query(at(own));
        match self.model.get(&own) {
            None => assert_eq!(seen, Entry::Empty),
            Some(&Item::Payload(number)) => {
                assert!(matches!(seen, Entry::Payload(payload) if payload.number() == number))
            }
            Some(&item) => Self::found(Some(item), &seen.leaf().expect("a leaf")),
        }
    }

    /// Takes the CPU's pages down again.
    fn finish(&mut self) {
        let ranges: Vec<_> = (0..self.tables)
            .map(|table| (self.first_of(self.cpu, table), self.own))
            .chain([(HUGE + self.cpu * 512, 512)])
            .collect();
        for (first, count) in ranges {
            let range = PageRange::with_count(at(first), count).unwrap();
            let mut gather = self.table.gather::<8>();
            let mut cursor = self.table.cursor(range).unwrap();
            cursor.unmap(range, &mut gather).unwrap();
            drop(cursor);
            gather.commit_to(&self.env.pool);
        }
    }
}

/// One crowd; `turns` operations of each CPU.
pub fn crowd(seed: u64, turns: u32, adversary: Adversary, caller: Caller) -> Stats {
    let machine = Machine::builder()
        .memory(MemoryMap::pc(32 << 20))
        .cpus(CPUS as usize)
        .registers(Registers::LONG)
        .seed(seed)
        .adversary(adversary)
        .caching(std::env::var_os("KMEM_MOCK_WITHOUT_TLB").is_none())
        .watch_kernel(true)
        .history(1 << 14)
        .build()
        .unwrap();
    let env = HostileEnv::new(machine, 0x400, if seed.is_multiple_of(3) { 16 } else { 0 });
    env.mmu.caller.set(caller);
    let table = Table::new(env).unwrap();
    for cpu in 0..CPUS as usize {
        // SAFETY: the machine runs no code from these tables, and they are taken down after the last access.
        env.machine
            .on_cpu(cpu, || unsafe { env.mmu.load_root(table.root(), false) });
    }
    let mut scheduler = Scheduler::new(env.machine, seed);
    for cpu in 0..CPUS {
        let table = &table;
        scheduler.spawn(cpu as usize, move || {
            let mut worker = Worker {
                env,
                table,
                cpu,
                me: env.machine.cpu(cpu as usize).user(),
                rng: SeededRng::new(seed * 7 + cpu),
                model: BTreeMap::new(),
                huge: None,
                tables: 1 + seed % 3,
                own: 1 + seed / 3 % 3,
            };
            for _ in 0..turns {
                worker.operate();
                worker.look();
            }
            worker.finish();
        });
    }
    scheduler.run();
    let stale = env.machine.audit(0, u64::MAX);
    assert!(stale.is_empty(), "{}", stale[0]);
    assert_eq!(table.table_count(), 1, "empty tables are gone");
    let idle = Table::new(env).unwrap();
    for cpu in 0..CPUS as usize {
        // SAFETY: as above.
        env.machine
            .on_cpu(cpu, || unsafe { env.mmu.load_root(idle.root(), false) });
    }
    table.destroy(|_, _| panic!("all was unmapped"), |_, _| {});
    idle.destroy(|_, _| {}, |_, _| {});
    TableCache::shrink(&env, usize::MAX);
    assert_eq!(env.pool.in_use(), 0, "frames leaked");
    let stats = env.machine.stats();
    // SAFETY: nothing of this environment is left.
    unsafe { env.retire() };
    stats
}

/// Three CPUs that make and empty one leaf table as often as they can, and look into it without a lock.
pub fn duel(seed: u64, turns: u32) -> Stats {
    let machine = Machine::builder()
        .memory(MemoryMap::pc(16 << 20))
        .cpus(CPUS as usize)
        .registers(Registers::LONG)
        .seed(seed)
        .caching(std::env::var_os("KMEM_MOCK_WITHOUT_TLB").is_none())
        .watch_kernel(true)
        .history(1 << 12)
        .build()
        .unwrap();
    let env = HostileEnv::new(machine, 0x400, 0);
    let table = Table::new(env).unwrap();
    let mut scheduler = Scheduler::new(env.machine, seed);
    for cpu in 0..CPUS {
        let table = &table;
        scheduler.spawn(cpu as usize, move || {
            let page = 0x400 + cpu;
            let one = PageRange::single(at(page));
            for turn in 0..turns {
                let frame = env.pool.alloc(&FrameRequest::ONE).unwrap();
                let number = frame.first();
                let mut cursor = table.cursor(one).unwrap();
                cursor.map(at(page), frame, Rights::USER_DATA).unwrap();
                drop(cursor);
                for other in 0..CPUS {
                    let seen = table.query(at(0x400 + (cpu + other) % CPUS)).leaf();
                    assert!(seen.is_none_or(|leaf| leaf.order == Order::ZERO));
                }
                let seen = table.query(at(page)).leaf();
                assert_eq!(seen.map(|leaf| leaf.frame), Some(number), "turn {turn}");
                let mut gather = table.gather::<1>();
                let mut cursor = table.cursor(one).unwrap();
                assert_eq!(cursor.unmap(one, &mut gather), Ok(1), "turn {turn}");
                drop(cursor);
                gather.commit_to(&env.pool);
                assert_eq!(table.query(at(page)), Entry::Empty);
            }
        });
    }
    scheduler.run();
    assert_eq!(table.table_count(), 1, "empty tables are gone");
    table.destroy(|_, _| panic!("all was unmapped"), |_, _| {});
    TableCache::shrink(&env, usize::MAX);
    assert_eq!(env.pool.in_use(), 0, "frames leaked");
    let stats = env.machine.stats();
    // SAFETY: nothing of this environment is left.
    unsafe { env.retire() };
    stats
}
