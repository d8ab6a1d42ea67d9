//! What a flush says to the machine: which pages, whether some were global, whether tables come free. The mock machine's own flushes are
//! wider now and then, so here the requests themselves are looked at.

#![cfg(not(loom))]

#[path = "common/machine.rs"]
mod machine;

use kmem_hal::{DeviceFrame, FlushRequest, FlushScope, Frame, Order, Page, PageRange};
use kmem_paging::format::X86_64;
use kmem_paging::{Attributes, Cursor, ForkError, ForkStep, PageTable, Payload, Rights};
use machine::{Machine, TestEnv};

type Table = PageTable<X86_64, &'static TestEnv, DeviceFrame>;
type Held<'t> = Cursor<'t, X86_64, &'static TestEnv, DeviceFrame>;

const FIRST: u64 = 0x400;
/// A page of the table at `FIRST`, behind forty others.
const PLACE: u64 = 0x430;
const LOCAL: Rights = Rights::USER_DATA;
const GLOBAL: Rights = Rights::USER_DATA.union(Rights::GLOBAL);

fn page(number: u64) -> Page {
    Page::new(number).unwrap()
}

fn pages(first: u64, count: u64) -> PageRange {
    PageRange::with_count(page(first), count).unwrap()
}

fn block(number: u64, order: Order) -> DeviceFrame {
    DeviceFrame::new(Frame::from_number(number), order).unwrap()
}

fn frame(number: u64) -> DeviceFrame {
    block(number, Order::ZERO)
}

/// A table whose root somebody knows, so that it must be flushed.
fn known(machine: &Machine) -> Table {
    let table = Table::new(machine.env()).unwrap();
    let _ = table.root();
    table
}

fn requests(machine: &Machine) -> Vec<FlushRequest> {
    std::mem::take(&mut machine.flushes.0.lock().unwrap())
}

fn fill(cursor: &mut Held<'_>, first: u64, count: u64, attributes: impl Into<Attributes>) {
    let attributes = attributes.into();
    for number in first..first + count {
        cursor.map(page(number), frame(number), attributes).unwrap();
    }
}

