//! Bringing a swapped page back: through the swap cache, or from the device with its neighbours.
//!
//! ```text
//!   entry ── slot names a frame? ── yes ── up to date? ── yes ──> map it (no I/O)
//!     │                 │                        └─ no: on its way: NeedIo
//!     │                 no: a fresh frame into the cache, read it and the rest of its cluster: NeedIo, or done at once
//!     └─ nobody counts the slot: the entry was replaced meanwhile: access again
//! ```
//!
//! Resuming starts from the entry again; what was read meanwhile is found in the cache. The entry is replaced where it is, in a table that
//! spaces share too: all of them get the page, and nothing is copied before somebody writes.
//!
//! Source: Linux `mm/memory.c` (`do_swap_page`), `mm/swap_state.c` (`swapin_readahead`).

use core::ops::ControlFlow;
use core::ptr::NonNull;

use kmem_hal::{
    BlockDevice, Frame, FrameRequest, FrameTag, IoTicket, Page, PageRange, SlotFlags, UserSlot,
    VirtAddr,
};
use kmem_paging::{Entry, Payload, Run};

use crate::absent::Absent;
use crate::env::Env;
use crate::errno::Errno;
use crate::fault::{Outcome, Signal, Stop};
use crate::flags::VmFlags;
use crate::mm::Mm;
use crate::mutants::mutant;
use crate::space::AddressSpace;
use crate::swap::{SwapEntry, SwapSlot};
use crate::tables::attributes;
use crate::transfer::{FAILED, Started};
use crate::vma::Vma;

/// The page's word of links is a swap entry: of the slot in whose cache it is, or was last. Which of both, the slot says
/// ([`Mm::cache_entry`]): the flag stays when the page leaves. Taking it away would be a second step after the slot's change, between which
/// reclaim may put the page into the cache of another slot, and the flag that went would be that one's.
pub(crate) const LINKS_ARE_SWAP: SlotFlags = SlotFlags::OWNER_0;

/// Slots that are read together (`page_cluster` of 3).
const CLUSTER: u64 = 8;

/// A look-up of a swapped page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Swapped {
    /// It is here; the reference is the caller's.
    Ready(Frame),
    /// It is on its way.
    NeedIo(IoTicket),
    /// Nobody wants the slot any more.
    Gone,
}

impl<'m, E: Env> Mm<'m, E> {
    /// The page of a swap entry, read if it must be; with the rest of its cluster, if `ahead` says so.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`], or [`Errno::EIO`] where the device failed: the next look-up asks it again.
    pub(crate) fn swapped_page(&self, entry: SwapEntry, ahead: bool) -> Result<Swapped, Errno> {
        loop {
            let slot = self.swap().slot(entry);
            if slot.count == 0 {
                return Ok(Swapped::Gone);
            }
            let Some(frame) = slot.frame else {
                match self.read_swap(entry)? {
                    Some(Started::Pending(ticket) | Started::Busy(ticket)) => {
                        if ahead {
                            self.read_cluster(entry);
                        }
                        return Ok(Swapped::NeedIo(ticket));
                    }
                    Some(Started::Done) if ahead => self.read_cluster(entry),
                    Some(Started::Done) | None => {}
                }
                continue;
            };
            let Some(page) = UserSlot::get(self.slot(frame)) else {
                kmem_hal::sync::spin_loop();
                continue;
            };
            if self.swap().slot(entry).frame != Some(frame) {
                self.put_reference(frame);
                continue;
            }
            let flags = page.slot().flags();
            if flags.contains(SlotFlags::UP_TO_DATE) {
                return Ok(Swapped::Ready(frame));
            }
            if flags.contains(FAILED) {
                self.leave_cache(entry, frame);
                self.put_reference(frame);
                return Err(Errno::EIO);
            }
            let ticket = self.transfer_of(frame);
            self.put_reference(frame);
            match ticket {
                Some(ticket) => return Ok(Swapped::NeedIo(ticket)),
                // Done by now, or another CPU is just starting it.
                None => kmem_hal::sync::spin_loop(),
            }
        }
    }

