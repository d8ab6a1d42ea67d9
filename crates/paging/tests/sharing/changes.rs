//! What is done to a space: as a kernel does it, which unshares a table where it is told to, and looks at counts before it writes.

use kmem_hal::{Order, Page, PageRange};
use kmem_paging::format::X86_64;
use kmem_paging::{
    ChangeError, ForkItem, ForkStep, HugeError, MapError, MoveError, Payload, Rights,
};

use super::refs::{COUNTS, Ref};
use super::world::{FIRST, PAGES, PAYLOAD, Space, Table, World, page, span};

impl World {
    /// Makes the tables of a page the space's own.
    pub(super) fn unshare(&mut self, space: usize, at: Page) {
        let table = &self.spaces[space].table;
        let mut gather = table.gather::<4>();
        let mut cursor = table.cursor(span(FIRST, PAGES)).unwrap();
        let copied = cursor.unshare(at, &mut gather, Ref::copied, Ref::give_back);
        drop(cursor);
        gather.commit(Ref::give_back);
        self.copies += usize::from(copied.unwrap());
    }

    /// Maps a block, in tables that are made the space's own where others have them.
    fn put(&mut self, space: usize, at: Page, mut block: Ref) {
        loop {
            let table = &self.spaces[space].table;
            let mut cursor = table.cursor(span(FIRST, PAGES)).unwrap();
            match cursor.map(at, block, Rights::USER_DATA) {
                Ok(()) => return,
                Err((MapError::Shared, back)) => block = back,
                Err((error, _)) => panic!("{error}"),
            }
            drop(cursor);
            self.unshare(space, at);
        }
    }

    pub(super) fn map(&mut self, space: usize, first: u64, count: u64) {
        for number in first..first + count {
            if self.spaces[space].model.contains_key(&number) {
                continue;
            }
            let frame = Ref::new(self.fresh());
            let id = frame.0;
            self.put(space, page(number), frame);
            self.spaces[space].model.insert(number, id);
        }
    }

    /// A write: where the leaf cannot be written the space gets a page of its own.
    pub(super) fn write(&mut self, space: usize, number: u64) {
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
    pub(super) fn map_huge(&mut self, space: usize, first: u64) {
        let first = first & !511;
        let mut there = self.spaces[space].model.range(first..first + 512);
        if there.next().is_some() {
            return;
        }
        let base = self.next_frame.next_multiple_of(512) + 512;
        self.next_frame = base + 512;
        self.put(space, page(first), Ref::block(base, Order::HUGE_2M));
        let pages = (0..512).map(|offset| (first + offset, base + offset));
        self.spaces[space].model.extend(pages);
    }

    pub(super) fn split(&mut self, space: usize, number: u64) {
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
    pub(super) fn merge(&mut self, space: usize, first: u64) {
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

    pub(super) fn relocate(&mut self, space: usize, first: u64, count: u64, to: u64) {
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

    pub(super) fn payload(&mut self, space: usize, number: u64) {
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

    pub(super) fn unmap(&mut self, space: usize, first: u64, count: u64) {
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

    pub(super) fn protect(&mut self, space: usize, first: u64, count: u64) {
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

    pub(super) fn fork(&mut self, space: usize, most: usize, first: u64, count: u64) {
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

    pub(super) fn exit(&mut self, space: usize) {
        let space = self.spaces.swap_remove(space);
        space.table.destroy(|_, frame| frame.give_back(), |_, _| {});
    }
}
