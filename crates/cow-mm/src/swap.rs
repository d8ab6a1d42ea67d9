//! Swap areas: where anonymous pages go that memory has no room for, and who still wants them.
//!
//! ```text
//!   area ── device of blocks
//!      └─── slots, one word each     63          24 23     0
//!                                    [ frame + 1   ][ count ]     0 = free
//!
//!   entry in a page table ──┐
//!   entry of a relative   ──┼──> slot 7: count 3, frame 0x1234      the swap cache: the page is in memory as well
//!   a write on its way    ──┘
//! ```
//!
//! Each slot counts those who want its bytes: page-table entries (one for each table, however many spaces share that), transfers on their
//! way, and whoever is about to make an entry. It also names the frame in which the page is at the moment, if there is one: that is the swap
//! cache. It needs no tree and no memory, which a cache that grows while memory runs out must not.
//!
//! Invariants
//! - `I1`: a slot with count 0 is the zero word: it belongs to nobody, and its frame's reference was given back by whoever took the last
//!   count.
//! - `I2`: a frame that a slot names holds one reference for it, and the frame's slot names the swap slot in its word of links.
//! - `I3`: a page in the swap cache is exclusive to nobody, as it has that reference; so while it is there its bytes do not change, and
//!   every entry that names the slot may map it.
//! - `I4`: a page leaves the cache only with its bytes on the device (not `DIRTY`), or with the last count.
//! - `I5`: a count stops at its limit: whoever cannot be counted fails, and a slot is never reused early.
//!
//! Costs: 8 bytes a slot (Linux: one, two with a cluster's share, and 8 in a tree for each cached page), lent by the kernel. Taking and
//! giving counts is one compare-and-exchange; finding a free slot goes on where the last search ended.
//!
//! Not handled: a map of bad blocks, priorities (areas are filled in order of their numbers), compression.
//!
//! Source: Linux `mm/swapfile.c`, `mm/swap_state.c` (the rules); Bovet and Cesati, chapter 17.

use core::fmt;
use core::ptr::NonNull;

use kmem_hal::lock::{IrqSafe, Lock};
use kmem_hal::sync::{AtomicU64, Ordering};
use kmem_hal::{BlockDevice, Frame, IoError, IoState, IoTicket};

pub use crate::absent::{SWAP_AREAS, SwapEntry};
use crate::errno::Errno;

const COUNT_BITS: u32 = 24;
const COUNT_MASK: u64 = (1 << COUNT_BITS) - 1;

/// What kmem knows of one slot of a swap area: 8 bytes. A kernel lends an array of them to [`Mm::swap_on`](crate::Mm::swap_on).
#[derive(Debug)]
pub struct SwapSlot(AtomicU64);

impl SwapSlot {
    /// A free slot.
    #[must_use]
    pub fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    pub(crate) fn is_free(&self) -> bool {
        self.0.load(Ordering::Acquire) == 0
    }
}

impl Default for SwapSlot {
    fn default() -> Self {
        Self::new()
    }
}

/// What a slot says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    pub count: u64,
    pub frame: Option<Frame>,
}

fn decode(word: u64) -> Slot {
    Slot {
        count: word & COUNT_MASK,
        frame: (word >> COUNT_BITS).checked_sub(1).map(Frame::from_number),
    }
}

fn encode(slot: Slot) -> u64 {
    slot.frame.map_or(0, |frame| frame.number() + 1) << COUNT_BITS | slot.count
}

/// An area in use. Copied out, so that nobody holds a lock while a device is at work.
#[derive(Clone, Copy)]
struct Area {
    device: NonNull<dyn BlockDevice + Sync>,
    slots: NonNull<[SwapSlot]>,
    /// Whether new pages may go there.
    open: bool,
    /// Where the search for a free slot goes on.
    hand: usize,
}

/// All areas of a kernel.
pub(crate) struct Swap {
    areas: Lock<[Option<Area>; SWAP_AREAS], IrqSafe>,
}

// SAFETY: devices and slots are shared by contract of `swap_on`, which took them for the life of the `Mm`.
unsafe impl Send for Swap {}
// SAFETY: as above.
unsafe impl Sync for Swap {}

