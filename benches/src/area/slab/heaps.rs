//! The heaps that are compared, behind one trait, whose calls are inlined for every heap alike: what is called out of line is the heap's own choice.

use std::alloc::Layout;
use std::cell::Cell;
use std::ptr::NonNull;

use kmem_slab::{Check, SlabSystem};

use super::kernels::{BuddySlab, SlabMalloc};
use super::peers::{Good, Rusty, Slabs};
use super::{SMALL, verify};
use crate::lock::Locked;
use crate::platform::{Machine, PolicyParts, Region};

/// A heap as the workloads see it.
pub(super) trait Heap: Sync {
    /// Memory for `layout`, or null.
    fn alloc(&self, layout: Layout) -> *mut u8;

    /// Takes memory back.
    ///
    /// # Safety
    ///
    /// It came from `alloc` with this layout and is freed once.
    unsafe fn free(&self, memory: *mut u8, layout: Layout);
}

impl<H: Heap + ?Sized> Heap for &H {
    #[inline(always)]
    fn alloc(&self, layout: Layout) -> *mut u8 {
        (**self).alloc(layout)
    }
    #[inline(always)]
    unsafe fn free(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { (**self).free(memory, layout) }
    }
}

impl Heap for Machine {
    #[inline(always)]
    fn alloc(&self, layout: Layout) -> *mut u8 {
        self.slab.alloc(layout)
    }
    #[inline(always)]
    unsafe fn free(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { self.slab.dealloc(memory, layout) }
    }
}

/// kmem with the policy `Check`.
pub(super) struct Checked(pub(super) &'static SlabSystem<PolicyParts<Check>>);

impl Heap for Checked {
    #[inline(always)]
    fn alloc(&self, layout: Layout) -> *mut u8 {
        self.0.alloc(layout)
    }
    #[inline(always)]
    unsafe fn free(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { self.0.dealloc(memory, layout) }
    }
}

pub(super) type TlsfInner = rlsf::Tlsf<'static, u32, u32, 28, 32>;

/// rlsf's two-level segregated fit.
pub(super) struct Tlsf {
    pub(super) inner: Locked<TlsfInner>,
    pub(super) region: Region,
}

impl Tlsf {
    pub(super) fn new(region: Region) -> Self {
        let mut inner = TlsfInner::new();
        let block = NonNull::slice_from_raw_parts(start(&region), region.bytes());
        // SAFETY: the region is this value's and outlives the allocator.
        unsafe { inner.insert_free_block_ptr(block) }.expect("the arena fits");
        Self {
            inner: Locked::new(inner),
            region,
        }
    }
}

pub(super) fn start(region: &Region) -> NonNull<u8> {
    NonNull::new(region.base()).expect("a mapping is not at 0")
}

pub(super) fn or_null(memory: Option<NonNull<u8>>) -> *mut u8 {
    memory.map_or(std::ptr::null_mut(), NonNull::as_ptr)
}

impl Heap for Tlsf {
    #[inline(always)]
    fn alloc(&self, layout: Layout) -> *mut u8 {
        or_null(self.inner.with(|inner| inner.allocate(layout)))
    }
    #[inline(always)]
    unsafe fn free(&self, memory: *mut u8, layout: Layout) {
        let memory = NonNull::new(memory).expect("not null");
        // SAFETY: the caller's promise.
        self.inner
            .with(|inner| unsafe { inner.deallocate(memory, layout.align()) });
    }
}

pub(super) type TalcInner =
    talc::base::Talc<talc::source::Manual, talc::base::binning::DefaultBinning>;

/// talc.
pub(super) struct Talc {
    pub(super) inner: Locked<TalcInner>,
    pub(super) region: Region,
}

impl Talc {
    pub(super) fn new(region: Region) -> Self {
        let mut inner = TalcInner::new(talc::source::Manual);
        // SAFETY: the region is this value's and outlives the allocator.
        unsafe { inner.claim(region.base(), region.bytes()) }.expect("the arena fits");
        Self {
            inner: Locked::new(inner),
            region,
        }
    }
}

impl Heap for Talc {
    #[inline(always)]
    fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: no layout of these workloads has size 0.
        or_null(self.inner.with(|inner| unsafe { inner.allocate(layout) }))
    }
    #[inline(always)]
    unsafe fn free(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        self.inner
            .with(|inner| unsafe { inner.deallocate(memory, layout) });
    }
}

/// linked_list_allocator.
pub(super) struct List {
    pub(super) inner: Locked<linked_list_allocator::Heap>,
    pub(super) region: Region,
}

impl List {
    pub(super) fn new(region: Region) -> Self {
        let mut inner = linked_list_allocator::Heap::empty();
        // SAFETY: the region is this value's and outlives the allocator.
        unsafe { inner.init(region.base(), region.bytes()) };
        Self {
            inner: Locked::new(inner),
            region,
        }
    }
}

