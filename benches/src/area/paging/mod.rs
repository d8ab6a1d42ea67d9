//! Page tables: kmem-paging beside the crates that kernels take from the registry, on x86-64's four levels.
//!
//! All take their tables from one pool of frames in the same memory, no processor walks the tables, and flushing costs nothing, so that
//! only the work on entries is compared. kmem's tables are live ones: entries are atomics, each table has a lock, readers need none. The
//! peers work on plain memory under `&mut self`; nothing locks them here but in `cursors_2t`. `x86_64` has no calls for ranges.
//!
//! | workload | an operation |
//! |---|---|
//! | `map_4k`, `protect_4k`, `unmap_4k` | a page, one call a page, through a held cursor where there is one; leaves with A and D set |
//! | `map_range_4k`, `map_range_2m`, `unmap_range` | a leaf of one call for the range |
//! | `protect_range_live`, `protect_range_worst` | the same, leaves with A and D set (no locked instruction is needed) and clear |
//! | `protect_range_quiescent` | a leaf with A and D clear of a table that is loaded nowhere, by the cursor for such |
//! | `translate_4k`, `translate_2m` | the frame of a random page |
//! | `sparse_map`, `sparse_unmap`, `sparse_remap` | one page in every 2 MiB: each needs a table |
//! | `cursors_2t` | a page mapped and unmapped by two threads in different GiB (wall time); the peers stand behind one lock |
//! | `meta_per_page` | bytes beyond the tables themselves by mapped page |
//!
//! kmem gives an emptied table back at once and keeps empty tables in its cache (here without a limit, as long as `sparse_remap` runs);
//! x86_64, page_table_multiarch and aarch64-paging keep tables until the root is dropped, page-table-generic frees them. Limits: `limit:store` stores entries in a row, `limit:load-store` loads and stores
//! them, `limit:locked-and` clears a bit in each by a locked instruction, `limit:zero-table` zeroes 4 KiB that are not in a cache.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};

use kmem_hal::{FrameSlot, Order, PageRange};
use kmem_paging::Rights;
use page_table_multiarch::PageSize;
use x86_64::structures::paging as x86;
use x86_64::structures::paging::Mapper as _;

use crate::clock::{Watch, race};
use crate::harness::{Competitor, Runner, Slice, Workload};
use crate::lock::Locked;
use crate::output::Unit;
use crate::platform::{Region, run_as};
use crate::rng::Rng;

const AREA: &str = "paging";

mod arm;
mod generic;
mod tables;

use arm::Arm;
use generic::Generic;
use tables::*;

/// Runs the workloads of this area.
pub fn run(runner: &mut Runner) {
    let count = runner.size(1 << 14, 1 << 18);
    ranges(runner, count);
    singles(runner, count);
    translations(runner, count);
    sparse(runner, runner.size(1 << 10, 1 << 13));
    two_threads(runner);
    metadata(runner, count);
}

