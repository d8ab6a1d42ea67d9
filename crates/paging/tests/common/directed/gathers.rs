// What waits for its flush: frames that move meanwhile, announcements beside gathers, gathers that are forgotten or in a place of the
// caller's.

use kmem_hal::{Asid, Frame, FrameSink, Order, OwnedFrame};
use kmem_mock_x86::{AccessKind, Registers};
use kmem_paging::{Gather, Rights, RootKnown};

use super::room::Room;
use super::{at, pages};

/// A moved frame is freed from its new page before the old page is flushed (CVE-2018-18281).
pub fn a_moved_frame_outlives_its_old_page() {
    let room = Room::new();
    room.map(0x400, Rights::USER_DATA);
    assert!(room.write(1, 0x400).is_some());
    let mut moving = room.table.gather::<1>();
    room.table
        .move_range(pages(0x400, 1), at(0x2_0000), &mut moving)
        .unwrap();
    room.unmap(pages(0x2_0000, 1));
    assert_eq!(room.touch(1, 0x400, AccessKind::Read), None);
    drop(moving);
    room.quiet();
    room.finish();
}

/// Who flushes a change from outside takes its own announcement back, and not that of a move that waits.
pub fn a_change_from_outside_is_nobody_elses() {
    let room = Room::new();
    room.map(0x400, Rights::USER_DATA);
    room.map(0x401, Rights::USER_DATA);
    let frame = room.map(0x500, Rights::USER_DATA);
    assert!(room.write(1, 0x500).is_some());
    let mut moving = room.table.gather::<1>();
    let mut move_page = |page: u64| {
        assert!(room.write(1, page).is_some());
        let to = at(page + 0x2_0000);
        room.table
            .move_range(pages(page, 1), to, &mut moving)
            .unwrap();
    };
    move_page(0x400);
    let announced = room.table.announce_foreign(at(0x500));
    let mut cursor = room.table.cursor(pages(0x500, 1)).unwrap();
    // SAFETY: the one table that leads there was announced, and is flushed before the frame is freed.
    let taken = unsafe { cursor.take_shared(at(0x500), Frame::from_number(frame), None) };
    drop(cursor);
    announced.commit();
    assert_eq!(room.touch(1, 0x500, AccessKind::Read), None);
    room.env.pool.free(taken.unwrap().1);
    // The gather counts as before: a page that it moves from now on is flushed with the frame's next page.
    move_page(0x401);
    room.unmap(pages(0x2_0401, 1));
    assert_eq!(room.touch(1, 0x401, AccessKind::Read), None);
    drop(moving);
    room.quiet();
    room.finish();
}

/// A table that somebody may have loaded keeps its tag: what CPUs hold is under that one.
pub fn a_loaded_table_keeps_its_tag() {
    let mut room = Room::with(Registers::LONG_PCID);
    room.map(0x400, Rights::USER_DATA);
    assert!(room.write(1, 0x400).is_some());
    let refused = room.table.set_asid(Asid::new(2));
    room.unmap(pages(0x400, 1));
    assert_eq!(room.touch(1, 0x400, AccessKind::Read), None);
    room.quiet();
    assert_eq!(refused, Err(RootKnown));
    room.finish();
}

/// A gather in a place of the caller's is committed at its end.
pub fn a_gather_in_place_is_committed() {
    let room = Room::new();
    let range = pages(0x400, 1);
    let leaked = room.map(0x400, Rights::USER_DATA);
    assert!(room.write(1, 0x400).is_some());
    let mut place = std::mem::MaybeUninit::uninit();
    Gather::<_, _, _, 1>::with_in(&mut place, &room.table, |gather| {
        room.table.cursor(range).unwrap().unmap(range, gather)
    })
    .unwrap();
    assert_eq!(room.touch(1, 0x400, AccessKind::Read), None);
    // SAFETY: the test knows the number of the frame that the drop leaked, and it is flushed.
    room.env
        .pool
        .free(unsafe { OwnedFrame::from_raw(Frame::from_number(leaked), Order::ZERO) });
    room.quiet();
    room.finish();
}

/// A forgotten gather leaks its frame; what is mapped there later is reached by everybody all the same.
pub fn a_forgotten_gather_is_only_a_leak() {
    let room = Room::new();
    let leaked = room.map(0x400, Rights::USER_DATA);
    room.map(0x401, Rights::USER_DATA);
    for cpu in 0..2 {
        room.write(cpu, 0x400).unwrap();
    }
    let mut gather = room.table.gather::<1>();
    room.table
        .cursor(pages(0x400, 1))
        .unwrap()
        .unmap(pages(0x400, 1), &mut gather)
        .unwrap();
    std::mem::forget(gather);
    let frame = room.map(0x400, Rights::USER_DATA);
    for cpu in 0..2 {
        assert_eq!(room.write(cpu, 0x400), Some(frame));
    }
    room.quiet();
    // SAFETY: the test knows the number of the frame that it leaked, and it is flushed now.
    room.env
        .pool
        .free(unsafe { OwnedFrame::from_raw(Frame::from_number(leaked), Order::ZERO) });
    room.finish();
}
