//! What a RISC-V hart may remember where other processors do not: entries without a right or without an accessed or dirty bit, and absent ones at
//! every level. Each must be told of, or the hart faults for ever (Privileged Architecture, 12.2.1 "SFENCE.VMA" and 12.3.1).

#![cfg(not(loom))]

#[path = "common/machine.rs"]
mod machine;

use kmem_hal::{DeviceFrame, FlushRequest, FlushScope, Frame, Order, Page, PageRange};
use kmem_paging::format::RiscvSv39;
use kmem_paging::{Attributes, PageTable, Payload, Rights};
use machine::{Machine, TestEnv};

type Table = PageTable<RiscvSv39, &'static TestEnv, DeviceFrame>;

fn at(page: u64) -> Page {
    Page::new(page).unwrap()
}

fn pages(first: u64, count: u64) -> PageRange {
    PageRange::with_count(at(first), count).unwrap()
}

fn frame(number: u64) -> DeviceFrame {
    DeviceFrame::new(Frame::from_number(number), Order::ZERO).unwrap()
}

/// A table that a hart may have loaded, and what was flushed of it since this was asked last.
struct Room {
    machine: Machine,
    table: Table,
}

impl Room {
    fn new() -> Self {
        let machine = Machine::new(64);
        let table = Table::new(machine.env()).unwrap();
        let _ = table.root();
        Self { machine, table }
    }

    fn flushed(&self) -> Vec<FlushRequest> {
        std::mem::take(&mut self.machine.flushes.0.lock().unwrap())
    }

    fn map(&self, page: u64, attributes: Attributes) {
        let mut cursor = self.table.cursor(pages(page, 1)).unwrap();
        cursor
            .map(at(page), frame(0x8_0000 + page), attributes)
            .unwrap();
    }
}

/// Whether a flush reaches the leaf of this page.
fn covers(request: &FlushRequest, page: u64) -> bool {
    match request.scope {
        FlushScope::Pages { range, stride } => {
            range.contains(at(page)) && (page - range.first().number()).is_multiple_of(stride)
        }
        _ => true,
    }
}

#[test]
fn what_a_fault_adds_is_told() {
    let room = Room::new();
    let data = Attributes::new(Rights::USER_DATA);
    for (before, after) in [
        (data, data.accessed()),
        (data.accessed(), data.accessed().dirty()),
        (
            data.accessed().dirty().write_protected(),
            data.accessed().dirty(),
        ),
    ] {
        // By a cursor.
        room.map(0x400, before);
        room.flushed();
        let mut gather = room.table.gather::<1>();
        let mut cursor = room.table.cursor(pages(0x400, 1)).unwrap();
        cursor
            .update(pages(0x400, 1), &mut gather, |_| Some(after))
            .unwrap();
        cursor.release();
        gather.commit(drop);
        assert!(room.flushed().iter().any(|request| covers(request, 0x400)));
        cursor.unmap(pages(0x400, 1), &mut gather).unwrap();
        cursor.release();
        gather.commit(drop);
        // By the locked entry.
        room.map(0x400, before);
        room.flushed();
        let mut entry = room.table.lock_entry(at(0x400)).unwrap();
        assert!(entry.relax(after.rights, after.dirty));
        assert!(room.flushed().iter().any(|request| covers(request, 0x400)));
        assert_eq!(entry.get().leaf().unwrap().attributes, after);
        // Nothing is missing any more.
        assert!(entry.relax(after.rights, after.dirty));
        assert!(room.flushed().is_empty());
        assert!(!entry.relax(Rights::READ | Rights::USER, true), "a loss");
        drop(entry);
        cursor.unmap(pages(0x400, 1), &mut gather).unwrap();
    }
}

#[test]
fn a_merged_leaf_is_told_though_the_gather_has_other_pages() {
    let room = Room::new();
    for page in 0x400..0x600 {
        room.map(page, Attributes::new(Rights::USER_DATA));
    }
    for page in [0x800, 0x801] {
        room.map(page, Attributes::new(Rights::USER_DATA));
    }
    let mut gather = room.table.gather::<1>();
    let mut cursor = room.table.cursor(pages(0x400, 0x401)).unwrap();
    cursor.unmap(pages(0x800, 1), &mut gather).unwrap();
    cursor
        .merge(at(0x400), Order::HUGE_2M, &mut gather)
        .unwrap();
    drop(cursor);
    room.flushed();
    gather.commit(drop);
    let flushed = room.flushed();
    assert!(
        flushed.iter().any(|request| covers(request, 0x400)),
        "it was absent for a moment: {flushed:?}"
    );
}

