//! What the trees hold: one word, a VMA's address or a frame's number.

use core::ptr::NonNull;

use kmem_hal::Frame;

use kmem_vma_tree::{Lockable, Value, VmaLock};

use crate::absent::SwapEntry;
use crate::vma_memory::VmaMemory;

/// Set in a word that says a place in swap; frames' numbers have no such bit.
const SWAPPED: u64 = 1 << 63;

/// A word in a tree. Which of the two it is the tree's owner knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Handle(u64);

impl Handle {
    /// A VMA's address.
    pub(crate) fn of_vma(vma: NonNull<VmaMemory>) -> Self {
        Self(vma.as_ptr().expose_provenance() as u64)
    }

    /// The VMA that the word is the address of.
    pub(crate) fn vma(self) -> Option<NonNull<VmaMemory>> {
        NonNull::new(core::ptr::with_exposed_provenance_mut(self.0 as usize))
    }

    /// A frame's number.
    pub(crate) fn of_frame(frame: Frame) -> Self {
        Self(frame.number())
    }

    /// A page's place in swap.
    pub(crate) fn of_swap(entry: SwapEntry) -> Self {
        Self(SWAPPED | entry.to_word())
    }

    /// The frame that the word is the number of; `None` where the page is in swap.
    pub(crate) fn frame(self) -> Option<Frame> {
        (self.0 & SWAPPED == 0).then(|| Frame::from_number(self.0))
    }

    /// The place in swap that the word says, if it says one.
    pub(crate) fn swap(self) -> Option<SwapEntry> {
        match self.0 & SWAPPED {
            0 => None,
            _ => SwapEntry::from_word(self.0 & !SWAPPED),
        }
    }
}

impl Value for Handle {
    fn to_word(self) -> u64 {
        self.0
    }

    fn from_word(word: u64) -> Self {
        Self(word)
    }
}

// SAFETY: LV1: a VMA's memory is one until a grace period has passed since it left the tree, and its lock is never made anew;
// LV2: `L3` is kept by `VmaSet` (its `I4`).
unsafe impl Lockable for Handle {
    unsafe fn lock<'v>(self) -> &'v VmaLock {
        let Some(vma) = self.vma() else {
            unreachable!("a tree of VMAs holds their addresses")
        };
        // SAFETY: LV1, and the caller keeps the memory for 'v.
        unsafe { VmaMemory::lock_of(vma) }
    }
}
