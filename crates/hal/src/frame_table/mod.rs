//! One slot per frame: the `mem_map`.
//!
//! A slot says what a frame is and keeps the words its owner needs. It is 32 bytes, half of Linux's `struct page`, and
//! its first word is common to all owners; decision record 001 has the layout bit by bit.
//!
//! ```text
//!  word 0   63         32 31      16 15    8 7     0
//!           [   count    ][  flags  ][ order ][ tag  ]     all zero = free
//!  word 1   owner    what the frame belongs to: a cache, an anonymous or file object, a table's owner list
//!  word 2   index    where in it: a page offset, a table's level and live count, free bits of a slab
//!  word 3   links    next and previous frame of a list, 32 bits each, as `number + 1` (0 = none)
//!
//!  typed views: TableSlot, SlabSlot, UserSlot; a block's other frames say Tail and repeat its order
//!
//!  frame number ── >> 15 ──> Section ──> 32768 slots of 32 bytes (1 MiB of slots for 128 MiB of memory)
//! ```
//!
//! Invariants
//! - `I1`: a slot whose word 0 is zero belongs to a free frame, and its other words mean nothing.
//! - `I2`: `tag` changes only between `Free` and an owner's tag, by whoever owns the frame.
//! - `I3`: a section's slots are zeroed once, before any reference to one of them exists.
//! - `I4`: links reach 2^32 - 1 frames (16 TiB); frames above have slots but cannot be on lists.
//!
//! Costs: a lookup is one shift, one load of the section word, one add. Zeroing a section takes a 1 MiB memset at its
//! first use, so that booting a terabyte does not.
//!
//! Buddy does not need the table. Tables that are not needed cost nothing.

mod slab;
mod slot;
mod table;
mod user;

use core::fmt;
use core::ptr;

pub use slab::SlabSlot;
pub use slot::{FrameSlot, FrameTag, SlotFlags, SlotGuard};
pub use table::{TableOwner, TableSlot};
pub use user::{CountError, UserSlot};

use crate::frame::{Frame, FrameRange, Order};
use crate::sync::{AtomicPtr, AtomicUsize, Ordering, spin_loop};

/// Frames in a section: 128 MiB.
#[cfg(not(loom))]
pub const SECTION_FRAMES: u64 = 1 << 15;
/// Frames in a section: 16 KiB, since a model constructs every slot.
#[cfg(loom)]
pub const SECTION_FRAMES: u64 = 4;

/// The directory entry of 128 MiB of frames: where its slots are, and whether they are zeroed yet.
///
/// Low two bits of the word: 0 absent, 1 carved and not zeroed, 2 being zeroed, 3 ready.
#[derive(Debug)]
#[repr(transparent)]
pub struct Section {
    word: AtomicUsize,
}

const STATE: usize = 3;
const ABSENT: usize = 0;
const CARVED: usize = 1;
const ZEROING: usize = 2;
const READY: usize = 3;

impl Section {
    crate::const_new! {
        /// A section without slots: a hole, or memory that the table does not cover.
        pub fn absent() -> Self {
            Self { word: AtomicUsize::new(ABSENT) }
        }
    }

    /// Gives the section slots that are constructed already. All of them say "free".
    ///
    /// # Panics
    ///
    /// If there are not exactly [`SECTION_FRAMES`] slots.
    pub fn set_ready(&self, slots: &'static [FrameSlot]) {
        assert_eq!(
            slots.len() as u64,
            SECTION_FRAMES,
            "a section has SECTION_FRAMES slots"
        );
        self.word.store(
            slots.as_ptr().expose_provenance() | READY,
            Ordering::Release,
        );
    }

    /// Gives the section memory for its slots, which is zeroed at the first use.
    ///
    /// # Safety
    ///
    /// `memory` is valid for reads and writes of [`FrameTable::SECTION_BYTES`] bytes for ever, aligned to 32 bytes, and
    /// used for nothing else. Under loom it is an array of constructed slots, whatever they say.
    pub unsafe fn set_memory(&self, memory: ptr::NonNull<u8>) {
        self.word.store(
            memory.as_ptr().expose_provenance() | CARVED,
            Ordering::Release,
        );
    }

