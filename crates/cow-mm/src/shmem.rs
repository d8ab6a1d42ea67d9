//! Shared memory and swap: an object's pages that have no provider to go back to.
//!
//! ```text
//!   tree names a frame ── nobody maps it: a slot of swap, and the tree names that ── written ── free
//!          ^                                                    └─ looked up: read, and the tree names the frame again
//!          └────────────────────────────────────────────────────┘
//! ```
//!
//! Invariants
//! - `I1`: an entry of the tree that names a slot is one of the slot's counts.
//! - `I2`: the tree changes under its lock, and only where it still names what the call found: a page that somebody holds beside the tree, the
//!   swap cache and the caller stays.
//!
//! Source: Linux `mm/shmem.c` (`shmem_writepage`, `shmem_swapin_folio`, `shmem_unuse`).

use kmem_hal::{
    Frame, FrameRequest, FrameTag, IoTicket, Mobility, Page, PhysMap, SlotFlags, UserSlot,
};
use kmem_paging::Env as _;

use crate::env::Env;
use crate::errno::Errno;
use crate::handle::Handle;
use crate::mm::Mm;
use crate::object::{FileRef, Object};
use crate::page_cache::{ObjectPage, names, set};
use crate::reclaim::Evicted;
use crate::swap::SwapEntry;

impl<E: Env> Mm<'_, E> {
    /// The page of shared memory whose bytes are in a page of the swap cache, to which the caller holds a reference: the page itself, or
    /// a copy where it was read without knowing whose it is. The reference of the answer is the tree's.
    pub(crate) fn page_from_swap(
        &self,
        object: &Object<E::Nodes, E::Lock>,
        index: u64,
        found: Frame,
    ) -> Result<Frame, Errno> {
        let slot = self.slot(found);
        if slot.tag() == FrameTag::File {
            slot.set_flags(SlotFlags::DIRTY);
            return Ok(found);
        }
        let request = FrameRequest::ONE.mobility(Mobility::Movable);
        let copy = self.new_page(FrameTag::File, object.number, index, &request);
        if let Ok(copy) = copy {
            // SAFETY: `found` is referenced, and nobody writes to a page in the swap cache; `copy` is new. E2: both are in reach.
            unsafe { self.env().paging().map().copy(found, copy) };
            self.slot(copy)
                .set_flags(SlotFlags::UP_TO_DATE | SlotFlags::DIRTY);
        }
        self.put_reference(found);
        copy
    }

    /// A page of shared memory that nobody maps: to swap, and the tree names its slot.
    #[doc(alias = "shmem_writepage")]
    pub(crate) fn evict_shared(
        &self,
        object: &Object<E::Nodes, E::Lock>,
        frame: Frame,
        page: UserSlot<'_>,
    ) -> Evicted {
        let Some(index) = Page::new(page.page()) else {
            return Evicted::Kept;
        };
        // The cache's reference, before the slot names the frame; the slot's count is the tree's.
        if page.add_reference().is_err() {
            return Evicted::Kept;
        }
        let Some(entry) = self.swap().take(frame) else {
            self.put_reference(frame);
            return Evicted::Kept;
        };
        page.slot().set_flags(SlotFlags::DIRTY);
        self.enter_cache(entry, frame);
        let stored = {
            let mut pages = object.pages.write();
            // The tree's, the cache's and the caller's: under the tree's lock nobody begins to look at it.
            let alone = page.references() == 3 && page.mappings() == 0;
            let kept = Some(Handle::of_swap(entry));
            alone && names(&pages, index, frame) && set(&mut pages, index, kept).is_ok()
        };
        if !stored {
            self.drop_swap(entry);
            return Evicted::Kept;
        }
        self.put_reference(frame);
        self.write_to_swap(frame, entry)
    }

    /// Whether a page of shared memory is in swap.
    pub(crate) fn is_swapped_out(&self, file: FileRef, index: u64) -> bool {
        let pages = self.object(file).pages.read();
        Page::new(index)
            .and_then(|page| pages.get(page))
            .is_some_and(|entry| entry.value.swap().is_some())
    }

    /// Forgets what is in swap of a page of shared memory: it reads as zeros.
    pub(crate) fn forget_swapped_out(&self, file: FileRef, index: u64) -> Result<(), Errno> {
        let mut pages = self.object(file).pages.write();
        let Some(page) = Page::new(index) else {
            return Ok(());
        };
        let Some(entry) = pages.get(page).and_then(|entry| entry.value.swap()) else {
            return Ok(());
        };
        set(&mut pages, page, None)?;
        self.drop_swap(entry);
        Ok(())
    }

    /// Brings in every page of an object that is in an area of swap; a ticket where one must be read first.
    pub(crate) fn bring_object_in(
        &self,
        file: FileRef,
        area: u8,
    ) -> Result<Option<IoTicket>, Errno> {
        loop {
            let found = {
                let pages = self.object(file).pages.read();
                let in_area = |entry: &SwapEntry| entry.area == area;
                pages
                    .iter()
                    .find(|entry| entry.value.swap().as_ref().is_some_and(in_area))
                    .map(|entry| entry.range.first().number())
            };
            let Some(index) = found else { return Ok(None) };
            match self.object_page(file, index)? {
                ObjectPage::Ready(frame) => self.put_reference(frame),
                ObjectPage::NeedIo(ticket) => return Ok(Some(ticket)),
                ObjectPage::Beyond => self.forget_swapped_out(file, index)?,
            }
        }
    }
}
