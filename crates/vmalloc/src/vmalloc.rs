//! The allocator of kernel virtual ranges.
//!
//! ```text
//!   alloc ── gap in the tree ── frames one by one ── map           (a failure undoes all of it)
//!   free ─── remember the area ── ... ── purge: unmap many, flush once, free frames, free ranges
//! ```
//!
//! Invariants
//! - `I1`: every leaf in the window lies in the usable part of an area of the tree.
//! - `I2`: a range leaves the tree only after its leaves are gone and flushed, so no stale translation reaches the next
//!   owner.
//! - `I3`: an area is in `lazy` at most once, and then nobody may use it any more.
//!
//! Costs: a tree edit and one table store a page; frees cost a flush once in [`LAZY`](crate::purge::LAZY) areas or
//! pages. Locks: one, for short; frames are taken and tables written without it.
//!
//! Source: vmalloc as in Linux `mm/vmalloc.c` (lazy purging, guard pages); Bonwick and Adams, "Magazines and Vmem", 2001.

use core::fmt;
use core::ptr::NonNull;

use kmem_hal::{
    AllocError, DeviceFrame, Frame, FrameRange, FrameRequest, FrameSource, LargeSource, Lock,
    ObjectAlloc, Order, OwnedFrame, PAGE_SIZE, Page, PageRange, PhysAddr, RawLock, VirtAddr,
};
use kmem_paging::format::Format;
use kmem_paging::{Attributes, Env, MapError, MemoryType, PageTable, Rights};
use kmem_vma_tree::{GapRequest, Node, RangeTree};

use crate::area::{Area, AreaKind};
use crate::page::KernelPage;
use crate::purge::Lazy;

/// Why no range was mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VmallocError {
    /// A size of 0, a size larger than the window, or an alignment that is no power of two.
    BadSize,
    /// No gap of that size is left, purging included.
    NoSpace,
    /// No frame, no table, or no tree node.
    Memory,
    /// The table refused the mapping: the window is not its, or the frame cannot be expressed.
    Table(MapError),
}

impl fmt::Display for VmallocError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BadSize => f.write_str("the size or alignment cannot be had"),
            Self::NoSpace => f.write_str("no gap in the vmalloc window"),
            Self::Memory => f.write_str("out of memory"),
            Self::Table(error) => fmt::Display::fmt(error, f),
        }
    }
}

impl core::error::Error for VmallocError {}

impl From<AllocError> for VmallocError {
    fn from(_: AllocError) -> Self {
        Self::Memory
    }
}

/// What kind of range is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Mapped pages.
    pub pages: u64,
    /// Alignment of the first mapped page, in pages.
    pub alignment: u64,
    /// What for.
    pub kind: AreaKind,
    /// Pages to keep unmapped below: 1 for a stack, which grows down.
    pub guard_below: u64,
}

pub(crate) struct State<N: ObjectAlloc<Node>> {
    pub tree: RangeTree<Area, N>,
    pub lazy: Lazy,
}