    #[inline]
    fn slots(&self) -> Option<*const FrameSlot> {
        let word = self.word.load(Ordering::Acquire);
        if word & STATE == READY {
            return Some(ptr::with_exposed_provenance(word & !STATE));
        }
        self.first_use(word)
    }

    #[cold]
    fn first_use(&self, mut word: usize) -> Option<*const FrameSlot> {
        loop {
            match word & STATE {
                ABSENT => return None,
                READY => return Some(ptr::with_exposed_provenance(word & !STATE)),
                CARVED => {
                    let zeroing = word & !STATE | ZEROING;
                    match self.word.compare_exchange(
                        word,
                        zeroing,
                        Ordering::Acquire,
                        Ordering::Acquire,
                    ) {
                        Ok(_) => {
                            let memory: *mut FrameSlot =
                                ptr::with_exposed_provenance_mut(word & !STATE);
                            // SAFETY: `set_memory` promised the memory; only the winner of the exchange gets here,
                            // and nobody has a reference yet (`I3`).
                            unsafe { clear(memory) };
                            self.word.store(word & !STATE | READY, Ordering::Release);
                            return Some(memory);
                        }
                        Err(found) => word = found,
                    }
                }
                // Another CPU zeroes a mebibyte: some tens of microseconds, once. An interrupt on the zeroing CPU
                // must not wait for what it interrupted; boot code therefore touches a section before interrupts use it.
                _ => {
                    spin_loop();
                    word = self.word.load(Ordering::Acquire);
                }
            }
        }
    }
}

/// Makes a section's slots free.
///
/// # Safety
///
/// `memory` holds a section's slots, to which nobody has a reference.
#[cfg(not(loom))]
unsafe fn clear(memory: *mut FrameSlot) {
    // SAFETY: by contract. All-zero is a valid slot (`I1`).
    unsafe { memory.write_bytes(0, SECTION_FRAMES as usize) }
}

/// Makes a section's slots free.
///
/// # Safety
///
/// `memory` holds a section's constructed slots.
#[cfg(loom)]
unsafe fn clear(memory: *mut FrameSlot) {
    for index in 0..SECTION_FRAMES as usize {
        // SAFETY: by contract.
        unsafe { &*memory.add(index) }.clear();
    }
}

/// The slots of all frames, by section.
///
/// Const-constructible and empty until [`init`](Self::init).
pub struct FrameTable {
    directory: AtomicPtr<Section>,
    sections: AtomicUsize,
}

impl FrameTable {
    /// Bytes of slots for one section.
    pub const SECTION_BYTES: usize = SECTION_FRAMES as usize * size_of::<FrameSlot>();

    crate::const_new! {
        /// A table that covers no frame yet.
        pub fn new() -> Self {
            Self { directory: AtomicPtr::new(ptr::null_mut()), sections: AtomicUsize::new(0) }
        }
    }

    /// Sections needed to cover frames up to and including `last`.
    #[must_use]
    pub const fn sections_for(last: Frame) -> u64 {
        last.number() / SECTION_FRAMES + 1
    }

    /// Gives the table its directory: entry `i` covers frames from `i * SECTION_FRAMES`. Answers whether it has it: only the first call has an effect.
    ///
    /// Called once, at boot.
    pub fn init(&self, directory: &'static [Section]) -> bool {
        let first = self
            .directory
            .compare_exchange(
                ptr::null_mut(),
                directory.as_ptr().cast_mut(),
                Ordering::Relaxed,
                Ordering::Relaxed,
            )
            .is_ok();
        if first {
            self.sections.store(directory.len(), Ordering::Release);
        }
        first
    }

    /// The directory, to fill in more sections when memory is added.
    #[must_use]
    #[inline]
    pub fn directory(&self) -> &[Section] {
        let sections = self.sections.load(Ordering::Acquire);
        if sections == 0 {
            return &[];
        }
        let directory = self.directory.load(Ordering::Relaxed);
        // SAFETY: both words came from one `&'static [Section]`, that of the first call of `init`; the acquire load orders them.
        unsafe { core::slice::from_raw_parts(directory, sections) }
    }

    /// The slot of `frame`; `None` where the table does not cover it.
    #[doc(alias = "pfn_to_page")]
    #[inline]
    #[must_use]
    pub fn slot(&self, frame: Frame) -> Option<&FrameSlot> {
        let section = usize::try_from(frame.number() / SECTION_FRAMES).ok()?;
        let slots = self.directory().get(section)?.slots()?;
        // SAFETY: a ready section has SECTION_FRAMES constructed slots that live for ever (`I3`).
        Some(unsafe { &*slots.add((frame.number() % SECTION_FRAMES) as usize) })
    }

