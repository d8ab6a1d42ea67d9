//! Adapters of the two peers that bring page handling of their own: buddy-slab-allocator and slabmalloc.

use std::alloc::Layout;
use std::panic::Location;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};

use ax_crate_interface::impl_interface;
use ax_sync::interface::{AcquireResult, ContextState, LockMetadata, SpinOps};
use buddy_slab_allocator::interface::BuddySlabIf;
use buddy_slab_allocator::{GlobalAllocator, PerCpuSlab, SlabPoolTrait, StaticSlabPool};
use slabmalloc::{AllocationError, Allocator, LargeObjectPage, ObjectPage, ZoneAllocator};

use super::heaps::Heap;
use crate::lock::Locked;
use crate::platform::{CPUS, Region, this_cpu};

const PAGE: usize = 4096;

static POOL: StaticSlabPool<PAGE, { CPUS as usize }> =
    StaticSlabPool::new([PerCpuSlab::new(0), PerCpuSlab::new(1)], this_cpu);

struct Machine;

#[impl_interface]
impl BuddySlabIf for Machine {
    fn virt_to_phys(address: usize) -> usize {
        address
    }

    fn slab_pool() -> &'static dyn SlabPoolTrait {
        &POOL
    }
}

/// The lock that its user gives it: one that spins while it reads, as the lock around the other peers.
struct PlainSpin;

#[impl_interface]
impl SpinOps for PlainSpin {
    fn acquire(
        locked: &AtomicBool,
        _metadata: &LockMetadata,
        _address: usize,
        _context: u8,
        _subclass: u32,
        _caller: &'static Location<'static>,
    ) -> ContextState {
        while locked
            .compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed)
            .is_err()
        {
            while locked.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        }
        ContextState::new(0, 0)
    }

    fn try_acquire(
        locked: &AtomicBool,
        _metadata: &LockMetadata,
        _address: usize,
        _context: u8,
        _subclass: u32,
        _caller: &'static Location<'static>,
    ) -> AcquireResult {
        let acquired = locked
            .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
            .is_ok();
        AcquireResult::new(acquired, ContextState::new(0, 0))
    }

    fn release(locked: &AtomicBool, _address: usize, _context: u8, _state: ContextState) {
        locked.store(false, Ordering::Release);
    }

    fn force_release(locked: &AtomicBool, _address: usize, _context: u8) {
        locked.store(false, Ordering::Release);
    }

    fn is_locked(locked: &AtomicBool) -> bool {
        locked.load(Ordering::Acquire)
    }
}

/// buddy-slab-allocator: a slab allocator with a lock per CPU over a buddy allocator. There is one in a process.
pub(super) struct BuddySlab {
    inner: GlobalAllocator<PAGE>,
    _region: Region,
}

impl BuddySlab {
    pub(super) fn new(region: Region) -> Self {
        let inner = GlobalAllocator::new();
        // SAFETY: the region is this value's and outlives the allocator.
        unsafe {
            let memory = std::slice::from_raw_parts_mut(region.base(), region.bytes());
            inner.init(memory).expect("the arena fits");
        }
        Self {
            inner,
            _region: region,
        }
    }
}

impl Heap for BuddySlab {
    #[inline(always)]
    fn alloc(&self, layout: Layout) -> *mut u8 {
        self.inner
            .alloc(layout)
            .map_or(std::ptr::null_mut(), NonNull::as_ptr)
    }
    #[inline(always)]
    unsafe fn free(&self, memory: *mut u8, layout: Layout) {
        let memory = NonNull::new(memory).expect("not null");
        // SAFETY: the caller's promise.
        unsafe { self.inner.dealloc(memory, layout) };
    }
}

/// slabmalloc's zone allocator, and what it leaves to its user: 4 KiB pages from the bottom of the arena, 2 MiB pages from its top.
struct Zone {
    inner: ZoneAllocator<'static>,
    bottom: usize,
    top: usize,
    base: *mut u8,
}

// SAFETY: the pages are the arena's, used by the holder of the lock around this value.
unsafe impl Send for Zone {}

impl Zone {
    fn allocate(&mut self, layout: Layout) -> *mut u8 {
        loop {
            match self.inner.allocate(layout) {
                Ok(memory) => return memory.as_ptr(),
                Err(AllocationError::OutOfMemory) if self.refill(layout) => {}
                Err(_) => return std::ptr::null_mut(),
            }
        }
    }

    fn refill(&mut self, layout: Layout) -> bool {
        let small = layout.size() <= ZoneAllocator::MAX_BASE_ALLOC_SIZE;
        let size = if small { PAGE } else { 2 << 20 };
        if self.top - self.bottom < size {
            return false;
        }
        // SAFETY: inside the arena, a page that was not given before, zero as a new page of either kind is.
        unsafe {
            if small {
                let page = self.base.add(self.bottom).cast::<ObjectPage<'static>>();
                self.bottom += size;
                page.write_bytes(0, 1);
                self.inner.refill(layout, &mut *page).is_ok()
            } else {
                self.top -= size;
                let page = self.base.add(self.top).cast::<LargeObjectPage<'static>>();
                page.write_bytes(0, 1);
                self.inner.refill_large(layout, &mut *page).is_ok()
            }
        }
    }
}

/// slabmalloc.
pub(super) struct SlabMalloc {
    inner: Locked<Box<Zone>>,
    _region: Region,
}

impl SlabMalloc {
    pub(super) fn new(region: Region) -> Self {
        let zone = Zone {
            inner: ZoneAllocator::new(),
            bottom: 0,
            top: region.bytes(),
            base: region.base(),
        };
        Self {
            inner: Locked::new(Box::new(zone)),
            _region: region,
        }
    }
}

impl Heap for SlabMalloc {
    #[inline(always)]
    fn alloc(&self, layout: Layout) -> *mut u8 {
        self.inner.with(|zone| zone.allocate(layout))
    }
    #[inline(always)]
    unsafe fn free(&self, memory: *mut u8, layout: Layout) {
        let memory = NonNull::new(memory).expect("not null");
        let freed = self
            .inner
            .with(|zone| zone.inner.deallocate(memory, layout));
        assert!(freed.is_ok(), "slabmalloc takes its memory back");
    }
}