/// Pages of swap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SwapTotals {
    /// Slots of all areas (`SwapTotal`).
    pub total: u64,
    /// Free ones (`SwapFree`).
    pub free: u64,
    /// Slots whose page is in memory as well (`SwapCached`).
    pub cached: u64,
}

impl Swap {
    pub fn new() -> Self {
        Self {
            areas: Lock::new([None; SWAP_AREAS]),
        }
    }

    fn area(&self, number: u8) -> Option<Area> {
        *self.areas.lock().get(usize::from(number))?
    }

    /// Adds an area.
    ///
    /// # Safety
    ///
    /// Device and slots live as long as this value.
    pub unsafe fn add(
        &self,
        device: NonNull<dyn BlockDevice + Sync>,
        slots: NonNull<[SwapSlot]>,
    ) -> Result<u8, Errno> {
        let mut areas = self.areas.lock();
        // SAFETY: `add` was promised slots that live.
        let wanted = unsafe { slots.as_ref() }.as_ptr_range();
        let taken = areas.iter().flatten().any(|area| {
            let has = slots_of(area).as_ptr_range();
            has.start < wanted.end && wanted.start < has.end
        });
        if taken {
            return Err(Errno::EBUSY);
        }
        let number = areas.iter().position(Option::is_none).ok_or(Errno::EPERM)?;
        areas[number] = Some(Area {
            device,
            slots,
            open: true,
            hand: 0,
        });
        Ok(number as u8)
    }

    /// Lets no new page into an area, or lets them in again.
    pub fn set_open(&self, number: u8, open: bool) -> Result<(), Errno> {
        let mut areas = self.areas.lock();
        let area = areas.get_mut(usize::from(number)).and_then(Option::as_mut);
        area.ok_or(Errno::EINVAL)?.open = open;
        Ok(())
    }

    /// Forgets an area in which every slot is free.
    pub fn remove(&self, number: u8) -> Result<(), Errno> {
        let mut areas = self.areas.lock();
        let area = areas.get(usize::from(number)).copied().flatten();
        let used = slots_of(&area.ok_or(Errno::EINVAL)?)
            .iter()
            .any(|slot| slot.0.load(Ordering::Acquire) != 0);
        if used {
            return Err(Errno::EBUSY);
        }
        areas[usize::from(number)] = None;
        Ok(())
    }

    /// A free slot for the page in `frame`, counted once: the caller's.
    pub fn take(&self, frame: Frame) -> Option<SwapEntry> {
        let taken = encode(Slot {
            count: 1,
            frame: Some(frame),
        });
        for number in 0..SWAP_AREAS as u8 {
            let Some(area) = self.area(number).filter(|area| area.open) else {
                continue;
            };
            let slots = slots_of(&area);
            let order = (area.hand.min(slots.len())..slots.len()).chain(0..area.hand);
            for at in order {
                let free = &slots[at].0;
                if free.load(Ordering::Relaxed) == 0
                    && free
                        .compare_exchange(0, taken, Ordering::AcqRel, Ordering::Relaxed)
                        .is_ok()
                {
                    let mut areas = self.areas.lock();
                    let still = areas[usize::from(number)]
                        .as_mut()
                        .filter(|now| now.open && core::ptr::eq(slots_of(now), slots));
                    let Some(now) = still else {
                        // Closed or removed since it was copied out: nobody was told of the slot.
                        free.store(0, Ordering::Release);
                        break;
                    };
                    now.hand = (at + 1) % slots.len();
                    return Some(SwapEntry {
                        area: number,
                        offset: at as u64,
                    });
                }
            }
        }
        None
    }

    fn with<R>(&self, entry: SwapEntry, f: impl FnOnce(&AtomicU64) -> R) -> Option<R> {
        let area = self.area(entry.area)?;
        slots_of(&area)
            .get(usize::try_from(entry.offset).ok()?)
            .map(|slot| f(&slot.0))
    }

    /// What a slot says now.
    pub fn slot(&self, entry: SwapEntry) -> Slot {
        let word = self.with(entry, |slot| slot.load(Ordering::Acquire));
        decode(word.unwrap_or(0))
    }