    /// As [`slot`](Self::slot), for walks over all frames: `None` also where no frame of the section was ever used, whose slots are not
    /// zeroed for a look.
    #[inline]
    #[must_use]
    pub fn used_slot(&self, frame: Frame) -> Option<&FrameSlot> {
        let section = usize::try_from(frame.number() / SECTION_FRAMES).ok()?;
        let word = self.directory().get(section)?.word.load(Ordering::Acquire);
        if word & STATE != READY {
            return None;
        }
        self.slot(frame)
    }

    /// The slots around that of `frame`, and the frame of the first of them: for loops over frames that mostly lie together. `None` where the
    /// table does not cover the frame.
    #[inline]
    #[must_use]
    pub fn slots_around(&self, frame: Frame) -> Option<(Frame, &[FrameSlot])> {
        let section = usize::try_from(frame.number() / SECTION_FRAMES).ok()?;
        let slots = self.directory().get(section)?.slots()?;
        let first = Frame::from_number(frame.number() / SECTION_FRAMES * SECTION_FRAMES);
        // SAFETY: as in `slot`.
        let slots = unsafe { core::slice::from_raw_parts(slots, SECTION_FRAMES as usize) };
        Some((first, slots))
    }

    /// The slot of the block that `frame` is part of, and the block's first frame.
    ///
    /// Follows a [`FrameTag::Tail`] to its head; any other frame is its own head.
    #[doc(alias = "compound_head")]
    #[must_use]
    pub fn head(&self, frame: Frame) -> Option<(Frame, &FrameSlot)> {
        let slot = self.slot(frame)?;
        if slot.tag() != FrameTag::Tail {
            return Some((frame, slot));
        }
        let head = frame.align_down(slot.order());
        Some((head, self.slot(head)?))
    }

    /// Makes the frames of a block that the caller owns, after the first, say "tail of a block of `order`".
    ///
    /// Called before the head is claimed, so that whoever sees the head finds the tails. `false`, and nothing is changed,
    /// where the table does not cover the block.
    #[doc(alias = "prep_compound_page")]
    #[must_use]
    pub fn claim_tails(&self, first: Frame, order: Order) -> bool {
        self.each_tail(first, order, |slot| slot.claim(FrameTag::Tail, order))
    }

    /// Makes the frames of a block after the first say "free". `false` where the table does not cover the block.
    #[doc(alias = "destroy_compound_page")]
    pub fn release_tails(&self, first: Frame, order: Order) -> bool {
        self.each_tail(first, order, FrameSlot::release)
    }

    fn each_tail(&self, first: Frame, order: Order, f: impl Fn(&FrameSlot)) -> bool {
        let Some(block) = FrameRange::of_order(first, order) else {
            return false;
        };
        if !self.covers(block) {
            return false;
        }
        for frame in block.iter().skip(1) {
            if let Some(slot) = self.slot(frame) {
                f(slot);
            }
        }
        true
    }

    /// Whether every frame of `range` has a slot.
    #[must_use]
    pub fn covers(&self, range: FrameRange) -> bool {
        let Some(last) = range.last() else {
            return true;
        };
        let first = range.first().number() / SECTION_FRAMES;
        (first..=last.number() / SECTION_FRAMES).all(|section| {
            usize::try_from(section)
                .ok()
                .and_then(|section| self.directory().get(section))
                .is_some_and(|section| section.word.load(Ordering::Acquire) & STATE != ABSENT)
        })
    }
}

impl Default for FrameTable {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for FrameTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "FrameTable({} sections)",
            self.sections.load(Ordering::Relaxed)
        )
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_table_keeps_its_first_directory() {
        static TWO: [Section; 2] = [Section::absent(), Section::absent()];
        static ONE: [Section; 1] = [Section::absent()];
        let table = FrameTable::new();
        assert!(table.directory().is_empty());
        assert!(table.init(&TWO));
        // A reader may have the old length and the new pointer.
        assert!(!table.init(&ONE));
        assert!(ptr::eq(table.directory(), &raw const TWO[..]));
    }
}
