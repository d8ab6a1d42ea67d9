//! Blocks that nested calls freed while the lock that they needed was held by what they interrupted.
//!
//! ```text
//!   slots   [ block | block | - | .. ]      any block
//!   chain   block --> block --> block       where no slot is empty: the link is the first word of a block's own memory
//! ```
//!
//! Whoever interrupts the holder of a zone's lock cannot wait for it, and has nobody to give an error to: its block waits here. The
//! interrupted call gives all that waits to the zones before it returns, and so does every other call that comes by.
//!
//! A chain in free memory has no end, so that nothing is lost; it is the one case in which the allocator writes to frames. A block
//! that is not mapped (HIGHMEM, or out of reach) can wait in a slot alone: a mapped one makes way for it.
//!
//! Invariants
//! - `P1`: `waiting` counts a block before it can be found here, and until it is in its zone. So who sees 0 knows that the zones and the
//!   arrays have everything.
//! - `P2`: a block in the chain is in reach of the memory map, and nobody's but this pool's.
//!
//! Costs: one load for each call that reaches a zone. Locked instructions where something waits.

use kmem_hal::sync::{AtomicU32, AtomicU64, Ordering};
use kmem_hal::{Frame, FrameRange, PhysMap};

#[cfg(not(loom))]
const SLOTS: usize = 32;
#[cfg(loom)]
const SLOTS: usize = 2;

/// No block.
const NONE: u64 = 0;

/// What says which block waits: never `NONE`.
const fn entry_of(first: u64, order: usize) -> u64 {
    first << 8 | (order as u64) << 1 | 1
}

/// First frame and order.
const fn block_of(entry: u64) -> (u64, usize) {
    (entry >> 8, (entry >> 1 & 0x7f) as usize)
}

/// The first word of a block's memory; `None` where it is not mapped.
fn link<M: PhysMap>(memory: &M, entry: u64) -> Option<*mut u64> {
    let (first, _) = block_of(entry);
    let frame = FrameRange::from_numbers(first, first + 1)?;
    let mapped = memory.reach().contains_range(frame);
    mapped.then(|| memory.to_ptr(Frame::from_number(first).start()).cast())
}

/// The pool of one allocator.
pub(crate) struct Pending {
    waiting: AtomicU32,
    chain: AtomicU64,
    slots: [AtomicU64; SLOTS],
    lost: AtomicU64,
}

impl Pending {
    pub fn new() -> Self {
        Self {
            waiting: AtomicU32::new(0),
            chain: AtomicU64::new(NONE),
            slots: core::array::from_fn(|_| AtomicU64::new(NONE)),
            lost: AtomicU64::new(0),
        }
    }

    /// Whether all blocks are in their zones (`P1`).
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.waiting.load(Ordering::Acquire) == 0
    }

    /// Frames of blocks that are not mapped and found no slot.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Keeps a block, which is free, until somebody takes it.
    #[cold]
    pub fn leave<M: PhysMap>(&self, memory: &M, first: u64, order: usize) {
        self.waiting.fetch_add(1, Ordering::AcqRel);
        let entry = entry_of(first, order);
        if self.slots.iter().any(|slot| exchange(slot, NONE, entry)) {
            return;
        }
        if link(memory, entry).is_some() {
            return self.push(memory, entry);
        }
        for slot in &self.slots {
            let other = slot.load(Ordering::Acquire);
            let gone = other == NONE || link(memory, other).is_some();
            if gone && exchange(slot, other, entry) {
                if other != NONE {
                    self.push(memory, other);
                }
                return;
            }
        }
        self.lost.fetch_add(1 << order, Ordering::Relaxed);
        self.waiting.fetch_sub(1, Ordering::AcqRel);
    }

    /// Puts a mapped block on the chain.
    fn push<M: PhysMap>(&self, memory: &M, entry: u64) {
        let Some(link) = link(memory, entry) else {
            return;
        };
        let mut head = self.chain.load(Ordering::Relaxed);
        loop {
            // SAFETY: P2: in reach, so by P1 of `PhysMap` valid for writes; free, and not in the chain yet.
            unsafe { link.write(head) };
            let pushed =
                self.chain
                    .compare_exchange(head, entry, Ordering::AcqRel, Ordering::Relaxed);
            match pushed {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    /// Takes all that waits and hands it to `give`, which brings it to its zone; whether there was anything.
    #[cold]
    pub fn take<M: PhysMap>(&self, memory: &M, mut give: impl FnMut(u64, usize)) -> bool {
        let mut any = false;
        let mut one = |entry| {
            let (first, order) = block_of(entry);
            give(first, order);
            self.waiting.fetch_sub(1, Ordering::AcqRel);
            any = true;
        };
        for slot in &self.slots {
            let entry = slot.swap(NONE, Ordering::AcqRel);
            if entry != NONE {
                one(entry);
            }
        }
        let mut entry = self.chain.swap(NONE, Ordering::AcqRel);
        while entry != NONE {
            let next = link(memory, entry).map_or(NONE, |link| {
                // SAFETY: P2: written before the block came onto the chain, which is this call's alone now.
                unsafe { link.read() }
            });
            one(entry);
            entry = next;
        }
        any
    }
}

fn exchange(slot: &AtomicU64, from: u64, to: u64) -> bool {
    slot.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed)
        .is_ok()
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    extern crate std;
    use kmem_hal::{OffsetMap, PAGE_SIZE};
    use std::vec;
    use std::vec::Vec;

    use super::*;

    /// Memory of so many frames; those above have no mapping.
    fn memory(frames: u64) -> OffsetMap {
        let bytes = vec![0u64; ((frames + 1) * PAGE_SIZE / 8) as usize].leak();
        let base = (bytes.as_mut_ptr().expose_provenance() + 0xfff) & !0xfff;
        // SAFETY: the leaked bytes are that many frames.
        unsafe { OffsetMap::new(base, frames) }
    }

    fn taken(pool: &Pending, memory: &OffsetMap) -> Vec<(u64, usize)> {
        let mut all = Vec::new();
        while pool.take(memory, |first, order| all.push((first, order))) {}
        all.sort_unstable();
        all
    }

    #[test]
    fn any_number_of_mapped_blocks_waits() {
        let memory = memory(256);
        let pool = Pending::new();
        for first in 0..256 {
            pool.leave(&memory, first, 0);
        }
        assert!(!pool.is_empty());
        let all: Vec<_> = (0..256).map(|first| (first, 0)).collect();
        assert_eq!(taken(&pool, &memory), all);
        assert!(pool.is_empty());
        assert_eq!(pool.lost(), 0);
    }

    #[test]
    fn mapped_blocks_make_way_for_others() {
        let memory = memory(64);
        let pool = Pending::new();
        for block in 0..40 {
            pool.leave(&memory, block, 0);
        }
        for block in 0..SLOTS as u64 {
            pool.leave(&memory, 1024 + 8 * block, 3);
        }
        assert_eq!(pool.lost(), 0);
        let all = taken(&pool, &memory);
        assert_eq!(all.len(), 40 + SLOTS);
        assert_eq!(all.iter().filter(|(_, order)| *order == 3).count(), SLOTS);
        // There is no room for more of them than slots.
        for block in 0..=SLOTS as u64 {
            pool.leave(&memory, 1024 + 8 * block, 3);
        }
        assert_eq!(pool.lost(), 8);
        assert_eq!(taken(&pool, &memory).len(), SLOTS);
        assert!(pool.is_empty());
    }
}
