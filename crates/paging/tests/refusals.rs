//! What is refused, by the short ways as by the long ones: a cursor that keeps its table, or the one above it, answers like one that walks; a
//! gather without room or of another table changes nothing; what another table lent is out of reach by every way.

#![cfg(not(loom))]

#[path = "common/altered.rs"]
mod altered;
#[path = "common/machine.rs"]
mod machine;

use altered::Altered;
use kmem_hal::{DeviceFrame, Frame, Order, Page, PageRange, PhysMap, VirtAddr};
use kmem_paging::format::{Format, X86_64, X86Pse36, X86TwoLevel};
use kmem_paging::{
    Attributes, ChangeError, Entry, Env, ForkError, ForkStep, HugeError, MapError, MoveError,
    PageTable, Payload, RangeError, Rights, TableCache, TableError, UnshareError, UnshareStep,
};
use machine::{Machine, TestEnv};

type TableOf<F> = PageTable<F, &'static TestEnv, DeviceFrame>;
type Table = TableOf<X86_64>;

/// The first page of the upper half of four levels, and the pages of a top entry.
const UPPER: u64 = 0xf_fff8_0000_0000;
const TOP: u64 = 1 << 27;

fn page(number: u64) -> Page {
    Page::new(number).unwrap()
}

fn pages(first: u64, count: u64) -> PageRange {
    PageRange::with_count(page(first), count).unwrap()
}

fn frame(number: u64) -> DeviceFrame {
    // Pages of the upper half have larger numbers than frames.
    DeviceFrame::new(Frame::from_number(number & 0xffff_ffff), Order::ZERO).unwrap()
}

/// Maps pages to frames of the same number.
fn map<F: Format>(table: &TableOf<F>, numbers: impl IntoIterator<Item = u64>) {
    for number in numbers {
        let mut cursor = table.cursor(pages(number, 1)).unwrap();
        cursor
            .map(page(number), frame(number), Rights::USER_DATA)
            .unwrap();
    }
}

fn is_mapped(table: &Table, number: u64) -> bool {
    let leaf = table.query(page(number)).leaf();
    leaf.is_some_and(|leaf| leaf.frame.number() == number && leaf.is_writable())
}

/// A child that shares the tables of level `most` and below in a range.
fn shared(table: &Table, range: PageRange, most: usize) -> Table {
    let child = Table::empty_like(*table.env(), table).unwrap();
    let mut gather = table.gather::<1>();
    // SAFETY: one thread, and no cursor is open.
    let outcome =
        unsafe { table.fork_sharing(&child, range, most, &mut gather, |_| ForkStep::Stop) };
    outcome.unwrap();
    gather.commit(drop);
    drop(gather);
    child
}

fn finish(machine: &Machine, tables: impl IntoIterator<Item = Table>) {
    for table in tables {
        table.destroy(|_, _| {}, |_, _| {});
    }
    kmem_paging::TableCache::shrink(machine.env(), usize::MAX);
    assert_eq!(machine.frames.out(), 0, "tables leaked");
}

#[test]
fn a_held_table_does_not_widen_the_range() {
    let machine = Machine::new(64);
    let table = Table::new(machine.env()).unwrap();
    // The range lies in the middle of a leaf table, or at its end.
    for first in [0x410, 0x5f8] {
        let neighbours = [first - 1, first + 8];
        let mut cursor = table.cursor(pages(first, 8)).unwrap();
        for number in first..first + 4 {
            cursor
                .map(page(number), frame(number), Rights::USER_DATA)
                .unwrap();
        }
        for number in neighbours {
            let refused = cursor.map(page(number), frame(number), Rights::USER_DATA);
            assert_eq!(refused, Err((MapError::OutOfRange, frame(number))));
            assert_eq!(table.query(page(number)), Entry::Empty);
        }
        cursor.release();
        map(&table, neighbours);
        let mut gather = table.gather::<4>();
        for number in neighbours {
            assert!(cursor.query(page(first)).leaf().is_some(), "held again");
            let one = pages(number, 1);
            let refused = cursor.protect(one, Rights::READ, &mut gather);
            assert_eq!(refused, Err(ChangeError::OutOfRange));
            assert_eq!(cursor.unmap(one, &mut gather), Err(ChangeError::OutOfRange));
            assert_eq!(cursor.query(page(number)), Entry::Empty);
            assert!(is_mapped(&table, number));
            cursor.move_to(page(number));
            assert_eq!(cursor.next_run(), None);
        }
        cursor.release();
        drop(gather);
    }
    drop(table.gather::<1>());
    finish(&machine, [table]);
}

