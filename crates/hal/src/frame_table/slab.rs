//! The slot of a slab's first frame, typed.
//!
//! ```text
//!  word 0   63 56 55 48 47      32 31   16 15   8 7   0
//!           [list][class][ objects ][flags][order][Slab]   objects: how many the slab holds
//!  word 1   [ cache: pointer or number, the slab allocator's choice ]
//!  word 2   [ free bits of objects 0..64, 1 = free ]         flags without SIDE_BITMAP
//!           [ pointer to the words of the free bits ]        flags with SIDE_BITMAP (more than 64 objects)
//!  word 3   [ previous ][ next ]                             links of the list it is on
//!
//!  tail frames of a slab of order > 0: tag Tail, the same order; words 1 to 3 hold up to 192 more free bits
//! ```
//!
//! So a pointer is freed with one load of word 0: tag, order (and with it the slab's first frame) and class.
//!
//! Invariants
//! - `B1`: words 0's upper half and word 1 are written before the slab is reachable and constant after, the list
//!   field excepted, which changes under the lock of the lists.
//! - `B2`: bit `i` of the free bits is set exactly while object `i` is in no array and in nobody's hands. Bits are taken
//!   by `swap` or `fetch_and` and returned by `fetch_or`; a bit that is set already when it is returned is a double free.

use super::slot::{FrameSlot, FrameTag, SlotFlags};
use crate::frame::Order;
use crate::sync::{AtomicU64, Ordering};

/// A [`FrameSlot`] whose frame is the first of a slab; see [`FrameSlot::as_slab`].
///
/// # Examples
///
/// ```
/// use kmem_hal::{FrameSlot, Order, SlabSlot};
///
/// let slot = FrameSlot::new();
/// let slab = SlabSlot::claim(&slot, Order::ZERO, 7, 32, 0xcac4e);
/// assert_eq!((slab.class(), slab.objects(), slab.cache()), (7, 32, 0xcac4e));
/// assert_eq!(slab.free_bits().unwrap().load(kmem_hal::sync::Ordering::Relaxed), 0xffff_ffff);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct SlabSlot<'a>(&'a FrameSlot);

impl<'a> SlabSlot<'a> {
    /// The bits of free objects are kept beside the frame table, and word 2 points there.
    pub const SIDE_BITMAP: SlotFlags = SlotFlags::OWNER_0;

    /// Makes the slot of a block that the caller owns say "slab": its size class, how many objects, which cache.
    ///
    /// All objects are free where there are at most 64; otherwise the caller sets
    /// [`SIDE_BITMAP`](Self::SIDE_BITMAP), or uses the tails' words.
    #[must_use]
    pub fn claim(slot: &'a FrameSlot, order: Order, class: u8, objects: u16, cache: u64) -> Self {
        let upper = u32::from(class) << 16 | u32::from(objects);
        slot.claim_with(FrameTag::Slab, order, SlotFlags::empty(), upper, |slot| {
            slot.owner().store(cache, Ordering::Relaxed);
            let free = match objects {
                0 => 0,
                n @ 1..=63 => (1 << n) - 1,
                _ => u64::MAX,
            };
            slot.index().store(free, Ordering::Relaxed);
        });
        Self(slot)
    }

    pub(super) fn new(slot: &'a FrameSlot) -> Option<Self> {
        (slot.tag() == FrameTag::Slab).then_some(Self(slot))
    }

    /// The untyped slot: its lock, flags and links.
    #[must_use]
    pub const fn slot(self) -> &'a FrameSlot {
        self.0
    }

    /// The size class, or 0 where the cache has none.
    #[must_use]
    pub fn class(self) -> u8 {
        (self.0.count() >> 16) as u8
    }

    /// How many objects the slab holds.
    #[must_use]
    pub fn objects(self) -> u16 {
        self.0.count() as u16
    }

    /// Which list the slab is on: the slab allocator's numbers.
    #[must_use]
    pub fn list(self) -> u8 {
        (self.0.count() >> 24) as u8
    }

    /// Notes which list the slab is on. Under the lock of the lists (`B1`).
    pub fn set_list(self, list: u8) {
        self.0
            .replace_count(|upper| upper & 0x00ff_ffff | u32::from(list) << 24);
    }

    /// The cache, as the slab allocator numbers it.
    #[must_use]
    pub fn cache(self) -> u64 {
        self.0.owner().load(Ordering::Relaxed)
    }

    /// The free bits of objects 0 to 63 (`B2`); `None` where they are kept beside the table.
    #[must_use]
    pub fn free_bits(self) -> Option<&'a AtomicU64> {
        (!self.0.flags().contains(Self::SIDE_BITMAP)).then_some(self.0.index())
    }
}
