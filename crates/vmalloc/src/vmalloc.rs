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
//! - `I3`: a freed area is in the chain of `lazy`, and nobody may use it any more; a ready one is in a chain of `ready`, and
//!   nothing is mapped in it. No area is in two chains, and the chain that a purge has in hand is empty unless `purging`.
//! - `I4`: while an area is in the tree, there are spare nodes for taking one out: an area is put there only where two edits find
//!   nodes. So ending an area needs no memory.
//!
//! Costs: one table store a page; a free looks the area up in the tree, which is edited only for sizes that are not ready; a
//! flush once a batch ([`Vmalloc::batch_leaves`]). Locks: one, for short; frames and
//! nodes are taken, tables written and CPUs waited for without it.
//!
//! Context: task context, interrupts on. [`Vmalloc::bytes_at`] may be called with interrupts off.
//!
//! Source: vmalloc as in Linux `mm/vmalloc.c` (lazy purging, guard pages); Bonwick and Adams, "Magazines and Vmem", 2001.

use core::fmt;
use core::panic::Location;
use core::ptr::NonNull;

use kmem_hal::{
    AllocError, FrameRequest, FrameSink, FrameSource, LargeSource, Lock, ObjectAlloc, PAGE_SIZE,
    Page, PageRange, RawLock, VirtAddr,
};
use kmem_paging::format::Format;
use kmem_paging::{Env, PageTable};
use kmem_vma_tree::{GapRequest, Node, RangeTree};

use crate::area::{Area, AreaKind, AreaRef, Areas, Stage};
use crate::batch::Batch;
use crate::nodes::SpareNodes;
use crate::page::KernelPage;
use crate::purge::{Lazy, LazyLimit};
use crate::ready::Ready;
use crate::request::{Request, VmallocError};

/// Purges that one search for addresses asks for: others may take what the first gave.
const PURGES: u32 = 3;

pub(crate) struct State {
    pub tree: RangeTree<AreaRef, SpareNodes>,
    pub areas: Areas,
    pub lazy: Lazy,
    /// Whether a purge has taken what was in `lazy`, and not given it back yet.
    pub purging: bool,
    pub ready: Ready,
}

impl State {
    /// The area that takes `page`.
    #[inline]
    pub fn find(&self, page: Page) -> Option<(AreaRef, Area)> {
        let at = self.tree.get(page)?.value;
        Some((at, self.areas.get(at)))
    }

    /// The nodes that the next edits of the tree find.
    pub fn spare_nodes(&self) -> &SpareNodes {
        self.tree.allocator()
    }

    /// Takes what waits, for the purge whose turn it is.
    pub fn take_lazy(&mut self) -> Lazy {
        self.purging = !self.lazy.is_empty();
        core::mem::replace(&mut self.lazy, Lazy::new())
    }

    /// Takes an area out of the tree.
    pub fn erase(&mut self, at: AreaRef) {
        let range = self.areas.get(at).range;
        let erased = self.tree.store(range, None, &mut |_| {});
        debug_assert!(erased.is_ok(), "I4: the nodes for it are there");
        if erased.is_ok() {
            self.areas.give(at);
        }
    }

    /// Takes every area that waits for its size to be asked for out of the tree; whether there was one.
    #[cold]
    fn erase_ready(&mut self) -> bool {
        let any = !self.ready.is_empty();
        while let Some(at) = self.ready.take_any(&self.areas) {
            self.erase(at);
        }
        any
    }
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
    nodes: N,
    pub(crate) state: Lock<State, L>,
    pub(crate) batch: Batch,
}