fn workload(name: &'static str, n: u64) -> Workload<'static> {
    Workload::new(AREA, name, Unit::Ns).n(n)
}

/// Adds all programs: `$make::<Table>(..)` makes a competitor of a kind of table.
macro_rules! programs {
    ($workload:expr, $make:ident ( $($argument:expr),* )) => {
        $workload
            .with("kmem", $make::<Kmem>($($argument),*))
            .with("x86_64", $make::<Offset>($($argument),*))
            .with("page_table_multiarch", $make::<Multiarch>($($argument),*))
            .with("page-table-generic", $make::<Generic>($($argument),*))
            .with("aarch64-paging", $make::<Arm>($($argument),*))
    };
}

/// The programs that have calls for ranges.
macro_rules! ranged {
    ($workload:expr, $make:ident ( $($argument:expr),* )) => {
        $workload
            .with("kmem", $make::<Kmem>($($argument),*))
            .with("page_table_multiarch", $make::<Multiarch>($($argument),*))
            .with("page-table-generic", $make::<Generic>($($argument),*))
            .with("aarch64-paging", $make::<Arm>($($argument),*))
    };
}

#[derive(Clone, Copy, PartialEq)]
enum Phase {
    Map,
    Protect,
    ProtectQuiescent,
    Unmap,
    Remap,
}

fn timed_if<R>(watch: &mut Watch, timed: bool, work: impl FnOnce() -> R) -> R {
    if timed { watch.time(work) } else { work() }
}

/// The sum of the frames at a few pages; what has not been mapped counts as nothing.
fn sample<T: Table>(table: &T, count: u64) -> u64 {
    (0..count)
        .step_by((count / 16).max(1) as usize)
        .filter_map(|page| table.translate(page))
        .sum()
}

fn single<T: Table>(count: u64, timed: Phase) -> impl Competitor {
    move |_: u64, watch: &mut Watch| {
        let mut table = T::new();
        timed_if(watch, timed == Phase::Map, || table.map_each(count));
        let mapped = sample(&table, count);
        timed_if(watch, timed == Phase::Protect, || {
            table.protect_each(count, false)
        });
        let sum = timed_if(watch, timed == Phase::Unmap, || table.unmap_each(count));
        assert_eq!(sample(&table, count), 0, "pages are left");
        Slice::ops(count, mapped.wrapping_mul(31).wrapping_add(sum))
    }
}

fn singles(runner: &mut Runner, count: u64) {
    for (name, phase) in [
        ("map_4k", Phase::Map),
        ("protect_4k", Phase::Protect),
        ("unmap_4k", Phase::Unmap),
    ] {
        runner.run(programs!(workload(name, count), single(count, phase)));
    }
}

fn range<T: Ranged>(count: u64, timed: Phase, used: bool) -> impl Competitor {
    move |_: u64, watch: &mut Watch| {
        let mut table = T::new();
        timed_if(watch, timed == Phase::Map, || table.map_range(count, used));
        let mapped = sample(&table, count);
        if timed == Phase::ProtectQuiescent {
            watch.time(|| table.protect_range_quiescent(count, false));
        } else {
            timed_if(watch, timed == Phase::Protect, || {
                table.protect_range(count, false);
            });
        }
        timed_if(watch, timed == Phase::Unmap, || table.unmap_range(count));
        assert_eq!(sample(&table, count), 0, "pages are left");
        Slice::ops(count, mapped)
    }
}

fn range_2m<T: Ranged>(blocks: u64) -> impl Competitor {
    move |_: u64, watch: &mut Watch| {
        // Several tables, since one is filled in less time than the clock needs.
        let mut tables: Vec<T> = (0..8).map(|_| T::new()).collect();
        watch.time(|| {
            for table in &mut tables {
                table.map_range_2m(blocks);
            }
        });
        Slice::ops(8 * blocks, sample(&tables[7], blocks * SPARSE))
    }
}

/// Works on an array of so many entries.
fn limit(count: u64, work: impl Fn(&AtomicU64, u64)) -> impl Competitor {
    let entries: Vec<AtomicU64> = (0..count).map(|_| AtomicU64::new(u64::MAX)).collect();
    move |_: u64, watch: &mut Watch| {
        let entries = black_box(&entries);
        let rounds = (50_000 / count).max(1);
        watch.time(|| {
            for _ in 0..rounds {
                for (entry, number) in entries.iter().zip(0u64..) {
                    work(entry, number);
                }
            }
        });
        Slice::limit(rounds * count)
    }
}

#[inline(always)]
fn store(entry: &AtomicU64, number: u64) {
    entry.store(number << 12 | 7, Ordering::Relaxed);
}

#[inline(always)]
fn load_store(entry: &AtomicU64, _number: u64) {
    entry.store(entry.load(Ordering::Relaxed) ^ 2, Ordering::Relaxed);
}

#[inline(always)]
fn locked_and(entry: &AtomicU64, _number: u64) {
    entry.fetch_and(!2, Ordering::Relaxed);
}

fn ranges(runner: &mut Runner, count: u64) {
    runner.run(
        ranged!(
            workload("map_range_4k", count),
            range(count, Phase::Map, false)
        )
        .with("limit:store", limit(count, store)),
    );
    let blocks = count / SPARSE;
    runner.run(
        ranged!(workload("map_range_2m", blocks), range_2m(blocks))
            .with("limit:store", limit(blocks, store)),
    );
    runner.run(
        ranged!(
            workload("protect_range_quiescent", count),
            range(count, Phase::ProtectQuiescent, false)
        )
        .with("limit:load-store", limit(count, load_store)),
    );
    runner.run(
        ranged!(
            workload("protect_range_live", count),
            range(count, Phase::Protect, true)
        )
        .with("limit:load-store", limit(count, load_store)),
    );
    runner.run(
        ranged!(
            workload("protect_range_worst", count),
            range(count, Phase::Protect, false)
        )
        .with("limit:locked-and", limit(count, locked_and)),
    );
    runner.run(
        ranged!(
            workload("unmap_range", count),
            range(count, Phase::Unmap, false)
        )
        .with("limit:load-store", limit(count, load_store)),
    );
}

fn translate<T: Table>(count: u64, is_huge: bool) -> impl Competitor {
    const LOOKUPS: u64 = 2000;
    let mut table = None;
    move |index: u64, watch: &mut Watch| {
        let table = table.get_or_insert_with(|| {
            let mut table = T::new();
            if is_huge {
                table.map_2m(count / SPARSE);
            } else {
                table.map_each(count);
            }
            table
        });
        let mut rng = Rng::new(index);
        let wanted: Vec<u64> = (0..LOOKUPS).map(|_| rng.below(count)).collect();
        let sum = watch.time(|| {
            wanted
                .iter()
                .map(|&page| table.translate(page).expect("it is mapped"))
                .fold(0u64, u64::wrapping_add)
        });
        assert_eq!(sum, wanted.iter().map(|&page| target(page)).sum::<u64>());
        Slice::ops(LOOKUPS, sum)
    }
}

fn translations(runner: &mut Runner, count: u64) {
    runner.run(programs!(
        workload("translate_4k", count),
        translate(count, false)
    ));
    // Of the same reach, and at least 1 GiB.
    let count = count.max(1 << 18);
    runner.run(programs!(
        workload("translate_2m", count / SPARSE),
        translate(count, true)
    ));
}

fn sparsely<T: Table>(count: u64, timed: Phase) -> impl Competitor {
    move |_: u64, watch: &mut Watch| {
        let mut table = T::new();
        timed_if(watch, timed == Phase::Map, || table.map_sparse(count));
        let first = timed_if(watch, timed == Phase::Unmap, || table.unmap_sparse(count));
        timed_if(watch, timed == Phase::Remap, || table.map_sparse(count));
        let second = table.unmap_sparse(count);
        assert_eq!(first, second, "other frames the second time");
        Slice::ops(count, first)
    }
}

/// Zeroes frames of memory that is larger than the caches.
fn zeroing() -> impl Competitor {
    const FRAMES: usize = 1 << 14;
    let region = Region::new(FRAMES as u64).touched();
    let mut at = 0;
    move |_: u64, watch: &mut Watch| {
        watch.time(|| {
            for _ in 0..256 {
                at = (at + 1) % FRAMES;
                // SAFETY: a frame of the region, which this value owns.
                unsafe { region.base().add(at * 4096).write_bytes(0, 4096) };
            }
        });
        Slice::limit(256)
    }
}

fn sparse(runner: &mut Runner, count: u64) {
    for (name, phase) in [
        ("sparse_map", Phase::Map),
        ("sparse_unmap", Phase::Unmap),
        ("sparse_remap", Phase::Remap),
    ] {
        if !runner.wants(name) {
            continue;
        }
        let mut entries = programs!(workload(name, count), sparsely(count, phase));
        if phase == Phase::Map {
            entries = entries.with("limit:zero-table", zeroing());
        }
        runner.run(entries);
    }
}

/// Pages that each of two threads maps and unmaps, in a GiB of its own.
const RACED: u64 = 4096;

fn raced_kmem() -> impl Competitor {
    let table = Kmem::new();
    move |_: u64, watch: &mut Watch| {
        let table = table.table();
        let (elapsed, sums) = race(|cpu| {
            run_as(cpu);
            let first = page(cpu as u64 * (1 << 18));
            let range = PageRange::with_count(first, RACED).expect("not empty");
            let mut cursor = table.cursor(range).expect("a valid range");
            for (at, index) in range.iter().zip(0u64..) {
                let handle = Kmem::handle(index, Order::ZERO);
                cursor
                    .map(at, handle, Rights::USER_DATA)
                    .expect("the place is free");
            }
            drop(cursor);
            let mut sum = 0;
            for at in range.iter() {
                sum += unmap_kmem(table, PageRange::single(at));
            }
            sum
        });
        watch.add(elapsed);
        Slice::ops(2 * RACED, sums[0] + sums[1])
    }
}

fn raced_offset() -> impl Competitor {
    let table = Locked::new(Offset::new());
    move |_: u64, watch: &mut Watch| {
        let (elapsed, sums) = race(|cpu| {
            let first = cpu as u64 * (1 << 18);
            for index in 0..RACED {
                // SAFETY: no processor uses these tables.
                let mapped = table.with(|table| unsafe {
                    table
                        .mapper
                        .map_to(
                            x86_page::<x86::Size4KiB>(first + index),
                            x86_frame(index),
                            x86_flags(true),
                            &mut PoolFrames,
                        )
                        .map(x86::mapper::MapperFlush::ignore)
                });
                mapped.expect("the place is free");
            }
            let mut sum = 0;
            for index in 0..RACED {
                let page = x86_page::<x86::Size4KiB>(first + index);
                let unmapped = table.with(|table| table.mapper.unmap(page));
                let (frame, flush) = unmapped.expect("it is mapped");
                flush.ignore();
                sum += frame.start_address().as_u64() / 4096;
            }
            sum
        });
        watch.add(elapsed);
        Slice::ops(2 * RACED, sums[0] + sums[1])
    }
}

fn raced_multiarch() -> impl Competitor {
    let table = Locked::new(Multiarch::new());
    move |_: u64, watch: &mut Watch| {
        let (elapsed, sums) = race(|cpu| {
            let first = cpu as u64 * (1 << 18);
            for index in 0..RACED {
                let mapped = table.with(|table| {
                    table.0.cursor().map(
                        arch_address(first + index),
                        arch_frame(index),
                        PageSize::Size4K,
                        arch_flags(true),
                    )
                });
                mapped.expect("the place is free");
            }
            let mut sum = 0;
            for index in 0..RACED {
                let at = arch_address(first + index);
                let unmapped = table.with(|table| table.0.cursor().unmap(at));
                sum += unmapped.expect("it is mapped").0.as_usize() as u64 / 4096;
            }
            sum
        });
        watch.add(elapsed);
        Slice::ops(2 * RACED, sums[0] + sums[1])
    }
}

fn two_threads(runner: &mut Runner) {
    if runner.wants("cursors_2t") {
        runner.run(
            Workload::new(AREA, "cursors_2t", Unit::Ns)
                .threads(2)
                .with("kmem", raced_kmem())
                .with("x86_64", raced_offset())
                .with("page_table_multiarch", raced_multiarch()),
        );
    }
}

fn metadata(runner: &mut Runner, count: u64) {
    let of_kmem = move |_: u64, _: &mut Watch| {
        let mut table = Kmem::new();
        table.map_range(count, false);
        let bytes = table.table().table_count() * size_of::<FrameSlot>();
        Slice::value(bytes as f64 / count as f64)
    };
    runner.run(
        Workload::new(AREA, "meta_per_page", Unit::Bytes)
            .n(count)
            .with("kmem", of_kmem),
    );
}
