//! Tables made here, walked there: the mock machine's MMU, whose constants come from the manual, uses what this
//! crate writes, with TLBs that forget nothing unless they are told to.
//!
//! A flat map says what every access must come to. Between any two commits the TLBs are looked through for
//! translations that the tables no longer back: there must be none.

#![cfg(not(loom))]

#[path = "common/mock.rs"]
mod mock;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use kmem_hal::{
    Asid, FrameHandle, FrameRequest, FrameSink, FrameSource, Mmu, Order, OwnedFrame, Page,
    PageRange,
};
use kmem_mock_x86::{AccessKind, Adversary, Machine, MemoryMap, Registers, Scheduler, SeededRng};
use kmem_paging::format::{Format, X86_64, X86_64La57, X86Pae, X86TwoLevel};
use kmem_paging::{
    Attributes, Cleared, Entry, ForkItem, ForkStep, Harvest, PageTable, RangeError, Replaced,
    Rights, TableCache, TableError,
};
use mock::{Fault, MockEnv};

type Table<F> = PageTable<F, &'static MockEnv, OwnedFrame>;

const FIRST_FRAME: u64 = 0x400;

fn env(registers: Registers, cpus: usize, seed: u64, cache: usize) -> &'static MockEnv {
    let machine = Machine::builder()
        .memory(MemoryMap::pc(64 << 20))
        .cpus(cpus)
        .registers(registers)
        .seed(seed)
        .adversary(Adversary::FULL)
        .build()
        .unwrap();
    MockEnv::new(machine, FIRST_FRAME, cache)
}

/// The 80386's way: CR0.PG, and the Pentium's PSE and PGE in CR4.
fn legacy32() -> Registers {
    Registers {
        cr0: Registers::LONG.cr0,
        cr4: 1 << 4 | 1 << 7,
        ..Registers::PROTECTED
    }
}

/// PAE: CR4.PAE without long mode, and NX switched on.
fn pae() -> Registers {
    Registers {
        cr0: Registers::LONG.cr0,
        cr4: 1 << 5 | 1 << 7,
        efer: 1 << 11,
        ..Registers::PROTECTED
    }
}

fn la57() -> Registers {
    Registers {
        cr4: Registers::LONG.cr4 | 1 << 12,
        ..Registers::LONG
    }
}

/// What a page should be: the frame behind it, and the rights as the format can express them.
type Model = BTreeMap<u64, (u64, Rights)>;

/// A table with its model, loaded on some CPUs.
struct World<F: Format> {
    env: &'static MockEnv,
    table: Table<F>,
    model: Model,
    rng: SeededRng,
    /// Where the tests play: several leaf tables, far apart.
    areas: Vec<u64>,
}

impl<F: Format> World<F> {
    fn new(env: &'static MockEnv, seed: u64) -> Self {
        Self::with(env, Table::<F>::new(env).unwrap(), seed)
    }