/// An address in the instruction drops leaves alone, so that who makes a table must say so.
#[test]
fn a_table_that_is_made_is_told_as_one() {
    let told = |room: &Room, page| {
        let flushed = room.flushed();
        let mut tables = flushed.iter().filter(|request| request.tables_freed);
        tables.any(|request| covers(request, page))
    };
    let room = Room::new();
    let table = &room.table;
    let range = pages(0, 1 << 20);
    let data = Attributes::new(Rights::USER_DATA);
    let mut gather = table.gather::<1>();
    room.map(0x400, data);
    assert!(told(&room, 0x400), "one page");
    room.map(0x401, data);
    assert!(!told(&room, 0x401), "its table is there");
    let mut cursor = table.cursor(range).unwrap();
    let mut frames = 0x8_1000..;
    cursor
        .map_range(pages(0x600, 512), Order::ZERO, data, |_, _| {
            frames.next().map(frame)
        })
        .unwrap();
    assert!(told(&room, 0x600), "a table built whole");
    let block = DeviceFrame::new(Frame::from_number(0x8_2000), Order::HUGE_2M).unwrap();
    cursor
        .map_divided(at(0x800), block, Order::ZERO, data)
        .unwrap();
    assert!(told(&room, 0x800), "a block");
    let payload = Payload::new::<RiscvSv39>(7).unwrap();
    cursor.map_payload(at(0xa00), payload).unwrap();
    assert!(told(&room, 0xa00), "a payload");
    // The table above the leaf tables stays the held one.
    for page in [0xc00, 0xe00] {
        cursor.map(at(page), frame(page), data).unwrap();
        assert!(told(&room, page), "page after page with a table each");
    }
    drop(cursor);
    table
        .move_range(pages(0x400, 2), at(0x1000), &mut gather)
        .unwrap();
    assert!(told(&room, 0x1000), "a move");
    gather.commit(drop);
    // The last two of the root's entries.
    const LENT: u64 = (1 << 52) - (2 << 18);
    room.flushed();
    table.lend_from(at(LENT)).unwrap();
    let flushed = room.flushed();
    for page in [LENT, LENT + (1 << 18)] {
        let mut tables = flushed.iter().filter(|request| request.tables_freed);
        assert!(tables.any(|request| covers(request, page)), "a lent table");
    }
}

/// Who fills an entry of a table of which not every CPU was told yet says that there is a table, too.
#[test]
fn a_table_that_is_not_told_yet_is_told_by_who_comes_into_it() {
    let room: &'static Room = Box::leak(Box::new(Room::new()));
    let data = Attributes::new(Rights::USER_DATA);
    room.map(0x400, data);
    room.flushed();
    let other = || room.map(0xfff, Attributes::new(Rights::USER_DATA));
    *room.machine.flushes.1.lock().unwrap() = Some(Box::new(other));
    // A table that is built is open to others at once; there are frames for a part of it.
    let mut frames = 0x8_1000..0x8_1100;
    let mut cursor = room.table.cursor(pages(0, 1 << 20)).unwrap();
    let mapped = cursor.map_range(pages(0xe00, 512), Order::ZERO, data, |_, _| {
        frames.next().map(frame)
    });
    assert!(mapped.is_err(), "the frames end");
    drop(cursor);
    assert!(room.table.query(at(0xfff)).leaf().is_some(), "it came");
    let flushed = room.flushed();
    let mut tables = flushed.iter().filter(|request| request.tables_freed);
    assert!(tables.any(|request| covers(request, 0xfff)), "{flushed:?}");
}

/// What was a hole is remembered page by page, from when there was a table of small leaves.
#[test]
fn a_huge_leaf_is_told_of_at_each_of_its_pages() {
    let room = Room::new();
    let data = Attributes::new(Rights::USER_DATA);
    let huge = pages(0x400, 512);
    let mut gather = room.table.gather::<1>();
    let mut unmap = |range| {
        let mut cursor = room.table.cursor(huge).unwrap();
        cursor.unmap(range, &mut gather).unwrap();
        cursor.release();
        gather.commit(drop);
        room.flushed();
    };
    let told = || {
        let flushed = room.flushed();
        assert!(
            flushed.iter().any(|request| covers(request, 0x416)),
            "{flushed:?}"
        );
    };
    let block = || DeviceFrame::new(Frame::from_number(0x8_0000), Order::HUGE_2M).unwrap();
    // Filled where small leaves were.
    room.map(0x400, data);
    unmap(pages(0x400, 1));
    let mut cursor = room.table.cursor(huge).unwrap();
    cursor.map(at(0x400), block(), data).unwrap();
    drop(cursor);
    told();
    // Moved to where they were.
    unmap(huge);
    room.map(0x400, data);
    unmap(pages(0x400, 1));
    let mut cursor = room.table.cursor(pages(0x800, 512)).unwrap();
    cursor.map(at(0x800), block(), data).unwrap();
    drop(cursor);
    room.flushed();
    let mut gather = room.table.gather::<1>();
    room.table
        .move_range(pages(0x800, 512), at(0x400), &mut gather)
        .unwrap();
    gather.commit(drop);
    told();
}
