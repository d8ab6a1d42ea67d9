//! Moving a page to another frame: what CMA, compaction and taking memory offline ask for.
//!
//! ```text
//!   1  every entry:  leaf of `from`  ──>  "moving" (and flushed: nobody reads or writes the page now)
//!   2  copy the bytes, the flags and what the page is a page of; the cache names `to`
//!   3  every entry:  "moving"        ──>  leaf of `to`, with the rights it had; of anonymous memory without the right to write
//! ```
//!
//! An entry that says "moving" may be copied, by fork or with its table, and then two say that it was writable. So the first write to an
//! anonymous page after it moved faults, which decides by whether the page is somebody's alone.
//!
//! A fault on a page that is moving makes the access again. Entries are changed where they are, in tables that spaces share too; nothing is
//! allocated.
//!
//! Invariants
//! - `I1`: the list of spaces is locked from 1 to 3, so every entry that was taken in 1, or copied from one since, is found in 3.
//! - `I2`: a page that cannot be moved whole stays in its frame, and its leaves are put back as in 3.
//! - `I3`: a page that somebody else holds stays; who takes a reference by the frame's number after that look gives it back, and is waited for.
//!
//! Context: task context, no lock of a space or an object held; may wait for other CPUs.
//!
//! Source: Linux `mm/migrate.c` (the three steps).

use core::ops::ControlFlow;

use kmem_hal::{
    Frame, FrameTag, Migrate, MigrateError, Order, OwnedFrame, PageRange, PhysMap, SlotFlags,
    UserSlot,
};
use kmem_paging::{Entry as TableEntry, Env as _, Rights};

use crate::absent::{Absent, Moving};
use crate::env::Env;
use crate::mm::Mm;
use crate::mutants::mutant;
use crate::reclaim::LAZY_FREE;
use crate::registry::First;
use crate::rmap::{Identity, Refused};
use crate::swap_in::LINKS_ARE_SWAP;
use crate::tables::{attributes, rights};

/// Flags that a page takes along.
const TAKEN_ALONG: SlotFlags = SlotFlags::DIRTY
    .union(SlotFlags::REFERENCED)
    .union(SlotFlags::UP_TO_DATE)
    .union(SlotFlags::EXCLUSIVE)
    .union(LAZY_FREE)
    .union(LINKS_ARE_SWAP);

impl<'m, E: Env> Mm<'m, E> {
    /// Puts "moving" in place of every leaf of a page.
    ///
    /// # Errors
    ///
    /// [`Refused`]; the caller puts back what was taken.
    fn take_leaves(&self, spaces: &First, frame: Frame) -> Result<bool, Refused> {
        self.unmap_everywhere(spaces, frame, |leaf| {
            let moving = Absent::Moving(Moving {
                from: frame,
                writable: leaf.is_writable(),
                accessed: leaf.attributes.accessed,
                dirty: leaf.attributes.dirty,
            });
            let payload = moving.payload::<E::Format>();
            payload.map(Some).ok_or(Refused::Unencodable)
        })
    }

    /// Puts leaves of `to` where entries say that `from` is moving, or nothing there for `None`.
    fn put_leaves(&self, spaces: &First, identity: Identity, from: Frame, to: Option<Frame>) {
        let _ = self.for_each_candidate(spaces, identity, |place| {
            let page = place.page;
            let tables = place.space.tables();
            let Ok(mut cursor) = tables.cursor(PageRange::single(page)) else {
                return ControlFlow::Continue(());
            };
            let (TableEntry::Payload(payload), shared) = cursor.look(page) else {
                return ControlFlow::Continue(());
            };
            let Some(Absent::Moving(moving)) = Absent::of(payload) else {
                return ControlFlow::Continue(());
            };
            if moving.from != from {
                return ControlFlow::Continue(());
            }
            let Some(to) = to else {
                if shared {
                    cursor.clear_shared(page, payload);
                } else {
                    let mut gather = tables.gather::<1>();
                    let _ = cursor.unmap_with(PageRange::single(page), &mut gather, |_| {});
                    cursor.release();
                    gather.commit(|mapping| self.put(mapping));
                }
                return ControlFlow::Continue(());
            };
            let mut granted = rights(place.vma.flags);
            // The entry may be one of two copies: whose the page is decides the next write.
            let anonymous = matches!(identity, Identity::Anonymous { .. });
            granted.set(
                Rights::WRITE,
                granted.contains(Rights::WRITE) && moving.writable && !anonymous,
            );
            let mut attributes = attributes(place.vma.flags).rights(granted);
            attributes.accessed = moving.accessed;
            attributes.dirty = moving.dirty;
            match self.map_page(to) {
                Ok(mapping) => {
                    if let Err(mapping) = cursor.restore(page, payload, mapping, attributes) {
                        cursor.release();
                        self.put(mapping);
                    }
                }
                // A count at its limit: the page had as many mappings before.
                Err(_) => debug_assert!(false, "a page had more mappings than can be counted"),
            }
            ControlFlow::Continue(())
        });
    }

