//! The first things that must be right: maps, protections, tables that come and go, nothing leaked.

#![cfg(not(loom))]

#[path = "common/machine.rs"]
mod machine;

use kmem_hal::{
    FlushScope, Frame, FrameRequest, FrameSink, FrameSource, Order, OwnedFrame, Page, PageRange,
};
use kmem_paging::format::X86_64;
use kmem_paging::{
    Attributes, ChangeError, Cleared, Entry, ForkItem, ForkStep, MapError, PageTable, Payload,
    Replaced, Rights, Run, TableCache,
};
use machine::{Machine, TestEnv};

type Table = PageTable<X86_64, &'static TestEnv, OwnedFrame>;

fn page(number: u64) -> Page {
    Page::new(number).unwrap()
}

fn range(first: u64, count: u64) -> PageRange {
    PageRange::with_count(page(first), count).unwrap()
}

/// A table whose root somebody knows, so that it must be flushed.
fn loaded(machine: &Machine) -> Table {
    let table = Table::new(machine.env()).unwrap();
    let _ = table.root();
    table
}

fn map(machine: &Machine, table: &Table, number: u64, rights: Rights) -> Frame {
    let frame = machine.frames.alloc(&FrameRequest::ONE).unwrap();
    let first = frame.first();
    table
        .cursor(range(number, 1))
        .unwrap()
        .map(page(number), frame, rights)
        .unwrap();
    first
}

fn finish(machine: &Machine, table: Table) {
    table.destroy(|_, frame| machine.frames.free(frame), |_, _| {});
    TableCache::shrink(machine.env(), usize::MAX);
    assert_eq!(machine.frames.out(), 0, "frames leaked");
}

#[test]
fn a_page_is_mapped_found_and_taken_back() {
    let machine = Machine::new(64);
    let table = loaded(&machine);
    assert_eq!(table.query(page(5)), Entry::Empty);
    let frame = map(&machine, &table, 5, Rights::USER_DATA);
    let leaf = table.query(page(5)).leaf().unwrap();
    assert_eq!((leaf.frame, leaf.order), (frame, Order::ZERO));
    assert_eq!(leaf.attributes, Attributes::new(Rights::USER_DATA));
    assert_eq!(table.table_count(), 4);
    assert!(
        machine.flushes.0.lock().unwrap().is_empty(),
        "filling a hole needs no flush"
    );

    let mut gather = table.gather::<4>();
    let mut cursor = table.cursor(range(0, 512)).unwrap();
    assert_eq!(cursor.unmap(range(0, 512), &mut gather), Ok(1));
    drop(cursor);
    assert_eq!(table.table_count(), 1, "empty tables are detached at once");
    assert!(machine.flushes.0.lock().unwrap().is_empty());
    assert_eq!(gather.commit_to(machine.frames), 1);
    drop(gather);
    let flushes = machine.flushes.0.lock().unwrap().clone();
    assert_eq!(flushes.len(), 1);
    assert!(flushes[0].tables_freed);
    assert_eq!(
        flushes[0].scope,
        FlushScope::Pages {
            range: range(5, 1),
            stride: 1
        }
    );
    assert_eq!(machine.env().cache_length(), 3);
    finish(&machine, table);
}

trait CacheLength {
    fn cache_length(&self) -> usize;
}

impl CacheLength for TestEnv {
    fn cache_length(&self) -> usize {
        kmem_paging::Env::cache(self).length()
    }
}

#[test]
fn a_full_gather_says_where_to_go_on() {
    let machine = Machine::new(64);
    let table = loaded(&machine);
    for number in 0..10 {
        map(&machine, &table, 508 + number, Rights::USER_DATA);
    }
    let mut gather = table.gather::<4>();
    let mut cursor = table.cursor(range(0, 2048)).unwrap();
    let mut next = 0;
    let mut rounds = 0;
    loop {
        let rest = PageRange::new(page(next), page(2047)).unwrap();
        match cursor.unmap(rest, &mut gather) {
            Ok(_) => break,
            Err(ChangeError::Full { next: at }) => next = at.number(),
            Err(error) => panic!("{error}"),
        }
        rounds += 1;
        assert_eq!(gather.commit_to(machine.frames), 4);
    }
    assert_eq!(rounds, 2);
    assert_eq!(gather.commit_to(machine.frames), 2);
    drop((cursor, gather));
    assert_eq!(table.table_count(), 1);
    finish(&machine, table);
}