/// One page in each of three leaf tables: after the first is unmapped the table above them is the held one.
#[test]
fn a_page_that_is_alone_in_its_table_is_refused_as_others_are() {
    const A: u64 = 0x400;
    const B: u64 = 0x600;
    const C: u64 = 0x800;
    let machine = Machine::new(64);
    let table = Table::new(machine.env()).unwrap();
    let other = Table::new(machine.env()).unwrap();
    map(&table, [C]);
    // C is outside of the cursor's range, and below the same table of level 2.
    let range = pages(A, C - A);
    let mut foreign = other.gather::<4>();
    let prepared = || {
        map(&table, [A, B]);
        let mut cursor = table.cursor(range).unwrap();
        let mut gather = table.gather::<1>();
        assert_eq!(cursor.unmap(pages(A, 1), &mut gather), Ok(1));
        (cursor, gather)
    };
    let (mut cursor, gather) = prepared();
    let refused = cursor.unmap(pages(B, 1), &mut foreign);
    assert_eq!(refused, Err(ChangeError::ForeignGather));
    drop((cursor, gather));
    assert!(is_mapped(&table, B));
    let take_b = || {
        let mut gather = table.gather::<1>();
        let mut cursor = table.cursor(range).unwrap();
        assert_eq!(cursor.unmap(pages(B, 1), &mut gather), Ok(1));
    };
    take_b();

    let (mut cursor, mut gather) = prepared();
    let refused = cursor.unmap(pages(B, 1), &mut gather);
    assert_eq!(refused, Err(ChangeError::Full { next: page(B) }));
    drop((cursor, gather));
    assert!(is_mapped(&table, B));
    take_b();

    let (mut cursor, mut gather) = prepared();
    cursor.release();
    gather.commit(drop);
    map(&table, [A]);
    assert_eq!(cursor.unmap(pages(A, 1), &mut gather), Ok(1));
    cursor.release();
    gather.commit(drop);
    assert!(cursor.query(page(A)) == Entry::Empty);
    let refused = cursor.unmap(pages(C, 1), &mut gather);
    assert_eq!(refused, Err(ChangeError::OutOfRange));
    drop((cursor, gather));
    assert!(is_mapped(&table, C));
    take_b();

    // A table that another space has too is not emptied for both.
    map(&table, [B]);
    let child = shared(&table, pages(B, 512), 1);
    map(&table, [A]);
    let mut cursor = table.cursor(range).unwrap();
    let mut gather = table.gather::<4>();
    assert_eq!(cursor.unmap(pages(A, 1), &mut gather), Ok(1));
    let refused = cursor.unmap(pages(B, 1), &mut gather);
    assert_eq!(refused, Err(ChangeError::Shared { at: page(B) }));
    drop((cursor, gather, foreign));
    for table in [&table, &child] {
        let leaf = table.query(page(B)).leaf().expect("both have it");
        assert_eq!(leaf.frame.number(), B);
    }
    finish(&machine, [table, other, child]);
}

#[test]
fn a_gather_of_another_table_is_refused() {
    let machine = Machine::new(64);
    let table = Table::new(machine.env()).unwrap();
    let other = Table::new(machine.env()).unwrap();
    let used = Attributes::new(Rights::USER_DATA).accessed().dirty();
    let mut cursor = table.cursor(pages(0x400, 8)).unwrap();
    for number in 0x400..0x404 {
        cursor.map(page(number), frame(number), used).unwrap();
    }
    let mut foreign = other.gather::<4>();
    let refused = Err(ChangeError::ForeignGather);
    // A single page of the held table, and a range.
    for count in [1, 4] {
        let range = pages(0x400, count);
        assert_eq!(cursor.unmap(range, &mut foreign), refused);
        assert_eq!(cursor.protect(range, Rights::READ, &mut foreign), refused);
    }
    let payload = Payload::new::<X86_64>(7).unwrap();
    let set = cursor.set_payload(page(0x400), payload, &mut foreign);
    assert_eq!(set, Err(ChangeError::ForeignGather));
    drop((cursor, foreign));
    assert!((0x400..0x404).all(|number| is_mapped(&table, number)));
    finish(&machine, [table, other]);
}

