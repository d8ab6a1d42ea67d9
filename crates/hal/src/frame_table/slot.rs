//! The slot of one frame; layout in the [module](super) and decision record 001.

use super::slab::SlabSlot;
use super::table::TableSlot;
use super::user::{CountError, UserSlot};
use crate::frame::{Frame, Order};
use crate::sync::{AtomicU64, Ordering, spin_loop};

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum FrameTag {
    /// Nobody's.
    Free = 0,
    /// Firmware, kernel image, metadata: never allocated.
    Reserved = 1,
    /// Kernel memory of no particular kind.
    Kernel = 2,
    /// Objects of a slab cache.
    Slab = 3,
    /// A page table.
    Table = 4,
    /// Anonymous user memory.
    Anon = 5,
    /// A page of a file, or of shared memory.
    File = 6,
    /// A large kmalloc: whole pages.
    Large = 7,
    /// Mapped by vmalloc.
    Vmalloc = 8,
    /// A tail frame of a larger block: its head holds the state. Its order is the block's, so that the head is
    /// `frame.align_down(order)`.
    Tail = 9,
}

impl FrameTag {
    const fn from_bits(bits: u8) -> Self {
        match bits {
            0 => Self::Free,
            2 => Self::Kernel,
            3 => Self::Slab,
            4 => Self::Table,
            5 => Self::Anon,
            6 => Self::File,
            7 => Self::Large,
            8 => Self::Vmalloc,
            9 => Self::Tail,
            _ => Self::Reserved,
        }
    }
}

bitflags::bitflags! {
    /// Bits 16..32 of word 0. The lowest eight have one meaning for all owners; the others are the owner's.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct SlotFlags: u16 {
        /// A lock bit: [`FrameSlot::try_lock`].
        const LOCKED = 1 << 0;
        /// Written to since it was last clean.
        const DIRTY = 1 << 1;
        /// Used since the bit was last cleared.
        const REFERENCED = 1 << 2;
        /// The content is that of its file or swap slot.
        const UP_TO_DATE = 1 << 3;
        /// On its way to or from a device.
        const WRITEBACK = 1 << 4;
        /// Belongs to its mapper alone, while it has one mapping (Linux's `PageAnonExclusive`).
        const EXCLUSIVE = 1 << 5;
        /// Detached from its structure: a walker that arrives here must start again.
        const STRAY = 1 << 6;
        /// Pinned for a device.
        const PINNED = 1 << 7;
        /// The owner's.
        const OWNER_0 = 1 << 8;
        /// The owner's.
        const OWNER_1 = 1 << 9;
        /// The owner's.
        const OWNER_2 = 1 << 10;
        /// The owner's.
        const OWNER_3 = 1 << 11;
    }
}

const COUNT_SHIFT: u32 = 32;
const COUNT_ONE: u64 = 1 << COUNT_SHIFT;
const FLAGS_SHIFT: u32 = 16;
const ORDER_SHIFT: u32 = 8;

/// What kmem knows of one frame: 32 bytes.
#[doc(alias = "struct page")]
#[derive(Debug)]
#[repr(C, align(32))]
pub struct FrameSlot {
    state: AtomicU64,
    owner: AtomicU64,
    index: AtomicU64,
    links: AtomicU64,
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<FrameSlot>() == 32);

impl FrameSlot {
    crate::const_new! {
        /// The slot of a free frame.
        pub fn new() -> Self {
            Self {
                state: AtomicU64::new(0),
                owner: AtomicU64::new(0),
                index: AtomicU64::new(0),
                links: AtomicU64::new(0),
            }
        }
    }

    /// What the frame is.
    #[must_use]
    #[inline]
    pub fn tag(&self) -> FrameTag {
        FrameTag::from_bits(self.state.load(Ordering::Acquire) as u8)
    }

