// Frames for tables: what an operation reserves is enough and no more, and without them nothing changes.

use kmem_hal::Order;
use kmem_mock_x86::Registers;
use kmem_paging::Rights;
use kmem_paging::format::X86_64;

use super::room::Room;
use super::{Table, at, pages};

/// A reserve is enough even where a table that the range shares with a neighbour goes meanwhile.
pub fn a_reserve_outlives_its_neighbours() {
    let room = Room::new();
    let neighbour = 0x400;
    room.map(neighbour, Rights::USER_DATA);
    for order in [Order::ZERO, Order::HUGE_2M] {
        let range = if order == Order::ZERO {
            // The rest of the neighbour's table.
            pages(0x401, 0x1ff)
        } else {
            // The rest of what its table of the second level covers.
            pages(0x600, 0x200)
        };
        let block = room.alloc(order);
        let mut cursor = room.table.cursor(range).unwrap();
        let reserved = cursor.reserve(range, order).unwrap();
        room.unmap(pages(neighbour, 1));
        assert_eq!(room.table.table_count(), 1);
        room.env.pool.set_fuse(Some(0));
        assert!(reserved >= 3 - usize::from(order > Order::ZERO));
        cursor
            .map(range.first(), block, Rights::USER_DATA)
            .unwrap_or_else(|(error, _)| panic!("the reserve was too small: {error}"));
        room.env.pool.set_fuse(None);
        drop(cursor);
        room.unmap(range);
        room.map(neighbour, Rights::USER_DATA);
    }
    room.finish();
}

/// A reserve takes exactly what a range can need, and no more.
pub fn a_reserve_is_not_too_large() {
    let room = Room::new();
    for (range, order, most) in [
        (pages(0x400, 1), Order::ZERO, 3),
        (pages(0x5ff, 2), Order::ZERO, 4),
        (pages(0x400, 0x400), Order::ZERO, 4),
        (pages(0x400, 0x400), Order::HUGE_2M, 2),
        (pages((1 << 18) - 1, 2), Order::ZERO, 5),
    ] {
        let mut cursor = room.table.cursor(range).unwrap();
        assert_eq!(cursor.reserve(range, order), Ok(most), "{range:?}");
        drop(cursor);
    }
    room.finish();
}

/// A table is made of those that wait for their grace period where there is no other frame.
pub fn a_new_table_waits_for_emptied_ones() {
    let room = Room::<X86_64>::keeping(Registers::LONG, 64);
    room.map(0x400, Rights::USER_DATA);
    room.unmap(pages(0x400, 1));
    room.env.pool.set_fuse(Some(0));
    let made = Table::new(room.env);
    room.env.pool.set_fuse(None);
    made.expect("three tables wait")
        .destroy(|_, _| {}, |_, _| {});
    room.finish();
}

/// A move over several tables has what it needs before it starts.
pub fn a_move_without_memory_moves_nothing() {
    let room = Room::new();
    let first = 0x600 - 40;
    for page in first..first + 80 {
        room.map(page, Rights::USER_DATA);
    }
    // Next to the target there is a page, so that only leaf tables are missing there.
    room.map((1 << 17) + 5, Rights::USER_DATA);
    let to = (1 << 17) + 0x600 - 40;
    for fuse in 0..2 {
        let mut gather = room.table.gather::<1>();
        room.env.pool.set_fuse(Some(fuse));
        let moved = room.table.move_range(pages(first, 80), at(to), &mut gather);
        room.env.pool.set_fuse(None);
        assert!(moved.is_err(), "two tables are missing");
        drop(gather);
        for page in 0..80 {
            assert!(room.table.query(at(first + page)).leaf().is_some());
            assert!(room.table.query(at(to + page)).leaf().is_none());
        }
    }
    let mut gather = room.table.gather::<1>();
    assert_eq!(
        room.table.move_range(pages(first, 80), at(to), &mut gather),
        Ok(80)
    );
    gather.commit(drop);
    drop(gather);
    room.quiet();
    room.finish();
}

/// A fork that lacks memory for its child's tables has copied nothing.
pub fn a_fork_without_memory_changes_nothing() {
    let room = Room::new();
    for page in (0x400..0x2000).step_by(0x200) {
        room.map(page, Rights::USER_DATA);
    }
    let child = Table::new(room.env).unwrap();
    for fuse in 0..8 {
        let mut gather = room.table.gather::<1>();
        room.env.pool.set_fuse(Some(fuse));
        let result = room
            .table
            .fork_into(&child, pages(0x400, 0x1c00), &mut gather, |_| {
                panic!("asked before the tables are there")
            });
        room.env.pool.set_fuse(None);
        assert!(result.is_err());
        assert_eq!(child.table_count(), 1);
        drop(gather);
    }
    for page in (0x400..0x2000).step_by(0x200) {
        assert!(room.table.query(at(page)).leaf().unwrap().is_writable());
    }
    child.destroy(|_, _| {}, |_, _| {});
    room.finish();
}
