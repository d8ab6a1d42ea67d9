//! Memory for the allocator's own objects: descriptors, arrays, caches.
//!
//! Pages cut into objects of one size, with one word of free bits each. No lock: an interrupt may need a descriptor
//! while the code it interrupted takes one.
//!
//! ```text
//!   page: [ next | free bits | frame ][ object 0 ][ object 1 ] ... 1 to 63
//! ```
//!
//! Invariants
//! - `I1`: pages are pushed to the list and never leave it while the system lives.
//! - `I2`: whoever clears a bit that was set owns the object.
//! - `I3`: who sees a page, by the list or by the hint, sees its header and those of all pages behind it: a push acquires what it is put before.
//!
//! What it does not do: give pages back before the system is torn down. Descriptors are kept by their cache and arrays
//! by their depot, so that what lies here follows the peak of slabs and CPUs: 80 to 192 bytes a slab, 80 bytes to a page an array.

use core::ptr::{self, NonNull};

use kmem_hal::sync::{AtomicPtr, AtomicU64, LocalPtr, LocalU64, Ordering};
use kmem_hal::{AllocError, Frame, FrameRequest, FrameTag, Order, PAGE_SIZE};

use crate::block;
use crate::platform::Platform;

#[derive(Debug)]
#[repr(C, align(64))]
struct MetaPage {
    next: LocalPtr<MetaPage>,
    free: AtomicU64,
    frame: LocalU64,
}

/// The largest objects of a pool, in bytes: one fills a page.
pub const LARGEST: usize = (PAGE_SIZE as usize - size_of::<MetaPage>()) & !15;

/// A pool of objects of one size.
#[derive(Debug)]
pub struct MetaPool {
    size: usize,
    pages: AtomicPtr<MetaPage>,
    /// A page that had a free object lately.
    hint: AtomicPtr<MetaPage>,
    count: AtomicU64,
    /// Free objects in all pages; never above the truth for long, so that a search is not made in vain.
    free: AtomicU64,
}

impl MetaPool {
    kmem_hal::const_new! {
        /// A pool of objects of `size` bytes, a multiple of 16 up to [`LARGEST`].
        pub fn new(size: usize) -> Self {
            assert!(size.is_multiple_of(16) && size > 0 && size <= LARGEST);
            Self {
                size,
                pages: AtomicPtr::new(ptr::null_mut()),
                hint: AtomicPtr::new(ptr::null_mut()),
                count: AtomicU64::new(0),
                free: AtomicU64::new(0),
            }
        }
    }

    fn objects(&self) -> u32 {
        ((PAGE_SIZE as usize - size_of::<MetaPage>()) / self.size).min(63) as u32
    }

