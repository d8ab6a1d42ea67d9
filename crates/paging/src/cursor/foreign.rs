//! Changes of a leaf by somebody who looks for the frame and not for the page: reverse maps, reclaim, migration.
//!
//! What such a change takes away it must take from everybody. In a table of one space's own that is what
//! [`Cursor::set_payload`] and [`Cursor::unmap_with`] do. A table that spaces share is changed by none of them (`U4` of the cursor); this
//! file is the exception, for a caller who knows every space that may share it:
//!
//! ```text
//!   announce_foreign   on every one of those tables: whoever fills the hole meanwhile flushes it too
//!   take_shared        once: all spaces see the same entry
//!   commit             of every announcement; only now is the handle what its type says
//! ```
//!
//! An announcement is a value, [`ForeignFlush`], and only its own end takes it back: it counts in `unflushed` beside the gathers (`G1`), and who
//! took back somebody else's would let that one's frames go unflushed.
//!
//! The change needs no memory, and it is made where the entry is: nothing is copied for it. That is the reason for it: what makes room must
//! not need room.

use core::fmt;

use kmem_hal::{Frame, FrameHandle, Order, Page, PageRange, Trace, TraceEvent};

use super::Cursor;
use crate::attributes::{Attributes, Leaf, Payload};
use crate::env::Env;
use crate::format::{Format, Kind};
use crate::gather::Stale;
use crate::mutants::mutant;
use crate::quiescent::Live;
use crate::table::{Entry, PageTable, decode, index_at};

impl<F: Format, E: Env, H: FrameHandle> PageTable<F, E, H> {
    /// Says that the entry of `page`, which this table may see, is about to be changed from outside ([`Cursor::take_shared`]).
    ///
    /// The change is flushed when the announcement is [committed](ForeignFlush::commit) or dropped. One that is forgotten makes every
    /// later flush of the table dearer.
    pub fn announce_foreign(&self, page: Page) -> ForeignFlush<'_, F, E, H> {
        self.announce();
        ForeignFlush { table: self, page }
    }

    /// The announcement of `page` that was forgotten ([`core::mem::forget`]): for a caller that has no room for one value a table.
    ///
    /// # Safety
    ///
    /// [`announce_foreign`](Self::announce_foreign) of this table gave one for `page`, which was forgotten, and each is resumed at most once.
    pub unsafe fn resume_foreign(&self, page: Page) -> ForeignFlush<'_, F, E, H> {
        ForeignFlush { table: self, page }
    }

    /// Drops every translation of the space, so that accessed bits that were [cleared](Cursor::clear_accessed) are set again at the next
    /// access.
    pub fn flush_accessed(&self) {
        let last = Page::from_number(Page::MAX.number());
        if let Some(range) = PageRange::new(Page::ZERO, last) {
            let stale = Stale {
                range,
                stride: 1,
                global: false,
                local: true,
            };
            self.flush(Some(stale), false, 0);
        }
    }
}

/// An entry that is changed from outside of its table, and not flushed yet: [`PageTable::announce_foreign`].
///
/// Counts as an unflushed gather of the table until it is committed. One that is dropped commits itself.
///
/// Nobody takes back what another one announced:
///
/// ```compile_fail,E0382
/// # use kmem_hal::{OwnedFrame, Page};
/// # use kmem_paging::{Env, PageTable, format::X86_64};
/// fn twice<E: Env>(table: &PageTable<X86_64, E, OwnedFrame>, page: Page) {
///     let announced = table.announce_foreign(page);
///     announced.commit();
///     announced.commit();
/// }
/// ```
#[must_use = "what was announced is flushed when this value is committed"]
pub struct ForeignFlush<'t, F: Format, E: Env, H: FrameHandle> {
    table: &'t PageTable<F, E, H>,
    page: Page,
}

impl<F: Format, E: Env, H: FrameHandle> ForeignFlush<'_, F, E, H> {
    /// Drops the translations of the page on every CPU that may hold them, and waits.
    ///
    /// Context: as [`Gather::commit`](crate::Gather::commit).
    pub fn commit(self) {}
}

impl<F: Format, E: Env, H: FrameHandle> Drop for ForeignFlush<'_, F, E, H> {
    fn drop(&mut self) {
        // The page itself need not be global: both kinds are dropped.
        let stale = Stale {
            local: true,
            ..Stale::leaf(PageRange::single(self.page), self.table.may_be_global())
        };
        if !mutant!("foreign-does-not-flush") {
            self.table.flush(Some(stale), false, 1);
        }
        self.table.retract();
        if mutant!("foreign-takes-back-two") && self.table.has_unflushed() {
            self.table.retract();
        }
    }
}

impl<F: Format, E: Env, H: FrameHandle> fmt::Debug for ForeignFlush<'_, F, E, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ForeignFlush({} of {:?})", self.page, self.table)
    }
}

