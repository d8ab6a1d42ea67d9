//! The ways to make an area: memory, given frames, device registers, DMA buffers.
//!
//! ```text
//!   take_range ── the area is in the tree, nothing is mapped ── fill ── Ok: the address
//!                                                                └──── Err: unmap what was mapped, flush, give the range back
//! ```
//!
//! Memory of 2 MiB and more (the format's second smallest leaf) begins at a multiple of that and gets blocks of that size as
//! long as there are any; what is left, and every block that cannot be had, is made of single frames.

use kmem_hal::{
    Context, DeviceFrame, Frame, FrameRange, FrameRequest, FrameSink, FrameSource, FrameTable,
    ObjectAlloc, Order, OwnedFrame, PAGE_SIZE, Page, PageRange, PhysAddr, RawLock, SECTION_FRAMES,
    VirtAddr,
};
use kmem_paging::format::Format;
use kmem_paging::{Attributes, Env, MapError, MemoryType, Rights};
use kmem_vma_tree::Node;

use crate::area::AreaKind;
use crate::page::KernelPage;
use crate::request::{DmaMask, NotAnArea, Request, VmallocError, check_rights};
use crate::vmalloc::{Made, Vmalloc};

/// Single frames that are taken before a table's lock and mapped under it: 64 KiB, and small on a kernel's stack.
const TOGETHER: usize = 16;

/// A buffer that the kernel and a device see: see [`Vmalloc::alloc_dma`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaBuffer {
    /// Where the kernel reads and writes it.
    pub address: VirtAddr,
    /// Where the device does. The buffer is contiguous there too.
    pub device: PhysAddr,
    /// Bytes, a multiple of the page size.
    pub bytes: u64,
}

impl<'a, F: Format, E: Env, N: ObjectAlloc<Node>, L: RawLock> Vmalloc<'a, F, E, N, L> {
    /// Memory of `bytes` bytes, rounded up to pages, from frames that need not follow each other. Its bytes are anything.
    ///
    /// # Errors
    ///
    /// [`VmallocError`]; nothing is mapped then.
    #[doc(alias = "__vmalloc")]
    #[doc(alias = "vmalloc_huge")]
    #[track_caller]
    pub fn alloc(&self, bytes: u64) -> Result<VirtAddr, VmallocError> {
        self.alloc_memory(Request::bytes(bytes))
    }

