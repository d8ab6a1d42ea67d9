//! An NMI before every machine instruction of alloc, free, refill, flush, drain and their kin.
//!
//! The NMI allocates and frees in the same allocator on the same CPU, out of arrays and around them. Whatever it meets,
//! nothing spins, no frame is lost or has two owners, and the interrupted call does what it does without it. What an NMI may be
//! told is what the crate's table of contexts says: [`AllocError::Busy`] inside a zone's lock, and never a wait.
#![cfg(all(
    target_os = "linux",
    target_arch = "x86_64",
    not(any(loom, shuttle, miri, kmem_counting))
))]

mod common;

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;

use common::machine::{map, one_zone};
use common::window::Window;
use kmem_buddy::Buddy;
use kmem_hal::{
    AllocError, Frame, FrameRequest, FrameSink, FrameSource, IrqSafe, Order, OwnedFrame, SingleCpu,
};
use kmem_testkit::step::Stepper;

type Machine = Buddy<&'static Window, SingleCpu, IrqSafe>;

/// Places for blocks that an NMI may use: it must not allocate them on the host's heap.
type Places<const N: usize> = [Cell<Option<OwnedFrame>>; N];

fn places<const N: usize>() -> Places<N> {
    std::array::from_fn(|_| Cell::new(None))
}

fn put<const N: usize>(places: &Places<N>, frame: OwnedFrame) -> Option<OwnedFrame> {
    for place in places {
        match place.take() {
            None => {
                place.set(Some(frame));
                return None;
            }
            taken => place.set(taken),
        }
    }
    Some(frame)
}

/// A machine with blocks that the operation holds, that the NMI frees, and that the NMI keeps.
struct World {
    buddy: &'static Machine,
    total: u64,
    held: RefCell<Vec<OwnedFrame>>,
    got: Places<16>,
    to_free: Places<4>,
    kept: Places<4>,
    refused: Cell<u64>,
    nmi: Nmi,
}

/// What an NMI leaves behind, so that the operation meets what it is to meet.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Nmi {
    /// Blocks freed, kept and refused, arrays refilled and flushed.
    Mixed,
    /// Arrays as they were.
    Neutral,
    /// Empty arrays, where the interrupted call does not have them.
    Draining,
}

impl World {
    /// `frames` frames in one zone, with arrays that have seen some calls.
    fn new(frames: u64) -> Self {
        let window = Window::leaked(frames << 12, frames.min(1024) << 12);
        // SAFETY: one thread, and NMIs that end before it goes on.
        let cpu = unsafe { SingleCpu::new() };
        let buddy: &'static Machine = Box::leak(Box::new(Buddy::new(window, cpu)));
        let mut map = map(&[(0, frames << 12)]);
        // SAFETY: X1: the test's own memory, which only this allocator has.
        unsafe { buddy.init(&mut map, &one_zone()) }.unwrap();
        let world = Self {
            buddy,
            total: buddy.mem_info().total,
            held: RefCell::default(),
            got: places(),
            to_free: places(),
            kept: places(),
            refused: Cell::new(0),
            nmi: Nmi::Mixed,
        };
        for order in [0, 0, 1, 4] {
            let frame = world.buddy.alloc(&request(order)).unwrap();
            assert_eq!(put(&world.to_free, frame), None);
        }
        world
    }

    fn hold(self, order: u8, count: usize) -> Self {
        for _ in 0..count {
            let frame = self.buddy.alloc(&request(order)).unwrap();
            self.held.borrow_mut().push(frame);
        }
        self
    }

    fn with(self, nmi: Nmi) -> Self {
        Self { nmi, ..self }
    }

    /// The calls of an NMI: one block freed, one kept, others there and back.
    fn interrupt(&self) {
        match self.nmi {
            Nmi::Neutral => return self.there_and_back(0),
            Nmi::Draining => {
                self.there_and_back(0);
                let _ = self.buddy.drain_local();
                return;
            }
            Nmi::Mixed => {}
        }
        if let Some(frame) = self.to_free.iter().find_map(Cell::take) {
            self.buddy.free(frame);
        }
        for order in [0, 3, 4] {
            self.there_and_back(order);
        }
        match self.buddy.alloc(&request(0).movable()) {
            Ok(frame) => {
                if let Some(frame) = put(&self.kept, frame) {
                    self.buddy.free(frame);
                }
            }
            Err(error) => self.note(error),
        }
    }

    fn there_and_back(&self, order: u8) {
        match self.buddy.alloc(&request(order)) {
            Ok(frame) => {
                assert_eq!(frame.order().get(), order);
                self.buddy.free(frame);
            }
            Err(error) => self.note(error),
        }
    }

    fn note(&self, error: AllocError) {
        assert_eq!(error, AllocError::Busy, "memory is not short");
        self.refused.set(self.refused.get() + 1);
    }

