//! Counts the frames that a source has given and not got back: the other side of "allocated" in every check.
//!
//! The allocator knows how many frames it gave; this wrapper stands in the callers' way and counts by itself, in a map of
//! its own, by first frame and order. A block that comes back with another order, or twice, is noted as well.

use kmem_hal::{AllocError, FrameRequest, FrameSink, FrameSource, OwnedFrame};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// A source and what it has out.
#[derive(Debug)]
pub struct Counted<S> {
    inner: S,
    out: Mutex<Ledger>,
}

/// The books.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ledger {
    /// First frame and order of every block that is out.
    pub blocks: HashMap<u64, u8>,
    /// Frames in them.
    pub frames: u64,
    /// The most frames that were out at once.
    pub peak: u64,
    /// Blocks given so far.
    pub given: u64,
    /// Blocks taken back so far.
    pub taken: u64,
    /// Blocks that were given while they were out, or taken back while they were not, or with another order.
    pub wrong: u64,
}

impl<S> Counted<S> {
    /// Stands before a source.
    pub fn new(inner: S) -> Self {
        Self {
            inner,
            out: Mutex::default(),
        }
    }

    /// What is out now.
    pub fn ledger<R>(&self, look: impl FnOnce(&Ledger) -> R) -> R {
        look(&self.out.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn note(&self, change: impl FnOnce(&mut Ledger)) {
        change(&mut self.out.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

// SAFETY: F1 to F3 are the inner source's; a block passes through unchanged.
unsafe impl<S: FrameSource> FrameSource for Counted<S> {
    #[track_caller]
    fn alloc(&self, request: &FrameRequest) -> Result<OwnedFrame, AllocError> {
        let frame = self.inner.alloc(request)?;
        self.note(|books| {
            let order = frame.order();
            books.given += 1;
            books.frames += order.frames();
            books.peak = books.peak.max(books.frames);
            books.wrong += u64::from(
                books
                    .blocks
                    .insert(frame.first().number(), order.get())
                    .is_some(),
            );
        });
        Ok(frame)
    }
    kmem_hal::forward_nodes!(inner);
}

impl<S: FrameSink> FrameSink for Counted<S> {
    #[track_caller]
    fn free(&self, frame: OwnedFrame) {
        self.note(|books| {
            let (first, order) = (frame.first().number(), frame.order());
            books.taken += 1;
            match books.blocks.remove(&first) {
                Some(known) if known == order.get() => books.frames -= order.frames(),
                _ => books.split_free(first, order.get()),
            }
        });
        self.inner.free(frame);
    }
}

impl Ledger {
    /// A part of a block may come back alone, as owners may split what they own: the rest stays out as smaller blocks.
    fn split_free(&mut self, first: u64, order: u8) {
        let size = 1u64 << order;
        // The block that covers this one: naturally aligned, of any larger order.
        let cover = (order + 1..=52).find_map(|o| {
            let base = first & !((1u64 << o) - 1);
            self.blocks
                .get(&base)
                .filter(|known| **known >= o)
                .map(|known| (base, *known))
        });
        let Some((base, mut have)) = cover else {
            self.wrong += 1;
            return;
        };
        self.blocks.remove(&base);
        let mut at = base;
        while have > order {
            have -= 1;
            let half = 1u64 << have;
            if first < at + half {
                self.blocks.insert(at + half, have);
            } else {
                self.blocks.insert(at, have);
                at += half;
            }
        }
        self.frames -= size;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kmem_hal::Order;
    use kmem_mock_x86::{FramePool, Machine};

    #[test]
    fn what_is_out_is_known() {
        let machine = Machine::pc(16 << 20, 1);
        let pool = FramePool::new(&machine, 256);
        let counted = Counted::new(pool);
        let one = counted.alloc(&FrameRequest::ONE).unwrap();
        let eight = counted
            .alloc(&FrameRequest::new(Order::new(3).unwrap()))
            .unwrap();
        assert_eq!(
            counted.ledger(|l| (l.frames, l.given, l.blocks.len())),
            (9, 2, 2)
        );
        counted.free(one);
        let (low, high) = eight.split().unwrap();
        counted.free(high);
        assert_eq!(counted.ledger(|l| (l.frames, l.wrong, l.peak)), (4, 0, 9));
        counted.free(low);
        assert_eq!(
            counted.ledger(|l| (l.frames, l.taken, l.wrong, l.blocks.len())),
            (0, 3, 0, 0)
        );
    }

    #[test]
    fn a_block_that_was_never_given_is_wrong() {
        let mut books = Ledger::default();
        books.split_free(8, 0);
        assert_eq!(books.wrong, 1);
    }
}
