//! Tables shared at fork: several spaces held against flat maps of their pages, and every reference counted.
//!
//! Random runs and single situations; the spaces and what is done to them are in `world.rs` and `changes.rs`, the references in `refs.rs`.

#![cfg(not(loom))]

#[path = "../common/altered.rs"]
mod altered;
#[path = "../common/machine.rs"]
mod machine;

mod changes;
mod refs;
mod world;

use altered::Altered;
use kmem_hal::Order;
use kmem_paging::format::{Format, X86_64};
use kmem_paging::{
    Attributes, ChangeError, ForkError, ForkItem, ForkStep, Harvest, Harvested, PageTable, Payload,
    Rights, TableCache, TableError, UnshareError, UnshareStep,
};
use machine::Machine;
use proptest::prelude::*;

use refs::{COUNTS, Ref};
use world::{ALL, FIRST, PAGES, PAYLOAD, Space, Table, World, page, span};

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn spaces_that_share_tables_agree_with_flat_maps(codes in prop::collection::vec(any::<[u8; 4]>(), 1..40)) {
        let mut world = World::new();
        // Something to share from the beginning.
        world.map(0, FIRST, 1400);
        for code in codes {
            world.step(code);
            world.compare();
        }
        world.finish();
    }
}

#[test]
fn a_table_is_copied_once_and_handed_over_without_a_copy() {
    let mut world = World::new();
    world.map(0, FIRST, 1024);
    let tables = world.machine.frames.out();
    world.fork(0, 1, FIRST, PAGES);
    assert_eq!(
        world.machine.frames.out() - tables,
        3,
        "the child has a root and two upper tables"
    );
    let handles = COUNTS.with_borrow(|counts| counts.values().sum::<u32>());
    assert_eq!(handles, 1024, "a shared table counts once");
    let leaf = world.spaces[1].table.query(page(FIRST)).leaf().unwrap();
    assert!(!leaf.attributes.rights.contains(Rights::WRITE));
    // Neither side changes it.
    for space in 0..2 {
        let table = &world.spaces[space].table;
        let mut gather = table.gather::<1>();
        let outcome = table.cursor(span(FIRST, 1)).unwrap().protect(
            span(FIRST, 1),
            Rights::READ | Rights::USER,
            &mut gather,
        );
        assert_eq!(outcome, Err(ChangeError::Shared { at: page(FIRST) }));
    }
    world.write(1, FIRST + 1);
    world.write(0, FIRST + 2);
    assert_eq!(world.copies, 1, "the second to write is alone");
    world.exit(1);
    world.write(0, FIRST + 600);
    assert_eq!(world.copies, 1, "handed over");
    assert_eq!(world.spaces[0].table.table_count(), 5);
    world.finish();
}

#[test]
fn a_level_two_table_is_shared_and_copied_in_two_steps() {
    let mut world = World::new();
    world.map(0, FIRST, 1500);
    world.fork(0, 2, FIRST - FIRST % ALL, ALL);
    world.fork(1, 2, FIRST - FIRST % ALL, ALL);
    world.compare();
    world.write(2, FIRST);
    world.write(1, FIRST + 512);
    world.write(0, FIRST + 1024);
    world.compare();
    assert!(world.copies >= 2);
    world.finish();
}

