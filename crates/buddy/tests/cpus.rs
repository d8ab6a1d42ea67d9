//! Several CPUs: caches that hide frames, drains, refusals that say what was asked, interrupts inside a refill.

mod common;

use std::cell::{Cell, RefCell};

use common::NoOwner;
use common::machine::{map, one_zone};
use common::window::Window;
use kmem_buddy::{Buddy, ClaimError, Config, FreeError, PlaceError};
use kmem_hal::{
    AllocError, Context, Cpu, CpuCall, CpuCallError, CpuId, CpuSet, Frame, FrameRange,
    FrameRequest, FrameSink, FrameSource, NoCpuCall, NoPressure, NodeId, Order, OwnedFrame,
    Pressure, PressureLevel, RawLock, Spin,
};

thread_local! {
    static CURRENT: Cell<u32> = const { Cell::new(0) };
    static PINS: Cell<u32> = const { Cell::new(0) };
    static WANDERS: Cell<bool> = const { Cell::new(false) };
    static IN_LOCK: RefCell<Option<Box<dyn FnOnce()>>> = const { RefCell::new(None) };
}

/// Four CPUs that the one thread of a test plays in turn.
#[derive(Clone, Copy)]
struct Played;

impl Played {
    fn become_cpu(id: u32) {
        CURRENT.set(id);
    }
}

/// Lets the thread be moved again.
struct Unpin;

impl Drop for Unpin {
    fn drop(&mut self) {
        PINS.set(PINS.get() - 1);
    }
}

// SAFETY: one thread plays one CPU at a time, and changes it only where nothing is pinned (C1, C2); ids stay below 4 (C3).
unsafe impl Cpu for Played {
    type Guard<'a> = Unpin;
    /// A thread that wanders was moved between CPUs 0 and 1 since its last pin.
    fn raw_pin(&self) -> Unpin {
        if PINS.get() == 0 && WANDERS.get() {
            Self::become_cpu(1 - CURRENT.get());
        }
        PINS.set(PINS.get() + 1);
        Unpin
    }
    fn id(&self, _: &Unpin) -> CpuId {
        CpuId::new(CURRENT.get())
    }
    fn count(&self) -> u32 {
        4
    }
}

// SAFETY: R1 to R3: the thread plays each named CPU in turn until `f` has returned.
unsafe impl CpuCall for Played {
    fn run_on(&self, cpus: &CpuSet, f: &(dyn Fn(CpuId) + Sync)) -> Result<(), CpuCallError> {
        let me = CURRENT.get();
        for cpu in cpus.iter() {
            Self::become_cpu(cpu.get());
            f(cpu);
        }
        Self::become_cpu(me);
        Ok(())
    }
}

/// A lock that an interrupt may precede: the armed closure runs when it is taken.
struct Interrupted(Spin);

// SAFETY: the inner lock's.
unsafe impl RawLock for Interrupted {
    type State = ();
    const INIT: Self = Self(Spin::INIT);
    fn lock(&self) {
        let interrupt = IN_LOCK.with(|armed| armed.borrow_mut().take());
        if let Some(interrupt) = interrupt {
            interrupt();
        }
        self.0.lock();
    }
    fn try_lock(&self) -> Option<()> {
        self.0.try_lock()
    }
    unsafe fn unlock(&self, (): ()) {
        // SAFETY: the caller's promise.
        unsafe { self.0.unlock(()) }
    }
}

fn boot<K: CpuCall, P: Pressure, L: RawLock>(
    frames: u64,
    call: K,
    pressure: P,
    config: &Config,
) -> &'static Buddy<&'static Window, Played, L, K, P> {
    Played::become_cpu(0);
    let window = Window::leaked(frames << 12, frames << 12);
    let mut map = map(&[(0, frames << 12)]);
    let buddy = Box::leak(Box::new(Buddy::with(window, Played, call, pressure)));
    // SAFETY: X1: the test's own memory, which only this allocator has.
    unsafe { buddy.init(&mut map, config) }.unwrap();
    buddy
}

