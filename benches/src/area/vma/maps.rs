//! The maps of ranges that the workloads run on: `BTreeMap` with code by hand, `rangemap`, `nodit`, a sorted array.
//!
//! What `punch_merge` asks of each: a page is erased, and stored again so that it becomes one with what touches it. `kmem`, `btreemap`,
//! `rangemap` and `nodit` are told the page alone: they search for the range, and look at both neighbours. `rbtree` searches too, but in code for
//! this case alone. `memory_set` and `iset` do not merge and are handed the range; so are `btreemap told-the-range`, which knows which two
//! ranges to look for and is no general store, and `limit:sorted-vec`.

use std::collections::BTreeMap;
use std::ops::Range;

use nodit::{Interval, NoditMap, interval::ii};
use rangemap::RangeMap;

use super::traces::Mapped;
use super::{LIMITS, Vma};

/// A map of ranges as the workloads see it.
pub(super) trait Ranges: Sized {
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

/// The ranges as those take them whose ranges do not hold their end.
pub(super) fn half_open(vmas: &[Vma]) -> impl Iterator<Item = (Range<u64>, u64)> {
    vmas.iter()
        .map(|&(first, last, value)| (first..last + 1, value))
}

/// `map`, with these ranges in it.
pub(super) fn filled<R: Ranges>(mut map: R, vmas: &[Vma]) -> R {
    for &vma in vmas {
        map.insert(vma);
    }
    map
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
    fn punch(&mut self, (_, _, value): Vma, page: u64) {
        Mapped::unmap(self, page, page);
        Mapped::map(self, (page, page, value));
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
        half_open(vmas).collect()
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

pub(super) type Nodit = NoditMap<u64, Interval<u64>, u64>;

impl Ranges for Nodit {
    type Finger = ();

    fn build(vmas: &[Vma]) -> Self {
        filled(Self::new(), vmas)
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
pub(super) struct Sorted(Vec<Vma>);

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

/// [`Ranges::punch`] by who is told the range as well as the page: nothing is searched for, and no case but this one would be right.
pub(super) fn punch_told(
    map: &mut BTreeMap<u64, (u64, u64)>,
    (first, last, value): Vma,
    page: u64,
) {
    map.insert(first, (page - 1, value));
    map.insert(page + 1, (last, value));
    // Back: both neighbours have the value, so the three become one.
    let below = *map.range(..page).next_back().expect("the lower part").1;
    let above = map.remove(&(page + 1)).expect("the upper part");
    assert_eq!(below.1, above.1);
    map.insert(first, (above.0, value));
}
