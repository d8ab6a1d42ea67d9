//! Models of the table locks, of detaching, and of readers without a lock.
//!
//! The format is the smallest there can be: two levels of two entries. A frame that is freed is at once somebody
//! else's, who writes words into it that look like entries: a reader that is still in it comes back with a frame that
//! nobody mapped.
#![cfg(loom)]

#[path = "common/model_world.rs"]
mod model_world;

use kmem_hal::{Frame, Order, OwnedFrame, Page, PageRange};
use kmem_paging::{Entry, PageTable, Rights};
use kmem_testkit::model::{ModelCpu, explore};
use model_world::{Tiny, World};

type Table = PageTable<Tiny, &'static World, OwnedFrame>;

fn page(number: u64) -> Page {
    Page::new(number).unwrap()
}

/// A frame to be mapped; nobody reads it.
fn frame(number: u64) -> OwnedFrame {
    // SAFETY: each model uses a number once at a time.
    unsafe { OwnedFrame::from_raw(Frame::from_number(0x100 + number), Order::ZERO) }
}

fn map(table: &Table, number: u64) {
    table
        .cursor(PageRange::single(page(number)))
        .unwrap()
        .map(page(number), frame(number), Rights::READ)
        .unwrap();
}

fn unmap(table: &Table, number: u64) -> u64 {
    let range = PageRange::single(page(number));
    let mut gather = table.gather::<1>();
    let unmapped = table.cursor(range).unwrap().unmap(range, &mut gather);
    let mut count = 0;
    gather.commit(|frame| {
        assert_eq!(frame.first().number(), 0x100 + number);
        count += 1;
        let _ = frame.into_raw();
    });
    assert_eq!(unmapped, Ok(count));
    count
}

/// What a page may be: its own frame, or nothing.
fn check(entry: Entry, number: u64) -> bool {
    match entry {
        Entry::Empty => false,
        Entry::Leaf(leaf) => {
            assert_eq!(
                leaf.frame.number(),
                0x100 + number,
                "page {number} was read out of a table that is somebody else's"
            );
            true
        }
        Entry::Payload(_) => unreachable!(),
    }
}

/// Nothing is left but what was there before.
fn finish(world: &'static World, table: Table) {
    table.destroy(|_, frame| _ = frame.into_raw(), |_, _| {});
    assert_eq!(
        world.free.lock().unwrap().len() as u64,
        world.tables,
        "tables leaked"
    );
}

/// Runs two closures as CPUs 0 and 1 over one table that `prepare` filled.
fn two(
    hasty: bool,
    prepare: fn(&Table),
    first: fn(&Table),
    second: fn(&Table),
    after: fn(&Table),
) -> impl Fn() + Sync + Send + 'static {
    move || {
        ModelCpu::bind(0);
        let world = World::new();
        world
            .hasty
            .store(hasty, std::sync::atomic::Ordering::Relaxed);
        let table: &'static Table = Box::leak(Box::new(Table::new(world).unwrap()));
        prepare(table);
        let other = loom::thread::spawn(move || {
            ModelCpu::bind(1);
            second(table);
        });
        first(table);
        other.join().unwrap();
        after(table);
        // SAFETY: the box was leaked above, and the other thread is gone.
        finish(world, *unsafe {
            Box::from_raw(std::ptr::from_ref(table).cast_mut())
        });
    }
}

/// A page in each of two leaf tables.
fn two_leaf_tables(table: &Table) {
    map(table, 0);
    map(table, 2);
}

fn walk_against_free(hasty: bool) {
    explore(
        3,
        two(
            hasty,
            |table| map(table, 0),
            |table| {
                check(table.query(page(0)), 0);
            },
            |table| assert_eq!(unmap(table, 0), 1),
            |table| assert_eq!(table.table_count(), 1),
        ),
    );
}

#[test]
fn a_reader_is_never_in_a_table_that_was_freed() {
    walk_against_free(false);
}

#[test]
#[should_panic(expected = "somebody else's")]
fn a_table_freed_without_a_grace_period_is_found() {
    walk_against_free(true);
}

