//! Page tables that fork leaves shared: which ones, and what needs no memory in them.

mod common;

use common::{PAGE, Program, RW, World, signal};
use kmem_cow_mm::{Advice, MapRequest, Signal};

/// A table with a mapping that the child does not get, or gets empty, is copied entry by entry; those beside it are shared.
#[test]
fn tables_of_mappings_that_fork_treats_differently_are_not_shared() {
    let world = World::new();
    let mm = world.mm();
    let before = world.used_frames();
    let parent = Program::new(mm);
    // Four leaf tables: kept | kept, not inherited, kept | wiped, kept | kept.
    let (start, table) = (0x4000_0000, 512 * PAGE);
    let request = MapRequest::anonymous(4 * table, RW).at(start);
    parent.space.mmap(&request).unwrap();
    let hidden = start + table + 7 * PAGE;
    parent
        .space
        .madvise(hidden, 3 * PAGE, Advice::DontFork)
        .unwrap();
    let wiped = start + 2 * table;
    parent
        .space
        .madvise(wiped, 5 * PAGE, Advice::WipeOnFork)
        .unwrap();
    let kept = [
        start,
        hidden - PAGE,
        hidden + 3 * PAGE,
        wiped + 5 * PAGE,
        start + 3 * table,
    ];
    for at in kept.into_iter().chain([hidden, wiped]) {
        parent.store(at, at).unwrap();
    }
    let child = parent.fork().unwrap();
    for at in kept {
        assert_eq!(child.load(at), Ok(at));
        child.store(at, 1).unwrap();
        assert_eq!(
            parent.load(at),
            Ok(at),
            "the child wrote to its parent's page"
        );
        parent.store(at, at + 1).unwrap();
        assert_eq!(child.load(at), Ok(1));
    }
    assert_eq!(child.load(hidden), Err(signal(Signal::MapError, hidden)));
    assert_eq!(child.load(wiped), Ok(0));
    assert_eq!(parent.load(wiped), Ok(wiped));
    assert_eq!(child.space.recount().rss_anon, kept.len() as u64);
    child.exit();
    parent.exit();
    assert_eq!(world.used_frames(), before);
}

/// munmap, DONTNEED and exit in tables that are shared, with no memory at all.
#[test]
fn unmapping_part_of_a_shared_table_needs_no_memory() {
    let world = World::new();
    let mm = world.mm();
    let before = world.used_frames();
    let parent = Program::new(mm);
    let (start, table) = (0x4000_0000, 512 * PAGE);
    parent
        .space
        .mmap(&MapRequest::anonymous(8 * table, RW).at(start))
        .unwrap();
    for page in (0..8 * 512).step_by(64) {
        parent.store(start + page * PAGE, page).unwrap();
    }
    let child = parent.fork().unwrap();
    let pages = |space: &kmem_cow_mm::AddressSpace<_>| space.recount().rss_anon;
    assert_eq!((pages(&parent.space), pages(&child.space)), (64, 64));
    // Both ends of the range lie in shared tables, and three whole ones in between.
    let (from, length) = (start + table / 2, 4 * table);
    world.plan.fail_from(1);
    child.space.madvise(from, length, Advice::DontNeed).unwrap();
    assert_eq!(pages(&child.space), 32);
    world.plan.stop();
    assert_eq!(pages(&parent.space), 64);
    for page in (0..8 * 512).step_by(64) {
        let kept = !(256..256 + 4 * 512).contains(&page);
        let at = start + page * PAGE;
        assert_eq!(parent.load(at), Ok(page));
        assert_eq!(child.load(at), Ok(if kept { page } else { 0 }));
    }
    // Whole tables come and go without a copy.
    let tables = child.space.recount().tables;
    child.space.munmap(start + 6 * table, table).unwrap();
    assert_eq!(child.space.recount().tables, tables - 1);
    assert_eq!(parent.load(start + 6 * table), Ok(6 * 512));
    world.plan.fail_from(1);
    child.exit();
    parent.exit();
    world.plan.stop();
    assert_eq!(world.used_frames(), before);
}

/// Spaces of 8 GiB and more share tables of tables.
#[test]
fn a_large_space_shares_tables_of_tables() {
    let world = World::new();
    let mm = world.mm();
    let before = world.used_frames();
    let parent = Program::new(mm);
    let (start, gib) = (1u64 << 32, 1u64 << 30);
    parent
        .space
        .mmap(&MapRequest::anonymous(9 * gib, RW).at(start))
        .unwrap();
    for index in 0..9 {
        for page in [0, 1, 600] {
            parent
                .store(start + index * gib + page * PAGE, index)
                .unwrap();
        }
    }
    let child = parent.fork().unwrap();
    // One table of tables for each gibibyte, as the parent has, and nothing is copied.
    assert_eq!(child.space.recount().tables, parent.space.recount().tables);
    assert_eq!(child.space.recount().rss_anon, 27);
    child.store(start + PAGE, 100).unwrap();
    parent.store(start + gib, 101).unwrap();
    assert_eq!(parent.load(start + PAGE), Ok(0));
    assert_eq!(child.load(start + gib), Ok(1));
    assert_eq!(child.load(start + gib + 600 * PAGE), Ok(1));
    // Six whole gibibytes, and parts of two more.
    let grandchild = child.fork().unwrap();
    grandchild.space.munmap(start + gib / 2, 7 * gib).unwrap();
    assert_eq!(grandchild.space.recount().rss_anon, 6);
    assert_eq!(child.space.recount().rss_anon, 27);
    assert_eq!(grandchild.load(start + PAGE), Ok(100));
    assert_eq!(child.load(start + 3 * gib), Ok(3));
    child.exit();
    assert_eq!(grandchild.load(start + 8 * gib), Ok(8));
    parent.exit();
    grandchild.store(start + 8 * gib, 9).unwrap();
    grandchild.exit();
    assert_eq!(world.used_frames(), before);
}