/// CPU 1 frees everything that CPU 0 took, and keeps the last of it in its arrays; how many frames there are.
fn hide<K: CpuCall, P: Pressure>(buddy: &Buddy<&'static Window, Played, Spin, K, P>) -> usize {
    let mut all = Vec::new();
    while let Ok(frame) = buddy.alloc(&FrameRequest::ONE) {
        all.push(frame);
    }
    let count = all.len();
    Played::become_cpu(1);
    for frame in all.drain(..10) {
        buddy.free(frame);
    }
    std::mem::forget(all);
    Played::become_cpu(0);
    count
}

#[test]
fn without_calls_a_refusal_says_that_others_were_not_asked() {
    let buddy = boot::<_, _, Spin>(4096, NoCpuCall, NoPressure, &one_zone());
    hide(buddy);
    assert_eq!(
        buddy.alloc(&FrameRequest::ONE).unwrap_err(),
        AllocError::OutOfMemoryHere
    );
    assert!(!buddy.drain_all());
    assert_eq!(buddy.mem_info().cached, 10);
}

#[test]
fn with_calls_the_frames_of_other_cpus_are_found() {
    let buddy = boot::<_, _, Spin>(4096, Played, NoPressure, &one_zone());
    hide(buddy);
    let found: Vec<_> = (0..10)
        .map(|_| buddy.alloc(&FrameRequest::ONE).unwrap())
        .collect();
    assert_eq!(
        buddy.alloc(&FrameRequest::ONE).unwrap_err(),
        AllocError::OutOfMemory
    );
    for frame in found {
        buddy.free(frame);
    }
    assert!(buddy.drain_all());
    assert_eq!(buddy.mem_info().free, 10);
}

/// The scheduler moves the caller whenever it may: the CPU that was drained first is not the one that calls the others.
#[test]
fn a_drain_that_moves_between_cpus_leaves_none_out() {
    for first in [0, 1] {
        let buddy = boot::<_, _, Spin>(4096, Played, NoPressure, &one_zone());
        let total = buddy.mem_info().free;
        for cpu in 0..4 {
            Played::become_cpu(cpu);
            let frame = buddy.alloc(&FrameRequest::ONE).unwrap();
            buddy.free(frame);
        }
        Played::become_cpu(first);
        WANDERS.set(true);
        let drained = buddy.drain_all();
        WANDERS.set(false);
        assert!(drained);
        let info = buddy.mem_info();
        assert_eq!((info.cached, info.free), (0, total));
    }
}

#[test]
fn cpus_come_and_go() {
    let buddy = boot::<_, _, Spin>(4096, Played, NoPressure, &one_zone().cpus(1));
    let total = buddy.mem_info().total;
    // CPU 2 is not online: it works without arrays.
    Played::become_cpu(2);
    let frame = buddy.alloc(&FrameRequest::ONE).unwrap();
    buddy.free(frame);
    assert_eq!(buddy.mem_info().cached, 0);
    buddy.cpu_online(CpuId::new(2)).unwrap();
    buddy.cpu_online(CpuId::new(2)).unwrap();
    assert_eq!(
        buddy.cpu_online(CpuId::new(4)),
        Err(AllocError::Unsatisfiable)
    );
    let frame = buddy.alloc(&FrameRequest::ONE).unwrap();
    buddy.free(frame);
    assert!(buddy.mem_info().cached > 0);
    Played::become_cpu(0);
    // SAFETY: nobody plays CPU 2 any more.
    assert!(unsafe { buddy.cpu_offline(CpuId::new(2)) });
    let info = buddy.mem_info();
    assert_eq!(info.cached, 0);
    // Its area holds one page.
    assert_eq!(info.free, total - 1);
    buddy.check().unwrap();
}

