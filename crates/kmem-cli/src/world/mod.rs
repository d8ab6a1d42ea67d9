//! The machine and the memory manager on it, put together once and used by all commands.
//!
//! ```text
//!   MemoryMap ──> Machine, BootMap
//!     early       frame table carved out of the boot map, section by section, near the memory that it describes
//!     frames      zones take over what is left                      (buddy)
//!     slabs       object caches on frames                           (slab)
//!     tables      the kernel's linear map of all memory             (paging)
//!     areas       the kernel's other mappings                       (vmalloc)
//!     processes   what all address spaces share                     (cow-mm)
//! ```
//! Each step is a function that boot calls and times by itself; [`World::new`] calls all of them. Everything lives as long
//! as the program, as in a kernel.
//!
//! Invariants
//! - I1: frames pass through [`Counted`] and through the machine's own watch, so that each is counted by
//!   someone who is not the allocator, and a use after free is seen.
//! - I2: every CPU has a root loaded at all times: the kernel's, or that of a process that lives.

pub mod counted;
pub mod process;
pub mod provider;
pub mod types;

use crate::boot::machine;
use crate::input::InputError;
use crate::input::map::MemoryMap;
use counted::Counted;
use kmem_buddy::{BootMap, Config, EarlyAllocator, Reservation};
use kmem_hal::{
    DeviceFrame, Frame, FrameRange, FrameTable, Mmu, Order, PAGE_SIZE, Page, PageRange, PhysAddr,
    PhysMap, Root, SECTION_FRAMES, Section, VirtAddr,
};
use kmem_mock_x86::Tracked;
use kmem_paging::{Rights, TableCache};
use kmem_slab::Cache;
use kmem_vmalloc::{KernelLayout, KernelPage};
use std::ptr::NonNull;
use types::{
    Env, Frames, Grace, GraceArea, KernelAreas, KernelTable, Mach, PagingParts, SharedMm,
    SlabParts, Slabs, Source,
};

/// Where the kernel maps all of physical memory (Linux's `PAGE_OFFSET` with four levels).
pub const LINEAR: u64 = 0xffff_8880_0000_0000;
/// Where the image of the kernel lies, in bytes, as a boot loader would say.
pub const KERNEL_IMAGE: (u64, u64) = (1 << 20, 2 << 20);

/// Areas that are more than a tree holds without a node.
const WARM_UP: usize = 4;

/// What the early allocator did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EarlyFigures {
    /// Sections of 128 MiB that have memory.
    pub sections: u64,
    /// Bytes that the frame table takes.
    pub table_bytes: u64,
    /// Bytes of the directory of sections.
    pub directory_bytes: u64,
}

/// A machine that is up.
pub struct World {
    machine: Mach,
    boot_map: Box<BootMap>,
    table: &'static FrameTable,
    frames: &'static Frames,
    source: &'static Source,
    slabs: &'static Slabs,
    paging: &'static PagingParts,
    grace: &'static Grace,
    kernel: &'static KernelTable,
    areas: &'static KernelAreas,
    env: &'static Env,
    mm: &'static SharedMm,
}

