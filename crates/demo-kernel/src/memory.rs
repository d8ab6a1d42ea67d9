//! The kernel's memory: kmem put together.
//!
//! ```text
//!   pvh::Boot ─> BootMap ─> HEAP: frame slots, page frames, objects, #[global_allocator]
//!                             └─> MACHINE ─> kernel table: direct map, image, fixmap
//!                                    │            ├─> vmalloc: kernel stacks
//!                                    └─> WORLD ─> Mm ─> address spaces, which share the kernel's half
//! ```

use alloc::boxed::Box;
use core::sync::atomic::{AtomicPtr, Ordering};

use kmem::cow_mm::{self, AddressSpace, Layout, Mm, Object, SpaceMemory, VmaMemory};
use kmem::hal::lock::SpinWait;
use kmem::hal::{
    CachePadded, CpuId, DeviceFrame, EpochArea, EpochGrace, Mmu, Page, PageRange, VirtAddr,
};
use kmem::paging::format::X86_64La57;
use kmem::paging::{Attributes, MemoryType, PageTable, Parts, Rights, TableCache};
use kmem::vma_tree::Node;
use kmem::vmalloc::{FixMap, KernelPage, Vmalloc};
use kmem::{
    BootMap, Cache, Config, Frame, Heap, InitError, IrqSafe, OffsetMap, Order, PhysAddr,
    Reservation, SlabParts, boot,
};

use crate::layout::{self, DIRECT, FIXMAP_END, IMAGE_BASE};
use crate::platform::{self, MAX_CPUS, Machine};
use crate::pvh::Boot;
use crate::{apic, smp};

/// Everything that is allocated in this kernel comes from here.
#[global_allocator]
pub static HEAP: Heap<OffsetMap, Machine> = Heap::with(platform::phys(), Machine);

type Frames = kmem::Frames<OffsetMap, Machine>;
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

/// Objects of the address spaces, by type.
type Objects<T> = Cache<'static, T, SlabParts<OffsetMap, Machine>>;
type Backing = Object<&'static Objects<Node>, SpinWait>;
static NODES: Objects<Node> = Cache::new(HEAP.memory().slab(), "vma_node");
static VMAS: Objects<VmaMemory> = Cache::new(HEAP.memory().slab(), "vm_area_struct");
static BACKINGS: Objects<Backing> = Cache::new(HEAP.memory().slab(), "object");
static SPACES: Objects<SpaceMemory> = Cache::new(HEAP.memory().slab(), "mm_struct");

/// What address spaces stand on.
pub type World = cow_mm::Parts<
    &'static TableParts,
    X86_64La57,
    &'static Objects<Node>,
    &'static Objects<VmaMemory>,
    &'static Objects<Backing>,
    &'static Objects<SpaceMemory>,
    SpinWait,
>;
// SAFETY: E2 as for MACHINE; a static does not move.
static WORLD: World = unsafe { cow_mm::Parts::new(&MACHINE, &NODES, &VMAS, &BACKINGS, &SPACES) };

/// A process's memory.
pub type Space = AddressSpace<'static, World>;
/// The kernel's page table; `X86_64La57` has four levels or five.
pub type Table = PageTable<X86_64La57, &'static TableParts, KernelPage>;
/// The kernel's virtual memory.
pub type KernelAreas =
    Vmalloc<'static, X86_64La57, &'static TableParts, &'static Objects<Node>, IrqSafe>;
type Fixed = FixMap<'static, X86_64La57, &'static TableParts, FIXMAP_END, 1>;

static TABLE: AtomicPtr<Table> = AtomicPtr::new(core::ptr::null_mut());
static MM: AtomicPtr<Mm<'static, World>> = AtomicPtr::new(core::ptr::null_mut());
static AREAS: AtomicPtr<KernelAreas> = AtomicPtr::new(core::ptr::null_mut());

fn get<T>(place: &'static AtomicPtr<T>) -> &'static T {
    let value = place.load(Ordering::Acquire);
    // SAFETY: `init` stores boxes there that are never freed.
    unsafe { value.as_ref() }.expect("memory::init comes first")
}

fn keep<T>(place: &'static AtomicPtr<T>, value: T) -> &'static T {
    place.store(Box::into_raw(Box::new(value)), Ordering::Release);
    get(place)
}

/// The kernel's page table.
pub fn table() -> &'static Table {
    get(&TABLE)
}

/// What all address spaces share.
pub fn mm() -> &'static Mm<'static, World> {
    get(&MM)
}

/// vmalloc.
pub fn areas() -> &'static KernelAreas {
    get(&AREAS)
}