#[test]
fn a_gather_without_room_says_so_before_anything_changes() {
    let machine = Machine::new(64);
    let table = Table::new(machine.env()).unwrap();
    map(&table, 0x400..0x404);
    let mut gather = table.gather::<1>();
    let mut cursor = table.cursor(pages(0x400, 8)).unwrap();
    assert_eq!(cursor.unmap(pages(0x400, 1), &mut gather), Ok(1));
    let full = |at| Err(ChangeError::Full { next: page(at) });
    // The held table, one page; a range; a payload in place of a page.
    assert_eq!(cursor.query(page(0x401)).leaf().unwrap().order, Order::ZERO);
    assert_eq!(cursor.unmap(pages(0x401, 1), &mut gather), full(0x401));
    assert_eq!(cursor.unmap(pages(0x401, 2), &mut gather), full(0x401));
    let payload = Payload::new::<X86_64>(7).unwrap();
    let refused = cursor.set_payload(page(0x402), payload, &mut gather);
    assert_eq!(refused, Err(ChangeError::Full { next: page(0x402) }));
    drop((cursor, gather));
    assert!((0x401..0x404).all(|number| is_mapped(&table, number)));
    finish(&machine, [table]);
}

/// Shares of tables take room in the gather as frames do, at both levels.
#[test]
fn shares_need_room_in_the_gather() {
    for (most, covered) in [(1, 512), (2, 1 << 18)] {
        let machine = Machine::new(64);
        let first = 1 << 18;
        let table = Table::new(machine.env()).unwrap();
        let both = pages(first, 2 * covered);
        map(&table, [first, first + covered]);
        let tables = table.table_count();
        let child = shared(&table, both, most);
        assert_eq!(child.table_count(), tables);
        let mut gather = child.gather::<1>();
        let mut cursor = child.cursor(both).unwrap();
        let next = page(first + covered);
        assert_eq!(
            cursor.unmap(both, &mut gather),
            Err(ChangeError::Full { next })
        );
        // Nor is there room for the share that a copy gives up.
        let copied = cursor.unshare(next, &mut gather, |_| UnshareStep::Skip, drop);
        assert_eq!(copied, Err(UnshareError::Full));
        cursor.release();
        assert_eq!(child.query(page(first)), Entry::Empty);
        assert!(child.query(next).leaf().is_some());
        gather.commit(|_| panic!("the parent has them too"));
        let rest = PageRange::new(next, both.last()).unwrap();
        assert!(cursor.unmap(rest, &mut gather).is_ok());
        cursor.release();
        gather.commit(|_| panic!("the parent has them too"));
        drop((cursor, gather));
        assert_eq!(child.table_count(), 1, "shares that were given up");
        assert!([first, first + covered].iter().all(|&number| {
            table
                .query(page(number))
                .leaf()
                .map(|leaf| leaf.frame.number())
                == Some(number)
        }));
        finish(&machine, [table, child]);
    }
}

#[test]
fn what_another_table_lent_is_out_of_reach() {
    let machine = Machine::new(1024);
    let kernel = Table::new(machine.env()).unwrap();
    let later = UPPER + 8 * TOP;
    kernel.lend_from(page(later)).unwrap();
    let early = Table::sharing(machine.env(), &kernel, page(UPPER));
    assert_eq!(early.unwrap_err(), TableError::CannotShare);
    map(&kernel, [later]);
    let space = Table::sharing(machine.env(), &kernel, page(later)).unwrap();
    assert!(space.query(page(later)).leaf().is_some());
    assert!(space.lock_entry(page(later)).is_none());
    for range in [pages(later, 1), pages(later - 1, 2)] {
        assert_eq!(space.cursor(range).unwrap_err(), RangeError::Borrowed);
    }
    map(&space, [later - 1]);
    let mut gather = space.gather::<1>();
    let moved = space.move_range(pages(later - 1, 1), page(later + 1), &mut gather);
    assert_eq!(moved, Err(kmem_paging::MoveError::OutOfRange));
    drop(gather);
    space.destroy(|_, _| {}, |_, _| {});
    // Lending more keeps what was lent, and lending less takes nothing back.
    kernel.lend_from(page(UPPER)).unwrap();
    kernel.lend_from(page(later)).unwrap();
    let space = Table::sharing(machine.env(), &kernel, page(UPPER)).unwrap();
    assert!(space.query(page(later)).leaf().is_some());
    space.destroy(|_, _| {}, |_, _| {});
}

