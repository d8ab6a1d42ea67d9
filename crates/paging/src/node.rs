//! One table page: its words, and what its frame's slot says about it.
//!
//! ```text
//!  word 0   tag Table | LOCKED = the table's lock | STRAY = detached | count = entries that point to it
//!  word 1   the root of its space
//!  word 2   pins | level | live count
//!  word 3   the first page it covers; on a list (reserve, gather, cache) the next frame, number + 1
//! ```
//!
//! The layout is that of decision record 001 (`kmem_hal::TableSlot`).
//!
//! Invariants
//! - `N1`: the words of an attached table change only under its lock (the hardware's accessed and dirty bits
//!   excepted), and the live count only together with them: it is the number of words that are not zero, plus one for
//!   each hold (a table that must stay though empty).
//! - `N2`: a table is detached under its parent's lock and its own. It is stray from then on, and never attached again before its
//!   frame has been through flush and grace period. It holds zeros, unless it is a leaf table that went into the gather whole
//!   ([`Gather`](crate::Gather) `G4`).
//! - `N3`: locks are taken parent before child; nobody waits for a parent's lock while holding a child's.
//! - `N4`: the lock is never taken in interrupts, nor with interrupts off.

use kmem_hal::sync::Ordering;
use kmem_hal::{Frame, FrameSlot, Page, SlotFlags, TableOwner, TableSlot};

use crate::env::Env;
use crate::format::{Format, Kind, Word};
use crate::quiescent::Liveness;

/// A word of a table in memory.
pub(crate) type Entry<F> = <<F as Format>::Word as Word>::Atomic;

/// One table page, to be read: its words alone.
pub(crate) struct View<'t, F: Format> {
    pub frame: Frame,
    pub level: usize,
    words: &'t [Entry<F>],
}

impl<'t, F: Format> View<'t, F> {
    /// The table in `frame`.
    ///
    /// # Safety
    ///
    /// As [`Node::new`].
    #[inline(always)]
    pub unsafe fn new<E: Env>(env: &'t E, frame: Frame, level: usize) -> Self {
        // SAFETY: tables lie in reach (`cache::take` checked), and while it is a table everybody, the MMU included,
        // accesses it by atomics.
        let words = unsafe { F::Word::words(env.map(), frame) };
        Self {
            frame,
            level,
            words,
        }
    }

    /// Reads a word.
    #[inline(always)]
    pub fn load(&self, index: usize) -> u64 {
        F::Word::load(&self.words[index])
    }

    /// With its slot.
    #[inline(always)]
    pub fn node<E: Env>(self, env: &'t E) -> Node<'t, F> {
        // E2 makes the slot exist; `cache::take` checked it once for every table.
        let slot = match env.slots().slot(self.frame) {
            Some(slot) => slot,
            None => unreachable!("a page table without a frame slot"),
        };
        Node {
            frame: self.frame,
            level: self.level,
            slot,
            words: self.words,
        }
    }
}

/// One table page, to be changed.
pub(crate) struct Node<'t, F: Format> {
    pub frame: Frame,
    pub level: usize,
    pub slot: &'t FrameSlot,
    words: &'t [Entry<F>],
}

impl<F: Format> Clone for Node<'_, F> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<F: Format> Copy for Node<'_, F> {}

const LIVE_MASK: u64 = 0xffff;

impl<'t, F: Format> Node<'t, F> {
    /// The table in `frame`.
    ///
    /// # Safety
    ///
    /// `frame` is a table of format `F` and `level` made by this crate in `env`, and stays one during `'t`: it is
    /// attached and locked, or private, or a read section that began while it was attached goes on.
    #[inline(always)]
    pub unsafe fn new<E: Env>(env: &'t E, frame: Frame, level: usize) -> Self {
        // SAFETY: the caller's promise is passed on.
        unsafe { View::new(env, frame, level) }.node(env)
    }

    /// Reads a word.
    #[inline(always)]
    pub fn load(&self, index: usize) -> u64 {
        F::Word::load(&self.words[index])
    }

    /// Writes a word. The caller holds the lock, or the table is private.
    #[inline(always)]
    pub fn store(&self, index: usize, word: u64) {
        F::Word::store(&self.words[index], word);
    }