    /// A kernel stack of `pages` pages with guards on both sides; gives the address one past its top.
    ///
    /// # Errors
    ///
    /// As [`alloc`](Self::alloc).
    #[doc(alias = "alloc_thread_stack_node")]
    #[track_caller]
    pub fn alloc_stack(&self, pages: u64) -> Result<VirtAddr, VmallocError> {
        let bottom = self.alloc_memory(Request::stack(pages))?;
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
    #[track_caller]
    pub fn alloc_memory(&self, request: Request) -> Result<VirtAddr, VmallocError> {
        let made = Made::here();
        let huge = self
            .huge_order()
            .filter(|huge| request.huge && request.pages >= huge.frames());
        let wide = huge.map(|huge| request.aligned(request.alignment.max(huge.frames())));
        let range = match wide.map(|wide| self.take_range(&wide, 0, made)) {
            Some(Ok(range)) => range,
            // Aligned as asked, on small leaves, where no gap is that wide.
            None | Some(Err(VmallocError::NoSpace)) => self.take_range(&request, 0, made)?,
            Some(Err(error)) => return Err(error),
        };
        let mut single = self.frames;
        single.zeroed = request.zeroed;
        let outcome = self.fill_memory(range, &request.attributes, &single, huge);
        self.settle(range, made, outcome)
    }

    /// Maps fresh frames, [`TOGETHER`] at a time. They are taken with no lock held, as the caller can bear: reclaim may want the very
    /// table that they are mapped in ([`StackCache`](crate::StackCache) unmaps stacks).
    #[inline(never)]
    fn fill_memory(
        &self,
        range: PageRange,
        attributes: &Attributes,
        single: &FrameRequest,
        huge: Option<Order>,
    ) -> Result<(), (VmallocError, Page)> {
        let env = self.table.env();
        let mut rest = Some(range);
        while let Some(range) = rest {
            let mut taken = [const { None }; TOGETHER];
            let first = range.first();
            let part = self
                .take_frames(range, single, huge, &mut taken)
                .and_then(|pages| PageRange::with_count(first, pages));
            let mut frames = taken.iter_mut();
            let outcome = match part {
                Some(part) => self.fill(part, attributes, true, |_, _| {
                    KernelPage::owned(frames.next()?.take()?, env.slots())
                        .map_err(|frame| env.frames().free(frame))
                        .ok()
                }),
                None => Err((VmallocError::Memory, first)),
            };
            if outcome.is_err() {
                for frame in taken.into_iter().flatten() {
                    env.frames().free(frame);
                }
                return outcome;
            }
            rest = part.and_then(|part| {
                PageRange::new(Page::from_number(part.last().number() + 1), range.last())
            });
        }
        Ok(())
    }

    /// Takes a large block for the first pages of `range`, or single frames; gives how many pages they fill, and `None` where some
    /// could not be had.
    #[inline]
    fn take_frames(
        &self,
        range: PageRange,
        single: &FrameRequest,
        huge: Option<Order>,
        taken: &mut [Option<OwnedFrame>; TOGETHER],
    ) -> Option<u64> {
        let frames = self.table.env().frames();
        let mut pages = range.count();
        if let Some(order) = huge {
            let inside = range.first().number() & (order.frames() - 1);
            if inside == 0 && pages >= order.frames() {
                // A wish: single frames will do, so nothing is reclaimed for it.
                let wish = FrameRequest {
                    order,
                    context: single.context.min(Context::NoReclaim),
                    ..*single
                };
                if let Ok(block) = frames.alloc(&wish) {
                    taken[0] = Some(block);
                    return Some(order.frames());
                }
            }
            pages = pages.min(order.frames() - inside);
        }
        pages = pages.min(TOGETHER as u64);
        // Spelled out, so that the common case is compiled for what it is.
        let common = *single == FrameRequest::ONE;
        for place in taken.iter_mut().take(pages as usize) {
            let frame = if common {
                frames.alloc(&FrameRequest::ONE)
            } else {
                frames.alloc(single)
            };
            *place = Some(frame.ok()?);
        }
        Some(pages)
    }

    /// Maps frames that the caller gives, one after the other; they are freed with the area.
    ///
    /// `frames` may run under a table's lock: it must neither wait nor use the kernel's table.
    ///
    /// # Errors
    ///
    /// As [`alloc`](Self::alloc); the frames taken from `frames` so far are freed.
    #[doc(alias = "VM_MAP_PUT_PAGES")]
    #[track_caller]
    pub fn vmap(
        &self,
        pages: u64,
        mut frames: impl FnMut() -> Option<OwnedFrame>,
    ) -> Result<VirtAddr, VmallocError> {
        let request = Request::new(pages).of(AreaKind::Vmap);
        let made = Made::here();
        let range = self.take_range(&request, 0, made)?;
        let env = self.table.env();
        let outcome = self.fill(range, &request.attributes, true, |_, _| {
            let frame = frames()?;
            if frame.order() != Order::ZERO {
                env.frames().free(frame);
                return None;
            }
            KernelPage::owned(frame, env.slots())
                .map_err(|frame| env.frames().free(frame))
                .ok()
        });
        self.settle(range, made, outcome)
    }

    /// Maps frames that belong to somebody else and stay so: page `i` of the area is the `i`-th frame that `frames` gives.
    ///
    /// [`free`](Self::free) unmaps them on every CPU before it returns, so that their owner may free them. `frames` may run under a
    /// table's lock: it must neither wait nor use the kernel's table.
    ///
    /// # Errors
    ///
    /// As [`alloc`](Self::alloc); no frame is mapped then.
    #[doc(alias = "vmap_pages_range")]
    #[track_caller]
    pub fn vmap_borrowed(
        &self,
        pages: u64,
        attributes: Attributes,
        mut frames: impl FnMut() -> Option<Frame>,
    ) -> Result<VirtAddr, VmallocError> {
        let mut request = Request::new(pages).of(AreaKind::Vmap);
        request.attributes = attributes.rights(attributes.rights.union(Rights::GLOBAL));
        let made = Made::here().borrowed();
        let range = self.take_range(&request, 0, made)?;
        let outcome = self.fill(range, &request.attributes, false, |_, _| {
            let frame = frames()?;
            DeviceFrame::new(frame, Order::ZERO).map(KernelPage::borrowed)
        });
        self.settle(range, made, outcome)
    }

    /// Maps device registers: `bytes` bytes at physical `address`; gives the linear address of the first.
    ///
    /// Leaves are as large as size and alignment allow. Where any of the frames has a slot, it is memory that somebody may own
    /// (firmware's tables): then the mapping ends at once when it is freed, and with the batch otherwise.
    ///
    /// # Errors
    ///
    /// As [`alloc`](Self::alloc).
    #[doc(alias = "ioremap_wc")]
    #[doc(alias = "memremap")]
    #[track_caller]
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
        let first = frames.first().number();
        let huge = self
            .huge_order()
            .filter(|huge| frames.count() >= huge.frames());
        let align = huge.map_or(1, Order::frames);
        let request = Request::new(frames.count())
            .of(AreaKind::Ioremap)
            .memory_type(memory_type);
        let mut made = Made::here();
        if has_slots(self.table.env().slots(), frames) {
            made = made.borrowed();
        }
        let range = match self.take_range(&request.aligned(align), first % align, made) {
            Err(VmallocError::NoSpace) if align > 1 => self.take_range(&request, 0, made)?,
            taken => taken?,
        };
        let start = range.first().number();
        let outcome = self.fill(range, &request.attributes, false, |page, left| {
            let frame = Frame::new(first + (page.number() - start))?;
            let order = huge.filter(|&huge| {
                left >= huge.frames()
                    && page.number().is_multiple_of(huge.frames())
                    && frame.is_aligned(huge)
            });
            DeviceFrame::new(frame, order.unwrap_or(Order::ZERO)).map(KernelPage::borrowed)
        });
        let start = self.settle(range, made, outcome)?;
        Ok(VirtAddr::new(start.as_u64() + address.page_offset()))
    }

