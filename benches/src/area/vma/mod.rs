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
//! | `punch_merge` | a page taken out of the middle of a range and put back, so that one range is left |
//! | `duplicate` | a range of a whole copy; `kmem inserting` stores the ranges of the copy one by one, ascending |
//! | `bytes_per_range` | heap by range |
//! | `readers_2t` | a lookup, two threads at it |
//! | `reader_with_writer` | a lookup while another thread edits |
//! | `trace_mix_*` | a step of what a real program did to its address space |
//!
//! kmem's nodes come from kmem-slab, the others' from the host's malloc. A gap search that a crate does not have is a scan of its
//! iterator of gaps or of ranges.

use std::collections::BTreeMap;
use std::time::Instant;

use kmem_hal::{Page, PageRange};
use kmem_slab::Cache;
use kmem_vma_tree::{Finger, GapRequest, Node, RangeTree};
use nodit::{Interval, NoditMap, interval::ii};
use rangemap::RangeMap;

use crate::clock::Watch;
use crate::harness::{Competitor, Runner, Slice, Workload};
use crate::output::Unit;
use crate::platform::{Machine, Region, SlabParts};
use crate::rng::Rng;

use rbtree::Red;
use sets::{Areas, Intervals};

mod rbtree;
mod readers;
mod sets;
mod traces;

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

/// A map of ranges as the workloads see it.
trait Ranges: Sized {
    /// What a reader keeps between lookups.
    type Finger: Default;

    /// A map of these ranges, which come descending.
    fn build(vmas: &[Vma]) -> Self;
    fn lookup(&self, page: u64) -> Option<u64>;
    /// A lookup near earlier ones.
    #[inline]
    fn lookup_near(&self, _finger: &mut Self::Finger, page: u64) -> Option<u64> {
        self.lookup(page)
    }
    fn insert(&mut self, vma: Vma);
    fn remove(&mut self, vma: Vma);
    fn gap_up(&self, pages: u64) -> Option<u64>;
    /// The first page of the highest place for so many pages.
    fn gap_down(&self, pages: u64) -> Option<u64>;
    /// The sum of (last page ^ value) over all ranges.
    fn sum(&self) -> u64;
    /// Takes a page out of the middle of `vma` and puts it back, so that one range is left.
    fn punch(&mut self, vma: Vma, page: u64);
    fn copy(&self) -> Self;
    fn count(&self) -> usize;
}

impl Ranges for BTreeMap<u64, (u64, u64)> {
    type Finger = ();

    fn build(vmas: &[Vma]) -> Self {
        vmas.iter()
            .map(|&(first, last, value)| (first, (last, value)))
            .collect()
    }
    #[inline]
    fn lookup(&self, page: u64) -> Option<u64> {
        let (_, &(last, value)) = self.range(..=page).next_back()?;
        (page <= last).then_some(value)
    }
    fn insert(&mut self, (first, last, value): Vma) {
        self.insert(first, (last, value));
    }
    fn remove(&mut self, vma: Vma) {
        self.remove(&vma.0);
    }
    fn gap_up(&self, pages: u64) -> Option<u64> {
        let mut from = LIMITS.0;
        for (&first, &(last, _)) in self {
            if first - from >= pages {
                return Some(from);
            }
            from = last + 1;
        }
        (LIMITS.1 + 1 - from >= pages).then_some(from)
    }
    fn gap_down(&self, pages: u64) -> Option<u64> {
        let mut end = LIMITS.1 + 1;
        for (&first, &(last, _)) in self.iter().rev() {
            if end - last > pages {
                return Some(end - pages);
            }
            end = first;
        }
        (end - LIMITS.0 >= pages).then_some(end - pages)
    }
    fn sum(&self) -> u64 {
        self.values()
            .fold(0, |sum, &(last, value)| sum.wrapping_add(last ^ value))
    }
    fn punch(&mut self, (first, last, value): Vma, page: u64) {
        self.insert(first, (page - 1, value));
        self.insert(page + 1, (last, value));
        // Back: both neighbours have the value, so the three become one.
        let below = *self.range(..page).next_back().expect("the lower part").1;
        let above = self.remove(&(page + 1)).expect("the upper part");
        assert_eq!(below.1, above.1);
        self.insert(first, (above.0, value));
    }
    fn copy(&self) -> Self {
        self.clone()
    }
    fn count(&self) -> usize {
        self.len()
    }
}

