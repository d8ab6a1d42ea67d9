// How far a flush reaches: to the ends of its range, over leaves of both sizes and both kinds, to each CPU that has the space and to no
// other.

use kmem_hal::{Asid, Mmu, Order};
use kmem_mock_x86::{AccessKind, Adversary, Registers};
use kmem_paging::format::X86_64;
use kmem_paging::{Payload, Rights};

use super::room::Room;
use super::{Table, at, pages};

/// Ranges just below and above the number of pages that are flushed one by one, cached everywhere.
pub fn wide_changes_are_flushed_to_their_ends() {
    for count in [2, 32, 33, 34, 35, 64, 200] {
        let room = Room::new();
        // Across the end of a table.
        let first = 0x600 - count / 2;
        for page in first..first + count {
            room.map(page, Rights::USER_DATA);
        }
        let everybody = |expected: bool| {
            for cpu in 0..2 {
                for page in first..first + count {
                    assert_eq!(room.write(cpu, page).is_some(), expected, "{page:#x}");
                }
            }
        };
        let range = pages(first, count);
        everybody(true);
        room.protect(range, Rights::READ | Rights::USER);
        room.quiet();
        everybody(false);
        room.protect(range, Rights::USER_DATA);
        everybody(true);
        room.unmap(range);
        room.quiet();
        everybody(false);
        assert_eq!(room.table.table_count(), 1);
        room.finish();
    }
}

/// Leaves of two sizes in one gather.
pub fn a_huge_and_a_small_leaf_are_both_flushed() {
    for small_first in [true, false] {
        let room = Room::new();
        let block = room.alloc(Order::HUGE_2M);
        room.table
            .cursor(pages(0x600, 512))
            .unwrap()
            .map(at(0x600), block, Rights::USER_DATA)
            .unwrap();
        for page in [0x5fe, 0x5ff, 0x800, 0x801] {
            room.map(page, Rights::USER_DATA);
        }
        for page in [0x5fe, 0x5ff, 0x600, 0x700, 0x7ff, 0x800, 0x801] {
            assert!(room.write(1, page).is_some());
        }
        let range = if small_first {
            pages(0x5fe, 514)
        } else {
            pages(0x600, 514)
        };
        room.unmap(range);
        room.quiet();
        room.unmap(pages(0x5fe, 516));
        room.quiet();
        room.finish();
    }
}

/// A commit interrupts each CPU that has the space once, and nobody else.
pub fn one_interrupt_for_each_cpu_that_has_the_space() {
    let room = Room::new();
    let idle = Table::new(room.env).unwrap();
    for page in 0x400..0x440 {
        room.map(page, Rights::USER_DATA);
    }
    let count = || room.env.machine.stats().interrupts;
    let before = count();
    room.unmap(pages(0x400, 3));
    assert_eq!(count() - before, 1);
    // Filling holes and adding rights tells nobody.
    let before = count();
    room.map(0x400, Rights::READ | Rights::USER);
    room.protect(pages(0x400, 1), Rights::USER_DATA);
    assert_eq!(count(), before);
    // CPU 1 leaves.
    // SAFETY: as in `Room::keeping`.
    room.env
        .machine
        .on_cpu(1, || unsafe { room.env.mmu.load_root(idle.root(), false) });
    let before = count();
    room.unmap(pages(0x400, 64));
    assert_eq!(count(), before, "CPU 1 has nothing of this space");
    room.quiet();
    // SAFETY: as in `Room::keeping`.
    room.env.machine.on_cpu(1, || unsafe {
        room.env.mmu.load_root(room.table.root(), false)
    });
    idle.destroy(|_, _| {}, |_, _| {});
    room.finish();
}

/// Global pages of a table that is nobody else's, more than are flushed one by one.
pub fn global_pages_go_with_a_wide_flush() {
    for count in [3, 40] {
        let room = Room::new();
        let range = pages(0x400, count);
        let global = Rights::USER_DATA | Rights::GLOBAL;
        for page in 0x400..0x400 + count {
            room.map(page, global);
        }
        let everybody = |expected: bool| {
            for cpu in 0..2 {
                for page in 0x400..0x400 + count {
                    assert_eq!(room.write(cpu, page).is_some(), expected, "{page:#x}");
                }
            }
        };
        everybody(true);
        room.protect(range, global.difference(Rights::WRITE));
        room.quiet();
        everybody(false);
        room.unmap(range);
        room.quiet();
        room.finish();
    }
}