/// One way in which a page of a table full of others becomes global.
type Way = (&'static str, fn(&Table));

const WAYS: &[Way] = &[
    ("map", |table| {
        let mut cursor = table.cursor(pages(PLACE, 1)).unwrap();
        cursor.map(page(PLACE), frame(PLACE), GLOBAL).unwrap();
    }),
    ("map_range", |table| {
        let range = pages(PLACE, 2);
        let mut cursor = table.cursor(range).unwrap();
        cursor
            .map_range(range, Order::ZERO, GLOBAL, |at, _| Some(frame(at.number())))
            .unwrap();
    }),
    ("map_divided", |table| {
        let mut cursor = table.cursor(pages(PLACE, 2)).unwrap();
        let pair = block(PLACE, Order::new(1).unwrap());
        cursor
            .map_divided(page(PLACE), pair, Order::ZERO, GLOBAL)
            .unwrap();
    }),
    ("replace", |table| {
        let mut cursor = table.cursor(pages(FIRST, 1)).unwrap();
        cursor.replace(page(FIRST), frame(PLACE), GLOBAL).unwrap();
    }),
    ("protect", |table| {
        let range = pages(FIRST + 1, 2);
        let mut gather = table.gather::<1>();
        let changed = table
            .cursor(range)
            .unwrap()
            .protect(range, GLOBAL, &mut gather);
        assert_eq!(changed, Ok(2));
    }),
    ("protect through a held cursor", |table| {
        let mut gather = table.gather::<1>();
        let mut cursor = table.cursor(pages(PLACE, 4)).unwrap();
        let used = Attributes::new(LOCAL).accessed().dirty();
        cursor.map(page(PLACE), frame(PLACE), used).unwrap();
        let changed = cursor.protect(pages(PLACE, 1), GLOBAL, &mut gather);
        assert_eq!(changed, Ok(1));
    }),
    ("update", |table| {
        let range = pages(FIRST + 2, 1);
        let mut gather = table.gather::<1>();
        let mut cursor = table.cursor(range).unwrap();
        let changed = cursor.update(range, &mut gather, |_| Some(GLOBAL.into()));
        assert_eq!(changed, Ok(1));
    }),
    ("restore", |table| {
        let payload = Payload::new::<X86_64>(3).unwrap();
        let mut cursor = table.cursor(pages(PLACE, 1)).unwrap();
        cursor.map_payload(page(PLACE), payload).unwrap();
        cursor
            .restore(page(PLACE), payload, frame(PLACE), GLOBAL.into())
            .unwrap();
    }),
    ("map through a locked entry", |table| {
        let entry = table.lock_entry(page(PLACE)).unwrap();
        entry.map(frame(PLACE), GLOBAL.into()).unwrap();
    }),
    ("relax", |table| {
        let mut cursor = table.cursor(pages(PLACE, 1)).unwrap();
        cursor
            .map(page(PLACE), frame(PLACE), Rights::empty())
            .unwrap();
        drop(cursor);
        let mut entry = table.lock_entry(page(PLACE)).unwrap();
        assert!(entry.relax(GLOBAL, false), "nobody had it cached");
    }),
];

/// A leaf table that goes as a whole is not looked through before its flush: that a page in it was global must be known by then.
#[test]
fn a_global_page_is_known_however_it_came() {
    let whole = |table: &Table, machine: &Machine| {
        let all = pages(FIRST, 512);
        let mut gather = table.gather::<64>();
        table.cursor(all).unwrap().unmap(all, &mut gather).unwrap();
        requests(machine);
        gather.commit(drop);
        let told = requests(machine);
        assert_eq!(told.len(), 1);
        assert!(told[0].tables_freed);
        (told[0].global, told[0].scope)
    };
    for way in [None].into_iter().chain(WAYS.iter().map(Some)) {
        let machine = Machine::new(64);
        let table = known(&machine);
        fill(
            &mut table.cursor(pages(FIRST, 512)).unwrap(),
            FIRST,
            40,
            LOCAL,
        );
        let expected = match way {
            None => (false, FlushScope::Space),
            Some((_, make)) => {
                make(&table);
                (true, FlushScope::Everything)
            }
        };
        let name = way.map_or("none", |way| way.0);
        assert_eq!(whole(&table, &machine), expected, "{name}");
        table.destroy(|_, _| {}, |_, _| {});
    }
    // A table that was built whole: its neighbour has the tables above it, so that no page is mapped by itself.
    let machine = Machine::new(64);
    let table = known(&machine);
    let neighbour = pages(FIRST + 512, 1);
    fill(&mut table.cursor(neighbour).unwrap(), FIRST + 512, 1, LOCAL);
    let all = pages(FIRST, 512);
    let next = |at: Page, _| Some(frame(at.number()));
    let mut cursor = table.cursor(all).unwrap();
    cursor.map_range(all, Order::ZERO, GLOBAL, next).unwrap();
    drop(cursor);
    assert_eq!(whole(&table, &machine), (true, FlushScope::Everything));
    table.destroy(|_, _| {}, |_, _| {});
}

/// A fork that is refused tells the child nothing of the parent's pages.
#[test]
fn a_refused_fork_leaves_the_child_as_it_was() {
    let machine = Machine::new(64);
    let [parent, child, other] = [(); 3].map(|()| known(&machine));
    let all = pages(FIRST, 512);
    fill(&mut parent.cursor(all).unwrap(), FIRST, 1, GLOBAL);
    let mut foreign = other.gather::<1>();
    // SAFETY: one thread, and no cursor is open.
    let refused = unsafe { parent.fork_sharing(&child, all, 1, &mut foreign, |_| ForkStep::Stop) };
    assert_eq!(refused, Err((ForkError::ForeignGather, None)));
    fill(&mut child.cursor(all).unwrap(), FIRST, 40, LOCAL);
    let mut gather = child.gather::<64>();
    child.cursor(all).unwrap().unmap(all, &mut gather).unwrap();
    requests(&machine);
    gather.commit(drop);
    let told = requests(&machine);
    assert_eq!(told.len(), 1);
    assert_eq!((told[0].global, told[0].scope), (false, FlushScope::Space));
}

/// Of a wide range with pages of both kinds each is flushed as what it was, and not as what it becomes.
#[test]
fn global_pages_are_flushed_as_what_they_were() {
    let used = |rights| Attributes::new(rights).accessed().dirty();
    // By a patch of bits, by attributes, by single pages of one gather, and by clearing; one global page among forty.
    type Change =
        fn(&mut Held<'_>, &mut kmem_paging::Gather<'_, X86_64, &'static TestEnv, DeviceFrame, 64>);
    let changes: [(&str, Change); 5] = [
        ("protect", |cursor, gather| {
            let rights = LOCAL.difference(Rights::WRITE);
            cursor.protect(pages(FIRST, 40), rights, gather).unwrap();
        }),
        ("update", |cursor, gather| {
            let rights = LOCAL.difference(Rights::WRITE);
            let change = |leaf: &kmem_paging::Leaf| Some(leaf.attributes.rights(rights));
            cursor.update(pages(FIRST, 40), gather, change).unwrap();
        }),
        ("unmap", |cursor, gather| {
            cursor.unmap(pages(FIRST, 40), gather).unwrap();
        }),
        ("unmap one by one", |cursor, gather| {
            for number in FIRST..FIRST + 40 {
                cursor.unmap(pages(number, 1), gather).unwrap();
            }
        }),
        ("move", |cursor, gather| {
            let table = cursor.table();
            cursor.release();
            table
                .move_range(pages(FIRST, 40), page(0x1000), gather)
                .unwrap();
        }),
    ];
    for (name, change) in changes {
        for global in [FIRST, FIRST + 7, FIRST + 39] {
            let machine = Machine::new(64);
            let table = known(&machine);
            let mut cursor = table.cursor(pages(FIRST, 512)).unwrap();
            fill(&mut cursor, FIRST, 41, used(LOCAL));
            let mut gather = table.gather::<64>();
            cursor
                .protect(pages(global, 1), GLOBAL, &mut gather)
                .unwrap();
            cursor.release();
            gather.commit(drop);
            requests(&machine);
            change(&mut cursor, &mut gather);
            cursor.release();
            gather.commit(drop);
            let told = requests(&machine);
            assert_eq!(told.len(), 1, "{name}");
            assert!(told[0].global, "{name}, page {global:#x}");
            assert_eq!(told[0].scope, FlushScope::Everything, "{name}");
            drop((cursor, gather));
            table.destroy(|_, _| {}, |_, _| {});
        }
    }
}

/// A run is flushed to its last page, and a huge leaf as a whole, by every change.
#[test]
fn a_flush_reaches_to_the_end_of_what_changed() {
    let machine = Machine::new(64);
    let table = known(&machine);
    let read_only = LOCAL.difference(Rights::WRITE);
    let used = Attributes::new(LOCAL).accessed().dirty();
    let mut gather = table.gather::<8>();
    let mut cursor = table.cursor(pages(FIRST, 0x400)).unwrap();
    fill(&mut cursor, FIRST + 3, 5, used);
    let huge = block(0x800, Order::HUGE_2M);
    cursor.map(page(0x600), huge, used).unwrap();
    let scope = |range, stride| FlushScope::Pages { range, stride };
    let told = |gather: &mut kmem_paging::Gather<'_, _, _, _, 8>| {
        gather.commit(drop);
        let told = requests(&machine);
        assert_eq!(told.len(), 1);
        (told[0].scope, told[0].tables_freed)
    };
    cursor
        .protect(pages(FIRST, 32), read_only, &mut gather)
        .unwrap();
    cursor.release();
    let small = scope(pages(FIRST + 3, 5), 1);
    assert_eq!(told(&mut gather), (small, false));
    cursor
        .protect(pages(0x600, 512), read_only, &mut gather)
        .unwrap();
    cursor.release();
    let whole = scope(pages(0x600, 512), 512);
    assert_eq!(told(&mut gather), (whole, false));
    // A huge leaf that is cut: small leaves are where it was.
    cursor.split(page(0x600), &mut gather).unwrap();
    cursor.release();
    assert_eq!(told(&mut gather), (whole, false));
    // Merged: every small page, and the way to the table.
    cursor
        .merge(page(0x600), Order::HUGE_2M, &mut gather)
        .unwrap();
    cursor.release();
    let merged = requests(&machine);
    assert_eq!(merged.len(), 1);
    assert!(
        merged[0].tables_freed,
        "a CPU that borrowed the space is told"
    );
    // Small pages of which some may have been global: none of the machine's ways to drop pages alone.
    assert_eq!(merged[0].scope, FlushScope::Everything);
    gather.commit(drop);
    requests(&machine);
    assert_eq!(cursor.unmap(pages(0x600, 512), &mut gather), Ok(512));
    cursor.release();
    assert_eq!(told(&mut gather), (whole, false));
    assert_eq!(cursor.unmap(pages(FIRST, 32), &mut gather), Ok(5));
    cursor.release();
    assert_eq!(told(&mut gather), (small, true));
    drop((cursor, gather));
    table.destroy(|_, _| {}, |_, _| {});
}

/// A gather that was committed begins anew: what it noted before widens no later flush, and hides none.
#[test]
fn a_gather_is_used_again() {
    let machine = Machine::new(64);
    let table = known(&machine);
    let mut gather = table.gather::<8>();
    let mut cursor = table.cursor(pages(FIRST, 512)).unwrap();
    fill(&mut cursor, FIRST, 16, LOCAL);
    for number in [FIRST + 2, FIRST + 9, FIRST + 5] {
        cursor.unmap(pages(number, 1), &mut gather).unwrap();
        gather.commit(drop);
        let told = requests(&machine);
        assert_eq!(told.len(), 1);
        let range = pages(number, 1);
        assert_eq!(told[0].scope, FlushScope::Pages { range, stride: 1 });
    }
    drop((cursor, gather));
    table.destroy(|_, _| {}, |_, _| {});
}