impl Ranges for RangeMap<u64, u64> {
    type Finger = ();

    fn build(vmas: &[Vma]) -> Self {
        vmas.iter()
            .map(|&(first, last, value)| (first..last + 1, value))
            .collect()
    }
    fn lookup(&self, page: u64) -> Option<u64> {
        self.get(&page).copied()
    }
    fn insert(&mut self, (first, last, value): Vma) {
        self.insert(first..last + 1, value);
    }
    fn remove(&mut self, (first, last, _): Vma) {
        self.remove(first..last + 1);
    }
    fn gap_up(&self, pages: u64) -> Option<u64> {
        let limits = LIMITS.0..LIMITS.1 + 1;
        self.gaps(&limits)
            .find(|gap| gap.end - gap.start >= pages)
            .map(|gap| gap.start)
    }
    fn gap_down(&self, pages: u64) -> Option<u64> {
        let mut end = LIMITS.1 + 1;
        for (range, _) in self.iter().rev() {
            if end - range.end >= pages {
                return Some(end - pages);
            }
            end = range.start;
        }
        (end - LIMITS.0 >= pages).then_some(end - pages)
    }
    fn sum(&self) -> u64 {
        self.iter().fold(0, |sum, (range, value)| {
            sum.wrapping_add((range.end - 1) ^ value)
        })
    }
    fn punch(&mut self, (_, _, value): Vma, page: u64) {
        self.remove(page..page + 1);
        self.insert(page..page + 1, value);
    }
    fn copy(&self) -> Self {
        self.clone()
    }
    fn count(&self) -> usize {
        self.len()
    }
}

type Nodit = NoditMap<u64, Interval<u64>, u64>;

impl Ranges for Nodit {
    type Finger = ();

    fn build(vmas: &[Vma]) -> Self {
        let mut map = Self::new();
        for &vma in vmas {
            Ranges::insert(&mut map, vma);
        }
        map
    }
    fn lookup(&self, page: u64) -> Option<u64> {
        self.get_at_point(&page).copied()
    }
    fn insert(&mut self, (first, last, value): Vma) {
        self.insert_strict(ii(first, last), value)
            .expect("the place is free");
    }
    fn remove(&mut self, (first, last, _): Vma) {
        assert_eq!(self.remove_overlapping(&ii(first, last)).count(), 1);
    }
    fn gap_up(&self, pages: u64) -> Option<u64> {
        self.gaps_trimmed(&ii(LIMITS.0, LIMITS.1))
            .find(|gap| gap.end() - gap.start() + 1 >= pages)
            .map(|gap| *gap.start())
    }
    fn gap_down(&self, pages: u64) -> Option<u64> {
        let mut end = LIMITS.1 + 1;
        for (range, _) in self.iter().rev() {
            if end - range.end() > pages {
                return Some(end - pages);
            }
            end = *range.start();
        }
        (end - LIMITS.0 >= pages).then_some(end - pages)
    }
    fn sum(&self) -> u64 {
        self.iter().fold(0, |sum, (range, value)| {
            sum.wrapping_add(range.end() ^ value)
        })
    }
    fn punch(&mut self, (_, _, value): Vma, page: u64) {
        let _ = self.cut(&ii(page, page)).count();
        let merged = self.insert_merge_touching_if_values_equal(ii(page, page), value);
        merged.expect("the place is free");
    }
    fn copy(&self) -> Self {
        self.clone()
    }
    fn count(&self) -> usize {
        self.len()
    }
}

/// A sorted array: the limit of what any search by page can do.
#[derive(Clone)]
struct Sorted(Vec<Vma>);

impl Ranges for Sorted {
    type Finger = ();