/// A frame that is free in the array of another CPU, and the page block around it, which is neither the first one nor the last.
fn hidden<K: CpuCall>(
    buddy: &Buddy<&'static Window, Played, Spin, K, NoPressure>,
) -> (Frame, FrameRange) {
    Played::become_cpu(1);
    let frame = loop {
        let frame = buddy.alloc(&FrameRequest::ONE.movable()).unwrap();
        if (512..(1 << 14) - 512).contains(&frame.first().number()) {
            break frame;
        }
    };
    let first = frame.first();
    buddy.free(frame);
    Played::become_cpu(0);
    let block = FrameRange::of_order(first.align_down(Order::HUGE_2M), Order::HUGE_2M);
    (first, block.unwrap())
}

#[test]
fn what_another_cpu_may_have_free_is_not_said_to_be_in_use() {
    let alone = boot::<_, _, Spin>(1 << 14, NoCpuCall, NoPressure, &one_zone());
    let (frame, block) = hidden(alone);
    assert_eq!(
        alone.alloc_at(frame, Order::ZERO).unwrap_err(),
        PlaceError::InUseHere
    );
    assert_eq!(
        alone.alloc_range_at(block).unwrap_err(),
        PlaceError::InUseHere
    );
    // Nobody owns it, and so nobody moves it: it is neither pinned nor somebody's who does not move.
    let lowest = |error| match error {
        ClaimError::NotAsked(frame) => block.contains(frame),
        _ => false,
    };
    let error = alone.claim(block, &NoOwner).unwrap_err();
    assert!(lowest(error), "{error:?}");
    alone.check().unwrap();

    let buddy = boot::<_, _, Spin>(1 << 14, Played, NoPressure, &one_zone());
    let (frame, _) = hidden(buddy);
    let taken = buddy.alloc_at(frame, Order::ZERO).unwrap();
    assert_eq!(
        buddy.alloc_at(frame, Order::ZERO),
        Err(PlaceError::InUse),
        "all were asked"
    );
    buddy.free(taken);
    let (_, block) = hidden(buddy);
    let claimed = buddy.claim(block, &NoOwner).unwrap();
    buddy.free_range(claimed).unwrap();
    buddy.check().unwrap();
}

/// Half of a full array leaves it; all of it, where no array was refilled since it was flushed last.
#[test]
fn a_cpu_that_only_frees_flushes_whole_arrays() {
    let buddy: &Buddy<_, _, Spin> = boot(1 << 16, NoCpuCall, NoPressure, &one_zone());
    let mut frames = Vec::new();
    buddy
        .alloc_batch(&FrameRequest::ONE, 1000, &mut |frame| frames.push(frame))
        .unwrap();
    buddy.drain_local();
    let mut free = |count: u64| -> u64 {
        frames
            .drain(..count as usize)
            .for_each(|frame| buddy.free(frame));
        buddy.mem_info().cached
    };
    assert_eq!(free(128), 128);
    assert_eq!(free(1), 65, "half");
    assert_eq!(free(63), 128);
    assert_eq!(free(1), 1, "all");
    assert_eq!(free(127), 128);
    assert_eq!(free(1), 1, "all");
    // What was taken meanwhile may be taken again: half stays.
    let taken: Vec<_> = (0..2)
        .map(|_| buddy.alloc(&FrameRequest::ONE).unwrap())
        .collect();
    assert_eq!(buddy.mem_info().cached, 63, "one left, and a refill");
    assert_eq!(free(65), 128);
    assert_eq!(free(1), 65, "half");
    taken.into_iter().for_each(|frame| buddy.free(frame));
    buddy.check().unwrap();
}

