//! Reclaim: making room by letting pages go that can come back.
//!
//! ```text
//!   hand ──> page ── used? locked? pinned? ── policy: keep ──> next
//!                                               └─ evict
//!      file, clean ───────────────> out of every table ──> out of the page cache ──> free
//!      file, dirty ── write back ──> then as clean
//!      anonymous ── slot of swap ──> out of every table, entries name the slot ── write ── done ──> free
//!      shared memory ── the same, and its object's tree names the slot
//!      anonymous, lazily freed and not written since ──> out of every table ──> free
//!      of a droppable mapping ──> the same, written or not
//! ```
//!
//! A page that is being written stays in the swap cache, and a fault maps it back without I/O.
//!
//! Reclaim needs no memory: slots are lent beforehand, entries are replaced where they are, in tables that spaces share too. Nothing below an
//! address space's calls waits for it: they answer `OutOfMemory` (or ENOMEM) with everything let go, and the kernel calls
//! [`Reclaimer::reclaim`] then, or has [`AddressSpace::fault_with`](crate::AddressSpace::fault_with) do it.
//!
//! Invariants
//! - `I1`: a page is freed only when nobody maps it and no reference but reclaim's own is left, and its bytes are on a device or worth
//!   nothing.
//! - `I2`: whoever reclaims, moves or writes a page holds its `LOCKED` bit: one at a time.
//! - `I3`: a page with a reference that nobody here accounts for (a pin, a copy that is just made, a device) stays.
//!
//! Costs: for a page that stays, a look through the reverse map; for one that goes, another and a flush of its translations on the
//! CPUs that run its spaces. A call ends with one flush of each space whose accessed bits it cleared (Linux leaves that out on x86, and
//! waits until the TLB forgets by itself).
//!
//! Not handled: huge pages, one flush for many pages.
//!
//! Context: task context, no lock of a space or an object held.
//!
//! Source: Linux `mm/vmscan.c` (`shrink_folio_list`: what has to be asked of a page, and in which order).

use kmem_hal::{Frame, FrameTag, IoTicket, Order, PhysMap, SECTION_FRAMES, SlotFlags, UserSlot};
use kmem_paging::{Env as _, TableCache};

use crate::absent::Absent;
use crate::env::Env;
use crate::mm::Mm;
use crate::mutants::mutant;
use crate::replacement::{Clock, Replacement, Verdict};
use crate::rmap::Refused;
use crate::swap::SwapEntry;
use crate::transfer::Started;

/// An anonymous page that its process gave up (`MADV_FREE`): it goes without a copy unless it is written again.
pub(crate) const LAZY_FREE: SlotFlags = SlotFlags::OWNER_1;

/// Rounds of the hand in one call at most: one to take the accessed bits away, one to find who got none, and two more for policies that
/// wait longer.
const ROUNDS: u64 = 4;

/// What a call of [`Reclaimer::reclaim`] did. Pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reclaimed {
    /// Freed.
    pub freed: u64,
    /// Judged.
    pub scanned: u64,
    /// Emptied page tables that were kept for the next ones, and given back because there were not pages enough.
    pub tables: u64,
    /// On their way to a device: they become free when that is done ([`Mm::poll_swap`]).
    pub writing: u64,
    /// What to wait for where nothing could be freed at once.
    pub ticket: Option<IoTicket>,
}

/// What became of a page that should go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Evicted {
    Freed,
    Writing(Option<IoTicket>),
    Kept,
}

/// A hand that goes round over the frames, and the policy that it asks.
///
/// A kernel has one for its background thread, or one for each caller: they may run at the same time.
///
/// # Examples
///
/// ```no_run
/// # fn demo<E: kmem_cow_mm::Env>(mm: &kmem_cow_mm::Mm<'_, E>) {
/// use kmem_cow_mm::{Reclaimer, replacement::Clock};
///
/// let mut reclaimer = Reclaimer::new(Clock);
/// let made = reclaimer.reclaim(mm, 32);
/// println!("{} pages freed, {} on their way to the disk", made.freed, made.writing);
/// # }
/// ```
#[doc(alias = "kswapd")]
#[derive(Clone, Copy, Debug)]
pub struct Reclaimer<P = Clock> {
    policy: P,
    hand: u64,
}

impl<P: Replacement> Reclaimer<P> {
    /// A hand at the first frame.
    #[must_use]
    pub const fn new(policy: P) -> Self {
        Self { policy, hand: 0 }
    }

    /// The policy.
    #[must_use]
    pub const fn policy(&self) -> &P {
        &self.policy
    }

