//! The allocator of kernel virtual ranges.
//!
//! ```text
//!   alloc ── gap in the tree ── frames, some at a time ── map      (a failure undoes all of it)
//!   free ─── mark the area ── ... ── purge: unmap many, flush once, free frames, free ranges
//! ```
//!
//! Invariants
//! - `I1`: every leaf in the window lies in the usable part of an area of the tree.
//! - `I2`: a range leaves the tree only after its leaves are gone and flushed, so no stale translation reaches the next
//!   owner.
//! - `I3`: a freed area is in the chain of `lazy` at most once, and then nobody may use it any more.
//!
//! Costs: a tree edit and one table store a page; frees cost a flush once in [`BATCH`](crate::BATCH) leaves. Locks: one,
//! for short; frames are taken, tables written and CPUs waited for without it.
//!
//! Context: task context, interrupts on. [`Vmalloc::bytes_at`] may be called with interrupts off.
//!
//! Source: vmalloc as in Linux `mm/vmalloc.c` (lazy purging, guard pages); Bonwick and Adams, "Magazines and Vmem", 2001.

use core::fmt;
use core::ptr::NonNull;

use kmem_hal::sync::{AtomicU32, Ordering};
use kmem_hal::{
    AllocError, FrameRequest, LargeSource, Lock, ObjectAlloc, PAGE_SIZE, Page, PageRange, RawLock,
    VirtAddr,
};
use kmem_paging::format::Format;
use kmem_paging::{Env, PageTable};
use kmem_vma_tree::{GapRequest, Node, RangeTree};

use crate::area::Area;
use crate::batch::Batch;
use crate::page::KernelPage;
use crate::purge::{Lazy, LazyLimit};
use crate::request::{Request, VmallocError};

/// Purges that one search for addresses asks for: others may take what the first gave.
const PURGES: u32 = 3;

pub(crate) struct State<N: ObjectAlloc<Node>> {
    pub tree: RangeTree<Area, N>,
    pub lazy: Lazy,
}

/// vmalloc, vmap, ioremap, DMA buffers, module memory and guarded stacks in one window of the kernel's table.
///
/// `table` is the kernel's, whose leaves are [`KernelPage`]s; `nodes` gives the tree's memory. A kernel may have several: one
/// for the vmalloc area, one for modules.
pub struct Vmalloc<'a, F: Format, E: Env, N: ObjectAlloc<Node>, L: RawLock> {
    pub(crate) table: &'a PageTable<F, E, KernelPage>,
    window: PageRange,
    pub(crate) frames: FrameRequest,
    pub(crate) limit: LazyLimit,
    pub(crate) state: Lock<State<N>, L>,
    pub(crate) batch: Batch,
    /// Calls of `purge` between taking the chain and giving its ranges back.
    pub(crate) purging: AtomicU32,
}

impl<'a, F: Format, E: Env, N: ObjectAlloc<Node>, L: RawLock> Vmalloc<'a, F, E, N, L> {
    /// An allocator for `window`, in which nothing is mapped.
    #[must_use]
    pub fn new(table: &'a PageTable<F, E, KernelPage>, window: PageRange, nodes: N) -> Self {
        let state = State {
            tree: RangeTree::new_in(nodes),
            lazy: Lazy::new(),
        };
        Self {
            table,
            window,
            frames: FrameRequest::ONE,
            limit: LazyLimit::DEFAULT,
            state: Lock::new(state),
            batch: Batch::new(),
            purging: AtomicU32::new(0),
        }
    }

    /// With frames from high memory first: for machines whose linear map does not hold all memory.
    #[doc(alias = "GFP_HIGHUSER")]
    #[must_use]
    pub fn with_high_memory(mut self) -> Self {
        self.frames = self.frames.high();
        self
    }

    /// With frames as this request asks for them; its order, its limit and whether they are zeroed do not matter.
    #[must_use]
    pub fn with_frames(mut self, request: FrameRequest) -> Self {
        self.frames = FrameRequest {
            order: FrameRequest::ONE.order,
            max_address: FrameRequest::ONE.max_address,
            alignment: FrameRequest::ONE.alignment,
            zeroed: false,
            ..request
        };
        self
    }

    /// With at most this much freed memory waiting for a purge.
    #[doc(alias = "lazy_max_pages")]
    #[must_use]
    pub fn with_lazy_limit(mut self, limit: LazyLimit) -> Self {
        self.limit = limit;
        self
    }

