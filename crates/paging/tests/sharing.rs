//! Tables shared at fork: several spaces held against flat maps of their pages, and every reference counted.

#![cfg(not(loom))]

#[path = "common/machine.rs"]
mod machine;

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

use kmem_hal::{DeviceFrame, Frame, FrameHandle, Order, Page, PageRange};
use kmem_paging::format::X86_64;
use kmem_paging::{
    Attributes, ChangeError, Divisible, ForkItem, ForkStep, Harvest, Harvested, MapError,
    PageTable, Rights, TableCache, UnshareError, UnshareStep,
};
use machine::{Machine, TestEnv};
use proptest::prelude::*;

thread_local! {
    /// References by frame.
    static COUNTS: RefCell<HashMap<u64, u32>> = RefCell::default();
}

/// A reference to a page.
#[derive(Debug, PartialEq, Eq)]
struct Ref(u64);

impl Ref {
    fn new(frame: u64) -> Self {
        COUNTS.with_borrow_mut(|counts| *counts.entry(frame).or_default() += 1);
        Self(frame)
    }

    fn give_back(self) {
        COUNTS.with_borrow_mut(|counts| {
            let count = counts.get_mut(&self.0).expect("it is counted");
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.0);
            }
        });
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

type Table = PageTable<X86_64, &'static TestEnv, Ref>;

/// Six leaf tables at the end of one level-2 table and the beginning of the next.
const FIRST: u64 = (5 << 18) - 3 * 512;
const PAGES: u64 = 6 * 512;
const ALL: u64 = 1 << 18;

fn page(number: u64) -> Page {
    Page::from_number(number)
}

fn span(first: u64, count: u64) -> PageRange {
    PageRange::with_count(page(first), count).unwrap()
}

/// A space and what it should hold: the frame and whether the space alone has it.
struct Space {
    table: Table,
    model: BTreeMap<u64, u64>,
}

struct World {
    machine: Machine,
    spaces: Vec<Space>,
    next_frame: u64,
    copies: usize,
}

impl World {
    fn new() -> Self {
        COUNTS.with_borrow_mut(HashMap::clear);
        let machine = Machine::new(1 << 10);
        let table = Table::new(machine.env()).unwrap();
        Self {
            machine,
            spaces: vec![Space {
                table,
                model: BTreeMap::new(),
            }],
            next_frame: 1 << 20,
            copies: 0,
        }
    }

    fn fresh(&mut self) -> u64 {
        self.next_frame += 1;
        self.next_frame
    }

    /// Makes the tables of a page the space's own.
    fn unshare(&mut self, space: usize, at: Page) {
        let table = &self.spaces[space].table;
        let mut gather = table.gather::<4>();
        let mut cursor = table.cursor(span(FIRST, PAGES)).unwrap();
        let copied = cursor.unshare(
            at,
            &mut gather,
            |item| match item {
                ForkItem::Leaf(leaf) => UnshareStep::Protected(Ref::new(leaf.frame.number())),
                ForkItem::Payload(..) => UnshareStep::Payload,
            },
            Ref::give_back,
        );
        drop(cursor);
        gather.commit(Ref::give_back);
        self.copies += usize::from(copied.unwrap());
    }

    fn map(&mut self, space: usize, first: u64, count: u64) {
        for number in first..first + count {
            if self.spaces[space].model.contains_key(&number) {
                continue;
            }
            let mut frame = Ref::new(self.fresh());
            let id = frame.0;
            loop {
                let table = &self.spaces[space].table;
                let mut cursor = table.cursor(span(FIRST, PAGES)).unwrap();
                match cursor.map(page(number), frame, Rights::USER_DATA) {
                    Ok(()) => break,
                    Err((MapError::Shared, back)) => frame = back,
                    Err((error, _)) => panic!("{error}"),
                }
                drop(cursor);
                self.unshare(space, page(number));
            }
            self.spaces[space].model.insert(number, id);
        }
    }