    /// Frees `target` pages, or as many as four rounds of the hand find; what is missing then is made up from the emptied page tables that
    /// [`TableCache`](kmem_paging::TableCache) keeps.
    ///
    /// Context: task context, no lock of a space or an object held; may wait for other CPUs, not for devices.
    #[doc(alias = "shrink_node")]
    #[doc(alias = "try_to_free_pages")]
    pub fn reclaim<E: Env>(&mut self, mm: &Mm<'_, E>, target: u64) -> Reclaimed {
        let mut made = Reclaimed::default();
        let before = mm.events().freed;
        made.ticket = mm.poll_swap();
        let end = mm.frame_end();
        let mut left = end.saturating_mul(ROUNDS);
        while left > 0 && mm.events().freed - before < target {
            if self.hand >= end {
                self.hand = 0;
                self.policy.round();
            }
            let frame = Frame::from_number(self.hand);
            let Some(slot) = mm.env().paging().slots().used_slot(frame) else {
                // A section without memory.
                let next = (self.hand / SECTION_FRAMES + 1) * SECTION_FRAMES;
                left = left.saturating_sub(next - self.hand);
                self.hand = next;
                continue;
            };
            self.hand += 1;
            left -= 1;
            if !matches!(slot.tag(), FrameTag::Anon | FrameTag::File) {
                continue;
            }
            match mm.with_page(frame, |page| self.judge(mm, frame, page)) {
                Some(Evicted::Writing(ticket)) => {
                    made.writing += 1;
                    made.ticket = made.ticket.or(ticket);
                }
                Some(_) => made.scanned += 1,
                None => {}
            }
        }
        mm.flush_aged();
        made.freed = mm.events().freed - before;
        let missing = target.saturating_sub(made.freed + made.writing);
        let missing = usize::try_from(missing).unwrap_or(usize::MAX);
        made.tables = TableCache::shrink(mm.env().paging(), missing) as u64;
        made
    }

    fn judge<E: Env>(&mut self, mm: &Mm<'_, E>, frame: Frame, page: UserSlot<'_>) -> Evicted {
        if !mm.may_go(frame, page) {
            return Evicted::Kept;
        }
        mm.count(|counts| &counts.scanned);
        let looked = mm.look_at_mappings(frame, true);
        if looked.locked && !mutant!("locked-page-goes") {
            return Evicted::Kept;
        }
        let used = looked.accessed || page.slot().flags().contains(SlotFlags::REFERENCED);
        page.slot().clear_flags(SlotFlags::REFERENCED);
        match self.policy.judge(page.age(), used) {
            Verdict::Keep(age) => {
                page.set_age(age);
                Evicted::Kept
            }
            Verdict::Evict => mm.evict(frame, page),
        }
    }
}

