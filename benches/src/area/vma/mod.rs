//! Trees of ranges: kmem-vma-tree beside maps of ranges from the registry and `BTreeMap` with code by hand.
//!
//! N ranges of 3 to 16 pages, a fifth of them without a gap to the next, gaps of 1 to 8 pages otherwise, and one gap of 4096 pages in the
//! middle. Values differ, so that neighbours never merge by accident. `btreemap` is `std`'s map from the first page to (last page, value);
//! what it lacks is written by hand, as kernels do. `limit:sorted-vec` is a sorted array with binary search.
//!
//! | workload | an operation |
//! |---|---|
//! | `lookup` | the value at a random page; the next page depends on it |
//! | `lookup_local` | the same, nine of ten in four ranges; kmem uses its finger |
//! | `insert_remove` | a range removed or put back |
//! | `gap_up`, `gap_down` | the lowest or highest gap of 4096 pages: half of all ranges lie before it |
//! | `iterate` | one range of a pass over all |
//! | `punch_merge` | a page taken out of the middle of a range and put back, so that one range is left; who is told no more than the page finds the range; see `maps.rs` |
//! | `duplicate` | a range of a whole copy; `kmem inserting` stores the ranges of the copy one by one, ascending |
//! | `bytes_per_range` | heap by range |
//! | `readers_2t` | a lookup, two threads at it |
//! | `reader_with_writer` | a lookup while another thread edits |
//! | `trace_mix_*` | a step of what a real program did to its address space |
//!
//! kmem's nodes come from kmem-slab, the others' from the host's malloc. A gap search that a crate does not have is a scan of its
//! iterator of gaps or of ranges.

use std::collections::BTreeMap;

use rangemap::RangeMap;

use crate::harness::{Runner, Workload};
use crate::output::Unit;
use crate::rng::Rng;

use maps::{Nodit, Ranges, Sorted};
use ours::{Kmem, Nodes, nodes, page_range};
use rbtree::Red;
use sets::{Areas, Intervals};
use workloads::{
    duplicate, gap, insert_remove, inserting, iterate, lookup, punch_merge, punch_merge_by,
};

mod bytes;
mod maps;
mod ours;
mod rbtree;
mod readers;
mod sets;
mod traces;
mod workloads;

const AREA: &str = "vma";

/// The pages that ranges may lie in.
const LIMITS: (u64, u64) = (16, (1 << 35) - 1);

/// Pages of the large gap.
const LARGE: u64 = 4096;

/// A range: first page, last page, value.
type Vma = (u64, u64, u64);

/// N ranges, descending, and the first page of the large gap.
fn ranges(n: u64) -> (Vec<Vma>, u64) {
    let mut rng = Rng::new(n);
    let mut at = LIMITS.0 + 1;
    let mut vmas = Vec::with_capacity(n as usize);
    let mut large = 0;
    for number in 0..n {
        let pages = 3 + rng.below(14);
        vmas.push((at, at + pages - 1, number + 1));
        at += pages;
        if number == n / 2 {
            large = at;
            at += LARGE;
        } else if rng.below(5) != 0 {
            at += 1 + rng.below(8);
        }
    }
    // No gap of 4096 pages below the first or above the last: a range to the end of the space closes it.
    vmas.push((at, LIMITS.1, n + 1));
    vmas.reverse();
    (vmas, large)
}

/// What a workload is made for: N ranges in two orders, and where the large gap is.
struct Input {
    vmas: Vec<Vma>,
    large: u64,
    ops: u64,
}

impl Input {
    fn new(n: u64, runner: &Runner) -> Self {
        let (vmas, large) = ranges(n);
        Self {
            vmas,
            large,
            ops: runner.size(1000, 2000),
        }
    }

    /// A random range, not the one that closes the space.
    fn any(&self, rng: &mut Rng) -> Vma {
        self.vmas[1 + rng.below(self.vmas.len() as u64 - 1) as usize]
    }
}

/// Adds all programs: `$make::<Map>(input, ..)` makes a competitor of a kind of map.
macro_rules! programs {
    ($workload:expr, $make:ident ( $input:expr $(, $argument:expr)* )) => {
        $workload
            .with("kmem", $make::<Kmem>($input $(, $argument)*))
            .with("btreemap", $make::<BTreeMap<u64, (u64, u64)>>($input $(, $argument)*))
            .with("rangemap", $make::<RangeMap<u64, u64>>($input $(, $argument)*))
            .with("nodit", $make::<Nodit>($input $(, $argument)*))
            .with("memory_set", $make::<Areas>($input $(, $argument)*))
            .with("iset", $make::<Intervals>($input $(, $argument)*))
            .with("rbtree", $make::<Red>($input $(, $argument)*))
    };
}

/// Runs the workloads of this area.
pub fn run(runner: &mut Runner) {
    let sizes: &[u64] = runner.size(&[100, 1000, 10_000], &[100, 1000, 10_000, 100_000]);
    for &n in sizes {
        let input = Input::new(n, runner);
        let workload = |name, unit| Workload::new(AREA, name, unit).n(n);
        for (name, is_local) in [("lookup", false), ("lookup_local", true)] {
            if runner.wants(name) {
                let workload = programs!(workload(name, Unit::Ns), lookup(&input, is_local));
                runner.run(workload.with("limit:sorted-vec", lookup::<Sorted>(&input, is_local)));
            }
        }
        if runner.wants("insert_remove") {
            runner.run(programs!(
                workload("insert_remove", Unit::Ns),
                insert_remove(&input)
            ));
        }
        for (name, up) in [("gap_up", true), ("gap_down", false)] {
            if runner.wants(name) {
                runner.run(programs!(workload(name, Unit::Ns), gap(&input, up)));
            }
        }
        if runner.wants("iterate") {
            let workload = programs!(workload("iterate", Unit::Ns), iterate(&input));
            runner.run(workload.with("limit:sorted-vec", iterate::<Sorted>(&input)));
        }
        if runner.wants("punch_merge") {
            let workload = programs!(workload("punch_merge", Unit::Ns), punch_merge(&input));
            runner.run(
                workload
                    .with(
                        "btreemap told-the-range",
                        punch_merge_by(&input, maps::punch_told),
                    )
                    .with("limit:sorted-vec", punch_merge::<Sorted>(&input)),
            );
        }
        if runner.wants("duplicate") {
            let workload = programs!(workload("duplicate", Unit::Ns), duplicate(&input));
            runner.run(workload.with("kmem inserting", inserting(&input)));
        }
        if runner.wants("bytes_per_range") {
            runner.run(bytes::workload(
                &input,
                workload("bytes_per_range", Unit::Bytes),
            ));
        }
        readers::run(runner, &input, n);
    }
    traces::run(runner);
}
