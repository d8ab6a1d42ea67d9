//! Lazy freeing: many areas, one flush.
//!
//! A flush interrupts every CPU, since every CPU maps the kernel. So a freed area waits, still mapped and known to nobody,
//! until enough have come together; then all are unmapped, one shootdown makes every CPU forget them, and frames and ranges
//! come free.
//!
//! Source: Linux `mm/vmalloc.c` (`__purge_vmap_area_lazy`).

use kmem_hal::{ObjectAlloc, PageRange, RawLock};
use kmem_paging::format::Format;
use kmem_paging::{ChangeError, Env};
use kmem_vma_tree::Node;

use crate::page::KernelPage;
use crate::vmalloc::Vmalloc;

/// Freed areas that wait at most.
pub const LAZY: usize = 32;
/// Freed pages that wait at most: what one gather holds, so that a batch is one shootdown.
pub const LAZY_PAGES: u64 = 64;

/// The areas that wait.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lazy {
    ranges: [Option<PageRange>; LAZY],
    count: usize,
    pages: u64,
}

impl Lazy {
    pub const fn new() -> Self {
        Self {
            ranges: [None; LAZY],
            count: 0,
            pages: 0,
        }
    }

    pub fn contains(&self, range: PageRange) -> bool {
        self.ranges[..self.count].contains(&Some(range))
    }

    /// Adds an area with `pages` mapped pages; `false` where the list is full: purge first.
    pub fn push(&mut self, range: PageRange, pages: u64) -> bool {
        let Some(place) = self.ranges.get_mut(self.count) else {
            return false;
        };
        *place = Some(range);
        self.count += 1;
        self.pages += pages;
        true
    }

    /// Whether it is time to purge.
    pub fn is_due(&self) -> bool {
        self.count == LAZY || self.pages >= LAZY_PAGES
    }
}

impl<F: Format, E: Env, N: ObjectAlloc<Node>, L: RawLock> Vmalloc<'_, F, E, N, L> {
    /// Unmaps every freed area, flushes once, and gives frames and addresses back.
    ///
    /// Context: may wait for other CPUs; not in interrupts.
    #[doc(alias = "vm_unmap_aliases")]
    pub fn purge(&self) {
        let waiting = core::mem::replace(&mut self.state.lock().lazy, Lazy::new());
        self.unmap_waiting(&waiting);
        for range in waiting.ranges.iter().flatten() {
            self.give_range(*range);
        }
    }

    /// Unmaps what waits, with one flush for as much as a gather holds. A call of its own, so that the gather is off the
    /// stack when the tree is edited.
    #[inline(never)]
    fn unmap_waiting(&self, waiting: &Lazy) {
        let env = self.table.env();
        let mut gather = self.table.gather::<{ LAZY_PAGES as usize }>();
        for range in waiting.ranges.iter().flatten() {
            let Ok(mut cursor) = self.table.cursor(*range) else {
                continue;
            };
            let mut rest = *range;
            while let Err(ChangeError::Full { next }) = cursor.unmap(rest, &mut gather) {
                cursor.release();
                gather.commit(|page: KernelPage| page.release(env.slots(), env.frames()));
                match PageRange::new(next, range.last()) {
                    Some(left) => rest = left,
                    None => break,
                }
            }
        }
        gather.commit(|page: KernelPage| page.release(env.slots(), env.frames()));
    }

    /// Unmaps and flushes the pages of one area now.
    pub(crate) fn unmap(&self, range: PageRange) {
        let env = self.table.env();
        let Ok(mut cursor) = self.table.cursor(range) else {
            return;
        };
        let mut gather = self.table.gather::<32>();
        let mut rest = range;
        while let Err(ChangeError::Full { next }) = cursor.unmap(rest, &mut gather) {
            gather.commit(|page: KernelPage| page.release(env.slots(), env.frames()));
            match PageRange::new(next, range.last()) {
                Some(left) => rest = left,
                None => break,
            }
        }
        drop(cursor);
        gather.commit(|page: KernelPage| page.release(env.slots(), env.frames()));
    }

    /// Takes an area whose leaves are gone out of the tree; any page of it names it.
    pub(crate) fn give_range(&self, range: PageRange) {
        let mut state = self.state.lock();
        let Some(entry) = state.tree.get(range.first()) else {
            return;
        };
        if state.tree.store(entry.range, None, &mut |_| {}).is_err() {
            // The tree found no memory to get smaller: the addresses wait for the next purge, or stay taken where 32 others
            // wait already. Nothing is mapped there.
            let _ = state.lazy.push(entry.range, 0);
        }
    }
}