/// What is lent is held once, however often it is lent, and needs no frame again; where there are too few, nothing is held.
#[test]
fn lending_again_changes_nothing() {
    const LAST: u64 = UPPER + 255 * TOP;
    let machine = Machine::new(600);
    let kernel = Table::new(machine.env()).unwrap();
    // Words and holds of the table below a top entry.
    let live = |top: u64| {
        let root = machine.map.to_ptr(kernel.root().frame.start());
        // SAFETY: the root is a table in the arena, and one thread uses it.
        let word = unsafe { root.cast::<u64>().add((top >> 27) as usize % 512).read() };
        let table = Frame::from_number(word >> 12 & 0xff_ffff_ffff);
        machine
            .env()
            .slots()
            .slot(table)
            .unwrap()
            .as_table()
            .unwrap()
            .live()
    };
    let lend = |from, frames| {
        TableCache::shrink(machine.env(), usize::MAX);
        machine.frames.set_fuse(frames);
        let lent = kernel.lend_from(page(from));
        machine.frames.set_fuse(None);
        lent.map_err(|error| matches!(error, TableError::Memory(_)))
    };
    // The table that is there is taken.
    map(&kernel, [LAST]);
    for _ in 0..3 {
        assert_eq!(lend(LAST, Some(0)), Ok(()));
        assert_eq!(live(LAST), 2);
    }
    for frames in [100, 0, 100] {
        assert_eq!(lend(UPPER, Some(frames)), Err(true));
        assert_eq!((live(UPPER), live(LAST)), (0, 2));
    }
    for frames in [None, Some(0), Some(0)] {
        assert_eq!(lend(UPPER, frames), Ok(()));
        assert_eq!(lend(LAST, Some(0)), Ok(()));
        assert_eq!((live(UPPER), live(LAST)), (1, 2));
    }
}

/// A top entry that is a leaf cannot be lent; one that was lent is never a leaf again, by whatever way, and its table stays.
#[test]
fn a_lent_top_stays_a_table() {
    const GIGABYTE: u64 = 3 << 18;
    let machine = Machine::new(600);
    let kernel = TableOf::<X86TwoLevel>::new(machine.env()).unwrap();
    let order = Order::new(10).unwrap();
    let all = pages(GIGABYTE, 1 << 10);
    let block = || DeviceFrame::new(Frame::from_number(0x400), order).unwrap();
    let mut cursor = kernel.cursor(all).unwrap();
    cursor
        .map(all.first(), block(), Rights::KERNEL_DATA)
        .unwrap();
    cursor.release();
    let calls = machine.frames.calls();
    let lend = || kernel.lend_from(all.first());
    assert_eq!(lend(), Err(TableError::CannotShare));
    assert_eq!((machine.frames.calls(), kernel.table_count()), (calls, 1));
    let mut gather = kernel.gather::<8>();
    assert_eq!(cursor.unmap(all, &mut gather), Ok(1 << 10));
    cursor.release();
    lend().unwrap();
    assert_eq!(kernel.table_count(), 257);
    let space = TableOf::<X86TwoLevel>::sharing(machine.env(), &kernel, all.first()).unwrap();
    let refused = cursor.map(all.first(), block(), Rights::KERNEL_DATA);
    assert_eq!(refused, Err((MapError::Occupied, block())));
    let divided = cursor.map_divided(all.first(), block(), Order::ZERO, Rights::KERNEL_DATA);
    divided.unwrap();
    let seen = |number| space.query(page(number)).leaf();
    assert_eq!(seen(GIGABYTE + 7).unwrap().frame.number(), 0x407);
    let merged = cursor.merge(all.first(), order, &mut gather);
    assert_eq!(merged, Err(HugeError::NotPossible));
    cursor.release();
    // A fork of what is lent, entry by entry.
    let child = TableOf::<X86TwoLevel>::new(machine.env()).unwrap();
    let step = |_| ForkStep::Skip;
    // SAFETY: one thread, and no cursor is open.
    let forked = unsafe { kernel.fork_sharing(&child, all, 2, &mut gather, step) };
    assert_eq!((forked, child.table_count()), (Ok(0), 1));
    assert_eq!(cursor.protect(all, Rights::READ, &mut gather), Ok(1 << 10));
    assert!(!seen(GIGABYTE).unwrap().is_writable());
    let mut next = all;
    while let Err(ChangeError::Full { next: at }) = cursor.unmap(next, &mut gather) {
        cursor.release();
        gather.commit(drop);
        next = PageRange::new(at, all.last()).unwrap();
    }
    cursor.release();
    gather.commit(drop);
    assert_eq!(kernel.table_count(), 257, "empty, and still there");
    cursor
        .map(page(GIGABYTE + 9), frame(9), Rights::READ)
        .unwrap();
    assert_eq!(seen(GIGABYTE + 9).unwrap().frame.number(), 9);
    drop((cursor, gather));
    child.destroy(|_, _| {}, |_, _| {});
    space.destroy(|_, _| {}, |_, _| {});
}