impl World {
    /// Brings a machine up without a word.
    ///
    /// # Errors
    /// A map on which the stack cannot come up, by the step that failed.
    pub fn new(map: &MemoryMap, cpus: usize) -> Result<&'static Self, InputError> {
        let machine = forever(machine::build(map, cpus)?);
        let mut boot_map = machine::boot_map(map)?;
        let refuse = |step: &str| {
            let step = step.to_string();
            move |why: String| {
                map.error(
                    "usable",
                    &crate::output::units::bytes(map.usable_bytes()),
                    format!("{step}: {why}"),
                )
            }
        };
        let (table, _) = early(machine, &mut boot_map).map_err(refuse("early allocator"))?;
        let frames = frames(machine, &mut boot_map).map_err(refuse("zones"))?;
        let source: &'static Source = forever(Counted::new(Tracked::new(machine, frames)));
        let slabs = slabs(machine, source, table).map_err(refuse("object caches"))?;
        let (paging, grace) = paging(machine, source, table);
        let kernel =
            kernel_table(machine, paging, &boot_map).map_err(refuse("kernel page tables"))?;
        let areas = areas(kernel, slabs);
        let (env, mm) = processes(slabs, paging).map_err(refuse("processes"))?;
        Ok(forever(Self {
            machine,
            boot_map,
            table,
            frames,
            source,
            slabs,
            paging,
            grace,
            kernel,
            areas,
            env,
            mm,
        }))
    }

    /// Puts a world together from parts that were made one by one.
    #[allow(clippy::too_many_arguments)] // one part each
    pub fn of_parts(
        machine: Mach,
        boot_map: Box<BootMap>,
        table: &'static FrameTable,
        frames: &'static Frames,
        source: &'static Source,
        slabs: &'static Slabs,
        (paging, grace): (&'static PagingParts, &'static Grace),
        (kernel, areas): (&'static KernelTable, &'static KernelAreas),
        (env, mm): (&'static Env, &'static SharedMm),
    ) -> &'static Self {
        forever(Self {
            machine,
            boot_map,
            table,
            frames,
            source,
            slabs,
            paging,
            grace,
            kernel,
            areas,
            env,
            mm,
        })
    }

    /// The machine.
    pub fn machine(&self) -> Mach {
        self.machine
    }

    /// The boot map, as the early allocator and the zones left it.
    pub fn boot_map(&self) -> &BootMap {
        &self.boot_map
    }

    /// The slots of all frames.
    pub fn table(&self) -> &'static FrameTable {
        self.table
    }

    /// The page-frame allocator.
    pub fn frames(&self) -> &'static Frames {
        self.frames
    }

    /// The allocator as its callers see it, with the books.
    pub fn source(&self) -> &'static Source {
        self.source
    }

    /// The object caches.
    pub fn slabs(&self) -> &'static Slabs {
        self.slabs
    }

    /// The kernel's page tables.
    pub fn kernel(&self) -> &'static KernelTable {
        self.kernel
    }

    /// Kernel virtual mappings.
    pub fn areas(&self) -> &'static KernelAreas {
        self.areas
    }

    /// The kernel's root.
    pub fn kernel_root(&self) -> Root {
        self.kernel.root()
    }

    /// What address spaces stand on.
    pub fn env(&self) -> &'static Env {
        self.env
    }

    /// What address spaces share.
    pub fn mm(&self) -> &'static SharedMm {
        self.mm
    }

    /// Frames of emptied page tables that are kept for the next table.
    pub fn cached_tables(&self) -> u64 {
        use kmem_paging::Env as _;
        self.paging.cache().length() as u64
    }

    /// What the machine has seen go wrong since it was asked last, a story each.
    pub fn violations(&self) -> Vec<String> {
        self.machine
            .take_violations()
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    /// Gives back what is kept only to be fast: empty slabs, recycled tables, frames in CPUs' arrays.
    ///
    /// What is still out afterwards is in use by somebody.
    pub fn settle(&self) {
        use kmem_hal::Grace as _;
        self.grace.synchronize();
        TableCache::shrink(&self.paging, usize::MAX);
        self.grace.synchronize();
        // Each CPU empties its own arrays, then what lies in the depots can go.
        for _ in 0..2 {
            for cpu in 0..self.machine.cpu_count() {
                self.machine.on_cpu(cpu, || {
                    self.slabs.drain_local();
                    self.slabs.shrink();
                });
            }
        }
        self.frames.drain_all();
    }
}

/// Puts a value where it stays for the life of the program.
pub fn forever<T>(value: T) -> &'static T {
    Box::leak(Box::new(value))
}

