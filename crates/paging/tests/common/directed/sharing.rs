// Tables that several spaces share, and what is like them: huge leaves, pins, isolated roots.
use kmem_hal::{DeviceFrame, Frame, Mmu, Order, OwnedFrame, Page};
use kmem_mock_x86::AccessKind;
use kmem_paging::format::X86_64;
use kmem_paging::{ForkError, ForkItem, ForkStep, HugeError, PageTable, Rights, UnshareStep};

use super::super::hostile_env::HostileEnv;
use super::room::Room;
use super::{Table, at, pages};

/// A block of frames that are not there: nobody reads them.
const BASE: u64 = 5 << 18;

impl Room {
    /// Maps a block of memory that is not there as 512 leaves of the next smaller size.
    fn map_parts(&self, first: u64, order: Order) {
        // SAFETY: nobody else has these frames, and nobody reads them.
        let block = unsafe { OwnedFrame::from_raw(Frame::from_number(BASE), order) };
        let mut cursor = self.table.cursor(pages(first, order.frames())).unwrap();
        cursor.map(at(first), block, Rights::USER_DATA).unwrap();
        let mut gather = self.table.gather::<1>();
        cursor.split(at(first), &mut gather).unwrap();
        drop(cursor);
        gather.commit(drop);
    }

    /// A child that shares every table of the range.
    pub(super) fn fork(&self, first: u64, count: u64, most: usize) -> Table {
        let child = Table::empty_like(self.env, &self.table).unwrap();
        let mut gather = self.table.gather::<4>();
        // SAFETY: no cursor is open, and nobody runs before the commit.
        let outcome = unsafe {
            let range = pages(first, count);
            self.table
                .fork_sharing(&child, range, most, &mut gather, |_| ForkStep::Stop)
        };
        outcome.unwrap();
        gather.commit(drop);
        drop(gather);
        child
    }

    fn load(&self, table: &Table) {
        for cpu in 0..2 {
            // SAFETY: as in `Room::keeping`.
            self.env.machine.on_cpu(cpu, || unsafe {
                self.env.mmu.load_root(table.root(), false)
            });
        }
    }
}

/// Takes all of a range out; gives how many frames came free.
pub(super) fn empty(table: &Table, first: u64, count: u64) -> u64 {
    let mut gather = table.gather::<512>();
    let range = pages(first, count);
    table
        .cursor(range)
        .unwrap()
        .unmap(range, &mut gather)
        .unwrap();
    let mut frames: u64 = 0;
    gather.commit(|frame| frames += frame.into_raw().1.frames());
    frames
}

fn merge(table: &Table, first: u64, order: Order) -> Result<(), HugeError> {
    let mut gather = table.gather::<1>();
    let mut cursor = table.cursor(pages(first, order.frames())).unwrap();
    let outcome = cursor.merge(at(first), order, &mut gather);
    drop(cursor);
    gather.commit(drop);
    outcome
}

/// A table that another space has too is not merged away; once it is the space's alone it is, and can be written to.
pub fn a_shared_table_is_not_merged() {
    const FIRST: u64 = 1 << 18;
    for (order, most) in [(Order::HUGE_2M, 1), (Order::HUGE_1G, 2)] {
        let room = Room::new();
        room.map_parts(FIRST, order);
        assert!(room.write(0, FIRST + 3).is_some());
        let child = room.fork(FIRST, order.frames(), most);
        assert_eq!(merge(&room.table, FIRST, order), Err(HugeError::Shared));
        assert_eq!(merge(&child, FIRST, order), Err(HugeError::Shared));
        room.quiet();
        for table in [&room.table, &child] {
            let leaf = table.query(at(FIRST + 3)).leaf().unwrap();
            assert_eq!(leaf.frame_of(at(FIRST + 3)).unwrap().number(), BASE + 3);
            assert!(leaf.order < order && !leaf.is_writable());
        }
        assert_eq!(room.write(1, FIRST + 3), None);
        assert_eq!(empty(&child, FIRST, order.frames()), 0, "a share");
        assert_eq!(merge(&room.table, FIRST, order), Ok(()));
        room.quiet();
        assert_eq!(room.write(1, FIRST + 3), Some(BASE + 3));
        assert_eq!(room.table.query(at(FIRST)).leaf().unwrap().order, order);
        child.destroy(|_, _| panic!("it has nothing"), |_, _| {});
        assert_eq!(empty(&room.table, FIRST, order.frames()), order.frames());
        assert_eq!(room.table.table_count(), 1);
        room.finish();
    }
}