#[test]
fn errors_give_the_handle_back_and_change_nothing() {
    let machine = Machine::new(64);
    let table = loaded(&machine);
    map(&machine, &table, 7, Rights::USER_DATA);
    let mut frame = machine.frames.alloc(&FrameRequest::ONE).unwrap();
    let mut cursor = table.cursor(range(0, 16)).unwrap();
    for (at, expected) in [(7, MapError::Occupied), (16, MapError::OutOfRange)] {
        let (error, back) = cursor.map(page(at), frame, Rights::USER_DATA).unwrap_err();
        assert_eq!(error, expected);
        frame = back;
    }
    machine.frames.free(frame);
    drop(cursor);
    let hole = PageRange::new(page((1 << 35) - 1), page(1 << 35)).unwrap();
    assert!(table.cursor(hole).is_err());
    finish(&machine, table);
}

#[test]
fn protect_flushes_what_it_restricts_and_nothing_else() {
    let machine = Machine::new(64);
    let table = loaded(&machine);
    map(&machine, &table, 3, Rights::READ | Rights::USER);
    map(&machine, &table, 4, Rights::USER_DATA);
    let mut cursor = table.cursor(range(0, 16)).unwrap();
    let mut gather = table.gather::<4>();
    assert_eq!(
        cursor.protect(range(3, 1), Rights::USER_DATA, &mut gather),
        Ok(1)
    );
    assert!(gather.is_empty(), "adding a right needs no flush");
    assert_eq!(
        cursor.protect(range(0, 16), Rights::READ | Rights::USER, &mut gather),
        Ok(2)
    );
    gather.commit(drop);
    assert_eq!(
        machine.flushes.0.lock().unwrap()[0].scope,
        FlushScope::Pages {
            range: range(3, 2),
            stride: 1
        }
    );
    // Nobody may touch it, but it stays mapped.
    assert_eq!(
        cursor.protect(range(3, 1), Rights::empty(), &mut gather),
        Ok(1)
    );
    let leaf = cursor.query(page(3)).leaf().unwrap();
    assert_eq!(leaf.attributes.rights, Rights::empty());
    drop((cursor, gather));
    finish(&machine, table);
}

