//! The spaces, what each page of them should hold, and the comparison: frame by frame, reference by reference, and nothing that can be
//! written to is another's too.

use std::collections::{BTreeMap, HashMap};

use kmem_hal::{Page, PageRange};
use kmem_paging::format::X86_64;
use kmem_paging::{Entry, PageTable, Rights, TableCache};

use super::machine::{Machine, TestEnv};
use super::refs::{COUNTS, Ref};

pub(super) type Table = PageTable<X86_64, &'static TestEnv, Ref>;

/// Six leaf tables at the end of one level-2 table and the beginning of the next.
pub(super) const FIRST: u64 = (5 << 18) - 3 * 512;

pub(super) const PAGES: u64 = 6 * 512;

pub(super) const ALL: u64 = 1 << 18;

/// What a page holds that has a payload.
pub(super) const PAYLOAD: u64 = 1 << 63;

pub(super) fn page(number: u64) -> Page {
    Page::from_number(number)
}

pub(super) fn span(first: u64, count: u64) -> PageRange {
    PageRange::with_count(page(first), count).unwrap()
}

/// A space and what each page of it should hold: a frame, or a payload.
pub(super) struct Space {
    pub(super) table: Table,
    pub(super) model: BTreeMap<u64, u64>,
}

pub(super) struct World {
    pub(super) machine: Machine,
    pub(super) spaces: Vec<Space>,
    pub(super) next_frame: u64,
    pub(super) copies: usize,
    pub(super) merged: usize,
}

impl World {
    pub(super) fn new() -> Self {
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

    pub(super) fn fresh(&mut self) -> u64 {
        self.next_frame += 1;
        self.next_frame
    }

    pub(super) fn step(&mut self, code: [u8; 4]) {
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

    /// Every space says what its model says, and nothing that can be written is another's too.
    pub(super) fn compare(&self) {
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

    pub(super) fn finish(mut self) -> usize {
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
