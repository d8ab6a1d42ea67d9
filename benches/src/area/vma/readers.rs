//! Readers on two threads, and a reader beside a writer: kmem's shared tree and a `BTreeMap` in a lock of readers and writers.
//!
//! `readers_2t` is wall time by lookup of both threads together: half of what one thread needs where readers do not disturb each
//! other. `reader_with_writer` is the time of a lookup while the other thread takes a page out of ranges and puts it back.

use std::collections::BTreeMap;
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use kmem_hal::Page;
use kmem_vma_tree::SharedTree;

use super::{AREA, Input, Nodes, Ranges, nodes, page_range};
use crate::clock::{Watch, race};
use crate::harness::{Competitor, Runner, Slice, Workload};
use crate::output::Unit;
use crate::platform::{HostGrace, grace, run_as};
use crate::rng::Rng;

/// A map that readers look at while a writer edits it.
trait SharedMap: Sync {
    fn build(input: &Input) -> Self;
    /// Looks `ops` pages up, each known only when the one before was found.
    fn look(&self, pages: &[u64], ops: u64) -> u64;
    /// Takes the second page out of a range and puts it back, until `stop`.
    fn churn(&self, input: &Input, stop: &AtomicBool);
}

struct Shared(SharedTree<u64, Nodes, &'static HostGrace>);

// SAFETY: a cache and a grace period may be used by all CPUs; `race` gives each thread one.
unsafe impl Sync for Shared {}

impl SharedMap for Shared {
    fn build(input: &Input) -> Self {
        let mut tree = SharedTree::new_in(nodes(), grace());
        let (mut writer, _) = tree.split();
        for &(first, last, value) in &input.vmas {
            writer
                .store(page_range(first, last), Some(value), &mut |_| ())
                .expect("memory for nodes");
        }
        Self(tree)
    }
    fn look(&self, pages: &[u64], ops: u64) -> u64 {
        chain(pages, ops, |page| {
            // A fault opens a section of its own.
            let section = self.0.read();
            section
                .get(Page::from_number(page))
                .map(|entry| entry.value)
        })
    }
    fn churn(&self, input: &Input, stop: &AtomicBool) {
        // SAFETY: one thread churns.
        let mut writer = unsafe { self.0.writer() };
        let mut rng = Rng::new(7);
        while !stop.load(Ordering::Relaxed) {
            let (first, _, value) = input.any(&mut rng);
            let page = page_range(first + 1, first + 1);
            while writer.store(page, None, &mut |_| ()).is_err() {
                writer.quiesce();
            }
            while writer.store_merged(page, value, &mut |_| ()).is_err() {
                writer.quiesce();
            }
        }
    }
}

type Locked = RwLock<BTreeMap<u64, (u64, u64)>>;

impl SharedMap for Locked {
    fn build(input: &Input) -> Self {
        RwLock::new(Ranges::build(&input.vmas))
    }
    fn look(&self, pages: &[u64], ops: u64) -> u64 {
        chain(pages, ops, |page| {
            self.read().expect("no panic").lookup(page)
        })
    }
    fn churn(&self, input: &Input, stop: &AtomicBool) {
        let mut rng = Rng::new(7);
        while !stop.load(Ordering::Relaxed) {
            let vma = input.any(&mut rng);
            self.write().expect("no panic").punch(vma, vma.0 + 1);
        }
    }
}

fn chain(pages: &[u64], ops: u64, look: impl Fn(u64) -> Option<u64>) -> u64 {
    let (mut sum, mut at) = (0u64, 0usize);
    for _ in 0..ops {
        // A page that is out for a moment counts nothing.
        let value = look(pages[at % pages.len()]).unwrap_or(0);
        sum = sum.wrapping_add(value);
        at += 1 + (value & 1) as usize;
    }
    sum
}

/// Random pages of ranges, never the one that is taken out and put back.
fn pages(input: &Input, seed: u64) -> Vec<u64> {
    let mut rng = Rng::new(seed);
    (0..1 << 12)
        .map(|_| {
            let (first, last, _) = input.any(&mut rng);
            first + 2 + rng.below(last - first - 1)
        })
        .collect()
}

pub(super) fn run(runner: &mut Runner, input: &Input, n: u64) {
    if runner.wants("readers_2t") {
        let workload = Workload::new(AREA, "readers_2t", Unit::Ns).n(n).threads(2);
        runner.run(
            workload
                .with("kmem", two_readers::<Shared>(input))
                .with("rwlock<btreemap>", two_readers::<Locked>(input)),
        );
    }
    if runner.wants("reader_with_writer") {
        let workload = Workload::new(AREA, "reader_with_writer", Unit::Ns)
            .n(n)
            .threads(2);
        runner.run(
            workload
                .with("kmem", beside_writer::<Shared>(input))
                .with("rwlock<btreemap>", beside_writer::<Locked>(input)),
        );
    }
}

fn two_readers<'i, M: SharedMap + 'i>(input: &'i Input) -> impl Competitor + 'i {
    let mut map = None;
    move |index: u64, watch: &mut Watch| {
        let map: &M = map.get_or_insert_with(|| M::build(input));
        let ops = 10 * input.ops;
        let pages = [pages(input, index), pages(input, !index)];
        let (elapsed, sums) = race(|cpu| {
            run_as(cpu);
            map.look(&pages[cpu], ops)
        });
        watch.add(elapsed);
        Slice::ops(2 * ops, sums[0].wrapping_add(sums[1]))
    }
}

fn beside_writer<'i, M: SharedMap + 'i>(input: &'i Input) -> impl Competitor + 'i {
    let mut map = None;
    move |index: u64, watch: &mut Watch| {
        let map: &M = map.get_or_insert_with(|| M::build(input));
        let ops = 10 * input.ops;
        let pages = pages(input, index);
        let stop = AtomicBool::new(false);
        let (_, results) = race(|cpu| {
            run_as(cpu);
            if cpu == 1 {
                map.churn(input, &stop);
                return None;
            }
            let start = Instant::now();
            let sum = map.look(&pages, ops);
            let elapsed = start.elapsed();
            stop.store(true, Ordering::Relaxed);
            Some((elapsed, sum))
        });
        let [Some((elapsed, sum)), _] = results else {
            unreachable!("the first thread reads")
        };
        watch.add(elapsed);
        Slice::ops(ops, sum)
    }
}