#[test]
fn a_double_free_is_found_at_the_flush() {
    let buddy = boot::<_, _, Spin>(4096, Played, NoPressure, &one_zone());
    let frame = buddy.alloc(&FrameRequest::ONE).unwrap();
    let (first, order) = (frame.first(), frame.order());
    buddy.free(frame);
    // SAFETY: the wrong free is what is tested; nobody uses the frame.
    buddy.free(unsafe { OwnedFrame::from_raw(first, order) });
    assert_eq!(buddy.misuse(), None, "both lie in the array");
    buddy.drain_all();
    let misuse = buddy.misuse().unwrap();
    assert_eq!(
        (misuse.error, misuse.first, misuse.count),
        (FreeError::DoubleFree, first, 1)
    );
    // Of an order that has an array, at its flush too; of one that has none at the call.
    for (order, count) in [(4, 2), (7, 3)] {
        let order = Order::new(order).unwrap();
        // SAFETY: as above.
        buddy.free(unsafe { OwnedFrame::from_raw(first.align_down(order), order) });
        if order.get() == 4 {
            assert_eq!(buddy.misuse().unwrap().count, count - 1);
            buddy.drain_all();
        }
        let misuse = buddy.misuse().unwrap();
        assert!(matches!(
            misuse.error,
            FreeError::WrongOrder | FreeError::DoubleFree
        ));
        assert_eq!(misuse.count, count);
    }
    assert_eq!(buddy.recount().free, buddy.mem_info().total);
    buddy.check().unwrap();
}

/// An interrupt arrives while the CPU is on its way into a zone's lock, its arrays in its hands.
#[test]
fn an_interrupt_inside_a_refill_or_a_flush_leaves_the_arrays_alone() {
    for free_inside in [false, true] {
        let buddy = boot::<_, _, Interrupted>(4096, Played, NoPressure, &one_zone());
        let total = buddy.mem_info().total;
        let mut frames: Vec<_> = (0..40)
            .map(|_| buddy.alloc(&FrameRequest::ONE).unwrap())
            .collect();
        let inside = std::rc::Rc::new(RefCell::new(Vec::new()));
        if free_inside {
            inside.borrow_mut().extend(frames.drain(..5));
        }
        let arm = |inside: &std::rc::Rc<RefCell<Vec<OwnedFrame>>>| {
            let inside = inside.clone();
            IN_LOCK.with(|armed| {
                *armed.borrow_mut() = Some(Box::new(move || {
                    if free_inside {
                        while let Some(frame) = inside.borrow_mut().pop() {
                            buddy.free(frame);
                        }
                    }
                    for _ in 0..3 {
                        inside
                            .borrow_mut()
                            .push(buddy.alloc(&FrameRequest::ONE).unwrap());
                    }
                }));
            });
        };
        buddy.drain_local();
        arm(&inside);
        frames.push(buddy.alloc(&FrameRequest::ONE).unwrap()); // a refill
        assert_eq!(inside.borrow().len(), 3);
        arm(&inside);
        for frame in frames.drain(..) {
            buddy.free(frame); // a flush among them
        }
        let mut numbers: Vec<_> = inside.borrow().iter().map(|f| f.first().number()).collect();
        numbers.sort_unstable();
        let count = numbers.len();
        numbers.dedup();
        assert_eq!(numbers.len(), count, "a frame has two owners");
        for frame in inside.borrow_mut().drain(..) {
            buddy.free(frame);
        }
        IN_LOCK.with(|armed| armed.borrow_mut().take());
        buddy.drain_all();
        assert_eq!(buddy.misuse(), None);
        assert_eq!(buddy.recount().free, total);
        buddy.check().unwrap();
    }
}

type Reclaimed = Buddy<&'static Window, Played, Spin, Played, &'static Reclaim>;

/// Notes what it was told, and frees what it holds when a request is about to be refused.
struct Reclaim {
    told: RefCell<Vec<PressureLevel>>,
    spare: RefCell<Vec<OwnedFrame>>,
    sink: Cell<Option<&'static Reclaimed>>,
}

impl Pressure for &'static Reclaim {
    fn pressure(&self, _node: NodeId, level: PressureLevel, _request: &FrameRequest) -> bool {
        self.told.borrow_mut().push(level);
        let (Some(sink), PressureLevel::Refusing) = (self.sink.get(), level) else {
            return false;
        };
        match self.spare.borrow_mut().pop() {
            Some(frame) => {
                sink.free(frame);
                true
            }
            None => false,
        }
    }
}

