// Accessed and dirty bits that the hardware sets while an operation looks at an entry: none is lost.

use kmem_hal::{FrameSink, Order};
use kmem_mock_x86::AccessKind;
use kmem_paging::{Attributes, ForkItem, ForkStep, Harvest, Rights};

use super::room::Room;
use super::{Table, at, pages};

/// The hardware sets accessed and dirty between the look at an entry and its change.
pub fn bits_set_meanwhile_are_kept() {
    let room = Room::new();
    let range = pages(0x400, 1);
    room.map(0x400, Rights::USER_DATA);
    let clean = || {
        let mut gather = room.table.gather::<1>();
        room.table
            .cursor(range)
            .unwrap()
            .update(range, &mut gather, |leaf| {
                Some(Attributes::new(leaf.attributes.rights))
            })
            .unwrap();
        gather.commit(drop);
    };
    let leaf = || room.table.query(at(0x400)).leaf().unwrap();
    // A change that looks twice, as another CPU writes between; how often it looked.
    let change = || {
        let mut looks = 0;
        let mut gather = room.table.gather::<1>();
        room.table
            .cursor(range)
            .unwrap()
            .update(range, &mut gather, |leaf| {
                looks += 1;
                if looks == 1 {
                    assert!(room.write(1, 0x400).is_some());
                }
                Some(leaf.attributes.write_protected())
            })
            .unwrap();
        gather.commit(drop);
        looks
    };
    assert_eq!(change(), 2, "once before the write, once after it");
    assert!(leaf().attributes.dirty && leaf().attributes.accessed && !leaf().is_writable());
    // The same with a page that was accessed before and is clean: only D is still to come.
    let mut gather = room.table.gather::<1>();
    for first in [AccessKind::Read, AccessKind::Write] {
        room.protect(range, Rights::USER_DATA);
        clean();
        room.touch(0, 0x400, first);
        let mut cursor = room.table.cursor(range).unwrap();
        cursor
            .harvest(range, Harvest::DIRTY, &mut gather, |_| {})
            .unwrap();
        drop(cursor);
        gather.commit(drop);
        change();
        assert!(leaf().attributes.dirty, "a write while D was clear");
    }
    // Forking asks once, and a CPU writes while it does.
    room.protect(range, Rights::USER_DATA);
    clean();
    let child = Table::new(room.env).unwrap();
    let mut asked = 0;
    room.table
        .fork_into(&child, range, &mut gather, |item| {
            let ForkItem::Leaf(leaf) = item else {
                return ForkStep::Stop;
            };
            assert!(!leaf.attributes.dirty);
            asked += 1;
            assert!(room.write(1, 0x400).is_some());
            ForkStep::Leaf {
                handle: room.alloc(Order::ZERO),
                child: leaf.attributes.write_protected(),
                parent: Some(leaf.attributes.write_protected()),
            }
        })
        .unwrap();
    gather.commit(drop);
    drop(gather);
    assert_eq!(asked, 1);
    assert!(leaf().attributes.dirty && !leaf().is_writable());
    child.destroy(|_, frame| room.env.pool.free(frame), |_, _| {});
    room.finish();
}
