//! The slot of a page of user memory or of a file, typed.
//!
//! ```text
//!  word 0   63         32 31   16 15   8 7       0
//!           [ references ][flags][order][Anon|File]
//!  word 1   63         32 31          0
//!           [  mappings  ][  object   ]          object: number of the anonymous object or file, 0 = none
//!  word 2   63   52 51                0
//!           [ age  ][ page of the object ]        age: twelve bits of the replacement policy
//!  word 3   [ previous ][ next ]                  links of a replacement list, a write-back list, ...
//!
//!  tail frames of a huge page: tag Tail and the same order; flag EXCLUSIVE and `mappings` are their own, the rest is
//!  the head's
//! ```
//!
//! Two counts, because three questions are asked of a page:
//! - *Is it still used?* `references` is not 0. **All mappings together hold one reference**, so that mapping a page a second
//!   time touches one word, and the last unmapping is seen.
//! - *Who maps it?* `mappings` counts leaf tables, not spaces: a leaf table that a fork shares counts once, and
//!   its own share count and owner list say for whom (see [`TableSlot`](super::TableSlot)).
//! - *Does anybody else look at it?* `references` beyond one for the mappings and one for the page cache
//!   or swap cache are pins, I/O, or a transient look-up.
//!
//! Neither count decides whether a write may reuse the page in place: only `EXCLUSIVE` and share count 1 on the path do.
//!
//! Invariants
//! - `A1`: `mappings > 0` implies `references > 0`: whoever maps a page first holds a reference of its own meanwhile.
//! - `A2`: object and page are set before the first mapping and while the page is in a cache, under the page's lock bit.
//! - `A3`: a count at its limit stays there and the call fails: a count that wraps frees memory in use.

use super::slot::{FrameSlot, FrameTag, SlotFlags};
use crate::frame::Order;
use crate::sync::Ordering;

const MAPPING_SHIFT: u32 = 32;
const MAPPING_ONE: u64 = 1 << MAPPING_SHIFT;
const OBJECT_MASK: u64 = u32::MAX as u64;
const AGE_SHIFT: u32 = 52;
const INDEX_MASK: u64 = (1 << AGE_SHIFT) - 1;

/// A [`FrameSlot`] whose frame is anonymous memory or a page of a file; see [`FrameSlot::as_user`].
///
/// # Examples
///
/// ```
/// use kmem_hal::{FrameSlot, FrameTag, Order, UserSlot};
///
/// let slot = FrameSlot::new();
/// let page = UserSlot::claim(&slot, FrameTag::Anon, Order::ZERO, 9, 0x7_ffff_7fff).unwrap();
/// assert_eq!((page.references(), page.mappings()), (1, 0)); // the caller's reference
/// page.add_mapping().unwrap(); // the first mapping takes a reference for all
/// page.add_mapping().unwrap();
/// assert_eq!((page.references(), page.mappings()), (2, 2));
/// ```
#[derive(Clone, Copy, Debug)]
pub struct UserSlot<'a>(&'a FrameSlot);

/// What a change of a page's mappings met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CountError {
    /// The count is at its limit of 2^32 - 1.
    Saturated,
    /// The count is 0: something was given back that nobody held.
    Underflow,
}

impl core::fmt::Display for CountError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Saturated => "the count is at its limit",
            Self::Underflow => "the count is zero already",
        })
    }
}

impl core::error::Error for CountError {}

impl<'a> UserSlot<'a> {
    /// The twelve bits of age are at most this.
    pub const AGE_MAX: u16 = 0xfff;