/// A table that held payloads alone is freed: no page was there, and yet a CPU may have cached the way to the table.
pub fn a_table_of_payloads_is_flushed_before_it_is_freed() {
    let room = Room::new();
    let page = 0x410;
    let mut cursor = room.table.cursor(pages(page, 1)).unwrap();
    let payload = Payload::new::<X86_64>(77).unwrap();
    cursor.map_payload(at(page), payload).unwrap();
    drop(cursor);
    room.env.machine.set_adversary(Adversary {
        speculate: 1024,
        ..Adversary::OFF
    });
    for cpu in 0..2 {
        for _ in 0..32 {
            assert_eq!(room.touch(cpu, page, AccessKind::Read), None);
        }
    }
    room.env.machine.set_adversary(Adversary::OFF);
    room.unmap(pages(page, 1));
    assert_eq!(room.table.table_count(), 1);
    room.quiet();
    room.finish();
}

/// Single pages through one held cursor into one gather, upwards and downwards.
pub fn single_pages_of_one_gather_are_all_flushed() {
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]] {
        let room = Room::new();
        // The last keeps the table: with that everything is flushed.
        for page in 0..5 {
            room.map(page, Rights::USER_DATA);
            assert!(room.write(1, page).is_some());
        }
        let mut gather = room.table.gather::<4>();
        let mut cursor = room.table.cursor(pages(0, 4)).unwrap();
        for page in order {
            cursor.unmap(pages(page, 1), &mut gather).unwrap();
        }
        drop(cursor);
        gather.commit_to(&room.env.pool);
        drop(gather);
        room.quiet();
        for page in 0..4 {
            assert_eq!(room.write(1, page), None, "{page} {order:?}");
        }
        room.finish();
    }
}

/// A page of the kernel's that becomes global is under the tags of other spaces still, where a later flush of a global page does not look.
pub fn a_page_that_becomes_global_is_flushed() {
    pub(super) const KERNEL: u64 = 0xffff_8000_0000_0000 >> 12;
    let room = Room::with(Registers::LONG_PCID);
    room.table.lend_from(at(KERNEL)).unwrap();
    let mut other = Table::sharing(room.env, &room.table, at(KERNEL)).unwrap();
    other.set_asid(Asid::new(2)).unwrap();
    let load = |table: &Table| {
        // SAFETY: as in `Room::keeping`.
        room.env
            .machine
            .on_cpu(1, || unsafe { room.env.mmu.load_root(table.root(), true) });
    };
    let read = |page: u64| {
        let cpu = room.env.machine.cpu(1);
        cpu.translate(page << 12, AccessKind::Read).is_ok()
    };
    // It keeps the table: where that goes too, everything is flushed.
    room.map(KERNEL + 5, Rights::KERNEL_DATA);
    for (page, one_by_one) in [(KERNEL, false), (KERNEL + 1, true)] {
        room.map(page, Rights::KERNEL_DATA);
        load(&other);
        assert!(read(page));
        load(&room.table);
        let range = pages(page, 1);
        let rights = Rights::KERNEL_DATA | Rights::GLOBAL;
        let mut gather = room.table.gather::<1>();
        let mut cursor = room.table.cursor(range).unwrap();
        let changed = if one_by_one {
            cursor.update(range, &mut gather, |leaf| {
                Some(leaf.attributes.rights(rights))
            })
        } else {
            cursor.protect(range, rights, &mut gather)
        };
        assert_eq!(changed, Ok(1));
        drop(cursor);
        gather.commit(drop);
        drop(gather);
        room.unmap(range);
        room.quiet();
        load(&other);
        assert!(!read(page));
        load(&room.table);
    }
    other.destroy(|_, _| {}, |_, _| {});
    // A lender stays for ever, and its environment with it: `room` is not taken down.
}
