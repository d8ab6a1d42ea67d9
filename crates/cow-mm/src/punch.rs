//! Holes in shared memory: pages that everybody who maps them gives up (`MADV_REMOVE`).
//!
//! ```text
//!   in swap ──> the slot's count goes             in memory ──> out of every table ──> out of the object's tree ──> free
//!                                                                   └─ locked or moved by somebody: filled with zeros where it is
//! ```
//!
//! Whoever pinned a page keeps it, and is alone with it from then on. A fault that found the page before it left the tree is waited for by
//! looking at its reference under the tree's lock: so no table maps what the tree no longer names.
//!
//! Not handled: holes in files, as [`PageProvider`](kmem_hal::PageProvider) has no call for them.
//!
//! Context: no lock of a space held.
//!
//! Source: madvise(2); Linux `mm/truncate.c` (`truncate_inode_folio`).

use kmem_hal::{Frame, PAGE_SIZE, Page};

use crate::env::Env;
use crate::errno::Errno;
use crate::mm::Mm;
use crate::object::FileRef;
use crate::page_cache::{names, set};
use crate::pin::PIN;

/// How often a page is tried that a fault is just mapping.
const TRIES: u32 = 64;

impl<E: Env> Mm<'_, E> {
    /// Empties `count` pages of shared memory from `index` on. The caller keeps the object alive.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`] where the object's tree cannot forget a page in swap for want of memory; those before it are empty.
    #[doc(alias = "shmem_fallocate")]
    pub(crate) fn punch(&self, file: FileRef, index: u64, count: u64) -> Result<(), Errno> {
        let end = index.saturating_add(count);
        let mut next = self.next_entry(file, index, end);
        while let Some(index) = next {
            // Reclaim may take the page to swap between the two looks.
            while !self.punch_page(file, index)? {}
            next = self.next_entry(file, index + 1, end);
        }
        Ok(())
    }

    /// Empties a page; `false` where it went to swap meanwhile.
    fn punch_page(&self, file: FileRef, index: u64) -> Result<bool, Errno> {
        self.forget_swapped_out(file, index)?;
        let Some(frame) = self.get_cached(file, index) else {
            return Ok(!self.is_swapped_out(file, index));
        };
        let slot = self.slot(frame);
        let removed = slot.try_lock() && {
            let removed = self.remove_page(file, index, frame);
            slot.unlock();
            removed
        };
        if !removed {
            // With this reference nobody takes it to swap or elsewhere.
            self.zero_frame(frame, 0, PAGE_SIZE as usize);
        }
        self.put_reference(frame);
        Ok(true)
    }

    /// Takes a page of shared memory, to which the caller holds a reference and the page's lock, out of every table and out of its object;
    /// `false` where a mapping or somebody's work on it keeps it.
    fn remove_page(&self, file: FileRef, index: u64, frame: Frame) -> bool {
        let (page, Some(at)) = (self.user(frame), Page::new(index)) else {
            return false;
        };
        for _ in 0..TRIES {
            let spaces = self.registry().lock();
            let unmapped = self.unmap_everywhere(&spaces, frame, |_| Ok(None));
            drop(spaces);
            if unmapped.is_err() {
                return false;
            }
            let mut pages = self.object(file).pages.write();
            let here = names(&pages, at, frame);
            // The tree's and the caller's, and those of pins.
            let alone = page.references() % PIN == 2 && page.mappings() == 0;
            if here && alone {
                if set(&mut pages, at, None).is_err() {
                    return false;
                }
                page.set_object(0, 0);
                drop(pages);
                self.put_reference(frame);
                return true;
            }
            drop(pages);
            if !here {
                return false;
            }
            // A fault is about to map it.
            kmem_hal::sync::spin_loop();
        }
        false
    }
}