/// A frame that the format has no room for, behind one that it has, by every way that maps pages in a row.
#[test]
fn a_frame_beyond_the_format_is_refused_in_the_middle_too() {
    const FAR: u64 = X86TwoLevel::FRAME_LIMIT;
    let machine = Machine::new(64);
    let table = TableOf::<X86TwoLevel>::new(machine.env()).unwrap();
    let far = frame(FAR);
    let mut cursor = table.cursor(pages(0x400, 0x800)).unwrap();
    cursor
        .map(page(0x400), frame(1), Rights::USER_DATA)
        .unwrap();
    let refused = cursor.map(page(0x401), far, Rights::USER_DATA);
    assert_eq!(refused, Err((MapError::Unencodable, far)));
    // In a table that is there, and in one that is built whole.
    for (first, count) in [(0x401, 8), (0x800, 0x400)] {
        let range = pages(first, count);
        let stopped = cursor
            .map_range(range, Order::ZERO, Rights::USER_DATA, |at, _| {
                let nth = at.number() - first;
                Some(if nth == 5 { far } else { frame(2 + nth) })
            })
            .unwrap_err();
        assert_eq!(stopped.error, MapError::Unencodable);
        assert_eq!((stopped.at, stopped.handle), (page(first + 5), Some(far)));
        assert_eq!(cursor.query(page(first + 5)), Entry::Empty);
        let leaf = cursor.query(page(first + 4)).leaf().unwrap();
        assert_eq!(leaf.frame.number(), 6);
    }
    drop(cursor);
    table.destroy(|_, _| {}, |_, _| {});
}

/// Addresses that the format does not have are not those that have the same indices.
#[test]
fn a_page_beyond_the_format_is_not_the_page_below_it() {
    let machine = Machine::new(16);
    let table = Table::new(machine.env()).unwrap();
    map(&table, [5]);
    let beyond = 5 + (1 << 36);
    assert_eq!(table.query(page(beyond)), Entry::Empty);
    assert_eq!(table.translate(VirtAddr::new(beyond << 12)), None);
    assert!(table.lock_entry(page(beyond)).is_none());
    assert_eq!(
        table.cursor(pages(beyond, 1)).unwrap_err(),
        RangeError::NotCanonical
    );
    finish(&machine, [table]);
}

#[test]
fn a_table_is_not_its_own_child() {
    let machine = Machine::new(64);
    let table = Table::new(machine.env()).unwrap();
    map(&table, [0x400]);
    let mut gather = table.gather::<4>();
    let range = pages(0x400, 512);
    let refused = Err((ForkError::SameTable, None));
    let step = |_| ForkStep::Stop;
    assert_eq!(table.fork_into(&table, range, &mut gather, step), refused);
    // SAFETY: one thread, and no cursor is open.
    let shared = unsafe { table.fork_sharing(&table, range, 2, &mut gather, step) };
    assert_eq!(shared, refused);
    assert!(gather.is_empty() && is_mapped(&table, 0x400));
    drop(gather);
    finish(&machine, [table]);
}

