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
//! - `N5`: a table to which a shared table leads is locked only under the lock of the table above it: so whoever holds that one, and finds
//!   a share count of 1 and the lock free, has word 0 for itself.
//! - `N4`: the lock is never taken in interrupts, nor with interrupts off; nobody waits for it inside a read section ([`Node::try_lock_attached`]).

use kmem_hal::sync::Ordering;
use kmem_hal::{Frame, FrameSlot, FrameTable, Page, SlotFlags, TableOwner, TableSlot};

use crate::env::Env;
use crate::format::{Format, Kind, Word, level};
use crate::mutants::mutant;
use crate::quiescent::Liveness;
use crate::table::index_at;

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
const PINS_SHIFT: u32 = 32;

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

    /// The word of `page`, where this is a leaf table.
    #[inline(always)]
    pub fn leaf_entry(&self, page: u64) -> &'t Entry<F> {
        debug_assert!(self.level == 1 && self.words.len() >= level::<F>(1).entries());
        // SAFETY: F5: the entries of a level, of which the index is one, fit in a frame, of which these are all the words.
        unsafe { self.words.get_unchecked(index_at::<F>(page, 1)) }
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

    /// Takes the lock if it is free now and the table attached; `false`, and the lock is not taken, otherwise. Who has `waited` comes again and
    /// again, and looks first, so that the line is taken from the holder only when there is a lock to be had.
    #[inline]
    pub fn try_lock_attached(&self, waited: bool) -> bool {
        if waited && self.slot.flags().contains(SlotFlags::LOCKED) {
            return false;
        }
        let before = self.slot.set_flags(SlotFlags::LOCKED);
        if before.contains(SlotFlags::LOCKED) {
            return false;
        }
        let stray = before.contains(SlotFlags::STRAY) && !mutant!("walk-ignores-stray");
        if stray {
            self.unlock();
        }
        !stray
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

    /// Upper entries that point to it, in all spaces.
    #[inline]
    pub fn shares(&self) -> u32 {
        self.slot.count()
    }

    /// Gives up the upper entry that the caller had; whether others are left. If not, the table is the caller's.
    #[inline]
    pub fn drop_share(&self) -> bool {
        drop_share(self.slot)
    }

    /// Words that are not zero, and holds. The caller holds the lock, or wants an old value.
    #[inline(always)]
    pub fn live(&self) -> u32 {
        (self.slot.index().load(Ordering::Relaxed) & LIVE_MASK) as u32
    }

    /// Tables that it points to, word by word. Nobody changes it meanwhile.
    #[cold]
    pub fn tables(&self) -> usize {
        let entries = self.entries(0, level::<F>(self.level).entries());
        let words = entries.iter().map(F::Word::load);
        words.filter(|&word| F::is_table(self.level, word)).count()
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

    /// Takes the lock of a private table: who finds the table once it is attached waits.
    #[inline]
    pub fn lock_private(&self) {
        self.slot.lock_private();
    }

    /// Makes the slot of a private, zero frame that of an empty table of the space with this root, from `page` on.
    #[inline]
    pub fn claim(&self, page: Page, root: Frame) {
        TableSlot::claim(self.slot, self.level as u8, page).set_owner(TableOwner::Space(root));
    }
}

/// Finds the slots of tables one after the other, faster where they lie together.
pub(crate) struct Slots<'t> {
    table: &'t FrameTable,
    first: u64,
    slots: &'t [FrameSlot],
}

impl<'t> Slots<'t> {
    pub fn new<E: Env>(env: &'t E) -> Self {
        Self {
            table: env.slots(),
            first: 0,
            slots: &[],
        }
    }

    /// The slot of a table.
    #[inline(always)]
    pub fn of(&mut self, frame: Frame) -> &'t FrameSlot {
        let at = frame.number().wrapping_sub(self.first);
        match usize::try_from(at).ok().and_then(|at| self.slots.get(at)) {
            Some(slot) => slot,
            None => self.find(frame),
        }
    }

    #[cold]
    fn find(&mut self, frame: Frame) -> &'t FrameSlot {
        // As in `View::node`.
        let Some((first, slots)) = self.table.slots_around(frame) else {
            unreachable!("a page table without a frame slot")
        };
        (self.first, self.slots) = (first.number(), slots);
        &slots[(frame.number() - self.first) as usize]
    }
}

/// Counts one more upper entry of a table without pins; gives its live count, or `None` where it cannot be shared. The caller has the lock of
/// a table that leads here, and nobody locks this one without the lock of one that does (`N5`).
#[inline(always)]
pub(crate) fn share(slot: &FrameSlot) -> Option<u32> {
    let index = slot.index().load(Ordering::Relaxed);
    let shared = index >> PINS_SHIFT == 0 && (mutant!("share-not-counted") || add_share(slot));
    shared.then_some((index & LIVE_MASK) as u32)
}

/// Counts one more upper entry of a table, which may have pins; `false` where it has as many as can be counted. As [`share`].
#[inline(always)]
pub(crate) fn add_share(slot: &FrameSlot) -> bool {
    slot.add_second() || slot.add_count(1).is_ok()
}

/// Whether frames that a table maps are pinned.
#[inline(always)]
pub(crate) fn has_pins(slot: &FrameSlot) -> bool {
    slot.index().load(Ordering::Relaxed) >> PINS_SHIFT != 0
}

/// Gives up an upper entry of a table; whether others are left. As [`Node::drop_share`].
#[inline(always)]
pub(crate) fn drop_share(slot: &FrameSlot) -> bool {
    slot.drop_one() > 0
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
    take_known::<F, S>(entry, F::Word::load(entry))
}

/// As [`take`], where the word was read already, under the lock.
#[inline(always)]
pub(crate) fn take_known<F: Format, S: Liveness>(entry: &Entry<F>, word: u64) -> u64 {
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
