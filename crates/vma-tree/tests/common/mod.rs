//! The plain reference model, an allocator that fails on demand, and operations, for all tests.
#![allow(dead_code)]

pub mod ops;

use std::alloc::{Layout, alloc, dealloc};
use std::cell::Cell;
use std::ptr::NonNull;

use kmem_hal::{AllocError, ObjectAlloc, Page, PageRange};
use kmem_vma_tree::{Entry, GapRequest, RangeTree};

pub fn page(number: u64) -> Page {
    Page::new(number).unwrap()
}

pub fn pages(first: u64, last: u64) -> PageRange {
    PageRange::new(page(first), page(last)).unwrap()
}

pub fn count(first: u64, count: u64) -> PageRange {
    PageRange::with_count(page(first), count).unwrap()
}

/// The host's heap, which counts, and fails after a given number of allocations.
#[derive(Default)]
pub struct Heap {
    pub live: Cell<usize>,
    pub total: Cell<usize>,
    /// Allocations that still succeed; `None` for all.
    pub left: Cell<Option<usize>>,
}

// SAFETY: B1: the host's heap; B2: a refusal counts nothing; B3: not type-stable.
unsafe impl<T> ObjectAlloc<T> for Heap {
    const TYPE_STABLE: bool = false;

    fn alloc(&self) -> Result<NonNull<T>, AllocError> {
        match self.left.get() {
            Some(0) => return Err(AllocError::OutOfMemory),
            Some(left) => self.left.set(Some(left - 1)),
            None => {}
        }
        // SAFETY: nodes have a size.
        let memory = unsafe { alloc(Layout::new::<T>()) };
        let memory = NonNull::new(memory.cast()).ok_or(AllocError::OutOfMemory)?;
        self.live.set(self.live.get() + 1);
        self.total.set(self.total.get() + 1);
        Ok(memory)
    }

    unsafe fn free(&self, object: NonNull<T>) {
        self.live.set(self.live.get() - 1);
        // SAFETY: the object came from `alloc`. It is overwritten first, so that a use after free is seen.
        unsafe {
            object
                .as_ptr()
                .cast::<u8>()
                .write_bytes(0xa5, size_of::<T>());
            dealloc(object.as_ptr().cast(), Layout::new::<T>());
        }
    }
}

pub type Tree<'h> = RangeTree<u64, &'h Heap>;

/// Stores ranges of three pages with one free page behind each, in this order.
pub fn fill(tree: &mut Tree<'_>, order: impl Iterator<Item = u64>) {
    for i in order {
        tree.store(count(4 * i, 3), Some(i), &mut |_| ()).unwrap();
    }
    tree.check().unwrap();
}

/// The model: a sorted list, every operation a plain loop over it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    pub entries: Vec<Entry<u64>>,
}

impl Model {
    pub fn store(&mut self, range: PageRange, value: Option<u64>) -> Vec<Entry<u64>> {
        let (mut kept, mut removed) = (Vec::new(), Vec::new());
        for entry in &self.entries {
            if !entry.range.overlaps(range) {
                kept.push(*entry);
                continue;
            }
            if entry.first() < range.first() {
                let below = page(range.first().number() - 1);
                kept.extend(entry.clipped(PageRange::new(entry.first(), below).unwrap()));
            }
            removed.extend(entry.clipped(range));
            if entry.last() > range.last() {
                let above = page(range.last().number() + 1);
                kept.extend(entry.clipped(PageRange::new(above, entry.last()).unwrap()));
            }
        }
        kept.extend(value.map(|value| Entry { range, value }));
        kept.sort_by_key(Entry::first);
        self.entries = kept;
        removed
    }

    /// Merges the entry at `at` with what touches it, below first, by equal values.
    fn merge_around(&mut self, range: PageRange) -> Entry<u64> {
        let mut at = self.entries.iter().position(|e| e.range == range).unwrap();
        let joins = |a: &Entry<u64>, b: &Entry<u64>| a.touches(b) && a.value == b.value;
        if at > 0 && joins(&self.entries[at - 1], &self.entries[at]) {
            let upper = self.entries.remove(at);
            at -= 1;
            self.entries[at].range = self.entries[at].range.hull(upper.range);
        }
        if at + 1 < self.entries.len() && joins(&self.entries[at], &self.entries[at + 1]) {
            let upper = self.entries.remove(at + 1);
            self.entries[at].range = self.entries[at].range.hull(upper.range);
        }
        self.entries[at]
    }

    pub fn store_merged(&mut self, range: PageRange, value: u64) -> (Entry<u64>, Vec<Entry<u64>>) {
        let removed = self.store(range, Some(value));
        (self.merge_around(range), removed)
    }

    pub fn modify(&mut self, range: PageRange, change: impl Fn(Entry<u64>) -> Option<u64>) {
        let pieces: Vec<_> = self
            .entries
            .iter()
            .filter_map(|e| e.clipped(range))
            .collect();
        for piece in pieces {
            match change(piece) {
                Some(value) => {
                    self.store_merged(piece.range, value);
                }
                None => {
                    self.store(piece.range, None);
                }
            }
        }
    }

    pub fn get(&self, at: Page) -> Option<Entry<u64>> {
        self.entries.iter().copied().find(|e| e.range.contains(at))
    }

    pub fn first_at_or_after(&self, at: Page) -> Option<Entry<u64>> {
        self.entries.iter().copied().find(|e| e.last() >= at)
    }

    pub fn last_before(&self, at: Page) -> Option<Entry<u64>> {
        self.entries.iter().copied().rev().find(|e| e.last() < at)
    }

    /// Every free range inside `limits`.
    pub fn gaps(&self, limits: PageRange) -> Vec<PageRange> {
        let (mut gaps, mut free) = (Vec::new(), Some(0));
        let mut add = |from: u64, to: u64| {
            if from <= to {
                gaps.extend(pages(from, to).intersection(limits));
            }
        };
        for entry in &self.entries {
            if let (Some(from), Some(to)) = (free, entry.first().number().checked_sub(1)) {
                add(from, to);
            }
            free = entry.last().checked_add(1).map(Page::number);
        }
        if let Some(from) = free {
            add(from, Page::MAX.number());
        }
        gaps
    }

    pub fn find_gap(&self, request: &Request, up: bool) -> Option<PageRange> {
        let fits = |gap: PageRange| {
            if gap.count() < request.at_least.max(request.pages) {
                return None;
            }
            let (low, high) = (
                gap.first().number(),
                gap.last().number().checked_sub(request.pages - 1)?,
            );
            if high < low {
                return None;
            }
            // In signed numbers of twice the width, where nothing overflows.
            let (step, offset) = (i128::from(request.alignment), i128::from(request.offset));
            let (low, high) = (i128::from(low), i128::from(high));
            let lowest = low + (offset - low).rem_euclid(step);
            let highest = high - (high - offset).rem_euclid(step);
            let first = if up { lowest } else { highest };
            (first >= low && first <= high)
                .then(|| count(u64::try_from(first).unwrap(), request.pages))
        };
        let gaps = self.gaps(request.limits);
        if up {
            gaps.into_iter().find_map(fits)
        } else {
            gaps.into_iter().rev().find_map(fits)
        }
    }
}

/// A gap request in plain fields.
#[derive(Clone, Debug)]
pub struct Request {
    pub limits: PageRange,
    pub pages: u64,
    pub alignment: u64,
    pub offset: u64,
    pub at_least: u64,
}

impl Request {
    pub fn gap_request(&self) -> GapRequest {
        GapRequest::new(self.pages)
            .limits(self.limits)
            .aligned(self.alignment, self.offset)
            .at_least(self.at_least)
    }
}