/// Pins are counted in leaf tables, so a table that has some stays.
pub fn a_table_with_pins_is_not_merged() {
    let room = Room::new();
    room.map_parts(0x400, Order::HUGE_2M);
    let mut cursor = room.table.cursor(pages(0x400, 512)).unwrap();
    cursor.add_pins(at(0x407), 2).unwrap();
    drop(cursor);
    let merge = || merge(&room.table, 0x400, Order::HUGE_2M);
    assert_eq!(merge(), Err(HugeError::NotPossible));
    let mut cursor = room.table.cursor(pages(0x400, 512)).unwrap();
    cursor.sub_pins(at(0x407), 2);
    drop(cursor);
    assert_eq!(merge(), Ok(()));
    assert_eq!(empty(&room.table, 0x400, 512), 512);
    room.finish();
}

/// Pages that were global in the parent are global in the child, and go with the table that both shared.
pub fn global_pages_of_a_shared_table_are_flushed() {
    let room = Room::new();
    for page in 0x400..0x440 {
        room.map(page, Rights::USER_DATA | Rights::GLOBAL);
    }
    let child = room.fork(0x400, 512, 1);
    // The child is the only one left.
    room.unmap(pages(0x400, 512));
    room.load(&child);
    for page in 0x400..0x440 {
        assert!(room.touch(1, page, AccessKind::Read).is_some());
    }
    let mut gather = child.gather::<4>();
    let mut cursor = child.cursor(pages(0x400, 512)).unwrap();
    assert_eq!(cursor.unmap(pages(0x400, 512), &mut gather), Ok(64));
    drop(cursor);
    gather.commit_to(&room.env.pool);
    drop(gather);
    room.quiet();
    for page in 0x400..0x440 {
        assert_eq!(room.touch(1, page, AccessKind::Read), None);
    }
    room.load(&room.table);
    child.destroy(|_, _| {}, |_, _| {});
    room.finish();
}

/// Tables below a shared one are counted by both sides, and huge leaves are no tables.
pub fn tables_below_a_shared_one_are_counted() {
    const FIRST: u64 = 1 << 18;
    let room = Room::new();
    // SAFETY: as in `map_parts`.
    let block = unsafe { OwnedFrame::from_raw(Frame::from_number(BASE), Order::HUGE_2M) };
    let mut cursor = room.table.cursor(pages(FIRST, 512)).unwrap();
    cursor.map(at(FIRST), block, Rights::USER_DATA).unwrap();
    drop(cursor);
    for page in [FIRST + 512, FIRST + 1024] {
        // SAFETY: as in `map_parts`.
        let frame = unsafe { OwnedFrame::from_raw(Frame::from_number(BASE + page), Order::ZERO) };
        let mut cursor = room.table.cursor(pages(page, 1)).unwrap();
        cursor.map(at(page), frame, Rights::USER_DATA).unwrap();
    }
    let tables = room.table.table_count();
    assert_eq!(tables, 5);
    let child = room.fork(FIRST, 1 << 18, 2);
    assert_eq!(child.table_count(), tables);
    assert_eq!(empty(&room.table, FIRST, 1 << 18), 0, "a share");
    assert_eq!(room.table.table_count(), 1);
    assert_eq!(empty(&child, FIRST, 1 << 18), 514);
    assert_eq!(child.table_count(), 1);
    child.destroy(|_, _| {}, |_, _| {});
    room.finish();
}

/// A page that a copy leaves out is gone for every CPU of its space, however far it lies from the page that asked for the copy: the
/// other side may free it without a word to this one.
pub fn what_a_copy_leaves_out_is_flushed() {
    let room = Room::new();
    let (kept, left_out) = (0x400, 0x5ff);
    let frames = [kept, left_out].map(|page| room.map(page, Rights::USER_DATA));
    let child = room.fork(0x400, 512, 1);
    room.load(&child);
    for (page, frame) in [kept, left_out].into_iter().zip(frames) {
        assert_eq!(room.touch(1, page, AccessKind::Read), Some(frame));
    }
    let mut gather = child.gather::<1>();
    let copied = child.cursor(pages(0x400, 512)).unwrap().unshare(
        at(kept),
        &mut gather,
        |item| match item {
            ForkItem::Leaf(leaf) if leaf.page == at(kept) => {
                // SAFETY: O1 to O3: the child's reference, which is forgotten when it is unmapped.
                let again = unsafe { OwnedFrame::from_raw(leaf.frame, leaf.order) };
                UnshareStep::Protected(again)
            }
            _ => UnshareStep::Skip,
        },
        |_| {},
    );
    assert_eq!(copied, Ok(true));
    gather.commit(drop);
    drop(gather);
    room.quiet();
    assert_eq!(room.touch(1, left_out, AccessKind::Read), None);
    assert_eq!(room.touch(1, kept, AccessKind::Read), Some(frames[0]));
    // The parent, which is alone with the page, unmaps and frees it.
    room.unmap(pages(left_out, 1));
    room.quiet();
    assert_eq!(empty(&child, 0x400, 512), 1);
    room.load(&room.table);
    child.destroy(|_, _| panic!("it has nothing"), |_, _| {});
    room.unmap(pages(kept, 1));
    room.finish();
}