#[test]
fn two_map_in_one_table_that_does_not_exist_yet() {
    explore(
        3,
        two(
            false,
            |_| {},
            |table| map(table, 0),
            |table| map(table, 1),
            |table| {
                assert!(check(table.query(page(0)), 0));
                assert!(check(table.query(page(1)), 1));
                assert_eq!(table.table_count(), 2);
            },
        ),
    );
}

#[test]
fn one_maps_while_the_other_empties_the_table() {
    explore(
        3,
        two(
            false,
            |table| map(table, 0),
            |table| map(table, 1),
            |table| assert_eq!(unmap(table, 0), 1),
            |table| {
                assert!(!check(table.query(page(0)), 0));
                assert!(check(table.query(page(1)), 1));
                assert_eq!(table.table_count(), 2);
            },
        ),
    );
}

/// Maps a page as a fault does: through its entry where the table is there, and with a cursor where it is not.
fn fault(table: &Table, number: u64) {
    match table.lock_entry(page(number)) {
        Some(entry) => entry.map(frame(number), Rights::READ.into()).unwrap(),
        None => map(table, number),
    }
}

#[test]
fn an_entry_is_locked_while_the_other_empties_the_table() {
    explore(
        3,
        two(
            false,
            |table| map(table, 0),
            |table| fault(table, 1),
            |table| assert_eq!(unmap(table, 0), 1),
            |table| {
                assert!(!check(table.query(page(0)), 0));
                assert!(check(table.query(page(1)), 1));
                assert_eq!(table.table_count(), 2);
            },
        ),
    );
}

#[test]
fn an_entry_is_locked_beside_a_cursor() {
    explore(
        3,
        two(
            false,
            |table| map(table, 0),
            |table| {
                fault(table, 1);
                assert!(
                    table
                        .lock_entry(page(1))
                        .unwrap()
                        .relax(Rights::READ, false)
                );
            },
            |table| {
                let range = PageRange::single(page(0));
                let rights = Rights::READ | Rights::WRITE;
                let mut gather = table.gather::<1>();
                let changed = table
                    .cursor(range)
                    .unwrap()
                    .protect(range, rights, &mut gather);
                assert!(changed.is_ok());
            },
            |table| {
                assert!(check(table.query(page(0)), 0));
                assert!(check(table.query(page(1)), 1));
                assert_eq!(unmap(table, 0) + unmap(table, 1), 2);
                assert_eq!(table.table_count(), 1);
            },
        ),
    );
}

#[test]
fn two_empty_one_table() {
    explore(
        3,
        two(
            false,
            |table| {
                map(table, 0);
                map(table, 1);
            },
            |table| assert_eq!(unmap(table, 0), 1),
            |table| assert_eq!(unmap(table, 1), 1),
            |table| assert_eq!(table.table_count(), 1),
        ),
    );
}

/// The commit waits for a grace period while its cursor holds the root; who needs the root waits outside of a read section.
#[test]
fn one_commits_with_a_held_table_that_the_other_needs() {
    explore(
        3,
        two(
            false,
            two_leaf_tables,
            |table| {
                let all = PageRange::with_count(page(0), 4).unwrap();
                let mut gather = table.gather::<1>();
                let mut cursor = table.cursor(all).unwrap();
                let unmapped = cursor.unmap(PageRange::single(page(0)), &mut gather);
                assert_eq!(unmapped, Ok(1));
                gather.commit(|frame| _ = frame.into_raw());
            },
            |table| map(table, 1),
            |table| {
                assert!(check(table.query(page(1)), 1));
                assert!(check(table.query(page(2)), 2));
                assert_eq!(table.table_count(), 3);
            },
        ),
    );
}

#[test]
fn two_unmap_one_page() {
    explore(
        3,
        two(
            false,
            two_leaf_tables,
            |table| {
                unmap(table, 0);
            },
            |table| {
                unmap(table, 0);
            },
            |table| {
                assert!(!check(table.query(page(0)), 0));
                assert_eq!(table.table_count(), 2);
            },
        ),
    );
}
