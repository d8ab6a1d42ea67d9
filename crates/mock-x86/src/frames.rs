//! Who owns each frame, since when, and what happened to it: the memory of the detective.
//!
//! ```text
//!  words[frame]  = (number of the event that freed it last) << 2 | state     8 bytes a frame, lazily committed
//!  heads[frame]  = number of its youngest event, + 1                          8 bytes a frame, lazily committed
//!
//!  ring of events   .. | e17 frame 5, previous 3 | e18 frame 9 .. | e19 frame 5, previous 17 | ..
//!                              ^------------------- chain of frame 5 ----------------|
//! ```
//!
//! A translation remembers the number of the event counter at its fill. It is older than its frame's owner if the frame
//! was freed after that: one load and one compare per access.
//!
//! Invariants
//! - `I1` event numbers rise by one; an event's `previous` is smaller than its own number, or 0 for none (numbers start at 1).
//! - `I2` only a free changes the number in `words`, so that an allocation of an untracked frame accuses nobody.
//!
//! Costs: the ring is bounded (default 2^18 events of 56 bytes, allocated as it fills); a chain simply ends where the ring
//! has been overwritten.

use std::fmt;
use std::io;
use std::panic::Location;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::arena::Arena;

/// What the machine has been told about a frame's owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameState {
    /// Nobody has said anything about the frame: no check applies to it.
    Untracked,
    /// It belongs to somebody.
    Allocated,
    /// It is free: any use is a violation.
    Free,
}

/// What happened to a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FrameEventKind {
    /// An owner took it.
    Allocated,
    /// Its owner gave it back.
    Freed,
    /// It was mapped at this linear address.
    Mapped(u64),
    /// The mapping at this linear address was removed.
    Unmapped(u64),
    /// A CPU cached a translation of this linear address to it.
    Filled(u64),
    /// A CPU cached it as a paging structure on the way to this linear address.
    FilledTable(u64),
}

/// One event in the life of a frame.
#[derive(Debug, Clone, Copy)]
pub struct FrameEvent {
    /// The frame's number.
    pub frame: u64,
    /// The machine's step at the time.
    pub step: u64,
    /// What happened.
    pub kind: FrameEventKind,
    /// The CPU it happened on.
    pub cpu: usize,
    /// The line of code that said so; `None` for the hardware's own doing.
    pub by: Option<&'static Location<'static>>,
    /// Number of the frame's event before this one, 0 for none.
    previous: u64,
}

impl fmt::Display for FrameEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            FrameEventKind::Allocated => write!(f, "allocated")?,
            FrameEventKind::Freed => write!(f, "freed")?,
            FrameEventKind::Mapped(va) => write!(f, "mapped at {va:#x}")?,
            FrameEventKind::Unmapped(va) => write!(f, "unmapped from {va:#x}")?,
            FrameEventKind::Filled(va) => write!(f, "cached in a TLB for {va:#x}")?,
            FrameEventKind::FilledTable(va) => {
                write!(f, "cached as a table on the way to {va:#x}")?
            }
        }
        write!(f, " at step {} on CPU {}", self.step, self.cpu)?;
        if let Some(by) = self.by {
            write!(f, " by {}:{}", by.file(), by.line())?;
        }
        Ok(())
    }
}

/// Owners and histories of all frames of a machine.
#[derive(Debug)]
pub(crate) struct Frames {
    words: Arena,
    heads: Arena,
    limit: u64,
    ring: Vec<FrameEvent>,
    capacity: usize,
    /// Number of the next event.
    next: AtomicU64,
}

const STATE_MASK: u64 = 3;
const ALLOCATED: u64 = 1;
const FREE: u64 = 2;

impl Frames {
    /// Keeps books for the frames below `limit`, with `capacity` events of history (0: none).
    pub(crate) fn new(limit: u64, capacity: usize) -> io::Result<Self> {
        Ok(Self {
            words: Arena::new(limit * 8)?,
            heads: Arena::new(limit * 8)?,
            limit,
            ring: Vec::new(),
            capacity,
            next: AtomicU64::new(1),
        })
    }