/// Takes over the memory of the boot map, and runs on page tables of our own from then on.
///
/// # Safety
/// Once, on the first CPU; the map is right, and what it calls usable is used by nobody but the image.
pub unsafe fn init(map: &Boot) -> Result<(), InitError> {
    let image = PhysAddr::new(0x10_0000);
    let mut boot = BootMap::<64>::new();
    boot::pvh(&mut boot, map.map()).map_err(InitError::Map)?;
    boot.reserve(
        image,
        layout::image_end() - image.as_u64(),
        Reservation::KernelImage,
    )
    .map_err(InitError::Map)?;
    // The first 64 KiB hold the trampoline, and a page that scenario `fault` writes to.
    boot.reserve(PhysAddr::new(0), 0x10000, Reservation::Other)
        .map_err(InitError::Map)?;
    let reach = layout::direct_end();
    if reach < layout::DIRECT_BYTES {
        boot.reserve(
            PhysAddr::new(reach),
            layout::DIRECT_BYTES - reach,
            Reservation::Other,
        )
        .map_err(InitError::Map)?;
    }
    // SAFETY: what is in use is reserved.
    unsafe { HEAP.init_mapped(&mut boot, &Config::new().cpus(1))? };
    GRACE.init(&GRACE_AREAS);
    let table = keep(&TABLE, kernel_table(map));
    // SAFETY: it maps the kernel's half, and is never freed.
    unsafe { platform::SPACES.set_kernel_root(table.root()) };
    // SAFETY: the table maps the image and the stacks in it, and the direct map, where they are.
    unsafe { load_kernel_table() };
    let registers = Fixed::new(table)
        .expect("the tables of the fixed pages")
        .set(0, PhysAddr::new(apic::PHYSICAL), MemoryType::Uncached)
        .expect("a fixed page");
    apic::set_registers(registers.as_u64());
    let (from, to) = layout::VMALLOC;
    keep(&AREAS, Vmalloc::new(table, pages(from, to - from), &NODES));
    keep(&MM, Mm::new(&WORLD).expect("a zero page"));
    Ok(())
}

/// Makes this CPU translate through the kernel's own table.
///
/// # Safety
/// The CPU uses nothing below the kernel's half.
pub unsafe fn load_kernel_table() {
    // SAFETY: the table is never freed; the caller's promise.
    unsafe { Machine.load_root(table().root(), false) };
}

/// Gives a CPU that is online its arrays.
pub fn cpu_online(cpu: CpuId) {
    HEAP.memory()
        .cpu_online(cpu)
        .expect("memory for a CPU's arrays");
}

/// Free frames, counted anew, with every CPU's arrays of objects and of frames emptied, and frames of objects added.
///
/// What is missing from this number belongs to somebody.
pub fn free_frames() -> u64 {
    areas().purge();
    for _ in 0..2 {
        // Arrays are emptied by the CPU they belong to; what one gives back may fill another's.
        smp::each(|_| {
            HEAP.memory().slab().shrink();
            frames().drain_local();
        });
    }
    TableCache::shrink(&&MACHINE, usize::MAX);
    smp::each(|_| {
        frames().drain_local();
    });
    let count = frames().recount();
    count.free + count.cached
}

/// Frames that hold objects.
pub fn object_frames() -> u64 {
    let objects = HEAP.memory().slab().totals();
    objects.slab_frames + objects.overhead_frames
}

/// The pages of a range of bytes.
pub fn pages(start: u64, bytes: u64) -> PageRange {
    let first = Page::starting_at(VirtAddr::new(start)).expect("a page's address");
    PageRange::with_count(first, bytes >> 12).expect("not empty")
}

/// Leaves of 1 GiB (where the CPU has them), 2 MiB and 4 KiB.
const LEAVES: [Order; 3] = [
    Order::new(18).expect("an order"),
    Order::new(9).expect("an order"),
    Order::ZERO,
];

/// Maps physical memory from `from` on at `linear`, with the largest leaves that fit.
fn window(table: &Table, linear: u64, from: u64, bytes: u64, rights: Rights) {
    let leaves = &LEAVES[usize::from(!layout::has_gigabyte_leaves())..];
    let mut done = 0;
    while done < bytes {
        let fits = |order: &Order| {
            let leaf = order.frames() << 12;
            [from + done, linear + done]
                .iter()
                .all(|at| at.is_multiple_of(leaf))
                && bytes - done >= leaf
        };
        let order = leaves.iter().copied().find(fits).expect("whole pages");
        let range = pages(linear + done, order.frames() << 12);
        let frame = Frame::containing(PhysAddr::new(from + done));
        let mut cursor = table.cursor(range).expect("canonical");
        let leaf = |_, _| Some(KernelPage::borrowed(DeviceFrame::new(frame, order)?));
        let attributes = Attributes::new(rights | Rights::GLOBAL).accessed().dirty();
        cursor
            .map_range(range, order, attributes, leaf)
            .expect("room for tables");
        done += order.frames() << 12;
    }
}

/// Makes the kernel's table: all usable memory at the direct map, and the image with the rights of its parts.
fn kernel_table(map: &Boot) -> Table {
    let levels = if layout::five_levels() { 5 } else { 4 };
    let table = Table::with_levels(&MACHINE, levels).expect("a frame for the root");
    let mut end = 0; // of what is mapped
    for entry in map.usable() {
        let from = (entry.base & !0x1f_ffff).max(end);
        let to = (entry.base + entry.length).next_multiple_of(0x20_0000);
        if from < to {
            window(&table, DIRECT + from, from, to - from, Rights::KERNEL_DATA);
            end = to;
        }
    }
    let [text, constants, data, end] = layout::image();
    let part = |from: u64, to: u64, rights| {
        window(&table, from, from - IMAGE_BASE, to - from, rights);
    };
    part(text, constants, Rights::READ | Rights::EXECUTE);
    part(constants, data, Rights::READ);
    part(data, end, Rights::KERNEL_DATA);
    let half = Page::starting_at(VirtAddr::new(DIRECT)).expect("aligned");
    table.lend_from(half).expect("tables for the shared half");
    table
}

/// Makes an address space that shares the kernel's half.
pub fn new_space() -> Option<Space> {
    let half = Page::starting_at(VirtAddr::new(DIRECT)).expect("aligned");
    AddressSpace::with_kernel(mm(), Layout::x86_64(), table(), half).ok()
}