#[test]
fn a_copy_without_memory_or_references_changes_nothing() {
    let mut world = World::new();
    world.map(0, FIRST, 600);
    world.fork(0, 1, FIRST, PAGES);
    let table = &world.spaces[1].table;
    let mut gather = table.gather::<1>();
    let mut cursor = table.cursor(span(FIRST, PAGES)).unwrap();
    TableCache::shrink(world.machine.env(), usize::MAX);
    world.machine.frames.set_fuse(Some(0));
    let failed = cursor.unshare(
        page(FIRST),
        &mut gather,
        |_| UnshareStep::Skip,
        Ref::give_back,
    );
    assert!(matches!(failed, Err(UnshareError::Memory(_))));
    world.machine.frames.set_fuse(None);
    let mut left = 100;
    let failed = cursor.unshare(
        page(FIRST),
        &mut gather,
        |item| match item {
            ForkItem::Leaf(leaf) if left > 0 => {
                left -= 1;
                UnshareStep::Protected(Ref::to(&leaf))
            }
            _ => UnshareStep::Stop,
        },
        Ref::give_back,
    );
    assert_eq!(failed, Err(UnshareError::Stopped));
    drop((cursor, gather));
    world.compare();
    let handles = COUNTS.with_borrow(|counts| counts.values().sum::<u32>());
    assert_eq!(handles, 600);
    world.finish();
}

/// A copy's leaf stands for a handle of its own, of the block that it maps: anything else is refused, and the handle comes back.
#[test]
fn a_copy_is_made_of_references_to_what_is_copied() {
    let mut world = World::new();
    world.map(0, FIRST, 2);
    let payload = Payload::new::<X86_64>(7).unwrap();
    let table = &world.spaces[0].table;
    let mut cursor = table.cursor(span(FIRST, PAGES)).unwrap();
    cursor.map_payload(page(FIRST + 2), payload).unwrap();
    drop(cursor);
    world.spaces[0].model.insert(FIRST + 2, PAYLOAD | 7);
    world.fork(0, 1, FIRST, PAGES);
    let table = &world.spaces[1].table;
    let stray = 1 << 20;
    let other = |item| match item {
        ForkItem::Leaf(leaf) => Some((leaf, leaf.page == page(FIRST + 1))),
        ForkItem::Payload(..) => None,
    };
    let answers: [&dyn Fn(ForkItem) -> UnshareStep<Ref>; 6] = [
        // A leaf without a handle.
        &|item| match other(item) {
            Some((_, true)) => UnshareStep::Payload,
            _ => Ref::copied(item),
        },
        // Another frame, another size, and both ways to keep it.
        &|item| match other(item) {
            Some((_, true)) => UnshareStep::Protected(Ref::new(stray)),
            _ => Ref::copied(item),
        },
        &|item| match other(item) {
            Some((_, true)) => UnshareStep::Kept(Ref::new(stray)),
            _ => Ref::copied(item),
        },
        &|item| match other(item) {
            Some((leaf, true)) => {
                UnshareStep::Protected(Ref::block(leaf.frame.number() & !1, Order::new(1).unwrap()))
            }
            _ => Ref::copied(item),
        },
        // A handle for what has none.
        &|item| match other(item) {
            None => UnshareStep::Protected(Ref::new(stray)),
            _ => Ref::copied(item),
        },
        &|item| match other(item) {
            None => UnshareStep::Kept(Ref::new(stray)),
            _ => Ref::copied(item),
        },
    ];
    let before = COUNTS.with_borrow(Clone::clone);
    for answer in answers {
        let mut gather = table.gather::<4>();
        let mut cursor = table.cursor(span(FIRST, PAGES)).unwrap();
        let failed = cursor.unshare(page(FIRST), &mut gather, answer, Ref::give_back);
        assert_eq!(failed, Err(UnshareError::Stopped));
        drop((cursor, gather));
        assert_eq!(COUNTS.with_borrow(Clone::clone), before);
    }
    world.compare();
    world.finish();
}

