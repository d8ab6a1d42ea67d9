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
//! A block on the chain has a second word, a seal over the link and the block's own number. A block that is freed again while it waits is
//! known by it and refused. The chain is read twice: first each link is taken out and sealed anew, in reverse, and only then is
//! anything given. So the chain has no cycle, whoever frees what at the same time, and nothing is read in a block that is a zone's.
//!
//! What remains: a block that is freed here while it is somebody else's (his second free, the first one having reached a zone or an
//! array) has two words of it overwritten where no slot is empty; whether it is free can be seen under the zone's lock alone. Whoever
//! has it writes to it too: the seal is wrong then, the block is left alone and noted as a misuse, and the blocks beyond it are lost.
//!
//! Invariants
//! - `P1`: `waiting` counts a block before it can be found here, and until it is in its zone. So who sees 0 knows that the zones and the
//!   arrays have everything.
//! - `P2`: a block in the chain is in reach of the memory map, and nobody's but this pool's where nobody freed a block that was not his.
//! - `P3`: a link is followed only where its seal is right.
//! - `P4`: a word of the chain has how many blocks it leads to, that one included, or [`DEEPEST`] where they are more: then `waiting` may stay
//!   above 0 where a link is broken, for ever: no refusal promises anything any more, and each call that reaches a zone empties the pool
//!   in vain, with a locked exchange for the chain and for each slot. It takes a wrong free, and more than 8191 blocks on one chain.
//!
//! Costs: one load for each call that reaches a zone. Locked instructions where something waits: an exchange for the chain and for each
//! slot, 33 of them.

use kmem_hal::sync::{AtomicU32, AtomicU64, Ordering};
use kmem_hal::{Frame, FrameRange, Order, PhysMap};

#[cfg(not(loom))]
const SLOTS: usize = 32;
#[cfg(loom)]
const SLOTS: usize = 2;

/// No block.
const NONE: u64 = 0;

/// The seal of a link that was pushed, and of one that has been read once.
const PUSHED: u64 = 0x5d7a_91c3_e8b2_4f06;
const SEEN: u64 = 0xa816_3e5c_174d_b0f9;

/// Bits of an entry of the chain: frames of 56-bit addresses, as long as any architecture's are.
const ENTRY_BITS: u32 = 51;
/// The largest count in a word of the chain.
const DEEPEST: u64 = (1 << (64 - ENTRY_BITS)) - 1;

/// What says which block waits: never `NONE`.
const fn entry_of(first: u64, order: usize) -> u64 {
    first << 7 | (order as u64) << 1 | 1
}

/// First frame and order.
const fn block_of(entry: u64) -> (u64, usize) {
    (entry >> 7, (entry >> 1 & 0x3f) as usize)
}

/// The entry in a word of the chain.
const fn entry_in(word: u64) -> u64 {
    word & ((1 << ENTRY_BITS) - 1)
}

/// How many blocks a word of the chain leads to (`P4`).
const fn depth_in(word: u64) -> u64 {
    word >> ENTRY_BITS
}

/// The first two words of the memory of a mapped block: link and seal.
#[derive(Clone, Copy)]
struct Node {
    words: *mut [u64; 2],
    first: u64,
}

impl Node {
    /// `None` where the block is not mapped, or its number does not fit in a word of the chain.
    fn of<M: PhysMap>(memory: &M, entry: u64) -> Option<Self> {
        let (first, _) = block_of(entry);
        let frame = FrameRange::from_numbers(first, first + 1)?;
        let mapped = entry == entry_in(entry) && memory.reach().contains_range(frame);
        mapped.then(|| Self {
            words: memory.to_ptr(Frame::from_number(first).start()).cast(),
            first,
        })
    }

    const fn seal(self, kind: u64, link: u64) -> u64 {
        kind ^ link.rotate_left(23) ^ self.first
    }

    fn write(self, kind: u64, link: u64) {
        // SAFETY: P2: in reach, so by P1 of `PhysMap` valid for writes; free.
        unsafe { self.words.write_volatile([link, self.seal(kind, link)]) };
    }

    /// The link, where its seal is right (`P3`).
    fn read(self, kind: u64) -> Option<u64> {
        // SAFETY: as above for reads; volatile, so that what is looked at is what is followed, even where somebody writes to a block
        // that he has freed.
        let [link, seal] = unsafe { self.words.read_volatile() };
        let (_, order) = block_of(entry_in(link));
        (seal == self.seal(kind, link) && order <= Order::MAX.index()).then_some(link)
    }

    /// Whether the block is on the chain, or on its way to its zone.
    fn waits(self) -> bool {
        self.read(PUSHED).is_some() || self.read(SEEN).is_some()
    }

