//! Models of tables that spaces share: a fork against another sharer's write fault, and two write faults in one table.
//!
//! Each space must end with what is its own: after a fault the space's leaf is its own to change, whatever the other side does at the same time,
//! and every table comes back once.
#![cfg(loom)]

#[path = "common/model_world.rs"]
mod model_world;

use kmem_hal::{DeviceFrame, Frame, Order, Page, PageRange};
use kmem_paging::{Entry, ForkItem, PageTable, Rights, UnshareStep};
use kmem_testkit::model::{ModelCpu, explore};
use model_world::{Tiny, World};

type Table = PageTable<Tiny, &'static World, DeviceFrame>;

const READ_WRITE: Rights = Rights::READ.union(Rights::WRITE);

fn page(number: u64) -> Page {
    Page::new(number).unwrap()
}

/// All pages of the one leaf table.
fn pages() -> PageRange {
    PageRange::with_count(page(0), 2).unwrap()
}

fn handle(frame: Frame) -> DeviceFrame {
    DeviceFrame::new(frame, Order::ZERO).unwrap()
}

fn leaked(world: &'static World) -> &'static Table {
    Box::leak(Box::new(Table::new(world).unwrap()))
}

fn map(table: &Table) {
    let frame = handle(Frame::from_number(0x100));
    let mut cursor = table.cursor(pages()).unwrap();
    cursor.map(page(0), frame, READ_WRITE).unwrap();
}

/// Shares the leaf table with a new space.
fn fork(parent: &Table, child: &Table) {
    let mut gather = parent.gather::<1>();
    // SAFETY: no cursor is open on either in these models.
    let shared = unsafe { parent.fork_sharing(child, pages(), 1, &mut gather, |_| unreachable!()) };
    assert_eq!(shared, Ok(1));
    gather.commit(|_| {});
}

/// A write fault: the table becomes the space's own, and the leaf writable, for a page of its own.
fn write(table: &Table, frame: u64) -> bool {
    let mut gather = table.gather::<2>();
    let mut cursor = table.cursor(pages()).unwrap();
    let copied = cursor
        .unshare(
            page(0),
            &mut gather,
            |item| match item {
                ForkItem::Leaf(leaf) => UnshareStep::Protected(handle(leaf.frame)),
                ForkItem::Payload(..) => UnshareStep::Payload,
            },
            |_| {},
        )
        .unwrap();
    let own = handle(Frame::from_number(frame));
    cursor.replace(page(0), own, READ_WRITE).unwrap();
    drop(cursor);
    gather.commit(|_| {});
    copied
}

fn leaf(table: &Table) -> (u64, bool) {
    match table.query(page(0)) {
        Entry::Leaf(leaf) => (
            leaf.frame.number(),
            leaf.attributes.rights.contains(Rights::WRITE),
        ),
        other => panic!("{other:?}"),
    }
}

fn finish(world: &'static World, tables: &[&'static Table]) {
    for &table in tables {
        // SAFETY: leaked by `leaked`, and nobody else uses it any more.
        let table = unsafe { Box::from_raw(std::ptr::from_ref(table).cast_mut()) };
        table.destroy(|_, _| {}, |_, _| {});
    }
    assert_eq!(
        world.free.lock().unwrap().len() as u64,
        world.tables,
        "tables leaked"
    );
}

#[test]
fn a_fork_meets_the_write_fault_of_another_sharer() {
    explore(3, || {
        ModelCpu::bind(0);
        let world = World::with_sections(2);
        let (parent, first, second) = (leaked(world), leaked(world), leaked(world));
        map(parent);
        fork(parent, first);
        let other = loom::thread::spawn(move || {
            ModelCpu::bind(1);
            write(first, 0x200)
        });
        fork(parent, second);
        // Two others share it at some time or other, so it was no use to take it back.
        assert!(other.join().unwrap());
        assert_eq!(leaf(first), (0x200, true));
        assert_eq!(leaf(parent), (0x100, false));
        assert_eq!(leaf(second), (0x100, false));
        finish(world, &[parent, first, second]);
    });
}

#[test]
fn two_sharers_write_at_once() {
    explore(3, || {
        ModelCpu::bind(0);
        let world = World::with_sections(2);
        let (parent, child) = (leaked(world), leaked(world));
        map(parent);
        fork(parent, child);
        let other = loom::thread::spawn(move || {
            ModelCpu::bind(1);
            write(child, 0x200)
        });
        let copied = write(parent, 0x300);
        // Both may copy, if neither has given its share up when the other looks; one must.
        assert!(other.join().unwrap() || copied);
        assert_eq!(leaf(child), (0x200, true));
        assert_eq!(leaf(parent), (0x300, true));
        finish(world, &[parent, child]);
    });
}

#[test]
fn a_sharer_ends_while_the_other_writes() {
    explore(3, || {
        ModelCpu::bind(0);
        let world = World::with_sections(2);
        let (parent, child) = (leaked(world), leaked(world));
        map(parent);
        fork(parent, child);
        // SAFETY: leaked above; the other thread is its only user.
        let child = unsafe { Box::from_raw(std::ptr::from_ref(child).cast_mut()) };
        let other = loom::thread::spawn(move || {
            ModelCpu::bind(1);
            child.destroy(|_, _| {}, |_, _| {});
        });
        write(parent, 0x300);
        other.join().unwrap();
        assert_eq!(leaf(parent), (0x300, true));
        finish(world, &[parent]);
    });
}
