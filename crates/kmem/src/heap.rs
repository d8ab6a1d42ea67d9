//! A global allocator for any kernel.

use core::alloc::{GlobalAlloc, Layout};
use core::fmt;

use kmem_buddy::{BootMap, BuddyInfo, Config, MemInfo};
use kmem_hal::sync::{AtomicU64, AtomicUsize, Ordering};
use kmem_hal::{
    Cpu, IrqSafe, NoCpuCall, NoLarge, NoPressure, OffsetMap, PhysMap, RawLock, SingleCpu,
};
use kmem_slab::{Flags, SlabInfo};

use crate::explain::Explanation;
use crate::memory::{InitError, Memory, SlabParts};

/// A kernel's heap: page-frame allocator and slab system behind [`GlobalAlloc`].
///
/// `M` is how physical memory is reached, `C` which CPU this is, `L` the lock of slow paths. The defaults serve a kernel on
/// one CPU that maps all memory at one offset: it implements nothing. Before [`init`](Self::init) every allocation gives null,
/// and [`explain`](Self::explain) says why.
///
/// A kernel with several CPUs, nodes, reclaim or vmalloc builds a [`Memory`] instead, and may still put a `Heap` over the same
/// traits.
pub struct Heap<M = OffsetMap, C = SingleCpu, L = IrqSafe>
where
    M: PhysMap + 'static,
    C: Cpu + 'static,
    L: RawLock + 'static,
{
    memory: Memory<M, C, L>,
    refusals: AtomicU64,
    refused_size: AtomicUsize,
    refused_align: AtomicUsize,
}

/// `/proc/slabinfo` of a heap.
pub type SlabReport<'h, M, C, L> = SlabInfo<'h, SlabParts<M, C, L, NoCpuCall, NoPressure, NoLarge>>;

impl Heap {
    kmem_hal::const_new! {
        /// A heap for one CPU, for memory that is mapped at an offset.
        pub fn new() -> Self {
            // SAFETY: nothing is pinned before `init`, which demands that one CPU uses the heap.
            Heap::with(OffsetMap::unset(), unsafe { SingleCpu::new() })
        }
    }

    /// Starts the heap on the free memory of `map`, which is mapped at `offset`: physical address `a` at `offset + a`.
    ///
    /// # Errors
    ///
    /// [`InitError`]; allocations go on giving null.
    ///
    /// # Safety
    ///
    /// All memory that `map` calls usable is mapped there, writable, and in use by nobody where it is not reserved in `map`; no
    /// other allocator is started on it (`X1` of [`EarlyAllocator::new`](kmem_buddy::EarlyAllocator::new)).
    /// One CPU uses the heap, and code on it is interrupted by interrupts and NMIs only.
    pub unsafe fn init<const N: usize>(
        &'static self,
        map: &mut BootMap<N>,
        offset: usize,
    ) -> Result<(), InitError> {
        // Before the memory's offset is touched: a heap that works goes on to.
        if self.memory.frames().is_initialised() {
            return Err(InitError::Frames(kmem_buddy::InitError::Twice));
        }
        let end = map.present().last().map_or(0, |run| run.end_number());
        // SAFETY: P1 and P2 for the memory of the map by contract; other addresses are never accessed.
        unsafe { self.memory.frames().memory().set(offset, end) };
        // SAFETY: the caller's promise.
        unsafe { self.init_mapped(map, &Config::new()) }
    }
}

impl<M, C, L> Heap<M, C, L>
where
    M: PhysMap + 'static,
    C: Cpu + 'static,
    L: RawLock + 'static,
{
    kmem_hal::const_new! {
        /// A heap over a kernel's own way to reach memory.
        pub fn with(memory: M, cpu: C) -> Self {
            Self {
                memory: Memory::new(memory, cpu),
                refusals: AtomicU64::new(0),
                refused_size: AtomicUsize::new(0),
                refused_align: AtomicUsize::new(0),
            }
        }
    }

    /// Starts the heap on the free memory of `map`, as far as the [`PhysMap`] reaches it.
    ///
    /// # Errors
    ///
    /// [`InitError`]; allocations go on giving null.
    ///
    /// # Safety
    ///
    /// `X1` of [`EarlyAllocator::new`](kmem_buddy::EarlyAllocator::new): the memory that `map` calls usable is in use by nobody
    /// where it is not reserved in `map`, and no other allocator is started on it.
    pub unsafe fn init_mapped<const N: usize>(
        &'static self,
        map: &mut BootMap<N>,
        config: &Config,
    ) -> Result<(), InitError> {
        // SAFETY: X1, by contract.
        unsafe { self.memory.init(map, config) }
    }

    /// What the heap is made of: frames, frame table, slab system.
    pub const fn memory(&self) -> &Memory<M, C, L> {
        &self.memory
    }

    /// The page-frame allocator's lines of /proc/meminfo.
    pub fn meminfo(&self) -> MemInfo {
        self.memory.frames().mem_info()
    }

    /// /proc/buddyinfo.
    pub fn buddyinfo(&self) -> BuddyInfo<'_, L> {
        self.memory.frames().buddy_info()
    }

    /// /proc/slabinfo.
    pub fn slabinfo(&self) -> SlabReport<'_, M, C, L> {
        self.memory.slab().slabinfo()
    }

    /// Says in words what state the heap is in, why the last refused allocation was refused, and who holds what.
    pub fn explain(&self) -> Explanation<'_, M, C, L> {
        let count = self.refusals.load(Ordering::Relaxed);
        let size = self.refused_size.load(Ordering::Relaxed);
        let align = self.refused_align.load(Ordering::Relaxed);
        Explanation::new(&self.memory, count, size, align)
    }

    #[cold]
    fn note_refusal(&self, size: usize, align: usize) {
        self.refused_size.store(size, Ordering::Relaxed);
        self.refused_align.store(align, Ordering::Relaxed);
        self.refusals.fetch_add(1, Ordering::Relaxed);
    }

    #[inline]
    fn checked(&self, memory: *mut u8, size: usize, align: usize) -> *mut u8 {
        if memory.is_null() {
            self.note_refusal(size, align);
        }
        memory
    }
}

// SAFETY: the slab system gives memory that fits the layout and belongs to nobody else until it is given back; it never
// unwinds.
unsafe impl<M, C, L> GlobalAlloc for Heap<M, C, L>
where
    M: PhysMap + 'static,
    C: Cpu + 'static,
    L: RawLock + 'static,
{
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let memory = self.memory.slab().kmalloc_layout(layout, Flags::empty());
        let memory = memory.map_or(core::ptr::null_mut(), |memory| memory.as_ptr());
        self.checked(memory, layout.size(), layout.align())
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let memory = self.memory.slab().kmalloc_layout(layout, Flags::ZERO);
        let memory = memory.map_or(core::ptr::null_mut(), |memory| memory.as_ptr());
        self.checked(memory, layout.size(), layout.align())
    }

    #[inline]
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { self.memory.slab().dealloc(memory, layout) }
    }

    #[inline]
    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller's promise.
        let memory = unsafe { self.memory.slab().realloc(memory, layout, new_size) };
        self.checked(memory, new_size, layout.align())
    }
}

impl Default for Heap {
    fn default() -> Self {
        Self::new()
    }
}

impl<M: PhysMap, C: Cpu, L: RawLock> fmt::Debug for Heap<M, C, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Heap").field(&self.memory).finish()
    }
}