    /// Takes the seal away.
    fn clear(self) {
        self.write(0, NONE);
    }
}

/// The pool of one allocator.
pub struct Pending {
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

    /// Frames of blocks that are not mapped and found no slot, and one for each block beyond a broken link.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Keeps a block, which is free, until somebody takes it; `false`, and nothing done, where it waits already.
    #[cold]
    #[must_use]
    pub fn leave<M: PhysMap>(&self, memory: &M, first: u64, order: usize) -> bool {
        let entry = entry_of(first, order);
        let waits = |slot: &AtomicU64| {
            let entry = slot.load(Ordering::Relaxed);
            entry != NONE && block_of(entry).0 == first
        };
        if self.slots.iter().any(waits) {
            return false;
        }
        self.waiting.fetch_add(1, Ordering::AcqRel);
        if self
            .slots
            .iter()
            .any(|slot| replace(slot, NONE, entry).is_ok())
        {
            return true;
        }
        if let Some(node) = Node::of(memory, entry) {
            let new = !node.waits();
            if new {
                self.push(node, entry);
            } else {
                self.waiting.fetch_sub(1, Ordering::AcqRel);
            }
            return new;
        }
        for slot in &self.slots {
            let mut other = slot.load(Ordering::Acquire);
            loop {
                let node = Node::of(memory, other).filter(|_| other != NONE);
                if other != NONE && node.is_none() {
                    break;
                }
                // Whoever empties the pool meanwhile makes room: the slot is looked at again, or the block would be lost beside it.
                match replace(slot, other, entry) {
                    Ok(_) => {
                        if let Some(node) = node {
                            self.push(node, other);
                        }
                        return true;
                    }
                    Err(now) => other = now,
                }
            }
        }
        self.lost.fetch_add(1 << order, Ordering::Relaxed);
        self.waiting.fetch_sub(1, Ordering::AcqRel);
        true
    }

