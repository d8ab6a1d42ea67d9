//! The calls of `kmem-buddy`, `kmem-slab` and the facade, with every fast and slow path behind them.

use core::alloc::{GlobalAlloc, Layout};

use kmem::buddy::{EarlyAllocator, EarlyError, MemInfo, OwnedRange, PlaceError, Recount};
use kmem::hal::{CpuId, FrameRange, NoCpuCall};
use kmem::slab::SlabTotals;
use kmem::{
    AllocError, BootMap, BootMapError, Buddy, Cache, Config, Flags, Frame, FrameRequest, FrameSink,
    FrameSource, Heap, InitError, OffsetMap, Order, OwnedFrame, PhysAddr, RegionKind, SingleCpu,
    SlabSystem,
};

use crate::calls;

type Frames = Buddy<OffsetMap, SingleCpu>;
type Slab = SlabSystem<kmem::SlabParts<OffsetMap, SingleCpu>>;
type Objects = Cache<'static, [u64; 12], kmem::SlabParts<OffsetMap, SingleCpu>>;

calls! {
    call_boot_push(map: &mut BootMap<128>, base: PhysAddr, length: u64, kind: RegionKind) -> Result<(), BootMapError> {
        map.push(base, length, kind)
    }
    call_boot_early(early: &mut EarlyAllocator<'_, OffsetMap, 128>, bytes: u64) -> Result<PhysAddr, EarlyError> {
        early.alloc(bytes, 64)
    }
    call_heap_init(heap: &'static Heap, map: &mut BootMap<128>, offset: usize) -> Result<(), InitError> {
        // SAFETY: never run.
        unsafe { heap.init(map, offset) }
    }
    call_heap_alloc(heap: &'static Heap, layout: Layout) -> *mut u8 {
        // SAFETY: never run.
        unsafe { heap.alloc(layout) }
    }
    call_heap_alloc_zeroed(heap: &'static Heap, layout: Layout) -> *mut u8 {
        // SAFETY: never run.
        unsafe { heap.alloc_zeroed(layout) }
    }
    call_heap_dealloc(heap: &'static Heap, memory: *mut u8, layout: Layout) {
        // SAFETY: never run.
        unsafe { heap.dealloc(memory, layout) }
    }
    call_heap_realloc(heap: &'static Heap, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: never run.
        unsafe { heap.realloc(memory, layout, size) }
    }
    call_buddy_alloc(frames: &Frames, request: &FrameRequest) -> Result<OwnedFrame, AllocError> { frames.alloc(request) }
    call_buddy_free(frames: &Frames, frame: OwnedFrame) { frames.free(frame) }
    call_buddy_alloc_range(frames: &Frames, count: u64, align: Order, request: &FrameRequest) -> Result<OwnedRange, AllocError> {
        frames.alloc_range(count, align, request)
    }
    call_buddy_alloc_at(frames: &Frames, first: Frame, order: Order) -> Result<OwnedFrame, PlaceError> {
        frames.alloc_at(first, order)
    }
    call_buddy_alloc_range_at(frames: &Frames, range: FrameRange) -> Result<OwnedRange, PlaceError> {
        frames.alloc_range_at(range)
    }
    call_buddy_drain(frames: &Buddy<OffsetMap, SingleCpu, kmem::IrqSafe, NoCpuCall>) -> bool { frames.drain_all() }
    call_buddy_extend(frames: &Frames) -> u64 { frames.extend() }
    call_buddy_cpu_online(frames: &Frames, cpu: CpuId) -> Result<(), AllocError> { frames.cpu_online(cpu) }
    call_buddy_mem_info(frames: &Frames) -> MemInfo { frames.mem_info() }
    call_buddy_recount(frames: &Frames) -> Recount { frames.recount() }
    call_buddy_init(frames: &Frames, map: &mut BootMap<128>, config: &Config) -> bool {
        // SAFETY: never run.
        unsafe { frames.init(map, config) }.is_ok()
    }
    call_slab_kmalloc(slab: &Slab, size: usize, flags: Flags) -> *mut u8 {
        slab.kmalloc(size, flags).map_or(core::ptr::null_mut(), |memory| memory.as_ptr())
    }
    call_slab_kfree(slab: &Slab, memory: *mut u8) {
        // SAFETY: never run.
        unsafe { slab.kfree(memory) }
    }
    call_slab_shrink(slab: &Slab) -> u64 { slab.shrink() }
    call_slab_cpu_online(slab: &Slab, cpu: CpuId) -> Result<(), AllocError> { slab.cpu_online(cpu) }
    call_slab_totals(slab: &Slab) -> SlabTotals { slab.totals() }
    call_slab_cache_pair(cache: &'static Objects, value: [u64; 12]) -> bool { cache.alloc(value).is_ok() }
}
