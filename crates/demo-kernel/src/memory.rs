//! The kernel's memory: kmem's crates put together, from the boot map to `Box::new` and a page table of its own.
//!
//! ```text
//!   pvh::Boot ─> BootMap ─> EarlyAllocator carves SLOTS ─> FRAMES (buddy) ─> SLAB ─> #[global_allocator]
//!                                                              └──────────> MACHINE ─> PageTable
//! ```

use core::alloc::{GlobalAlloc, Layout};

use kmem_buddy::{BootMap, Buddy, Config, EarlyAllocator, RegionKind, Reservation};
use kmem_hal::{
    CachePadded, CpuId, DeviceFrame, EpochArea, EpochGrace, Frame, FrameHandle, FrameRange,
    FrameTable, IrqSafe, NoLarge, NoPressure, OffsetMap, Order, OwnedFrame, Page, PageRange,
    PhysAddr, SECTION_FRAMES, Section, VirtAddr,
};
use kmem_paging::format::X86_64;
use kmem_paging::{Divisible, PageTable, Rights};
use kmem_slab::SlabSystem;

use crate::platform::{DIRECT, DIRECT_BYTES, IMAGE_BASE, MAX_CPUS, Machine, PHYS, image_end};
use crate::pvh::Boot;

/// The page-frame allocator.
pub static FRAMES: Frames = Buddy::with(&PHYS, Machine, Machine, NoPressure);
type Frames = Buddy<&'static OffsetMap, Machine, IrqSafe, Machine>;

/// One slot per frame.
pub static SLOTS: FrameTable = FrameTable::new();

/// The object allocator.
pub static SLAB: SlabSystem<SlabParts> = SlabSystem::new();
type SlabParts = kmem_slab::Parts<
    &'static Frames,
    &'static OffsetMap,
    Machine,
    IrqSafe,
    NoLarge,
    &'static FrameTable,
>;

/// When lock-free readers are done.
static GRACE: Grace = EpochGrace::new(Machine);
type Grace = EpochGrace<'static, Machine>;
static GRACE_AREAS: [CachePadded<EpochArea>; MAX_CPUS] =
    [const { CachePadded::new(EpochArea::new()) }; MAX_CPUS];

/// What page tables stand on.
pub static MACHINE: TableParts =
    // SAFETY: E2: SLOTS covers every frame that FRAMES gives (`init`); E3: Machine is the MMU that walks PHYS's memory.
    unsafe { kmem_paging::Parts::new(&PHYS, &FRAMES, Machine, &GRACE, Machine, &SLOTS) };
type TableParts = kmem_paging::Parts<
    'static,
    &'static OffsetMap,
    &'static Frames,
    Machine,
    &'static Grace,
    Machine,
>;

/// The kernel's page table.
pub type Table = PageTable<X86_64, &'static TableParts, KernelFrame>;

struct Heap;
// SAFETY: the slab system's functions have `GlobalAlloc`'s contract.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        SLAB.alloc(layout)
    }
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { SLAB.dealloc(memory, layout) }
    }
}
#[global_allocator]
static HEAP: Heap = Heap;

/// Free frames, counted anew, with every CPU's arrays emptied.
pub fn free_frames() -> u64 {
    FRAMES.drain_all();
    let count = FRAMES.recount();
    count.free + count.cached
}