    /// Makes the slot of a block that the caller owns say "user page": one reference (the caller's), no mapping.
    ///
    /// `object` and `page` name it (`A2`); `page` is below 2^52. `None` where `tag` is neither `Anon` nor `File`, and
    /// then nothing is changed.
    #[must_use]
    pub fn claim(
        slot: &'a FrameSlot,
        tag: FrameTag,
        order: Order,
        object: u32,
        page: u64,
    ) -> Option<Self> {
        if !matches!(tag, FrameTag::Anon | FrameTag::File) {
            return None;
        }
        slot.claim_with(tag, order, SlotFlags::empty(), 1, |slot| {
            slot.owner().store(u64::from(object), Ordering::Relaxed);
            slot.index().store(page & INDEX_MASK, Ordering::Relaxed);
        });
        Some(Self(slot))
    }

    /// Makes the slot of a frame that the caller owns say "anonymous page, mapped once, exclusive": what a first touch makes, by plain
    /// stores.
    ///
    /// One mapping and the reference of all mappings; the mapping is the caller's to put into a table, or to
    /// [take back](Self::sub_mapping). `object` and `page` as in [`claim`](Self::claim).
    #[doc(alias = "folio_add_new_anon_rmap")]
    #[inline]
    pub fn claim_exclusive(slot: &'a FrameSlot, object: u32, page: u64) -> Self {
        slot.claim_with(
            FrameTag::Anon,
            Order::ZERO,
            SlotFlags::EXCLUSIVE,
            1,
            |slot| {
                let owner = MAPPING_ONE | u64::from(object);
                slot.owner().store(owner, Ordering::Relaxed);
                slot.index().store(page & INDEX_MASK, Ordering::Relaxed);
            },
        );
        Self(slot)
    }

    #[inline]
    pub(super) fn new(slot: &'a FrameSlot) -> Option<Self> {
        matches!(slot.tag(), FrameTag::Anon | FrameTag::File).then_some(Self(slot))
    }

    /// Takes a reference of whatever page has this slot now; `None` where it is no user page, or one that is being freed.
    ///
    /// For a slot that was found by the frame's number, with no right to the frame: its tag and its count are in one word, so that the
    /// reference is taken of a living user page or not at all. Whose page it is has to be looked at after that.
    #[doc(alias = "folio_try_get")]
    #[must_use]
    pub fn get(slot: &'a FrameSlot) -> Option<Self> {
        let is_user = |tag| matches!(tag, FrameTag::Anon | FrameTag::File);
        slot.try_add_count_if(is_user).ok().map(|_| Self(slot))
    }