/// A fork copies a table with pins, wherever it is among those that it shares.
#[test]
fn a_table_with_pins_is_not_shared() {
    for pinned in 0..3 {
        let mut world = World::new();
        world.map(0, FIRST, 3 * 512);
        let at = page(FIRST + pinned * 512 + 7);
        let table = &world.spaces[0].table;
        let pins = |pins| table.cursor(span(FIRST, PAGES)).unwrap().add_pins(at, pins);
        pins(3).unwrap();
        assert_eq!(pins(u32::MAX - 2), Err(ChangeError::Unencodable { at }));
        world.fork(0, 1, FIRST, PAGES);
        let handles = COUNTS.with_borrow(|counts| counts.values().sum::<u32>());
        assert_eq!(handles, 4 * 512, "one table of three is copied");
        let child = &world.spaces[1].table;
        for table in 0..3 {
            let mut cursor = child.cursor(span(FIRST, PAGES)).unwrap();
            let (_, shared) = cursor.look(page(FIRST + table * 512));
            assert_eq!(shared, table != pinned);
        }
        world.compare();
        world.finish();
    }
}

/// A copy that must go through is made of frames that were set aside.
#[test]
fn a_copy_without_memory_is_made_of_spares() {
    let mut world = World::new();
    world.map(0, FIRST, 600);
    world.fork(0, 1, FIRST, PAGES);
    let table = &world.spaces[1].table;
    table.keep_spares(2).unwrap();
    TableCache::shrink(world.machine.env(), usize::MAX);
    world.machine.frames.set_fuse(Some(0));
    for use_spares in [false, true] {
        let mut gather = table.gather::<1>();
        let mut cursor = table.cursor(span(FIRST, PAGES)).unwrap();
        if use_spares {
            cursor.use_spares();
        }
        let copied = cursor.unshare(page(FIRST), &mut gather, Ref::copied, Ref::give_back);
        drop(cursor);
        gather.commit(Ref::give_back);
        match copied {
            Ok(copied) => assert!(copied && use_spares),
            Err(error) => assert!(matches!(error, UnshareError::Memory(_)) && !use_spares),
        }
    }
    world.machine.frames.set_fuse(None);
    assert_eq!(table.spares(), 1);
    world.compare();
    world.finish();
}

#[test]
fn a_table_with_attributes_of_its_own_is_copied_where_the_caller_says_so() {
    let mut world = World::new();
    world.map(0, FIRST, 512);
    // `most` 0: no table is shared.
    world.fork(0, 0, FIRST, PAGES);
    let handles = COUNTS.with_borrow(|counts| counts.values().sum::<u32>());
    assert_eq!(handles, 1024);
    let attributes = Attributes::new(Rights::USER_DATA).write_protected();
    let leaf = world.spaces[1].table.query(page(FIRST)).leaf().unwrap();
    assert_eq!(leaf.attributes.rights, attributes.rights);
    world.finish();
}

/// Bits that a harvest cleared before it came to a shared table are told: they are seen once.
#[test]
fn a_harvest_that_stops_says_what_it_found() {
    let machine = Machine::new(64);
    let parent = Table::new(machine.env()).unwrap();
    let child = Table::empty_like(machine.env(), &parent).unwrap();
    let both = span(FIRST, 1024);
    let used = Attributes::new(Rights::USER_DATA).accessed().dirty();
    let mut cursor = parent.cursor(both).unwrap();
    for (index, at) in [FIRST, FIRST + 5, FIRST + 512].into_iter().enumerate() {
        let frame = Ref::new(1000 + index as u64);
        cursor
            .map(page(at), frame, used)
            .map_err(|(error, _)| error)
            .unwrap();
    }
    drop(cursor);
    let mut gather = parent.gather::<4>();
    // SAFETY: one thread, and no cursor is open.
    let shared = unsafe {
        parent.fork_sharing(&child, span(FIRST + 512, 512), 1, &mut gather, |_| {
            ForkStep::Skip
        })
    };
    shared.unwrap();
    let mut seen = 0;
    let stopped = parent
        .cursor(both)
        .unwrap()
        .harvest(both, Harvest::all(), &mut gather, |_| seen += 1);
    let (accessed, dirty) = (2, 2);
    let at = page(FIRST + 512);
    assert_eq!(
        stopped,
        Err((ChangeError::Shared { at }, Harvested { accessed, dirty }))
    );
    assert_eq!(seen, 2);
    gather.commit(Ref::give_back);
    drop(gather);
    for table in [child, parent] {
        table.destroy(|_, handle| handle.give_back(), |_, _| {});
    }
    COUNTS.with_borrow(|counts| assert!(counts.is_empty(), "references are left"));
}

