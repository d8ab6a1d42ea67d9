//! The slot of a page table, typed.
//!
//! ```text
//!  word 0   63      32 31   16 15   8 7    0
//!           [ shares  ][flags][order][Table]   shares: upper entries (or loaded roots) that point at the table
//!  word 1   63                        2 1 0
//!           [ root frame, or list id   ][kind]  kind: 0 nobody, 1 one space, 2 an owner list
//!  word 2   63      32 31     20 19 16 15   0
//!           [  pins   ][ spare  ][level][live]  live: entries that are not empty; level: 1 = leaf
//!  word 3   63   52 51                     0
//!           [spare ][ first page it covers  ]   while it is part of a tree
//!           [ previous ][ next ]                once it is detached (STRAY): links of the gather's list
//! ```
//!
//! Invariants
//! - `T1`: words 1 to 3 change only under the slot's lock bit ([`FrameSlot::lock`]), or before the table is reachable, or
//!   after the grace period that follows its detachment. They are read without the lock as hints.
//! - `T2`: `live` is the number of entries of the table that are not empty, whenever the lock is free.
//! - `T3`: `STRAY` is set, once, under the lock, by whoever cleared the last entry that pointed at the table. A walker that
//!   takes the lock and finds `STRAY` starts again from the root; a stray table is never linked in again.
//! - `T4`: while `shares` is more than 1 the table and everything below it is read-only, and every entry above it is
//!   write-protected. `shares` goes from 1 to 2 only under the lock.
//!
//! The field widths: `live` counts to 1024 (a table of x86's two-level format) and so needs 11 bits; it has 16. `pins`
//! has 32, like every count of the family that user programs can drive up.

use super::slot::{FrameSlot, FrameTag, SlotFlags};
use crate::frame::{Frame, Order};
use crate::page::Page;
use crate::sync::Ordering;

const LIVE_MASK: u64 = 0xffff;
const LEVEL_SHIFT: u32 = 16;
const LEVEL_MASK: u64 = 0xf << LEVEL_SHIFT;
const PINS_SHIFT: u32 = 32;
const PINS_MASK: u64 = (u32::MAX as u64) << PINS_SHIFT;
const KIND_MASK: u64 = 3;
const PAGE_MASK: u64 = Page::LIMIT - 1;

/// To whom a page table belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TableOwner {
    /// Nobody yet, or nobody cares (a kernel table).
    None,
    /// One space, by the frame of its top table.
    Space(Frame),
    /// Several spaces: the number of an owner list that the sharer keeps beside the frame table.
    List(u64),
}

impl TableOwner {
    /// The highest number of an owner list: 62 bits.
    pub const LIST_MAX: u64 = u64::MAX >> 2;

    const fn to_bits(self) -> u64 {
        match self {
            Self::None => 0,
            Self::Space(root) => root.number() << 2 | 1,
            Self::List(id) => id << 2 | 2,
        }
    }

    const fn from_bits(bits: u64) -> Self {
        match bits & KIND_MASK {
            1 => Self::Space(Frame::from_number(bits >> 2)),
            2 => Self::List(bits >> 2),
            _ => Self::None,
        }
    }
}

/// A [`FrameSlot`] whose frame is a page table; see [`FrameSlot::as_table`].
///
/// # Examples
///
/// ```
/// use kmem_hal::{Frame, FrameSlot, Page, TableOwner, TableSlot};
///
/// let slot = FrameSlot::new();
/// let table = TableSlot::claim(&slot, 1, Page::ZERO);
/// let guard = slot.lock();
/// table.set_live(table.live() + 3);
/// table.set_owner(TableOwner::Space(Frame::from_number(7)));
/// drop(guard);
/// assert_eq!((table.level(), table.live(), table.shares()), (1, 3, 1));
/// ```
#[derive(Clone, Copy, Debug)]
pub struct TableSlot<'a>(&'a FrameSlot);

