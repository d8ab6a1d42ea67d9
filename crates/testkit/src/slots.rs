//! A frame table for a test: directory and slots from the host's heap.
//!
//! Works in every build: where atomics are `core`'s, the slots are memory that the table zeroes at first use; under loom
//! they are constructed, four to a section.

use std::fmt;
use std::ops::Deref;
use std::ptr::NonNull;

use kmem_hal::{FrameRange, FrameSlot, FrameTable, SECTION_FRAMES, Section};

/// A [`FrameTable`] that covers some frames and lives as long as this value.
///
/// # Examples
///
/// ```
/// use kmem_hal::{FrameTag, Order};
/// use kmem_testkit::{Arena, SlotArena};
///
/// let arena = Arena::new(16);
/// let slots = SlotArena::new(arena.range());
/// let slot = slots.slot(arena.frame(3)).unwrap();
/// assert_eq!(slot.tag(), FrameTag::Free);
/// slot.claim(FrameTag::Kernel, Order::ZERO);
/// ```
pub struct SlotArena {
    table: FrameTable,
    // Both are reached by `table` through pointers, and freed after it.
    _directory: Box<[Section]>,
    _sections: Vec<SectionMemory>,
}

#[cfg(not(loom))]
type SectionMemory = HostSection;
#[cfg(loom)]
type SectionMemory = Box<[FrameSlot]>;

impl SlotArena {
    /// A table that covers `frames` and nothing else, but whole sections of it.
    #[must_use]
    pub fn new(frames: FrameRange) -> Self {
        let mut sections = Vec::new();
        let mut directory: Vec<Section> = Vec::new();
        if let Some(last) = frames.last() {
            let first = frames.first().number() / SECTION_FRAMES;
            for index in 0..FrameTable::sections_for(last) {
                let section = Section::absent();
                if index >= first {
                    let memory = new_section();
                    // SAFETY: a section's slots (or their bytes), used for nothing else, freed after the table.
                    unsafe { section.set_memory(pointer(&memory)) };
                    sections.push(memory);
                }
                directory.push(section);
            }
        }
        let directory = directory.into_boxed_slice();
        let table = FrameTable::new();
        let reference: *const [Section] = &*directory;
        // SAFETY: the box does not move its content, and outlives every reference that the table gives out, since
        // those borrow from `self`.
        table.init(unsafe { &*reference });
        Self {
            table,
            _directory: directory,
            _sections: sections,
        }
    }
}

#[cfg(loom)]
fn new_section() -> SectionMemory {
    (0..SECTION_FRAMES)
        .map(|_| {
            let slot = FrameSlot::new();
            // A slot that is used before the table made it free says so.
            slot.claim(kmem_hal::FrameTag::Reserved, kmem_hal::Order::ZERO);
            slot
        })
        .collect()
}

#[cfg(loom)]
fn pointer(memory: &SectionMemory) -> NonNull<u8> {
    NonNull::from(&**memory).cast()
}

#[cfg(not(loom))]
fn new_section() -> SectionMemory {
    HostSection::new()
}

#[cfg(not(loom))]
fn pointer(memory: &SectionMemory) -> NonNull<u8> {
    memory.memory
}

/// The bytes of a section's slots, full of junk: the table must zero them.
#[cfg(not(loom))]
struct HostSection {
    memory: NonNull<u8>,
}

#[cfg(not(loom))]
impl HostSection {
    const LAYOUT: std::alloc::Layout = match std::alloc::Layout::from_size_align(
        FrameTable::SECTION_BYTES,
        align_of::<FrameSlot>(),
    ) {
        Ok(layout) => layout,
        Err(_) => panic!("a section fits in memory"),
    };

    fn new() -> Self {
        // SAFETY: the layout is not empty.
        let memory = unsafe { std::alloc::alloc(Self::LAYOUT) };
        let Some(memory) = NonNull::new(memory) else {
            std::alloc::handle_alloc_error(Self::LAYOUT);
        };
        // SAFETY: fresh memory of this layout.
        unsafe {
            memory
                .as_ptr()
                .write_bytes(crate::arena::JUNK_GIVEN, Self::LAYOUT.size());
        }
        Self { memory }
    }
}

#[cfg(not(loom))]
impl Drop for HostSection {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `new`.
        unsafe { std::alloc::dealloc(self.memory.as_ptr(), Self::LAYOUT) }
    }
}

// SAFETY: the memory is reached through the table's atomics only.
#[cfg(not(loom))]
unsafe impl Send for HostSection {}
// SAFETY: as above.
#[cfg(not(loom))]
unsafe impl Sync for HostSection {}

impl Deref for SlotArena {
    type Target = FrameTable;

    fn deref(&self) -> &FrameTable {
        &self.table
    }
}

impl fmt::Debug for SlotArena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.table, f)
    }
}
