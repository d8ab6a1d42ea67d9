// What tables hold that are made anew, or of which a part is filled: zeros and nothing else; and payloads whole or not at all.

use kmem_hal::{FrameRequest, FrameSink, FrameSource, Order, OwnedFrame, PageRange};
use kmem_mock_x86::Registers;
use kmem_paging::format::{X86_64, X86TwoLevel};
use kmem_paging::{
    Attributes, ChangeError, Entry, ForkStep, MapError, PageTable, Payload, Rights, TableCache,
};

use super::super::hostile_env::HostileEnv;
use super::super::modes::Kind;
use super::room::Room;
use super::{Table, at, pages};

/// A table that was used and freed is empty when it is used again, whoever had its frame meanwhile.
pub fn a_table_starts_empty() {
    let room = Room::new();
    for round in 0..4 {
        // Frames full of what looks like entries, freed again.
        let frames: Vec<_> = (0..8).map(|_| room.alloc(Order::ZERO)).collect();
        for frame in frames {
            for word in 0..512 {
                let address = (frame.first().number() << 12) + word * 8;
                assert!(room.env.machine.memory().store(address, 8, 0x7fff_f067));
            }
            room.env.pool.free(frame);
        }
        let page = 0x400 + (round << 18);
        let frame = room.map(page, Rights::USER_DATA);
        assert_eq!(room.write(0, page), Some(frame));
        for other in [page + 1, page + 0x200, page + 0x1ff] {
            assert_eq!(room.write(0, other), None);
            assert_eq!(room.table.query(at(other)), kmem_paging::Entry::Empty);
        }
        room.unmap(pages(page, 1));
    }
    room.finish();
}

/// A range that ends in the middle of a table which a whole one was begun for, in frames full of other things.
pub fn a_table_built_in_part_is_empty_behind() {
    let room = Room::new();
    let frames: Vec<_> = (0..600).map(|_| room.alloc(Order::ZERO)).collect();
    for frame in frames {
        for word in 0..512 {
            let address = (frame.first().number() << 12) + word * 8;
            assert!(room.env.machine.memory().store(address, 8, 0x7fff_f067));
        }
        room.env.pool.free(frame);
    }
    // The table of the second level is there already, so that the new one is written whole.
    room.map(0x400, Rights::USER_DATA);
    for given in [0u64, 1, 100, 511] {
        let all = pages(0x800, 512);
        let mut left = given;
        let mut cursor = room.table.cursor(all).unwrap();
        let result = cursor.map_range(all, Order::ZERO, Rights::USER_DATA, |_, _| {
            left = left.checked_sub(1)?;
            room.env.pool.alloc(&FrameRequest::ONE).ok()
        });
        drop(cursor);
        assert_eq!(result.unwrap_err().at, at(0x800 + given));
        for page in 0..512 {
            let leaf = room.table.query(at(0x800 + page)).leaf();
            assert_eq!(leaf.is_some(), page < given, "{page}");
            assert_eq!(room.write(1, 0x800 + page).is_some(), page < given);
        }
        for chunk in (0..512).step_by(128) {
            room.unmap(pages(0x800 + chunk, 128));
        }
        room.quiet();
        assert_eq!(room.table.table_count(), 4);
    }
    room.finish();
}

/// A payload that was made for a format with more room is refused, wherever it may go in, and never cut off.
pub fn a_payload_of_a_wider_format_is_refused() {
    let room = Room::new();
    let wide = Payload::new::<X86_64>(1 << 40 | 5).unwrap();
    let narrow = Payload::new::<X86TwoLevel>(5).unwrap();
    let table = PageTable::<X86TwoLevel, _, OwnedFrame>::new(room.env).unwrap();
    let page = at(0x400);
    let mut gather = table.gather::<1>();
    let mut cursor = table.cursor(pages(0x400, 1)).unwrap();
    assert_eq!(cursor.map_payload(page, wide), Err(MapError::Unencodable));
    assert_eq!(cursor.query(page), Entry::Empty);
    cursor.map_payload(page, narrow).unwrap();
    let refused = Err(ChangeError::Unencodable { at: page });
    assert_eq!(cursor.set_payload(page, wide, &mut gather), refused);
    assert!(!cursor.clear_shared(page, wide));
    let attributes = Attributes::new(Rights::USER_DATA);
    let frame = cursor
        .restore(page, wide, room.alloc(Order::ZERO), attributes)
        .unwrap_err();
    assert_eq!(cursor.query(page), Entry::Payload(narrow));
    let number = frame.first();
    cursor.restore(page, narrow, frame, attributes).unwrap();
    // SAFETY: nothing is taken.
    assert!(unsafe { cursor.take_shared(page, number, Some(wide)) }.is_none());
    assert!(cursor.query(page).leaf().is_some());
    drop(cursor);
    drop(gather);
    table.destroy(|_, frame| room.env.pool.free(frame), |_, _| {});
    room.finish();
}