/// Where an empty table stays there is no place for a leaf that is moved whole: nothing is moved, and what is smaller can be.
#[test]
fn a_move_to_where_an_empty_table_stays_is_refused_whole() {
    const LENT: u64 = 3 << 18;
    const SIZE: u64 = 1 << 10;
    const FROM: u64 = LENT - 4 * SIZE;
    let machine = Machine::new(600);
    let kernel = TableOf::<X86TwoLevel>::new(machine.env()).unwrap();
    kernel.lend_from(page(LENT)).unwrap();
    map(&kernel, [FROM]);
    let order = Order::new(10).unwrap();
    let block = DeviceFrame::new(Frame::from_number(0x400), order).unwrap();
    let mut cursor = kernel.cursor(pages(FROM, 2 * SIZE)).unwrap();
    cursor
        .map(page(FROM + SIZE), block, Rights::KERNEL_DATA)
        .unwrap();
    drop(cursor);
    let tables = kernel.table_count();
    let mut gather = kernel.gather::<4>();
    // A page goes first.
    let moved = kernel.move_range(pages(FROM, 2 * SIZE), page(LENT), &mut gather);
    assert_eq!(moved, Err(MoveError::Occupied));
    let leaf = |at| kernel.query(page(at)).leaf().map(|leaf| leaf.order);
    assert_eq!(
        (leaf(FROM), leaf(FROM + SIZE)),
        (Some(Order::ZERO), Some(order))
    );
    assert_eq!((leaf(LENT), leaf(LENT + SIZE)), (None, None));
    assert!(gather.is_empty() && kernel.table_count() == tables);
    // Cut into pages it goes, as does the page.
    for (count, to) in [(SIZE, LENT + 4 * SIZE), (SIZE, LENT + 1)] {
        let from = if to == LENT + 1 { FROM + SIZE } else { FROM };
        let moved = kernel.move_range(pages(from, count), page(to), &mut gather);
        assert_eq!(moved, Ok(if from == FROM { 1 } else { SIZE }));
        gather.commit(drop);
    }
    assert_eq!((leaf(FROM), leaf(FROM + SIZE)), (None, None));
    assert_eq!(
        (leaf(LENT + 1), leaf(LENT + SIZE)),
        (Some(Order::ZERO), Some(Order::ZERO))
    );

    // Parts of a larger leaf, and a table that was emptied from outside.
    const GIB: u64 = 1 << 18;
    let table = Table::new(machine.env()).unwrap();
    let emptied = page(2 * GIB + 512 + 5);
    map(&table, [emptied.number()]);
    let mut cursor = table.cursor(pages(0, 4 * GIB)).unwrap();
    let announced = table.announce_foreign(emptied);
    // SAFETY: announced, and committed before anybody uses the frame.
    let taken = unsafe { cursor.take_shared(emptied, Frame::from_number(emptied.number()), None) };
    assert!(taken.is_some());
    announced.commit();
    let order = Order::new(18).unwrap();
    let block = DeviceFrame::new(Frame::from_number(GIB), order).unwrap();
    cursor.map(page(GIB), block, Rights::USER_DATA).unwrap();
    drop(cursor);
    let mut gather = table.gather::<4>();
    let moved = table.move_range(pages(GIB, 1027), page(2 * GIB), &mut gather);
    assert_eq!(moved, Err(MoveError::Occupied));
    assert_eq!(table.query(page(GIB)).leaf().unwrap().order, order);
    assert_eq!(table.query(page(2 * GIB)), Entry::Empty);
    assert!(gather.is_empty());
    // Two megabytes, and three pages into the table.
    let moved = table.move_range(pages(GIB, 515), page(2 * GIB), &mut gather);
    assert_eq!(moved, Ok(515));
    drop(gather);
    finish_but(&machine, &kernel, table);
}

/// Takes a table down, beside a lender that stays for ever.
fn finish_but(machine: &Machine, kernel: &TableOf<X86TwoLevel>, table: Table) {
    table.destroy(|_, _| {}, |_, _| {});
    TableCache::shrink(machine.env(), usize::MAX);
    assert_eq!(machine.frames.out(), kernel.table_count(), "tables leaked");
}