/// Takes over the memory of the boot map; gives how many frames the object allocator took for itself.
///
/// # Safety
/// Once, on the first CPU; the map is right, and what it calls usable is used by nobody but the image.
pub unsafe fn init(boot: &Boot) -> u64 {
    let mut map = BootMap::<64>::new();
    for entry in boot.map() {
        map.push(
            PhysAddr::new(entry.base),
            entry.length,
            RegionKind::from_e820(entry.kind),
        )
        .expect("a map entry");
    }
    // The first 64 KiB hold the trampoline, and a page that scenario `fault` writes to.
    map.reserve(PhysAddr::new(0), 0x10000, Reservation::Other)
        .expect("room");
    map.reserve(
        PhysAddr::new(0x10_0000),
        image_end() - 0x10_0000,
        Reservation::KernelImage,
    )
    .expect("room");
    let last = map
        .present()
        .filter_map(|range| range.last())
        .max()
        .expect("there is memory");

    let mut early = EarlyAllocator::new(&mut map, &PHYS);
    let sections = FrameTable::sections_for(last) as usize;
    let directory = early
        .alloc_slice(sections, |_| Section::absent())
        .expect("room for the directory");
    for (index, section) in directory.iter().enumerate() {
        let covered = FrameRange::from_numbers(index as u64 * SECTION_FRAMES, SECTION_FRAMES)
            .expect("frames exist");
        if early
            .map()
            .present()
            .any(|range| !range.intersection(covered).is_empty())
        {
            let slots = early
                .alloc(FrameTable::SECTION_BYTES as u64, 64)
                .expect("room for slots");
            let slots =
                core::ptr::NonNull::new(crate::platform::direct(slots.as_u64())).expect("not null");
            // SAFETY: the early allocator gave the memory for ever, aligned, and in the direct map.
            unsafe { section.set_memory(slots) };
        }
    }
    SLOTS.init(directory);
    FRAMES
        .init(&mut map, &Config::new().cpus(1))
        .expect("zones");
    let free = free_frames();
    // SAFETY: S2: nobody else allocates from FRAMES' slots; S3: PHYS is an offset map.
    let parts = unsafe { kmem_slab::Parts::new(&FRAMES, &PHYS, Machine, &SLOTS) };
    SLAB.init(parts).expect("memory for the first heads");
    GRACE.init(&GRACE_AREAS);
    free - free_frames()
}

/// Gives a CPU that is online its arrays.
pub fn cpu_online(cpu: CpuId) {
    FRAMES.cpu_online(cpu).expect("memory for a CPU's arrays");
}

/// What an entry of the kernel's table stands for: a frame of its own, or memory that nobody owns.
///
/// The two differ by their size: what is owned is mapped by single frames, the rest by leaves of 2 MiB.
#[derive(Debug)]
pub enum KernelFrame {
    /// An owned frame.
    Owned(OwnedFrame),
    /// The direct map, or the image.
    Window(DeviceFrame),
}

/// Frames of 2 MiB.
const HUGE: Order = Order::new(9).expect("an order");

// SAFETY: H1, H2: each variant passes through the numbers as its own type does, and the order tells which it was.
unsafe impl FrameHandle for KernelFrame {
    fn into_entry(self) -> (Frame, Order) {
        match self {
            Self::Owned(frame) => frame.into_entry(),
            Self::Window(frame) => frame.into_entry(),
        }
    }
    unsafe fn from_entry(first: Frame, order: Order) -> Self {
        // SAFETY: the caller's promise is passed on.
        unsafe {
            if order == Order::ZERO {
                Self::Owned(OwnedFrame::from_entry(first, order))
            } else {
                Self::Window(DeviceFrame::from_entry(first, order))
            }
        }
    }
}
// SAFETY: D1: this kernel splits none of its 2 MiB leaves, and single frames cannot be split.
unsafe impl Divisible for KernelFrame {}

/// Makes a page table with the direct map and the image in it.
pub fn new_table() -> Table {
    let table = Table::new(&MACHINE).expect("a frame for the root");
    for (linear, bytes) in [
        (DIRECT, DIRECT_BYTES),
        (IMAGE_BASE, image_end().next_multiple_of(2 << 20)),
    ] {
        let first = Page::starting_at(VirtAddr::new(linear)).expect("aligned");
        let range = PageRange::with_count(first, bytes >> 12).expect("not empty");
        let mut cursor = table.cursor(range).expect("canonical");
        let rights = Rights::KERNEL_DATA | Rights::EXECUTE;
        let window = |page: Page, _| {
            let frame = Frame::new(page.number() - first.number())?;
            Some(KernelFrame::Window(DeviceFrame::new(frame, HUGE)?))
        };
        cursor
            .map_range(range, HUGE, rights, window)
            .expect("room for tables");
    }
    table
}
