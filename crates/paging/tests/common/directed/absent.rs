// A processor that remembers absent entries: who fills one has to tell.
use kmem_hal::Order;
use kmem_mock_x86::{Registers, Scheduler};
use kmem_paging::{Replaced, Rights};

use super::super::modes::X86Absent;
use super::room::Room;
use super::{at, pages};

/// Pages that a CPU knows to be absent get what others had.
pub fn a_moved_page_is_there_though_absence_is_cached() {
    let room: Room<X86Absent> = Room::of(Registers::LONG);
    let frame = room.map(0x400, Rights::USER_DATA);
    // They keep the tables: where one goes, everything is flushed.
    for page in [0x410, 0x810] {
        room.map(page, Rights::USER_DATA);
    }
    for cpu in 0..2 {
        assert_eq!(room.write(cpu, 0x400), Some(frame));
        assert_eq!(room.write(cpu, 0x801), None);
    }
    let mut gather = room.table.gather::<1>();
    let moved = room
        .table
        .move_range(pages(0x3ff, 2), at(0x800), &mut gather);
    assert_eq!(moved, Ok(1));
    gather.commit(drop);
    drop(gather);
    for cpu in 0..2 {
        assert_eq!(room.write(cpu, 0x400), None);
        assert_eq!(room.write(cpu, 0x801), Some(frame));
    }
    room.quiet();
    room.finish();
}

/// Another CPU looks at the page between the old frame and the new one.
pub fn a_replaced_page_is_there_though_absence_is_cached() {
    let mut absent = 0;
    for seed in 0..8 {
        let room: Room<X86Absent> = Room::of(Registers::LONG);
        room.map(0x400, Rights::USER_DATA);
        assert!(room.write(1, 0x400).is_some());
        let mut scheduler = Scheduler::new(room.env.machine, seed);
        scheduler.spawn(0, || {
            let mut cursor = room.table.cursor(pages(0x400, 1)).unwrap();
            let frame = room.alloc(Order::ZERO);
            let before = cursor.replace(at(0x400), frame, Rights::USER_DATA);
            let Ok(Replaced::Leaf(_, old)) = before else {
                panic!("{before:?}");
            };
            drop(cursor);
            room.free(old);
        });
        let looked = std::cell::Cell::new(0);
        scheduler.spawn(1, || {
            for _ in 0..40 {
                looked.set(looked.get() + u32::from(room.write(1, 0x400).is_none()));
                room.env.machine.yield_now();
            }
        });
        scheduler.run();
        absent += looked.get();
        let leaf = room.table.query(at(0x400)).leaf().unwrap();
        assert_eq!(room.write(1, 0x400), Some(leaf.frame.number()));
        room.quiet();
        room.finish();
    }
    assert!(absent > 0, "nobody looked in between");
}