/// Reserves the kernel's image and carves the frame table.
///
/// # Errors
/// Where memory does not suffice, in words.
pub fn early(
    machine: Mach,
    boot_map: &mut BootMap,
) -> Result<(&'static FrameTable, EarlyFigures), String> {
    let (base, len) = KERNEL_IMAGE;
    boot_map
        .reserve(PhysAddr::new(base), len, Reservation::KernelImage)
        .map_err(|e| e.to_string())?;
    let mut last = 0;
    // Sections that have memory, and where the memory of their node ends below which their slots are put.
    let mut wanted: Vec<(u64, u64)> = Vec::new();
    let by_node: Vec<(u16, FrameRange)> = boot_map
        .present_by_node()
        .map(|(n, r)| (n.get(), r))
        .collect();
    for (node, range) in &by_node {
        let end = range.first().number() + range.count();
        last = last.max(end - 1);
        let limit = by_node
            .iter()
            .filter(|(n, _)| n == node)
            .map(|(_, r)| r.first().number() + r.count())
            .max()
            .unwrap_or(end);
        for section in range.first().number() / SECTION_FRAMES..end.div_ceil(SECTION_FRAMES) {
            if wanted.last().is_none_or(|w| w.0 != section) {
                wanted.push((section, limit));
            }
        }
    }
    let mut figures = EarlyFigures {
        sections: wanted.len() as u64,
        ..EarlyFigures::default()
    };
    let memory = &machine;
    let count = FrameTable::sections_for(Frame::from_number(last));
    let directory: &'static [Section] = {
        let count = usize::try_from(count).map_err(|e| e.to_string())?;
        figures.directory_bytes = (count * size_of::<Section>()) as u64;
        // SAFETY: X1: the machine's memory is this world's alone, and one map describes it.
        unsafe { EarlyAllocator::new(boot_map, memory) }
            .alloc_slice(count, |_| Section::absent())
            .map_err(|e| e.to_string())?
    };
    let bytes = FrameTable::SECTION_BYTES as u64;
    for (section, limit) in wanted {
        // SAFETY: X1: the machine's memory is this world's alone, and one map describes it.
        let near = unsafe { EarlyAllocator::new(boot_map, memory) }
            .below(PhysAddr::new(limit * PAGE_SIZE))
            .alloc(bytes, PAGE_SIZE);
        let at = near
            // SAFETY: X1: the machine's memory is this world's alone, and one map describes it.
            .or_else(|_| unsafe { EarlyAllocator::new(boot_map, memory) }.alloc(bytes, PAGE_SIZE))
            .map_err(|e| format!("{bytes} bytes of frame slots for section {section}: {e}"))?;
        let Some(slots) = NonNull::new(machine.to_ptr(at)) else {
            return Err(format!("no pointer to {at}"));
        };
        // SAFETY: the early allocator gave the bytes for ever and to nobody else; they are page-aligned.
        unsafe { directory[section as usize].set_memory(slots) };
        figures.table_bytes += bytes;
    }
    let table = forever(FrameTable::new());
    table.init(directory);
    Ok((table, figures))
}

/// Starts the page-frame allocator on what the boot map has free.
///
/// # Errors
/// Why it does not start, in words.
pub fn frames(machine: Mach, boot_map: &mut BootMap) -> Result<&'static Frames, String> {
    let frames = forever(Frames::with(
        machine,
        machine,
        machine,
        kmem_hal::NoPressure,
    ));
    // SAFETY: X1: the machine's memory is this world's alone, and one map describes it.
    unsafe { frames.init(boot_map, &Config::new()) }.map_err(|e| e.to_string())?;
    Ok(frames)
}

/// Starts the object caches.
///
/// # Errors
/// Why they do not start, in words.
pub fn slabs(
    machine: Mach,
    source: &'static Source,
    table: &'static FrameTable,
) -> Result<&'static Slabs, String> {
    let slabs = forever(Slabs::new());
    // SAFETY: the source gives frames of this machine to one owner each, the machine reaches all of them at page-aligned
    // pointers, and the table covers all of its memory.
    let parts: SlabParts = unsafe { kmem_slab::Parts::new(source, machine, machine, table) };
    slabs.init(parts).map_err(|e| e.to_string())?;
    Ok(slabs)
}

/// Puts together what page tables stand on.
pub fn paging(
    machine: Mach,
    source: &'static Source,
    table: &'static FrameTable,
) -> (&'static PagingParts, &'static Grace) {
    let grace: &'static Grace = forever(Grace::new(machine));
    let areas: Vec<GraceArea> = (0..machine.cpu_count())
        .map(|_| GraceArea::default())
        .collect();
    grace.init(areas.leak());
    // SAFETY: the table is the machine's only one and covers all its frames; the machine is the MMU that loads the roots, and
    // it walks the memory that it maps.
    let parts = unsafe { PagingParts::new(machine, source, machine, grace, machine, table) };
    (forever(parts), grace)
}