/// L1TF: the words of pages that are not there, or that nobody may access, name no memory that the machine has.
pub fn absent_words_name_no_memory() {
    let room = Room::new();
    let range = pages(0x400, 2);
    let mut cursor = room.table.cursor(range).unwrap();
    let payload = Payload::new::<X86_64>(5).unwrap();
    cursor.map_payload(at(0x400), payload).unwrap();
    let attributes = Attributes::new(Rights::empty());
    let frame = room.alloc(Order::ZERO);
    cursor.map(at(0x401), frame, attributes).unwrap();
    drop(cursor);
    for page in [0x400, 0x401] {
        let path = room.table.path(at(page));
        let word = path.steps().last().unwrap().word;
        assert_eq!(word & 1, 0, "present");
        let named = word >> 12 & ((1 << 40) - 1);
        assert!(
            named >= room.env.machine.memory().frame_limit(),
            "{word:#x}"
        );
    }
    room.unmap(range);
    room.finish();
}

/// Roots and tables that go back to the cache hold zeros, as those that come from there are taken to do.
pub fn what_the_cache_keeps_is_empty() {
    const KERNEL: u64 = 0xffff_8000_0000_0000 >> 12;
    // All tables of a space: the root, the one for user mode, and nine below.
    const KEPT: usize = 11;
    let room = Room::<X86_64>::keeping(Registers::LONG, KEPT + 1);
    room.env.mmu.isolates.set(true);
    let trampoline = Table::new(room.env).unwrap();
    for lender in [&room.table, &trampoline] {
        lender.lend_from(at(KERNEL)).unwrap();
    }
    // Nothing is kept so far but what making the tables left.
    TableCache::shrink(&room.env, usize::MAX);
    for _ in 0..2 {
        let table = Table::isolated(room.env, &room.table, &trampoline, at(KERNEL)).unwrap();
        for top in 0..3 {
            let frame = room.alloc(Order::ZERO);
            let page = at(top << 27 | 0x400);
            let mut cursor = table.cursor(PageRange::single(page)).unwrap();
            cursor.map(page, frame, Rights::USER_DATA).unwrap();
        }
        assert_eq!(table.table_count(), 10);
        table.destroy(|_, frame| room.free(frame), |_, _| {});
        assert_eq!(room.env.cache.length(), KEPT);
        let tables: Vec<_> = (0..KEPT).map(|_| Table::new(room.env).unwrap()).collect();
        assert_eq!(room.env.cache.length(), 0);
        for table in tables {
            let root = table.root().frame.start().as_u64();
            let load = |index: u64| room.env.machine.memory().load(root + index * 8, 8);
            assert!((0..512).all(|index| load(index) == Some(0)));
            table.destroy(|_, _| {}, |_, _| {});
        }
        TableCache::shrink(&room.env, usize::MAX);
    }
    // Lenders stay for ever, and their environment with them: `room` is not taken down.
}

/// Lending less takes nothing back: other spaces may borrow all of it, and none of them changes it, by whatever way.
pub fn what_was_lent_stays_lent() {
    const KERNEL: u64 = 0xffff_8000_0000_0000 >> 12;
    let room = Room::new();
    room.table.lend_from(at(KERNEL)).unwrap();
    room.table.lend_from(at(KERNEL + (1 << 27))).unwrap();
    room.map(KERNEL, Rights::KERNEL_DATA);
    let space = Table::sharing(room.env, &room.table, at(KERNEL)).unwrap();
    let child = Table::empty_like(room.env, &space).unwrap();
    for table in [&space, &child] {
        assert!(table.query(at(KERNEL)).leaf().is_some());
        assert!(table.lock_entry(at(KERNEL)).is_none(), "it is the lender's");
        assert!(table.cursor(pages(KERNEL, 1)).is_err());
    }
    child.destroy(|_, _| {}, |_, _| {});
    space.destroy(|_, _| {}, |_, _| {});
    // Lenders stay for ever, and their environment with them: `room` is not taken down.
}

/// Where a top entry leads to a leaf table, that one stays when all of it is unmapped: other roots lead there.
pub fn a_lent_leaf_table_stays() {
    const KERNEL: u64 = 3 << 18;
    let room = Room::<X86TwoLevel>::of(Kind::TwoLevel.registers());
    room.table.lend_from(at(KERNEL)).unwrap();
    let all = pages(KERNEL, 1 << 10);
    let tables = room.table.table_count();
    for _ in 0..2 {
        for page in KERNEL..KERNEL + 64 {
            room.map(page, Rights::KERNEL_DATA);
        }
        let space = PageTable::<X86TwoLevel, &'static HostileEnv, OwnedFrame>::sharing(
            room.env,
            &room.table,
            at(KERNEL),
        )
        .unwrap();
        // A fork of the lent part beside it.
        let child =
            PageTable::<X86TwoLevel, &'static HostileEnv, OwnedFrame>::new(room.env).unwrap();
        let mut gather = room.table.gather::<4>();
        // SAFETY: no cursor is open, and nobody runs before the commit.
        let forked = unsafe {
            room.table
                .fork_sharing(&child, all, 1, &mut gather, |_| ForkStep::Skip)
        };
        assert_eq!(forked.ok(), Some(0));
        gather.commit(drop);
        drop(gather);
        room.unmap(all);
        assert_eq!(room.table.table_count(), tables);
        room.map(KERNEL + 7, Rights::KERNEL_DATA);
        assert!(space.query(at(KERNEL + 7)).leaf().is_some());
        room.unmap(all);
        child.destroy(|_, _| {}, |_, _| {});
        space.destroy(|_, _| {}, |_, _| {});
    }
}