    /// The untyped slot: its lock, flags and links.
    #[must_use]
    #[inline]
    pub const fn slot(self) -> &'a FrameSlot {
        self.0
    }

    /// The object that the page belongs to; 0 for none.
    #[doc(alias = "page_mapping")]
    #[must_use]
    pub fn object(self) -> u32 {
        (self.0.owner().load(Ordering::Acquire) & OBJECT_MASK) as u32
    }

    /// Moves the page to another object and place: at CoW, swap-in, removal from a cache. Under the page's lock (`A2`).
    pub fn set_object(self, object: u32, page: u64) {
        // The mappings in the same word may change meanwhile.
        let update = |word: u64| Some(word & !OBJECT_MASK | u64::from(object));
        let _ = self
            .0
            .owner()
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, update);
        let update = |word: u64| Some(word & !INDEX_MASK | page & INDEX_MASK);
        let _ = self
            .0
            .index()
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, update);
    }

    /// Which page of its object it is.
    #[doc(alias = "page_index")]
    #[must_use]
    pub fn page(self) -> u64 {
        self.0.index().load(Ordering::Acquire) & INDEX_MASK
    }

    /// The replacement policy's twelve bits.
    #[must_use]
    pub fn age(self) -> u16 {
        (self.0.index().load(Ordering::Relaxed) >> AGE_SHIFT) as u16
    }

    /// Sets the replacement policy's twelve bits; higher ones are dropped.
    pub fn set_age(self, age: u16) {
        let age = u64::from(age) << AGE_SHIFT;
        let update = |word: u64| Some(word & INDEX_MASK | age);
        let _ = self
            .0
            .index()
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, update);
    }

    /// References: one for all mappings together, one for a cache, and those of pins and look-ups.
    #[doc(alias = "page_ref_count")]
    #[must_use]
    #[inline]
    pub fn references(self) -> u32 {
        self.0.count()
    }

    /// Adds a reference where there is one already; gives the number before.
    ///
    /// # Errors
    ///
    /// [`CountError::Underflow`] where there is none: the frame is being freed (Linux's `get_page_unless_zero`);
    /// [`CountError::Saturated`] at the limit.
    #[doc(alias = "get_page_unless_zero")]
    #[inline]
    pub fn add_reference(self) -> Result<u32, CountError> {
        self.0.try_add_count(1)
    }

    /// Takes a reference away; gives the number after. At 0 the frame is the caller's to free.
    ///
    /// # Errors
    ///
    /// [`CountError::Underflow`] where there is none.
    #[doc(alias = "put_page")]
    #[inline]
    pub fn sub_reference(self) -> Result<u32, CountError> {
        self.0.sub_count(1).map_err(|_| CountError::Underflow)
    }

    /// Takes the caller's reference away where it is the only one; the frame is the caller's to free then. `false`, and nothing is changed,
    /// where there are others.
    ///
    /// # Examples
    ///
    /// ```
    /// use kmem_hal::{FrameSlot, FrameTag, Order, UserSlot};
    ///
    /// let slot = FrameSlot::new();
    /// let page = UserSlot::claim(&slot, FrameTag::Anon, Order::ZERO, 9, 0).unwrap();
    /// page.add_reference().unwrap();
    /// assert!(!page.sub_last_reference());
    /// page.sub_reference().unwrap();
    /// assert!(page.sub_last_reference());
    /// assert_eq!(page.references(), 0);
    /// ```
    #[doc(alias = "page_ref_freeze")]
    #[must_use]
    pub fn sub_last_reference(self) -> bool {
        self.0.sub_only()
    }

    /// How many leaf tables map the page.
    #[doc(alias = "page_mapcount")]
    #[must_use]
    #[inline]
    pub fn mappings(self) -> u32 {
        (self.0.owner().load(Ordering::Acquire) >> MAPPING_SHIFT) as u32
    }

    /// Adds a mapping; gives the number before. The caller holds a reference or the lock of a table that maps the page.
    ///
    /// The first mapping takes the reference that all share.
    ///
    /// # Errors
    ///
    /// [`CountError::Saturated`]; nothing has changed.
    #[doc(alias = "page_add_anon_rmap")]
    #[inline]
    pub fn add_mapping(self) -> Result<u32, CountError> {
        let mut word = self.0.owner().load(Ordering::Relaxed);
        loop {
            let next = word.checked_add(MAPPING_ONE).ok_or(CountError::Saturated)?;
            let first = word < MAPPING_ONE;
            if first {
                // Taken before the mapping shows (`A1`), given back if another mapper was faster.
                self.0.add_count(1).map_err(|_| CountError::Saturated)?;
            }
            match self
                .0
                .owner()
                .compare_exchange(word, next, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(_) => return Ok((word >> MAPPING_SHIFT) as u32),
                Err(found) => {
                    if first {
                        let _ = self.0.sub_count(1);
                    }
                    word = found;
                }
            }
        }
    }

    /// Takes a mapping away; gives the mappings and references left. At (0, 0) the frame is the caller's, to be freed
    /// after the flush.
    ///
    /// # Errors
    ///
    /// [`CountError::Underflow`]; nothing has changed.
    #[doc(alias = "page_remove_rmap")]
    #[inline]
    pub fn sub_mapping(self) -> Result<(u32, u32), CountError> {
        let step = |word: u64| word.checked_sub(MAPPING_ONE);
        let before = self
            .0
            .owner()
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, step)
            .map_err(|_| CountError::Underflow)?;
        let left = (before >> MAPPING_SHIFT) as u32 - 1;
        if left == 0 {
            let references = self.sub_reference()?;
            return Ok((0, references));
        }
        Ok((left, self.references()))
    }
}