    fn build(vmas: &[Vma]) -> Self {
        let mut vmas = vmas.to_vec();
        vmas.sort_unstable();
        Self(vmas)
    }
    #[inline]
    fn lookup(&self, page: u64) -> Option<u64> {
        let above = self.0.partition_point(|vma| vma.0 <= page);
        let (_, last, value) = *self.0.get(above.checked_sub(1)?)?;
        (page <= last).then_some(value)
    }
    fn insert(&mut self, vma: Vma) {
        let at = self.0.partition_point(|other| other.0 < vma.0);
        self.0.insert(at, vma);
    }
    fn remove(&mut self, vma: Vma) {
        let at = self.0.partition_point(|other| other.0 < vma.0);
        self.0.remove(at);
    }
    fn gap_up(&self, pages: u64) -> Option<u64> {
        let found = self.0.windows(2).find(|two| two[1].0 - two[0].1 > pages)?;
        Some(found[0].1 + 1)
    }
    fn gap_down(&self, pages: u64) -> Option<u64> {
        let found = self.0.windows(2).rfind(|two| two[1].0 - two[0].1 > pages)?;
        Some(found[1].0 - pages)
    }
    fn sum(&self) -> u64 {
        self.0
            .iter()
            .fold(0, |sum, &(_, last, value)| sum.wrapping_add(last ^ value))
    }
    fn punch(&mut self, vma: Vma, page: u64) {
        let at = self.0.partition_point(|other| other.0 < vma.0);
        self.0[at].1 = page - 1;
        self.0.insert(at + 1, (page + 1, vma.1, vma.2));
        self.0[at].1 = self.0.remove(at + 1).1;
    }
    fn copy(&self) -> Self {
        self.clone()
    }
    fn count(&self) -> usize {
        self.0.len()
    }
}

type Nodes = &'static Cache<'static, Node, SlabParts>;

/// The nodes of all of kmem's trees.
fn nodes() -> Nodes {
    static NODES: std::sync::OnceLock<Leaked> = std::sync::OnceLock::new();
    struct Leaked(Nodes);
    // SAFETY: a cache may be used by all CPUs.
    unsafe impl Send for Leaked {}
    // SAFETY: as above.
    unsafe impl Sync for Leaked {}
    NODES
        .get_or_init(|| {
            let machine = Machine::leak(Region::new(1 << 16));
            Leaked(Box::leak(Box::new(Cache::new(&machine.slab, "vma_node"))))
        })
        .0
}

type Kmem = RangeTree<u64, Nodes>;

fn page_range(first: u64, last: u64) -> PageRange {
    PageRange::new(Page::from_number(first), Page::from_number(last)).expect("first <= last")
}

impl Ranges for Kmem {
    type Finger = Finger<u64>;

    fn build(vmas: &[Vma]) -> Self {
        let mut tree = Self::new_in(nodes());
        for &vma in vmas {
            Ranges::insert(&mut tree, vma);
        }
        tree
    }
    #[inline]
    fn lookup(&self, page: u64) -> Option<u64> {
        Some(self.get(Page::from_number(page))?.value)
    }
    #[inline]
    fn lookup_near(&self, finger: &mut Finger<u64>, page: u64) -> Option<u64> {
        Some(self.get_with(finger, Page::from_number(page))?.value)
    }
    fn insert(&mut self, (first, last, value): Vma) {
        self.store(page_range(first, last), Some(value), &mut |_| ())
            .expect("memory for nodes");
    }
    fn remove(&mut self, (first, last, _): Vma) {
        self.store(page_range(first, last), None, &mut |_| ())
            .expect("memory for nodes");
    }
    fn gap_up(&self, pages: u64) -> Option<u64> {
        let request = GapRequest::new(pages).limits(page_range(LIMITS.0, LIMITS.1));
        Some(self.find_gap_up(&request)?.first().number())
    }
    fn gap_down(&self, pages: u64) -> Option<u64> {
        let request = GapRequest::new(pages).limits(page_range(LIMITS.0, LIMITS.1));
        Some(self.find_gap_down(&request)?.first().number())
    }
    fn sum(&self) -> u64 {
        self.iter().fold(0, |sum, entry| {
            sum.wrapping_add(entry.last().number() ^ entry.value)
        })
    }
    fn punch(&mut self, (_, _, value): Vma, page: u64) {
        self.store(page_range(page, page), None, &mut |_| ())
            .expect("memory for nodes");
        self.store_merged(page_range(page, page), value, &mut |_| ())
            .expect("memory for nodes");
    }
    fn copy(&self) -> Self {
        self.duplicate_in(nodes(), &mut |entry| Some(entry.value))
            .expect("memory for nodes")
    }
    fn count(&self) -> usize {
        self.len()
    }
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
            runner.run(programs!(
                workload("punch_merge", Unit::Ns),
                punch_merge(&input)
            ));
        }
        if runner.wants("duplicate") {
            let workload = programs!(workload("duplicate", Unit::Ns), duplicate(&input));
            runner.run(workload.with("kmem inserting", inserting(&input)));
        }
        if runner.wants("bytes_per_range") {
            runner.run(bytes(&input, workload("bytes_per_range", Unit::Bytes)));
        }
        readers::run(runner, &input, n);
    }
    traces::run(runner);
}

