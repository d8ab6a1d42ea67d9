//! Refusals are honest: where a call says that no fitting run was free, there was an instant during the call at which none was.
//!
//! Threads play CPUs that can be called by each other. Each records when its calls began and ended; afterwards a checker looks for
//! an order of all calls, each at an instant between its beginning and its end, in which every answer is right for a plain
//! set of free frames (Wing and Gong, Testing and verifying concurrent objects, 1993). A refusal in no such order is a lie.
//!
//! NMIs are played where they hurt: inside a zone's lock, where what they free must wait for the call that they interrupted.
#![cfg(shuttle)]

use std::cell::RefCell;
use std::collections::HashSet;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicU64 as Plain;

use kmem_buddy::{BootMap, Buddy, Config, PlaceError, RegionKind, ZoneLimits};
use kmem_hal::sync::{AtomicU32, AtomicU64};
use kmem_hal::{
    AllocError, Cpu, CpuCall, CpuCallError, CpuId, CpuSet, Frame, FrameRange, FrameRequest,
    FrameSink, FrameSource, NoPressure, Order, OwnedFrame, PhysAddr, PhysMap, RawLock, Spin,
};
use kmem_testkit::model::ModelCpu;
use shuttle::rand::Rng;
use shuttle::scheduler::{RandomScheduler, Schedule, Scheduler, Task, TaskId};
use shuttle::sync::Mutex;
use shuttle::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use shuttle::thread;

const CPUS: u32 = 3;
/// Frames 64 to 72 are all that is free; the rest has been taken.
const ISLAND: u64 = 64;
const SIZE: u64 = 8;
const FRAMES: u64 = 1024;

/// One call with its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    /// Frames by bits of the island.
    Alloc(u8),
    Refused {
        order: u8,
    },
    /// The frames of these bits were asked for by place, and some are in use.
    InUse(u8),
    Free(u8),
}

/// A call and when it began and ended.
#[derive(Clone, Copy, Debug)]
struct Event {
    began: u64,
    ended: u64,
    call: Call,
}

/// Whether a naturally aligned run of this order is free.
fn has_run(free: u8, order: u8) -> bool {
    let run = (1u16 << (1 << order)) - 1;
    (0..SIZE)
        .step_by(1 << order)
        .any(|at| u16::from(free) & run << at == run << at)
}

/// What the set of free frames is after the call, if the answer is right.
fn apply(free: u8, call: Call) -> Option<u8> {
    match call {
        Call::Alloc(bits) => (free & bits == bits).then_some(free & !bits),
        Call::Refused { order } => (!has_run(free, order)).then_some(free),
        Call::InUse(bits) => (free & bits != bits).then_some(free),
        Call::Free(bits) => (free & bits == 0).then_some(free | bits),
    }
}

/// Whether some order of the calls is right; all of the island is free before.
fn is_linearizable(history: &[Event]) -> bool {
    fn search(history: &[Event], done: u64, free: u8, seen: &mut HashSet<(u64, u8)>) -> bool {
        if done.count_ones() as usize == history.len() {
            return true;
        }
        if !seen.insert((done, free)) {
            return false;
        }
        let left = |at: &usize| done >> at & 1 == 0;
        // Whatever ended before a call began comes before it.
        let first_end = (0..history.len())
            .filter(left)
            .map(|at| history[at].ended)
            .min();
        (0..history.len()).filter(left).any(|at| {
            Some(history[at].began) < first_end
                && apply(free, history[at].call)
                    .is_some_and(|free| search(history, done | 1 << at, free, seen))
        })
    }
    search(history, 0, u8::MAX, &mut HashSet::new())
}

/// CPUs that run what others ask for between their own calls, and while they wait for others.
struct Bus {
    caller: Mutex<()>,
    function: AtomicUsize,
    asked: [AtomicBool; CPUS as usize],
    gone: [AtomicBool; CPUS as usize],
    cpu: ModelCpu,
}

impl Bus {
    fn new() -> Self {
        Self {
            caller: Mutex::new(()),
            function: AtomicUsize::new(0),
            asked: std::array::from_fn(|_| AtomicBool::new(false)),
            gone: std::array::from_fn(|_| AtomicBool::new(false)),
            cpu: ModelCpu::new(CPUS),
        }
    }

    /// Runs what this CPU was asked for.
    fn poll(&self, me: CpuId) {
        if self.asked[me.index()].load(Ordering::SeqCst) {
            let function: *const &(dyn Fn(CpuId) + Sync) =
                std::ptr::with_exposed_provenance(self.function.load(Ordering::SeqCst));
            // SAFETY: who asked waits until `asked` is false again.
            unsafe { (*function)(me) };
            self.asked[me.index()].store(false, Ordering::SeqCst);
        }
    }