impl<F: Format, E: Env, H: FrameHandle> Cursor<'_, F, E, H> {
    /// What the lowest table says of `page`, and whether other spaces may share that table.
    ///
    /// The rights are the entry's own; below shared tables none may be written to. The table stays locked, and what it says
    /// true, until the cursor lets go or moves on; but a shared one may become this space's own meanwhile, or a copy take its place.
    #[must_use]
    pub fn look(&mut self, page: Page) -> (Entry, bool) {
        if !self.range.contains(page) {
            return (Entry::Empty, false);
        }
        let node = self.seek(page, 1);
        let word = node.load(index_at::<F>(page.number(), node.level));
        (decode::<F>(page, node.level, word), self.shared)
    }

    /// Clears the accessed bit of a 4 KiB leaf, in whatever table it is; whether the page had been accessed.
    ///
    /// Nothing is flushed: a CPU that remembers the bit as set goes on without setting it again, until it forgets
    /// ([`PageTable::flush_accessed`], for many pages at once). That makes the answer next time less sharp, and nothing else.
    #[doc(alias = "ptep_clear_young_notify")]
    pub fn clear_accessed(&mut self, page: Page) -> bool {
        if !self.range.contains(page) {
            return false;
        }
        let node = self.seek(page, 1);
        let index = index_at::<F>(page.number(), node.level);
        let mut word = node.load(index);
        loop {
            let Entry::Leaf(leaf) = decode::<F>(page, node.level, word) else {
                return false;
            };
            if !leaf.attributes.accessed || leaf.order != Order::ZERO {
                return leaf.attributes.accessed;
            }
            let mut attributes = leaf.attributes;
            attributes.accessed = false;
            match node.change::<Live>(index, word, F::leaf(1, leaf.frame, &attributes)) {
                Ok(()) => return true,
                Err(found) => word = found,
            }
        }
    }

    /// Takes the 4 KiB leaf of `frame` out of the table in which it is, though other spaces share that, and leaves `instead`; `None`, and
    /// nothing is changed, where no such leaf is there, or `instead` was made for a format with more room.
    ///
    /// # Safety
    ///
    /// On every table through which an entry may lead here `page` was [announced](PageTable::announce_foreign) before, and that is
    /// [committed](ForeignFlush::commit) before the handle is used.
    pub unsafe fn take_shared(
        &mut self,
        page: Page,
        frame: Frame,
        instead: Option<Payload>,
    ) -> Option<(Leaf, H)> {
        let fits = instead.is_none_or(Payload::fits::<F>);
        if !self.range.contains(page) || !fits {
            return None;
        }
        let node = self.seek(page, 1);
        if node.level != 1 {
            return None;
        }
        let index = index_at::<F>(page.number(), 1);
        let new = instead.map_or(0, F::payload);
        let mut word = node.load(index);
        if node.kind(word) != Kind::Leaf || F::leaf_frame(1, word) != frame {
            return None;
        }
        while let Err(found) = node.change::<Live>(index, word, new) {
            word = found;
        }
        if new == 0 {
            // An empty table stays where it is, as others may lead to it; the next to unmap something there takes it down.
            node.sub_live(1);
        }
        let Entry::Leaf(leaf) = decode::<F>(page, 1, word) else {
            return None;
        };
        self.table
            .env()
            .trace()
            .event(TraceEvent::Unmapped(leaf.range()));
        // SAFETY: H2: the numbers were in an entry, which is gone; the caller flushes before the handle is used.
        Some((leaf, unsafe { H::from_entry(leaf.frame, Order::ZERO) }))
    }

    /// Puts a 4 KiB leaf where `payload` is, in whatever table that is: for all spaces that share it.
    ///
    /// # Errors
    ///
    /// Gives the handle back where something else is there, or the format cannot say it; nothing changed.
    pub fn restore(
        &mut self,
        page: Page,
        payload: Payload,
        handle: H,
        attributes: Attributes,
    ) -> Result<(), H> {
        if !self.range.contains(page) {
            return Err(handle);
        }
        let node = self.seek(page, 1);
        let index = index_at::<F>(page.number(), node.level);
        let (frame, order) = handle.into_entry();
        let fits = node.level == 1
            && payload.fits::<F>()
            && node.load(index) == F::payload(payload)
            && order == Order::ZERO
            && F::can_encode(1, frame, &attributes);
        if !fits {
            // SAFETY: H2: the numbers came from `into_entry` above, and no entry got them.
            return Err(unsafe { H::from_entry(frame, order) });
        }
        self.table.note_global(attributes.rights);
        node.store(index, F::leaf(1, frame, &attributes));
        let range = PageRange::single(page);
        self.settle(range, Order::ZERO);
        self.table
            .env()
            .trace()
            .event(TraceEvent::Mapped(range, frame));
        Ok(())
    }

    /// Takes the dirty bit and the right to write from the 4 KiB leaf of `frame`, in whatever table it is, so that the next write is
    /// seen; whether it was dirty, or `None` where no such leaf is there.
    ///
    /// Announced and flushed as [`take_shared`](Self::take_shared): until the flush, writes may go on unseen.
    #[doc(alias = "folio_mkclean")]
    pub fn clean_shared(&mut self, page: Page, frame: Frame) -> Option<bool> {
        if !self.range.contains(page) {
            return None;
        }
        let node = self.seek(page, 1);
        let index = index_at::<F>(page.number(), node.level);
        let mut word = node.load(index);
        loop {
            let Entry::Leaf(leaf) = decode::<F>(page, node.level, word) else {
                return None;
            };
            if leaf.frame != frame || leaf.order != Order::ZERO {
                return None;
            }
            let mut attributes = leaf.attributes.write_protected();
            attributes.dirty = false;
            match node.change::<Live>(index, word, F::leaf(1, frame, &attributes)) {
                Ok(()) => {
                    self.table
                        .env()
                        .trace()
                        .event(TraceEvent::Restricted(PageRange::single(page)));
                    return Some(leaf.attributes.dirty);
                }
                Err(found) => word = found,
            }
        }
    }

    /// Takes `payload` out of the table in which it is, though other spaces share that; whether it was there.
    pub fn clear_shared(&mut self, page: Page, payload: Payload) -> bool {
        if !self.range.contains(page) {
            return false;
        }
        let node = self.seek(page, 1);
        let index = index_at::<F>(page.number(), node.level);
        let found =
            node.level == 1 && payload.fits::<F>() && node.load(index) == F::payload(payload);
        if found {
            node.store(index, 0);
            node.sub_live(1);
        }
        found
    }
}