    /// The order of the block whose head this frame is.
    #[must_use]
    #[inline]
    pub fn order(&self) -> Order {
        let bits = (self.state.load(Ordering::Acquire) >> ORDER_SHIFT) as u8;
        Order::new(bits).unwrap_or(Order::ZERO)
    }

    /// Takes the slot of a frame that the caller owns: tag, order, no flags, count 0, words zero.
    #[inline]
    pub fn claim(&self, tag: FrameTag, order: Order) {
        self.claim_with(tag, order, SlotFlags::empty(), 0, |_| {});
    }

    /// As [`claim`](Self::claim), with flags and a count, and with `words` writing words 1 to 3 before word 0 publishes them.
    #[inline]
    pub(super) fn claim_with(
        &self,
        tag: FrameTag,
        order: Order,
        flags: SlotFlags,
        count: u32,
        words: impl FnOnce(&Self),
    ) {
        self.owner.store(0, Ordering::Relaxed);
        self.index.store(0, Ordering::Relaxed);
        self.links.store(0, Ordering::Relaxed);
        words(self);
        let state = u64::from(count) << COUNT_SHIFT
            | u64::from(flags.bits()) << FLAGS_SHIFT
            | u64::from(order.get()) << ORDER_SHIFT
            | tag as u64;
        self.state.store(state, Ordering::Release);
    }