    /// The kernel's table.
    #[must_use]
    pub fn table(&self) -> &'a PageTable<F, E, KernelPage> {
        self.table
    }

    /// The pages that may be given out.
    #[must_use]
    pub fn window(&self) -> PageRange {
        self.window
    }

    /// The mapped bytes from `address` to the end of its area; `None` where nothing is mapped.
    #[must_use]
    pub fn bytes_at(&self, address: VirtAddr) -> Option<u64> {
        let page = Page::containing(address);
        let usable = self.area_at(page)?.0;
        Some((usable.last().number() - page.number() + 1) * PAGE_SIZE - address.page_offset())
    }

    /// The mapped pages and the word of the area in use that `page` is a mapped page of.
    pub(crate) fn area_at(&self, page: Page) -> Option<(PageRange, Area)> {
        if !self.window.contains(page) {
            return None;
        }
        let state = self.state.lock();
        let entry = state.tree.get(page)?;
        let usable = entry.value.usable(entry.range)?;
        (usable.contains(page) && !entry.value.is_freed()).then_some((usable, entry.value))
    }

    /// Puts an area into the tree where there is room for it and its guards; gives its mapped pages.
    ///
    /// The first mapped page is `offset` modulo the alignment.
    pub(crate) fn take_range(
        &self,
        request: &Request,
        offset: u64,
        area: Area,
    ) -> Result<PageRange, VmallocError> {
        request.check(self.window.count())?;
        let all = request.pages + request.guard_below + 1;
        let offset = offset.wrapping_sub(request.guard_below) & (request.alignment - 1);
        let mut gap = GapRequest::new(all).limits(self.window);
        if request.alignment > 1 {
            gap = gap.aligned(request.alignment, offset);
        }
        let mut purges = 0;
        loop {
            // Read before the tree: a purge that ends in between has given its ranges back where this search sees them.
            let purging = self.purging.load(Ordering::Acquire);
            let mut state = self.state.lock();
            if let Some(range) = state.tree.find_gap_up(&gap) {
                state.tree.store(range, Some(area), &mut |_| {})?;
                return area.usable(range).ok_or(VmallocError::BadSize);
            }
            let waiting = !state.lazy.is_empty();
            drop(state);
            if waiting && purges < PURGES {
                purges += 1;
                self.purge();
            } else if purging > 0 {
                // Addresses are about to come free on another CPU.
                self.table.env().relax();
            } else {
                return Err(VmallocError::NoSpace);
            }
        }
    }

    /// Takes an area whose leaves are gone out of the tree; any page of it names it.
    ///
    /// Where the tree finds no memory to get smaller, the area waits for the next purge; nothing is mapped there.
    pub(crate) fn give_range(&self, page: Page) {
        let mut state = self.state.lock();
        let Some(entry) = state.tree.get(page) else {
            return;
        };
        if state.tree.store(entry.range, None, &mut |_| {}).is_err() {
            // Where even marking it needs memory, the addresses stay taken.
            let _ = self.chain(&mut state, entry, 0);
        }
    }
}

// SAFETY: V1: an area is mapped, its own (`I1`, `I2`), and stays until freed; alignment is part of the request; V2: the tree
// holds what was given, less what is lazily freed.
unsafe impl<F: Format, E: Env, N: ObjectAlloc<Node>, L: RawLock> LargeSource
    for Vmalloc<'_, F, E, N, L>
{
    #[doc(alias = "kvmalloc")]
    fn alloc_large(&self, size: usize, align: usize) -> Result<NonNull<u8>, AllocError> {
        let alignment = (align as u64).div_ceil(PAGE_SIZE).max(1);
        let request = Request::bytes(size as u64).aligned(alignment);
        let start = self.alloc_memory(request).map_err(|error| match error {
            VmallocError::BadSize => AllocError::Unsatisfiable,
            _ => AllocError::OutOfMemory,
        })?;
        NonNull::new(core::ptr::with_exposed_provenance_mut(
            start.as_u64() as usize
        ))
        .ok_or(AllocError::OutOfMemory)
    }

    unsafe fn free_large(&self, memory: NonNull<u8>) {
        // By contract the memory came from here; anything else is left alone.
        let _ = self.free(VirtAddr::from_ptr(memory.as_ptr()));
    }

    fn contains(&self, address: *const u8) -> bool {
        self.bytes_at(VirtAddr::from_ptr(address)).is_some()
    }

    fn size_of(&self, memory: NonNull<u8>) -> Option<usize> {
        self.bytes_at(VirtAddr::from_ptr(memory.as_ptr()))
            .and_then(|bytes| usize::try_from(bytes).ok())
    }
}

impl<F: Format, E: Env, N: ObjectAlloc<Node>, L: RawLock> Drop for Vmalloc<'_, F, E, N, L> {
    /// Purges what waits. Areas in use stay mapped: they belong to their users.
    fn drop(&mut self) {
        self.purge();
        self.batch.free(self.table.env());
    }
}

impl<F: Format, E: Env, N: ObjectAlloc<Node>, L: RawLock> fmt::Debug for Vmalloc<'_, F, E, N, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Vmalloc({:?})", self.window)
    }
}
