//! What a call costs on shared lines, and what an interrupt at each of its steps does to it.
#![cfg(kmem_counting)]

mod common;

use std::cell::RefCell;
use std::collections::BTreeSet;

use common::NoOwner;
use common::machine::{MIB, Machine, boot};
use common::window::Window;
use kmem_hal::sync::{counts, reset_counts};
use kmem_hal::{AllocError, FrameRange, FrameRequest, FrameSink, FrameSource, Order, OwnedFrame};
use kmem_testkit::interrupt::every_interrupt;

/// A machine of so many frames.
fn machine(frames: u64) -> Machine<'static> {
    boot(Window::leaked(frames << 12, MIB), &[])
}

fn request(order: u8) -> FrameRequest {
    FrameRequest::new(Order::new(order).unwrap()).movable()
}

#[test]
fn a_hot_pair_costs_no_locked_instruction() {
    let buddy = machine(1 << 18);
    for order in [0, 1, 2, 3, 9] {
        let warm = buddy.alloc(&request(order)).unwrap();
        buddy.free(warm);
        reset_counts();
        for _ in 0..100 {
            let frame = buddy.alloc(&request(order)).unwrap();
            buddy.free(frame);
        }
        assert_eq!((counts().locked, counts().stores), (0, 0), "order {order}");
    }
}

#[test]
fn bulk_takes_one_lock_for_an_array() {
    let buddy = machine(1 << 18);
    reset_counts();
    let mut frames = Vec::new();
    for _ in 0..10_000 {
        frames.push(buddy.alloc(&request(0)).unwrap());
    }
    assert!(counts().locked <= 10_000 / 128 + 3, "{:?}", counts());
    reset_counts();
    while let Some(frame) = frames.pop() {
        buddy.free(frame);
    }
    assert!(counts().locked <= 10_000 / 128 + 3, "{:?}", counts());
    reset_counts();
    buddy
        .alloc_batch(&request(0), 10_000, &mut |frame| frames.push(frame))
        .unwrap();
    buddy.free_batch(&mut || frames.pop());
    assert!(counts().locked <= 2 * 10_000 / 32 + 2, "{:?}", counts());
}

#[test]
fn a_claim_with_nothing_to_move_locks_for_no_block() {
    let buddy = machine(1 << 18);
    let lent = FrameRange::from_numbers(1 << 16, 1 << 17).unwrap();
    let area = buddy.cma_area("camera", lent).unwrap();
    for blocks in [1, 32] {
        reset_counts();
        let claimed = buddy
            .cma_claim(&area, blocks * 512, Order::HUGE_2M, &NoOwner)
            .unwrap();
        let locked = counts().locked;
        assert!(locked <= 8, "{locked} for {blocks} blocks");
        buddy.free_range(claimed).unwrap();
    }
}

#[test]
fn mixed_orders_stay_below_a_tenth() {
    let buddy = machine(1 << 18);
    let mut seed = 5u64;
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut live: Vec<OwnedFrame> = Vec::new();
    let mut used = 0;
    let mut operations = 0;
    for step in 0..400_000 {
        if step == 200_000 {
            reset_counts();
            operations = 0;
        }
        let number = next();
        operations += 1;
        if used * 5 < (1 << 18) * 4 {
            let order = (number >> 8 | 1 << 9).trailing_zeros() as u8;
            let frame = buddy
                .alloc(&request(order))
                .expect("nothing is refused at 80 %");
            used += frame.order().frames();
            live.push(frame);
        } else {
            let frame = live.swap_remove((number >> 20) as usize % live.len());
            used -= frame.order().frames();
            buddy.free(frame);
        }
    }
    let locked = counts().locked;
    assert!(
        locked * 10 <= operations,
        "{locked} locked instructions in {operations} operations"
    );
}

struct World {
    buddy: Machine<'static>,
    held: RefCell<Vec<OwnedFrame>>,
    nested: RefCell<Vec<OwnedFrame>>,
    managed: u64,
}

