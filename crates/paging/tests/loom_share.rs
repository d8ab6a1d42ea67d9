//! Models of tables that spaces share: a fork against another sharer's write fault, two write faults in one table, and a space that ends
//! meanwhile; where leaf tables are shared, and where the tables above them are (the counts of the tables below a shared one are then added
//! to by plain stores, `N5` of `node.rs`).
//!
//! Each space must end with what is its own: after a fault the space's leaf is its own to change, whatever the other side does at the same time,
//! and every table comes back once.
#![cfg(loom)]

#[path = "common/model_world.rs"]
mod model_world;

use kmem_hal::{DeviceFrame, Frame, Order, Page, PageRange};
use kmem_paging::{
    ChangeError, Entry, ForkItem, ForkStep, PageTable, Rights, TableError, UnshareStep,
};
use kmem_testkit::model::ModelCpu;
use model_world::{TinyOf, World};

/// Tables of so many levels of two entries; all but the root are shared by a fork.
type Table<const N: usize> = PageTable<TinyOf<N>, &'static World, DeviceFrame>;

/// As `explore` of the testkit, for longer paths: three levels take more steps than loom allows by itself.
fn explore(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    if builder.preemption_bound.is_none() {
        builder.preemption_bound = Some(preemptions);
    }
    builder.max_branches = 20_000;
    builder.check(model);
}

const READ_WRITE: Rights = Rights::READ.union(Rights::WRITE);

fn page(number: u64) -> Page {
    Page::new(number).unwrap()
}

/// All pages of the one table below the root.
fn pages<const N: usize>() -> PageRange {
    PageRange::with_count(page(0), 1 << (N - 1)).unwrap()
}

fn handle(frame: Frame) -> DeviceFrame {
    DeviceFrame::new(frame, Order::ZERO).unwrap()
}