    /// The page of an absent entry, if it is in memory all the same; the reference is the caller's. The entry may be gone meanwhile, and its
    /// slot another page's: [`AddressSpace::cached_swap`] is about an entry that stands.
    fn cached_swap(&self, payload: Payload) -> Option<Frame> {
        match Absent::of(payload) {
            Some(Absent::Swapped(entry)) => self.hold_cached(entry),
            _ => None,
        }
    }

    /// Whether the bytes of a slot are in memory as well.
    pub(crate) fn is_in_swap_cache(&self, entry: SwapEntry) -> bool {
        let frame = self.hold_cached(entry);
        frame.inspect(|&frame| self.put_reference(frame)).is_some()
    }

    /// The page that the swap cache has for a slot, whole, with a reference.
    fn hold_cached(&self, entry: SwapEntry) -> Option<Frame> {
        let frame = self.swap().slot(entry).frame?;
        let page = UserSlot::get(self.slot(frame))?;
        let here = self.swap().slot(entry).frame == Some(frame)
            && page.slot().flags().contains(SlotFlags::UP_TO_DATE);
        if !here {
            self.put_reference(frame);
        }
        here.then_some(frame)
    }

    /// Puts a fresh page into the cache for a slot and starts reading it; `None` where another was faster.
    fn read_swap(&self, entry: SwapEntry) -> Result<Option<Started>, Errno> {
        let request = FrameRequest::ONE.movable();
        let frame = self.new_page(FrameTag::Anon, 0, 0, &request)?;
        self.enter_cache(entry, frame);
        // One reference for the cache beside the maker's: as soon as the slot names the page, somebody else may give up the slot's last
        // count, and the cache's reference with it.
        let entered = self.user(frame).add_reference().is_ok()
            && (self.swap().exchange_frame(entry, None, Some(frame)) || {
                self.put_reference(frame);
                false
            });
        let outcome = match entered {
            true => self.read_entered(entry, frame),
            false => Ok(None),
        };
        self.put_reference(frame);
        outcome
    }

    /// Starts reading a page that was put into the cache, to which the caller holds a reference. Where that fails it leaves the cache; where
    /// it had left that already, as the slot was given up meanwhile, the failure is nobody's: look again.
    fn read_entered(&self, entry: SwapEntry, frame: Frame) -> Result<Option<Started>, Errno> {
        let started = self.start_transfer(entry, frame, false);
        if let Ok(Started::Done | Started::Pending(_)) = started {
            self.count(|counts| &counts.swapped_in);
            return started.map(Some);
        }
        match self.leave_cache(entry, frame) {
            true => started.map(Some),
            false => Ok(None),
        }
    }

    /// Starts reading the other slots of a cluster that somebody wants, as far as that costs nothing.
    #[doc(alias = "swap_cluster_readahead")]
    fn read_cluster(&self, entry: SwapEntry) {
        let first = entry.offset & !(CLUSTER - 1);
        for offset in (first..first + CLUSTER).filter(|&offset| offset != entry.offset) {
            let near = SwapEntry { offset, ..entry };
            let slot = self.swap().slot(near);
            if slot.count == 0 || slot.frame.is_some() {
                continue;
            }
            match self.read_swap(near) {
                Ok(Some(Started::Busy(_))) | Err(_) => return,
                Ok(_) => self.count(|counts| &counts.read_ahead),
            }
        }
    }

    /// Notes in a page that it is the one of a slot.
    pub(crate) fn enter_cache(&self, entry: SwapEntry, frame: Frame) {
        let slot = self.slot(frame);
        slot.links()
            .store(entry.to_word(), kmem_hal::sync::Ordering::Release);
        slot.set_flags(LINKS_ARE_SWAP);
    }

    /// The slot whose page this is, if it is in the swap cache.
    pub(crate) fn cache_entry(&self, frame: Frame) -> Option<SwapEntry> {
        let slot = self.slot(frame);
        if !slot.flags().contains(LINKS_ARE_SWAP) {
            return None;
        }
        let word = slot.links().load(kmem_hal::sync::Ordering::Acquire);
        SwapEntry::from_word(word).filter(|&entry| self.swap().slot(entry).frame == Some(frame))
    }

