//! Requests that have another way: what is told for them, and that nobody gives anything up for one.
#![cfg(not(any(loom, shuttle)))]

mod common;

use std::cell::{Cell, RefCell};

use common::machine::{map, one_zone};
use common::played::{Calls, Played, become_cpu};
use common::window::Window;
use kmem_buddy::{Buddy, Config};
use kmem_hal::{
    AllocError, Context, CpuCall, CpuCallError, CpuId, CpuSet, FrameRequest, FrameSink,
    FrameSource, NodeId, Order, OwnedFrame, Pressure, PressureLevel, Spin,
};

/// What the allocator told, and how often it called other CPUs.
#[derive(Default)]
struct Told {
    levels: RefCell<Vec<PressureLevel>>,
    calls: Cell<u32>,
}

impl Told {
    fn levels(&self) -> Vec<PressureLevel> {
        self.levels.take()
    }
}

impl Pressure for &'static Told {
    fn pressure(&self, _node: NodeId, level: PressureLevel, _request: &FrameRequest) -> bool {
        self.levels.borrow_mut().push(level);
        false
    }
}

/// Calls CPUs that the thread plays, and counts.
struct Counted(&'static Told, Calls);

// SAFETY: R1 to R3: those of the calls.
unsafe impl CpuCall for Counted {
    fn run_on(&self, cpus: &CpuSet, f: &(dyn Fn(CpuId) + Sync)) -> Result<(), CpuCallError> {
        self.0.calls.set(self.0.calls.get() + 1);
        self.1.run_on(cpus, f)
    }
}

type Machine = Buddy<&'static Window, Played<2>, Spin, Counted, &'static Told>;

/// Two CPUs with so many frames in one zone, of which the allocator keeps `min` back.
fn boot(frames: u64, min: u64) -> (&'static Machine, &'static Told) {
    boot_with(frames, &one_zone().min_free_kib(min * 4))
}

fn boot_with(frames: u64, config: &Config) -> (&'static Machine, &'static Told) {
    become_cpu(0);
    let told: &'static Told = Box::leak(Box::default());
    let window = Window::leaked(frames << 12, 1 << 20);
    let buddy = Buddy::with(window, Played, Counted(told, Calls::default()), told);
    // SAFETY: X1: the test's own memory, which only this allocator has.
    unsafe { buddy.init(&mut map(&[(0, frames << 12)]), config) }.unwrap();
    (Box::leak(Box::new(buddy)), told)
}

/// As many as it gives; why it gives no more.
fn all(buddy: &Machine, request: &FrameRequest) -> (Vec<OwnedFrame>, AllocError) {
    let mut frames = Vec::new();
    loop {
        match buddy.alloc(request) {
            Ok(frame) => frames.push(frame),
            Err(error) => return (frames, error),
        }
    }
}

fn end(buddy: &Machine, frames: impl IntoIterator<Item = OwnedFrame>) {
    frames.into_iter().for_each(|frame| buddy.free(frame));
    buddy.drain_all();
    assert_eq!(buddy.recount().free, buddy.mem_info().total);
    buddy.check().unwrap();
}

/// Of the type that all page blocks have: none is stolen, which would raise the watermarks.
const WAITING: FrameRequest = FrameRequest::ONE.movable().context(Context::MayWait);

#[test]
fn falling_below_the_low_watermark_is_told_and_nothing_beyond() {
    let (buddy, told) = boot(4096, 256);
    let [min, low, _] = buddy.zones().next().unwrap().marks;
    let mut frames = Vec::new();
    while told.levels.borrow().is_empty() {
        frames.push(buddy.alloc(&WAITING.optional()).unwrap());
    }
    // At once, and not when the min watermark is near.
    let free = buddy.zones().next().unwrap().free;
    assert!((min + 1..=low).contains(&free), "{free}");
    let (more, error) = all(buddy, &WAITING.optional());
    assert!(!more.is_empty(), "nothing above the min watermark");
    assert_eq!(error, AllocError::OutOfMemoryHere);
    assert!(
        told.levels()
            .iter()
            .all(|&level| level == PressureLevel::Low)
    );
    // Others are told of all, and ask the other CPU.
    assert_eq!(told.calls.get(), 0);
    assert_eq!(buddy.alloc(&WAITING).unwrap_err(), AllocError::OutOfMemory);
    let levels = [
        PressureLevel::Low,
        PressureLevel::Min,
        PressureLevel::Refusing,
    ];
    assert_eq!(told.levels(), levels);
    assert!(told.calls.get() > 0);
    end(buddy, frames.into_iter().chain(more));
}

/// Be they in one zone of several: another, as the one for old devices' is, may have none for this request.
#[test]
fn frames_in_small_blocks_are_no_shortness() {
    let zones = Config::new().min_free_kib(256);
    for (frames, config) in [(4096, one_zone().min_free_kib(256)), (1 << 14, zones)] {
        let (buddy, told) = boot_with(frames, &config);
        let (frames, _) = all(buddy, &WAITING);
        let first = buddy.zones().last().unwrap().start;
        let is_free = |frame: &OwnedFrame| {
            let number = frame.first().number();
            number >= first && number.is_multiple_of(2)
        };
        let (free, held): (Vec<_>, Vec<_>) = frames.into_iter().partition(is_free);
        free.into_iter().for_each(|frame| buddy.free(frame));
        buddy.drain_all();
        told.levels();
        told.calls.set(0);
        let large = LARGE.optional();
        assert_eq!(
            buddy.alloc(&large).unwrap_err(),
            AllocError::OutOfMemoryHere
        );
        assert_eq!((told.levels(), told.calls.get()), (vec![], 0));
        // For one that has no other way reclaim begins.
        assert!(buddy.alloc(&LARGE).is_err());
        assert_eq!(told.levels()[0], PressureLevel::Low);
        end(buddy, held);
    }
}

const LARGE: FrameRequest = {
    let mut request = WAITING;
    request.order = Order::HUGE_2M;
    request
};

/// What another CPU has in its arrays stays there, for single frames and for blocks above the top order.
#[test]
fn other_cpus_keep_their_arrays() {
    for order in [0, 11] {
        let (buddy, told) = boot(8192, 0);
        let of_order = |order| {
            let mut request = WAITING;
            request.order = Order::new(order).unwrap();
            request
        };
        let request = of_order(order);
        let mut held = all(buddy, &of_order(11)).0;
        let last = held.pop().unwrap();
        for order in (0..=10).rev() {
            held.extend(all(buddy, &of_order(order)).0);
        }
        buddy.free(last);
        // What is left is CPU 1's, or a block of which it has a frame.
        become_cpu(1);
        let frame = buddy.alloc(&WAITING).unwrap();
        buddy.free(frame);
        become_cpu(0);
        if order == 0 {
            held.extend(all(buddy, &request.optional()).0);
        }
        told.calls.set(0);
        let refused = buddy.alloc(&request.optional()).unwrap_err();
        assert_eq!(refused, AllocError::OutOfMemoryHere, "{order}");
        assert_eq!(told.calls.get(), 0, "{order}");
        held.push(buddy.alloc(&request).unwrap());
        assert!(told.calls.get() > 0, "{order}");
        end(buddy, held);
    }
}
