//! Write-back: what was written to a file's pages reaches the provider.
//!
//! ```text
//!   written ── DIRTY ── write back: DIRTY off, every mapping clean and read-only, provider writes ── WRITEBACK ── done
//!                            └─ written meanwhile: faults, DIRTY again, written again next time
//! ```
//!
//! Invariants (`I2` and `I3` of the page cache)
//! - `W1`: whoever starts a page's write holds the page's lock, or has the object alone; nobody waits for a device with that lock.
//! - `W2`: `DIRTY` goes before the mappings are made clean, and comes back where the provider failed.
//! - `W3`: the bytes beyond the file's end are zero when a write is submitted. The size is asked for with the page's lock held, which
//!   [`Mm::extend_file`] takes, or the object to the caller alone: so nothing is zeroed that was written after the file grew.
//!
//! Source: Linux `mm/page-writeback.c` (`folio_clear_dirty_for_io`, `filemap_write_and_wait_range`).

use kmem_hal::sync::Ordering;
use kmem_hal::{Frame, IoError, IoState, IoTicket, PAGE_SIZE, PageRange, SlotFlags};

use crate::env::Env;
use crate::errno::Errno;
use crate::mm::Mm;
use crate::object::{FileRef, Object};

/// What a call has to wait for before it can go on with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waits {
    /// For a device.
    ForTransfer(IoTicket),
    /// For somebody who has the page's lock, which nobody keeps while a device works for that page.
    ForLock,
}

impl<E: Env> Mm<'_, E> {
    /// Writes the object's dirty pages of a range of page indices to its provider, and waits until it has them.
    ///
    /// The caller holds no lock of a space.
    ///
    /// # Errors
    ///
    /// [`Errno::EIO`] where the provider failed; what was written before is written, and the page stays dirty.
    #[doc(alias = "filemap_write_and_wait_range")]
    pub(crate) fn write_back(&self, file: FileRef, indices: PageRange) -> Result<(), Errno> {
        let object = self.object(file);
        if self.provider(object).is_none() {
            return Ok(());
        }
        let mut at = Some(indices.first());
        while let Some(from) = at {
            let Some((index, frame)) = self.next_cached(object, from, indices) else {
                break;
            };
            let outcome = loop {
                match self.write_page(object, index.number(), frame) {
                    Ok(Some(waits)) => self.wait_for(waits),
                    outcome => break outcome,
                }
            };
            self.put_reference(frame);
            outcome?;
            at = index.checked_add(1);
        }
        Ok(())
    }

    /// Writes a page if it is dirty; what to wait for before asking again where the provider has not its bytes yet.
    fn write_page(
        &self,
        object: &Object<E::Nodes, E::Lock>,
        index: u64,
        frame: Frame,
    ) -> Result<Option<Waits>, Errno> {
        let slot = self.slot(frame);
        if !slot.try_lock() {
            return Ok(Some(Waits::ForLock));
        }
        let state = self.write_locked(object, index, frame);
        slot.unlock();
        Ok(match state? {
            IoState::Done => None,
            IoState::Pending(ticket) => Some(Waits::ForTransfer(ticket)),
        })
    }

    /// As [`write_page`](Self::write_page), with the page's lock held, or the object to the caller alone.
    pub(crate) fn write_locked(
        &self,
        object: &Object<E::Nodes, E::Lock>,
        index: u64,
        frame: Frame,
    ) -> Result<IoState, Errno> {
        let slot = self.slot(frame);
        let Some(provider) = self.provider(object) else {
            return Ok(IoState::Done);
        };
        if slot.flags().contains(SlotFlags::WRITEBACK) {
            let ticket = IoTicket(slot.links().load(Ordering::Acquire));
            let state = self.note_write(frame, provider.poll(ticket))?;
            if state != IoState::Done {
                return Ok(state);
            }
        }
        // Written to since that write was submitted, it is not what the provider has.
        if !slot
            .flags()
            .contains(SlotFlags::DIRTY | SlotFlags::UP_TO_DATE)
        {
            return Ok(IoState::Done);
        }
        // Off first: what is written after the mappings are made clean faults, and says "dirty" again.
        slot.clear_flags(SlotFlags::DIRTY);
        self.clean_mappings(frame);
        // What programs stored beyond the end through mappings is nobody's, and must not come back when the file grows.
        let size = object.size();
        if index == size / PAGE_SIZE {
            self.zero_frame_from(frame, (size % PAGE_SIZE) as usize);
        }
        slot.set_flags(SlotFlags::WRITEBACK);
        self.count(|counts| &counts.written_back);
        self.note_write(frame, provider.write(index, frame))
    }

    /// Notes in a page how its write stands.
    fn note_write(&self, frame: Frame, state: Result<IoState, IoError>) -> Result<IoState, Errno> {
        let slot = self.slot(frame);
        match state {
            Ok(IoState::Pending(ticket)) => slot.links().store(ticket.0, Ordering::Release),
            Ok(IoState::Done) => {
                slot.clear_flags(SlotFlags::WRITEBACK);
            }
            Err(_) => {
                slot.set_flags(SlotFlags::DIRTY);
                slot.clear_flags(SlotFlags::WRITEBACK);
                self.count(|counts| &counts.write_errors);
            }
        }
        state.map_err(|_| Errno::EIO)
    }

    /// The ticket of a page's write, if the provider has not all of it yet. The caller has the page's lock, or the object to itself.
    pub(crate) fn pending_write(
        &self,
        object: &Object<E::Nodes, E::Lock>,
        frame: Frame,
    ) -> Option<IoTicket> {
        let slot = self.slot(frame);
        let provider = self.provider(object)?;
        if !slot.flags().contains(SlotFlags::WRITEBACK) {
            return None;
        }
        let ticket = IoTicket(slot.links().load(Ordering::Acquire));
        match self.note_write(frame, provider.poll(ticket)) {
            Ok(IoState::Pending(ticket)) => Some(ticket),
            _ => None,
        }
    }

    /// Waits a while.
    pub(crate) fn wait_for(&self, waits: Waits) {
        match waits {
            Waits::ForTransfer(ticket) => self.env().wait(ticket),
            Waits::ForLock => kmem_hal::sync::spin_loop(),
        }
    }
}
