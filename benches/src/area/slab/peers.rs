//! Adapters of the peers that other languages wrote, and of those that serve one kind of workload only.

#[cfg(feature = "c-peers")]
use std::alloc::GlobalAlloc;
use std::alloc::Layout;
use std::ptr::NonNull;

use super::heaps::{Heap, or_null, start};
use crate::lock::Locked;
use crate::platform::Region;

/// A heap of the process that others use as their global allocator.
#[cfg(feature = "c-peers")]
pub(super) struct Global<G>(pub(super) G);

#[cfg(feature = "c-peers")]
impl<G: GlobalAlloc + Sync> Heap for Global<G> {
    #[inline(always)]
    fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: no layout of these workloads has size 0.
        unsafe { self.0.alloc(layout) }
    }
    #[inline(always)]
    unsafe fn free(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { self.0.dealloc(memory, layout) }
    }
}

/// rusty_alloc, mimalloc's design in Rust; its objects are aligned to 16 bytes, which these workloads do not exceed.
pub(super) struct Rusty;

impl Heap for Rusty {
    #[inline(always)]
    fn alloc(&self, layout: Layout) -> *mut u8 {
        rusty_alloc::alloc::malloc(layout.size())
    }
    #[inline(always)]
    unsafe fn free(&self, memory: *mut u8, _layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { rusty_alloc::alloc::free_inline(memory) }
    }
}

/// slab_allocator_rs: eight slabs of an eighth of the arena each, so that one class can use no more.
pub(super) struct Slabs {
    inner: Locked<slab_allocator_rs::Heap>,
    _region: Region,
}

impl Slabs {
    pub(super) fn new(region: Region) -> Self {
        // SAFETY: the region is this value's and outlives the heap; its size is a multiple of what the heap asks for.
        let inner = unsafe {
            slab_allocator_rs::Heap::new(region.base().expose_provenance(), region.bytes())
        };
        Self {
            inner: Locked::new(inner),
            _region: region,
        }
    }
}

impl Heap for Slabs {
    #[inline(always)]
    fn alloc(&self, layout: Layout) -> *mut u8 {
        or_null(self.inner.with(|inner| inner.allocate(layout).ok()))
    }
    #[inline(always)]
    unsafe fn free(&self, memory: *mut u8, layout: Layout) {
        let memory = NonNull::new(memory).expect("not null");
        // SAFETY: the caller's promise.
        self.inner
            .with(|inner| unsafe { inner.deallocate(memory, layout) });
    }
}

/// good_memory_allocator.
pub(super) struct Good {
    inner: Locked<Box<good_memory_allocator::Allocator>>,
    _region: Region,
}

impl Good {
    pub(super) fn new(region: Region) -> Self {
        // The allocator keeps addresses of its own bins, so that it must not move.
        let mut inner = Box::new(good_memory_allocator::Allocator::empty());
        // SAFETY: the region is this value's and outlives the heap.
        unsafe { inner.init(start(&region).as_ptr().expose_provenance(), region.bytes()) };
        Self {
            inner: Locked::new(inner),
            _region: region,
        }
    }
}

impl Heap for Good {
    #[inline(always)]
    fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: no layout of these workloads has size 0.
        self.inner.with(|inner| unsafe { inner.alloc(layout) })
    }
    #[inline(always)]
    unsafe fn free(&self, memory: *mut u8, _layout: Layout) {
        // SAFETY: the caller's promise.
        self.inner.with(|inner| unsafe { inner.dealloc(memory) });
    }
}