impl<E: Env> Mm<'_, E> {
    /// The number after that of the last frame that may be a page's.
    pub(crate) fn frame_end(&self) -> u64 {
        let last = self.env().paging().map().reach().last();
        last.map_or(0, |last| last.number() + 1)
    }

    /// Runs `f` on a page that lives, with a reference and the page's lock; `None` where it is none, or somebody else has the lock.
    ///
    /// A page that nobody else holds after `f` is freed, and counted as such.
    pub(crate) fn with_page<R>(
        &self,
        frame: Frame,
        f: impl FnOnce(UserSlot<'_>) -> R,
    ) -> Option<R> {
        let page = UserSlot::get(self.env().paging().slots().slot(frame)?)?;
        let outcome = page.slot().try_lock().then(|| {
            let outcome = f(page);
            page.slot().unlock();
            outcome
        });
        self.put_reclaimed(frame);
        outcome
    }

    /// Gives a reference back; a page that goes with it was reclaimed.
    pub(crate) fn put_reclaimed(&self, frame: Frame) {
        if self.user(frame).sub_reference() == Ok(0) {
            self.free_page(frame, Order::ZERO);
            self.count(|counts| &counts.freed);
        }
    }

    /// Whether a page is one that can go at all: of one frame, of somebody's memory, and held by nobody unknown.
    pub(crate) fn may_go(&self, frame: Frame, page: UserSlot<'_>) -> bool {
        let flags = page.slot().flags();
        frame != self.zero_page()
            && page.slot().order() == Order::ZERO
            && !flags.intersects(SlotFlags::WRITEBACK | SlotFlags::PINNED)
            && (page.object() != 0 || self.cache_entry(frame).is_some())
            && self.held_by_nobody_else(frame, page)
    }

    /// Whether all references are the mappings', a cache's, and the caller's (`I3`).
    pub(crate) fn held_by_nobody_else(&self, frame: Frame, page: UserSlot<'_>) -> bool {
        let cached = match page.slot().tag() {
            FrameTag::File => true,
            _ => self.cache_entry(frame).is_some(),
        };
        page.references() == 1 + u32::from(page.mappings() > 0) + u32::from(cached)
    }

    /// Lets a page go that the caller has locked and holds a reference of.
    #[doc(alias = "pageout")]
    pub(crate) fn evict(&self, frame: Frame, page: UserSlot<'_>) -> Evicted {
        match page.slot().tag() {
            FrameTag::Anon if page.slot().flags().contains(LAZY_FREE) => {
                self.evict_lazily_freed(frame, page)
            }
            FrameTag::Anon if self.is_droppable(frame) => self.evict_droppable(frame, page),
            FrameTag::Anon => self.evict_anonymous(frame, page),
            _ => self.evict_of_file(frame, page),
        }
    }

    /// A page that was given up: without its bytes, unless it was written since.
    fn evict_lazily_freed(&self, frame: Frame, page: UserSlot<'_>) -> Evicted {
        let shared = self.look_at_mappings(frame, false).shared;
        if shared || page.mappings() > 1 || self.cache_entry(frame).is_some() {
            page.slot().clear_flags(LAZY_FREE);
            return Evicted::Kept;
        }
        match self.discard_clean(frame) {
            // Written since, or somebody wants it.
            Ok(false) | Err(_) => {
                page.slot().clear_flags(LAZY_FREE);
                Evicted::Kept
            }
            Ok(true) => Evicted::Freed,
        }
    }

    /// Whether a page is one of a mapping whose pages may go at any time. Costs a look at its mappings once there has been such a mapping.
    fn is_droppable(&self, frame: Frame) -> bool {
        self.has_droppable() && self.look_at_mappings(frame, false).droppable
    }

    /// A page that may go at any time ([`MapFlags::DROPPABLE`](crate::MapFlags::DROPPABLE)): without its bytes.
    fn evict_droppable(&self, frame: Frame, page: UserSlot<'_>) -> Evicted {
        let spaces = self.registry().lock();
        let unmapped = self.unmap_everywhere(&spaces, frame, |_| match self.pins_of(frame) {
            0 => Ok(None),
            _ => Err(Refused::Pinned),
        });
        match unmapped.is_ok() && page.mappings() == 0 {
            true => Evicted::Freed,
            false => Evicted::Kept,
        }
    }

    /// An anonymous page: to swap.
    fn evict_anonymous(&self, frame: Frame, page: UserSlot<'_>) -> Evicted {
        // A count of the slot for as long as this function makes entries for it.
        let entry = match self.cache_entry(frame) {
            Some(entry) if self.count_cached(entry, frame) => entry,
            Some(_) => return Evicted::Kept,
            None => {
                // Before the slot names the frame, whose reference for it this is.
                if page.add_reference().is_err() {
                    return Evicted::Kept;
                }
                let Some(entry) = self.swap().take(frame) else {
                    self.put_reference(frame);
                    return Evicted::Kept;
                };
                page.slot()
                    .set_flags(SlotFlags::UP_TO_DATE | SlotFlags::DIRTY);
                self.enter_cache(entry, frame);
                entry
            }
        };
        let outcome = self.swap_out(frame, page, entry);
        self.drop_swap(entry);
        outcome
    }

    fn swap_out(&self, frame: Frame, page: UserSlot<'_>, entry: SwapEntry) -> Evicted {
        let Some(payload) = Absent::Swapped(entry).payload::<E::Format>() else {
            return Evicted::Kept;
        };
        if page.mappings() > 0 {
            let spaces = self.registry().lock();
            let unmapped = self.unmap_everywhere(&spaces, frame, |_| {
                // Whoever pinned it found it exclusive before this function's caller had its reference, and under this table's lock (`P1` of
                // pins); whoever comes later finds it held. Linux: `folio_try_share_anon_rmap_pte`.
                if self.pins_of(frame) > 0 {
                    return Err(Refused::Pinned);
                }
                // In the cache it is nobody's alone (`I3` of swap): a write from here on makes a copy.
                page.slot().clear_flags(SlotFlags::EXCLUSIVE);
                // The entry's count, before the entry.
                match self.swap().add_count(entry) {
                    true => Ok(Some(payload)),
                    false => Err(Refused::Unencodable),
                }
            });
            if unmapped.is_err() {
                return Evicted::Kept;
            }
        }
        if page.mappings() > 0 || !self.held_by_nobody_else(frame, page) {
            return Evicted::Kept;
        }
        self.write_to_swap(frame, entry)
    }

    /// Lets a page of the swap cache that nobody maps go, written first if the slot has not its bytes.
    pub(crate) fn write_to_swap(&self, frame: Frame, entry: SwapEntry) -> Evicted {
        let dirty = self.slot(frame).flags().contains(SlotFlags::DIRTY);
        if dirty && !mutant!("swapped-page-not-written") {
            match self.start_transfer(entry, frame, true) {
                // The end of the transfer took it out of the cache.
                Ok(Started::Done) => {
                    self.count(|counts| &counts.swapped_out);
                    return Evicted::Freed;
                }
                Ok(Started::Pending(ticket)) => {
                    self.count(|counts| &counts.swapped_out);
                    return Evicted::Writing(Some(ticket));
                }
                Ok(Started::Busy(ticket)) => return Evicted::Writing(Some(ticket)),
                Err(_) => return Evicted::Kept,
            }
        }
        match self.leave_cache(entry, frame) {
            true => Evicted::Freed,
            false => Evicted::Kept,
        }
    }
}
