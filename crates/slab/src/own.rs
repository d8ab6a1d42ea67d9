//! The allocator's own objects (arrays, descriptors), and the way from an address to its slab.

use core::ptr::{self, NonNull};

use kmem_hal::sync::Ordering;
use kmem_hal::{
    AllocError, Cpu, Frame, FrameRequest, FrameSlot, FrameTable, FrameTag, NodeId, Order, PhysMap,
};

use crate::array::{Array, SMALL_SLOTS};
use crate::block;
use crate::head::{HeadPage, Row};
use crate::meta::MetaPool;
use crate::platform::Platform;
use crate::raw::RawCache;
use crate::registry::Registry;
use crate::slab::{MoreWords, OWN_OBJECTS, Slab};
use crate::system::SlabSystem;

impl<P: Platform> SlabSystem<P> {
    /// An empty array of `slots` slots.
    pub(crate) fn new_array(&self, slots: usize) -> Result<NonNull<Array>, AllocError> {
        self.array_by(slots, &FrameRequest::ONE)
    }

    /// As [`new_array`](Self::new_array), for a caller that goes on with the arrays it has: nobody else's memory goes for it.
    pub(crate) fn another_array(&self, slots: usize) -> Result<NonNull<Array>, AllocError> {
        self.array_by(slots, &FrameRequest::ONE.optional())
    }

    fn array_by(&self, slots: usize, request: &FrameRequest) -> Result<NonNull<Array>, AllocError> {
        // SAFETY: called with a cache at hand, so the system is ready.
        let platform = unsafe { self.platform_unchecked() };
        let memory = self.array_pool(slots).alloc_by(platform, request)?;
        // SAFETY: the pool's objects have room for the slots and are aligned to 64.
        Ok(unsafe { Array::construct(memory, slots) })
    }

    /// Takes an empty array back.
    ///
    /// # Safety
    ///
    /// The array came from [`new_array`](Self::new_array) and nobody uses it any more.
    pub(crate) unsafe fn free_array(&self, array: NonNull<Array>) {
        // SAFETY: the caller owns the array.
        let slots = unsafe { array.as_ref() }.capacity();
        // SAFETY: it came from the pool of its size.
        unsafe { self.array_pool(slots).free(array.cast()) };
    }

    fn array_pool(&self, slots: usize) -> &MetaPool {
        &self.arrays[match slots {
            0..=8 => 0,
            9..=16 => 1,
            17..=32 => 2,
            33..=64 => 3,
            65..=SMALL_SLOTS => 4,
            _ => 5,
        }]
    }

    /// A new descriptor of `cache` for memory of `node`, dead and on no list.
    pub(crate) fn new_descriptor(
        &self,
        cache: &RawCache<P::Lock>,
        node: NodeId,
    ) -> Result<NonNull<Slab>, AllocError> {
        // SAFETY: a cache exists, so the system is ready.
        let platform = unsafe { self.platform_unchecked() };
        let mut more = ptr::null_mut();
        if cache.geometry().objects() > OWN_OBJECTS {
            let words = self.words.alloc(platform)?.cast::<MoreWords>();
            // SAFETY: the pool gives memory of this size and alignment that belongs to this call.
            unsafe { words.write(MoreWords::new()) };
            more = words.as_ptr();
        }
        let slab = match self.descriptors.alloc(platform) {
            Ok(memory) => memory.cast::<Slab>(),
            Err(error) => {
                if let Some(words) = NonNull::new(more) {
                    // SAFETY: taken above, and nobody else knows it.
                    unsafe { self.words.free(words.cast()) };
                }
                return Err(error);
            }
        };
        // SAFETY: the pool gives memory of this size and alignment that belongs to this call.
        unsafe { slab.write(Slab::new(cache.opaque(), node, more)) };
        // SAFETY: just written; descriptors live as long as the cache.
        cache.remember(unsafe { slab.as_ref() });
        Ok(slab)
    }

    /// Frames that hold the allocator's own objects: heads, rows, descriptors, arrays, caches.
    #[must_use]
    pub fn overhead_frames(&self) -> u64 {
        self.own_frames.load(Ordering::Relaxed)
            + self.caches.frames()
            + self.descriptors.frames()
            + self.words.frames()
            + self.arrays.iter().map(MetaPool::frames).sum::<u64>()
    }

    /// The slot of the frame that `address` lies in, where the map reaches it.
    #[inline]
    pub(crate) fn slot_of(platform: &P, address: *const u8) -> Option<(Frame, &FrameSlot)> {
        let table: &FrameTable = platform.table();
        let frame = Frame::containing(platform.map().to_phys(address));
        Some((frame, table.slot(frame)?))
    }

    /// The descriptor of the slab that `address` lies in; `None` where it lies in none.
    #[inline]
    pub(crate) fn slab_of(platform: &P, address: *const u8) -> Option<&Slab> {
        let (_, slot) = Self::slot_of(platform, address)?;
        if slot.tag() != FrameTag::Slab {
            return None;
        }
        let owner = slot.owner().load(Ordering::Relaxed) as usize;
        // SAFETY: the owner word of a slab's frame is the exposed address of its descriptor, which lives as long as its
        // cache; a frame whose slot still says "slab" belongs to a live one.
        unsafe { ptr::with_exposed_provenance::<Slab>(owner).as_ref() }
    }

    /// Gives back rows (with `extra`, which may be null and is in no place), head pages and pools.
    ///
    /// # Safety
    ///
    /// Nobody uses the system, nor will.
    pub(crate) unsafe fn release_own(&self, platform: &P, extra: *mut Row) {
        let cpus = platform.cpu().count() as usize;
        let others = usize::from(self.nodes()) - 1;
        let give = |memory: *mut u8, order: Option<Order>| {
            let frame = Frame::containing(platform.map().to_phys(memory));
            if let Some(order) = order {
                // SAFETY: the block was taken by `new_row` or `head_page`, and nobody uses it by contract.
                unsafe { block::give(platform, frame, order) };
            }
        };
        let rows = self
            .rows
            .iter()
            .map(|row| row.swap(ptr::null_mut(), Ordering::Acquire));
        for row in rows.chain([extra]) {
            if row.is_null() {
                continue;
            }
            // SAFETY: the row's pages were made with it, and nobody uses them by contract.
            unsafe { self.give_node_pages(platform, row.add(cpus).cast(), others) };
            for cpu in 0..cpus {
                // SAFETY: a row has `cpus` places.
                let page = unsafe { &*row.add(cpu) }.load(Ordering::Acquire);
                if !page.is_null() {
                    give(page.cast(), Order::for_bytes(size_of::<HeadPage>() as u64));
                }
            }
            give(row.cast(), Self::row_order(cpus, others));
        }
        for class in &self.classes {
            class.store(ptr::null_mut(), Ordering::Relaxed);
        }
        *self.registry.lock() = Registry::new();
        for pool in [&self.caches, &self.descriptors, &self.words]
            .into_iter()
            .chain(&self.arrays)
        {
            // SAFETY: the caller's promise.
            unsafe { pool.destroy(platform) };
        }
        self.own_frames.store(0, Ordering::Relaxed);
    }
}
