//! Which page goes: policies of page replacement.
//!
//! A hand moves over the frames, round and round, and asks the policy about each page of a program or a file: was it used since the hand
//! was last here, and what did the policy write down about it then (its age, twelve bits in the frame's slot)? There are no lists of pages:
//! faults put nothing in order and take no lock for it, and the order is that of the frames.
//!
//! ```text
//!            ┌── hand ──>
//!   frame   [ 17 ][ 18 ][ 19 ][ 20 ]        judge(age, used) ── Keep(new age)
//!   age       3     0     1     3                            └─ Evict
//! ```
//!
//! | policy | its age says | goes |
//! |---|---|---|
//! | [`Fifo`] | | the page under the hand, used or not: frames are filled in the order in which the hand empties them |
//! | [`Clock`] | | the first that was not used since the hand was here: second chance |
//! | [`TwoLists`] | inactive, inactive and used once, active | an inactive page that was not used; an active one becomes inactive first |
//! | [`Generations`] | the round in which it was last used | what was last used two rounds ago or earlier |
//!
//! Source: Corbato, "A Paging Experiment with the Multics System", 1968; Linux `mm/vmscan.c` and `mm/workingset.c` (two lists, generations).

/// What becomes of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It stays, and this is its age until the hand comes again: at most 4095.
    Keep(u16),
    /// It goes.
    Evict,
}

/// A policy of page replacement.
///
/// # Examples
///
/// A policy that never lets go what was ever used:
///
/// ```
/// use kmem_cow_mm::replacement::{Replacement, Verdict};
///
/// struct Miser;
/// impl Replacement for Miser {
///     fn judge(&mut self, age: u16, used: bool) -> Verdict {
///         if used || age > 0 { Verdict::Keep(1) } else { Verdict::Evict }
///     }
/// }
/// assert_eq!(Miser.judge(0, false), Verdict::Evict);
/// ```
pub trait Replacement {
    /// The hand is at a page. `age` is what the policy kept about it, 0 for one that is new to it; `used` says whether it was
    /// accessed since.
    fn judge(&mut self, age: u16, used: bool) -> Verdict;

    /// The hand has been at every frame once more.
    fn round(&mut self) {}
}

/// First in, first out.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fifo;

impl Replacement for Fifo {
    fn judge(&mut self, _age: u16, _used: bool) -> Verdict {
        Verdict::Evict
    }
}

/// Second chance: a page that was used stays for another round.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock;

impl Replacement for Clock {
    fn judge(&mut self, _age: u16, used: bool) -> Verdict {
        if used {
            Verdict::Keep(0)
        } else {
            Verdict::Evict
        }
    }
}

/// Least recently used, in two lists: what was used twice is active, and has to be left alone for two rounds to go.
#[doc(alias = "LRU")]
#[derive(Clone, Copy, Debug, Default)]
pub struct TwoLists;

impl TwoLists {
    const INACTIVE: u16 = 0;
    const USED_ONCE: u16 = 1;
    const ACTIVE: u16 = 2;
}

impl Replacement for TwoLists {
    fn judge(&mut self, age: u16, used: bool) -> Verdict {
        match (age, used) {
            (Self::INACTIVE, true) => Verdict::Keep(Self::USED_ONCE),
            (_, true) => Verdict::Keep(Self::ACTIVE),
            (Self::ACTIVE, false) => Verdict::Keep(Self::INACTIVE),
            (_, false) => Verdict::Evict,
        }
    }
}

/// Generations: each round of the hand is one, and the oldest go.
#[doc(alias = "MGLRU")]
#[derive(Clone, Copy, Debug)]
pub struct Generations {
    now: u16,
}

impl Generations {
    /// Generations that stay beside the newest.
    const KEPT: u16 = 1;
    const COUNT: u16 = 0xfff;
}

impl Default for Generations {
    fn default() -> Self {
        Self { now: 1 }
    }
}

impl Replacement for Generations {
    fn judge(&mut self, age: u16, used: bool) -> Verdict {
        if used {
            return Verdict::Keep(self.now);
        }
        if age == 0 {
            // Brought in and not touched again: as old as may be.
            return Verdict::Evict;
        }
        let rounds = (self.now + Self::COUNT - age) % Self::COUNT;
        if rounds > Self::KEPT {
            Verdict::Evict
        } else {
            Verdict::Keep(age)
        }
    }

    fn round(&mut self) {
        self.now = self.now % Self::COUNT + 1;
    }
}