    /// Frames in the pool.
    pub fn frames(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Memory for one object, aligned to 16 bytes (to 64 where the size is a multiple of that), uninitialised.
    pub fn alloc<P: Platform>(&self, platform: &P) -> Result<NonNull<u8>, AllocError> {
        self.alloc_by(platform, &FrameRequest::ONE)
    }

    /// As [`alloc`](Self::alloc), by `request` where it takes a frame.
    pub fn alloc_by<P: Platform>(
        &self,
        platform: &P,
        request: &FrameRequest,
    ) -> Result<NonNull<u8>, AllocError> {
        if self.free.load(Ordering::Relaxed) > 0 {
            // The page that had one lately, then all.
            for start in [&self.hint, &self.pages] {
                let mut at = start.load(Ordering::Acquire);
                // SAFETY: pages stay on the list while the system lives (I1); acquire pairs with the push, and with the hint (I3).
                while let Some(page) = unsafe { at.as_ref() } {
                    if let Some(object) = self.take(page) {
                        return Ok(object);
                    }
                    at = page.next.get();
                }
            }
        }
        self.grow(platform, request)
    }

    fn take(&self, page: &MetaPage) -> Option<NonNull<u8>> {
        loop {
            let free = page.free.load(Ordering::Relaxed);
            if free == 0 {
                return None;
            }
            let bit = free & free.wrapping_neg();
            if page.free.fetch_and(!bit, Ordering::Acquire) & bit != 0 {
                self.free.fetch_sub(1, Ordering::Relaxed);
                self.hint
                    .store(ptr::from_ref(page).cast_mut(), Ordering::Release);
                return Some(self.object(page, bit.trailing_zeros()));
            }
        }
    }

    fn object(&self, page: &MetaPage, index: u32) -> NonNull<u8> {
        let start = ptr::from_ref(page).expose_provenance();
        let address = start + size_of::<MetaPage>() + index as usize * self.size;
        let object = ptr::with_exposed_provenance_mut(address);
        // SAFETY: an address inside a page is not null.
        unsafe { NonNull::new_unchecked(object) }
    }

    #[cold]
    fn grow<P: Platform>(
        &self,
        platform: &P,
        request: &FrameRequest,
    ) -> Result<NonNull<u8>, AllocError> {
        let (frame, memory) = block::take_for(platform, request, FrameTag::Kernel)?;
        memory.as_ptr().expose_provenance();
        let page = memory.cast::<MetaPage>();
        let all = (1u64 << self.objects()) - 1;
        // Acquire, here and below: whoever comes by the hint reads this page and goes on to those behind it, whose makers' writes this page hands on.
        let mut head = self.pages.load(Ordering::Acquire);
        // SAFETY: the block belongs to this call alone, is a page long and page-aligned.
        unsafe {
            page.write(MetaPage {
                next: LocalPtr::new(head),
                free: AtomicU64::new(all & !1),
                frame: LocalU64::new(frame.number()),
            });
        }
        // SAFETY: just constructed.
        let page = unsafe { page.as_ref() };
        let pointer = ptr::from_ref(page).cast_mut();
        while let Err(found) =
            self.pages
                .compare_exchange(head, pointer, Ordering::AcqRel, Ordering::Acquire)
        {
            head = found;
            page.next.set(head);
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        self.free
            .fetch_add(u64::from(self.objects()) - 1, Ordering::Relaxed);
        self.hint.store(pointer, Ordering::Release);
        Ok(self.object(page, 0))
    }

    /// Takes an object back.
    ///
    /// # Safety
    ///
    /// The object came from this pool, is not freed twice, and nobody looks at it any more.
    pub unsafe fn free(&self, object: NonNull<u8>) {
        let start = object.as_ptr().addr() & !(PAGE_SIZE as usize - 1);
        let page: *mut MetaPage = ptr::with_exposed_provenance_mut(start);
        let index = (object.as_ptr().addr() - start - size_of::<MetaPage>()) / self.size;
        // SAFETY: objects lie in pages of the pool, whose header is at the page's start.
        let header = unsafe { &*page };
        self.free.fetch_add(1, Ordering::Relaxed);
        header.free.fetch_or(1 << index, Ordering::Release);
        self.hint.store(page, Ordering::Release);
    }

    /// Gives every page back.
    ///
    /// # Safety
    ///
    /// Nobody uses an object of the pool any more, nor the pool meanwhile.
    pub unsafe fn destroy<P: Platform>(&self, platform: &P) {
        self.hint.store(ptr::null_mut(), Ordering::Relaxed);
        let mut at = self.pages.swap(ptr::null_mut(), Ordering::Acquire);
        // SAFETY: the pages belong to the pool until they are given back below.
        while let Some(page) = unsafe { at.as_ref() } {
            at = page.next.get();
            let frame = Frame::from_number(page.frame.get());
            // SAFETY: the block came from `block::take` and nobody uses it any more.
            unsafe { block::give(platform, frame, Order::ZERO) };
        }
        self.count.store(0, Ordering::Relaxed);
        self.free.store(0, Ordering::Relaxed);
    }
}