    /// Every frame is free or has one owner, and all of them are there.
    fn check(&self) {
        assert!(self.buddy.drain_local(), "the arrays are still in use");
        assert_eq!(self.buddy.check(), Ok(()));
        assert_eq!(self.buddy.misuse(), None);
        let mut owned = BTreeSet::new();
        let mut frames: Vec<OwnedFrame> = self.held.take();
        frames.extend(self.got.iter().filter_map(Cell::take));
        frames.extend(self.kept.iter().filter_map(Cell::take));
        frames.extend(self.to_free.iter().filter_map(Cell::take));
        for frame in frames.iter().flat_map(|frame| frame.range().iter()) {
            assert!(owned.insert(frame), "frame {frame} has two owners");
        }
        let recount = self.buddy.recount();
        assert_eq!(recount.cached, 0);
        assert_eq!(
            recount.free + owned.len() as u64,
            self.total,
            "frames are lost"
        );
        for frame in frames {
            self.buddy.free(frame);
        }
        assert!(self.buddy.drain_local());
        assert_eq!(self.buddy.recount().free, self.total);
        assert_eq!(self.buddy.misuse(), None);
    }
}

fn request(order: u8) -> FrameRequest {
    FrameRequest::new(Order::new(order).unwrap())
}

/// Steps through `operation` in both ways; alone at one instruction in `stride`.
///
/// `together` is what the NMIs of a whole run do: they must leave the operation what it is there for.
fn step(
    name: &str,
    stride: u64,
    together: Nmi,
    setup: impl Fn() -> World,
    operation: impl Fn(&World),
) {
    let ways = [
        (Stepper::alone().stride(stride), Nmi::Mixed),
        (Stepper::together(), together),
    ];
    for (way, nmi) in ways {
        let start = std::time::Instant::now();
        let setup = || setup().with(nmi);
        match way.run(setup, &operation, World::interrupt, World::check) {
            Ok(Some(steps)) => println!("{name}: {steps:?} in {:?}", start.elapsed()),
            Ok(None) => {}
            Err(failure) => panic!("{name}: {failure}"),
        }
    }
}

fn take(world: &World, order: u8) {
    let frame = world
        .buddy
        .alloc(&request(order))
        .expect("memory is not short");
    assert_eq!(frame.order().get(), order);
    assert_eq!(put(&world.got, frame), None);
}

fn give(world: &World) {
    let frame = world.held.borrow_mut().pop().unwrap();
    world.buddy.free(frame);
}

/// A small zone: its arrays are short, and so are refills and flushes.
const SMALL: u64 = 1024;

fn drained() -> World {
    let world = World::new(SMALL);
    assert!(world.buddy.drain_local());
    world
}

/// The next free flushes an array.
fn full() -> World {
    let world = World::new(SMALL).hold(0, 64);
    let mut probe = World::new(SMALL).hold(0, 64);
    let free = |world: &World| world.buddy.recount().free;
    let before = free(&probe);
    loop {
        give(&probe);
        if free(&probe) != before {
            probe.held = RefCell::default();
            return world;
        }
        give(&world);
    }
}

#[test]
fn hit_alloc() {
    let warm = || {
        let world = World::new(SMALL).hold(0, 2);
        give(&world);
        world
    };
    step("alloc", 1, Nmi::Mixed, warm, |world| take(world, 0));
}

#[test]
fn hit_free() {
    step("free", 1, Nmi::Mixed, || World::new(SMALL).hold(0, 1), give);
}

#[test]
fn refill() {
    step("refill", 41, Nmi::Draining, drained, |world| take(world, 0));
}

#[test]
fn flush() {
    step("flush", 41, Nmi::Neutral, full, give);
}

#[test]
fn drain() {
    step("drain", 61, Nmi::Neutral, full, |world| {
        // What NMIs freed meanwhile may lie in the arrays again.
        let _ = world.buddy.drain_local();
    });
}

#[test]
fn orders_without_arrays() {
    step("alloc 7", 61, Nmi::Mixed, drained, |world| take(world, 7));
    let holding = || World::new(SMALL).hold(7, 1);
    step("free 7", 61, Nmi::Mixed, holding, give);
    step(
        "alloc 10",
        401,
        Nmi::Mixed,
        || World::new(4096),
        |world| take(world, 10),
    );
}

#[test]
fn by_place_and_in_batches() {
    step("alloc_at", 101, Nmi::Mixed, drained, |world| {
        let first = Frame::new(0x140).unwrap();
        let frame = world.buddy.alloc_at(first, Order::new(2).unwrap()).unwrap();
        assert_eq!(put(&world.got, frame), None);
    });
    step("batch", 211, Nmi::Draining, drained, |world| {
        let mut give = |frame| assert_eq!(put(&world.got, frame), None);
        let given = world.buddy.alloc_batch(&request(0), 10, &mut give);
        assert_eq!(given, Ok(10));
    });
}
