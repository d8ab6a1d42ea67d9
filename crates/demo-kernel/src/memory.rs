//! The kernel's memory: kmem's heap from the boot map, and a page table of its own.
//!
//! ```text
//!   pvh::Boot ─> BootMap ─> HEAP: frame slots, page frames, objects, #[global_allocator]
//!                             └─> MACHINE ─> PageTable
//! ```

use kmem::hal::{
    CachePadded, CpuId, DeviceFrame, EpochArea, EpochGrace, FrameHandle, Page, PageRange,
};
use kmem::paging::format::X86_64;
use kmem::paging::{Divisible, PageTable, Parts, Rights};
use kmem::{
    BootMap, Buddy, Config, Frame, Heap, InitError, OffsetMap, Order, OwnedFrame, PhysAddr,
    Reservation, VirtAddr, boot,
};

use crate::platform::{self, DIRECT, DIRECT_BYTES, IMAGE_BASE, MAX_CPUS, Machine, image_end};
use crate::pvh::Boot;
use crate::smp;

/// Everything that is allocated in this kernel comes from here.
#[global_allocator]
pub static HEAP: Heap<OffsetMap, Machine> = Heap::with(platform::phys(), Machine);

type Frames = Buddy<OffsetMap, Machine>;
/// The page-frame allocator of [`HEAP`].
pub const fn frames() -> &'static Frames {
    HEAP.memory().frames()
}

/// When lock-free readers of page tables are done.
static GRACE: EpochGrace<'static, Machine> = EpochGrace::new(Machine);
static GRACE_AREAS: [CachePadded<EpochArea>; MAX_CPUS] =
    [const { CachePadded::new(EpochArea::new()) }; MAX_CPUS];

/// What page tables stand on.
pub static MACHINE: TableParts =
    // SAFETY: E2: the heap's frame table covers every frame that its allocator gives; E3: Machine is the MMU that walks
    // what the heap's map reaches.
    unsafe {
        Parts::new(
            frames().memory(),
            frames(),
            Machine,
            &GRACE,
            Machine,
            HEAP.memory().table(),
        )
    };
type TableParts = Parts<
    'static,
    &'static OffsetMap,
    &'static Frames,
    Machine,
    &'static EpochGrace<'static, Machine>,
    Machine,
>;

/// The kernel's page table.
pub type Table = PageTable<X86_64, &'static TableParts, KernelFrame>;

/// Takes over the memory of the boot map.
///
/// # Safety
/// Once, on the first CPU; the map is right, and what it calls usable is used by nobody but the image.
pub unsafe fn init(map: &Boot) -> Result<(), InitError> {
    let image = PhysAddr::new(0x10_0000);
    let mut boot = BootMap::<64>::new();
    boot::pvh(&mut boot, map.map()).map_err(InitError::Map)?;
    boot.reserve(
        image,
        image_end() - image.as_u64(),
        Reservation::KernelImage,
    )
    .map_err(InitError::Map)?;
    // The first 64 KiB hold the trampoline, and a page that scenario `fault` writes to.
    boot.reserve(PhysAddr::new(0), 0x10000, Reservation::Other)
        .map_err(InitError::Map)?;
    // SAFETY: what is in use is reserved.
    unsafe { HEAP.init_mapped(&mut boot, &Config::new().cpus(1))? };
    GRACE.init(&GRACE_AREAS);
    Ok(())
}

/// Gives a CPU that is online its arrays.
pub fn cpu_online(cpu: CpuId) {
    HEAP.memory()
        .cpu_online(cpu)
        .expect("memory for a CPU's arrays");
}

/// Free frames, counted anew, with every CPU's arrays of objects and of frames emptied.
pub fn free_frames() -> u64 {
    for _ in 0..2 {
        // Arrays are emptied by the CPU they belong to; what one gives back may fill another's.
        smp::each(|_| {
            HEAP.memory().slab().shrink();
            frames().drain_local();
        });
    }
    let count = frames().recount();
    count.free + count.cached
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
