//! The policies of replacement beside the textbook's, on the same sequences of pages: faults, and the best that is possible.
//!
//! A hand over a fixed number of frames asks a policy, as reclaim's does over memory. With FIFO and the clock that is the textbook's
//! algorithm, fault for fault; the other two are held between it and the optimum.

use kmem_cow_mm::replacement::{Clock, Fifo, Generations, Replacement, TwoLists, Verdict};
use kmem_testkit::twins::{self, ClockCache, Lru, Optimal, faults};
use proptest::prelude::*;

/// A fixed number of frames under a policy: what reclaim does with memory, without the memory.
struct Frames<P> {
    policy: P,
    room: usize,
    /// Page, age, used.
    dial: Vec<(u64, u16, bool)>,
    hand: usize,
}

impl<P: Replacement> Frames<P> {
    fn new(policy: P, room: usize) -> Self {
        Self {
            policy,
            room,
            dial: Vec::new(),
            hand: 0,
        }
    }

    fn victim(&mut self) -> usize {
        loop {
            if self.hand == self.room {
                self.hand = 0;
                self.policy.round();
            }
            let at = self.hand;
            self.hand += 1;
            let entry = &mut self.dial[at];
            let used = std::mem::take(&mut entry.2);
            match self.policy.judge(entry.1, used) {
                Verdict::Keep(age) => entry.1 = age,
                Verdict::Evict => return at,
            }
        }
    }
}

impl<P: Replacement> twins::Replacement for Frames<P> {
    fn touch(&mut self, page: u64) -> Option<Option<u64>> {
        if let Some(entry) = self.dial.iter_mut().find(|entry| entry.0 == page) {
            entry.2 = true;
            return None;
        }
        if self.dial.len() < self.room {
            self.dial.push((page, 0, true));
            return Some(None);
        }
        let at = self.victim();
        let gone = std::mem::replace(&mut self.dial[at], (page, 0, true));
        Some(Some(gone.0))
    }
}

/// Mostly a few hot pages, and a scan now and then: what programs do.
fn with_a_hot_set(length: usize) -> Vec<u64> {
    let mut state = 88172645463325252u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut pages = Vec::new();
    while pages.len() < length {
        if next() % 64 == 0 {
            let start = 100 + next() % 400;
            pages.extend(start..start + 24);
        } else {
            pages.push(next() % 24);
        }
    }
    pages
}

proptest! {
    #[test]
    fn fifo_and_the_clock_are_the_textbooks(pages in proptest::collection::vec(0..40u64, 1..400), room in 1..20usize) {
        prop_assert_eq!(
            faults(&mut Frames::new(Fifo, room), &pages),
            faults(&mut twins::Fifo::new(room), &pages)
        );
        prop_assert_eq!(
            faults(&mut Frames::new(Clock, room), &pages),
            faults(&mut ClockCache::new(room), &pages)
        );
    }

    #[test]
    fn no_policy_beats_the_optimum(pages in proptest::collection::vec(0..40u64, 1..300), room in 1..20usize) {
        let best = faults(&mut Optimal::new(room, &pages), &pages);
        prop_assert!(faults(&mut Frames::new(TwoLists, room), &pages) >= best);
        prop_assert!(faults(&mut Frames::new(Generations::default(), room), &pages) >= best);
    }
}

#[test]
fn a_scan_does_not_push_the_hot_pages_out() {
    let pages = with_a_hot_set(20_000);
    let room = 40;
    let best = faults(&mut Optimal::new(room, &pages), &pages);
    let fifo = faults(&mut Frames::new(Fifo, room), &pages);
    let lru = faults(&mut Lru::new(room), &pages);
    let clock = faults(&mut Frames::new(Clock, room), &pages);
    let two = faults(&mut Frames::new(TwoLists, room), &pages);
    let generations = faults(&mut Frames::new(Generations::default(), room), &pages);
    println!(
        "faults: optimum {best}, two lists {two}, generations {generations}, clock {clock}, LRU {lru}, FIFO {fifo}"
    );
    assert!(best < two && two < fifo, "{best} {two} {fifo}");
    assert!(
        generations < fifo && clock < fifo,
        "{generations} {clock} {fifo}"
    );
}