    /// The slot as that of a page table; `None` where the frame is something else.
    #[must_use]
    #[inline]
    pub fn as_table(&self) -> Option<TableSlot<'_>> {
        TableSlot::new(self)
    }

    /// The slot as that of a slab's first frame; `None` where the frame is something else.
    #[must_use]
    pub fn as_slab(&self) -> Option<SlabSlot<'_>> {
        SlabSlot::new(self)
    }

    /// The slot as that of a user page or a page of a file; `None` where the frame is something else.
    #[must_use]
    #[inline]
    pub fn as_user(&self) -> Option<UserSlot<'_>> {
        UserSlot::new(self)
    }

    /// Zeroes all words one by one, each with the weakest order: a memset, as loom sees it.
    #[cfg(loom)]
    pub(super) fn clear(&self) {
        for word in [&self.state, &self.owner, &self.index, &self.links] {
            word.store(0, Ordering::Relaxed);
        }
    }

    /// Makes the slot say "free" again.
    #[inline]
    pub fn release(&self) {
        self.state.store(0, Ordering::Release);
    }

    /// The flags.
    #[must_use]
    #[inline]
    pub fn flags(&self) -> SlotFlags {
        SlotFlags::from_bits_retain((self.state.load(Ordering::Acquire) >> FLAGS_SHIFT) as u16)
    }

    /// Sets flags; gives those that were set before.
    #[inline]
    pub fn set_flags(&self, flags: SlotFlags) -> SlotFlags {
        let bits = u64::from(flags.bits()) << FLAGS_SHIFT;
        let before = self.state.fetch_or(bits, Ordering::AcqRel);
        SlotFlags::from_bits_retain((before >> FLAGS_SHIFT) as u16)
    }

    /// Clears flags; gives those that were set before.
    #[inline]
    pub fn clear_flags(&self, flags: SlotFlags) -> SlotFlags {
        let bits = u64::from(flags.bits()) << FLAGS_SHIFT;
        let before = self.state.fetch_and(!bits, Ordering::AcqRel);
        SlotFlags::from_bits_retain((before >> FLAGS_SHIFT) as u16)
    }

    /// Takes the lock bit if it is free now.
    #[doc(alias = "trylock_page")]
    #[inline]
    pub fn try_lock(&self) -> bool {
        !self
            .set_flags(SlotFlags::LOCKED)
            .contains(SlotFlags::LOCKED)
    }

    /// Lets the lock bit go.
    #[doc(alias = "unlock_page")]
    #[inline]
    pub fn unlock(&self) {
        self.clear_flags(SlotFlags::LOCKED);
    }

    /// Takes the lock bit of a slot that nobody else can reach yet, by a plain store.
    #[inline]
    pub fn lock_private(&self) {
        let locked = u64::from(SlotFlags::LOCKED.bits()) << FLAGS_SHIFT;
        let state = self.state.load(Ordering::Relaxed);
        self.state.store(state | locked, Ordering::Relaxed);
    }

    /// Lets the lock bit go and sets `flags`, which are clear, in one step.
    #[inline]
    pub fn unlock_with(&self, flags: SlotFlags) {
        let bits = u64::from((flags | SlotFlags::LOCKED).bits()) << FLAGS_SHIFT;
        self.state.fetch_xor(bits, Ordering::AcqRel);
    }

    /// Spins until the lock bit is free and takes it; lets go when the guard is dropped.
    ///
    /// Not for interrupts: the bit does not keep them out.
    #[doc(alias = "lock_page")]
    pub fn lock(&self) -> SlotGuard<'_> {
        while !self.try_lock() {
            // Reads until it looks free, so that waiters do not fight for the line.
            while self.flags().contains(SlotFlags::LOCKED) {
                spin_loop();
            }
        }
        SlotGuard(self)
    }

    /// The reference count.
    #[doc(alias = "page_ref_count")]
    #[must_use]
    #[inline]
    pub fn count(&self) -> u32 {
        (self.state.load(Ordering::Acquire) >> COUNT_SHIFT) as u32
    }

    /// Adds `n` references; gives the count before.
    ///
    /// # Errors
    ///
    /// The count, unchanged, where the sum would pass 2^32 - 1: a count that wraps frees memory in use.
    #[doc(alias = "get_page")]
    #[inline]
    pub fn add_count(&self, n: u32) -> Result<u32, u32> {
        let step = |state: u64| state.checked_add(u64::from(n) << COUNT_SHIFT);
        self.state
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, step)
            .map(|before| (before >> COUNT_SHIFT) as u32)
            .map_err(|found| (found >> COUNT_SHIFT) as u32)
    }

    /// Adds `n` references where there is one already; gives the count before.
    ///
    /// # Errors
    ///
    /// [`CountError::Underflow`] where the count is 0; [`CountError::Saturated`] where the sum would pass 2^32 - 1.
    #[doc(alias = "get_page_unless_zero")]
    pub fn try_add_count(&self, n: u32) -> Result<u32, CountError> {
        let step = |state: u64| {
            if state >> COUNT_SHIFT == 0 {
                None
            } else {
                state.checked_add(u64::from(n) << COUNT_SHIFT)
            }
        };
        match self
            .state
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, step)
        {
            Ok(before) => Ok((before >> COUNT_SHIFT) as u32),
            Err(found) if found >> COUNT_SHIFT == 0 => Err(CountError::Underflow),
            Err(_) => Err(CountError::Saturated),
        }
    }

    /// Adds one to the count where it is not 0 and the tag is one that `wanted` names, both in one step; gives the count before.
    pub(super) fn try_add_count_if(
        &self,
        wanted: impl Fn(FrameTag) -> bool,
    ) -> Result<u32, CountError> {
        let step = |state: u64| {
            if state >> COUNT_SHIFT == 0 || !wanted(FrameTag::from_bits(state as u8)) {
                None
            } else {
                state.checked_add(COUNT_ONE)
            }
        };
        self.state
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, step)
            .map(|before| (before >> COUNT_SHIFT) as u32)
            .map_err(|_| CountError::Underflow)
    }

    /// Takes the only reference away; `false`, and nothing is changed, where the count is not 1.
    pub(super) fn sub_only(&self) -> bool {
        let step = |state: u64| (state >> COUNT_SHIFT == 1).then(|| state - COUNT_ONE);
        self.state
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, step)
            .is_ok()
    }

    /// Replaces the upper half of word 0, whatever its owner keeps there.
    pub(super) fn replace_count(&self, f: impl Fn(u32) -> u32) {
        let step = |state: u64| {
            let upper = f((state >> COUNT_SHIFT) as u32);
            Some(state & (COUNT_ONE - 1) | u64::from(upper) << COUNT_SHIFT)
        };
        let _ = self
            .state
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, step);
    }

    /// Takes `n` references away; gives the count after.
    ///
    /// # Errors
    ///
    /// The count, unchanged, where it is below `n`: a reference was given back that nobody held.
    #[doc(alias = "put_page")]
    #[inline]
    pub fn sub_count(&self, n: u32) -> Result<u32, u32> {
        let bits = u64::from(n) * COUNT_ONE;
        self.state
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |state| {
                state.checked_sub(bits)
            })
            .map(|before| (before >> COUNT_SHIFT) as u32 - n)
            .map_err(|found| (found >> COUNT_SHIFT) as u32)
    }

    /// Adds a reference by a plain store, where there is exactly one and its holder keeps everybody else from word 0 meanwhile; `false`, and
    /// nothing is changed, where the count is another or the lock bit is taken.
    #[must_use]
    #[inline]
    pub fn add_second(&self) -> bool {
        let state = self.state.load(Ordering::Acquire);
        let locked = u64::from(SlotFlags::LOCKED.bits()) << FLAGS_SHIFT;
        let first = state & (!(COUNT_ONE - 1) | locked) == COUNT_ONE;
        if first {
            self.state.store(state + COUNT_ONE, Ordering::Release);
        }
        first
    }

    /// Gives back a reference that the caller holds, in one locked step; gives the count after.
    #[must_use]
    #[inline]
    pub fn drop_one(&self) -> u32 {
        let before = self.state.fetch_sub(COUNT_ONE, Ordering::AcqRel);
        debug_assert!(before >> COUNT_SHIFT > 0, "a reference that nobody held");
        ((before >> COUNT_SHIFT) as u32).wrapping_sub(1)
    }

    /// The owner word: what the frame belongs to.
    #[must_use]
    #[inline]
    pub fn owner(&self) -> &AtomicU64 {
        &self.owner
    }

    /// The index word: where in its owner.
    #[must_use]
    #[inline]
    pub fn index(&self) -> &AtomicU64 {
        &self.index
    }

    /// The word of links, for owners that use it for something else.
    #[must_use]
    #[inline]
    pub fn links(&self) -> &AtomicU64 {
        &self.links
    }

    /// The frame after this one on its list.
    #[must_use]
    pub fn next(&self) -> Option<Frame> {
        link(self.links.load(Ordering::Relaxed) as u32)
    }

    /// The frame before this one on its list.
    #[must_use]
    pub fn previous(&self) -> Option<Frame> {
        link((self.links.load(Ordering::Relaxed) >> 32) as u32)
    }

    /// Sets both links. Whoever holds the list's lock calls this.
    ///
    /// Frames at 2^32 - 1 and above cannot be linked and become "none".
    pub fn set_links(&self, next: Option<Frame>, previous: Option<Frame>) {
        self.links.store(
            u64::from(unlink(previous)) << 32 | u64::from(unlink(next)),
            Ordering::Relaxed,
        );
    }
}

/// The lock bit of a slot, held; lets go when dropped.
#[must_use = "the slot is unlocked when the guard is dropped"]
#[derive(Debug)]
pub struct SlotGuard<'a>(&'a FrameSlot);

impl Drop for SlotGuard<'_> {
    fn drop(&mut self) {
        self.0.unlock();
    }
}

impl Default for FrameSlot {
    fn default() -> Self {
        Self::new()
    }
}

fn link(bits: u32) -> Option<Frame> {
    bits.checked_sub(1)
        .and_then(|number| Frame::new(u64::from(number)))
}

fn unlink(frame: Option<Frame>) -> u32 {
    frame
        .and_then(|frame| u32::try_from(frame.number() + 1).ok())
        .unwrap_or(0)
}