    /// Counts one who wants the slot's bytes beside those who do; `false` at the limit (`I5`), or where nobody does.
    #[doc(alias = "swap_duplicate")]
    pub fn add_count(&self, entry: SwapEntry) -> bool {
        let step = |word: u64| match word & COUNT_MASK {
            0 | COUNT_MASK => None,
            _ => Some(word + 1),
        };
        self.with(entry, |slot| {
            slot.fetch_update(Ordering::AcqRel, Ordering::Acquire, step)
                .is_ok()
        })
        .unwrap_or(false)
    }

    /// Takes a count away. The last frees the slot, and gives the frame whose reference is the caller's to give back.
    #[doc(alias = "swap_free")]
    #[must_use]
    pub fn sub_count(&self, entry: SwapEntry) -> Option<Frame> {
        let step = |word: u64| match word & COUNT_MASK {
            0 => None,
            1 => Some(0),
            _ => Some(word - 1),
        };
        let before = self.with(entry, |slot| {
            slot.fetch_update(Ordering::AcqRel, Ordering::Acquire, step)
        });
        let before = decode(before?.ok()?);
        before.frame.filter(|_| before.count == 1)
    }

    /// Changes the frame of a slot that is counted from `from` to `to`; `false` where it was another.
    pub fn exchange_frame(&self, entry: SwapEntry, from: Option<Frame>, to: Option<Frame>) -> bool {
        let step = |word: u64| {
            let slot = decode(word);
            (slot.count > 0 && slot.frame == from).then(|| encode(Slot { frame: to, ..slot }))
        };
        self.with(entry, |slot| {
            slot.fetch_update(Ordering::AcqRel, Ordering::Acquire, step)
                .is_ok()
        })
        .unwrap_or(false)
    }

    /// Starts reading a slot's block.
    pub fn read(&self, entry: SwapEntry, frame: Frame) -> Result<IoState, IoError> {
        let area = self.area(entry.area).ok_or(IoError::OutOfRange)?;
        // SAFETY: `add`: the device lives as long as this value.
        unsafe { area.device.as_ref() }.read(entry.offset, frame)
    }

    /// Starts writing a slot's block.
    pub fn write(&self, entry: SwapEntry, frame: Frame) -> Result<IoState, IoError> {
        let area = self.area(entry.area).ok_or(IoError::OutOfRange)?;
        // SAFETY: as in `read`.
        unsafe { area.device.as_ref() }.write(entry.offset, frame)
    }

    /// How a transfer of an area stands.
    pub fn poll(&self, area: u8, ticket: IoTicket) -> Result<IoState, IoError> {
        let area = self.area(area).ok_or(IoError::UnknownTicket)?;
        // SAFETY: as in `read`.
        unsafe { area.device.as_ref() }.poll(ticket)
    }

    /// Counts the slots of all areas.
    pub fn totals(&self) -> SwapTotals {
        let mut totals = SwapTotals::default();
        for number in 0..SWAP_AREAS as u8 {
            let area = self.area(number);
            for slot in area.iter().flat_map(slots_of) {
                let slot = decode(slot.0.load(Ordering::Relaxed));
                totals.total += 1;
                totals.free += u64::from(slot.count == 0);
                totals.cached += u64::from(slot.frame.is_some());
            }
        }
        totals
    }

    /// The slots of an area that are used, from `offset` on, and what they say.
    pub fn used_from(&self, number: u8, offset: u64) -> Option<(SwapEntry, Slot)> {
        let area = self.area(number)?;
        let slots = slots_of(&area);
        (usize::try_from(offset).ok()?..slots.len()).find_map(|at| {
            let slot = decode(slots[at].0.load(Ordering::Acquire));
            let entry = SwapEntry {
                area: number,
                offset: at as u64,
            };
            (slot.count > 0).then_some((entry, slot))
        })
    }
}

fn slots_of(area: &Area) -> &[SwapSlot] {
    // SAFETY: `add`: the slots live as long as the value that the area was copied from, which every caller borrows.
    unsafe { area.slots.as_ref() }
}

impl fmt::Debug for Swap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Swap({:?})", self.totals())
    }
}