/// vmalloc, vmap, ioremap and guarded stacks in one window of the kernel's table.
///
/// `table` is the kernel's, whose leaves are [`KernelPage`]s; `nodes` gives the tree's memory.
pub struct Vmalloc<'a, F: Format, E: Env, N: ObjectAlloc<Node>, L: RawLock> {
    pub(crate) table: &'a PageTable<F, E, KernelPage>,
    window: PageRange,
    pub(crate) state: Lock<State<N>, L>,
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
            state: Lock::new(state),
        }
    }

    /// The pages that may be given out.
    #[must_use]
    pub fn window(&self) -> PageRange {
        self.window
    }

    /// Memory of `bytes` bytes, rounded up to pages, from frames that need not follow each other.
    ///
    /// # Errors
    ///
    /// [`VmallocError`]; nothing is mapped then.
    #[doc(alias = "__vmalloc")]
    pub fn alloc(&self, bytes: u64) -> Result<VirtAddr, VmallocError> {
        let pages = bytes.div_ceil(PAGE_SIZE);
        self.alloc_memory(Request {
            pages,
            alignment: 1,
            kind: AreaKind::Vmalloc,
            guard_below: 0,
        })
    }

    /// A kernel stack of `pages` pages with guards on both sides; gives the address one past its top.
    ///
    /// # Errors
    ///
    /// As [`alloc`](Self::alloc).
    #[doc(alias = "alloc_thread_stack_node")]
    pub fn alloc_stack(&self, pages: u64) -> Result<VirtAddr, VmallocError> {
        let bottom = self.alloc_memory(Request {
            pages,
            alignment: 1,
            kind: AreaKind::Stack,
            guard_below: 1,
        })?;
        Ok(VirtAddr::new(bottom.as_u64() + pages * PAGE_SIZE))
    }

    /// Takes back a stack that [`alloc_stack`](Self::alloc_stack) gave, by its top.
    ///
    /// # Errors
    ///
    /// As [`free`](Self::free).
    pub fn free_stack(&self, top: VirtAddr, pages: u64) -> Result<(), NotAnArea> {
        match top.checked_sub(pages.saturating_mul(PAGE_SIZE)) {
            Some(bottom) => self.free(bottom),
            None => Err(NotAnArea(top)),
        }
    }

    /// Memory as the request says.
    ///
    /// # Errors
    ///
    /// As [`alloc`](Self::alloc).
    pub fn alloc_memory(&self, request: Request) -> Result<VirtAddr, VmallocError> {
        let range = self.take_range(&request)?;
        let env = self.table.env();
        let attributes = Attributes::new(Rights::KERNEL_DATA);
        let mut refused = Ok(());
        let outcome = self.fill(range, attributes, |_| {
            match env.frames().alloc(&FrameRequest::ONE) {
                Ok(frame) => match KernelPage::owned(frame, env.slots()) {
                    Ok(page) => Some(page),
                    Err(frame) => {
                        kmem_hal::FrameSink::free(env.frames(), frame);
                        refused = Err(VmallocError::Memory);
                        None
                    }
                },
                Err(error) => {
                    refused = Err(error.into());
                    None
                }
            }
        });
        self.settle(range, refused.and(outcome))
    }

    /// Maps frames that the caller gives, one after the other; they are freed with the area.
    ///
    /// # Errors
    ///
    /// As [`alloc`](Self::alloc); the frames taken from `frames` so far are freed.
    #[doc(alias = "vmap_pages_range")]
    pub fn vmap(
        &self,
        pages: u64,
        mut frames: impl FnMut() -> Option<OwnedFrame>,
    ) -> Result<VirtAddr, VmallocError> {
        let range = self.take_range(&Request {
            pages,
            alignment: 1,
            kind: AreaKind::Vmap,
            guard_below: 0,
        })?;
        let env = self.table.env();
        let outcome = self.fill(range, Attributes::new(Rights::KERNEL_DATA), |_| {
            let frame = frames().filter(|frame| frame.order() == Order::ZERO)?;
            KernelPage::owned(frame, env.slots())
                .map_err(|frame| kmem_hal::FrameSink::free(env.frames(), frame))
                .ok()
        });
        self.settle(range, outcome)
    }

    /// Maps device registers: `bytes` bytes at physical `address`; gives the linear address of the first.
    ///
    /// # Errors
    ///
    /// As [`alloc`](Self::alloc).
    #[doc(alias = "ioremap_wc")]
    pub fn ioremap(
        &self,
        address: PhysAddr,
        bytes: u64,
        memory_type: MemoryType,
    ) -> Result<VirtAddr, VmallocError> {
        if bytes == 0 || address.checked_add(bytes - 1).is_none() {
            return Err(VmallocError::BadSize);
        }
        let frames = FrameRange::touching(address, bytes);
        let request = Request {
            pages: frames.count(),
            alignment: 1,
            kind: AreaKind::Ioremap,
            guard_below: 0,
        };
        let range = self.take_range(&request)?;
        let attributes = Attributes::new(Rights::KERNEL_DATA).memory_type(memory_type);
        let outcome = self.fill(range, attributes, |index| {
            let frame = Frame::new(frames.first().number() + index)?;
            Some(KernelPage::borrowed(DeviceFrame::new(frame, Order::ZERO)?))
        });
        let start = self.settle(range, outcome)?;
        Ok(VirtAddr::new(start.as_u64() + address.page_offset()))
    }

    /// Takes an area back, by the address that was given for it; any address in its first page will do.
    ///
    /// The area is unusable at once. Its leaves go, its frames come free and its addresses may be given again at the next
    /// [`purge`](Self::purge), which many frees share.
    ///
    /// # Errors
    ///
    /// [`NotAnArea`] where nothing was given at that address, or it was freed already.
    #[doc(alias = "vfree")]
    #[doc(alias = "iounmap")]
    pub fn free(&self, address: VirtAddr) -> Result<(), NotAnArea> {
        let page = Page::containing(address);
        loop {
            let mut state = self.state.lock();
            let entry = state.tree.get(page).ok_or(NotAnArea(address))?;
            let usable = entry.value.usable(entry.range).ok_or(NotAnArea(address))?;
            if usable.first() != page || state.lazy.contains(entry.range) {
                return Err(NotAnArea(address));
            }
            let waits = state.lazy.push(entry.range, usable.count());
            let purge = !waits || state.lazy.is_due();
            drop(state);
            if purge {
                self.purge();
            }
            if waits {
                return Ok(());
            }
        }
    }

    /// The mapped bytes from `address` to the end of its area; `None` where nothing is mapped.
    #[must_use]
    pub fn bytes_at(&self, address: VirtAddr) -> Option<u64> {
        let page = Page::containing(address);
        let state = self.state.lock();
        let entry = state.tree.get(page)?;
        let usable = entry.value.usable(entry.range)?;
        if !usable.contains(page) || state.lazy.contains(entry.range) {
            return None;
        }
        Some((usable.last().number() - page.number() + 1) * PAGE_SIZE - address.page_offset())
    }

    /// Puts an area into the tree where there is room for it and its guards; gives its mapped pages.
    fn take_range(&self, request: &Request) -> Result<PageRange, VmallocError> {
        if request.pages == 0
            || request.pages > self.window.count()
            || !request.alignment.is_power_of_two()
        {
            return Err(VmallocError::BadSize);
        }
        let all = request.pages + request.guard_below + 1;
        let offset = request.alignment.wrapping_sub(request.guard_below) % request.alignment;
        let gap = GapRequest::new(all)
            .limits(self.window)
            .aligned(request.alignment, offset);
        let area = Area::new(request.kind, request.guard_below);
        for purged in [false, true] {
            let mut state = self.state.lock();
            if let Some(range) = state.tree.find_gap_up(&gap) {
                state.tree.store(range, Some(area), &mut |_| {})?;
                return area.usable(range).ok_or(VmallocError::BadSize);
            }
            drop(state);
            if purged {
                break;
            }
            self.purge();
        }
        Err(VmallocError::NoSpace)
    }

    /// Maps the pages of an area that nobody knows yet.
    fn fill(
        &self,
        range: PageRange,
        attributes: Attributes,
        mut next: impl FnMut(u64) -> Option<KernelPage>,
    ) -> Result<(), VmallocError> {
        let first = range.first().number();
        let mut cursor = self
            .table
            .cursor(range)
            .map_err(|_| VmallocError::Table(MapError::OutOfRange))?;
        cursor
            .map_range(range, Order::ZERO, attributes, |page, _| {
                next(page.number() - first)
            })
            .map_err(|stopped| {
                if let Some(handle) = stopped.handle {
                    let env = self.table.env();
                    handle.release(env.slots(), env.frames());
                }
                match stopped.error {
                    MapError::Memory(_) => VmallocError::Memory,
                    error => VmallocError::Table(error),
                }
            })
    }

    /// The area's address, or its end where it could not be filled.
    fn settle(
        &self,
        range: PageRange,
        outcome: Result<(), VmallocError>,
    ) -> Result<VirtAddr, VmallocError> {
        if let Err(error) = outcome {
            self.unmap(range);
            self.give_range(range);
            return Err(error);
        }
        Ok(range.start())
    }
}

/// No area was given at this address, or it was freed already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotAnArea(pub VirtAddr);

impl fmt::Display for NotAnArea {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no vmalloc area begins at {}", self.0)
    }
}

impl core::error::Error for NotAnArea {}

// SAFETY: V1: an area is mapped, its own (`I1`, `I2`), and stays until freed; alignment is part of the request; V2: the tree
// holds what was given, less what is lazily freed.
unsafe impl<F: Format, E: Env, N: ObjectAlloc<Node>, L: RawLock> LargeSource
    for Vmalloc<'_, F, E, N, L>
{
    fn alloc_large(&self, size: usize, align: usize) -> Result<NonNull<u8>, AllocError> {
        let alignment = (align as u64).div_ceil(PAGE_SIZE).max(1);
        let pages = (size as u64).div_ceil(PAGE_SIZE);
        let request = Request {
            pages,
            alignment,
            kind: AreaKind::Vmalloc,
            guard_below: 0,
        };
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

impl<F: Format, E: Env, N: ObjectAlloc<Node>, L: RawLock> fmt::Debug for Vmalloc<'_, F, E, N, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Vmalloc({:?})", self.window)
    }
}