    /// Puts a mapped block on the chain.
    fn push(&self, node: Node, entry: u64) {
        let mut head = self.chain.load(Ordering::Relaxed);
        loop {
            node.write(PUSHED, head);
            let depth = (depth_in(head) + 1).min(DEEPEST);
            let word = entry | depth << ENTRY_BITS;
            let pushed =
                self.chain
                    .compare_exchange(head, word, Ordering::AcqRel, Ordering::Relaxed);
            match pushed {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    /// Takes all that waits and hands it to `give`, which brings it to its zone; whether there was anything. What was freed while it
    /// was somebody's, as it turns out, is handed to `wrong`.
    #[cold]
    pub fn take<M: PhysMap>(
        &self,
        memory: &M,
        give: impl Fn(u64, usize),
        wrong: impl Fn(u64, usize),
    ) -> bool {
        let one = |entry| {
            let (first, order) = block_of(entry);
            give(first, order);
            self.waiting.fetch_sub(1, Ordering::AcqRel);
        };
        // A broken link: its block is kept out of use, and `left` is how many blocks wait no more, that one included.
        let broken = |entry, left: u64| {
            let (first, order) = block_of(entry);
            self.lost.fetch_add(left - 1, Ordering::Relaxed);
            self.waiting.fetch_sub(left as u32, Ordering::AcqRel);
            wrong(first, order);
        };
        // The chain comes first: a block in a slot may be one of it, where two freed it at the same time.
        let mut word = self.chain.swap(NONE, Ordering::AcqRel);
        let mut any = word != NONE;
        let (mut seen, mut left) = (NONE, 0);
        while word != NONE {
            let entry = entry_in(word);
            let node = Node::of(memory, entry);
            let Some((node, next)) = node.and_then(|node| Some((node, node.read(PUSHED)?))) else {
                broken(entry, depth_in(word));
                break;
            };
            node.write(SEEN, seen);
            (seen, left, word) = (entry, left + 1, next);
        }
        while seen != NONE {
            let node = Node::of(memory, seen);
            let Some((node, next)) = node.and_then(|node| Some((node, node.read(SEEN)?))) else {
                broken(seen, left);
                break;
            };
            node.clear();
            one(seen);
            (seen, left) = (next, left - 1);
        }
        for slot in &self.slots {
            let entry = slot.swap(NONE, Ordering::AcqRel);
            if entry != NONE {
                one(entry);
                any = true;
            }
        }
        any
    }
}

/// Puts a block where another one, or none, is; what is there otherwise.
fn replace(slot: &AtomicU64, from: u64, to: u64) -> Result<u64, u64> {
    slot.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire)
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    extern crate std;
    use kmem_hal::{OffsetMap, PAGE_SIZE};
    use std::cell::RefCell;
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
        let all = RefCell::new(Vec::new());
        let give = |first, order| all.borrow_mut().push((first, order));
        while pool.take(memory, give, |first, _| panic!("{first} is wrong")) {}
        let mut all = all.into_inner();
        all.sort_unstable();
        all
    }

    #[test]
    fn any_number_of_mapped_blocks_waits() {
        let memory = memory(256);
        let pool = Pending::new();
        for first in 0..256 {
            assert!(pool.leave(&memory, first, 0));
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
            assert!(pool.leave(&memory, block, 0));
        }
        for block in 0..SLOTS as u64 {
            assert!(pool.leave(&memory, 1024 + 8 * block, 3));
        }
        assert_eq!(pool.lost(), 0);
        let all = taken(&pool, &memory);
        assert_eq!(all.len(), 40 + SLOTS);
        assert_eq!(all.iter().filter(|(_, order)| *order == 3).count(), SLOTS);
        // There is no room for more of them than slots.
        for block in 0..=SLOTS as u64 {
            assert!(pool.leave(&memory, 1024 + 8 * block, 3));
        }
        assert_eq!(pool.lost(), 8);
        assert_eq!(taken(&pool, &memory).len(), SLOTS);
        assert!(pool.is_empty());
    }

    fn node(memory: &OffsetMap, first: u64) -> Node {
        Node::of(memory, entry_of(first, 0)).unwrap()
    }

    /// What is given and what is wrong.
    fn told(pool: &Pending, memory: &OffsetMap) -> (Vec<u64>, Vec<u64>) {
        let (given, wrong) = (RefCell::new(Vec::new()), RefCell::new(Vec::new()));
        let note = |all: &RefCell<Vec<u64>>, first| all.borrow_mut().push(first);
        pool.take(memory, |at, _| note(&given, at), |at, _| note(&wrong, at));
        (given.into_inner(), wrong.into_inner())
    }

    #[test]
    fn a_block_that_waits_is_refused() {
        let memory = memory(64);
        let pool = Pending::new();
        for _ in 0..2 {
            for first in 0..64 {
                assert!(pool.leave(&memory, first, 0));
            }
            for first in 0..64 {
                assert!(!pool.leave(&memory, first, 0));
            }
            assert!(!pool.leave(&memory, 48, 4));
            // Its seal goes with it.
            assert_eq!(taken(&pool, &memory).len(), 64);
            assert!(pool.is_empty());
        }
    }

    /// Two who free it at the same time both find it unsealed.
    #[test]
    fn a_cycle_is_cut() {
        let memory = memory(64);
        let pool = Pending::new();
        for first in 0..SLOTS as u64 + 5 {
            assert!(pool.leave(&memory, first, 0));
        }
        let again = SLOTS as u64 + 2;
        pool.waiting.fetch_add(1, Ordering::Relaxed);
        pool.push(node(&memory, again), entry_of(again, 0));
        let (given, wrong) = told(&pool, &memory);
        assert_eq!(wrong, [again]);
        // The two that it led to before are in nobody's reach.
        assert_eq!(pool.lost(), 2);
        assert_eq!(given.len(), SLOTS + 3);
        assert_eq!(given.iter().filter(|&&first| first == again).count(), 1);
        assert!(pool.is_empty());
        // At its own end as well.
        let pool = Pending::new();
        let memory = self::memory(64);
        for first in 0..SLOTS as u64 + 1 {
            assert!(pool.leave(&memory, first, 0));
        }
        let again = SLOTS as u64;
        pool.waiting.fetch_add(1, Ordering::Relaxed);
        pool.push(node(&memory, again), entry_of(again, 0));
        let (given, wrong) = told(&pool, &memory);
        assert_eq!((wrong, given.len()), (vec![again], SLOTS + 1));
        assert_eq!(pool.lost(), 0);
        assert!(pool.is_empty());
    }

    /// It is somebody's again as soon as another block is given, and he writes to it.
    #[test]
    fn a_link_that_is_written_to_between_the_passes_is_not_followed() {
        let memory = memory(64);
        let pool = Pending::new();
        let last = SLOTS as u64 + 5;
        for first in 0..=last {
            assert!(pool.leave(&memory, first, 0));
        }
        let (given, wrong) = (RefCell::new(Vec::new()), RefCell::new(Vec::new()));
        let give = |first, _| {
            given.borrow_mut().push(first);
            // SAFETY: in reach.
            unsafe { node(&memory, last - 2).words.write([entry_of(7, 0); 2]) };
        };
        pool.take(&memory, give, |first, _| wrong.borrow_mut().push(first));
        assert_eq!(wrong.into_inner(), [last - 2]);
        assert_eq!((given.into_inner().len(), pool.lost()), (SLOTS + 3, 2));
        assert!(pool.is_empty());
    }
}
