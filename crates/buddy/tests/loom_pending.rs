//! The pool of blocks that wait for an interrupted call, alone: CPUs that leave blocks in it beside CPUs that take them out.
//!
//! Each block is handed on once, and whoever finds the pool empty knows that what he left before has arrived (`P1`). The links in the
//! blocks are plain memory, whose order loom does not see.
#![cfg(loom)]

use std::cell::UnsafeCell;

use kmem_buddy::pending::Pending;
use kmem_hal::sync::{AtomicU32, AtomicU64, Ordering};
use kmem_hal::{Frame, FrameRange, PhysAddr, PhysMap};
use loom::sync::Arc;
use loom::thread;

/// Frames whose first words are memory, one after the other; those above have no mapping.
struct Memory(Vec<UnsafeCell<[u64; 2]>>);

// SAFETY: the pool gives a block's words to one CPU at a time.
unsafe impl Sync for Memory {}
// SAFETY: words.
unsafe impl Send for Memory {}

const FRAMES: u64 = 8;

impl Memory {
    fn new() -> Self {
        Self((0..FRAMES).map(|_| UnsafeCell::default()).collect())
    }
}

// SAFETY: P1 to P5 for the first words of each frame, which is all that the pool touches.
unsafe impl PhysMap for Memory {
    fn reach(&self) -> FrameRange {
        FrameRange::from_numbers(0, FRAMES).unwrap()
    }
    fn to_ptr(&self, address: PhysAddr) -> *mut u8 {
        let at = Frame::containing(address).number() as usize;
        self.0[at].get().cast()
    }
    fn to_phys(&self, _: *const u8) -> PhysAddr {
        unreachable!("the pool knows frames by their numbers")
    }
    unsafe fn words(&self, _: Frame) -> &[AtomicU64] {
        unreachable!("the pool reads no frame as a table")
    }
    unsafe fn words32(&self, _: Frame) -> &[AtomicU32] {
        unreachable!("the pool reads no frame as a table")
    }
}

/// A frame that is not mapped.
const UNMAPPED: u64 = 64;
/// Slots of the pool under loom.
const SLOTS: u64 = 2;

/// The pool, and how often each block was handed on.
struct World {
    pool: Pending,
    memory: Memory,
    given: [AtomicU32; UNMAPPED as usize + 1],
}

impl World {
    /// Blocks `0..waiting` wait already.
    fn new(waiting: u64) -> Arc<Self> {
        let world = Self {
            pool: Pending::new(),
            memory: Memory::new(),
            given: std::array::from_fn(|_| AtomicU32::new(0)),
        };
        for first in 0..waiting {
            assert!(world.pool.leave(&world.memory, first, 0));
        }
        Arc::new(world)
    }

    fn times(&self, first: u64) -> u32 {
        self.given[first as usize].load(Ordering::Relaxed)
    }

    /// An NMI's free inside a lock.
    fn leave(&self, first: u64) {
        assert!(self.pool.leave(&self.memory, first, 0), "waits already");
        if self.pool.is_empty() {
            assert_eq!(self.times(first), 1, "{first} is nowhere");
        }
    }

    /// A call that comes by.
    fn take(&self) -> bool {
        let give = |first: u64, _| {
            self.given[first as usize].fetch_add(1, Ordering::Relaxed);
        };
        self.pool
            .take(&self.memory, give, |first, _| panic!("{first} is wrong"))
    }
}

/// Two CPUs leave a block each while a third takes what there is; `waiting` blocks are in the pool before.
fn two_leave_and_one_takes(waiting: u64, blocks: [u64; 2]) {
    kmem_testkit::model::explore(3, move || {
        let world = World::new(waiting);
        let [first, second] = blocks;
        let leaving = world.clone();
        let leaver = thread::spawn(move || leaving.leave(first));
        let taking = world.clone();
        let taker = thread::spawn(move || {
            taking.take();
        });
        world.leave(second);
        leaver.join().unwrap();
        taker.join().unwrap();
        while world.take() {}
        for first in (0..waiting).chain(blocks) {
            assert_eq!(world.times(first), 1, "how often {first} was given");
        }
        assert!(world.pool.is_empty());
        assert_eq!(world.pool.lost(), 0);
    });
}

#[test]
fn two_blocks_come_to_an_empty_pool() {
    two_leave_and_one_takes(0, [4, 5]);
}

#[test]
fn two_blocks_come_to_the_last_slot() {
    two_leave_and_one_takes(SLOTS - 1, [4, 5]);
}

#[test]
fn two_blocks_come_to_a_full_pool() {
    two_leave_and_one_takes(SLOTS, [4, 5]);
}

/// It takes the slot of a mapped one, which goes to the chain.
#[test]
fn a_block_without_a_mapping_comes_to_a_full_pool() {
    two_leave_and_one_takes(SLOTS, [UNMAPPED, 5]);
}