#[test]
fn watermarks_tell_and_reclaim_saves() {
    let reclaim: &'static Reclaim = Box::leak(Box::new(Reclaim {
        told: RefCell::default(),
        spare: RefCell::default(),
        sink: Cell::new(None),
    }));
    let config = one_zone().min_free_kib(1024);
    let buddy = boot::<_, _, Spin>(4096, Played, reclaim, &config);
    reclaim.sink.set(Some(buddy));
    let zone = buddy.zones().next().unwrap();
    assert_eq!(zone.marks, [256, 256 + 64, 256 + 128]);
    let waiting = FrameRequest::ONE.context(Context::MayWait);
    let mut taken = 0;
    while reclaim.told.borrow().is_empty() {
        let _leaked = buddy.alloc(&waiting).unwrap();
        taken += 1;
    }
    assert_eq!(reclaim.told.borrow()[0], PressureLevel::Low);
    let mut last = buddy.alloc(&waiting);
    while last.is_ok() {
        taken += 1;
        last = buddy.alloc(&waiting);
    }
    // The min watermark stays for those who cannot wait, half of it for those with a reserve.
    assert_eq!(last.unwrap_err(), AllocError::OutOfMemory);
    assert!(zone.managed - taken >= 256);
    let mut atomic = Vec::new();
    while let Ok(frame) = buddy.alloc(&FrameRequest::ONE) {
        atomic.push(frame);
    }
    assert!(atomic.len() >= 120, "{}", atomic.len());
    let mut reserve = 0;
    while let Ok(frame) = buddy.alloc(&FrameRequest::ONE.with_reserve()) {
        let _leaked = frame;
        reserve += 1;
    }
    assert!(reserve >= 100);
    assert_eq!(buddy.recount().free, 0);
    // What cannot wait is refused at once; what can is served by what reclaim frees.
    reclaim.spare.borrow_mut().append(&mut atomic);
    assert!(buddy.alloc(&FrameRequest::ONE).is_err());
    let spare = reclaim.spare.borrow().len();
    let saved = buddy.alloc(&waiting.with_reserve()).unwrap();
    assert!(reclaim.spare.borrow().len() < spare);
    buddy.free(saved);
}

/// Types mix where memory is short: reclaim is told earlier then, once.
#[test]
fn a_stolen_page_block_raises_the_watermarks_until_reclaim_was_told() {
    let reclaim: &'static Reclaim = Box::leak(Box::new(Reclaim {
        told: RefCell::default(),
        spare: RefCell::default(),
        sink: Cell::new(None),
    }));
    let config = one_zone().min_free_kib(1024);
    let buddy = boot::<_, _, Spin>(1 << 14, Played, reclaim, &config);
    let marks = || buddy.zones().next().unwrap().marks;
    let calm = marks();
    // All page blocks are movable until somebody needs another type.
    let _leaked = buddy.alloc(&FrameRequest::ONE).unwrap();
    let boosted = marks();
    assert_eq!(boosted[0], calm[0], "the min watermark stays");
    assert_eq!(boosted[1] - calm[1], boosted[2] - calm[2]);
    assert!(boosted[1] > calm[1] && boosted[1] - calm[1] <= calm[2] / 2 * 3);
    let shown = format!("boost    {}", boosted[1] - calm[1]);
    assert!(buddy.zone_info().to_string().contains(&shown));
    let movable = FrameRequest::ONE.movable();
    while reclaim.told.borrow().is_empty() {
        let _leaked = buddy.alloc(&movable).unwrap();
    }
    assert_eq!(reclaim.told.borrow()[..], [PressureLevel::Low]);
    let zone = buddy.zones().next().unwrap();
    assert!(
        zone.free > calm[1],
        "reclaim was told no earlier than before"
    );
    assert_eq!(zone.marks, calm);
}

