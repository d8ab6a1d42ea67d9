//! The page cache: an object's pages in memory, read when they are asked for and written back when they have to be.
//!
//! ```text
//!   look-up ── here, up to date ─────────────────────────────────> Ready (with a reference)
//!      │           └─ being read: ask the provider again ── NeedIo, or Ready
//!      └─ missing: a frame into the tree ── provider reads ── Ready, or NeedIo(ticket); and the pages after it
//!
//!   written ── DIRTY ── write back (`write_back.rs`)
//! ```
//!
//! Invariants
//! - `I1`: a page in the tree holds one reference of its frame, and its slot names the object and the index.
//! - `I2`: a page whose slot does not say `UP_TO_DATE` is on its way from the provider, one that says `WRITEBACK` is on its way to it; its
//!   ticket is in the slot's word of links. Nobody maps the former.
//! - `I3`: a page of a file that differs from the provider's says `DIRTY`, or is mapped writable and was `DIRTY` when that was granted.
//! - `I4`: a page leaves the tree only with one reference beside the tree's, the caller's, under the tree's lock, and clean; or by
//!   truncation; or with the object.
//!
//! Source: Linux `mm/filemap.c`, `mm/readahead.c`, `mm/truncate.c`.

use kmem_hal::sync::Ordering;
use kmem_hal::{
    Frame, FrameRequest, FrameTag, IoState, IoTicket, Mobility, ObjectAlloc, PAGE_SIZE, Page,
    PageProvider, PageRange, SlotFlags, UserSlot,
};
use kmem_vma_tree::Node;

use crate::env::Env;
use crate::errno::Errno;
use crate::handle::Handle;
use crate::mm::Mm;
use crate::object::{Backing, FileRef, Object, Pages};
use crate::reclaim::Evicted;
use crate::swap_in::Swapped;
use crate::write_back::Waits;

/// In place of a ticket: the provider refused or failed, and the next look-up asks again.
const NOT_STARTED: u64 = u64::MAX;

/// What a look-up of an object's page found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ObjectPage {
    /// The page is here; the reference is the caller's to give back ([`Mm::put_reference`]).
    Ready(Frame),
    /// The page is on its way.
    NeedIo(IoTicket),
    /// Beyond the end: a bus error.
    Beyond,
}