    /// Takes an anonymous page that nobody has written to since it was given up out of its one table; `false` where somebody has.
    ///
    /// # Errors
    ///
    /// [`Refused`]; nothing has changed.
    pub(crate) fn discard_clean(&self, frame: Frame) -> Result<bool, Refused> {
        let Some(identity) = self.identity(frame) else {
            return Err(Refused::Unencodable);
        };
        let spaces = self.registry().lock();
        let taken = self.take_leaves(&spaces, frame);
        let page = self.user(frame);
        // The flag last: whoever wrote by the frame's number set it before he let the page go (Linux: `try_to_unmap_one`).
        let clean = (taken == Ok(false) || mutant!("lazily-freed-though-written"))
            && page.mappings() == 0
            && self.held_by_nobody_else(frame, page)
            && !page.slot().flags().contains(SlotFlags::DIRTY);
        self.put_leaves(&spaces, identity, frame, (!clean).then_some(frame));
        taken.map(|_| clean)
    }

    fn move_page(&self, from: Frame, to: Frame, page: UserSlot<'_>) -> Result<(), MigrateError> {
        let Some(identity) = self.identity(from) else {
            return match self.cache_entry(from) {
                // Read ahead and never mapped: as good as free.
                Some(entry) if self.leave_cache(entry, from) => Err(MigrateError::Gone),
                _ => Err(MigrateError::NotMovable),
            };
        };
        let tag = page.slot().tag();
        let flags = page.slot().flags();
        // On its way from the provider, which writes to this frame.
        let reading = tag == FrameTag::File && !flags.contains(SlotFlags::UP_TO_DATE);
        if reading
            || flags.intersects(SlotFlags::WRITEBACK | SlotFlags::PINNED)
            || !self.held_by_nobody_else(from, page)
        {
            return Err(MigrateError::Pinned);
        }
        let spaces = self.registry().lock();
        let taken = self.take_leaves(&spaces, from);
        if taken.is_err() || page.mappings() > 0 || !self.held_by_nobody_else(from, page) {
            self.put_leaves(&spaces, identity, from, Some(from));
            return Err(MigrateError::Pinned);
        }
        let slot = self.slot(to);
        let claimed = UserSlot::claim(slot, tag, Order::ZERO, page.object(), page.page());
        debug_assert!(claimed.is_some());
        self.user(to).set_age(page.age());
        if !self.follow_in_cache(from, to, tag) {
            self.put_leaves(&spaces, identity, from, Some(from));
            // Reclaim may wait for the list with a reference of `to`.
            drop(spaces);
            self.take_back(to);
            return Err(MigrateError::Pinned);
        }
        self.put_leaves(&spaces, identity, from, Some(to));
        // Whoever took a reference by the frame's number, and gets the page's lock next, finds nothing to do.
        page.set_object(0, 0);
        page.slot().clear_flags(SlotFlags::DIRTY);
        Ok(())
    }

    /// Takes the last reference of a page that no table and no cache names; the frame is the caller's then.
    ///
    /// Reclaim and the look-up of swapped pages take references by a frame's number, see that the page is not what they looked for, and give
    /// them back: they are waited for.
    fn take_back(&self, frame: Frame) {
        while !self.user(frame).sub_last_reference() {
            kmem_hal::sync::spin_loop();
        }
        self.slot(frame).release();
    }