/// Maps all of memory at [`LINEAR`] with the largest leaves that fit, and loads the root on every CPU.
///
/// # Errors
/// Why a range could not be mapped, in words.
pub fn kernel_table(
    machine: Mach,
    paging: &'static PagingParts,
    boot_map: &BootMap,
) -> Result<&'static KernelTable, String> {
    let table = forever(KernelTable::new(paging).map_err(|e| e.to_string())?);
    for range in boot_map.present() {
        for (at, order) in leaves(range) {
            let page = Page::containing(VirtAddr::new(LINEAR + at * PAGE_SIZE));
            let frame = Order::new(order).and_then(|o| DeviceFrame::new(Frame::from_number(at), o));
            let (Some(frame), Some(pages)) = (frame, PageRange::with_count(page, 1 << order))
            else {
                return Err(format!("no leaf of order {order} at frame {at:#x}"));
            };
            let mut cursor = table.cursor(pages).map_err(|e| e.to_string())?;
            cursor
                .map(page, KernelPage::borrowed(frame), Rights::KERNEL_DATA)
                .map_err(|(e, _)| format!("frame {at:#x}: {e}"))?;
        }
    }
    machine.exempt(
        LINEAR,
        LINEAR + machine.memory().frame_limit() * PAGE_SIZE - 1,
    );
    for cpu in 0..machine.cpu_count() {
        // SAFETY: the tables live as long as the program and map all memory.
        machine.on_cpu(cpu, || unsafe { machine.load_root(table.root(), false) });
    }
    Ok(table)
}

/// Opens the window in which the kernel maps what it wants (`VMALLOC_START`).
pub fn areas(kernel: &'static KernelTable, slabs: &'static Slabs) -> &'static KernelAreas {
    let nodes = Cache::new_stable(slabs, "vmap_node");
    let window = KernelLayout::x86_64().vmalloc;
    let areas = forever(KernelAreas::new(kernel, window, nodes));
    // The tree of areas keeps a spare node once it has had one; it gets it here, so that later uses leave nothing new.
    let first: Vec<_> = (0..WARM_UP)
        .filter_map(|_| areas.alloc(PAGE_SIZE).ok())
        .collect();
    for area in first {
        let _ = areas.free(area);
    }
    areas.purge();
    areas
}

/// Cuts a range of frames into leaves of 1 GiB, 2 MiB and 4 KiB, as alignment allows: (first frame, order).
pub fn leaves(range: FrameRange) -> impl Iterator<Item = (u64, u8)> {
    let (mut at, end) = (
        range.first().number(),
        range.first().number() + range.count(),
    );
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let order = [18u8, 9]
            .into_iter()
            .find(|o| at % (1 << o) == 0 && at + (1 << o) <= end)
            .unwrap_or(0);
        let leaf = (at, order);
        at += 1 << order;
        Some(leaf)
    })
}

/// Makes the caches of address spaces and what all of them share.
///
/// # Errors
/// Out of memory, in words.
pub fn processes(
    slabs: &'static Slabs,
    paging: &'static PagingParts,
) -> Result<(&'static Env, &'static SharedMm), String> {
    let env = forever(Env {
        paging,
        nodes: Cache::new_stable(slabs, "vma_node"),
        vmas: Cache::new(slabs, "vm_area_struct"),
        objects: Cache::new(slabs, "address_space"),
        spaces: Cache::new(slabs, "mm_struct"),
    });
    let mm = forever(SharedMm::new(env).map_err(|e| e.to_string())?);
    Ok((env, mm))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaves_are_as_large_as_they_can_be() {
        let range = FrameRange::from_numbers(0x1ff, 0x400 + 1).unwrap();
        assert_eq!(
            leaves(range).collect::<Vec<_>>(),
            [(0x1ff, 0), (0x200, 9), (0x400, 0)]
        );
        let gib = FrameRange::from_numbers(1 << 18, 3 << 18).unwrap();
        assert_eq!(
            leaves(gib).collect::<Vec<_>>(),
            [(1 << 18, 18), (2 << 18, 18)]
        );
    }
}