    /// A write: where the leaf cannot be written the space gets a page of its own.
    fn write(&mut self, space: usize, number: u64) {
        let Some(leaf) = self.spaces[space].table.query(page(number)).leaf() else {
            assert!(!self.spaces[space].model.contains_key(&number));
            return;
        };
        if leaf.attributes.rights.contains(Rights::WRITE) {
            let count = COUNTS.with_borrow(|counts| counts[&leaf.frame.number()]);
            assert_eq!(count, 1, "a page of others can be written");
            return;
        }
        self.unshare(space, page(number));
        let table = &self.spaces[space].table;
        let count = COUNTS.with_borrow(|counts| counts[&leaf.frame.number()]);
        let mut cursor = table.cursor(span(number, 1)).unwrap();
        if count == 1 {
            // Nobody else has it: writable again.
            let mut gather = table.gather::<1>();
            cursor
                .protect(span(number, 1), Rights::USER_DATA, &mut gather)
                .unwrap();
            return;
        }
        drop(cursor);
        let frame = Ref::new(self.fresh());
        let id = frame.0;
        let table = &self.spaces[space].table;
        let mut cursor = table.cursor(span(number, 1)).unwrap();
        let before = cursor
            .replace(page(number), frame, Rights::USER_DATA)
            .unwrap();
        match before {
            kmem_paging::Replaced::Leaf(_, old) => old.give_back(),
            other => panic!("{other:?}"),
        }
        drop(cursor);
        self.spaces[space].model.insert(number, id);
    }

    fn unmap(&mut self, space: usize, first: u64, count: u64) {
        let mut rest = span(first, count);
        loop {
            let table = &self.spaces[space].table;
            let mut gather = table.gather::<8>();
            let mut cursor = table.cursor(rest).unwrap();
            let outcome = cursor.unmap(rest, &mut gather);
            drop(cursor);
            gather.commit(Ref::give_back);
            drop(gather);
            match outcome {
                Ok(_) => break,
                Err(ChangeError::Full { next }) => {
                    rest = PageRange::new(next, rest.last()).unwrap();
                }
                Err(ChangeError::Shared { at }) => {
                    self.unshare(space, at);
                    rest = PageRange::new(at, rest.last()).unwrap();
                }
                Err(error) => panic!("{error}"),
            }
        }
        self.spaces[space]
            .model
            .retain(|number, _| !(first..first + count).contains(number));
    }

