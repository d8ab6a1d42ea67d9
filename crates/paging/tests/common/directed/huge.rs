// Huge leaves: cut down to a page, and merged out of parts that belong together.

use std::cell::Cell;

use kmem_hal::{Frame, Order, OwnedFrame};
use kmem_mock_x86::{AccessKind, Scheduler};
use kmem_paging::{ChangeError, Rights};

use super::room::Room;
use super::{at, pages};

/// A leaf of 1 GiB is cut twice to lose one page; nobody reads its memory, which is not there.
pub fn a_gigabyte_is_cut_down_to_a_page() {
    let room = Room::new();
    let first = 1 << 18;
    let base = 5u64 << 18;
    let all = pages(first, 1 << 18);
    // SAFETY: nobody else has these frames, and nobody reads them.
    let block = unsafe { OwnedFrame::from_raw(Frame::from_number(base), Order::HUGE_1G) };
    let mut cursor = room.table.cursor(all).unwrap();
    cursor.map(at(first), block, Rights::USER_DATA).unwrap();
    assert_eq!(room.table.table_count(), 2);
    let hole = first + (7 << 9) + 9;
    let others = [
        first,
        hole - 1,
        hole + 1,
        first + (7 << 9),
        first + (1 << 18) - 1,
    ];
    for page in others.into_iter().chain([hole]) {
        assert_eq!(room.write(1, page), Some(base + page - first));
    }
    let mut gather = room.table.gather::<1>();
    // Without memory for the tables nothing happens.
    room.env.pool.set_fuse(Some(1));
    assert!(matches!(
        cursor.unmap(pages(hole, 1), &mut gather),
        Err(ChangeError::Memory(_))
    ));
    room.env.pool.set_fuse(None);
    assert_eq!(room.table.table_count(), 2);
    cursor.unmap(pages(hole, 1), &mut gather).unwrap();
    cursor.release();
    gather.commit(|frame| {
        assert_eq!(frame.first().number(), base + hole - first);
        let _ = frame.into_raw();
    });
    room.quiet();
    assert_eq!(room.write(1, hole), None);
    for page in others {
        assert_eq!(room.write(1, page), Some(base + page - first));
        let leaf = cursor.query(at(page)).leaf().unwrap();
        assert!(leaf.attributes.dirty, "D of the whole");
    }
    assert_eq!(room.table.table_count(), 4);
    drop(cursor);
    // All of it goes, in several gathers.
    let mut next = first;
    let mut given = 0;
    loop {
        let rest = pages(next, all.last().number() - next + 1);
        let result = room.table.cursor(rest).unwrap().unmap(rest, &mut gather);
        gather.commit(|frame| {
            given += frame.order().frames();
            let _ = frame.into_raw();
        });
        match result {
            Ok(_) => break,
            Err(ChangeError::Full { next: from }) => next = from.number(),
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!(given, (1 << 18) - 1);
    drop(gather);
    assert_eq!(room.table.table_count(), 1);
    room.quiet();
    room.finish();
}

/// A merged page keeps what every part knew, and no CPU keeps a part.
pub fn a_merge_joins_what_its_parts_knew() {
    for dirty in [0, 1, 255, 511] {
        let room = Room::new();
        let block = room.alloc(Order::HUGE_2M);
        let base = block.first().number();
        let all = pages(0x600, 512);
        let mut gather = room.table.gather::<4>();
        let mut cursor = room.table.cursor(all).unwrap();
        cursor.map(at(0x600), block, Rights::USER_DATA).unwrap();
        cursor.split(at(0x600), &mut gather).unwrap();
        cursor.release();
        gather.commit(drop);
        for cpu in 0..2 {
            room.touch(cpu, 0x603, AccessKind::Read).unwrap();
        }
        assert_eq!(room.write(1, 0x600 + dirty), Some(base + dirty));
        cursor
            .merge(at(0x600), Order::HUGE_2M, &mut gather)
            .unwrap();
        // Before the commit, and with the lock let go: nobody has a translation of the parts, or the way to their table.
        cursor.release();
        room.quiet();
        let leaf = cursor.query(at(0x600)).leaf().unwrap();
        assert_eq!(leaf.order, Order::HUGE_2M);
        assert!(leaf.attributes.dirty && leaf.attributes.accessed);
        cursor.release();
        gather.commit(drop);
        room.quiet();
        for cpu in 0..2 {
            assert_eq!(room.write(cpu, 0x777), Some(base + 0x177));
        }
        drop(cursor);
        drop(gather);
        // The table that went is empty when it comes back.
        let small = room.map(0x400, Rights::USER_DATA);
        assert_eq!(room.write(0, 0x400), Some(small));
        assert_eq!(room.write(0, 0x401), None);
        room.unmap(all);
        room.finish();
    }
    // Pages that do not belong together stay apart.
    let room = Room::new();
    for page in 0x600..0x800 {
        room.map(page, Rights::USER_DATA);
    }
    let all = pages(0x600, 512);
    let mut gather = room.table.gather::<4>();
    let mut cursor = room.table.cursor(all).unwrap();
    let aligned = cursor.query(at(0x600)).leaf().unwrap().frame;
    let result = cursor.merge(at(0x600), Order::HUGE_2M, &mut gather);
    assert_eq!(result.is_ok(), aligned.is_aligned(Order::HUGE_2M));
    cursor.release();
    drop(gather);
    drop(cursor);
    room.finish();
}

/// Pages in the wrong order are not one block.
pub fn a_merge_wants_frames_in_order() {
    for (a, b) in [(100u64, 101u64), (510, 511), (1, 511)] {
        let room = Room::new();
        let base = room.alloc(Order::HUGE_2M).into_raw().0.number();
        let mut cursor = room.table.cursor(pages(0x600, 512)).unwrap();
        for offset in 0..512 {
            let offset_of = match offset {
                other if other == a => b,
                other if other == b => a,
                other => other,
            };
            let number = Frame::from_number(base + offset_of);
            // SAFETY: a page of the block above, each once.
            let frame = unsafe { OwnedFrame::from_raw(number, Order::ZERO) };
            cursor
                .map(at(0x600 + offset), frame, Rights::USER_DATA)
                .unwrap();
        }
        let mut gather = room.table.gather::<4>();
        assert_eq!(
            cursor.merge(at(0x600), Order::HUGE_2M, &mut gather),
            Err(kmem_paging::HugeError::NotPossible)
        );
        cursor.release();
        drop((cursor, gather));
        room.finish();
    }
}

/// CPU 1 writes to one part while CPU 0 merges: what it wrote is dirty afterwards, whenever it came. CPU 1 knows the way to the table of the
/// parts, so that it finds the part, and sets its bit, as long as it was not told.
pub fn a_write_during_a_merge_is_kept() {
    let came_meanwhile = Cell::new(0);
    for delay in 0..24 {
        let room = Room::new();
        let block = room.alloc(Order::HUGE_2M);
        let all = pages(0x600, 512);
        let mut gather = room.table.gather::<4>();
        let mut cursor = room.table.cursor(all).unwrap();
        cursor.map(at(0x600), block, Rights::USER_DATA).unwrap();
        cursor.split(at(0x600), &mut gather).unwrap();
        cursor.release();
        gather.commit(drop);
        drop((cursor, gather));
        assert!(room.touch(1, 0x600, AccessKind::Read).is_some());
        let mut scheduler = Scheduler::new(room.env.machine, delay);
        let begun = Cell::new(false);
        scheduler.spawn(0, || {
            let mut gather = room.table.gather::<4>();
            let mut cursor = room.table.cursor(all).unwrap();
            begun.set(true);
            let merged = cursor.merge(at(0x600), Order::HUGE_2M, &mut gather);
            begun.set(false);
            assert_eq!(merged, Ok(()));
            cursor.release();
            gather.commit(drop);
        });
        let wrote = Cell::new(false);
        scheduler.spawn(1, || {
            for _ in 0..delay {
                room.env.machine.yield_now();
            }
            let running = begun.get();
            wrote.set(room.write(1, 0x6ff).is_some());
            came_meanwhile.set(came_meanwhile.get() + u32::from(running && wrote.get()));
        });
        scheduler.run();
        let leaf = room.table.query(at(0x6ff)).leaf().unwrap();
        assert_eq!(leaf.order, Order::HUGE_2M);
        assert_eq!(leaf.attributes.dirty, wrote.get(), "delay {delay}");
        room.quiet();
        room.unmap(all);
        room.finish();
    }
    assert!(came_meanwhile.get() > 0, "nobody wrote while it ran");
}

/// Parts that were global in TLBs are gone before the whole is there.
pub fn a_merge_of_global_parts_is_flushed() {
    let room = Room::new();
    let block = room.alloc(Order::HUGE_2M);
    let all = pages(0x600, 512);
    let mut gather = room.table.gather::<4>();
    let mut cursor = room.table.cursor(all).unwrap();
    let rights = Rights::USER_DATA | Rights::GLOBAL;
    cursor.map(at(0x600), block, rights).unwrap();
    assert!(room.write(1, 0x6ff).is_some());
    cursor.split(at(0x600), &mut gather).unwrap();
    cursor.release();
    gather.commit(drop);
    room.quiet();
    let leaf = cursor.query(at(0x6ff)).leaf().unwrap();
    assert!(leaf.attributes.accessed && leaf.attributes.dirty);
    assert_eq!(leaf.attributes.rights, rights);
    for page in 0x600..0x640 {
        assert!(room.write(1, page).is_some());
    }
    cursor
        .merge(at(0x600), Order::HUGE_2M, &mut gather)
        .unwrap();
    cursor.release();
    room.quiet();
    gather.commit(drop);
    drop((cursor, gather));
    room.unmap(all);
    room.finish();
}
