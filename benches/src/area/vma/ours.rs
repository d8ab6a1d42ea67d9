//! The range tree, with nodes of a slab cache.

use kmem_hal::{Page, PageRange};
use kmem_slab::Cache;
use kmem_vma_tree::{Finger, GapRequest, Node, RangeTree};

use super::maps::{Ranges, filled};
use super::{LIMITS, Vma};
use crate::platform::{Machine, Region, SlabParts};

pub(super) type Nodes = &'static Cache<'static, Node, SlabParts>;

/// The nodes of all of kmem's trees.
pub(super) fn nodes() -> Nodes {
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

pub(super) type Kmem = RangeTree<u64, Nodes>;

pub(super) fn page_range(first: u64, last: u64) -> PageRange {
    PageRange::new(Page::from_number(first), Page::from_number(last)).expect("first <= last")
}

impl Ranges for Kmem {
    type Finger = Finger<u64>;

    fn build(vmas: &[Vma]) -> Self {
        filled(Self::new_in(nodes()), vmas)
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
