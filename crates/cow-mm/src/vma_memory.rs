//! The memory of one VMA: the VMA, its lock, and the stock of those that no mapping uses now.
//!
//! ```text
//!   allocator ──> stock ──> in the tree ── write-locked, taken out ──> stock ── too many: grace period ──> allocator
//! ```
//!
//! A fault finds a VMA without a lock, and may still look at its lock word when the VMA is gone already. So memory goes from the stock back to
//! the allocator only after a grace period. To become another VMA of the same space it waits for nothing: its lock lives on, and the
//! fault, once it holds the lock, looks whether the page is in the VMA.
//!
//! Invariants
//! - `M1`: a lock is made once, when its memory comes from the allocator, and lives until the memory goes back.
//! - `M2`: the VMA is written under its write lock, or while no tree leads to it.

use core::cell::Cell;
use core::fmt;
use core::ptr::NonNull;

use kmem_hal::sync::UnsafeCell;
use kmem_hal::{AllocError, Grace, ObjectAlloc};
use kmem_vma_tree::VmaLock;

use crate::vma::Vma;

/// Memory for one VMA, from [`Env::Vmas`](crate::Env::Vmas): opaque to its allocator.
pub struct VmaMemory {
    lock: VmaLock,
    vma: UnsafeCell<Option<Vma>>,
    /// The next one in the stock.
    next: Cell<Option<NonNull<Self>>>,
}

// SAFETY: the lock is shareable; the others belong to the space's writer, or are read under the lock (`M2`).
unsafe impl Send for VmaMemory {}
// SAFETY: as above.
unsafe impl Sync for VmaMemory {}

impl VmaMemory {
    /// The lock.
    ///
    /// # Safety
    ///
    /// The memory stays a VMA's for `'v` (`M1`).
    pub(crate) unsafe fn lock_of<'v>(memory: NonNull<Self>) -> &'v VmaLock {
        // SAFETY: the caller's promise; `M1`.
        unsafe { &(*memory.as_ptr()).lock }
    }

    /// A copy of the VMA.
    ///
    /// # Safety
    ///
    /// The memory is a VMA's that a tree leads to; the caller holds its lock, or the lock of its space.
    pub(crate) unsafe fn read(memory: NonNull<Self>) -> Option<Vma> {
        // SAFETY: `M2`: nobody writes meanwhile.
        unsafe { (*memory.as_ptr()).vma.with(|vma| *vma) }
    }

    /// The VMA where it lies.
    ///
    /// # Safety
    ///
    /// As [`read`](Self::read), and the caller holds the lock for `'v`.
    pub(crate) unsafe fn get<'v>(memory: NonNull<Self>) -> Option<&'v Vma> {
        // SAFETY: `M2`: nobody writes while the lock is held.
        unsafe { (*memory.as_ptr()).vma.with(|vma| (*vma).as_ref()) }
    }

    /// Says that the memory is no VMA's any more.
    ///
    /// # Safety
    ///
    /// As [`write`](Self::write).
    pub(crate) unsafe fn clear(memory: NonNull<Self>) {
        // SAFETY: `M2`: nobody else looks.
        unsafe { (*memory.as_ptr()).vma.with_mut(|place| *place = None) }
    }

    /// Writes the VMA.
    ///
    /// # Safety
    ///
    /// `M2`; the caller is the space's writer.
    pub(crate) unsafe fn write(memory: NonNull<Self>, vma: Vma) {
        // SAFETY: `M2`: nobody else looks.
        unsafe { (*memory.as_ptr()).vma.with_mut(|place| *place = Some(vma)) }
    }
}

impl fmt::Debug for VmaMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VmaMemory(..)")
    }
}

/// Memory that no mapping of the space uses now.
pub(crate) struct VmaStock {
    first: Option<NonNull<VmaMemory>>,
    count: usize,
}

/// Above so many, all but [`KEEP`] go back.
const MOST: usize = 32;
/// What stays for the next call.
const KEEP: usize = 4;

impl VmaStock {
    pub const fn new() -> Self {
        Self {
            first: None,
            count: 0,
        }
    }

    /// Sees to it that there are `count` at least.
    pub fn fill(
        &mut self,
        alloc: &impl ObjectAlloc<VmaMemory>,
        count: usize,
    ) -> Result<(), AllocError> {
        while self.count < count {
            let memory = alloc.alloc()?;
            // SAFETY: the allocator gave memory for one, which is nobody else's.
            unsafe {
                memory.as_ptr().write(VmaMemory {
                    lock: VmaLock::new(),
                    vma: UnsafeCell::new(None),
                    next: Cell::new(None),
                });
            }
            self.put(memory);
        }
        Ok(())
    }

    pub fn take(&mut self) -> Option<NonNull<VmaMemory>> {
        let memory = self.first?;
        // SAFETY: what is in the stock is this stock's (`M1`).
        self.first = unsafe { memory.as_ref() }.next.take();
        self.count -= 1;
        Some(memory)
    }

    /// Takes the memory of a VMA that was taken out of the tree under its write lock, or never was in it.
    pub fn put(&mut self, memory: NonNull<VmaMemory>) {
        // SAFETY: the caller gives it up.
        unsafe { memory.as_ref() }.next.set(self.first);
        self.first = Some(memory);
        self.count += 1;
    }

    /// Gives back what is too much, after a grace period.
    pub fn trim(&mut self, alloc: &impl ObjectAlloc<VmaMemory>, grace: &impl Grace) {
        if self.count > MOST {
            grace.synchronize();
            self.trim_to(alloc, KEEP);
        }
    }

    /// Gives back all but `keep`. Nobody looks at their locks any more.
    pub fn trim_to(&mut self, alloc: &impl ObjectAlloc<VmaMemory>, keep: usize) {
        while self.count > keep
            && let Some(memory) = self.take()
        {
            // SAFETY: it came from the allocator, and nobody looks at it; it needs no drop.
            unsafe { alloc.free(memory) };
        }
    }
}
