// Single situations that a random run meets rarely, each on a machine that forgets nothing.
use kmem_hal::{
    Asid, Frame, FrameRequest, FrameSink, FrameSource, Mmu, Order, OwnedFrame, Page, PageRange,
};
use kmem_mock_x86::{AccessKind, Adversary, Machine, MemoryMap, Registers};
use kmem_paging::format::{Format, X86_64, X86TwoLevel};
use kmem_paging::{
    Attributes, ChangeError, Entry, ForkItem, ForkStep, Gather, Harvest, MapError, PageTable,
    Payload, Rights, RootKnown, TableCache,
};

use super::hostile_env::HostileEnv;

#[path = "directed_absent.rs"]
mod absent;
#[path = "directed_sharing.rs"]
mod sharing;

type Table = PageTable<X86_64, &'static HostileEnv, OwnedFrame>;

fn at(page: u64) -> Page {
    Page::new(page).unwrap()
}

fn pages(first: u64, count: u64) -> PageRange {
    PageRange::with_count(at(first), count).unwrap()
}

/// A machine in plain mode, with two CPUs in one space.
struct Room<F: Format = X86_64> {
    env: &'static HostileEnv,
    table: PageTable<F, &'static HostileEnv, OwnedFrame>,
}

impl Room {
    fn new() -> Self {
        Self::with(Registers::LONG)
    }

    fn with(registers: Registers) -> Self {
        Self::of(registers)
    }
}

impl<F: Format> Room<F> {
    fn of(registers: Registers) -> Self {
        Self::keeping(registers, 0)
    }

    /// With a cache of this many emptied tables.
    fn keeping(registers: Registers, cache: usize) -> Self {
        let machine = Machine::builder()
            .memory(MemoryMap::pc(32 << 20))
            .cpus(2)
            .registers(registers)
            .adversary(Adversary::OFF)
            .caching(std::env::var_os("KMEM_MOCK_WITHOUT_TLB").is_none())
            .caches_absent(F::CACHES_ABSENT)
            .watch_kernel(true)
            .build()
            .unwrap();
        let env = HostileEnv::new(machine, 0x400, cache);
        let mut table = PageTable::new(env).unwrap();
        if registers == Registers::LONG_PCID {
            table.set_asid(Asid::new(1)).unwrap();
        }
        for cpu in 0..2 {
            // SAFETY: the machine runs no code from these tables, and they are taken down after the last access.
            env.machine
                .on_cpu(cpu, || unsafe { env.mmu.load_root(table.root(), false) });
        }
        Self { env, table }
    }

    fn alloc(&self, order: Order) -> OwnedFrame {
        self.env.pool.alloc(&FrameRequest::new(order)).unwrap()
    }

    fn free(&self, frame: OwnedFrame) {
        self.env.pool.free(frame);
    }

    fn map(&self, page: u64, rights: Rights) -> u64 {
        let frame = self.alloc(Order::ZERO);
        let number = frame.first().number();
        let mut cursor = self.table.cursor(pages(page, 1)).unwrap();
        cursor.map(at(page), frame, rights).unwrap();
        number
    }

    fn touch(&self, cpu: usize, page: u64, kind: AccessKind) -> Option<u64> {
        let cpu = self.env.machine.cpu(cpu).user();
        let seen = cpu.translate(page << 12, kind);
        seen.ok().map(|address| address >> 12)
    }

    fn write(&self, cpu: usize, page: u64) -> Option<u64> {
        self.touch(cpu, page, AccessKind::Write)
    }

    fn unmap(&self, range: PageRange) {
        let mut gather = self.table.gather::<256>();
        self.table
            .cursor(range)
            .unwrap()
            .unmap(range, &mut gather)
            .unwrap();
        gather.commit_to(&self.env.pool);
    }

    fn quiet(&self) {
        let stale = self.env.machine.audit(0, u64::MAX);
        assert!(stale.is_empty(), "{}", stale[0]);
    }