    /// The calling CPU's thread ends: who asks it plays it.
    fn leave(&self) {
        let me = self.cpu.pin().id();
        self.poll(me);
        self.gone[me.index()].store(true, Ordering::SeqCst);
    }
}

// SAFETY: R1: each CPU runs `f` itself between two of its calls, or, once its thread has ended, its caller does in its place;
// R2: never refused; R3: sequentially consistent words.
unsafe impl CpuCall for &'static Bus {
    fn run_on(&self, cpus: &CpuSet, f: &(dyn Fn(CpuId) + Sync)) -> Result<(), CpuCallError> {
        let me = self.cpu.pin().id();
        let _caller = loop {
            if let Ok(guard) = self.caller.try_lock() {
                break guard;
            }
            self.poll(me);
            thread::yield_now();
        };
        let function: *const &(dyn Fn(CpuId) + Sync) = &raw const f;
        self.function
            .store(function.expose_provenance(), Ordering::SeqCst);
        for cpu in cpus.iter() {
            self.asked[cpu.index()].store(true, Ordering::SeqCst);
        }
        for cpu in cpus.iter() {
            while self.asked[cpu.index()].load(Ordering::SeqCst) {
                if cpu == me || self.gone[cpu.index()].load(Ordering::SeqCst) {
                    ModelCpu::bind(cpu.get());
                    self.poll(cpu);
                    ModelCpu::bind(me.get());
                } else {
                    thread::yield_now();
                }
            }
        }
        Ok(())
    }
}

/// Memory for the allocator's tables; no other frame is touched.
struct Memory(usize);

// SAFETY: P1 to P5 for the leaked bytes, which cover all frames.
unsafe impl PhysMap for Memory {
    fn reach(&self) -> FrameRange {
        FrameRange::from_numbers(0, FRAMES).unwrap()
    }
    fn to_ptr(&self, address: PhysAddr) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.0 + address.as_u64() as usize)
    }
    fn to_phys(&self, pointer: *const u8) -> PhysAddr {
        PhysAddr::new((pointer.addr() - self.0) as u64)
    }
    unsafe fn words(&self, _: Frame) -> &[AtomicU64] {
        unreachable!("the allocator reads no frame as a table")
    }
    unsafe fn words32(&self, _: Frame) -> &[AtomicU32] {
        unreachable!("the allocator reads no frame as a table")
    }
}

shuttle::thread_local! {
    /// The NMI that strikes in the thread's next lock.
    static NMI: RefCell<Option<Box<dyn FnOnce()>>> = RefCell::new(None);
}

/// A lock in whose hold the NMI strikes.
struct Struck(Spin);

// SAFETY: K1 to K3 of `Spin`; the NMI that interrupts a holder only tries to take it.
unsafe impl RawLock for Struck {
    type State = <Spin as RawLock>::State;
    const INIT: Self = Self(Spin::INIT);
    fn lock(&self) -> Self::State {
        let state = self.0.lock();
        let nmi = NMI.with(|armed| armed.borrow_mut().take());
        if let Some(nmi) = nmi {
            nmi();
        }
        state
    }
    fn try_lock(&self) -> Option<Self::State> {
        self.0.try_lock()
    }
    unsafe fn unlock(&self, state: Self::State) {
        // SAFETY: by contract.
        unsafe { self.0.unlock(state) };
    }
}

type Machine = Buddy<&'static Memory, ModelCpu, Struck, &'static Bus>;

thread_local! {
    /// Memory of all machines of a test, whose schedules come one after the other on one thread of the host.
    static MEMORY: &'static Memory = {
        let bytes = vec![0u64; (FRAMES << 12) as usize / 8 + 512].leak();
        let base = (bytes.as_mut_ptr().expose_provenance() + 4095) & !4095;
        Box::leak(Box::new(Memory(base)))
    };
}