    /// The number the next event will get: what a translation remembers at its fill.
    #[inline]
    pub(crate) fn now(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    #[inline]
    fn word(&self, frame: u64) -> u64 {
        if frame < self.limit {
            self.words.word(frame as usize).load(Ordering::Relaxed)
        } else {
            0
        }
    }

    /// The state of a frame.
    #[inline]
    pub(crate) fn state(&self, frame: u64) -> FrameState {
        match self.word(frame) & STATE_MASK {
            ALLOCATED => FrameState::Allocated,
            FREE => FrameState::Free,
            _ => FrameState::Untracked,
        }
    }

    /// Returns whether the frame was freed at or after event number `since`, or is free now.
    #[inline]
    pub(crate) fn freed_since(&self, frame: u64, since: u64) -> bool {
        let word = self.word(frame);
        word & STATE_MASK == FREE || (word >> 2 != 0 && word >> 2 >= since)
    }

    /// Notes an event, and the change of owner that it means. Frames behind all memory are ignored.
    pub(crate) fn note(
        &mut self,
        frame: u64,
        kind: FrameEventKind,
        step: u64,
        cpu: usize,
        by: Option<&'static Location<'static>>,
    ) {
        if frame >= self.limit {
            return;
        }
        let number = self.next.load(Ordering::Relaxed);
        let word = self.words.word(frame as usize);
        match kind {
            FrameEventKind::Allocated => {
                word.store(
                    word.load(Ordering::Relaxed) & !STATE_MASK | ALLOCATED,
                    Ordering::Relaxed,
                );
            }
            FrameEventKind::Freed => word.store(number << 2 | FREE, Ordering::Relaxed),
            _ if self.capacity == 0 => return,
            _ => {}
        }
        self.next.store(number + 1, Ordering::Relaxed);
        if self.capacity == 0 {
            return;
        }
        let head = self.heads.word(frame as usize);
        let event = FrameEvent {
            frame,
            step,
            kind,
            cpu,
            by,
            previous: head.load(Ordering::Relaxed),
        };
        head.store(number, Ordering::Relaxed);
        let slot = (number - 1) as usize % self.capacity;
        if slot < self.ring.len() {
            self.ring[slot] = event;
        } else {
            self.ring.push(event);
        }
    }

    /// The remembered events of a frame, oldest first, at most `most` of the youngest.
    pub(crate) fn history(&self, frame: u64, most: usize) -> Vec<FrameEvent> {
        let mut events = Vec::new();
        if frame >= self.limit || self.capacity == 0 {
            return events;
        }
        let next = self.next.load(Ordering::Relaxed);
        let mut number = self.heads.word(frame as usize).load(Ordering::Relaxed);
        // I1: numbers fall, so this ends.
        while number != 0 && next - number <= self.capacity as u64 && events.len() < most {
            let event = self.ring[(number - 1) as usize % self.capacity];
            events.push(event);
            number = event.previous;
        }
        events.reverse();
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_free_after_the_fill_accuses() {
        let mut frames = Frames::new(16, 8).unwrap();
        let fill = frames.now();
        frames.note(3, FrameEventKind::Allocated, 1, 0, None);
        assert!(
            !frames.freed_since(3, fill),
            "allocating an untracked frame accuses nobody"
        );
        let fill = frames.now();
        frames.note(3, FrameEventKind::Freed, 2, 0, None);
        assert!(frames.freed_since(3, fill));
        frames.note(3, FrameEventKind::Allocated, 3, 0, None);
        assert_eq!(frames.state(3), FrameState::Allocated);
        assert!(
            frames.freed_since(3, fill),
            "its old owner is gone all the same"
        );
        assert!(!frames.freed_since(3, frames.now()));
        assert_eq!(frames.state(99), FrameState::Untracked);
    }

    #[test]
    fn a_history_ends_where_the_ring_was_overwritten() {
        let mut frames = Frames::new(16, 4).unwrap();
        frames.note(1, FrameEventKind::Allocated, 1, 0, None);
        frames.note(2, FrameEventKind::Allocated, 2, 0, None);
        frames.note(1, FrameEventKind::Mapped(0x1000), 3, 1, None);
        let steps = |frames: &Frames, frame| -> Vec<u64> {
            frames
                .history(frame, 8)
                .iter()
                .map(|event| event.step)
                .collect()
        };
        assert_eq!(steps(&frames, 1), [1, 3]);
        frames.note(2, FrameEventKind::Freed, 4, 0, None);
        frames.note(2, FrameEventKind::Allocated, 5, 0, None);
        assert_eq!(steps(&frames, 1), [3], "the first event is overwritten");
        assert_eq!(steps(&frames, 2), [2, 4, 5]);
        assert_eq!(frames.history(2, 2).len(), 2);
        assert_eq!(steps(&frames, 7), [0u64; 0]);
    }
}