/// What a range has of a huge leaf is copied, and no more.
pub fn a_fork_cuts_huge_leaves_at_its_ends() {
    let room = Room::new();
    let block = room.alloc(Order::HUGE_2M);
    let base = block.first().number();
    let mut cursor = room.table.cursor(pages(0x400, 512)).unwrap();
    cursor.map(at(0x400), block, Rights::USER_DATA).unwrap();
    drop(cursor);
    assert!(room.write(1, 0x4ff).is_some());
    let child = Table::empty_like(room.env, &room.table).unwrap();
    let fork = || {
        let mut gather = room.table.gather::<1>();
        let outcome = room
            .table
            .fork_into(&child, pages(0x480, 0x80), &mut gather, |item| {
                let ForkItem::Leaf(leaf) = item else {
                    return ForkStep::Skip;
                };
                ForkStep::Leaf {
                    handle: room.alloc(leaf.order),
                    child: leaf.attributes.write_protected(),
                    parent: Some(leaf.attributes.write_protected()),
                }
            });
        gather.commit(drop);
        outcome
    };
    for fuse in 0..4 {
        room.env.pool.set_fuse(Some(fuse));
        assert!(matches!(fork(), Err((ForkError::Memory(_), None))));
        room.env.pool.set_fuse(None);
        assert_eq!((room.table.table_count(), child.table_count()), (3, 1));
    }
    assert_eq!(fork().ok(), Some(0x80));
    room.quiet();
    for page in 0x400..0x600 {
        let inside = (0x480..0x500).contains(&page);
        let parent = room.table.query(at(page)).leaf().unwrap();
        assert_eq!(parent.frame.number(), base + page - 0x400);
        assert_eq!(parent.is_writable(), !inside);
        assert_eq!(child.query(at(page)).leaf().is_some(), inside);
        assert_eq!(room.write(1, page).is_some(), !inside);
    }
    child.destroy(|_, frame| room.free(frame), |_, _| {});
    room.unmap(pages(0x400, 256));
    room.unmap(pages(0x500, 256));
    room.finish();
}

/// A table of 1 GiB leaves that is built whole below the top: user mode has it too.
pub fn a_table_built_below_the_top_is_in_both_roots() {
    const KERNEL: u64 = 0xffff_8000_0000_0000 >> 12;
    const FIRST: u64 = 3 << 27;
    let room = Room::new();
    // No CPU loads the user root.
    room.env.mmu.isolates.set(true);
    let trampoline = Table::new(room.env).unwrap();
    for lender in [&room.table, &trampoline] {
        lender.lend_from(at(KERNEL)).unwrap();
    }
    let table = PageTable::<X86_64, &'static HostileEnv, DeviceFrame>::isolated(
        room.env,
        &room.table,
        &trampoline,
        at(KERNEL),
    )
    .unwrap();
    let words = |root: u64| {
        let load = |index: u64| room.env.machine.memory().load((root << 12) + index * 8, 8);
        (0..256).map(load).collect::<Vec<_>>()
    };
    let root = table.root().frame.number();
    let range = pages(FIRST, 1 << 27);
    let next = |page: Page, _| {
        let frame = Frame::from_number(page.number() - FIRST);
        DeviceFrame::new(frame, Order::HUGE_1G)
    };
    let mut cursor = table.cursor(range).unwrap();
    cursor
        .map_range(range, Order::HUGE_1G, Rights::USER_DATA, next)
        .unwrap();
    cursor.release();
    assert_ne!(words(root)[3], Some(0));
    assert_eq!(words(root), words(root + 1), "mapped");
    let mut gather = table.gather::<512>();
    cursor.unmap(range, &mut gather).unwrap();
    cursor.release();
    assert_eq!(words(root), words(root + 1), "unmapped");
    drop((cursor, gather));
    table.destroy(|_, _| {}, |_, _| {});
    // Lenders stay for ever, and their environment with them: `room` is not taken down.
}