#[test]
fn replace_gives_the_old_frame_back_flushed() {
    let machine = Machine::new(64);
    let table = loaded(&machine);
    let old = map(&machine, &table, 3, Rights::READ | Rights::USER);
    let new = machine.frames.alloc(&FrameRequest::ONE).unwrap();
    let mut cursor = table.cursor(range(0, 16)).unwrap();
    match cursor.replace(page(3), new, Rights::USER_DATA).unwrap() {
        Replaced::Leaf(leaf, handle) => {
            assert_eq!((leaf.frame, handle.first()), (old, old));
            machine.frames.free(handle);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(machine.flushes.0.lock().unwrap().len(), 1);
    let slot = Payload::new::<X86_64>(77).unwrap();
    let mut gather = table.gather::<1>();
    assert!(matches!(
        cursor.set_payload(page(3), slot, &mut gather),
        Ok(Entry::Leaf(_))
    ));
    gather.commit_to(machine.frames);
    assert_eq!(cursor.query(page(3)), Entry::Payload(slot));
    let new = machine.frames.alloc(&FrameRequest::ONE).unwrap();
    assert_eq!(
        cursor.replace(page(3), new, Rights::USER_DATA),
        Ok(Replaced::Payload(slot))
    );
    drop((cursor, gather));
    finish(&machine, table);
}

#[test]
fn runs_join_what_continues() {
    let machine = Machine::new(64);
    let table = loaded(&machine);
    let mut cursor = table.cursor(range(0, 1 << 20)).unwrap();
    let mut frames: Vec<_> = (0..4)
        .map(|_| machine.frames.alloc(&FrameRequest::ONE).unwrap())
        .collect();
    frames.reverse();
    cursor
        .map_range(range(100, 4), Order::ZERO, Rights::USER_DATA, |_, _| {
            frames.pop()
        })
        .unwrap();
    cursor
        .map_payload(page(104), Payload::new::<X86_64>(1).unwrap())
        .unwrap();
    assert_eq!(cursor.next_run(), Some(Run::Absent(range(0, 100))));
    match cursor.next_run() {
        Some(Run::Leaves { range: found, .. }) => assert_eq!(found, range(100, 4)),
        other => panic!("{other:?}"),
    }
    assert!(matches!(cursor.next_run(), Some(Run::Payload(..))));
    assert_eq!(
        cursor.next_run(),
        Some(Run::Absent(range(105, (1 << 20) - 105)))
    );
    assert_eq!(cursor.next_run(), None);
    drop(cursor);
    let mut seen = Vec::new();
    let mut cursor = table.cursor(range(0, 1 << 20)).unwrap();
    let mut gather = table.gather::<8>();
    cursor
        .unmap_with(range(0, 1 << 20), &mut gather, |cleared| match cleared {
            Cleared::Leaf(leaf) => seen.push(leaf.page.number()),
            Cleared::Payload(page, _) => seen.push(page.number()),
        })
        .unwrap();
    assert_eq!(seen, [100, 101, 102, 103, 104]);
    gather.commit_to(machine.frames);
    drop((cursor, gather));
    finish(&machine, table);
}

#[test]
fn fork_copies_and_write_protects_the_parent() {
    let machine = Machine::new(64);
    let parent = loaded(&machine);
    for number in 0..4 {
        map(&machine, &parent, 510 + number, Rights::USER_DATA);
    }
    let child = Table::new(machine.env()).unwrap();
    let mut gather = parent.gather::<1>();
    let copied = parent
        .fork_into(&child, range(0, 2048), &mut gather, |item| match item {
            ForkItem::Leaf(leaf) => ForkStep::Leaf {
                handle: machine.frames.alloc(&FrameRequest::ONE).unwrap(),
                child: leaf.attributes.write_protected(),
                parent: Some(leaf.attributes.write_protected()),
            },
            ForkItem::Payload(_, payload) => ForkStep::Payload(payload),
        })
        .unwrap();
    assert_eq!(copied, 4);
    gather.commit(drop);
    assert_eq!(
        machine.flushes.0.lock().unwrap()[0].scope,
        FlushScope::Pages {
            range: range(510, 4),
            stride: 1
        }
    );
    drop(gather);
    for number in 510..514 {
        for table in [&parent, &child] {
            let leaf = table.query(page(number)).leaf().unwrap();
            assert!(!leaf.is_writable());
        }
    }
    child.destroy(|_, frame| machine.frames.free(frame), |_, _| {});
    finish(&machine, parent);
}

#[test]
fn moving_a_large_hole_with_one_page_needs_few_tables() {
    let machine = Machine::new(64);
    let table = loaded(&machine);
    let from = range(1 << 30, 1 << 28);
    let frame = map(&machine, &table, (1 << 30) + 12345, Rights::USER_DATA);
    let mut gather = table.gather::<1>();
    assert_eq!(
        table.move_range(from, page((1 << 31) + 7), &mut gather),
        Ok(1)
    );
    gather.commit(drop);
    drop(gather);
    let leaf = table.query(page((1 << 31) + 7 + 12345)).leaf().unwrap();
    assert_eq!(leaf.frame, frame);
    assert_eq!(table.table_count(), 4);
    finish(&machine, table);
}

#[test]
fn a_table_that_others_share_is_flushed_under_every_tag() {
    let machine = Machine::new(512);
    let kernel = Table::new(machine.env()).unwrap();
    let first = 0xf_ffff_8000_0000;
    kernel.lend_from(page(0xf_fff8_0000_0000)).unwrap();
    let scope_of = |rights: Rights, neighbour: bool| {
        let frame = map(&machine, &kernel, first, rights);
        if neighbour {
            // The leaf table stays.
            map(&machine, &kernel, first + 1, rights);
        }
        machine.flushes.0.lock().unwrap().clear();
        let mut gather = kernel.gather::<2>();
        let mut cursor = kernel.cursor(range(first, 2)).unwrap();
        cursor.unmap(range(first, 1), &mut gather).unwrap();
        gather.commit_to(machine.frames);
        let scope = machine.flushes.0.lock().unwrap()[0].scope;
        cursor.unmap(range(first, 2), &mut gather).unwrap();
        gather.commit_to(machine.frames);
        assert_ne!(frame, Frame::ZERO);
        scope
    };
    let single = FlushScope::Pages {
        range: range(first, 1),
        stride: 1,
    };
    // `invlpg` reaches global translations and those of the tag in use; the others need more.
    assert_eq!(scope_of(Rights::KERNEL_DATA | Rights::GLOBAL, true), single);
    assert_eq!(scope_of(Rights::KERNEL_DATA, true), FlushScope::Everything);
    assert_eq!(
        scope_of(Rights::KERNEL_DATA | Rights::GLOBAL, false),
        FlushScope::Everything,
        "walk caches hold the freed table under every tag"
    );
}
