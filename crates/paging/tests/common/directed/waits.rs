// Who waits for a table's lock, while whoever has it waits for a grace period.

use std::cell::Cell;

use kmem_hal::OwnedFrame;
use kmem_mock_x86::{Registers, Scheduler};
use kmem_paging::{Rights, UnshareStep};

use super::room::Room;
use super::sharing::empty;
use super::{Table, at, pages};

/// A leaf table that the holder of the lock empties, one that stays and one that is missing, below one table of level 2.
const EMPTIED: u64 = 0x400;
const FULL: u64 = 0x600;
const MISSING: u64 = 0x800;

/// What the other one does, for which it needs the table of level 2.
type Operation = fn(&Room);

fn maps_where_a_table_is_missing(room: &Room) {
    room.map(MISSING, Rights::USER_DATA);
}

fn empties_a_table(room: &Room) {
    room.unmap(pages(FULL, 1));
}

/// The other side gave the table up, so it is taken back.
fn changes_what_was_shared(room: &Room) {
    room.protect(pages(FULL, 1), Rights::USER_DATA);
}

fn copies_what_was_shared(room: &Room) {
    let mut gather = room.table.gather::<1>();
    let mut cursor = room.table.cursor(pages(FULL, 1)).unwrap();
    let step = |_| UnshareStep::<OwnedFrame>::Stop;
    let copied = cursor.unshare(at(FULL), &mut gather, step, drop);
    assert_eq!(copied, Ok(false), "it is the space's alone");
}

/// A context commits while its cursor holds a table, and the commit waits for a grace period, as tables were emptied: whoever waits for the
/// held table's lock is not in a read section.
pub fn a_commit_beside_a_waiting_cursor_ends() {
    let operations: [(bool, Operation); 4] = [
        (false, maps_where_a_table_is_missing),
        (false, empties_a_table),
        (true, changes_what_was_shared),
        (true, copies_what_was_shared),
    ];
    for (shared, operate) in operations {
        // No table is kept, so that each commit with some waits.
        let room = Room::keeping(Registers::LONG, 0);
        room.map(EMPTIED, Rights::USER_DATA);
        room.map(FULL, Rights::USER_DATA);
        let child: Option<Table> = shared.then(|| {
            let child = room.fork(FULL, 512, 1);
            assert_eq!(empty(&child, FULL, 512), 0, "a share");
            child
        });
        let machine = room.env.machine;
        let (held, done) = (Cell::new(false), Cell::new(false));
        let mut scheduler = Scheduler::new(machine, 1);
        scheduler.spawn(0, || {
            let mut cursor = room.table.cursor(pages(EMPTIED, 0x1000)).unwrap();
            let mut gather = room.table.gather::<4>();
            assert_eq!(cursor.unmap(pages(EMPTIED, 1), &mut gather), Ok(1));
            held.set(true);
            // The other one has come as far as it can.
            (0..500).for_each(|_| machine.yield_now());
            assert!(!done.get(), "it needed the held table");
            room.env.give_up_after(Some(100_000));
            gather.commit_to(&room.env.pool);
            room.env.give_up_after(None);
            drop(cursor);
        });
        scheduler.spawn(1, || {
            while !held.get() {
                machine.yield_now();
            }
            operate(&room);
            done.set(true);
        });
        scheduler.run();
        assert!(done.get());
        room.quiet();
        if let Some(child) = child {
            child.destroy(|_, _| panic!("it has nothing"), |_, _| {});
        }
        room.unmap(pages(EMPTIED, 0x1000));
        room.finish();
    }
}