    /// Counts a slot in whose cache a page was found, if it is there still; `false` where it is not, or cannot be counted.
    ///
    /// Until it is counted a slot may be given up, and taken for another page; once it is, it stays the page's.
    pub(crate) fn count_cached(&self, entry: SwapEntry, frame: Frame) -> bool {
        let counted = self.swap().add_count(entry);
        let here = counted && self.swap().slot(entry).frame == Some(frame);
        if counted && !here {
            self.drop_swap(entry);
        }
        here
    }

    /// Takes a page out of the swap cache, if it is the one of the slot; `false` where it is not.
    ///
    /// Its bytes are on the device, or worth nothing (`I4` of swap).
    pub(crate) fn leave_cache(&self, entry: SwapEntry, frame: Frame) -> bool {
        let left = self.swap().exchange_frame(entry, Some(frame), None);
        if left {
            self.put_reference(frame);
        }
        left
    }

    /// Gives up a count of a slot: an entry is gone.
    pub(crate) fn drop_swap(&self, entry: SwapEntry) {
        if let Some(frame) = self.swap().sub_count(entry) {
            self.put_reference(frame);
        }
    }

    /// Gives up what an absent entry stood for.
    pub(crate) fn drop_payload(&self, payload: Payload) {
        if let Some(Absent::Swapped(entry)) = Absent::of(payload) {
            self.drop_swap(entry);
        }
    }

    /// Counts one more entry like this; `false` where that cannot be counted.
    pub(crate) fn copy_payload(&self, payload: Payload) -> bool {
        match Absent::of(payload) {
            Some(Absent::Swapped(_)) if mutant!("copied-swap-entry-not-counted") => true,
            Some(Absent::Swapped(entry)) => self.swap().add_count(entry),
            // The mover counts what it finds.
            _ => true,
        }
    }

    /// Starts to use a device for swap: as many of its blocks as there are slots. Gives the area's number.
    ///
    /// # Errors
    ///
    /// [`Errno::EPERM`] where [`SWAP_AREAS`](crate::SWAP_AREAS) are in use, [`Errno::EBUSY`] where the slots are another area's;
    /// [`Errno::EINVAL`] where there is not one block, or a slot is not free.
    #[doc(alias = "swapon")]
    pub fn swap_on(
        &self,
        device: &'m (dyn BlockDevice + Sync),
        slots: &'m [SwapSlot],
    ) -> Result<u8, Errno> {
        let blocks = usize::try_from(device.blocks()).unwrap_or(usize::MAX);
        let slots = &slots[..slots.len().min(blocks)];
        if slots.is_empty() || slots.iter().any(|slot| !slot.is_free()) {
            return Err(Errno::EINVAL);
        }
        // SAFETY: only the lifetime is erased, as in `open_file`: 'm outlives this `Mm`.
        let device = unsafe {
            core::mem::transmute::<
                NonNull<dyn BlockDevice + Sync + 'm>,
                NonNull<dyn BlockDevice + Sync + 'static>,
            >(NonNull::from(device))
        };
        // SAFETY: both live for 'm.
        unsafe { self.swap().add(device, NonNull::from(slots)) }
    }

    /// Stops using a swap area: brings in every page that is there.
    ///
    /// From the first call on no page goes there any more. Where the answer is a ticket, call again once that I/O is done; the area
    /// is still in use until the answer is `None`.
    ///
    /// # Errors
    ///
    /// [`Errno::EINVAL`] where there is no such area; [`Errno::ENOMEM`] where memory has no room for its pages, [`Errno::EIO`], and
    /// [`Errno::EBUSY`] where another call is about to give pages up that are there (call again): then it takes pages again.
    #[doc(alias = "swapoff")]
    #[doc(alias = "try_to_unuse")]
    pub fn swap_off(&self, area: u8) -> Result<Option<IoTicket>, Errno> {
        self.swap().set_open(area, false)?;
        let outcome = self.bring_all_in(area);
        if outcome.is_err() {
            let _ = self.swap().set_open(area, true);
        }
        match outcome? {
            Some(ticket) => Ok(Some(ticket)),
            None => match self.poll_swap() {
                // A write whose page nobody wants any more.
                Some(ticket) if self.swap().used_from(area, 0).is_some() => Ok(Some(ticket)),
                _ => {
                    let removed = self.swap().remove(area);
                    if removed.is_err() {
                        let _ = self.swap().set_open(area, true);
                    }
                    removed.map(|()| None)
                }
            },
        }
    }