    fn with(env: &'static MockEnv, table: Table<F>, seed: u64) -> Self {
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

    fn page(&mut self) -> u64 {
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
    fn access(&mut self) {
        let cpu = self.rng.below(self.env.machine.cpu_count() as u64) as usize;
        let page = self.page();
        let kind =
            [AccessKind::Read, AccessKind::Write, AccessKind::Fetch][self.rng.below(3) as usize];
        let user = self.rng.below(4) != 0;
        self.check(cpu, page, kind, user);
    }

    fn check(&self, cpu: usize, page: u64, kind: AccessKind, user: bool) {
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

    fn range(&self, first: u64, count: u64) -> PageRange {
        PageRange::with_count(Page::new(first).unwrap(), count).unwrap()
    }

    fn alloc(&self) -> OwnedFrame {
        self.env.pool.alloc(&FrameRequest::ONE).unwrap()
    }

    /// Maps one page, or refuses where the model says that there is one.
    fn map(&mut self, page: u64, rights: Rights) {
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

    fn step(&mut self) {
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

    fn finish(self) {
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

fn agree<F: Format>(registers: Registers) {
    for seed in 0..6 {
        // Without a cache of tables, a table that is freed too early is a free frame that is walked.
        let env = env(registers, 3, seed, if seed % 2 == 0 { 0 } else { 64 });
        let mut world = World::<F>::new(env, seed);
        for _ in 0..250 {
            world.step();
            for _ in 0..6 {
                world.access();
            }
        }
        assert!(env.machine.stats().tlb_hits > 0);
        world.finish();
    }
}

#[test]
fn four_levels_agree_with_the_manual() {
    agree::<X86_64>(Registers::LONG);
}

#[test]
fn four_levels_with_tags_agree_with_the_manual() {
    agree::<X86_64>(Registers::LONG_PCID);
}

#[test]
fn five_levels_agree_with_the_manual() {
    agree::<X86_64La57>(la57());
}

#[test]
fn pae_agrees_with_the_manual() {
    agree::<X86Pae>(pae());
}

#[test]
fn two_levels_agree_with_the_manual() {
    agree::<X86TwoLevel>(legacy32());
}

/// Runs the same steps with a planted fault; answers whether anybody noticed.
fn is_caught(fault: Fault) -> bool {
    (0..20).any(|seed| {
        let env = env(Registers::LONG, 3, seed, 0);
        env.mmu.fault.set(fault);
        catch_unwind(AssertUnwindSafe(|| {
            let mut world = World::<X86_64>::new(env, seed);
            for _ in 0..200 {
                world.step();
                for _ in 0..6 {
                    world.access();
                }
            }
        }))
        .is_err()
    })
}

#[test]
fn planted_flush_faults_are_caught() {
    let missed: Vec<Fault> = [
        Fault::NoLocalFlush,
        Fault::NoShootdown,
        Fault::ShortRange,
        Fault::KeepsTables,
    ]
    .into_iter()
    .filter(|&fault| !is_caught(fault))
    .collect();
    assert!(missed.is_empty(), "nobody noticed {missed:?}");
}

#[test]
fn a_frame_freed_before_its_flush_is_caught() {
    let env = env(Registers::LONG, 2, 1, 64);
    let mut world = World::<X86_64>::new(env, 1);
    world.map(0x400, Rights::USER_DATA);
    let frame = world.model[&0x400].0;
    world.check(1, 0x400, AccessKind::Read, true);
    let range = world.range(0x400, 1);
    let mut gather = world.table.gather::<1>();
    let mut cursor = world.table.cursor(range).unwrap();
    cursor.unmap(range, &mut gather).unwrap();
    drop(cursor);
    // There is no way to say this without `unsafe`: no value for the frame exists before the commit.
    // SAFETY: none: O3 is broken on purpose, and the machine must say so.
    let early = unsafe { OwnedFrame::from_entry(kmem_hal::Frame::from_number(frame), Order::ZERO) };
    env.pool.free(early);
    let story = catch_unwind(AssertUnwindSafe(|| {
        for _ in 0..50 {
            let _ = env.machine.cpu(1).user().read_u64(0x40_0000);
        }
    }))
    .unwrap_err();
    let story = story.downcast_ref::<String>().unwrap();
    assert!(story.contains("a freed frame was used"), "{story}");
    std::mem::forget(gather);
}

#[test]
fn a_fork_leaves_no_cpu_a_writable_translation() {
    for seed in 0..10 {
        let env = env(Registers::LONG, 3, seed, 64);
        let mut world = World::<X86_64>::new(env, seed);
        for page in 0x400..0x420 {
            world.map(page, Rights::USER_DATA);
        }
        for cpu in 0..3 {
            for page in 0x400..0x420 {
                world.check(cpu, page, AccessKind::Write, true);
            }
        }
        let child = Table::<X86_64>::new(env).unwrap();
        let mut gather = world.table.gather::<1>();
        let copied = world
            .table
            .fork_into(&child, world.range(0x400, 0x20), &mut gather, |item| {
                let ForkItem::Leaf(leaf) = item else {
                    return ForkStep::Stop;
                };
                assert!(leaf.attributes.dirty, "what a CPU wrote is dirty");
                ForkStep::Leaf {
                    handle: env.pool.alloc(&FrameRequest::ONE).unwrap(),
                    child: leaf.attributes.write_protected(),
                    parent: Some(leaf.attributes.write_protected()),
                }
            });
        assert_eq!(copied.unwrap(), 0x20);
        gather.commit(drop);
        drop(gather);
        for entry in world.model.values_mut() {
            entry.1.remove(Rights::WRITE);
        }
        for cpu in 0..3 {
            for page in 0x400..0x420 {
                world.check(cpu, page, AccessKind::Write, true);
                world.check(cpu, page, AccessKind::Read, true);
            }
        }
        child.destroy(|_, frame| env.pool.free(frame), |_, _| {});
        world.finish();
    }
}

/// The hardware sets accessed and dirty bits between the look at an entry and its change: none may be lost.
#[test]
fn bits_that_the_hardware_sets_meanwhile_are_kept() {
    let env = env(Registers::LONG, 2, 9, 64);
    env.machine.set_adversary(Adversary::OFF);
    let mut world = World::<X86_64>::new(env, 9);
    let range = world.range(0x400, 1);
    let write = || env.machine.cpu(1).user().write_u64(0x40_0000, 1).unwrap();
    let clean = |world: &World<X86_64>| {
        let mut gather = world.table.gather::<1>();
        let mut cursor = world.table.cursor(range).unwrap();
        cursor
            .update(range, &mut gather, |leaf| {
                Some(Attributes::new(leaf.attributes.rights))
            })
            .unwrap();
    };
    world.map(0x400, Rights::USER_DATA);

    // Protecting: the first look finds a clean page, a CPU writes, the second look finds it dirty.
    clean(&world);
    let mut looks = Vec::new();
    let mut gather = world.table.gather::<1>();
    world
        .table
        .cursor(range)
        .unwrap()
        .update(range, &mut gather, |leaf| {
            looks.push(leaf.attributes.dirty);
            if looks.len() == 1 {
                write();
            }
            Some(leaf.attributes.write_protected())
        })
        .unwrap();
    gather.commit(drop);
    drop(gather);
    assert_eq!(looks, [false, true]);
    let leaf = world.table.query(Page::new(0x400).unwrap()).leaf().unwrap();
    assert!(leaf.attributes.dirty && leaf.attributes.accessed && !leaf.is_writable());

    // Forking: the callback is asked once, and a CPU writes while it is.
    let mut gather = world.table.gather::<1>();
    world
        .table
        .cursor(range)
        .unwrap()
        .protect(range, Rights::USER_DATA, &mut gather)
        .unwrap();
    drop(gather);
    clean(&world);
    let child = Table::<X86_64>::new(env).unwrap();
    let mut gather = world.table.gather::<1>();
    let mut asked = 0;
    world
        .table
        .fork_into(&child, range, &mut gather, |item| {
            let ForkItem::Leaf(leaf) = item else {
                return ForkStep::Stop;
            };
            assert!(!leaf.attributes.dirty);
            asked += 1;
            write();
            ForkStep::Leaf {
                handle: env.pool.alloc(&FrameRequest::ONE).unwrap(),
                child: leaf.attributes.write_protected(),
                parent: Some(leaf.attributes.write_protected()),
            }
        })
        .unwrap();
    gather.commit(drop);
    drop(gather);
    assert_eq!(asked, 1);
    let leaf = world.table.query(Page::new(0x400).unwrap()).leaf().unwrap();
    assert!(leaf.attributes.dirty && !leaf.is_writable());
    world.model.get_mut(&0x400).unwrap().1.remove(Rights::WRITE);
    child.destroy(|_, frame| env.pool.free(frame), |_, _| {});
    world.finish();
}

/// A frame is moved to another page; before that is flushed, somebody else unmaps the new page and frees the frame
/// (CVE-2018-18281).
#[test]
fn a_moved_frame_is_not_freed_before_its_old_page_is_flushed() {
    let env = env(Registers::LONG, 2, 4, 64);
    env.machine.set_adversary(Adversary::OFF);
    let mut world = World::<X86_64>::new(env, 4);
    world.map(0x400, Rights::USER_DATA);
    world.check(1, 0x400, AccessKind::Write, true);
    let mut moving = world.table.gather::<1>();
    let from = world.range(0x400, 1);
    let to = world.range(0x2_0000, 1);
    world
        .table
        .move_range(from, to.first(), &mut moving)
        .unwrap();
    let mut other = world.table.gather::<1>();
    world
        .table
        .cursor(to)
        .unwrap()
        .unmap(to, &mut other)
        .unwrap();
    other.commit_to(&env.pool);
    // CPU 1 had the old page: through it, it must not reach the frame that is free now.
    assert!(env.machine.cpu(1).user().read_u64(0x40_0000).is_err());
    drop((moving, other));
    world.model.clear();
    world.finish();
}

#[test]
fn a_huge_and_a_small_leaf_in_one_gather_are_both_flushed() {
    let env = env(Registers::LONG, 2, 5, 64);
    env.machine.set_adversary(Adversary::OFF);
    let mut world = World::<X86_64>::new(env, 5);
    let page = Page::new(0x600).unwrap();
    let block = env.pool.alloc(&FrameRequest::new(Order::HUGE_2M)).unwrap();
    world
        .table
        .cursor(PageRange::with_count(page, 512).unwrap())
        .unwrap()
        .map(page, block, Rights::USER_DATA)
        .unwrap();
    for small in 0x5fe..0x600 {
        world.map(small, Rights::USER_DATA);
    }
    for page in [0x5feu64, 0x5ff, 0x600, 0x700] {
        env.machine.cpu(1).user().write_u64(page << 12, 1).unwrap();
    }
    let range = world.range(0x5fe, 514);
    let mut gather = world.table.gather::<3>();
    world
        .table
        .cursor(range)
        .unwrap()
        .unmap(range, &mut gather)
        .unwrap();
    gather.commit_to(&env.pool);
    drop(gather);
    let stale = env.machine.audit(0, u64::MAX);
    assert!(stale.is_empty(), "{}", stale[0]);
    world.model.clear();
    world.finish();
}

/// The kernel's part of the space is one set of tables under many roots.
#[test]
fn what_the_kernel_maps_is_seen_in_every_space_and_flushed_in_all() {
    let upper = Page::new(0xf_ffff_8000_0000).unwrap();
    for seed in 0..4 {
        let env = env(Registers::LONG_PCID, 3, seed, 64);
        let kernel = Table::<X86_64>::new(env).unwrap();
        assert!(
            matches!(
                Table::<X86_64>::sharing(env, &kernel, upper),
                Err(TableError::CannotShare)
            ),
            "nothing was lent yet"
        );
        let half = Page::new(0xf_fff8_0000_0000).unwrap();
        kernel.lend_from(half).unwrap();
        assert_eq!(kernel.table_count(), 257);
        let mut spaces: Vec<_> = (0..3)
            .map(|_| Table::<X86_64>::sharing(env, &kernel, half).unwrap())
            .collect();
        for (cpu, space) in spaces.iter_mut().enumerate() {
            space.set_asid(Asid::new(cpu as u16 + 1)).unwrap();
            let root = space.root();
            // SAFETY: as in `World::new`.
            env.machine
                .on_cpu(cpu, || unsafe { env.mmu.load_root(root, false) });
        }
        let range = PageRange::with_count(upper, 4).unwrap();
        assert_eq!(
            spaces[0].cursor(range).unwrap_err(),
            RangeError::Borrowed,
            "the kernel's part is changed through the kernel's table"
        );
        for rights in [Rights::KERNEL_DATA, Rights::KERNEL_DATA | Rights::GLOBAL] {
            let frame = env.pool.alloc(&FrameRequest::ONE).unwrap();
            let number = frame.first().number();
            let mut cursor = kernel.cursor(range).unwrap();
            cursor.map(upper, frame, rights).unwrap();
            drop(cursor);
            let linear = upper.start().as_u64();
            for (cpu, space) in spaces.iter().enumerate() {
                let at = (0..20).find_map(|_| {
                    env.machine
                        .cpu(cpu)
                        .translate(linear, AccessKind::Write)
                        .ok()
                });
                assert_eq!(at, Some(number << 12), "CPU {cpu}");
                assert!(space.query(upper).leaf().is_some());
            }
            // Each CPU goes to another space and keeps what it has under the old tag.
            for cpu in 0..3 {
                let root = spaces[(cpu + 1) % 3].root();
                // SAFETY: as above.
                env.machine
                    .on_cpu(cpu, || unsafe { env.mmu.load_root(root, true) });
            }
            let mut gather = kernel.gather::<2>();
            let mut cursor = kernel.cursor(range).unwrap();
            assert_eq!(cursor.unmap(range, &mut gather), Ok(1));
            drop(cursor);
            gather.commit_to(&env.pool);
            drop(gather);
            for turn in 0..3 {
                for cpu in 0..3 {
                    let root = spaces[(cpu + turn) % 3].root();
                    // SAFETY: as above.
                    env.machine
                        .on_cpu(cpu, || unsafe { env.mmu.load_root(root, true) });
                    assert!(env.machine.cpu(cpu).read_u64(linear).is_err());
                }
                assert!(env.machine.audit(0, u64::MAX).is_empty());
            }
        }
        let idle = Table::<X86_64>::new(env).unwrap();
        for cpu in 0..3 {
            // SAFETY: as above.
            env.machine
                .on_cpu(cpu, || unsafe { env.mmu.load_root(idle.root(), false) });
        }
        for space in spaces {
            assert_eq!(space.table_count(), 1);
            space.destroy(|_, _| unreachable!(), |_, _| unreachable!());
        }
        assert_eq!(
            kernel.table_count(),
            257,
            "a lender's tables outlive its borrowers"
        );
        idle.destroy(|_, _| {}, |_, _| {});
        TableCache::shrink(&env, usize::MAX);
        assert_eq!(env.pool.in_use(), 257);
    }
}

#[test]
fn a_five_level_format_with_four_levels_agrees_with_the_manual() {
    let env = env(Registers::LONG, 2, 1, 0);
    assert!(matches!(
        Table::<X86_64La57>::with_levels(env, 3),
        Err(TableError::BadLevels)
    ));
    let table = Table::<X86_64La57>::with_levels(env, 4).unwrap();
    let mut world = World::with(env, table, 1);
    for _ in 0..200 {
        world.step();
        for _ in 0..4 {
            world.access();
        }
    }
    let beyond = PageRange::single(Page::new(1 << 36).unwrap());
    assert_eq!(
        world.table.cursor(beyond).unwrap_err(),
        RangeError::NotCanonical
    );
    let World { env, table, .. } = world;
    let other = Table::<X86_64>::new(env).unwrap();
    for cpu in 0..2 {
        // SAFETY: as in `World::new`.
        env.machine
            .on_cpu(cpu, || unsafe { env.mmu.load_root(other.root(), false) });
    }
    table.destroy(|_, frame| env.pool.free(frame), |_, _| {});
    other.destroy(|_, _| {}, |_, _| {});
    assert_eq!(env.pool.in_use(), 0);
}

/// Several CPUs at once: each maps, protects and unmaps pages of its own, which lie between those of the others, and looks
/// at everybody's. Its own pages must be as it left them at every access; no CPU may use what is gone.
fn several_cpus(seed: u64, fault: Fault) {
    const CPUS: usize = 3;
    let env = env(
        Registers::LONG,
        CPUS,
        seed,
        if seed.is_multiple_of(2) { 0 } else { 16 },
    );
    let table = Table::<X86_64>::new(env).unwrap();
    env.mmu.fault.set(fault);
    for cpu in 0..CPUS {
        // SAFETY: as in `World::new`.
        env.machine
            .on_cpu(cpu, || unsafe { env.mmu.load_root(table.root(), false) });
    }
    let mut scheduler = Scheduler::new(env.machine, seed);
    for cpu in 0..CPUS {
        let table = &table;
        scheduler.spawn(cpu, move || {
            let mut rng = SeededRng::new(seed * 7 + cpu as u64);
            let mut model: BTreeMap<u64, Rights> = BTreeMap::new();
            let me = env.machine.cpu(cpu).user();
            // Tables come and go: few pages in each of several tables.
            let page_of = |rng: &mut SeededRng, owner: u64| {
                0x400 + rng.below(4) * 0x200 + rng.below(3) * CPUS as u64 + owner
            };
            for _ in 0..60 {
                let page = page_of(&mut rng, cpu as u64);
                let at = Page::new(page).unwrap();
                let range = PageRange::single(at);
                match rng.below(6) {
                    0..=2 => {
                        let frame = env.pool.alloc(&FrameRequest::ONE).unwrap();
                        let mut cursor = table.cursor(range).unwrap();
                        match cursor.map(at, frame, Rights::USER_DATA) {
                            Ok(()) => assert_eq!(model.insert(page, Rights::USER_DATA), None),
                            Err((_, frame)) => {
                                assert!(model.contains_key(&page));
                                env.pool.free(frame);
                            }
                        }
                    }
                    3 => {
                        let rights =
                            [Rights::USER_DATA, Rights::READ | Rights::USER][rng.below(2) as usize];
                        let mut gather = table.gather::<1>();
                        let mut cursor = table.cursor(range).unwrap();
                        cursor.protect(range, rights, &mut gather).unwrap();
                        drop(cursor);
                        gather.commit(drop);
                        model.entry(page).and_modify(|old| *old = rights);
                    }
                    4 => {
                        let mut gather = table.gather::<1>();
                        let mut cursor = table.cursor(range).unwrap();
                        let unmapped = cursor.unmap(range, &mut gather).unwrap();
                        drop(cursor);
                        gather.commit_to(&env.pool);
                        assert_eq!(unmapped == 1, model.remove(&page).is_some());
                    }
                    _ => {
                        // Without a lock, at a page of anybody's.
                        let owner = rng.below(CPUS as u64);
                        let page = page_of(&mut rng, owner);
                        if let Entry::Leaf(leaf) = table.query(Page::new(page).unwrap()) {
                            assert_eq!(leaf.page.number(), page);
                        }
                    }
                }
                for _ in 0..4 {
                    let page = page_of(&mut rng, cpu as u64);
                    let rights = model.get(&page).copied().unwrap_or_default();
                    let write = rng.below(2) == 0;
                    let allowed = rights.contains(if write { Rights::WRITE } else { Rights::READ });
                    let access = || {
                        if write {
                            me.write_u64(page << 12, page).map(|()| page)
                        } else {
                            me.read_u64(page << 12)
                        }
                    };
                    let seen = (0..40)
                        .map(|_| access())
                        .find(|seen| seen.is_ok() || !allowed);
                    match seen {
                        Some(Ok(_)) => assert!(allowed, "page {page:#x} of CPU {cpu}"),
                        _ => assert!(!allowed, "page {page:#x} of CPU {cpu}"),
                    }
                    let owner = rng.below(CPUS as u64);
                    let other = page_of(&mut rng, owner);
                    let _ = me.read_u64(other << 12);
                }
            }
        });
    }
    scheduler.run();
    let stale = env.machine.audit(0, u64::MAX);
    assert!(stale.is_empty(), "{}", stale[0]);
    let idle = Table::<X86_64>::new(env).unwrap();
    for cpu in 0..CPUS {
        // SAFETY: as in `World::new`.
        env.machine
            .on_cpu(cpu, || unsafe { env.mmu.load_root(idle.root(), false) });
    }
    table.destroy(|_, frame| env.pool.free(frame), |_, _| {});
    idle.destroy(|_, _| {}, |_, _| {});
    TableCache::shrink(&env, usize::MAX);
    assert_eq!(env.pool.in_use(), 0, "frames leaked");
}

#[test]
fn several_cpus_change_one_table_at_once() {
    for seed in 0..24 {
        several_cpus(seed, Fault::None);
    }
}

#[test]
fn a_shootdown_that_nobody_waits_for_is_caught() {
    let caught = (0..20)
        .any(|seed| catch_unwind(AssertUnwindSafe(|| several_cpus(seed, Fault::NoWait))).is_err());
    assert!(caught);
}

#[test]
fn a_forgotten_gather_leaks_and_the_next_commit_flushes() {
    let env = env(Registers::LONG, 2, 3, 64);
    let mut world = World::<X86_64>::new(env, 3);
    world.map(0x400, Rights::USER_DATA);
    world.map(0x401, Rights::USER_DATA);
    let leaked = world.model.remove(&0x400).unwrap().0;
    for cpu in 0..2 {
        let _ = env.machine.cpu(cpu).user().write_u64(0x40_0000, 1);
        let _ = env.machine.cpu(cpu).user().write_u64(0x40_1000, 1);
    }
    let mut gather = world.table.gather::<1>();
    let range = world.range(0x400, 1);
    world
        .table
        .cursor(range)
        .unwrap()
        .unmap(range, &mut gather)
        .unwrap();
    std::mem::forget(gather);
    assert!(
        !env.machine.audit(0, u64::MAX).is_empty(),
        "still cached somewhere"
    );
    // A page that is mapped there now must not be reached through the old translation.
    world.map(0x400, Rights::USER_DATA);
    for cpu in 0..2 {
        world.check(cpu, 0x400, AccessKind::Write, true);
    }
    assert!(env.machine.audit(0, u64::MAX).is_empty());
    // SAFETY: the test knows the number of the frame that it leaked, and it is flushed now.
    let frame = unsafe { OwnedFrame::from_raw(kmem_hal::Frame::from_number(leaked), Order::ZERO) };
    env.pool.free(frame);
    world.finish();
}

#[test]
fn huge_leaves_split_merge_and_agree() {
    for seed in 0..8 {
        let env = env(Registers::LONG, 2, seed, 64);
        let table = Table::<X86_64>::new(env).unwrap();
        for cpu in 0..2 {
            // SAFETY: as in `World::new`.
            env.machine
                .on_cpu(cpu, || unsafe { env.mmu.load_root(table.root(), false) });
        }
        let first = 0x4_0000u64;
        let page = Page::new(first).unwrap();
        let all = PageRange::with_count(page, 512).unwrap();
        let block = env.pool.alloc(&FrameRequest::new(Order::HUGE_2M)).unwrap();
        let base = block.first().number();
        let mut cursor = table.cursor(all).unwrap();
        cursor.map(page, block, Rights::USER_DATA).unwrap();
        let reads = |expected: &dyn Fn(u64) -> Option<u64>| {
            for cpu in 0..2 {
                for offset in [0, 1, 17, 255, 256, 511] {
                    let linear = (first + offset) << 12;
                    let mut seen = env
                        .machine
                        .cpu(cpu)
                        .user()
                        .translate(linear, AccessKind::Write);
                    for _ in 0..20 {
                        if seen.is_ok() || expected(offset).is_none() {
                            break;
                        }
                        seen = env
                            .machine
                            .cpu(cpu)
                            .user()
                            .translate(linear, AccessKind::Write);
                    }
                    assert_eq!(seen.ok(), expected(offset).map(|frame| frame << 12));
                }
            }
        };
        reads(&|offset| Some(base + offset));
        let mut gather = table.gather::<4>();
        cursor.split(page, &mut gather).unwrap();
        reads(&|offset| Some(base + offset));
        gather.commit(drop);
        reads(&|offset| Some(base + offset));
        let leaf = cursor.query(page).leaf().unwrap();
        assert_eq!(leaf.order, Order::ZERO);
        cursor.merge(page, Order::HUGE_2M, &mut gather).unwrap();
        gather.commit(drop);
        reads(&|offset| Some(base + offset));
        let leaf = cursor.query(page).leaf().unwrap();
        assert_eq!((leaf.order, leaf.frame.number()), (Order::HUGE_2M, base));
        assert!(leaf.attributes.dirty, "no dirty bit is lost by merging");
        // Unmapping a part splits it again.
        let hole = PageRange::with_count(Page::new(first + 17).unwrap(), 1).unwrap();
        let mut seen = 0;
        cursor
            .unmap_with(hole, &mut gather, |cleared| {
                assert!(matches!(cleared, Cleared::Leaf(leaf) if leaf.frame.number() == base + 17));
                seen += 1;
            })
            .unwrap();
        assert_eq!(seen, 1);
        drop(cursor);
        gather.commit_to(&env.pool);
        reads(&|offset| (offset != 17).then_some(base + offset));
        assert!(env.machine.audit(0, u64::MAX).is_empty());
        drop(gather);
        table.destroy(|_, frame| env.pool.free(frame), |_, _| {});
        TableCache::shrink(&env, usize::MAX);
        assert_eq!(env.pool.in_use(), 0);
    }
}
