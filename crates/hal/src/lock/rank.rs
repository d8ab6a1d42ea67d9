//! Rank-checked locks: the lock order as code.
//!
//! Each lock of the family has a rank; a context may take a lock only if its rank is higher than that of every lock
//! it holds (page tables: parent before child, which is checked by level inside one rank). A wrong order is a deadlock
//! that may show once a year; a rank check shows it at the first run of the path, on one CPU.
//!
//! The check keeps the ranks a context holds in a [`RankTracker`] that the *user* supplies (one per thread or
//! coroutine: the mock and the host have one). Without a tracker, and in builds without `debug_assertions`, a
//! [`Ranked`] lock is the lock itself.
//!
//! Invariant `R1`: the ranks held by one tracker are strictly ascending in the order they were taken.

use core::ops::{Deref, DerefMut};

use super::{Lock, LockGuard, RawLock};
use crate::sync::LocalU32;

/// The family's lock order, outermost first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Rank {
    /// An address space's write lock.
    Mm = 0,
    /// One VMA.
    Vma = 1,
    /// A reverse map.
    ReverseMap = 2,
    /// One page's state.
    Page = 3,
    /// A page table nearest the root (level 5 or the top).
    Table5 = 4,
    /// A level-4 table.
    Table4 = 5,
    /// A level-3 table.
    Table3 = 6,
    /// A level-2 table.
    Table2 = 7,
    /// A leaf table.
    Table1 = 8,
    /// A slab depot or slab list.
    SlabDepot = 9,
    /// A block of the page-frame allocator, or a zone's lock.
    BuddyBlock = 10,
}

/// The ranks that one context holds, as a bit set.
#[derive(Debug)]
pub struct RankTracker(LocalU32);

impl RankTracker {
    crate::const_new! {
        /// A context that holds nothing.
        pub fn new() -> Self {
            Self(LocalU32::new(0))
        }
    }

    /// Notes that a lock of `rank` is about to be taken; `false` if that breaks the order (`R1`).
    #[must_use]
    pub fn acquire(&self, rank: Rank) -> bool {
        let held = self.0.get();
        let legal = held >> rank as u32 == 0;
        self.0.set(held | 1 << rank as u32);
        legal
    }

    /// Notes that a lock of `rank` was let go.
    pub fn release(&self, rank: Rank) {
        self.0.set(self.0.get() & !(1 << rank as u32));
    }

    /// The highest rank held.
    #[must_use]
    pub fn holds_any(&self) -> bool {
        self.0.get() != 0
    }
}

impl Default for RankTracker {
    fn default() -> Self {
        Self::new()
    }
}

/// A [`Lock`] with a rank.
#[derive(Debug)]
pub struct Ranked<T, L> {
    lock: Lock<T, L>,
    rank: Rank,
}

impl<T, L: RawLock> Ranked<T, L> {
    crate::const_new! {
        /// Puts `value` behind a free lock of `rank`.
        pub fn new(rank: Rank, value: T) -> Self {
            Self { lock: Lock::new(value), rank }
        }
    }

    /// Waits for the lock, after a check against what `tracker` holds.
    ///
    /// # Panics
    ///
    /// In builds with `debug_assertions`, where the order would be broken: that is a bug in kmem.
    pub fn lock<'a>(&'a self, tracker: Option<&'a RankTracker>) -> RankedGuard<'a, T, L> {
        if cfg!(debug_assertions)
            && let Some(tracker) = tracker
        {
            assert!(
                tracker.acquire(self.rank),
                "lock order broken: {:?} is taken while a lock of the same or a later rank is held",
                self.rank
            );
        }
        RankedGuard {
            guard: self.lock.lock(),
            rank: self.rank,
            tracker,
        }
    }
}

/// Access to a ranked lock's value.
#[derive(Debug)]
pub struct RankedGuard<'a, T, L: RawLock> {
    guard: LockGuard<'a, T, L>,
    rank: Rank,
    tracker: Option<&'a RankTracker>,
}

impl<T, L: RawLock> Deref for RankedGuard<'_, T, L> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T, L: RawLock> DerefMut for RankedGuard<'_, T, L> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

impl<T, L: RawLock> Drop for RankedGuard<'_, T, L> {
    fn drop(&mut self) {
        if cfg!(debug_assertions)
            && let Some(tracker) = self.tracker
        {
            tracker.release(self.rank);
        }
    }
}
