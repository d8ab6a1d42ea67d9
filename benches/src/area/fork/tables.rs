//! Forks as work on page tables alone.

use kmem_cow_mm::{Env, Mm};
use kmem_hal::{DeviceFrame, Frame, Order, Page, PageRange};
use kmem_paging::format::X86_64;
use kmem_paging::{Attributes, ForkItem, ForkStep, PageTable, Rights, UnshareStep};

use super::limits::{copy_one_table, copy_tables, eager_copy};
use super::world::{Paging, World};
use super::{GIB, workload};
use crate::clock::Watch;
use crate::harness::{Runner, Slice};
use crate::platform::Region;

type Table = PageTable<X86_64, &'static Paging, DeviceFrame>;

fn device(number: u64) -> DeviceFrame {
    DeviceFrame::new(Frame::from_number(number), Order::ZERO).expect("order 0")
}

/// Tables that map so many GiB in pages of 4 KiB, with A and D set, and their pages.
fn filled(mm: &'static Mm<'static, World>, gibs: u64) -> (Table, PageRange) {
    let range = PageRange::with_count(Page::from_number(1 << 20), gibs * GIB).expect("not empty");
    let table = Table::new(mm.env().paging()).expect("memory for a root");
    let attributes = Attributes::new(Rights::USER_DATA).accessed().dirty();
    table
        .cursor(range)
        .expect("a valid range")
        .map_range(range, Order::ZERO, attributes, |page, _left| {
            Some(device((1 << 24) + page.number()))
        })
        .expect("memory for tables");
    (table, range)
}

/// A child that shares tables of level `most` and below.
fn sharing(parent: &Table, range: PageRange, most: usize, watch: Option<&mut Watch>) -> Table {
    let child = Table::new(*parent.env()).expect("memory for a root");
    let mut gather = parent.gather::<8>();
    let mut fork = || {
        // SAFETY: one thread, without an open cursor; no processor uses these tables.
        unsafe { parent.fork_sharing(&child, range, most, &mut gather, |_| ForkStep::Skip) }
    };
    let shared = match watch {
        Some(watch) => watch.time(fork),
        None => fork(),
    };
    assert!(shared.is_ok(), "memory for the child's tables");
    gather.commit(|_| {});
    drop(gather);
    child
}

fn end(child: Table) {
    child.destroy(|_leaf, _frame| {}, |_page, _payload| {});
}

/// Makes the table of `page` the space's own, with a count for each frame.
fn own(table: &Table, page: Page, counts: &mut [u32]) -> bool {
    let mut gather = table.gather::<8>();
    let copied = table
        .cursor(PageRange::single(page))
        .expect("a valid range")
        .unshare(
            page,
            &mut gather,
            |item| match item {
                ForkItem::Leaf(leaf) => {
                    counts[leaf.frame.number() as usize % GIB as usize] += 1;
                    UnshareStep::Protected(device(leaf.frame.number()))
                }
                _ => UnshareStep::Skip,
            },
            drop,
        )
        .expect("memory for a table");
    gather.commit(|_| {});
    copied
}

/// Children of all these parents, which share tables of level `most` and below; the fork's work is timed where there is a watch.
fn children(parents: &[(Table, PageRange)], most: usize, watch: Option<&mut Watch>) -> Vec<Table> {
    let mut gathers: Vec<_> = parents
        .iter()
        .map(|(parent, _)| parent.gather::<8>())
        .collect();
    let children: Vec<Table> = parents
        .iter()
        .map(|(parent, _)| Table::new(*parent.env()).expect("memory for a root"))
        .collect();
    let mut fork = || {
        let all = parents.iter().zip(&children).zip(&mut gathers);
        for (((parent, range), child), gather) in all {
            // SAFETY: one thread, without an open cursor; no processor uses these tables.
            let shared =
                unsafe { parent.fork_sharing(child, *range, most, gather, |_| ForkStep::Skip) };
            assert!(shared.is_ok(), "memory for the child's tables");
        }
    };
    match watch {
        Some(watch) => watch.time(fork),
        None => fork(),
    }
    gathers.iter_mut().for_each(|gather| gather.commit(|_| {}));
    children
}

pub(super) fn run(runner: &mut Runner) {
    let mm = World::leak(Region::new(1 << 13).touched());
    // Several, since one is forked in not much more time than the clock needs.
    let parents: Vec<_> = (0..4).map(|_| filled(mm, 1)).collect();
    let of_kmem = |_: u64, watch: &mut Watch| {
        let children = children(&parents, 1, Some(watch));
        children.into_iter().for_each(end);
        Slice::ops(4, 4 * GIB)
    };
    runner.run(
        workload("fork_1g_tables")
            .with("kmem", of_kmem)
            .with("limit:eager-copy", eager_copy())
            .with("limit:memcpy", copy_tables()),
    );
    let of_kmem = |_: u64, watch: &mut Watch| {
        watch.time(|| {
            for (parent, range) in &parents {
                end(sharing(parent, *range, 1, None));
            }
        });
        Slice::ops(4, 4 * GIB)
    };
    runner.run(
        workload("fork_exit_tables")
            .with("kmem", of_kmem)
            .with("limit:eager-copy", eager_copy()),
    );
    let (parent, range) = &parents[0];
    let (parent, range) = (parent, *range);
    let mut counts = vec![1u32; GIB as usize];
    let of_kmem = |_: u64, watch: &mut Watch| {
        let child = sharing(parent, range, 1, None);
        watch.time(|| {
            for number in 0..64 {
                let page = Page::from_number(range.first().number() + number * 512);
                assert!(own(&child, page, &mut counts), "nothing was shared");
            }
        });
        end(child);
        Slice::ops(64, 64)
    };
    runner.run(
        workload("first_write_table")
            .with("kmem", of_kmem)
            .with("limit:copy-table", copy_one_table()),
    );
    let mut counts = vec![1u32; GIB as usize];
    let of_kmem = |_: u64, watch: &mut Watch| {
        let child = watch.time(|| {
            let child = sharing(parent, range, 1, None);
            for number in 0..512 {
                let page = Page::from_number(range.first().number() + number * 512);
                assert!(own(&child, page, &mut counts), "nothing was shared");
            }
            child
        });
        end(child);
        Slice::ops(1, GIB)
    };
    runner.run(
        workload("fork_write_all_tables")
            .with("kmem", of_kmem)
            .with("limit:eager-copy", eager_copy()),
    );
    let mut counts = vec![1u32; GIB as usize];
    let of_kmem = |_: u64, watch: &mut Watch| {
        let children = children(&parents, 2, None);
        watch.time(|| {
            for (child, (_, range)) in children.iter().zip(&parents) {
                assert!(own(child, range.first(), &mut counts), "nothing was shared");
            }
        });
        children.into_iter().for_each(end);
        Slice::ops(4, 4)
    };
    runner.run(
        workload("first_write_level2")
            .with("kmem", of_kmem)
            .with("limit:copy-table", copy_one_table()),
    );
    if runner.wants("fork_64g_tables") {
        let mm = World::leak(Region::new(1 << 16).touched());
        let (parent, range) = filled(mm, 64);
        let of_kmem = move |_: u64, watch: &mut Watch| {
            end(sharing(&parent, range, 2, Some(watch)));
            Slice::ops(1, 64 * GIB)
        };
        runner.run(workload("fork_64g_tables").with("kmem", of_kmem));
    }
}