    fn protect(&mut self, space: usize, first: u64, count: u64) {
        let mut rest = span(first, count);
        loop {
            let table = &self.spaces[space].table;
            let mut gather = table.gather::<1>();
            let mut cursor = table.cursor(rest).unwrap();
            let outcome = cursor.protect(rest, Rights::READ | Rights::USER, &mut gather);
            drop(cursor);
            drop(gather);
            match outcome {
                Ok(_) => return,
                Err(ChangeError::Shared { at }) => {
                    self.unshare(space, at);
                    rest = PageRange::new(at, rest.last()).unwrap();
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn fork(&mut self, space: usize, most: usize, first: u64, count: u64) {
        let parent = &self.spaces[space];
        let child = Table::empty_like(self.machine.env(), &parent.table).unwrap();
        let mut gather = parent.table.gather::<4>();
        // SAFETY: one thread, and no cursor is open.
        let outcome = unsafe {
            parent
                .table
                .fork_sharing(&child, span(first, count), most, &mut gather, |item| {
                    let ForkItem::Leaf(leaf) = item else {
                        return ForkStep::Skip;
                    };
                    let shared = leaf.attributes.write_protected();
                    ForkStep::Leaf {
                        handle: Ref::new(leaf.frame.number()),
                        child: shared,
                        parent: Some(shared),
                    }
                })
        };
        outcome.unwrap();
        gather.commit(Ref::give_back);
        drop(gather);
        let model = parent
            .model
            .iter()
            .filter(|(number, _)| (first..first + count).contains(*number))
            .map(|(&number, &frame)| (number, frame))
            .collect();
        self.spaces.push(Space {
            table: child,
            model,
        });
    }

    fn exit(&mut self, space: usize) {
        let space = self.spaces.swap_remove(space);
        space.table.destroy(|_, frame| frame.give_back(), |_, _| {});
    }

    /// Every space says what its model says, and nothing that can be written is another's too.
    fn compare(&self) {
        let mut holders: HashMap<u64, u32> = HashMap::new();
        for space in &self.spaces {
            for &frame in space.model.values() {
                *holders.entry(frame).or_default() += 1;
            }
        }
        for space in &self.spaces {
            for number in FIRST..FIRST + PAGES {
                let found = space.table.query(page(number)).leaf();
                let frame = found.map(|leaf| leaf.frame.number());
                assert_eq!(frame, space.model.get(&number).copied(), "page {number:#x}");
                if let Some(leaf) = found
                    && leaf.attributes.rights.contains(Rights::WRITE)
                {
                    assert_eq!(holders[&leaf.frame.number()], 1, "two spaces, one writes");
                }
            }
        }
        COUNTS.with_borrow(|counts| {
            for (frame, count) in counts {
                let holders = holders.get(frame).copied().unwrap_or(0);
                assert!((1..=holders).contains(count), "{count} for {holders}");
            }
            assert_eq!(counts.len(), holders.len(), "a page is lost or left");
        });
    }

    fn step(&mut self, code: [u8; 4]) {
        let [kind, who, at, length] = code;
        let space = usize::from(who) % self.spaces.len();
        let first = FIRST + u64::from(at) * PAGES / 256;
        let count = (1 + u64::from(length) * 8).min(FIRST + PAGES - first);
        match kind % 10 {
            0 | 1 => self.map(space, first, count.min(700)),
            2..=4 => self.write(space, first),
            5 => self.unmap(space, first, count),
            6 => self.protect(space, first, count.min(40)),
            7 if self.spaces.len() < 5 => {
                self.fork(space, usize::from(length) % 3, FIRST - FIRST % ALL, 2 * ALL);
            }
            8 if self.spaces.len() < 5 => self.fork(space, 1, first, count),
            9 if self.spaces.len() > 1 => self.exit(space),
            _ => self.write(space, first + count - 1),
        }
    }

    fn finish(mut self) -> usize {
        self.compare();
        while !self.spaces.is_empty() {
            self.exit(0);
        }
        COUNTS.with_borrow(|counts| assert!(counts.is_empty(), "references are left"));
        TableCache::shrink(self.machine.env(), usize::MAX);
        assert_eq!(self.machine.frames.out(), 0, "tables leaked");
        self.copies
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn spaces_that_share_tables_agree_with_flat_maps(codes in prop::collection::vec(any::<[u8; 4]>(), 1..40)) {
        let mut world = World::new();
        // Something to share from the beginning.
        world.map(0, FIRST, 1400);
        for code in codes {
            world.step(code);
            world.compare();
        }
        world.finish();
    }
}

#[test]
fn a_table_is_copied_once_and_handed_over_without_a_copy() {
    let mut world = World::new();
    world.map(0, FIRST, 1024);
    let tables = world.machine.frames.out();
    world.fork(0, 1, FIRST, PAGES);
    assert_eq!(
        world.machine.frames.out() - tables,
        3,
        "the child has a root and two upper tables"
    );
    let handles = COUNTS.with_borrow(|counts| counts.values().sum::<u32>());
    assert_eq!(handles, 1024, "a shared table counts once");
    let leaf = world.spaces[1].table.query(page(FIRST)).leaf().unwrap();
    assert!(!leaf.attributes.rights.contains(Rights::WRITE));
    // Neither side changes it.
    for space in 0..2 {
        let table = &world.spaces[space].table;
        let mut gather = table.gather::<1>();
        let outcome = table.cursor(span(FIRST, 1)).unwrap().protect(
            span(FIRST, 1),
            Rights::READ | Rights::USER,
            &mut gather,
        );
        assert_eq!(outcome, Err(ChangeError::Shared { at: page(FIRST) }));
    }
    world.write(1, FIRST + 1);
    world.write(0, FIRST + 2);
    assert_eq!(world.copies, 1, "the second to write is alone");
    world.exit(1);
    world.write(0, FIRST + 600);
    assert_eq!(world.copies, 1, "handed over");
    assert_eq!(world.spaces[0].table.table_count(), 5);
    world.finish();
}

#[test]
fn a_level_two_table_is_shared_and_copied_in_two_steps() {
    let mut world = World::new();
    world.map(0, FIRST, 1500);
    world.fork(0, 2, FIRST - FIRST % ALL, ALL);
    world.fork(1, 2, FIRST - FIRST % ALL, ALL);
    world.compare();
    world.write(2, FIRST);
    world.write(1, FIRST + 512);
    world.write(0, FIRST + 1024);
    world.compare();
    assert!(world.copies >= 2);
    world.finish();
}

#[test]
fn a_copy_without_memory_or_references_changes_nothing() {
    let mut world = World::new();
    world.map(0, FIRST, 600);
    world.fork(0, 1, FIRST, PAGES);
    let table = &world.spaces[1].table;
    let mut gather = table.gather::<1>();
    let mut cursor = table.cursor(span(FIRST, PAGES)).unwrap();
    TableCache::shrink(world.machine.env(), usize::MAX);
    world.machine.frames.set_fuse(Some(0));
    let failed = cursor.unshare(
        page(FIRST),
        &mut gather,
        |_| UnshareStep::Skip,
        Ref::give_back,
    );
    assert!(matches!(failed, Err(UnshareError::Memory(_))));
    world.machine.frames.set_fuse(None);
    let mut left = 100;
    let failed = cursor.unshare(
        page(FIRST),
        &mut gather,
        |item| match item {
            ForkItem::Leaf(leaf) if left > 0 => {
                left -= 1;
                UnshareStep::Protected(Ref::new(leaf.frame.number()))
            }
            _ => UnshareStep::Stop,
        },
        Ref::give_back,
    );
    assert_eq!(failed, Err(UnshareError::Stopped));
    drop((cursor, gather));
    world.compare();
    let handles = COUNTS.with_borrow(|counts| counts.values().sum::<u32>());
    assert_eq!(handles, 600);
    world.finish();
}

#[test]
fn a_table_with_attributes_of_its_own_is_copied_where_the_caller_says_so() {
    let mut world = World::new();
    world.map(0, FIRST, 512);
    // `most` 0: no table is shared.
    world.fork(0, 0, FIRST, PAGES);
    let handles = COUNTS.with_borrow(|counts| counts.values().sum::<u32>());
    assert_eq!(handles, 1024);
    let attributes = Attributes::new(Rights::USER_DATA).write_protected();
    let leaf = world.spaces[1].table.query(page(FIRST)).leaf().unwrap();
    assert_eq!(leaf.attributes.rights, attributes.rights);
    world.finish();
}

/// Bits that a harvest cleared before it came to a shared table are told: they are seen once.
#[test]
fn a_harvest_that_stops_says_what_it_found() {
    let machine = Machine::new(64);
    let parent = Table::new(machine.env()).unwrap();
    let child = Table::empty_like(machine.env(), &parent).unwrap();
    let both = span(FIRST, 1024);
    let used = Attributes::new(Rights::USER_DATA).accessed().dirty();
    let mut cursor = parent.cursor(both).unwrap();
    for (index, at) in [FIRST, FIRST + 5, FIRST + 512].into_iter().enumerate() {
        let frame = Ref::new(1000 + index as u64);
        cursor
            .map(page(at), frame, used)
            .map_err(|(error, _)| error)
            .unwrap();
    }
    drop(cursor);
    let mut gather = parent.gather::<4>();
    // SAFETY: one thread, and no cursor is open.
    let shared = unsafe {
        parent.fork_sharing(&child, span(FIRST + 512, 512), 1, &mut gather, |_| {
            ForkStep::Skip
        })
    };
    shared.unwrap();
    let mut seen = 0;
    let stopped = parent
        .cursor(both)
        .unwrap()
        .harvest(both, Harvest::all(), &mut gather, |_| seen += 1);
    let (accessed, dirty) = (2, 2);
    let at = page(FIRST + 512);
    assert_eq!(
        stopped,
        Err((ChangeError::Shared { at }, Harvested { accessed, dirty }))
    );
    assert_eq!(seen, 2);
    gather.commit(Ref::give_back);
    drop(gather);
    for table in [child, parent] {
        table.destroy(|_, handle| handle.give_back(), |_, _| {});
    }
    COUNTS.with_borrow(|counts| assert!(counts.is_empty(), "references are left"));
}