impl<'m, E: Env> Mm<'m, E> {
    pub(crate) fn provider(
        &self,
        object: &Object<E::Nodes, E::Lock>,
    ) -> Option<&'m (dyn PageProvider + Sync)> {
        match object.backing {
            Backing::Shared(_) | Backing::Device(_) => None,
            // SAFETY: `open_file` took the provider for 'm.
            Backing::File(provider) => Some(unsafe { &*provider.as_ptr() }),
        }
    }

    /// Whether nothing of the object can ever be written back to where it comes from.
    pub(crate) fn is_read_only(&self, object: &Object<E::Nodes, E::Lock>) -> bool {
        let provider = self.provider(object);
        provider.is_some_and(PageProvider::is_read_only)
    }

    /// The frame of page `index` of the object, brought in where it must be, with a reference for the caller.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`], [`Errno::EIO`] where the provider failed, or [`Errno::EINVAL`] where the object is a device, which has no cache.
    #[doc(alias = "filemap_get_page")]
    pub(crate) fn object_page(&self, file: FileRef, index: u64) -> Result<ObjectPage, Errno> {
        let object = self.object(file);
        if matches!(object.backing, Backing::Device(_)) {
            return Err(Errno::EINVAL);
        }
        if index >= object.size().div_ceil(PAGE_SIZE) {
            return Ok(ObjectPage::Beyond);
        }
        let page = Page::new(index).ok_or(Errno::EINVAL)?;
        let mut pages = object.pages.write();
        let (frame, state) = match pages.get(page) {
            Some(entry) => match (entry.value.frame(), entry.value.swap()) {
                (Some(frame), _) => (frame, self.ask_again(object, index, frame)?),
                (None, Some(entry)) => match self.swapped_page(entry, true)? {
                    Swapped::NeedIo(ticket) => return Ok(ObjectPage::NeedIo(ticket)),
                    Swapped::Gone => return Err(Errno::EIO),
                    Swapped::Ready(found) => {
                        let frame = self.page_from_swap(object, index, found)?;
                        self.enter(&mut pages, page, frame)?;
                        self.drop_swap(entry);
                        (frame, IoState::Done)
                    }
                },
                (None, None) => return Err(Errno::EIO),
            },
            None => {
                let frame = self.new_page(
                    FrameTag::File,
                    object.number,
                    index,
                    &FrameRequest::ONE.mobility(Mobility::Movable).zeroed(),
                )?;
                self.enter(&mut pages, page, frame)?;
                (frame, self.start_read(object, index, frame)?)
            }
        };
        match state {
            IoState::Pending(ticket) => Ok(ObjectPage::NeedIo(ticket)),
            IoState::Done => {
                let counted = self.user(frame).add_reference();
                counted.map_err(|_| Errno::ENOMEM)?;
                Ok(ObjectPage::Ready(frame))
            }
        }
    }

    /// Lets the tree name a page, whose reference becomes the tree's.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`]; the reference was given back.
    fn enter(&self, pages: &mut Pages<E::Nodes>, index: Page, frame: Frame) -> Result<(), Errno> {
        let entered = set(pages, index, Some(Handle::of_frame(frame)));
        if entered.is_err() {
            self.put_reference(frame);
        }
        entered
    }

    /// Asks the provider for a page that is in the tree and not up to date.
    fn start_read(
        &self,
        object: &Object<E::Nodes, E::Lock>,
        index: u64,
        frame: Frame,
    ) -> Result<IoState, Errno> {
        let slot = self.slot(frame);
        let Some(provider) = self.provider(object) else {
            slot.set_flags(SlotFlags::UP_TO_DATE);
            return Ok(IoState::Done);
        };
        slot.links().store(NOT_STARTED, Ordering::Release);
        let state = provider.read(index, frame).map_err(|_| Errno::EIO)?;
        match state {
            IoState::Done => {
                slot.set_flags(SlotFlags::UP_TO_DATE);
            }
            IoState::Pending(ticket) => slot.links().store(ticket.0, Ordering::Release),
        }
        Ok(state)
    }

    /// Asks after a page that is in the tree (`I2`).
    fn ask_again(
        &self,
        object: &Object<E::Nodes, E::Lock>,
        index: u64,
        frame: Frame,
    ) -> Result<IoState, Errno> {
        let slot = self.slot(frame);
        if slot.flags().contains(SlotFlags::UP_TO_DATE) {
            return Ok(IoState::Done);
        }
        let ticket = slot.links().load(Ordering::Acquire);
        let Some(provider) = self.provider(object).filter(|_| ticket != NOT_STARTED) else {
            return self.start_read(object, index, frame);
        };
        match provider.poll(IoTicket(ticket)) {
            Ok(IoState::Done) => {
                slot.set_flags(SlotFlags::UP_TO_DATE);
                Ok(IoState::Done)
            }
            Ok(pending) => Ok(pending),
            Err(_) => {
                slot.links().store(NOT_STARTED, Ordering::Release);
                Err(Errno::EIO)
            }
        }
    }

    /// The frame of page `index`, if the cache has it whole. No reference: for a look, or under a lock that keeps it.
    pub(crate) fn cached_page(&self, file: FileRef, index: u64) -> Option<Frame> {
        let pages = self.object(file).pages.read();
        let frame = pages.get(Page::new(index)?)?.value.frame()?;
        self.slot(frame)
            .flags()
            .contains(SlotFlags::UP_TO_DATE)
            .then_some(frame)
    }

    /// Whether page `index` is in memory: in the cache, or in that of the swap that it went to.
    pub(crate) fn is_in_memory(&self, file: FileRef, index: u64) -> bool {
        let pages = self.object(file).pages.read();
        let entry = Page::new(index).and_then(|page| pages.get(page));
        let swap = entry.and_then(|entry| entry.value.swap());
        drop(pages);
        match swap {
            Some(entry) => self.is_in_swap_cache(entry),
            None => self.cached_page(file, index).is_some(),
        }
    }

    /// As [`cached_page`](Self::cached_page), with a reference.
    pub(crate) fn get_cached(&self, file: FileRef, index: u64) -> Option<Frame> {
        let pages = self.object(file).pages.read();
        let frame = pages.get(Page::new(index)?)?.value.frame()?;
        let page = self.user(frame);
        let whole = page.slot().flags().contains(SlotFlags::UP_TO_DATE);
        (whole && page.add_reference().is_ok()).then_some(frame)
    }

    /// Starts reading those of `pages` pages from one on that are missing, as far as that costs nothing but memory.
    #[doc(alias = "page_cache_ra_order")]
    pub(crate) fn read_ahead(&self, file: FileRef, first: u64, pages: u64) {
        if self.provider(self.object(file)).is_none() {
            return;
        }
        for near in first..first.saturating_add(pages) {
            let missing = Page::new(near)
                .is_some_and(|page| self.object(file).pages.read().get(page).is_none());
            if !missing {
                continue;
            }
            match self.object_page(file, near) {
                Ok(ObjectPage::Ready(frame)) => self.put_reference(frame),
                Ok(ObjectPage::NeedIo(_)) => {}
                Ok(ObjectPage::Beyond) | Err(_) => return,
            }
            self.count(|counts| &counts.read_ahead);
        }
    }

    /// Takes the pages from an index on out of the tree, whatever is in them.
    pub(crate) fn forget_from(&self, file: FileRef, first_gone: u64) -> Result<(), Errno> {
        let object = self.object(file);
        if self.provider(object).is_none() {
            return Ok(());
        }
        let Some(all) = Page::new(first_gone).and_then(|first| PageRange::new(first, Page::MAX))
        else {
            return Ok(());
        };
        while let Some((index, frame)) = self.next_cached(object, all.first(), all) {
            let waits = self.forget_page(object, index, frame);
            self.put_reference(frame);
            if let Some(waits) = waits? {
                self.wait_for(waits);
            }
        }
        Ok(())
    }

    /// Fills a page with zeros from an offset on, if the tree has it; one that is on its way when it is there. The provider gets the zeros too,
    /// with the next write-back, unless it can take none: then the page would wait for that for ever.
    pub(crate) fn zero_tail(&self, file: FileRef, index: u64, from: usize) {
        let object = self.object(file);
        let Some(page) = Page::new(index) else { return };
        let read_only = self.is_read_only(object);
        loop {
            let pages = object.pages.write();
            let Some(frame) = pages.get(page).and_then(|entry| entry.value.frame()) else {
                return;
            };
            // The tree's lock keeps its reference of the page.
            let slot = self.slot(frame);
            let waits = match self.pending_read(object, page, frame) {
                Some(ticket) => Waits::ForTransfer(ticket),
                None if slot.try_lock() => {
                    self.zero_frame_from(frame, from);
                    if !read_only {
                        slot.set_flags(SlotFlags::DIRTY);
                    }
                    slot.unlock();
                    return;
                }
                // An eviction, a move or a write-back, which may have asked for the size before that changed.
                None => Waits::ForLock,
            };
            drop(pages);
            self.wait_for(waits);
        }
    }

    /// Takes a page out of the tree, if it is there still, or says what has to come to its end first. The caller holds a reference.
    fn forget_page(
        &self,
        object: &Object<E::Nodes, E::Lock>,
        index: Page,
        frame: Frame,
    ) -> Result<Option<Waits>, Errno> {
        let slot = self.slot(frame);
        if !slot.try_lock() {
            // An eviction, a move or a write-back that is just begun.
            return Ok(Some(Waits::ForLock));
        }
        let outcome = match self.pending_write(object, frame) {
            // Nobody waits for a device with a page's lock.
            Some(ticket) => Ok(Some(Waits::ForTransfer(ticket))),
            None => self.forget_locked(object, index, frame),
        };
        slot.unlock();
        outcome
    }

    fn forget_locked(
        &self,
        object: &Object<E::Nodes, E::Lock>,
        index: Page,
        frame: Frame,
    ) -> Result<Option<Waits>, Errno> {
        let mut pages = object.pages.write();
        if !names(&pages, index, frame) {
            return Ok(None);
        }
        if let Some(ticket) = self.pending_read(object, index, frame) {
            return Ok(Some(Waits::ForTransfer(ticket)));
        }
        set(&mut pages, index, None)?;
        // Nobody's from now on: whoever still holds it, for a pin or a copy, is the last to let it go.
        self.user(frame).set_object(0, 0);
        self.slot(frame).clear_flags(SlotFlags::DIRTY);
        drop(pages);
        self.put_reference(frame);
        Ok(None)
    }

    /// The ticket of a page's read, if the provider is still at it; a read that never began is not begun. The caller has the tree's lock,
    /// or the object to itself.
    fn pending_read(
        &self,
        object: &Object<E::Nodes, E::Lock>,
        index: Page,
        frame: Frame,
    ) -> Option<IoTicket> {
        if self.slot(frame).links().load(Ordering::Acquire) == NOT_STARTED {
            return None;
        }
        match self.ask_again(object, index.number(), frame) {
            Ok(IoState::Pending(ticket)) => Some(ticket),
            _ => None,
        }
    }

    /// Writes what is dirty of an object that nobody else reaches any more, and waits until the provider has let go of every page. Bytes
    /// whose write fails are lost; the failure is counted.
    ///
    /// Takes no page's lock: nobody maps the pages, and whoever was about to evict or to move one has let go of the object.
    pub(crate) fn end_transfers(&self, object: &Object<E::Nodes, E::Lock>) {
        if self.provider(object).is_none() {
            return;
        }
        for entry in object.pages.read().iter() {
            let Some(frame) = entry.value.frame() else {
                continue;
            };
            while let Some(ticket) = self.pending_write(object, frame) {
                self.env().wait(ticket);
            }
            let index = entry.range.first();
            while let Ok(IoState::Pending(ticket)) =
                self.write_locked(object, index.number(), frame)
            {
                self.env().wait(ticket);
            }
            while let Some(ticket) = self.pending_read(object, index, frame) {
                self.env().wait(ticket);
            }
        }
    }

    /// Frames that the object's cache holds; none where it is gone.
    #[must_use]
    pub fn cached_pages(&self, file: FileRef) -> u64 {
        let Ok(_visit) = self.visit(file) else {
            return 0;
        };
        self.object(file)
            .pages
            .read()
            .iter()
            .filter(|entry| entry.value.frame().is_some())
            .map(|entry| entry.range.count())
            .sum()
    }

    /// The first index from one on, and below another, of which the object has something: a page, or a place in swap.
    pub(crate) fn next_entry(&self, file: FileRef, from: u64, end: u64) -> Option<u64> {
        let pages = self.object(file).pages.read();
        let entry = pages.first_at_or_after(Page::new(from)?)?;
        let index = entry.range.first().number().max(from);
        (index < end).then_some(index)
    }

    /// The first page of a range that the cache has, with a reference.
    pub(crate) fn next_cached(
        &self,
        object: &Object<E::Nodes, E::Lock>,
        from: Page,
        indices: PageRange,
    ) -> Option<(Page, Frame)> {
        let pages = object.pages.read();
        let entry = pages
            .first_at_or_after(from)
            .filter(|entry| entry.range.first() <= indices.last())?;
        let frame = entry.value.frame()?;
        self.user(frame).add_reference().ok()?;
        Some((entry.range.first(), frame))
    }

    /// Lets a file's page go that the caller has locked and holds a reference of.
    pub(crate) fn evict_of_file(&self, frame: Frame, page: UserSlot<'_>) -> Evicted {
        let Some(visit) = self.visit_number(page.object()) else {
            return Evicted::Kept;
        };
        self.evict_from(self.object(visit.file), frame, page)
    }

    fn evict_from(
        &self,
        object: &Object<E::Nodes, E::Lock>,
        frame: Frame,
        page: UserSlot<'_>,
    ) -> Evicted {
        let slot = page.slot();
        if !slot.flags().contains(SlotFlags::UP_TO_DATE) {
            return Evicted::Kept;
        }
        if let Some(entry) = self.cache_entry(frame) {
            // Shared memory whose write failed, or found no place.
            return self.write_to_swap(frame, entry);
        }
        if page.mappings() > 0 {
            let spaces = self.registry().lock();
            match self.unmap_everywhere(&spaces, frame, |_| Ok(None)) {
                Ok(false) => {}
                Ok(true) => {
                    slot.set_flags(SlotFlags::DIRTY);
                }
                Err(_) => return Evicted::Kept,
            }
        }
        if page.mappings() > 0 {
            return Evicted::Kept;
        }
        if self.provider(object).is_none() {
            return self.evict_shared(object, frame, page);
        }
        match self.write_locked(object, page.page(), frame) {
            Ok(IoState::Done) => {}
            Ok(IoState::Pending(ticket)) => return Evicted::Writing(Some(ticket)),
            Err(_) => return Evicted::Kept,
        }
        let Some(index) = Page::new(page.page()) else {
            return Evicted::Kept;
        };
        let mut pages = object.pages.write();
        // The tree's and the caller's: nobody looks at it, and under the tree's lock nobody begins to (`I4`).
        let alone = page.references() == 2 && page.mappings() == 0;
        let clean = !slot
            .flags()
            .intersects(SlotFlags::DIRTY | SlotFlags::WRITEBACK);
        let goes = alone && clean && names(&pages, index, frame);
        if !goes || set(&mut pages, index, None).is_err() {
            return Evicted::Kept;
        }
        drop(pages);
        self.put_reference(frame);
        Evicted::Freed
    }

    /// Lets the tree name `to`, which the caller owns and which becomes a copy, instead of `from`, with a reference; `false`, and nothing is
    /// changed, where somebody else holds `from`.
    pub(crate) fn replace_cached(&self, from: Frame, to: Frame) -> bool {
        let page = self.user(from);
        let Some(visit) = self.visit_number(page.object()) else {
            return false;
        };
        Page::new(page.page()).is_some_and(|index| {
            let mut pages = self.object(visit.file).pages.write();
            if !names(&pages, index, from) || page.references() != 2 || page.mappings() != 0 {
                return false;
            }
            if self.user(to).add_reference().is_err() {
                return false;
            }
            let stored = set(&mut pages, index, Some(Handle::of_frame(to))).is_ok();
            if stored {
                // SAFETY: `to` is the caller's, who holds a reference of `from`. Nobody maps that, and no reference is left but the
                // caller's and the tree's: a write takes one under the tree's lock, which is held until the copy is whole.
                unsafe { self.take_along(from, to) };
                self.put_reference(from);
            } else {
                self.put_reference(to);
            }
            stored
        })
    }
}

/// Whether an object's tree has this frame at an index.
pub(crate) fn names<N: ObjectAlloc<Node>>(pages: &Pages<N>, index: Page, frame: Frame) -> bool {
    let entry = pages.get(index);
    entry.is_some_and(|entry| entry.value.frame() == Some(frame))
}

/// Says what an object's tree has at an index: a page, a place in swap, or nothing.
///
/// # Errors
///
/// [`Errno::ENOMEM`]; nothing changed.
pub(crate) fn set<N: ObjectAlloc<Node>>(
    pages: &mut Pages<N>,
    index: Page,
    value: Option<Handle>,
) -> Result<(), Errno> {
    let stored = pages.store(PageRange::single(index), value, &mut |_| {});
    stored.map_err(|_| Errno::ENOMEM)
}
