//! Refusals are honest: where a call says that no fitting run was free, there was an instant during the call at which none was.
//!
//! Threads play CPUs that can be called by each other. Each records when its calls began and ended; afterwards a checker looks for
//! an order of all calls, each at an instant between its beginning and its end, in which every answer is right for a plain
//! set of free frames (Wing and Gong, Testing and verifying concurrent objects, 1993). A refusal in no such order is a lie.
#![cfg(shuttle)]

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::AtomicU64 as Plain;

use kmem_buddy::{BootMap, Buddy, Config, PlaceError, RegionKind, ZoneLimits};
use kmem_hal::sync::{AtomicU32, AtomicU64};
use kmem_hal::{
    AllocError, Cpu, CpuCall, CpuCallError, CpuId, CpuSet, Frame, FrameRange, FrameRequest,
    FrameSink, FrameSource, NoPressure, Order, OwnedFrame, PhysAddr, PhysMap, Spin,
};
use kmem_testkit::model::ModelCpu;
use shuttle::rand::Rng;
use shuttle::sync::Mutex;
use shuttle::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use shuttle::thread;

const CPUS: u32 = 3;
/// Frames 64 to 72 are all that is free; the rest has been taken.
const ISLAND: u64 = 64;
const SIZE: u64 = 8;
const FRAMES: u64 = 1024;

/// One call with its answer.
#[derive(Clone, Copy, Debug)]
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

type Machine = Buddy<&'static Memory, ModelCpu, Spin, &'static Bus>;

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

/// One CPU's calls; what it holds at the end is freed by nobody.
fn play(
    cpu: u32,
    (buddy, bus): (&'static Machine, &'static Bus),
    clock: &Plain,
    calls: usize,
) -> Vec<Event> {
    ModelCpu::bind(cpu);
    let mut random = shuttle::rand::thread_rng();
    let mut held: Vec<OwnedFrame> = Vec::new();
    let mut history = Vec::new();
    let tick = || clock.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    for _ in 0..calls {
        bus.poll(CpuId::new(cpu));
        let began = tick();
        let call = if !held.is_empty() && random.gen_range(0..5) < 2 {
            let frame = held.swap_remove(random.gen_range(0..held.len()));
            let call = Call::Free(bits(frame.range()));
            buddy.free(frame);
            call
        } else if random.gen_range(0..3) == 0 {
            // By place: a block, or a range that is none.
            let count = [1, 2, 3, 4][random.gen_range(0..4)];
            let first = ISLAND + random.gen_range(0..=SIZE - count);
            let range = FrameRange::from_numbers(first, first + count).unwrap();
            match buddy.alloc_range_at(range) {
                Ok(taken) => {
                    held.extend(taken.into_blocks(Order::ZERO));
                    Call::Alloc(bits(range))
                }
                Err(PlaceError::InUse) => Call::InUse(bits(range)),
                Err(PlaceError::InUseHere) => continue, // promises nothing
                Err(error) => panic!("{error}"),
            }
        } else {
            let order = random.gen_range(0..4u8);
            let request = FrameRequest::new(Order::new(order).unwrap());
            match buddy.alloc(&request.movable()) {
                Ok(frame) => {
                    let call = Call::Alloc(bits(frame.range()));
                    held.push(frame);
                    call
                }
                Err(AllocError::OutOfMemory) => Call::Refused { order },
                Err(AllocError::OutOfMemoryHere) => continue, // promises nothing
                Err(error) => panic!("{error}"),
            }
        };
        let ended = tick();
        history.push(Event { began, ended, call });
    }
    bus.leave();
    history
}

fn refusals_are_honest(iterations: usize, cpus: u32, calls: usize) {
    let refused = Arc::new(Plain::new(0));
    let count = refused.clone();
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
        let refusals = history
            .iter()
            .filter(|event| matches!(event.call, Call::Refused { .. } | Call::InUse(_)));
        count.fetch_add(
            refusals.count() as u64,
            std::sync::atomic::Ordering::Relaxed,
        );
        assert!(is_linearizable(&history), "no order explains {history:#?}");
        assert_eq!(machine.0.misuse(), None);
    };
    shuttle::check_random(model, iterations);
    let refused = refused.load(std::sync::atomic::Ordering::Relaxed);
    assert!(
        refused > iterations as u64 / 4,
        "only {refused} refusals were looked at"
    );
}

#[test]
fn shuttle_two_cpus_refuse_honestly() {
    refusals_are_honest(1500, 2, 9);
}

#[test]
fn shuttle_three_cpus_refuse_honestly() {
    refusals_are_honest(1000, 3, 7);
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