/// Of a leaf that is cut, only the part with the cut is cut further: frames of the others may be too high for that.
#[test]
fn a_leaf_is_cut_where_its_part_can_be() {
    const GIB: u64 = 1 << 18;
    const SMALL: u64 = GIB + 1024;
    let machine = Machine::new(64);
    let table = TableOf::<Altered<0, false, SMALL>>::new(machine.env()).unwrap();
    let block = DeviceFrame::new(Frame::from_number(GIB), Order::new(18).unwrap()).unwrap();
    let all = pages(GIB, GIB);
    let mut cursor = table.cursor(all).unwrap();
    cursor.map(page(GIB), block, Rights::USER_DATA).unwrap();
    let mut gather = table.gather::<8>();
    let refused = Err(ChangeError::Indivisible { at: page(GIB) });
    for part in [pages(GIB + 1030, 7), pages(GIB, GIB - 1)] {
        assert_eq!(cursor.unmap(part, &mut gather), refused);
        assert_eq!(cursor.query(page(GIB)).leaf().unwrap().order.get(), 18);
    }
    let part = pages(GIB + 3, 600);
    assert_eq!(cursor.protect(part, Rights::READ, &mut gather), Ok(600));
    let leaf = cursor.query(page(GIB + 1024)).leaf().unwrap();
    assert_eq!(
        (leaf.frame.number(), leaf.order),
        (GIB + 1024, Order::HUGE_2M)
    );
    drop((cursor, gather));
    table.destroy(|_, _| {}, |_, _| {});
    TableCache::shrink(machine.env(), usize::MAX);
    assert_eq!(machine.frames.out(), 0, "tables leaked");
}

/// With PSE-36 a leaf of 4 MiB names frames that no small leaf can name: it is unmapped, protected and moved whole, or not at all.
#[test]
fn a_leaf_whose_parts_cannot_be_named_is_not_split() {
    let machine = Machine::new(64);
    let table = TableOf::<X86Pse36>::new(machine.env()).unwrap();
    let child = TableOf::<X86Pse36>::new(machine.env()).unwrap();
    let (first, size) = (0x800, 1 << 10);
    let high = Frame::from_number(1 << 20);
    let order = Order::new(10).unwrap();
    let both = pages(first, 2 * size);
    let block = |frame| DeviceFrame::new(frame, order).unwrap();
    let mut cursor = table.cursor(both).unwrap();
    cursor
        .map(page(first), block(high), Rights::USER_DATA)
        .unwrap();
    cursor
        .map(
            page(first + size),
            block(Frame::from_number((1 << 20) - size)),
            Rights::USER_DATA,
        )
        .unwrap();
    let mut gather = table.gather::<8>();
    let at = page(first);
    assert_eq!(cursor.split(at, &mut gather), Err(HugeError::NotPossible));
    let refused = Err(ChangeError::Indivisible { at });
    // One page, the beginning, and the end of a range that goes on.
    for part in [
        pages(first + 7, 1),
        pages(first, 7),
        pages(first + 7, 2 * size - 7),
    ] {
        assert_eq!(cursor.protect(part, Rights::READ, &mut gather), refused);
        assert_eq!(cursor.unmap(part, &mut gather), refused);
        assert_eq!(
            cursor.update(part, &mut gather, |leaf| Some(leaf.attributes)),
            refused
        );
        cursor.release();
        let step = |_| ForkStep::Stop;
        let forked = table.fork_into(&child, part, &mut gather, step);
        let at = part.first();
        assert_eq!(forked, Err((ForkError::Stopped { at }, None)));
    }
    // To where it fits whole but for the end, and to where it would have to be cut all over.
    for (count, to) in [(size - 1, 0x4000), (2 * size, 0x4001)] {
        let moved = table.move_range(pages(first, count), page(to), &mut gather);
        assert_eq!(moved, Err(MoveError::Indivisible { at }));
    }
    let found = table.query(at).leaf().unwrap();
    assert_eq!((found.frame, found.order), (high, order));
    assert!(gather.is_empty() && found.is_writable());
    assert_eq!((table.table_count(), child.table_count()), (1, 1));
    // Whole, and below 4 GiB, everything goes.
    let moved = table.move_range(pages(first, size), page(0x4000), &mut gather);
    assert_eq!(moved, Ok(size));
    let last = first + 2 * size - 1;
    assert_eq!(cursor.unmap(pages(last, 1), &mut gather), Ok(1));
    drop(cursor);
    gather.commit(drop);
    drop(gather);
    let leaf = table.query(page(last - 1)).leaf().unwrap();
    assert_eq!(leaf.frame.number(), (1 << 20) - 2);
    for table in [table, child] {
        table.destroy(|_, _| {}, |_, _| {});
    }
    kmem_paging::TableCache::shrink(machine.env(), usize::MAX);
    assert_eq!(machine.frames.out(), 0, "tables leaked");
}