    /// A zeroed buffer that a device with these address lines can reach, contiguous for both; freed as any other area.
    ///
    /// On x86 devices see the caches, so [`MemoryType::WriteBack`] is coherent. Another type keeps the contract of
    /// [`PhysMap`](kmem_hal::PhysMap) (`P5`: one type a frame) only where the linear map does not hold the frames or is given
    /// that type too.
    ///
    /// # Errors
    ///
    /// As [`alloc`](Self::alloc).
    #[doc(alias = "dma_alloc_coherent")]
    #[track_caller]
    pub fn alloc_dma(
        &self,
        bytes: u64,
        mask: DmaMask,
        memory_type: MemoryType,
    ) -> Result<DmaBuffer, VmallocError> {
        let request = Request::bytes(bytes)
            .of(AreaKind::Dma)
            .memory_type(memory_type);
        let made = Made::here();
        let order = Order::for_frames(request.pages).ok_or(VmallocError::BadSize)?;
        let mut asked = FrameRequest::new(order)
            .zeroed()
            .context(self.frames.context);
        asked.node = self.frames.node;
        asked.max_address = mask.last();
        let range = self.take_range(&request, 0, made)?;
        let env = self.table.env();
        let block = match env.frames().alloc(&asked) {
            Ok(block) => block,
            Err(error) => {
                self.give_range(range.first());
                return Err(error.into());
            }
        };
        let device = block.first().start();
        let (first, _) = block.into_raw();
        let piece = |index: u64| {
            // SAFETY: O1: the block was this call's, and each of its frames becomes a value once: below `mapped` through
            // `fill`, the others after it; O2: single frames; O3: they are fresh.
            unsafe { OwnedFrame::from_raw(Frame::from_number(first.number() + index), Order::ZERO) }
        };
        let mut mapped = 0;
        let outcome = self.fill(range, &request.attributes, true, |_, _| {
            let frame = piece(mapped);
            mapped += 1;
            KernelPage::owned(frame, env.slots())
                .map_err(|frame| env.frames().free(frame))
                .ok()
        });
        for index in mapped..order.frames() {
            env.frames().free(piece(index));
        }
        Ok(DmaBuffer {
            address: self.settle(range, made, outcome)?,
            device,
            bytes: request.pages * PAGE_SIZE,
        })
    }