/// A machine of which the island alone is free, and its bus.
fn boot() -> (&'static Machine, &'static Bus) {
    let mut map: BootMap<4> = BootMap::new();
    map.push(PhysAddr::new(0), FRAMES << 12, RegionKind::Usable)
        .unwrap();
    let bus: &'static Bus = Box::leak(Box::new(Bus::new()));
    let buddy: &'static Machine = Box::leak(Box::new(Buddy::with(
        MEMORY.with(|memory| *memory),
        ModelCpu::new(CPUS),
        bus,
        NoPressure,
    )));
    let config = Config::new()
        .limits(ZoneLimits::NORMAL_ONLY)
        .min_free_kib(0);
    // SAFETY: X1: the test's own memory, which only this allocator has.
    unsafe { buddy.init(&mut map, &config) }.unwrap();
    let end = buddy.metadata().first().number();
    for (first, end) in [(1, ISLAND), (ISLAND + SIZE, end)] {
        let rest = FrameRange::from_numbers(first, end).unwrap();
        let _taken = buddy.alloc_range_at(rest).unwrap();
    }
    let island = buddy.recount().free;
    assert_eq!(island, SIZE);
    (buddy, bus)
}

fn bits(range: FrameRange) -> u8 {
    let run = (1u16 << range.count()) - 1;
    (run << (range.first().number() - ISLAND)) as u8
}

/// What a CPU has and what it did: shared with its NMIs.
#[derive(Default)]
struct Own {
    held: Vec<OwnedFrame>,
    history: Vec<Event>,
}

/// Makes an NMI free one of the CPU's blocks inside the next lock that it takes.
fn arm(
    own: &Rc<RefCell<Own>>,
    buddy: &'static Machine,
    clock: &Arc<Plain>,
    freed: Arc<AtomicBool>,
) {
    let (own, clock) = (own.clone(), clock.clone());
    let strike = move || {
        let frame = own.borrow_mut().held.pop();
        if let Some(frame) = frame {
            let began = tick(&clock);
            let call = Call::Free(bits(frame.range()));
            buddy.free(frame);
            let ended = tick(&clock);
            own.borrow_mut().history.push(Event { began, ended, call });
            freed.store(true, Ordering::SeqCst);
        }
    };
    NMI.with(|armed| *armed.borrow_mut() = Some(Box::new(strike)));
}

