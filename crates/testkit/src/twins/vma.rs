//! Ranges of pages, in order, apart from each other: the list of VMAs and the tree of VMAs.
//!
//! Both answer the same questions; the list is the course's first version (walk until the end is past the address), the tree
//! its second. They are models of each other, and of `kmem-vma-tree`.
//!
//! ```text
//!   [0x10..=0x1f rw]   [0x20..=0x2f r]      [0x40..=0x4f rw]
//!                                      ^^^^ a gap of 0x10 pages
//! ```
//!
//! Invariant `I1`: ranges are disjoint and ascending. Neighbours with equal values are *not* merged here: merging is the
//! caller's rule, see [`RangeModel::merge`].

use std::collections::BTreeMap;

use kmem_hal::{Page, PageRange};

/// What ranges of pages are asked.
pub trait RangeModel<V> {
    /// The range that contains `page` or else the first one above it (Linux's `find_vma`).
    #[doc(alias = "find_vma")]
    fn find(&self, page: Page) -> Option<(PageRange, V)>;

    /// Removes every page of `range`, cutting ranges that reach out of it; what was removed, ascending.
    fn remove(&mut self, range: PageRange) -> Vec<(PageRange, V)>;

    /// Puts `value` on `range`, which replaces what was there (`MAP_FIXED`).
    fn insert(&mut self, range: PageRange, value: V);

    /// Every range, ascending.
    fn ranges(&self) -> Vec<(PageRange, V)>;

    /// The value of one page.
    fn get(&self, page: Page) -> Option<V> {
        self.find(page)
            .filter(|(range, _)| range.contains(page))
            .map(|(_, value)| value)
    }

    /// The lowest gap of `count` pages inside `within`.
    #[doc(alias = "vm_unmapped_area")]
    fn gap_up(&self, count: u64, within: PageRange) -> Option<PageRange> {
        let mut first = within.first();
        for (range, _) in self.ranges() {
            if range.last() < first {
                continue;
            }
            let gap = PageRange::with_count(first, count)?;
            if gap.last() < range.first() {
                break;
            }
            first = range.last().checked_add(1)?;
        }
        PageRange::with_count(first, count).filter(|gap| within.contains_range(*gap))
    }

    /// The highest gap of `count` pages inside `within`.
    fn gap_down(&self, count: u64, within: PageRange) -> Option<PageRange> {
        let below = |last: Page| {
            let first = last.checked_sub(count.checked_sub(1)?)?;
            PageRange::new(first, last)
        };
        let mut last = within.last();
        for (range, _) in self.ranges().into_iter().rev() {
            if range.first() > last {
                continue;
            }
            let gap = below(last)?;
            if gap.first() > range.last() {
                break;
            }
            last = range.first().checked_sub(1)?;
        }
        below(last).filter(|gap| within.contains_range(*gap))
    }

    /// The ranges with neighbours of equal values joined: what Linux shows where its merge rule allows it.
    fn merge(&self) -> Vec<(PageRange, V)>
    where
        V: PartialEq,
    {
        let mut merged: Vec<(PageRange, V)> = Vec::new();
        for (range, value) in self.ranges() {
            match merged.last_mut() {
                Some((below, other))
                    if *other == value && below.last().checked_add(1) == Some(range.first()) =>
                {
                    *below = below.hull(range);
                }
                _ => merged.push((range, value)),
            }
        }
        merged
    }
}

/// What is left of `range` when `cut` is taken out of it: below and above.
fn outside(range: PageRange, cut: PageRange) -> [Option<PageRange>; 2] {
    let below = cut
        .first()
        .checked_sub(1)
        .and_then(|last| PageRange::new(range.first(), last))
        .filter(|below| below.first() <= range.last());
    let above = cut
        .last()
        .checked_add(1)
        .and_then(|first| PageRange::new(first, range.last()));
    [below, above]
}