    /// A word in memory.
    #[inline(always)]
    pub fn entry(&self, index: usize) -> &'t Entry<F> {
        &self.words[index]
    }

    /// Words `first .. first + count`.
    #[inline(always)]
    pub fn entries(&self, first: usize, count: usize) -> &'t [Entry<F>] {
        &self.words[first..first + count]
    }

    /// Takes a word out and leaves `0`. The caller holds the lock.
    #[inline(always)]
    pub fn take<S: Liveness>(&self, index: usize) -> u64 {
        take::<F, S>(&self.words[index])
    }

    /// As [`change`]. The caller holds the lock.
    #[inline(always)]
    pub fn change<S: Liveness>(&self, index: usize, old: u64, new: u64) -> Result<(), u64> {
        change::<F, S>(&self.words[index], old, new)
    }

    #[inline(always)]
    pub fn kind(&self, word: u64) -> Kind {
        F::kind(self.level, word)
    }

    #[inline]
    pub fn lock<E: Env>(&self, env: &E) {
        while !self.slot.try_lock() {
            while self.slot.flags().contains(SlotFlags::LOCKED) {
                env.relax();
            }
        }
    }

    /// Lets the lock go.
    #[inline]
    pub fn unlock(&self) {
        self.slot.unlock();
    }

    /// Lets the lock of a table go that was just detached, and says so (`N2`).
    #[inline]
    pub fn unlock_stray(&self) {
        self.slot.unlock_with(SlotFlags::STRAY);
    }

    #[inline]
    pub fn is_stray(&self) -> bool {
        self.slot.flags().contains(SlotFlags::STRAY)
    }

    /// Upper entries that point to it, in all spaces.
    #[inline]
    pub fn shares(&self) -> u32 {
        self.slot.count()
    }

    /// Whether frames that it maps are pinned.
    #[inline]
    pub fn has_pins(&self) -> bool {
        self.slot.as_table().is_some_and(|slot| slot.pins() > 0)
    }

    /// Counts one more upper entry; `false` where that cannot be counted. The caller holds the lock.
    #[inline]
    pub fn add_share(&self) -> bool {
        self.slot.add_count(1).is_ok()
    }

    /// Counts one upper entry less; `false`, and nothing is changed, where it is the only one. The caller holds the lock.
    #[inline]
    pub fn drop_share(&self) -> bool {
        self.shares() > 1 && self.slot.sub_count(1).is_ok()
    }

    /// Words that are not zero, and holds. The caller holds the lock, or wants an old value.
    #[inline(always)]
    pub fn live(&self) -> u32 {
        (self.slot.index().load(Ordering::Relaxed) & LIVE_MASK) as u32
    }

    /// Adds to the live count. The caller holds the lock (`N1`).
    #[inline(always)]
    pub fn add_live(&self, n: u32) {
        let index = self.slot.index();
        index.store(
            index.load(Ordering::Relaxed) + u64::from(n),
            Ordering::Relaxed,
        );
    }

    /// Takes from the live count; gives what is left. The caller holds the lock (`N1`).
    #[inline(always)]
    pub fn sub_live(&self, n: u32) -> u32 {
        let index = self.slot.index();
        let now = index.load(Ordering::Relaxed) - u64::from(n);
        index.store(now, Ordering::Relaxed);
        (now & LIVE_MASK) as u32
    }

    /// As [`claim`](Self::claim), with the lock taken for the caller.
    #[inline]
    pub fn claim_locked(&self, page: Page, root: Frame) {
        self.claim(page, root);
        self.slot.lock_private();
    }

    /// Makes the slot of a private, zero frame that of an empty table of the space with this root, from `page` on.
    #[inline]
    pub fn claim(&self, page: Page, root: Frame) {
        TableSlot::claim(self.slot, self.level as u8, page).set_owner(TableOwner::Space(root));
    }
}

pub(crate) fn next(slot: &FrameSlot) -> Option<Frame> {
    slot.links()
        .load(Ordering::Relaxed)
        .checked_sub(1)
        .and_then(Frame::new)
}

/// Takes a word out of a locked table and leaves `0`.
///
/// A plain store does where the hardware has nothing to write into the word (`F4`), or does not walk there (`Q1`).
#[inline(always)]
pub(crate) fn take<F: Format, S: Liveness>(entry: &Entry<F>) -> u64 {
    let word = F::Word::load(entry);
    if S::QUIESCENT || F::is_settled(word) {
        F::Word::store(entry, 0);
        word
    } else {
        F::Word::swap(entry, 0)
    }
}

/// Changes a word of a locked table from `old` to `new`; gives the word found where the hardware wrote meanwhile.
#[inline(always)]
pub(crate) fn change<F: Format, S: Liveness>(
    entry: &Entry<F>,
    old: u64,
    new: u64,
) -> Result<(), u64> {
    if S::QUIESCENT || F::is_settled(old) {
        // F4 or Q1, and the lock: the word is still `old`.
        F::Word::store(entry, new);
        Ok(())
    } else {
        F::Word::compare_exchange(entry, old, new)
    }
}

pub(crate) fn set_next(slot: &FrameSlot, next: Option<Frame>) {
    let link = next.map_or(0, |frame| frame.number() + 1);
    slot.links().store(link, Ordering::Relaxed);
}
