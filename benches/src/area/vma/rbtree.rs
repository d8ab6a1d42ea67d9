//! The peer that a kernel of the eighties would be: a red-black tree whose links lie in the areas (intrusive-collections).

use std::cell::Cell;

use intrusive_collections::{Bound, KeyAdapter, RBTree, RBTreeLink, intrusive_adapter};

use super::traces::Mapped;
use super::{LIMITS, Ranges, Vma};

pub(super) struct Area {
    link: RBTreeLink,
    first: u64,
    last: Cell<u64>,
    value: u64,
}

intrusive_adapter!(pub(super) ByFirst = Box<Area>: Area { link => RBTreeLink });

impl<'a> KeyAdapter<'a> for ByFirst {
    type Key = u64;
    fn get_key(&self, area: &'a Area) -> u64 {
        area.first
    }
}

/// Areas in a red-black tree. Like Linux before 6.1, without its records of gaps.
pub(super) struct Red {
    tree: RBTree<ByFirst>,
    count: usize,
}

impl Red {
    fn add(&mut self, (first, last, value): Vma) {
        self.tree.insert(Box::new(Area {
            link: RBTreeLink::new(),
            first,
            last: Cell::new(last),
            value,
        }));
        self.count += 1;
    }
}

impl Ranges for Red {
    type Finger = ();

    fn build(vmas: &[Vma]) -> Self {
        let mut red = Self {
            tree: RBTree::new(ByFirst::new()),
            count: 0,
        };
        for &vma in vmas {
            red.add(vma);
        }
        red
    }
    #[inline]
    fn lookup(&self, page: u64) -> Option<u64> {
        let cursor = self.tree.upper_bound(Bound::Included(&page));
        let area = cursor.get()?;
        (page <= area.last.get()).then_some(area.value)
    }
    fn insert(&mut self, vma: Vma) {
        self.add(vma);
    }
    fn remove(&mut self, vma: Vma) {
        let gone = self.tree.find_mut(&vma.0).remove();
        assert!(gone.is_some());
        self.count -= 1;
    }
    fn gap_up(&self, pages: u64) -> Option<u64> {
        let mut from = LIMITS.0;
        for area in &self.tree {
            if area.first - from >= pages {
                return Some(from);
            }
            from = area.last.get() + 1;
        }
        (LIMITS.1 + 1 - from >= pages).then_some(from)
    }
    fn gap_down(&self, pages: u64) -> Option<u64> {
        let mut end = LIMITS.1 + 1;
        for area in self.tree.iter().rev() {
            if end - area.last.get() > pages {
                return Some(end - pages);
            }
            end = area.first;
        }
        (end - LIMITS.0 >= pages).then_some(end - pages)
    }
    fn sum(&self) -> u64 {
        self.tree.iter().fold(0, |sum, area| {
            sum.wrapping_add(area.last.get() ^ area.value)
        })
    }
    fn punch(&mut self, _: Vma, page: u64) {
        let cursor = self.tree.upper_bound(Bound::Included(&page));
        let area = cursor.get().expect("an area covers the page");
        let (last, value) = (area.last.replace(page - 1), area.value);
        self.add((page + 1, last, value));
        // Back: both neighbours have the value, so the three become one.
        let mut above = self.tree.find_mut(&(page + 1));
        let gone = above.remove().expect("the upper part");
        let below = self.tree.upper_bound(Bound::Included(&page));
        let below = below.get().expect("the lower part");
        assert_eq!(below.value, gone.value);
        below.last.set(gone.last.get());
        self.count -= 1;
    }
    fn copy(&self) -> Self {
        let mut red = Self {
            tree: RBTree::new(ByFirst::new()),
            count: 0,
        };
        for area in &self.tree {
            red.add((area.first, area.last.get(), area.value));
        }
        red
    }
    fn count(&self) -> usize {
        self.count
    }
}

impl Mapped for Red {
    fn empty() -> Self {
        Self {
            tree: RBTree::new(ByFirst::new()),
            count: 0,
        }
    }
    fn map(&mut self, (first, mut last, value): Vma) {
        self.unmap(first, last);
        let mut above = self.tree.find_mut(&(last + 1));
        if above.get().is_some_and(|area| area.value == value) {
            let gone = above.remove().expect("it was looked at");
            last = gone.last.get();
            self.count -= 1;
        }
        if let Some(page) = first.checked_sub(1) {
            let below = self.tree.upper_bound(Bound::Included(&page));
            if let Some(area) = below.get()
                && (area.last.get(), area.value) == (page, value)
            {
                area.last.set(last);
                return;
            }
        }
        self.add((first, last, value));
    }
    fn unmap(&mut self, first: u64, last: u64) {
        let mut rest = None;
        let mut at = self.tree.upper_bound_mut(Bound::Included(&last));
        while let Some(area) = at.get() {
            let (begin, end, value) = (area.first, area.last.get(), area.value);
            if end < first {
                break;
            }
            if end > last {
                rest = Some((last + 1, end, value));
            }
            if begin < first {
                area.last.set(first - 1);
                break;
            }
            at.remove();
            self.count -= 1;
            // The cursor stands on the area above now.
            at.move_prev();
        }
        if let Some(rest) = rest {
            self.add(rest);
        }
    }
}