    fn finish(self) {
        let Self { env, table } = self;
        let idle = PageTable::<F, _, OwnedFrame>::new(env).unwrap();
        for cpu in 0..2 {
            // SAFETY: as in `new`.
            env.machine
                .on_cpu(cpu, || unsafe { env.mmu.load_root(idle.root(), false) });
        }
        table.destroy(|_, frame| env.pool.free(frame), |_, _| {});
        idle.destroy(|_, _| {}, |_, _| {});
        TableCache::shrink(&env, usize::MAX);
        assert_eq!(env.pool.in_use(), 0, "frames leaked");
        // SAFETY: nothing of this environment is left.
        unsafe { env.retire() };
    }
}

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
    // A change that looks twice.
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
    assert!(leaf().attributes.dirty && leaf().attributes.accessed && !leaf().is_writable());
    // The same with a page that was accessed before and is clean: only D is still to come.
    for first in [AccessKind::Read, AccessKind::Write] {
        let mut cursor = room.table.cursor(range).unwrap();
        cursor
            .protect(range, Rights::USER_DATA, &mut gather)
            .unwrap();
        drop(cursor);
        gather.commit(drop);
        clean();
        room.touch(0, 0x400, first);
        let mut cursor = room.table.cursor(range).unwrap();
        cursor
            .harvest(range, Harvest::DIRTY, &mut gather, |_| {})
            .unwrap();
        drop(cursor);
        gather.commit(drop);
        let mut looks = 0;
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
        assert!(leaf().attributes.dirty, "a write while D was clear");
    }
    // Forking asks once, and a CPU writes while it does.
    let mut cursor = room.table.cursor(range).unwrap();
    cursor
        .protect(range, Rights::USER_DATA, &mut gather)
        .unwrap();
    drop(cursor);
    gather.commit(drop);
    clean();
    let child = Table::new(room.env).unwrap();
    room.table
        .fork_into(&child, range, &mut gather, |item| {
            let ForkItem::Leaf(leaf) = item else {
                return ForkStep::Stop;
            };
            assert!(!leaf.attributes.dirty);
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
    assert!(leaf().attributes.dirty && !leaf().is_writable());
    child.destroy(|_, frame| room.env.pool.free(frame), |_, _| {});
    room.finish();
}

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
        let mut gather = room.table.gather::<1>();
        let mut cursor = room.table.cursor(range).unwrap();
        cursor
            .protect(range, Rights::READ | Rights::USER, &mut gather)
            .unwrap();
        drop(cursor);
        gather.commit(drop);
        room.quiet();
        everybody(false);
        let mut cursor = room.table.cursor(range).unwrap();
        cursor
            .protect(range, Rights::USER_DATA, &mut gather)
            .unwrap();
        drop(cursor);
        gather.commit(drop);
        drop(gather);
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
    let mut gather = room.table.gather::<1>();
    let mut cursor = room.table.cursor(pages(0x400, 1)).unwrap();
    cursor
        .protect(pages(0x400, 1), Rights::USER_DATA, &mut gather)
        .unwrap();
    drop(cursor);
    gather.commit(drop);
    drop(gather);
    assert_eq!(count(), before);
    // CPU 1 leaves.
    // SAFETY: as in `new`.
    room.env
        .machine
        .on_cpu(1, || unsafe { room.env.mmu.load_root(idle.root(), false) });
    let before = count();
    room.unmap(pages(0x400, 64));
    assert_eq!(count(), before, "CPU 1 has nothing of this space");
    room.quiet();
    // SAFETY: as in `new`.
    room.env.machine.on_cpu(1, || unsafe {
        room.env.mmu.load_root(room.table.root(), false)
    });
    idle.destroy(|_, _| {}, |_, _| {});
    room.finish();
}

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
        let mut gather = room.table.gather::<1>();
        let mut cursor = room.table.cursor(range).unwrap();
        cursor
            .protect(range, global.difference(Rights::WRITE), &mut gather)
            .unwrap();
        drop(cursor);
        gather.commit(drop);
        room.quiet();
        everybody(false);
        drop(gather);
        room.unmap(range);
        room.quiet();
        room.finish();
    }
}

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
    const KERNEL: u64 = 0xffff_8000_0000_0000 >> 12;
    let room = Room::with(Registers::LONG_PCID);
    room.table.lend_from(at(KERNEL)).unwrap();
    let mut other = Table::sharing(room.env, &room.table, at(KERNEL)).unwrap();
    other.set_asid(Asid::new(2)).unwrap();
    let load = |table: &Table| {
        // SAFETY: as in `new`.
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

/// Every situation of this file.
pub const ALL: &[(&str, fn())] = &[
    ("bits set meanwhile are kept", bits_set_meanwhile_are_kept),
    (
        "a reserve outlives its neighbours",
        a_reserve_outlives_its_neighbours,
    ),
    ("a reserve is not too large", a_reserve_is_not_too_large),
    (
        "a moved frame outlives its old page",
        a_moved_frame_outlives_its_old_page,
    ),
    (
        "a forgotten gather is only a leak",
        a_forgotten_gather_is_only_a_leak,
    ),
    (
        "wide changes are flushed to their ends",
        wide_changes_are_flushed_to_their_ends,
    ),
    (
        "a huge and a small leaf are both flushed",
        a_huge_and_a_small_leaf_are_both_flushed,
    ),
    (
        "a gigabyte is cut down to a page",
        a_gigabyte_is_cut_down_to_a_page,
    ),
    (
        "a moved page is there though absence is cached",
        absent::a_moved_page_is_there_though_absence_is_cached,
    ),
    (
        "a replaced page is there though absence is cached",
        absent::a_replaced_page_is_there_though_absence_is_cached,
    ),
    (
        "a shared table is not merged",
        sharing::a_shared_table_is_not_merged,
    ),
    (
        "a table with pins is not merged",
        sharing::a_table_with_pins_is_not_merged,
    ),
    (
        "global pages of a shared table are flushed",
        sharing::global_pages_of_a_shared_table_are_flushed,
    ),
    (
        "tables below a shared one are counted",
        sharing::tables_below_a_shared_one_are_counted,
    ),
    (
        "a fork cuts huge leaves at its ends",
        sharing::a_fork_cuts_huge_leaves_at_its_ends,
    ),
    (
        "a table built below the top is in both roots",
        sharing::a_table_built_below_the_top_is_in_both_roots,
    ),
    (
        "a merge joins what its parts knew",
        a_merge_joins_what_its_parts_knew,
    ),
    (
        "one interrupt for each CPU that has the space",
        one_interrupt_for_each_cpu_that_has_the_space,
    ),
    (
        "single pages of one gather are all flushed",
        single_pages_of_one_gather_are_all_flushed,
    ),
    (
        "a page that becomes global is flushed",
        a_page_that_becomes_global_is_flushed,
    ),
    ("a page in each table", a_page_in_each_table),
    (
        "a change from outside is nobody else's",
        a_change_from_outside_is_nobody_elses,
    ),
    ("a loaded table keeps its tag", a_loaded_table_keeps_its_tag),
    (
        "a new table waits for emptied ones",
        a_new_table_waits_for_emptied_ones,
    ),
    (
        "a gather in place is committed",
        a_gather_in_place_is_committed,
    ),
    (
        "a payload of a wider format is refused",
        a_payload_of_a_wider_format_is_refused,
    ),
    ("a table starts empty", a_table_starts_empty),
    (
        "global pages go with a wide flush",
        global_pages_go_with_a_wide_flush,
    ),
    (
        "a held cursor does all that others do",
        a_held_cursor_does_all_that_others_do,
    ),
    (
        "a locked entry does all that a cursor does",
        a_locked_entry_does_all_that_a_cursor_does,
    ),
    (
        "a table built in part is empty behind",
        a_table_built_in_part_is_empty_behind,
    ),
    (
        "a table of payloads is flushed before it is freed",
        a_table_of_payloads_is_flushed_before_it_is_freed,
    ),
    (
        "a merge wants frames in order",
        a_merge_wants_frames_in_order,
    ),
    (
        "a move without memory moves nothing",
        a_move_without_memory_moves_nothing,
    ),
    (
        "a fork without memory changes nothing",
        a_fork_without_memory_changes_nothing,
    ),
];
