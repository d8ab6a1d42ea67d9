//! Reads and writes of swap that are on their way.
//!
//! ```text
//!   start ── Done ──────────────────────────────> finish
//!      └──── Pending(ticket) ──> a place here ── poll: Done or failed ──> finish
//! ```
//!
//! Each transfer holds a reference of its page and a count of its slot, so that neither is used for anything else before the device has
//! let go, whatever becomes of the processes. A fixed number of places: more transfers than that wait for these.
//!
//! Invariants
//! - `I1`: a page with a transfer here says `WRITEBACK` for a write, and does not say `UP_TO_DATE` for a read.
//! - `I2`: a ticket is polled by whoever holds the lock, and forgotten when it is answered.

use kmem_hal::{Frame, IoState, IoTicket, SlotFlags};

use crate::env::Env;
use crate::errno::Errno;
use crate::mm::Mm;
use crate::mutants::mutant;
use crate::swap::SwapEntry;

/// The page's read failed.
pub(crate) const FAILED: SlotFlags = SlotFlags::OWNER_2;

/// Transfers at a time.
const PLACES: usize = 32;

#[derive(Clone, Copy, Debug)]
struct Transfer {
    ticket: IoTicket,
    frame: Frame,
    entry: SwapEntry,
    write: bool,
}

/// The transfers on their way.
#[derive(Debug)]
pub(crate) struct Transfers {
    places: [Option<Transfer>; PLACES],
}

impl Transfers {
    pub const fn new() -> Self {
        Self {
            places: [None; PLACES],
        }
    }
}

/// What a transfer that was asked for came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Started {
    Done,
    Pending(IoTicket),
    /// No place: wait for this one first.
    Busy(IoTicket),
}

impl<E: Env> Mm<'_, E> {
    /// Starts a transfer between a page and the slot in whose cache it is. The caller keeps a reference of the page for the call, and the
    /// transfer takes its own, and a count of the slot.
    ///
    /// # Errors
    ///
    /// [`Errno::EIO`] where the device refused or failed, [`Errno::EAGAIN`] where a count is at its limit, or the page left the cache meanwhile:
    /// then the slot may be another page's.
    pub(crate) fn start_transfer(
        &self,
        entry: SwapEntry,
        frame: Frame,
        write: bool,
    ) -> Result<Started, Errno> {
        let mut transfers = self.transfers().write();
        if transfers.places.iter().all(Option::is_some) {
            self.poll_places(&mut transfers);
        }
        let Some(place) = transfers.places.iter().position(Option::is_none) else {
            return match transfers.places[0] {
                Some(first) => Ok(Started::Busy(first.ticket)),
                None => Err(Errno::EAGAIN),
            };
        };
        let page = self.user(frame);
        if !self.count_cached(entry, frame) {
            return Err(Errno::EAGAIN);
        }
        if page.add_reference().is_err() {
            self.drop_swap(entry);
            return Err(Errno::EAGAIN);
        }
        let transfer = Transfer {
            ticket: IoTicket(0),
            frame,
            entry,
            write,
        };
        if write {
            page.slot().set_flags(SlotFlags::WRITEBACK);
        }
        let state = if write {
            self.swap().write(entry, frame)
        } else {
            self.swap().read(entry, frame)
        };
        match state {
            Ok(IoState::Pending(ticket)) => {
                transfers.places[place] = Some(Transfer { ticket, ..transfer });
                Ok(Started::Pending(ticket))
            }
            Ok(IoState::Done) => {
                self.end_transfer(transfer, true);
                Ok(Started::Done)
            }
            Err(_) => {
                self.end_transfer(transfer, false);
                Err(Errno::EIO)
            }
        }
    }

    /// Asks after every transfer, and finishes those that are done; gives the ticket of one that is not.
    ///
    /// What an interrupt of the swap device makes the kernel call, so that pages that were written become free.
    pub fn poll_swap(&self) -> Option<IoTicket> {
        let mut transfers = self.transfers().write();
        self.poll_places(&mut transfers);
        transfers.places.iter().flatten().next().map(|t| t.ticket)
    }

    /// The ticket of the transfer that a page waits for, after asking after all.
    pub(crate) fn transfer_of(&self, frame: Frame) -> Option<IoTicket> {
        let mut transfers = self.transfers().write();
        self.poll_places(&mut transfers);
        let of_page = |t: &&Transfer| t.frame == frame;
        transfers
            .places
            .iter()
            .flatten()
            .find(of_page)
            .map(|t| t.ticket)
    }

    fn poll_places(&self, transfers: &mut Transfers) {
        for place in &mut transfers.places {
            let Some(transfer) = *place else { continue };
            match self.swap().poll(transfer.entry.area, transfer.ticket) {
                Ok(IoState::Pending(ticket)) => *place = Some(Transfer { ticket, ..transfer }),
                outcome => {
                    *place = None;
                    self.end_transfer(transfer, outcome.is_ok());
                }
            }
        }
    }

    /// Notes how a transfer ended, and gives up what it held.
    fn end_transfer(&self, transfer: Transfer, ok: bool) {
        let Transfer {
            frame,
            entry,
            write,
            ..
        } = transfer;
        let slot = self.slot(frame);
        match (write, ok) {
            (true, true) => {
                // Whoever faulted the page back meanwhile cannot have written to it: it was in the cache (`I3` of swap).
                slot.clear_flags(SlotFlags::DIRTY | SlotFlags::WRITEBACK);
                // Nobody maps it: this is what the write was for. The slot keeps the bytes.
                if self.user(frame).mappings() == 0 {
                    self.leave_cache(entry, frame);
                }
            }
            // The page is the only copy, and stays in the cache until it can be written.
            (true, false) => {
                slot.clear_flags(SlotFlags::WRITEBACK);
                self.count(|counts| &counts.write_errors);
            }
            (false, true) => {
                slot.set_flags(SlotFlags::UP_TO_DATE);
            }
            // The first fault that finds it says so to its process.
            (false, false) => {
                if mutant!("failed-read-is-up-to-date") {
                    slot.set_flags(SlotFlags::UP_TO_DATE);
                }
                slot.set_flags(FAILED);
            }
        }
        // The cache's reference first, so that the last one here is the page's last.
        self.drop_swap(entry);
        self.put_reclaimed(frame);
    }
}