/// Memory joins part by part, and another CPU may have a frame of it and free it while the last parts have not joined.
#[test]
fn frames_of_memory_that_joins_can_be_freed_at_once() {
    type Joining = Buddy<&'static Window, Played, Interrupted, NoCpuCall, NoPressure>;
    thread_local! {
        static FREED: RefCell<Vec<Result<(), FreeError>>> = const { RefCell::new(Vec::new()) };
    }
    fn arm(buddy: &'static Joining) {
        let interrupt = Box::new(move || {
            Played::become_cpu(1);
            if let Ok(frame) = buddy.alloc(&FrameRequest::ONE) {
                let freed = buddy.try_free(frame).map_err(|(error, _)| error);
                FREED.with_borrow_mut(|results| results.push(freed));
            }
            Played::become_cpu(0);
            arm(buddy);
        });
        IN_LOCK.with(|armed| *armed.borrow_mut() = Some(interrupt));
    }
    Played::become_cpu(0);
    let window = Window::leaked(4096 << 12, 4096 << 12);
    window.set_reach(2048);
    let mut map = map(&[(0, 4096 << 12)]);
    let buddy: &'static Joining =
        Box::leak(Box::new(Buddy::with(window, Played, NoCpuCall, NoPressure)));
    // SAFETY: X1: the test's own memory, which only this allocator has.
    unsafe { buddy.init(&mut map, &one_zone()) }.unwrap();
    let taken: Vec<_> = std::iter::from_fn(|| buddy.alloc(&FrameRequest::ONE).ok()).collect();
    assert!(!taken.is_empty());
    window.set_reach(4096);
    arm(buddy);
    assert_eq!(buddy.extend(), 2048);
    IN_LOCK.with(|armed| armed.borrow_mut().take());
    let freed = FREED.take();
    assert!(!freed.is_empty(), "nothing was allocated meanwhile");
    assert!(freed.iter().all(Result::is_ok), "{freed:?}");
    for cpu in [1, 0] {
        Played::become_cpu(cpu);
        buddy.drain_local();
    }
    assert_eq!(buddy.recount().free, 2048);
}

/// A CPU remembers the block that it lent last, and its type: an area that is made beneath that memory would serve unmovable users.
#[test]
fn an_area_is_made_where_every_cpu_was_asked() {
    fn lend_and_take_back<K: CpuCall>(
        buddy: &Buddy<&'static Window, Played, Spin, K, NoPressure>,
    ) -> FrameRange {
        Played::become_cpu(1);
        let lent = buddy.alloc(&FrameRequest::ONE).unwrap();
        let block = lent.first().number() / 512 * 512;
        Played::become_cpu(0);
        buddy.free(lent);
        FrameRange::from_numbers(block, block + 512).unwrap()
    }
    let alone = boot::<_, _, Spin>(1 << 14, NoCpuCall, NoPressure, &one_zone());
    let range = lend_and_take_back(alone);
    assert_eq!(alone.cma_area("camera", range), Err(PlaceError::Busy));

    let buddy = boot::<_, _, Spin>(1 << 14, Played, NoPressure, &one_zone());
    let range = lend_and_take_back(buddy);
    assert!(buddy.cma_area("camera", range).is_ok());
    let mut movable: Vec<_> =
        std::iter::from_fn(|| buddy.alloc(&FrameRequest::ONE.movable()).ok()).collect();
    let place = |frame: &OwnedFrame| range.contains(frame.first());
    let at = movable.iter().position(place).expect("a frame of the area");
    Played::become_cpu(1);
    buddy.free(movable.swap_remove(at));
    if let Ok(unmovable) = buddy.alloc(&FrameRequest::ONE) {
        assert!(!place(&unmovable), "unmovable data in the area");
        buddy.free(unmovable);
    }
    movable.into_iter().for_each(|frame| buddy.free(frame));
}
