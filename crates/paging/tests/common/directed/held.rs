// The short ways: single pages through a cursor that keeps its table or the one above, and one locked entry. They do all that the long way
// does.

use kmem_hal::{FrameSink, Order, OwnedFrame};
use kmem_mock_x86::AccessKind;
use kmem_paging::Rights;
use kmem_paging::format::X86_64;

use super::super::hostile_env::HostileEnv;
use super::room::Room;
use super::{at, pages};

/// Single pages through a cursor that keeps its table.
pub fn a_held_cursor_does_all_that_others_do() {
    let room = Room::new();
    let area = pages(0x400, 16);
    let mut cursor = room.table.cursor(area).unwrap();
    let mut gather = room.table.gather::<8>();
    let map = |cursor: &mut kmem_paging::Cursor<'_, X86_64, &'static HostileEnv, OwnedFrame>,
               page: u64| {
        let frame = room.alloc(Order::ZERO);
        let number = frame.first().number();
        cursor.map(at(page), frame, Rights::USER_DATA).unwrap();
        number
    };
    for page in 0x400..0x404 {
        map(&mut cursor, page);
    }
    for cpu in 0..2 {
        for page in 0x400..0x404 {
            assert!(room.write(cpu, page).is_some());
        }
    }
    // A right is taken away, and the flush is not forgotten.
    let read = Rights::READ | Rights::USER;
    cursor.protect(pages(0x401, 1), read, &mut gather).unwrap();
    gather.commit(drop);
    room.quiet();
    for cpu in 0..2 {
        assert!(room.write(cpu, 0x401).is_none());
    }
    // A page goes, another comes to its place before the flush: everybody sees the other.
    let cached = cursor.query(at(0x402)).leaf().unwrap().frame.number();
    cursor.unmap(pages(0x402, 1), &mut gather).unwrap();
    assert!(cursor.query(at(0x403)).leaf().is_some());
    let fresh = map(&mut cursor, 0x402);
    assert_ne!(fresh, cached);
    for cpu in 0..2 {
        assert_eq!(room.write(cpu, 0x402), Some(fresh));
    }
    gather.commit_to(&room.env.pool);
    room.quiet();
    // The last page of the table takes the table with it.
    for page in 0x400..0x404 {
        assert!(cursor.query(at(page)).leaf().is_some());
        cursor.unmap(pages(page, 1), &mut gather).unwrap();
    }
    cursor.release();
    assert_eq!(room.table.table_count(), 1);
    gather.commit_to(&room.env.pool);
    room.quiet();
    drop((cursor, gather));
    room.finish();
}

/// What a fault does, without a cursor: one entry locked, filled, used, exchanged, and let go.
pub fn a_locked_entry_does_all_that_a_cursor_does() {
    let room = Room::new();
    let read = Rights::READ | Rights::USER;
    let lock = |page| room.table.lock_entry(at(page));
    assert!(lock(0x400).is_none(), "there is no table");
    let first = room.map(0x400, Rights::USER_DATA);
    for cpu in 0..2 {
        assert_eq!(room.write(cpu, 0x400), Some(first));
    }
    // Filled where another page was, whose flush is still due: everybody sees the new one.
    let second = room.map(0x401, Rights::USER_DATA);
    for cpu in 0..2 {
        assert_eq!(room.write(cpu, 0x401), Some(second));
    }
    let mut gather = room.table.gather::<8>();
    let area = pages(0x400, 2);
    let mut cursor = room.table.cursor(area).unwrap();
    cursor.unmap(pages(0x401, 1), &mut gather).unwrap();
    drop(cursor);
    let frame = room.alloc(Order::ZERO);
    let third = frame.first().number();
    lock(0x401).unwrap().map(frame, read.into()).unwrap();
    for cpu in 0..2 {
        assert_eq!(room.touch(cpu, 0x401, AccessKind::Read), Some(third));
        assert_eq!(room.write(cpu, 0x401), None);
    }
    gather.commit_to(&room.env.pool);
    // What takes nothing away is done, and needs no flush; what does is not.
    assert!(lock(0x401).unwrap().relax(Rights::USER_DATA, true));
    assert!(!lock(0x401).unwrap().relax(read, false));
    assert!(!lock(0x402).unwrap().relax(Rights::USER_DATA, true));
    let leaf = lock(0x401).unwrap().get().leaf().unwrap();
    assert!(leaf.is_writable() && leaf.attributes.accessed && leaf.attributes.dirty);
    for cpu in 0..2 {
        assert_eq!(room.write(cpu, 0x401), Some(third));
    }
    room.quiet();
    // Exchanged: the frame before is nobody's at once.
    let frame = room.alloc(Order::ZERO);
    let fourth = frame.first().number();
    let (leaf, old) = lock(0x401).unwrap().replace(frame, read.into()).unwrap();
    assert_eq!((leaf.frame.number(), old.first().number()), (third, third));
    room.env.pool.free(old);
    for cpu in 0..2 {
        assert_eq!(room.touch(cpu, 0x401, AccessKind::Read), Some(fourth));
    }
    // Refused as a whole: the handle comes back.
    let frame = room.alloc(Order::ZERO);
    let (_, frame) = lock(0x401).unwrap().map(frame, read.into()).unwrap_err();
    let (_, frame) = lock(0x402)
        .unwrap()
        .replace(frame, read.into())
        .unwrap_err();
    room.env.pool.free(frame);
    // The count is right: the table goes with its last page.
    room.unmap(area);
    assert_eq!(room.table.table_count(), 1);
    room.quiet();
    drop(gather);
    room.finish();
}

/// One page in each of many tables, one after the other: tables are made and detached below the held one.
pub fn a_page_in_each_table() {
    let room = Room::new();
    let last = 0x400 + 512 * 40;
    for two in [None, Some(0x400 + 512 * 20 + 7)] {
        let mut cursor = room.table.cursor(pages(0, 1 << 18)).unwrap();
        for page in (0x400..last).step_by(512).chain(two) {
            let frame = room.alloc(Order::ZERO);
            cursor.map(at(page), frame, Rights::USER_DATA).unwrap();
        }
        drop(cursor);
        assert_eq!(room.table.table_count(), 3 + 40);
        for page in (0x400..last).step_by(512).chain(two) {
            assert!(room.write(0, page).is_some() && room.write(1, page).is_some());
        }
        let mut gather = room.table.gather::<64>();
        let mut cursor = room.table.cursor(pages(0, 1 << 18)).unwrap();
        for page in (0x400..last).step_by(512) {
            assert_eq!(cursor.unmap(pages(page, 1), &mut gather), Ok(1));
        }
        drop(cursor);
        gather.commit_to(&room.env.pool);
        drop(gather);
        room.quiet();
        if let Some(page) = two {
            assert_eq!(room.table.table_count(), 4, "one page is left");
            assert!(room.write(1, page).is_some());
            room.unmap(pages(page, 1));
        }
        assert_eq!(room.table.table_count(), 1);
        room.quiet();
    }
    room.finish();
}