impl World {
    /// Arrays of order 0 that hold `cached` blocks.
    fn new(cached: usize) -> Self {
        let buddy = machine(4096);
        let managed = buddy.recount().managed;
        let mut held = Vec::new();
        for _ in 0..100 {
            held.push(buddy.alloc(&request(0)).unwrap());
        }
        buddy.drain_local();
        for _ in 0..cached {
            buddy.free(held.pop().unwrap());
        }
        for _ in 0..4 {
            held.push(buddy.alloc(&request(5)).unwrap());
        }
        let nested = (0..8).map(|_| buddy.alloc(&request(6)).unwrap()).collect();
        Self {
            buddy,
            held: held.into(),
            nested: RefCell::new(nested),
            managed,
        }
    }

    /// What an interrupt does: takes some, keeps one, frees some.
    fn interrupt(&self) {
        for order in [0, 0, 5, 1] {
            match self.buddy.alloc(&request(order)) {
                Ok(frame) => self.nested.borrow_mut().push(frame),
                // Inside the lock of what was interrupted.
                Err(error) => assert_eq!(error, AllocError::Busy),
            }
        }
        for _ in 0..6 {
            let frame = self.nested.borrow_mut().remove(0);
            self.buddy.free(frame);
        }
        self.buddy.drain_local();
    }

    fn check(&self, step: u64) {
        let mut seen = BTreeSet::new();
        let held = self.held.borrow();
        let nested = self.nested.borrow();
        for frame in held
            .iter()
            .chain(nested.iter())
            .flat_map(|frame| frame.range().iter())
        {
            assert!(
                seen.insert(frame.number()),
                "step {step}: {frame} has two owners"
            );
        }
        drop((held, nested));
        for frame in self
            .held
            .borrow_mut()
            .drain(..)
            .chain(self.nested.borrow_mut().drain(..))
        {
            self.buddy.free(frame);
        }
        assert!(self.buddy.drain_local());
        assert_eq!(self.buddy.check(), Ok(()), "step {step}");
        assert_eq!(self.buddy.misuse(), None, "step {step}");
        assert_eq!(
            self.buddy.recount().free,
            self.managed,
            "step {step}: frames were lost"
        );
    }
}

fn interrupted(cached: usize, operation: impl Fn(&World)) {
    let steps = every_interrupt(
        || World::new(cached),
        operation,
        World::interrupt,
        World::check,
    );
    assert!(steps > 5, "only {steps} steps");
}

/// Empty, half full, full arrays.
const FILLS: [usize; 3] = [0, 10, 32];

#[test]
fn an_interrupt_anywhere_in_an_allocation() {
    for cached in FILLS {
        for order in [0, 3, 5] {
            interrupted(cached, |world| {
                // An interrupt may have taken the arrays' place, but there is memory.
                let frame = world.buddy.alloc(&request(order)).unwrap();
                world.held.borrow_mut().push(frame);
            });
        }
    }
}

#[test]
fn an_interrupt_anywhere_in_a_free() {
    for cached in FILLS {
        for order in [0, 5] {
            interrupted(cached, |world| {
                let mut held = world.held.borrow_mut();
                let at = held.iter().position(|f| f.order().get() == order).unwrap();
                let frame = held.swap_remove(at);
                drop(held);
                world.buddy.free(frame);
            });
        }
    }
}

#[test]
fn an_interrupt_anywhere_in_a_batch_or_a_drain() {
    for cached in FILLS {
        interrupted(cached, |world| {
            let give = &mut |frame| world.held.borrow_mut().push(frame);
            assert_eq!(world.buddy.alloc_batch(&request(0), 20, give), Ok(20));
        });
        interrupted(cached, |world| {
            let mut rest = 20;
            world.buddy.free_batch(&mut || {
                rest -= 1;
                (rest > 0).then(|| world.held.borrow_mut().pop()).flatten()
            });
        });
        interrupted(cached, |world| {
            world.buddy.drain_local();
            let range = world
                .buddy
                .alloc_range(700, Order::ZERO, &request(0))
                .unwrap();
            world
                .held
                .borrow_mut()
                .extend(range.into_blocks(Order::MAX_BUDDY));
        });
    }
}