fn leaked<const N: usize>(world: &'static World) -> &'static Table<N> {
    Box::leak(Box::new(Table::new(world).unwrap()))
}

fn map<const N: usize>(table: &Table<N>) {
    let frame = handle(Frame::from_number(0x100));
    let mut cursor = table.cursor(pages::<N>()).unwrap();
    cursor.map(page(0), frame, READ_WRITE).unwrap();
}

/// Shares the table below the root with a new space.
fn fork<const N: usize>(parent: &Table<N>, child: &Table<N>) {
    let mut gather = parent.gather::<1>();
    let step = |_| unreachable!("the table is shared");
    // SAFETY: no cursor is open on either in these models.
    let shared = unsafe { parent.fork_sharing(child, pages::<N>(), N - 1, &mut gather, step) };
    assert_eq!(shared, Ok(1 << (N - 2)));
    gather.commit(|_| {});
}

/// A write fault: where the tables are another space's too, they become this one's own; then the leaf is writable, for a page of its own. Gives
/// whether a table was copied.
///
/// With three levels it looks first, as a fault does, and so walks into a leaf table below a shared one (`N5`); with two it always asks for the
/// table, which finds by itself that nobody else has it.
fn write<const N: usize>(table: &Table<N>, frame: u64) -> bool {
    let mut gather = table.gather::<3>();
    let mut cursor = table.cursor(pages::<N>()).unwrap();
    let shared = N == 2
        || match cursor.own(page(0)) {
            Err(ChangeError::Shared { .. }) => true,
            found => {
                assert!(matches!(found, Ok(Entry::Leaf(_))), "{found:?}");
                false
            }
        };
    let copied = shared
        && cursor
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

fn leaf<const N: usize>(table: &Table<N>) -> (u64, bool) {
    match table.query(page(0)) {
        Entry::Leaf(leaf) => (
            leaf.frame.number(),
            leaf.attributes.rights.contains(Rights::WRITE),
        ),
        other => panic!("{other:?}"),
    }
}

fn finish<const N: usize>(world: &'static World, tables: &[&'static Table<N>]) {
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

fn fork_against_write<const N: usize>(preemptions: usize) {
    explore(preemptions, || {
        ModelCpu::bind(0);
        let world = World::with_sections(N as u64);
        let (parent, first, second) = (leaked::<N>(world), leaked(world), leaked(world));
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

fn write_against_write<const N: usize>(preemptions: usize) {
    explore(preemptions, || {
        ModelCpu::bind(0);
        let world = World::with_sections(N as u64);
        let (parent, child) = (leaked::<N>(world), leaked(world));
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

fn end_against_write<const N: usize>(preemptions: usize) {
    explore(preemptions, || {
        ModelCpu::bind(0);
        let world = World::with_sections(N as u64);
        let (parent, child) = (leaked::<N>(world), leaked(world));
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

#[test]
fn a_fork_meets_the_write_fault_of_another_sharer() {
    fork_against_write::<2>(3);
}

#[test]
fn two_sharers_write_at_once() {
    write_against_write::<2>(3);
}

#[test]
fn a_sharer_ends_while_the_other_writes() {
    end_against_write::<2>(3);
}

#[test]
fn a_fork_meets_a_write_fault_below_a_shared_level_2() {
    fork_against_write::<3>(3);
}

#[test]
fn two_sharers_of_a_level_2_write_at_once() {
    // A third preemption takes twenty times as many schedules; without `N5` two show a leaf that both write to.
    write_against_write::<3>(2);
}

#[test]
fn a_sharer_of_a_level_2_ends_while_the_other_writes() {
    end_against_write::<3>(3);
}

#[test]
fn a_lent_table_is_copied() {
    // No race, but no other format has tables below the root that a fork could share.
    explore(0, || {
        ModelCpu::bind(0);
        let world = World::with_sections(3);
        let parent = leaked::<2>(world);
        parent.lend_from(page(2)).unwrap();
        let all = PageRange::with_count(page(0), 4).unwrap();
        let upper = PageRange::with_count(page(2), 2).unwrap();
        let mut cursor = parent.cursor(all).unwrap();
        for (at, frame) in [(0, 0x100), (2, 0x102)] {
            let frame = handle(Frame::from_number(frame));
            cursor.map(page(at), frame, READ_WRITE).unwrap();
        }
        drop(cursor);
        let frame =
            |table: &Table<2>, at| table.query(page(at)).leaf().map(|leaf| leaf.frame.number());
        // From a table that is not lent on, and the lent one alone.
        for (range, pages, lower) in [(all, 2, Some(0x100)), (upper, 1, None)] {
            let child = leaked::<2>(world);
            let mut gather = parent.gather::<1>();
            let step = |item| match item {
                ForkItem::Leaf(leaf) => {
                    assert_eq!(leaf.page, page(2), "the others are shared");
                    ForkStep::Leaf {
                        handle: handle(Frame::from_number(0x200)),
                        child: leaf.attributes,
                        parent: None,
                    }
                }
                ForkItem::Payload(..) => unreachable!("no payloads in this model"),
            };
            // SAFETY: nobody else uses either.
            let copied = unsafe { parent.fork_sharing(child, range, 1, &mut gather, step) };
            assert_eq!(copied.map_err(|(error, _)| error), Ok(pages));
            gather.commit(|_| {});
            assert_eq!((frame(child, 0), frame(child, 2)), (lower, Some(0x200)));
        }
        // The lender's tables stay for ever.
        assert_eq!(
            (frame(parent, 0), frame(parent, 2)),
            (Some(0x100), Some(0x102))
        );
        let mut cursor = parent.cursor(all).unwrap();
        let shared = Err(ChangeError::Shared { at: page(0) });
        assert_eq!(cursor.own(page(0)), shared);
        assert!(matches!(cursor.own(page(2)), Ok(Entry::Leaf(_))));
        drop(cursor);
        // A copy takes the place of a table that is shared, so that it cannot be lent.
        assert_eq!(parent.lend_from(page(0)), Err(TableError::CannotShare));
    });
}