/// VMAs as a sorted list: `mm->mmap` of old kernels.
///
/// # Examples
///
/// ```
/// use kmem_hal::{Page, PageRange};
/// use kmem_testkit::twins::{ListVmas, RangeModel};
///
/// let pages = |first, count| PageRange::with_count(Page::from_number(first), count).unwrap();
/// let mut vmas = ListVmas::new();
/// vmas.insert(pages(0x10, 16), "rw");
/// vmas.remove(pages(0x18, 2)); // a hole in the middle makes two of it
/// assert_eq!(vmas.ranges().len(), 2);
/// assert_eq!(vmas.gap_up(2, pages(0x10, 0x100)), Some(pages(0x18, 2)));
/// assert_eq!(vmas.gap_down(2, pages(0x10, 0x100)), Some(pages(0x10e, 2)));
/// ```
#[derive(Clone, Debug, Default)]
pub struct ListVmas<V> {
    list: Vec<(PageRange, V)>,
}

impl<V> ListVmas<V> {
    /// No ranges.
    #[must_use]
    pub const fn new() -> Self {
        Self { list: Vec::new() }
    }
}

impl<V: Clone> RangeModel<V> for ListVmas<V> {
    fn find(&self, page: Page) -> Option<(PageRange, V)> {
        self.list
            .iter()
            .find(|(range, _)| range.last() >= page)
            .cloned()
    }

    fn remove(&mut self, cut: PageRange) -> Vec<(PageRange, V)> {
        let mut removed = Vec::new();
        let mut kept = Vec::new();
        for (range, value) in self.list.drain(..) {
            match range.intersection(cut) {
                None => kept.push((range, value)),
                Some(gone) => {
                    removed.push((gone, value.clone()));
                    for rest in outside(range, cut).into_iter().flatten() {
                        kept.push((rest, value.clone()));
                    }
                }
            }
        }
        self.list = kept;
        removed
    }

    fn insert(&mut self, range: PageRange, value: V) {
        self.remove(range);
        let at = self
            .list
            .partition_point(|(other, _)| other.first() < range.first());
        self.list.insert(at, (range, value));
    }

    fn ranges(&self) -> Vec<(PageRange, V)> {
        self.list.clone()
    }
}

/// VMAs as a balanced tree, by their first page: `mm->mm_rb` of old kernels.
#[derive(Clone, Debug, Default)]
pub struct TreeVmas<V> {
    /// First page to last page and value.
    tree: BTreeMap<u64, (u64, V)>,
}

impl<V> TreeVmas<V> {
    /// No ranges.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            tree: BTreeMap::new(),
        }
    }
}

fn range(first: u64, last: u64) -> PageRange {
    let (first, last) = (Page::from_number(first), Page::from_number(last));
    PageRange::new(first, last).unwrap_or(PageRange::single(first))
}

impl<V: Clone> RangeModel<V> for TreeVmas<V> {
    fn find(&self, page: Page) -> Option<(PageRange, V)> {
        let below = self.tree.range(..=page.number()).next_back();
        let hit = below.filter(|(_, (last, _))| *last >= page.number());
        let (first, (last, value)) = hit.or_else(|| self.tree.range(page.number()..).next())?;
        Some((range(*first, *last), value.clone()))
    }

    fn remove(&mut self, cut: PageRange) -> Vec<(PageRange, V)> {
        let mut removed = Vec::new();
        while let Some((found, value)) = self.find(cut.first()) {
            let Some(gone) = found.intersection(cut) else {
                break;
            };
            self.tree.remove(&found.first().number());
            for rest in outside(found, cut).into_iter().flatten() {
                self.tree
                    .insert(rest.first().number(), (rest.last().number(), value.clone()));
            }
            removed.push((gone, value));
        }
        removed
    }

    fn insert(&mut self, range: PageRange, value: V) {
        self.remove(range);
        self.tree
            .insert(range.first().number(), (range.last().number(), value));
    }

    fn ranges(&self) -> Vec<(PageRange, V)> {
        self.tree
            .iter()
            .map(|(first, (last, value))| (range(*first, *last), value.clone()))
            .collect()
    }
}