impl Heap for List {
    #[inline(always)]
    fn alloc(&self, layout: Layout) -> *mut u8 {
        or_null(
            self.inner
                .with(|inner| inner.allocate_first_fit(layout).ok()),
        )
    }
    #[inline(always)]
    unsafe fn free(&self, memory: *mut u8, layout: Layout) {
        let memory = NonNull::new(memory).expect("not null");
        // SAFETY: the caller's promise.
        self.inner
            .with(|inner| unsafe { inner.deallocate(memory, layout) });
    }
}

/// The host's malloc.
pub(super) struct HostMalloc;

impl Heap for HostMalloc {
    #[inline(always)]
    fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: any size may be asked for; malloc aligns to 16, which these workloads do not exceed.
        unsafe { libc::malloc(layout.size()) }.cast()
    }
    #[inline(always)]
    unsafe fn free(&self, memory: *mut u8, _layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { libc::free(memory.cast()) }
    }
}

/// Addresses in a row, from the start again at the end.
pub(super) struct Bump(pub(super) Region);

thread_local! {
    static NEXT: Cell<usize> = const { Cell::new(0) };
}

impl Heap for Bump {
    #[inline(always)]
    fn alloc(&self, layout: Layout) -> *mut u8 {
        let size = layout.size().next_multiple_of(16);
        let mut at = NEXT.get();
        if at + size > self.0.bytes() {
            at = 0;
        }
        NEXT.set(at + size);
        self.0.base().wrapping_add(at)
    }
    #[inline(always)]
    unsafe fn free(&self, _memory: *mut u8, _layout: Layout) {}
}

/// An array of 64-byte objects of which the last freed is the next given, without a lock: the floor of any cache.
pub(super) struct Stack {
    pub(super) objects: Box<[Cell<*mut u8>]>,
    pub(super) given: Cell<usize>,
    _region: Region,
}

// SAFETY: only workloads of one thread use it.
unsafe impl Sync for Stack {}

impl Stack {
    pub(super) fn new() -> Self {
        let region = Region::new(32).touched();
        let count = region.bytes() / SMALL.size();
        Self {
            objects: (0..count)
                .map(|number| Cell::new(region.base().wrapping_add(number * SMALL.size())))
                .collect(),
            given: Cell::new(0),
            _region: region,
        }
    }
}

impl Heap for Stack {
    #[inline(always)]
    fn alloc(&self, _layout: Layout) -> *mut u8 {
        let at = self.given.get();
        self.given.set(at + 1);
        self.objects[at].get()
    }
    #[inline(always)]
    unsafe fn free(&self, memory: *mut u8, _layout: Layout) {
        let at = self.given.get() - 1;
        self.given.set(at);
        self.objects[at].set(memory);
    }
}

/// The programs, over arenas that stay for all workloads of the area.
pub(super) struct Heaps {
    pub(super) kmem: &'static Machine,
    pub(super) checked: Checked,
    pub(super) buddy_slab: BuddySlab,
    pub(super) slabmalloc: SlabMalloc,
    pub(super) slabs: Slabs,
    pub(super) good: Good,
    pub(super) tlsf: Tlsf,
    pub(super) talc: Talc,
    pub(super) list: List,
    pub(super) bump: Bump,
    pub(super) stack: Stack,
}

impl Heaps {
    pub(super) fn new(frames: u64) -> Self {
        let arena = || Region::new(frames).huge().touched();
        let kmem = Machine::leak(arena());
        Self {
            kmem,
            checked: Checked(kmem.with_policy::<Check>()),
            buddy_slab: BuddySlab::new(arena()),
            slabmalloc: SlabMalloc::new(arena()),
            slabs: Slabs::new(arena()),
            good: Good::new(arena()),
            tlsf: Tlsf::new(arena()),
            talc: Talc::new(arena()),
            list: List::new(arena()),
            bump: Bump(Region::new(1 << 13).huge().touched()),
            stack: Stack::new(),
        }
    }

    pub(super) fn verify(&self) -> Result<(), String> {
        verify("kmem", self.kmem)?;
        verify("kmem with Check", &self.checked)?;
        verify("rusty_alloc", &Rusty)?;
        verify("buddy-slab-allocator", &self.buddy_slab)?;
        verify("slabmalloc", &self.slabmalloc)?;
        verify("slab_allocator_rs", &self.slabs)?;
        verify("good_memory_allocator", &self.good)?;
        verify("rlsf", &self.tlsf)?;
        verify("talc", &self.talc)?;
        verify("linked_list_allocator", &self.list)?;
        verify("libc", &HostMalloc)
    }
}