/// Builds a map in the first slice, so that a failure costs a row and not the run.
struct Built<'i, R> {
    input: &'i Input,
    map: Option<R>,
}

impl<'i, R: Ranges> Built<'i, R> {
    fn new(input: &'i Input) -> Self {
        Self { input, map: None }
    }

    fn map(&mut self) -> &mut R {
        self.map.get_or_insert_with(|| {
            let map = R::build(&self.input.vmas);
            assert_eq!(map.count(), self.input.vmas.len(), "ranges were lost");
            for &(first, last, value) in self.input.vmas.iter().take(100) {
                assert_eq!(map.lookup(first), Some(value));
                assert_eq!(map.lookup(last), Some(value));
            }
            assert_eq!(map.lookup(self.input.large), None);
            map
        })
    }
}

fn lookup<'i, R: Ranges + 'i>(input: &'i Input, is_local: bool) -> impl Competitor + 'i {
    const PAGES: usize = 1 << 12;
    let mut built = Built::<R>::new(input);
    move |index: u64, watch: &mut Watch| {
        let mut rng = Rng::new(index);
        let count = input.vmas.len() as u64;
        let hot: [u64; 4] = std::array::from_fn(|_| 1 + rng.below(count - 1));
        let pages: Vec<u64> = (0..PAGES)
            .map(|_| {
                let at = if is_local && rng.below(10) > 0 {
                    hot[rng.below(4) as usize]
                } else {
                    1 + rng.below(count - 1)
                };
                let (first, last, _) = input.vmas[at as usize];
                first + rng.below(last - first + 1)
            })
            .collect();
        let map = built.map();
        let mut finger = R::Finger::default();
        let ops = input.ops;
        let sum = watch.time(|| {
            let (mut sum, mut at) = (0u64, 0usize);
            for _ in 0..ops {
                let page = pages[at % PAGES];
                let value = if is_local {
                    map.lookup_near(&mut finger, page)
                } else {
                    map.lookup(page)
                };
                let value = value.expect("a page in a range");
                sum = sum.wrapping_add(value);
                // The next page is known only when this value is.
                at += 1 + (value & 1) as usize;
            }
            sum
        });
        Slice::ops(ops, sum)
    }
}

fn insert_remove<'i, R: Ranges + 'i>(input: &'i Input) -> impl Competitor + 'i {
    let mut built = Built::<R>::new(input);
    move |index: u64, watch: &mut Watch| {
        let mut rng = Rng::new(index);
        let picked: Vec<Vma> = (0..input.ops / 2).map(|_| input.any(&mut rng)).collect();
        let map = built.map();
        watch.time(|| {
            for &vma in &picked {
                map.remove(vma);
                map.insert(vma);
            }
        });
        Slice::ops(2 * picked.len() as u64, map.sum())
    }
}

fn gap<'i, R: Ranges + 'i>(input: &'i Input, up: bool) -> impl Competitor + 'i {
    fn search<R: Ranges>(map: &R, up: bool) -> Option<u64> {
        let pages = std::hint::black_box(LARGE);
        if up {
            map.gap_up(pages)
        } else {
            map.gap_down(pages)
        }
    }
    let mut built = Built::<R>::new(input);
    // Most programs pass all ranges below the gap, some none: so many searches as take 100 microseconds.
    let mut searches = None;
    move |_: u64, watch: &mut Watch| {
        let map = built.map();
        let searches = *searches.get_or_insert_with(|| {
            let begin = Instant::now();
            std::hint::black_box(search(map, up));
            (100_000 / begin.elapsed().as_nanos().max(1) as u64).clamp(4, 1000)
        });
        let found = watch.time(|| {
            let mut found = None;
            for _ in 0..searches {
                found = search(map, up);
            }
            found
        });
        assert_eq!(found, Some(input.large), "another gap was found");
        Slice::ops(searches, input.large)
    }
}

fn iterate<'i, R: Ranges + 'i>(input: &'i Input) -> impl Competitor + 'i {
    let mut built = Built::<R>::new(input);
    move |_: u64, watch: &mut Watch| {
        let count = input.vmas.len() as u64;
        let rounds = (10_000 / count).max(1);
        let map = built.map();
        let sum = watch.time(|| {
            let mut sum = 0u64;
            for _ in 0..rounds {
                sum = sum.wrapping_add(std::hint::black_box(&*map).sum());
            }
            sum
        });
        Slice::ops(rounds * count, sum)
    }
}

fn punch_merge<'i, R: Ranges + 'i>(input: &'i Input) -> impl Competitor + 'i {
    let mut built = Built::<R>::new(input);
    move |index: u64, watch: &mut Watch| {
        let mut rng = Rng::new(index);
        let picked: Vec<Vma> = (0..input.ops / 2).map(|_| input.any(&mut rng)).collect();
        let map = built.map();
        watch.time(|| {
            for &vma in &picked {
                map.punch(vma, vma.0 + 1);
            }
        });
        assert_eq!(map.count(), input.vmas.len(), "the pieces did not merge");
        Slice::ops(picked.len() as u64, map.sum())
    }
}

fn duplicate<'i, R: Ranges + 'i>(input: &'i Input) -> impl Competitor + 'i {
    copies(input, R::copy)
}

/// What a copy costs whoever has no more than `store`: all ranges again, as an iterator gives them.
fn inserting(input: &Input) -> impl Competitor + '_ {
    copies(input, |map: &Kmem| {
        let mut copy = Kmem::new_in(nodes());
        for entry in map.iter() {
            copy.store(entry.range, Some(entry.value), &mut |_| ())
                .expect("memory for nodes");
        }
        copy
    })
}

fn copies<'i, R: Ranges + 'i>(
    input: &'i Input,
    copy: impl Fn(&R) -> R + 'i,
) -> impl Competitor + 'i {
    let mut built = Built::<R>::new(input);
    move |_: u64, watch: &mut Watch| {
        let count = input.vmas.len() as u64;
        let rounds = (1000 / count).max(1);
        let map = built.map();
        let mut copies = Vec::new();
        watch.time(|| {
            for _ in 0..rounds {
                copies.push(copy(map));
            }
        });
        let sum = copies
            .iter()
            .fold(0u64, |sum, copy| sum.wrapping_add(copy.sum()));
        Slice::ops(rounds * count, sum)
    }
}

/// Bytes that the host's heap has handed out.
fn heap_bytes() -> usize {
    // SAFETY: no arguments; it reads malloc's counters.
    unsafe { libc::mallinfo2() }.uordblks
}

fn bytes<'i>(input: &'i Input, workload: Workload<'i>) -> Workload<'i> {
    // Several maps, so that what malloc keeps aside does not matter.
    let copies = (20_000 / input.vmas.len()).max(1);
    let by_range = move |bytes: f64| Slice::value(bytes / (copies * input.vmas.len()) as f64);
    fn of_heap<R: Ranges>(vmas: &[Vma], copies: usize) -> f64 {
        let mut maps = Vec::with_capacity(copies);
        let before = heap_bytes();
        maps.extend((0..copies).map(|_| R::build(vmas)));
        let bytes = heap_bytes() - before;
        assert_eq!(maps[0].count(), vmas.len());
        bytes as f64
    }
    let of_kmem = move |_: u64, _: &mut Watch| {
        let active = || nodes().info().map_or(0, |info| info.active_objects);
        let before = active();
        let maps: Vec<Kmem> = (0..copies).map(|_| Kmem::build(&input.vmas)).collect();
        assert_eq!(maps[0].count(), input.vmas.len());
        by_range((active() - before) as f64 * size_of::<Node>() as f64)
    };
    let of_trees = move |_: u64, _: &mut Watch| {
        by_range(of_heap::<BTreeMap<u64, (u64, u64)>>(&input.vmas, copies))
    };
    let of_rangemap =
        move |_: u64, _: &mut Watch| by_range(of_heap::<RangeMap<u64, u64>>(&input.vmas, copies));
    let of_nodit = move |_: u64, _: &mut Watch| by_range(of_heap::<Nodit>(&input.vmas, copies));
    let of_areas = move |_: u64, _: &mut Watch| by_range(of_heap::<Areas>(&input.vmas, copies));
    let of_iset = move |_: u64, _: &mut Watch| by_range(of_heap::<Intervals>(&input.vmas, copies));
    let of_red = move |_: u64, _: &mut Watch| by_range(of_heap::<Red>(&input.vmas, copies));
    workload
        .with("kmem", of_kmem)
        .with("btreemap", of_trees)
        .with("rangemap", of_rangemap)
        .with("nodit", of_nodit)
        .with("memory_set", of_areas)
        .with("iset", of_iset)
        .with("rbtree", of_red)
}