    /// Copies a page's bytes, its flags and its links.
    ///
    /// # Safety
    ///
    /// The caller owns `to`, holds a reference of `from`, and keeps everybody from writing to it.
    pub(crate) unsafe fn take_along(&self, from: Frame, to: Frame) {
        if !mutant!("moved-page-not-copied") {
            // SAFETY: passed on. E2: both are in reach.
            unsafe { self.env().paging().map().copy(from, to) };
        }
        let (old, new) = (self.slot(from), self.slot(to));
        let links = old.links().load(kmem_hal::sync::Ordering::Acquire);
        new.links().store(links, kmem_hal::sync::Ordering::Release);
        new.set_flags(old.flags().intersection(TAKEN_ALONG));
    }

    /// Makes `to` what `from` is, and lets the cache that holds `from` hold `to` instead; `false`, and nothing is changed, where somebody
    /// else took a reference.
    fn follow_in_cache(&self, from: Frame, to: Frame, tag: FrameTag) -> bool {
        if tag == FrameTag::File {
            return self.replace_cached(from, to);
        }
        // SAFETY: the caller owns `to` and holds a reference of `from`, which is anonymous: it is written through tables, and no table
        // maps it; no one else held it after the last was flushed.
        unsafe { self.take_along(from, to) };
        let Some(entry) = self.cache_entry(from) else {
            return true;
        };
        if self.user(to).add_reference().is_err() {
            return false;
        }
        // A look-up that finds `to` waits for this, until it is clear that `to` stays.
        let up_to_date = self.slot(to).clear_flags(SlotFlags::UP_TO_DATE) & SlotFlags::UP_TO_DATE;
        if !self.swap().exchange_frame(entry, Some(from), Some(to)) {
            self.put_reference(to);
            return false;
        }
        // The caller's and the cache's. Whoever takes one from here on looks at the slot after that, and sees the change: so the count is
        // read by changing it.
        let page = self.user(from);
        let alone = page.add_reference() == Ok(2) && page.mappings() == 0;
        self.put_reference(from);
        if !alone {
            // The reference of the one that leaves the cache; of `from`, where the slot was given up meanwhile, and `to` with it.
            let back = self.swap().exchange_frame(entry, Some(to), Some(from));
            self.put_reference(if back { to } else { from });
            return false;
        }
        self.slot(to).set_flags(up_to_date);
        self.put_reference(from);
        true
    }
}

impl<E: Env> Migrate for Mm<'_, E> {
    fn migrate(
        &self,
        from: Frame,
        to: OwnedFrame,
    ) -> Result<OwnedFrame, (MigrateError, OwnedFrame)> {
        let Some(slot) = self.env().paging().slots().slot(from) else {
            return Err((MigrateError::NotMovable, to));
        };
        let Some(page) = UserSlot::get(slot) else {
            let error = match slot.tag() {
                FrameTag::Free | FrameTag::Anon | FrameTag::File => MigrateError::Gone,
                _ => MigrateError::NotMovable,
            };
            return Err((error, to));
        };
        let refuse = |error, to| {
            self.put_reference(from);
            Err((error, to))
        };
        if from == self.zero_page()
            || page.slot().order() != Order::ZERO
            || to.order() != Order::ZERO
        {
            return refuse(MigrateError::NotMovable, to);
        }
        if !page.slot().try_lock() {
            return refuse(MigrateError::Pinned, to);
        }
        let (target, order) = to.into_raw();
        let outcome = self.move_page(from, target, page);
        page.slot().unlock();
        if let Err(error) = outcome {
            // SAFETY: O1 to O3: it came in as an owned frame, and nothing was mapped to it.
            return refuse(error, unsafe { OwnedFrame::from_raw(target, order) });
        }
        // The maker's reference of the new page: its mappings and cache have theirs.
        self.put_reference(target);
        self.count(|counts| &counts.moved);
        self.take_back(from);
        // SAFETY: O1: the last reference is gone; O2: a page of one frame; O3: its translations were flushed.
        Ok(unsafe { OwnedFrame::from_raw(from, Order::ZERO) })
    }
}