    /// Gives all pages of an area other rights, flushed: read-only data, or code once it is written.
    ///
    /// # Errors
    ///
    /// [`VmallocError::NotAnArea`] where no area begins at `address`; [`VmallocError::BadRights`];
    /// [`VmallocError::Table`].
    #[doc(alias = "set_memory_rox")]
    #[doc(alias = "set_memory_ro")]
    pub fn protect(&self, address: VirtAddr, rights: Rights) -> Result<(), VmallocError> {
        check_rights(rights)?;
        let page = Page::containing(address);
        let (range, _) = self
            .area_at(page)
            .filter(|(range, _)| range.first() == page)
            .ok_or(VmallocError::NotAnArea)?;
        let mut cursor = self
            .table
            .cursor(range)
            .map_err(|_| VmallocError::Table(MapError::OutOfRange))?;
        let mut gather = self.table.gather::<1>();
        // The area is whole, so no leaf is split and the gather gets no block.
        let changed = cursor.protect(range, rights.union(Rights::GLOBAL), &mut gather);
        drop(cursor);
        gather.commit(|page| {
            let _ = page;
        });
        changed
            .map(|_| ())
            .map_err(|_| VmallocError::Table(MapError::Unencodable))
    }

    /// The order of the table's second smallest leaf, if it has one.
    pub(crate) fn huge_order(&self) -> Option<Order> {
        let level = F::LEVELS.get(1).filter(|level| level.leaf)?;
        (self.table.levels() > 1).then_some(level.order())
    }

    /// Maps the pages of an area that nobody knows yet: `next` gets a page and how many are left. `owned` says whether a
    /// handle that could not be mapped is vmalloc's to free.
    ///
    /// # Errors
    ///
    /// The first page that was not mapped: what lies there and behind it is not this call's.
    fn fill(
        &self,
        range: PageRange,
        attributes: &Attributes,
        owned: bool,
        next: impl FnMut(Page, u64) -> Option<KernelPage>,
    ) -> Result<(), (VmallocError, Page)> {
        let mut cursor = self
            .table
            .cursor(range)
            .map_err(|_| (VmallocError::Table(MapError::OutOfRange), range.first()))?;
        // The tables are nearly always there, and a call that finds no memory for one is undone: so no more than those of the
        // uppermost levels are reserved.
        let levels = F::LEVELS.iter().take(self.table.levels());
        let largest = levels.rev().find(|level| level.leaf);
        let reserved = largest.map_or(Order::ZERO, |level| level.order());
        cursor
            .map_range(range, reserved, *attributes, next)
            .map_err(|stopped| {
                let Some(handle) = stopped.handle else {
                    return (VmallocError::Memory, stopped.at);
                };
                if owned {
                    let env = self.table.env();
                    handle.release(env.slots(), env.frames());
                }
                let error = match stopped.error {
                    MapError::Memory(_) => VmallocError::Memory,
                    error => VmallocError::Table(error),
                };
                (error, stopped.at)
            })
    }

    /// The area's address, or its end where it could not be filled.
    fn settle(
        &self,
        range: PageRange,
        made: Made,
        outcome: Result<(), (VmallocError, Page)>,
    ) -> Result<VirtAddr, VmallocError> {
        if let Err((error, at)) = outcome {
            if let Some(mapped) = below(range, at) {
                self.unmap(mapped, made.borrowed);
            }
            self.give_range(range.first());
            return Err(error);
        }
        Ok(range.start())
    }
}

/// Whether any of the frames has a slot: slots come by the section.
fn has_slots(slots: &FrameTable, frames: FrameRange) -> bool {
    let Some(last) = frames.last() else {
        return false;
    };
    let last = (last.number() / SECTION_FRAMES + 1).min(slots.directory().len() as u64);
    (frames.first().number() / SECTION_FRAMES..last).any(|section| {
        slots
            .slot(Frame::from_number(section * SECTION_FRAMES))
            .is_some()
    })
}

/// The pages of `range` below `at`, if there are any.
fn below(range: PageRange, at: Page) -> Option<PageRange> {
    PageRange::new(range.first(), at.checked_sub(1)?)
}