#[test]
fn huge_leaves_are_shared_split_and_merged() {
    let mut world = World::new();
    world.map_huge(0, FIRST);
    world.map_huge(0, FIRST + 3 * 512);
    world.split(0, FIRST);
    world.fork(0, 1, FIRST, PAGES);
    world.fork(1, 2, FIRST - FIRST % ALL, 2 * ALL);
    // A range that cuts both blocks.
    world.fork(0, 1, FIRST + 100, 3 * 512);
    world.compare();
    for space in 0..4 {
        world.merge(space, FIRST);
        world.compare();
    }
    assert!(world.merged > 0);
    world.write(0, FIRST + 7);
    world.write(1, FIRST + 3 * 512 + 7);
    world.relocate(1, FIRST, 512, FIRST + 512);
    world.payload(1, FIRST + 3 * 512 + 9);
    world.compare();
    world.finish();
}

/// Each allocation fails in turn: what stopped half-way can be taken down or gone on with, and no reference is lost.
#[test]
fn memory_that_runs_out_while_tables_are_shared_loses_nothing() {
    let mut world = World::new();
    world.map(0, FIRST, 1500);
    let both = span(FIRST - FIRST % ALL, 2 * ALL);
    let env = world.machine.env();
    let frames = world.machine.frames;
    let child = (0..).find_map(|fuse| {
        let parent = &world.spaces[0].table;
        TableCache::shrink(env, usize::MAX);
        frames.set_fuse(Some(fuse));
        let child = Table::empty_like(env, parent);
        let Ok(child) = child else {
            assert_eq!(fuse, 0, "the root comes first");
            return None;
        };
        let mut gather = parent.gather::<4>();
        // SAFETY: one thread, and no cursor is open.
        let outcome =
            unsafe { parent.fork_sharing(&child, both, 1, &mut gather, |_| ForkStep::Stop) };
        frames.set_fuse(None);
        drop(gather);
        match outcome {
            Ok(_) => {
                assert_eq!(fuse, 3, "a root and two upper tables");
                return Some(child);
            }
            Err((ForkError::Stopped { .. }, None)) => {}
            Err((error, _)) => panic!("{error}"),
        }
        child.destroy(|_, handle| handle.give_back(), |_, _| {});
        world.compare();
        None
    });
    let model = world.spaces[0].model.clone();
    let table = child.unwrap();
    world.spaces.push(Space { table, model });
    // The copy of a level-2 table, and that of the leaf table below it.
    world.fork(1, 2, both.first().number(), 2 * ALL);
    for fuse in 0..2 {
        let table = &world.spaces[2].table;
        let mut gather = table.gather::<4>();
        let mut cursor = table.cursor(span(FIRST, PAGES)).unwrap();
        TableCache::shrink(env, usize::MAX);
        // What was copied before stays.
        frames.set_fuse(Some(1 - fuse));
        let failed = cursor.unshare(page(FIRST), &mut gather, Ref::copied, Ref::give_back);
        frames.set_fuse(None);
        assert!(matches!(failed, Err(UnshareError::Memory(_))));
        drop(cursor);
        gather.commit(Ref::give_back);
        drop(gather);
        world.compare();
    }
    world.write(2, FIRST);
    world.compare();
    // Spares that were found are kept.
    TableCache::shrink(env, usize::MAX);
    frames.set_fuse(Some(1));
    assert!(world.spaces[2].table.keep_spares(3).is_err());
    frames.set_fuse(None);
    assert_eq!(world.spaces[2].table.spares(), 1);
    world.finish();
}