    fn bring_all_in(&self, area: u8) -> Result<Option<IoTicket>, Errno> {
        let spaces = self.registry().lock();
        let mut outcome = Ok(None);
        for core in spaces.iter(self) {
            // SAFETY: the list is locked.
            let space = unsafe { AddressSpace::borrowed(core) };
            let flow = space.for_each_swapped(|vma, page, payload, entry| {
                if entry.area != area {
                    return ControlFlow::Continue(());
                }
                match space.bring_back(vma, page, payload, entry) {
                    Ok(None) => ControlFlow::Continue(()),
                    Ok(Some(ticket)) => {
                        outcome = Ok(Some(ticket));
                        ControlFlow::Break(())
                    }
                    Err(error) => {
                        outcome = Err(error);
                        ControlFlow::Break(())
                    }
                }
            });
            if flow.is_break() {
                return outcome;
            }
        }
        drop(spaces);
        self.bring_shared_in(area)
    }
}

impl<E: Env> AddressSpace<'_, E> {
    /// A fault on a page that is not there, whose entry says where it is.
    #[doc(alias = "do_swap_page")]
    pub(crate) fn fault_absent(
        &self,
        vma: &Vma,
        page: Page,
        payload: Payload,
        address: VirtAddr,
    ) -> Result<(), Stop> {
        let absent = Absent::of(payload);
        if absent == Some(Absent::Guard) {
            return Err(Stop::Outcome(Outcome::Signal {
                signal: Signal::MapError,
                address,
            }));
        }
        let Some(Absent::Swapped(entry)) = absent else {
            // Being moved: there again in a moment.
            kmem_hal::sync::spin_loop();
            return Ok(());
        };
        match self.bring_back(vma, page, payload, entry) {
            Ok(None) => Ok(()),
            Ok(Some(ticket)) => Err(Stop::Outcome(Outcome::NeedIo(ticket))),
            Err(Errno::EIO) => Err(Stop::Outcome(Outcome::Signal {
                signal: Signal::BusError,
                address,
            })),
            Err(error) => Err(error.into()),
        }
    }

    /// Maps the page of a swap entry in its place, for every space that shares the table; a ticket where it must be read first.
    fn bring_back(
        &self,
        vma: &Vma,
        page: Page,
        payload: Payload,
        entry: SwapEntry,
    ) -> Result<Option<IoTicket>, Errno> {
        let mm = self.mm();
        let ahead = !vma.flags.contains(VmFlags::RAND_READ);
        loop {
            let frame = match mm.swapped_page(entry, ahead)? {
                Swapped::Ready(frame) => frame,
                Swapped::NeedIo(ticket) => return Ok(Some(ticket)),
                Swapped::Gone => return Ok(None),
            };
            let outcome = self.map_back(vma, page, payload, entry, frame);
            if outcome == Ok(true) {
                mm.drop_swap(entry);
            }
            mm.put_reference(frame);
            // Where the entry still stands, its page left the cache, or moved, since the look-up.
            if outcome != Ok(false) || self.payload_at(page) != Some(payload) {
                return outcome.map(|_| None);
            }
        }
    }

    /// Maps the page that was found for a swap entry; `false` where the entry was replaced or the page is not the slot's any more.
    fn map_back(
        &self,
        vma: &Vma,
        page: Page,
        payload: Payload,
        entry: SwapEntry,
        frame: Frame,
    ) -> Result<bool, Errno> {
        let mm = self.mm();
        let family = self.core().entry.family();
        let Ok(mut cursor) = self.tables().cursor(PageRange::single(page)) else {
            return Err(Errno::EFAULT);
        };
        // While the entry stands, its slot is counted and becomes no other page's. Before the lock it could, and that page keeps its name.
        let stands = cursor.look(page).0 == Entry::Payload(payload);
        if !stands || mm.swap().slot(entry).frame != Some(frame) {
            return Ok(false);
        }
        mm.user(frame).set_object(family, vma.object_page(page));
        let mapping = mm.map_page(frame)?;
        // Whoever writes next decides under the table's lock whether the page is its own by then.
        let attributes = attributes(vma.flags).accessed().write_protected();
        let outcome = cursor.restore(page, payload, mapping, attributes);
        cursor.release();
        match outcome {
            Ok(()) => Ok(true),
            Err(mapping) => {
                // Somebody else brought it back, or took the entry away.
                mm.put(mapping);
                Ok(false)
            }
        }
    }

    /// The page of an entry that stands, if it is in memory all the same; the reference is the caller's.
    pub(crate) fn cached_swap(&self, page: Page, payload: Payload) -> Option<Frame> {
        let mm = self.mm();
        let frame = mm.cached_swap(payload)?;
        let stands = self
            .tables()
            .cursor(PageRange::single(page))
            .is_ok_and(|mut cursor| {
                // As in `map_back`: the entry, under its table's lock, and then the slot that it counts.
                let Some(Absent::Swapped(entry)) = Absent::of(payload) else {
                    return false;
                };
                cursor.look(page).0 == Entry::Payload(payload)
                    && mm.swap().slot(entry).frame == Some(frame)
            });
        if !stands {
            mm.put_reference(frame);
        }
        stands.then_some(frame)
    }

    /// Shows every entry of swap in the space's tables.
    pub(crate) fn for_each_swapped(
        &self,
        mut show: impl FnMut(&Vma, Page, Payload, SwapEntry) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let state = self.read();
        for vma in state.vmas.iter() {
            let Some(range) = vma.range.intersection(self.all_pages()) else {
                continue;
            };
            let mut next = Some(range.first());
            while let Some((page, payload)) = next.and_then(|from| self.next_payload(from, range)) {
                if let Some(Absent::Swapped(entry)) = Absent::of(payload) {
                    show(&vma, page, payload, entry)?;
                }
                next = page.checked_add(1).filter(|next| range.contains(*next));
            }
        }
        ControlFlow::Continue(())
    }

    /// The first entry that is absent and says something, from a page on.
    pub(crate) fn next_payload(&self, from: Page, range: PageRange) -> Option<(Page, Payload)> {
        let rest = PageRange::new(from, range.last())?;
        let mut cursor = self.tables().cursor(rest).ok()?;
        while let Some(run) = cursor.next_run() {
            if let Run::Payload(page, payload) = run {
                return Some((page, payload));
            }
        }
        None
    }

    /// The payload of a page's entry, if it is absent and says something.
    pub(crate) fn payload_at(&self, page: Page) -> Option<Payload> {
        match self.tables().query(page) {
            Entry::Payload(payload) => Some(payload),
            _ => None,
        }
    }

    /// Shows every page of the space that is in swap, and where. `show` runs under the space's lock, as a visitor of
    /// [`for_each_vma`](Self::for_each_vma).
    pub fn for_each_swap_entry(&self, mut show: impl FnMut(Page, SwapEntry)) {
        let _ = self.for_each_swapped(|_, page, _, entry| {
            show(page, entry);
            ControlFlow::Continue(())
        });
    }

    /// Pages of the space that are in swap: `VmSwap`.
    #[doc(alias = "VmSwap")]
    #[must_use]
    pub fn swapped(&self) -> u64 {
        let mut pages = 0;
        let _ = self.for_each_swapped(|_, _, _, _| {
            pages += 1;
            ControlFlow::Continue(())
        });
        pages
    }
}
