//! Tables shared at fork: several spaces held against flat maps of their pages, and every reference counted.

#![cfg(not(loom))]

#[path = "common/machine.rs"]
mod machine;

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

use kmem_hal::{DeviceFrame, Frame, FrameHandle, Order, Page, PageRange};
use kmem_paging::format::X86_64;
use kmem_paging::{
    Attributes, ChangeError, Divisible, Entry, ForkError, ForkItem, ForkStep, Harvest, Harvested,
    HugeError, Leaf, MapError, MoveError, PageTable, Payload, Rights, TableCache, TableError,
    UnshareError, UnshareStep,
};
use machine::{Machine, TestEnv};
use proptest::prelude::*;

thread_local! {
    /// References by frame.
    static COUNTS: RefCell<HashMap<u64, u32>> = RefCell::default();
}

/// A reference to each page of a block.
#[derive(Debug, PartialEq, Eq)]
struct Ref(u64, Order);

impl Ref {
    fn new(frame: u64) -> Self {
        Self::block(frame, Order::ZERO)
    }

    fn block(frame: u64, order: Order) -> Self {
        COUNTS.with_borrow_mut(|counts| {
            for frame in frame..frame + order.frames() {
                *counts.entry(frame).or_default() += 1;
            }
        });
        Self(frame, order)
    }

    /// Another reference to what a leaf maps.
    fn to(leaf: &Leaf) -> Self {
        Self::block(leaf.frame.number(), leaf.order)
    }

    fn give_back(self) {
        COUNTS.with_borrow_mut(|counts| {
            for frame in self.0..self.0 + self.1.frames() {
                let count = counts.get_mut(&frame).expect("it is counted");
                *count -= 1;
                if *count == 0 {
                    counts.remove(&frame);
                }
            }
        });
    }
}

// SAFETY: H1, H2: the counts pass through the numbers; blocks are aligned.
unsafe impl FrameHandle for Ref {
    fn into_entry(self) -> (Frame, Order) {
        DeviceFrame::new(Frame::from_number(self.0), self.1)
            .expect("aligned")
            .into_entry()
    }
    unsafe fn from_entry(first: Frame, order: Order) -> Self {
        Self(first.number(), order)
    }
}

// SAFETY: D1: each page of a block is counted by itself.
unsafe impl Divisible for Ref {}

type Table = PageTable<X86_64, &'static TestEnv, Ref>;

/// Six leaf tables at the end of one level-2 table and the beginning of the next.
const FIRST: u64 = (5 << 18) - 3 * 512;
const PAGES: u64 = 6 * 512;
const ALL: u64 = 1 << 18;
/// What a page holds that has a payload.
const PAYLOAD: u64 = 1 << 63;

fn page(number: u64) -> Page {
    Page::from_number(number)
}

fn span(first: u64, count: u64) -> PageRange {
    PageRange::with_count(page(first), count).unwrap()
}

/// A space and what each page of it should hold: a frame, or a payload.
struct Space {
    table: Table,
    model: BTreeMap<u64, u64>,
}