/// A table that could not make all the tables it is to lend lends nothing, and can be taken down.
#[test]
fn a_lender_without_memory_lends_nothing() {
    const KERNEL: u64 = 0xffff_8000_0000_0000 >> 12;
    let machine = Machine::new(512);
    let lender = Table::new(machine.env()).unwrap();
    for fuse in [0, 1, 100] {
        let before = lender.table_count();
        machine.frames.set_fuse(Some(fuse));
        assert!(lender.lend_from(page(KERNEL)).is_err());
        machine.frames.set_fuse(None);
        assert!(lender.table_count() >= before);
        let refused = Table::sharing(machine.env(), &lender, page(KERNEL));
        assert_eq!(refused.unwrap_err(), TableError::CannotShare);
    }
    lender.destroy(|_, _| {}, |_, _| {});
    TableCache::shrink(machine.env(), usize::MAX);
    assert_eq!(machine.frames.out(), 0);
}

/// Forks two tables of leaves, with as many levels shared as a format can share; every leaf is copied where none can be. Then the child changes one
/// page. Gives how many leaves were copied by the fork.
fn fork_and_change<F: Format>() -> u32 {
    let machine = Machine::new(64);
    let [parent, child] = [(); 2].map(|()| PageTable::<F, _, Ref>::new(machine.env()).unwrap());
    let all = span(FIRST - FIRST % ALL, ALL);
    let mut cursor = parent.cursor(all).unwrap();
    for (at, frame) in [(FIRST, 1000), (FIRST + 512, 1001)] {
        let mapped = cursor.map(page(at), Ref::new(frame), Rights::USER_DATA);
        mapped.map_err(|(error, _)| error).unwrap();
    }
    drop(cursor);
    let mut copied = 0;
    let mut gather = parent.gather::<4>();
    let step = |item| {
        let ForkItem::Leaf(leaf) = item else {
            return ForkStep::Stop;
        };
        copied += 1;
        let read_only = leaf.attributes.write_protected();
        ForkStep::Leaf {
            handle: Ref::to(&leaf),
            child: read_only,
            parent: Some(read_only),
        }
    };
    // SAFETY: one thread, and no cursor is open.
    let forked = unsafe { parent.fork_sharing(&child, all, 2, &mut gather, step) };
    forked.map_err(|(error, _)| error).unwrap();
    gather.commit(Ref::give_back);
    drop(gather);
    let mut gather = child.gather::<4>();
    let mut cursor = child.cursor(all).unwrap();
    let unshared = cursor.unshare(page(FIRST), &mut gather, Ref::copied, Ref::give_back);
    assert_eq!(unshared, Ok(copied == 0));
    assert_eq!(cursor.unmap(span(FIRST, 1), &mut gather), Ok(1));
    drop(cursor);
    gather.commit(Ref::give_back);
    drop(gather);
    assert!(parent.query(page(FIRST)).leaf().is_some());
    assert!(child.query(page(FIRST + 512)).leaf().is_some());
    for table in [child, parent] {
        table.destroy(|_, handle| handle.give_back(), |_, _| {});
    }
    COUNTS.with_borrow(|counts| assert!(counts.is_empty(), "references are left"));
    TableCache::shrink(machine.env(), usize::MAX);
    assert_eq!(machine.frames.out(), 0, "tables leaked");
    copied
}

#[test]
fn a_table_is_shared_where_its_copy_can_be_made() {
    const ANY: u64 = u64::MAX;
    assert_eq!(fork_and_change::<Altered<0b1100, false, ANY>>(), 0);
    assert_eq!(fork_and_change::<Altered<0b0100, false, ANY>>(), 0);
    // The copy of a level-2 table could not say that it shares those below it.
    assert_eq!(fork_and_change::<Altered<0b1000, false, ANY>>(), 2);
    // The right that comes back with a table would have to be told.
    assert_eq!(fork_and_change::<Altered<0b1100, true, ANY>>(), 2);
}