fn tick(clock: &Plain) -> u64 {
    clock.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

/// One CPU's calls; what it holds at the end is freed by nobody.
fn play(
    cpu: u32,
    (buddy, bus): (&'static Machine, &'static Bus),
    clock: &Arc<Plain>,
    (calls, nmis): (usize, bool),
) -> Vec<Event> {
    ModelCpu::bind(cpu);
    let mut random = shuttle::rand::thread_rng();
    let own = Rc::new(RefCell::new(Own::default()));
    for _ in 0..calls {
        bus.poll(CpuId::new(cpu));
        let began = tick(clock);
        let held = own.borrow().held.len();
        let call = if held > 0 && random.gen_range(0..5) < 2 {
            let frame = own.borrow_mut().held.swap_remove(random.gen_range(0..held));
            let call = Call::Free(bits(frame.range()));
            buddy.free(frame);
            call
        } else if random.gen_range(0..3) == 0 {
            // By place: a block, or a range that is none.
            let count = [1, 2, 3, 4][random.gen_range(0..4)];
            let first = ISLAND + random.gen_range(0..=SIZE - count);
            let range = FrameRange::from_numbers(first, first + count).unwrap();
            if nmis {
                arm(&own, buddy, clock, Arc::default());
            }
            match buddy.alloc_range_at(range) {
                Ok(taken) => {
                    own.borrow_mut().held.extend(taken.into_blocks(Order::ZERO));
                    Call::Alloc(bits(range))
                }
                Err(PlaceError::InUse) => Call::InUse(bits(range)),
                Err(PlaceError::InUseHere) => continue, // promises nothing
                Err(error) => panic!("{error}"),
            }
        } else {
            let order = random.gen_range(0..4u8);
            let request = FrameRequest::new(Order::new(order).unwrap());
            if nmis {
                arm(&own, buddy, clock, Arc::default());
            }
            match buddy.alloc(&request.movable()) {
                Ok(frame) => {
                    let call = Call::Alloc(bits(frame.range()));
                    own.borrow_mut().held.push(frame);
                    call
                }
                Err(AllocError::OutOfMemory) => Call::Refused { order },
                Err(AllocError::OutOfMemoryHere) => continue, // promises nothing
                Err(error) => panic!("{error}"),
            }
        };
        let ended = tick(clock);
        NMI.with(|armed| armed.borrow_mut().take());
        own.borrow_mut().history.push(Event { began, ended, call });
    }
    NMI.with(|armed| armed.borrow_mut().take());
    bus.leave();
    let mut own = own.borrow_mut();
    std::mem::take(&mut own.history)
}

/// How many calls said that no run was free, and how many that some of a range was in use.
#[derive(Default)]
struct Refusals {
    out_of_memory: Plain,
    in_use: Plain,
}

impl Refusals {
    fn note(&self, history: &[Event]) {
        let relaxed = std::sync::atomic::Ordering::Relaxed;
        for event in history {
            match event.call {
                Call::Refused { .. } => self.out_of_memory.fetch_add(1, relaxed),
                Call::InUse(_) => self.in_use.fetch_add(1, relaxed),
                Call::Alloc(_) | Call::Free(_) => 0,
            };
        }
    }

    fn are_at_least(self: &Arc<Self>, least: u64) {
        let relaxed = std::sync::atomic::Ordering::Relaxed;
        let out_of_memory = self.out_of_memory.load(relaxed);
        let in_use = self.in_use.load(relaxed);
        println!("{out_of_memory} times out of memory, {in_use} times in use");
        assert!(out_of_memory > least, "{out_of_memory} times out of memory");
        assert!(in_use > least, "{in_use} times in use");
    }
}

/// A thread goes on for some steps before another one does: so far that a call ends between two steps of another one, which hardly
/// ever happens where each step may be anybody's.
struct InStretches {
    inner: RandomScheduler,
    /// One switch in so many steps.
    steps: u64,
    coin: u64,
}

impl InStretches {
    fn new(iterations: usize, steps: u64) -> Self {
        Self {
            inner: RandomScheduler::new(iterations),
            steps,
            coin: 0,
        }
    }

    fn toss(&mut self) -> bool {
        self.coin ^= self.coin << 13;
        self.coin ^= self.coin >> 7;
        self.coin ^= self.coin << 17;
        (self.coin >> 16).is_multiple_of(self.steps)
    }
}

impl Scheduler for InStretches {
    fn new_execution(&mut self) -> Option<Schedule> {
        let schedule = self.inner.new_execution()?;
        self.coin = schedule.seed | 1;
        Some(schedule)
    }

    fn next_task(
        &mut self,
        runnable: &[&Task],
        current: Option<TaskId>,
        yields: bool,
    ) -> Option<TaskId> {
        let goes_on = runnable.iter().any(|task| Some(task.id()) == current);
        if goes_on && !yields && !self.toss() {
            return current;
        }
        self.inner.next_task(runnable, current, yields)
    }

    fn next_u64(&mut self) -> u64 {
        self.inner.next_u64()
    }
}

fn refusals_are_honest(scheduler: impl Scheduler + 'static, cpus: u32, calls: (usize, bool)) {
    let refusals = Arc::new(Refusals::default());
    let counts = refusals.clone();
    let model = move || {
        let machine = boot();
        for cpu in cpus..CPUS {
            machine.1.gone[cpu as usize].store(true, Ordering::SeqCst);
        }
        let clock = Arc::new(Plain::new(0));
        let threads: Vec<_> = (1..cpus)
            .map(|cpu| {
                let clock = clock.clone();
                thread::spawn(move || play(cpu, machine, &clock, calls))
            })
            .collect();
        let mut history = play(0, machine, &clock, calls);
        for thread in threads {
            history.extend(thread.join().unwrap());
        }
        history.sort_by_key(|event| event.began);
        counts.note(&history);
        assert!(is_linearizable(&history), "no order explains {history:#?}");
        assert_eq!(machine.0.misuse(), None);
    };
    let iterations = shuttle::Runner::new(scheduler, shuttle::Config::default()).run(model);
    refusals.are_at_least(iterations as u64);
}

#[test]
fn shuttle_two_cpus_refuse_honestly() {
    refusals_are_honest(RandomScheduler::new(1500), 2, (9, false));
}

#[test]
fn shuttle_three_cpus_refuse_honestly() {
    refusals_are_honest(RandomScheduler::new(1000), 3, (7, false));
}

/// What an NMI frees inside a lock is in no zone and no array until the interrupted call has ended.
#[test]
fn shuttle_cpus_refuse_honestly_while_nmis_free_inside_locks() {
    refusals_are_honest(RandomScheduler::new(1000), 2, (9, true));
}

/// One of two frames is free at every instant: the first in the array of CPU 1, then in the zone. An NMI inside a lock of CPU 1 frees
/// the second, which waits for the call that it interrupted, and only then does CPU 2 take the first. So CPU 0 must not be refused.
#[test]
fn shuttle_a_frame_that_waits_for_an_interrupted_call_is_free() {
    // With the pool looked at after the counter it takes some 20,000 schedules to see the lie: about one run of twenty would miss it.
    const RUNS: usize = 60_000;
    let waited = Arc::new(Plain::new(0));
    let count = waited.clone();
    let model = move || {
        let (buddy, bus) = boot();
        let one = FrameRequest::ONE.movable();
        let clock = Arc::new(Plain::new(0));
        let ask = move |clock: &Plain, call: &mut dyn FnMut() -> Option<Call>| {
            let began = tick(clock);
            let call = call()?;
            let ended = tick(clock);
            Some(Event { began, ended, call })
        };
        let alloc = move || match buddy.alloc(&one) {
            Ok(frame) => Ok(Call::Alloc(bits(frame.range()))),
            Err(AllocError::OutOfMemory) => Ok(Call::Refused { order: 0 }),
            Err(error) => Err(error),
        };
        let mut held: Vec<_> = (0..SIZE).map(|_| buddy.alloc(&one).unwrap()).collect();
        let (first, second) = (held.pop().unwrap(), held.pop().unwrap());
        let taken = !bits(first.range());
        ModelCpu::bind(1);
        buddy.free(first);
        ModelCpu::bind(0);
        assert_eq!(buddy.mem_info().cached, 1);
        let mut history = vec![ask(&clock, &mut || Some(Call::Alloc(taken))).unwrap()];
        // An array is emptied as soon as CPU 0 has looked at the zone.
        let drained = move |cpu: u32| {
            ModelCpu::bind(cpu);
            while !bus.asked[cpu as usize].load(Ordering::SeqCst) {
                thread::yield_now();
            }
            bus.poll(CpuId::new(cpu));
        };
        let freed = Arc::new(AtomicBool::new(false));
        let (clocks, frees) = (clock.clone(), freed.clone());
        let interrupted = thread::spawn(move || {
            drained(1);
            let own = Rc::new(RefCell::new(Own::default()));
            own.borrow_mut().held.push(second);
            arm(&own, buddy, &clocks, frees);
            drop(buddy.buddy_info().to_string());
            bus.leave();
            own.take().history
        });
        let clocks = clock.clone();
        let taker = thread::spawn(move || {
            drained(2);
            while !freed.load(Ordering::SeqCst) {
                thread::yield_now();
            }
            let taken = ask(&clocks, &mut || alloc().ok());
            bus.leave();
            taken
        });
        let refused = ask(&clock, &mut || {
            let call = alloc();
            if call == Err(AllocError::OutOfMemoryHere) {
                count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
            call.ok()
        });
        bus.leave();
        history.extend(refused);
        history.extend(interrupted.join().unwrap());
        history.extend(taker.join().unwrap());
        history.sort_by_key(|event| event.began);
        assert!(is_linearizable(&history), "no order explains {history:#?}");
        assert_eq!(buddy.misuse(), None);
    };
    let scheduler = InStretches::new(RUNS, 32);
    shuttle::Runner::new(scheduler, shuttle::Config::default()).run(model);
    let waited = waited.load(std::sync::atomic::Ordering::Relaxed);
    println!("{waited} refusals while it waited");
    assert!(
        waited > RUNS as u64 / 1000,
        "{waited} refusals while it waited"
    );
}

/// The checker itself: an honest history, a frame with two owners, and a refusal while a frame was free throughout.
#[test]
fn shuttle_the_checker_tells_lies_from_truth() {
    let event = |began, ended, call| Event { began, ended, call };
    let taken = event(0, 1, Call::Alloc(0xff));
    let refusal = event(2, 9, Call::Refused { order: 0 });
    assert!(is_linearizable(&[taken, refusal]));
    // A frame that was free before the refusal began, or came free in the middle of it.
    let freed_before = event(0, 1, Call::Alloc(0xfe));
    assert!(!is_linearizable(&[freed_before, refusal]));
    let freed_within = event(3, 4, Call::Free(1));
    assert!(is_linearizable(&[taken, refusal, freed_within]));
    // Handed from one to the next, so that one of two frames was free at every instant: a lie.
    let one_free = event(0, 1, Call::Alloc(0xfe));
    let other_freed = event(3, 4, Call::Free(2));
    let first_taken = event(5, 6, Call::Alloc(1));
    assert!(!is_linearizable(&[
        one_free,
        refusal,
        other_freed,
        first_taken
    ]));
    assert!(!is_linearizable(&[
        event(0, 1, Call::Alloc(3)),
        event(2, 3, Call::Alloc(2))
    ]));
    // Frames are free, and no run of them.
    let scattered = event(0, 1, Call::Alloc(0x5b));
    assert!(is_linearizable(&[
        scattered,
        event(2, 3, Call::Refused { order: 1 })
    ]));
    assert!(!is_linearizable(&[
        scattered,
        event(2, 3, Call::Refused { order: 0 })
    ]));
}