impl<'a> TableSlot<'a> {
    /// Makes the slot of a frame that the caller owns say "page table of `level` (1 = leaf), covering from `first`".
    ///
    /// Live count 0, one share, no pins, no owner. The table is not reachable yet (`T1`).
    #[must_use]
    pub fn claim(slot: &'a FrameSlot, level: u8, first: Page) -> Self {
        slot.claim_with(
            FrameTag::Table,
            Order::ZERO,
            SlotFlags::empty(),
            1,
            |slot| {
                slot.index().store(
                    u64::from(level) << LEVEL_SHIFT & LEVEL_MASK,
                    Ordering::Relaxed,
                );
                slot.links().store(first.number(), Ordering::Relaxed);
            },
        );
        Self(slot)
    }

    pub(super) fn new(slot: &'a FrameSlot) -> Option<Self> {
        (slot.tag() == FrameTag::Table).then_some(Self(slot))
    }

    /// The untyped slot: its lock, flags and links.
    #[must_use]
    pub const fn slot(self) -> &'a FrameSlot {
        self.0
    }

    /// Entries of the table that are not empty (`T2`).
    #[must_use]
    pub fn live(self) -> u16 {
        self.0.index().load(Ordering::Relaxed) as u16
    }

    /// Sets the live count. Under the lock (`T1`): a plain load and a plain store.
    pub fn set_live(self, live: u16) {
        let word = self.0.index().load(Ordering::Relaxed);
        self.0
            .index()
            .store(word & !LIVE_MASK | u64::from(live), Ordering::Relaxed);
    }

    /// The level: 1 for a leaf table.
    #[must_use]
    pub fn level(self) -> u8 {
        ((self.0.index().load(Ordering::Relaxed) & LEVEL_MASK) >> LEVEL_SHIFT) as u8
    }

    /// Pins of frames that this table maps: a table with pins is copied at fork, never shared.
    #[must_use]
    pub fn pins(self) -> u32 {
        ((self.0.index().load(Ordering::Relaxed) & PINS_MASK) >> PINS_SHIFT) as u32
    }

    /// Sets the number of pins. Under the lock (`T1`).
    pub fn set_pins(self, pins: u32) {
        let word = self.0.index().load(Ordering::Relaxed);
        self.0.index().store(
            word & !PINS_MASK | u64::from(pins) << PINS_SHIFT,
            Ordering::Relaxed,
        );
    }

    /// How many upper entries point at the table.
    #[must_use]
    pub fn shares(self) -> u32 {
        self.0.count()
    }

    /// Adds a share; gives the number before. Under the lock (`T4`).
    ///
    /// # Errors
    ///
    /// The number, unchanged, at 2^32 - 1.
    pub fn add_share(self) -> Result<u32, u32> {
        self.0.add_count(1)
    }

    /// Takes a share away; gives the number after. At 0 the table is the caller's, after flush and grace period.
    ///
    /// # Errors
    ///
    /// 0, where there was none.
    pub fn sub_share(self) -> Result<u32, u32> {
        self.0.sub_count(1)
    }

    /// To whom the table belongs.
    #[must_use]
    pub fn owner(self) -> TableOwner {
        TableOwner::from_bits(self.0.owner().load(Ordering::Acquire))
    }

    /// Sets to whom the table belongs. Under the lock (`T1`). A list's number above
    /// [`LIST_MAX`](TableOwner::LIST_MAX) loses its upper bits.
    pub fn set_owner(self, owner: TableOwner) {
        self.0.owner().store(owner.to_bits(), Ordering::Release);
    }

    /// The first page that the table covers; meaningless once it is stray.
    #[must_use]
    pub fn first_page(self) -> Page {
        Page::from_number(self.0.links().load(Ordering::Relaxed) & PAGE_MASK)
    }

    /// Whether the table was detached from its tree (`T3`).
    #[must_use]
    pub fn is_stray(self) -> bool {
        self.0.flags().contains(SlotFlags::STRAY)
    }

    /// Notes that the table was detached; `false` if somebody did before. Under the lock (`T3`).
    ///
    /// From now on word 3 holds list links, which start out empty.
    pub fn set_stray(self) -> bool {
        let first = !self
            .0
            .set_flags(SlotFlags::STRAY)
            .contains(SlotFlags::STRAY);
        if first {
            self.0.set_links(None, None);
        }
        first
    }
}