impl<'a, F: Format, E: Env, N: ObjectAlloc<Node>, L: RawLock> Vmalloc<'a, F, E, N, L> {
    /// An allocator for `window`, in which nothing is mapped.
    #[must_use]
    pub fn new(table: &'a PageTable<F, E, KernelPage>, window: PageRange, nodes: N) -> Self {
        let state = State {
            tree: RangeTree::new_in(SpareNodes::new()),
            areas: Areas::new(),
            lazy: Lazy::new(),
            purging: false,
            ready: Ready::new(window.count() / 16),
        };
        Self {
            table,
            window,
            frames: FrameRequest::ONE,
            limit: LazyLimit::DEFAULT,
            nodes,
            state: Lock::new(state),
            batch: Batch::new(),
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
    ///
    /// Its context says what a call may do that finds no free frame; each request is made with no table's lock held. Large blocks, for
    /// which single frames can stand, are asked for with [`Context::NoReclaim`](kmem_hal::Context::NoReclaim) at most.
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

    /// The mapped pages of the area in use that `page` is a mapped page of.
    pub(crate) fn area_at(&self, page: Page) -> Option<(PageRange, Area)> {
        if !self.window.contains(page) {
            return None;
        }
        let (_, area) = self.state.lock().find(page)?;
        let usable = area.usable()?;
        (usable.contains(page) && area.stage == Stage::Used).then_some((usable, area))
    }

    /// Whether a guarded stack in use has exactly the `pages` pages from `bottom`.
    pub(crate) fn is_stack(&self, bottom: VirtAddr, pages: u64) -> bool {
        Page::starting_at(bottom)
            .and_then(|page| {
                self.area_at(page)
                    .filter(|(usable, _)| usable.first() == page)
            })
            .is_some_and(|(usable, area)| {
                usable.count() == pages && area.kind == AreaKind::Stack && area.guard_below > 0
            })
    }

    /// Puts an area into the tree where there is room for it and its guards; gives its mapped pages.
    ///
    /// The first mapped page is `offset` modulo the alignment.
    pub(crate) fn take_range(
        &self,
        request: &Request,
        offset: u64,
        made: Made,
    ) -> Result<PageRange, VmallocError> {
        request.check(self.window.count())?;
        let all = request.pages + request.guard_below + 1;
        let mut state = self.state.lock();
        if request.alignment == 1
            && let State { areas, ready, .. } = &mut *state
            && let Some(at) = ready.take(areas, all)
        {
            let range = areas.get(at).range;
            let area = made.area(request, range);
            areas.set(at, area);
            return area.usable().ok_or(VmallocError::BadSize);
        }
        drop(state);
        self.search(request, offset, all, made)
    }

    /// Looks for a gap.
    #[inline(never)]
    fn search(
        &self,
        request: &Request,
        offset: u64,
        all: u64,
        made: Made,
    ) -> Result<PageRange, VmallocError> {
        let offset = offset.wrapping_sub(request.guard_below) & (request.alignment - 1);
        let mut gap = GapRequest::new(all).limits(self.window);
        if request.alignment > 1 {
            gap = gap.aligned(request.alignment, offset);
        }
        let mut purges = 0;
        loop {
            let mut state = self.state.lock();
            if state.areas.is_empty() {
                drop(state);
                self.extend_areas()?;
                continue;
            }
            let mut refused = VmallocError::NoSpace;
            if state.spare_nodes().count() < state.tree.nodes_for(2) {
                drop(state);
                match self.add_node() {
                    Ok(()) => continue,
                    // Areas that end give theirs.
                    Err(error) => refused = error,
                }
                state = self.state.lock();
            } else if let Some(range) = state.tree.find_gap_up(&gap) {
                let at = state.areas.take().ok_or(VmallocError::Memory)?;
                let area = made.area(request, range);
                state.areas.set(at, area);
                if let Err(error) = state.tree.store(range, Some(at), &mut |_| {}) {
                    state.areas.give(at);
                    return Err(error.into());
                }
                return area.usable().ok_or(VmallocError::BadSize);
            }
            let (waiting, purging) = (!state.lazy.is_empty(), state.purging);
            let erased = state.erase_ready();
            drop(state);
            self.give_nodes();
            if waiting && purges < PURGES {
                purges += 1;
                self.purge();
            } else if purging {
                // Addresses are about to come free on another CPU.
                self.table.env().relax();
            } else if !erased {
                return Err(refused);
            }
        }
    }

    /// Takes a frame for descriptions.
    #[cold]
    #[inline(never)]
    fn extend_areas(&self) -> Result<(), VmallocError> {
        let env = self.table.env();
        let frame = env.frames().alloc(&FrameRequest::ONE)?;
        let refused = self.state.lock().areas.extend(env, frame);
        refused.map_err(|frame| {
            env.frames().free(frame);
            VmallocError::Memory
        })
    }

    /// Takes a node for the tree.
    #[cold]
    #[inline(never)]
    fn add_node(&self) -> Result<(), VmallocError> {
        let node = self.nodes.alloc()?;
        // SAFETY: `N1`: it is this call's, and all that are put there come from these nodes.
        unsafe { self.state.lock().spare_nodes().put(node) };
        Ok(())
    }

    /// Gives nodes that the tree no longer needs back.
    pub(crate) fn give_nodes(&self) {
        loop {
            let state = self.state.lock();
            let keep = 2 * state.tree.nodes_for(2);
            if state.spare_nodes().count() <= keep {
                return;
            }
            let node = state.spare_nodes().take();
            drop(state);
            if let Some(node) = node {
                // SAFETY: `N1`: it came from these nodes, and nobody has it.
                unsafe { self.nodes.free(node) };
            }
        }
    }

    /// Ends an area whose leaves are gone, flushed; any page of it names it.
    pub(crate) fn give_range(&self, page: Page) {
        let mut state = self.state.lock();
        if let Some((at, _)) = state.find(page) {
            self.end(&mut state, at);
        }
    }

    /// Keeps an area's addresses for the next one of its size, or takes them out of the tree.
    pub(crate) fn end(&self, state: &mut State, at: AreaRef) {
        let mut area = state.areas.get(at);
        area.stage = Stage::Ready;
        state.areas.set(at, area);
        let State { areas, ready, .. } = &mut *state;
        if !ready.put(areas, at) {
            state.erase(at);
        }
    }
}

/// Who asks for an area, and whose its frames are.
#[derive(Clone, Copy)]
pub(crate) struct Made {
    pub caller: &'static Location<'static>,
    pub borrowed: bool,
}

impl Made {
    #[track_caller]
    pub const fn here() -> Self {
        Self {
            caller: Location::caller(),
            borrowed: false,
        }
    }

    pub const fn borrowed(mut self) -> Self {
        self.borrowed = true;
        self
    }

    fn area(self, request: &Request, range: PageRange) -> Area {
        Area {
            range,
            next: None,
            caller: Some(self.caller),
            kind: request.kind,
            stage: Stage::Used,
            guard_below: request.guard_below as u8,
            borrowed: self.borrowed,
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
        let env = self.table.env();
        self.batch.free(env);
        let state = self.state.get_mut();
        state.tree.clear();
        while let Some(node) = state.spare_nodes().take() {
            // SAFETY: `N1`: it came from these nodes, and nobody has it.
            unsafe { self.nodes.free(node) };
        }
        state.areas.destroy(env);
    }
}

impl<F: Format, E: Env, N: ObjectAlloc<Node>, L: RawLock> fmt::Debug for Vmalloc<'_, F, E, N, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Vmalloc({:?})", self.window)
    }
}
