//! The classic names: pages by their linear address, as a course or a driver asks for them.
//!
//! A thin face over [`FrameSource`] and [`FrameSink`]: what it gives is always mapped, so that a request for movable frames gets
//! none from HIGHMEM. An address forgets what an [`OwnedFrame`] knows, so freeing is the caller's to get right, and unsafe.
//!
//! Source: Linux mm/page_alloc.c, `get_free_pages_noprof`, `get_zeroed_page_noprof`, `free_pages`.

use core::ptr::NonNull;

use kmem_hal::{
    AllocError, Cpu, CpuCall, FrameRequest, FrameSink, FrameSource, Order, OwnedFrame, PAGE_SIZE,
    PhysAddr, PhysMap, Pressure, RawLock,
};

use crate::buddy::Buddy;
use crate::error::FreeError;

impl<M: PhysMap, C: Cpu, L: RawLock + 'static, K: CpuCall, P: Pressure> Buddy<M, C, L, K, P> {
    /// Allocates the block that `request` describes and gives the linear address of its first byte.
    ///
    /// The block lies in memory that is permanently mapped, whatever its mobility: below HIGHMEM.
    ///
    /// # Errors
    ///
    /// [`AllocError`] as for [`alloc`](FrameSource::alloc).
    ///
    /// # Examples
    ///
    /// ```
    /// # use kmem_buddy::{BootMap, Buddy, Config, RegionKind, ZoneLimits};
    /// # use kmem_hal::{FrameRequest, OffsetMap, Order, PhysAddr, SingleCpu, VirtAddr};
    /// # let arena = Box::leak(vec![0u8; 5 << 20].into_boxed_slice());
    /// # let base = (arena.as_mut_ptr().expose_provenance() + 0xf_ffff) & !0xf_ffff;
    /// # let mut map: BootMap = BootMap::new();
    /// # map.push(PhysAddr::new(0), 4 << 20, RegionKind::Usable)?;
    /// # let (memory, cpu) = unsafe { (OffsetMap::new(base, 1024), SingleCpu::new()) };
    /// # let buddy: Buddy<_, _> = Buddy::new(memory, cpu);
    /// # // SAFETY: X1: nobody else uses the memory of the map.
    /// # unsafe { buddy.init(&mut map, &Config::new().limits(ZoneLimits::NORMAL_ONLY))? };
    /// let order = Order::new(2).unwrap();
    /// let pages = buddy.get_free_pages(&FrameRequest::new(order))?;
    /// assert_eq!(VirtAddr::from_ptr(pages.as_ptr()).page_offset(), 0);
    /// // SAFETY: 16 KiB that are ours, and are given back with the order that they were asked for.
    /// unsafe {
    ///     pages.write_bytes(0xa5, 4 << 12);
    ///     buddy.free_pages(pages, order);
    /// }
    /// let zeroes = buddy.get_zeroed_page(&FrameRequest::ONE)?;
    /// // SAFETY: as above.
    /// assert_eq!(unsafe { zeroes.add(4095).read() }, 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "__get_free_pages")]
    #[doc(alias = "__get_dma_pages")]
    pub fn get_free_pages(&self, request: &FrameRequest) -> Result<NonNull<u8>, AllocError> {
        let mut request = *request;
        // The last byte that has a linear address.
        let last = self.memory().reach().last();
        let last = last.map_or(0, |last| last.start().as_u64() | (PAGE_SIZE - 1));
        let mapped = !request.high && request.mobility != kmem_hal::Mobility::Movable;
        request.high = false;
        if !mapped && request.max_address.as_u64() > last {
            request.max_address = PhysAddr::new(last);
        }
        let frame = self.alloc(&request)?;
        let pointer = NonNull::new(self.memory().to_ptr(frame.first().start()));
        match pointer.filter(|_| self.memory().reach().contains_range(frame.range())) {
            Some(pointer) => {
                // The caller owns it by its address from here on.
                let _ = frame.into_raw();
                Ok(pointer)
            }
            None => {
                self.free(frame);
                Err(AllocError::Unsatisfiable)
            }
        }
    }

    /// Allocates one page; the order of `request` is not looked at.
    ///
    /// # Errors
    ///
    /// [`AllocError`].
    #[doc(alias = "__get_free_page")]
    pub fn get_free_page(&self, request: &FrameRequest) -> Result<NonNull<u8>, AllocError> {
        self.get_free_pages(&FrameRequest {
            order: Order::ZERO,
            ..*request
        })
    }

    /// Allocates one page of zeroes; the order of `request` is not looked at.
    ///
    /// # Errors
    ///
    /// [`AllocError`].
    pub fn get_zeroed_page(&self, request: &FrameRequest) -> Result<NonNull<u8>, AllocError> {
        self.get_free_page(&request.zeroed())
    }

    /// Frees the block at a linear address.
    ///
    /// An address that no block of this allocator can have is [noted](Buddy::misuse) and left alone.
    ///
    /// # Safety
    ///
    /// `address` came from [`get_free_pages`](Self::get_free_pages) of this allocator with this order and was not freed since;
    /// nobody uses the memory any more, and no TLB translates another address to it.
    pub unsafe fn free_pages(&self, address: NonNull<u8>, order: Order) {
        let physical = self.memory().to_phys(address.as_ptr());
        let first = kmem_hal::Frame::containing(physical);
        if !physical.is_aligned(PAGE_SIZE) || !first.is_aligned(order) {
            if let Some(state) = self.state() {
                let number = first.number();
                self.note_misuse(state, FreeError::Misaligned, number, order.index());
            }
            return;
        }
        // SAFETY: the caller's promise; aligned, as was just seen.
        self.free(unsafe { OwnedFrame::from_raw(first, order) });
    }

    /// Frees one page.
    ///
    /// # Safety
    ///
    /// As [`free_pages`](Self::free_pages), with order 0.
    pub unsafe fn free_page(&self, address: NonNull<u8>) {
        // SAFETY: the caller's promise.
        unsafe { self.free_pages(address, Order::ZERO) }
    }
}
