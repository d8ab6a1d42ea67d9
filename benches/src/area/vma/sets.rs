//! Two more peers: `memory_set` (ArceOS: a `BTreeMap` of areas) and `iset` (a red-black tree of intervals in an arena).
//!
//! `memory_set` never merges, and an unmapping looks at every area; `iset` allows overlaps and has no iterator from above. What they
//! lack is written by hand: a search from above passes all ranges, and merging takes the parts out and puts the whole in.

use iset::IntervalMap;
use memory_addr::AddrRange;
use memory_set::{MappingBackend, MemoryArea, MemorySet};

use super::maps::{filled, half_open};
use super::traces::Mapped;
use super::{LIMITS, Ranges, Vma};

/// Maps nothing: what is measured is the set of areas.
#[derive(Clone)]
pub(super) struct Nowhere;

impl MappingBackend for Nowhere {
    type Addr = usize;
    /// The area's value.
    type Flags = u64;
    type PageTable = ();

    fn map(&self, _: usize, _: usize, _: u64, (): &mut ()) -> bool {
        true
    }
    fn unmap(&self, _: usize, _: usize, (): &mut ()) -> bool {
        true
    }
    fn protect(&self, _: usize, _: usize, _: u64, (): &mut ()) -> bool {
        true
    }
}

/// Page numbers play addresses.
pub(super) type Areas = MemorySet<Nowhere>;

fn pages(area: &MemoryArea<Nowhere>) -> (u64, u64) {
    (area.start() as u64, area.end() as u64 - 1)
}

impl Ranges for Areas {
    type Finger = ();

    fn build(vmas: &[Vma]) -> Self {
        filled(Self::new(), vmas)
    }
    fn lookup(&self, page: u64) -> Option<u64> {
        Some(self.find(page as usize)?.flags())
    }
    fn insert(&mut self, (first, last, value): Vma) {
        let area = MemoryArea::new(first as usize, (last + 1 - first) as usize, value, Nowhere);
        self.map(area, &mut (), false).expect("the place is free");
    }
    fn remove(&mut self, (first, last, _): Vma) {
        self.unmap(first as usize, (last + 1 - first) as usize, &mut ())
            .expect("nothing fails");
    }
    fn gap_up(&self, pages: u64) -> Option<u64> {
        let limits = AddrRange::new(LIMITS.0 as usize, LIMITS.1 as usize + 1);
        let found = self.find_free_area(LIMITS.0 as usize, pages as usize, limits, 1);
        Some(found? as u64)
    }
    fn gap_down(&self, pages: u64) -> Option<u64> {
        last_gap(self.iter().map(self::pages), pages)
    }
    fn sum(&self) -> u64 {
        self.iter().fold(0, |sum, area| {
            sum.wrapping_add(pages(area).1 ^ area.flags())
        })
    }
    fn punch(&mut self, vma: Vma, page: u64) {
        self.unmap(page as usize, 1, &mut ())
            .expect("nothing fails");
        Ranges::remove(self, vma);
        Ranges::insert(self, vma);
    }
    fn copy(&self) -> Self {
        let mut areas = Self::new();
        for area in self.iter() {
            let (first, last) = pages(area);
            Ranges::insert(&mut areas, (first, last, area.flags()));
        }
        areas
    }
    fn count(&self) -> usize {
        self.len()
    }
}

impl Mapped for Areas {
    fn empty() -> Self {
        Self::new()
    }
    fn map(&mut self, (mut first, mut last, value): Vma) {
        Mapped::unmap(self, first, last);
        let near = |page: Option<u64>| {
            let area = self.find(page? as usize)?;
            (area.flags() == value).then(|| pages(area))
        };
        let (below, above) = (near(first.checked_sub(1)), near(Some(last + 1)));
        for (start, end) in [below, above].into_iter().flatten() {
            Mapped::unmap(self, start, end);
            (first, last) = (first.min(start), last.max(end));
        }
        Ranges::insert(self, (first, last, value));
    }
    fn unmap(&mut self, first: u64, last: u64) {
        Ranges::remove(self, (first, last, 0));
    }
}

/// The first page of the highest place for so many pages beside ascending ranges.
fn last_gap(ranges: impl Iterator<Item = (u64, u64)>, pages: u64) -> Option<u64> {
    let (mut from, mut found) = (LIMITS.0, None);
    for (first, last) in ranges {
        if first - from >= pages {
            found = Some(first - pages);
        }
        from = last + 1;
    }
    if LIMITS.1 + 1 - from >= pages {
        found = Some(LIMITS.1 + 1 - pages);
    }
    found
}

pub(super) type Intervals = IntervalMap<u64, u64>;

impl Ranges for Intervals {
    type Finger = ();

    fn build(vmas: &[Vma]) -> Self {
        half_open(vmas).collect()
    }
    fn lookup(&self, page: u64) -> Option<u64> {
        self.values_overlap(page).next().copied()
    }
    fn insert(&mut self, (first, last, value): Vma) {
        assert!(self.insert(first..last + 1, value).is_none());
    }
    fn remove(&mut self, (first, last, _): Vma) {
        assert!(self.remove(first..last + 1).is_some());
    }
    fn gap_up(&self, pages: u64) -> Option<u64> {
        let mut from = LIMITS.0;
        for range in self.intervals(..) {
            if range.start - from >= pages {
                return Some(from);
            }
            from = range.end;
        }
        (LIMITS.1 + 1 - from >= pages).then_some(from)
    }
    fn gap_down(&self, pages: u64) -> Option<u64> {
        let ranges = self.intervals(..).map(|range| (range.start, range.end - 1));
        last_gap(ranges, pages)
    }
    fn sum(&self) -> u64 {
        self.iter(..).fold(0, |sum, (range, value)| {
            sum.wrapping_add((range.end - 1) ^ value)
        })
    }
    fn punch(&mut self, (first, last, value): Vma, page: u64) {
        Ranges::remove(self, (first, last, value));
        Ranges::insert(self, (first, page - 1, value));
        Ranges::insert(self, (page + 1, last, value));
        // Back: both neighbours have the value, so the three become one.
        Ranges::remove(self, (first, page - 1, value));
        Ranges::remove(self, (page + 1, last, value));
        Ranges::insert(self, (first, last, value));
    }
    fn copy(&self) -> Self {
        self.clone()
    }
    fn count(&self) -> usize {
        self.len()
    }
}

impl Mapped for Intervals {
    fn empty() -> Self {
        Self::new()
    }
    fn map(&mut self, (mut first, mut last, value): Vma) {
        Mapped::unmap(self, first, last);
        let near = |page: Option<u64>| {
            let (range, &other) = self.overlap(page?).next()?;
            (other == value).then_some(range)
        };
        let (below, above) = (near(first.checked_sub(1)), near(Some(last + 1)));
        for range in [below, above].into_iter().flatten() {
            (first, last) = (first.min(range.start), last.max(range.end - 1));
            let gone = self.remove(range);
            assert_eq!(gone, Some(value));
        }
        Ranges::insert(self, (first, last, value));
    }
    fn unmap(&mut self, first: u64, last: u64) {
        while let Some((range, &value)) = self.iter(first..last + 1).next() {
            Ranges::remove(self, (range.start, range.end - 1, value));
            if range.start < first {
                Ranges::insert(self, (range.start, first - 1, value));
            }
            if range.end > last + 1 {
                Ranges::insert(self, (last + 1, range.end - 1, value));
            }
        }
    }
}