struct World {
    machine: Machine,
    spaces: Vec<Space>,
    next_frame: u64,
    copies: usize,
    merged: usize,
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
            merged: 0,
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
                ForkItem::Leaf(leaf) => UnshareStep::Protected(Ref::to(&leaf)),
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
            let held = self.spaces[space].model.get(&number);
            assert!(held.is_none_or(|held| held & PAYLOAD != 0));
            return;
        };
        let frame = leaf.frame_of(page(number)).unwrap().number();
        if leaf.attributes.rights.contains(Rights::WRITE) {
            let count = COUNTS.with_borrow(|counts| counts[&frame]);
            assert_eq!(count, 1, "a page of others can be written");
            return;
        }
        self.unshare(space, page(number));
        if leaf.order > Order::ZERO {
            self.split(space, number);
        }
        let table = &self.spaces[space].table;
        let count = COUNTS.with_borrow(|counts| counts[&frame]);
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

    /// Maps a block of 2 MiB where nothing is.
    fn map_huge(&mut self, space: usize, first: u64) {
        let first = first & !511;
        let mut there = self.spaces[space].model.range(first..first + 512);
        if there.next().is_some() {
            return;
        }
        let base = self.next_frame.next_multiple_of(512) + 512;
        self.next_frame = base + 512;
        let mut block = Ref::block(base, Order::HUGE_2M);
        loop {
            let table = &self.spaces[space].table;
            let mut cursor = table.cursor(span(FIRST, PAGES)).unwrap();
            match cursor.map(page(first), block, Rights::USER_DATA) {
                Ok(()) => break,
                Err((MapError::Shared, back)) => block = back,
                Err((error, _)) => panic!("{error}"),
            }
            drop(cursor);
            self.unshare(space, page(first));
        }
        let pages = (0..512).map(|offset| (first + offset, base + offset));
        self.spaces[space].model.extend(pages);
    }

    fn split(&mut self, space: usize, number: u64) {
        loop {
            let table = &self.spaces[space].table;
            let mut gather = table.gather::<1>();
            let mut cursor = table.cursor(span(number, 1)).unwrap();
            let outcome = cursor.split(page(number), &mut gather);
            drop((cursor, gather));
            match outcome {
                Ok(()) | Err(HugeError::NotPossible) => return,
                Err(HugeError::Shared) => self.unshare(space, page(number)),
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Whether 512 pages are one leaf afterwards is for `compare` alone to see.
    fn merge(&mut self, space: usize, first: u64) {
        let first = first & !511;
        loop {
            let table = &self.spaces[space].table;
            let mut gather = table.gather::<1>();
            let mut cursor = table.cursor(span(first, 512)).unwrap();
            let outcome = cursor.merge(page(first), Order::HUGE_2M, &mut gather);
            drop((cursor, gather));
            match outcome {
                Ok(()) => self.merged += 1,
                Err(HugeError::NotPossible) => {}
                Err(HugeError::Shared) => {
                    self.unshare(space, page(first));
                    continue;
                }
                Err(error) => panic!("{error}"),
            }
            return;
        }
    }

    fn relocate(&mut self, space: usize, first: u64, count: u64, to: u64) {
        let free = |from: &Self| {
            let mut there = from.spaces[space].model.range(to..to + count);
            there.next().is_none()
        };
        loop {
            let table = &self.spaces[space].table;
            let mut gather = table.gather::<1>();
            let outcome = table.move_range(span(first, count), page(to), &mut gather);
            drop(gather);
            match outcome {
                Ok(_) => break,
                Err(MoveError::OutOfRange) => {
                    assert!(first < to + count && to < first + count);
                    return;
                }
                Err(MoveError::Occupied) => return assert!(!free(self)),
                Err(MoveError::Shared { at }) => self.unshare(space, at),
                Err(error) => panic!("{error}"),
            }
        }
        assert!(free(self));
        let model = &mut self.spaces[space].model;
        let range = first..first + count;
        let moved: Vec<_> = model
            .range(range.clone())
            .map(|(&at, &held)| (at, held))
            .collect();
        model.retain(|at, _| !range.contains(at));
        model.extend(moved.into_iter().map(|(at, held)| (at - first + to, held)));
    }

    fn payload(&mut self, space: usize, number: u64) {
        let payload = self.fresh();
        loop {
            let table = &self.spaces[space].table;
            let mut gather = table.gather::<1>();
            let mut cursor = table.cursor(span(number, 1)).unwrap();
            let payload = Payload::new::<X86_64>(payload).unwrap();
            let outcome = cursor.set_payload(page(number), payload, &mut gather);
            drop(cursor);
            gather.commit(Ref::give_back);
            drop(gather);
            match outcome {
                Ok(_) => break,
                Err(ChangeError::Shared { at }) => self.unshare(space, at),
                Err(ChangeError::Unencodable { .. }) => self.split(space, number),
                Err(error) => panic!("{error}"),
            }
        }
        let model = &mut self.spaces[space].model;
        model.insert(number, PAYLOAD | payload);
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
        // Where the range cuts a huge leaf, that is split, in a table that is the space's own.
        for end in [first, first + count - 1] {
            let leaf = self.spaces[space].table.query(page(end)).leaf();
            if leaf.is_some_and(|leaf| !span(first, count).contains_range(leaf.range())) {
                self.unshare(space, page(end));
            }
        }
        let parent = &self.spaces[space];
        let child = Table::empty_like(self.machine.env(), &parent.table).unwrap();
        let mut gather = parent.table.gather::<4>();
        // SAFETY: one thread, and no cursor is open.
        let outcome = unsafe {
            parent
                .table
                .fork_sharing(&child, span(first, count), most, &mut gather, |item| {
                    let leaf = match item {
                        ForkItem::Leaf(leaf) => leaf,
                        ForkItem::Payload(_, payload) => return ForkStep::Payload(payload),
                    };
                    let shared = leaf.attributes.write_protected();
                    ForkStep::Leaf {
                        handle: Ref::to(&leaf),
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
            let frames = space.model.values().filter(|held| **held & PAYLOAD == 0);
            for &frame in frames {
                *holders.entry(frame).or_default() += 1;
            }
        }
        for space in &self.spaces {
            for number in FIRST..FIRST + PAGES {
                let found = space.table.query(page(number));
                let held = match found {
                    Entry::Empty => None,
                    Entry::Payload(payload) => Some(PAYLOAD | payload.number()),
                    Entry::Leaf(leaf) => Some(leaf.frame_of(page(number)).unwrap().number()),
                };
                assert_eq!(held, space.model.get(&number).copied(), "page {number:#x}");
                if let (Some(leaf), Some(frame)) = (found.leaf(), held)
                    && leaf.attributes.rights.contains(Rights::WRITE)
                {
                    assert_eq!(holders[&frame], 1, "two spaces, one writes");
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
        match kind % 16 {
            10 => self.map_huge(space, first),
            11 => self.split(space, first),
            12 | 13 => self.merge(space, first),
            14 => {
                let to = FIRST + u64::from(length) * PAGES / 256;
                let count = (1 + u64::from(kind) * 4).min(FIRST + PAGES - first.max(to));
                self.relocate(space, first, count, to);
            }
            15 => self.payload(space, first),
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
                UnshareStep::Protected(Ref::to(&leaf))
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

#[test]
fn huge_leaves_are_shared_split_and_merged() {
    let mut world = World::new();
    world.map_huge(0, FIRST);
    world.map_huge(0, FIRST + 3 * 512);
    world.split(0, FIRST);
    world.fork(0, 1, FIRST, PAGES);
    world.fork(1, 2, FIRST - FIRST % ALL, 2 * ALL);
    // A range that cuts both blocks.
    world.fork(0, 1, FIRST + 100, 3 * 512);
    world.compare();
    for space in 0..4 {
        world.merge(space, FIRST);
        world.compare();
    }
    assert!(world.merged > 0);
    world.write(0, FIRST + 7);
    world.write(1, FIRST + 3 * 512 + 7);
    world.relocate(1, FIRST, 512, FIRST + 512);
    world.payload(1, FIRST + 3 * 512 + 9);
    world.compare();
    world.finish();
}

/// Each allocation fails in turn: what stopped half-way can be taken down or gone on with, and no reference is lost.
#[test]
fn memory_that_runs_out_while_tables_are_shared_loses_nothing() {
    let mut world = World::new();
    world.map(0, FIRST, 1500);
    let both = span(FIRST - FIRST % ALL, 2 * ALL);
    let env = world.machine.env();
    let frames = world.machine.frames;
    let child = (0..).find_map(|fuse| {
        let parent = &world.spaces[0].table;
        TableCache::shrink(env, usize::MAX);
        frames.set_fuse(Some(fuse));
        let child = Table::empty_like(env, parent);
        let Ok(child) = child else {
            assert_eq!(fuse, 0, "the root comes first");
            return None;
        };
        let mut gather = parent.gather::<4>();
        // SAFETY: one thread, and no cursor is open.
        let outcome =
            unsafe { parent.fork_sharing(&child, both, 1, &mut gather, |_| ForkStep::Stop) };
        frames.set_fuse(None);
        drop(gather);
        match outcome {
            Ok(_) => {
                assert_eq!(fuse, 3, "a root and two upper tables");
                return Some(child);
            }
            Err((ForkError::Stopped { .. }, None)) => {}
            Err((error, _)) => panic!("{error}"),
        }
        child.destroy(|_, handle| handle.give_back(), |_, _| {});
        world.compare();
        None
    });
    let model = world.spaces[0].model.clone();
    let table = child.unwrap();
    world.spaces.push(Space { table, model });
    // The copy of a level-2 table, and that of the leaf table below it.
    world.fork(1, 2, both.first().number(), 2 * ALL);
    for fuse in 0..2 {
        let table = &world.spaces[2].table;
        let mut gather = table.gather::<4>();
        let mut cursor = table.cursor(span(FIRST, PAGES)).unwrap();
        TableCache::shrink(env, usize::MAX);
        // What was copied before stays.
        frames.set_fuse(Some(1 - fuse));
        let failed = cursor.unshare(
            page(FIRST),
            &mut gather,
            |item| match item {
                ForkItem::Leaf(leaf) => UnshareStep::Protected(Ref::to(&leaf)),
                ForkItem::Payload(..) => UnshareStep::Payload,
            },
            Ref::give_back,
        );
        frames.set_fuse(None);
        assert!(matches!(failed, Err(UnshareError::Memory(_))));
        drop(cursor);
        gather.commit(Ref::give_back);
        drop(gather);
        world.compare();
    }
    world.write(2, FIRST);
    world.compare();
    // Spares that were found are kept.
    TableCache::shrink(env, usize::MAX);
    frames.set_fuse(Some(1));
    assert!(world.spaces[2].table.keep_spares(3).is_err());
    frames.set_fuse(None);
    assert_eq!(world.spaces[2].table.spares(), 1);
    world.finish();
}

/// A table that could not make all the tables it is to lend lends nothing, and can be taken down.
#[test]
fn a_lender_without_memory_lends_nothing() {
    const KERNEL: u64 = 0xffff_8000_0000_0000 >> 12;
    let machine = Machine::new(512);
    let lender = Table::new(machine.env()).unwrap();
    for fuse in [0, 1, 100] {
        let before = lender.table_count();
        machine.frames.set_fuse(Some(fuse));
        assert!(lender.lend_from(page(KERNEL)).is_err());
        machine.frames.set_fuse(None);
        assert!(lender.table_count() >= before);
        let refused = Table::sharing(machine.env(), &lender, page(KERNEL));
        assert_eq!(refused.unwrap_err(), TableError::CannotShare);
    }
    lender.destroy(|_, _| {}, |_, _| {});
    TableCache::shrink(machine.env(), usize::MAX);
    assert_eq!(machine.frames.out(), 0);
}
