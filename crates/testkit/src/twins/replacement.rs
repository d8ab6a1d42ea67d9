//! Page replacement as it is taught: FIFO, LRU, the clock (second chance), and the best that is possible.
//!
//! ```text
//!        ┌── hand
//!   [a 1][b 0][c 1]      clock: a frame whose bit is 1 gets a second chance and 0, the first with 0 goes
//! ```
//!
//! Source: Corbato, "A Paging Experiment with the Multics System", 1968 (clock); Belady, "A study of replacement
//! algorithms", 1966 (the optimum, and FIFO's anomaly).

use std::collections::VecDeque;

/// A policy over a fixed number of frames.
pub trait Replacement {
    /// Uses `page`; `None` where it was there, otherwise it is there now, and this is the page that went (if one did).
    fn touch(&mut self, page: u64) -> Option<Option<u64>>;
}

/// Faults of a policy on a sequence of pages.
///
/// # Examples
///
/// ```
/// use kmem_testkit::twins::{ClockCache, Fifo, Lru, Optimal, faults};
///
/// let pages = [1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5];
/// // Belady's anomaly: FIFO with more frames faults more.
/// assert_eq!(faults(&mut Fifo::new(3), &pages), 9);
/// assert_eq!(faults(&mut Fifo::new(4), &pages), 10);
/// assert_eq!(faults(&mut Lru::new(4), &pages), 8);
/// assert_eq!(faults(&mut ClockCache::new(4), &pages), 10);
/// assert_eq!(faults(&mut Optimal::new(4, &pages), &pages), 6);
/// ```
pub fn faults(policy: &mut impl Replacement, pages: &[u64]) -> usize {
    pages
        .iter()
        .filter(|&&page| policy.touch(page).is_some())
        .count()
}

/// First in, first out.
#[derive(Clone, Debug)]
pub struct Fifo {
    frames: usize,
    queue: VecDeque<u64>,
}

impl Fifo {
    /// A policy over `frames` frames.
    #[must_use]
    pub fn new(frames: usize) -> Self {
        Self {
            frames,
            queue: VecDeque::new(),
        }
    }
}

impl Replacement for Fifo {
    fn touch(&mut self, page: u64) -> Option<Option<u64>> {
        if self.queue.contains(&page) {
            return None;
        }
        self.queue.push_back(page);
        let full = self.queue.len() > self.frames;
        Some(full.then(|| self.queue.pop_front()).flatten())
    }
}

/// Least recently used.
#[derive(Clone, Debug)]
pub struct Lru(Fifo);

impl Lru {
    /// A policy over `frames` frames.
    #[must_use]
    pub fn new(frames: usize) -> Self {
        Self(Fifo::new(frames))
    }
}

impl Replacement for Lru {
    fn touch(&mut self, page: u64) -> Option<Option<u64>> {
        let at = self.0.queue.iter().position(|&other| other == page);
        if let Some(at) = at {
            self.0.queue.remove(at);
            self.0.queue.push_back(page);
            return None;
        }
        self.0.touch(page)
    }
}

/// The clock: FIFO with a second chance for pages that were used.
#[derive(Clone, Debug)]
pub struct ClockCache {
    frames: usize,
    /// (page, used) round the clock.
    dial: Vec<(u64, bool)>,
    hand: usize,
}

impl ClockCache {
    /// A policy over `frames` frames.
    #[must_use]
    pub fn new(frames: usize) -> Self {
        Self {
            frames,
            dial: Vec::new(),
            hand: 0,
        }
    }
}

impl Replacement for ClockCache {
    fn touch(&mut self, page: u64) -> Option<Option<u64>> {
        if let Some(entry) = self.dial.iter_mut().find(|entry| entry.0 == page) {
            entry.1 = true;
            return None;
        }
        if self.dial.len() < self.frames {
            self.dial.push((page, true));
            return Some(None);
        }
        loop {
            let entry = self.dial.get_mut(self.hand)?;
            self.hand = (self.hand + 1) % self.frames;
            if entry.1 {
                entry.1 = false;
                continue;
            }
            let gone = entry.0;
            *entry = (page, true);
            return Some(Some(gone));
        }
    }
}

/// Belady's optimum: the page that is used again last goes. It knows the future, which is its only fault.
#[derive(Clone, Debug)]
pub struct Optimal {
    frames: usize,
    held: Vec<u64>,
    future: VecDeque<u64>,
}

impl Optimal {
    /// A policy over `frames` frames for exactly this sequence of pages.
    #[must_use]
    pub fn new(frames: usize, pages: &[u64]) -> Self {
        Self {
            frames,
            held: Vec::new(),
            future: pages.iter().copied().collect(),
        }
    }
}

impl Replacement for Optimal {
    fn touch(&mut self, page: u64) -> Option<Option<u64>> {
        self.future.pop_front();
        if self.held.contains(&page) {
            return None;
        }
        if self.held.len() < self.frames {
            self.held.push(page);
            return Some(None);
        }
        let next_use = |held: u64| {
            let found = self.future.iter().position(|&other| other == held);
            found.unwrap_or(usize::MAX)
        };
        let at = (0..self.held.len()).max_by_key(|&at| next_use(self.held[at]))?;
        Some(Some(std::mem::replace(&mut self.held[at], page)))
    }
}
