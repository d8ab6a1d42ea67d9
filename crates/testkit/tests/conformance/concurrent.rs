//! `Cpu`, `CpuCall`, `RawLock`, `RawSleepLock`, `Wait`, `Grace`, `Clock`. Clauses about memory order are broken in
//! `tests/loom_conformance.rs`, where it shows.

use std::cell::Cell;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use kmem_hal::{
    CachePadded, Clock, Cpu, CpuCall, CpuCallError, CpuId, CpuSet, Deferred, EpochArea, EpochGrace,
    Grace, NoClock, NoCpuCall, RawLock, RawSleepLock, SingleCpu, SingleGrace, Spin, SpinWait, Wait,
};
use kmem_testkit::conformance::{
    HostThreads, Report, clock, cpu, cpu_call, grace, raw_lock, raw_sleep_lock,
};

use super::names;

thread_local! {
    /// (pins, id) of this thread.
    static PINNED: Cell<(u32, u32)> = const { Cell::new((0, 0)) };
    static INTERRUPTS: Cell<bool> = const { Cell::new(true) };
}

/// CPUs that threads lease for as long as they are pinned: a kernel's scheduler, seen from the pin.
struct Leased {
    taken: Vec<AtomicBool>,
    clause: &'static str,
    asked: AtomicU32,
}

impl Leased {
    fn new(count: u32, clause: &'static str) -> Self {
        Self {
            taken: (0..count).map(|_| AtomicBool::new(false)).collect(),
            clause,
            asked: AtomicU32::new(0),
        }
    }

    fn lease(&self) -> u32 {
        if self.clause == "C2" {
            return 0;
        }
        loop {
            for (id, taken) in self.taken.iter().enumerate() {
                if !taken.swap(true, Ordering::Acquire) {
                    return id as u32;
                }
            }
            std::thread::yield_now();
        }
    }

    fn end(&self) {
        let (pins, id) = PINNED.get();
        PINNED.set((pins - 1, id));
        if pins == 1 || (self.clause == "C4" && pins == 2) {
            self.taken[id as usize].store(false, Ordering::Release);
        }
    }
}

struct Lease<'a>(&'a Leased);

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

// SAFETY: C1 to C5 by the leases, except for the clause that a value is made to break.
unsafe impl Cpu for Leased {
    type Guard<'a> = Lease<'a>;

    fn raw_pin(&self) -> Lease<'_> {
        let (pins, id) = PINNED.get();
        PINNED.set((pins + 1, if pins == 0 { self.lease() } else { id }));
        Lease(self)
    }
    fn id<'a>(&'a self, _guard: &Lease<'a>) -> CpuId {
        let id = PINNED.get().1;
        let asked = self.asked.fetch_add(1, Ordering::Relaxed);
        CpuId::new(match self.clause {
            "C1" if asked % 7 == 3 => id ^ 1,
            "C3" => id + self.count(),
            _ => id,
        })
    }
    fn count(&self) -> u32 {
        self.taken.len() as u32
    }
}

#[test]
fn cpus_pass_and_broken_ones_are_named() {
    let report = Report::new();
    // SAFETY: one thread uses it.
    let single = unsafe { SingleCpu::new() };
    cpu::check(&report, &HostThreads::new(1), &single);
    cpu::check(&report, &HostThreads::new(3), &Leased::new(2, ""));
    report.assert_ok();
    let checked: Vec<_> = report.checked().iter().map(|check| check.1).collect();
    assert_eq!(checked, ["C1", "C2", "C3", "C4", "C5"]);

    let report = Report::new();
    let many = Leased::new(CpuSet::CAPACITY + 1, "");
    cpu::check(&report, &HostThreads::new(1), &many);
    names(&report, "Cpu", "C3");
    for clause in ["C1", "C2", "C3", "C4"] {
        let report = Report::new();
        cpu::check(&report, &HostThreads::new(3), &Leased::new(2, clause));
        names(&report, "Cpu", clause);
    }
}

thread_local! {
    static BOUND: Cell<u32> = const { Cell::new(0) };
}

/// Threads that say which CPU they are.
struct Bound {
    count: u32,
    clause: &'static str,
}

// SAFETY: each thread of these tests binds a number of its own.
unsafe impl Cpu for Bound {
    type Guard<'a> = ();
    fn raw_pin(&self) {}
    fn id(&self, (): &()) -> CpuId {
        CpuId::new(BOUND.get())
    }
    fn count(&self) -> u32 {
        self.count
    }
}

// SAFETY: R1 to R3 by threads that are joined, except for the clause that a value is made to break.
unsafe impl CpuCall for Bound {
    fn run_on(&self, cpus: &CpuSet, f: &(dyn Fn(CpuId) + Sync)) -> Result<(), CpuCallError> {
        std::thread::scope(|scope| {
            for id in cpus.iter() {
                if self.clause == "R1 skips" && id.get() == 2 {
                    continue;
                }
                scope.spawn(move || {
                    let wrong = u32::from(self.clause == "R1 elsewhere");
                    BOUND.set(id.get() ^ wrong);
                    f(id);
                    if self.clause == "R1 twice" {
                        f(id);
                    }
                });
            }
        });
        if self.clause == "R2" {
            Err(CpuCallError::WouldDeadlock)
        } else {
            Ok(())
        }
    }
}

#[test]
fn cpu_calls_pass_and_broken_ones_are_named() {
    let run = |clause| {
        let report = Report::new();
        let cpu = Bound { count: 4, clause };
        cpu_call::check(&report, &cpu, &cpu, &CpuSet::first(3));
        report
    };
    run("").assert_ok();
    for clause in ["R1 skips", "R1 twice", "R1 elsewhere", "R2"] {
        names(&run(clause), "CpuCall", &clause[..2]);
    }
    // Nothing that refuses everything breaks a promise.
    let report = Report::new();
    let cpu = Bound {
        count: 2,
        clause: "",
    };
    cpu_call::check(&report, &NoCpuCall, &cpu, &CpuSet::first(2));
    report.assert_ok();
    // SAFETY: one thread uses it.
    let single = unsafe { SingleCpu::new() };
    cpu_call::check(&report, &single, &single, &CpuSet::first(1));
    report.assert_ok();
}

/// A lock that keeps (simulated) interrupts out.
struct Flagged<const HOW: u8>(Spin);

// SAFETY: K1 and K2 are Spin's, K3 by the flag, except where HOW says otherwise.
unsafe impl<const HOW: u8> RawLock for Flagged<HOW> {
    type State = bool;
    const INIT: Self = Self(Spin::INIT);

    fn lock(&self) -> bool {
        let before = INTERRUPTS.replace(false);
        self.0.lock();
        if HOW == 3 {
            INTERRUPTS.set(true);
        }
        before
    }
    fn try_lock(&self) -> Option<bool> {
        let before = INTERRUPTS.replace(HOW == 3);
        if self.0.try_lock().is_some() || HOW == 1 {
            return Some(before);
        }
        INTERRUPTS.set(before || HOW == 4);
        None
    }
    unsafe fn unlock(&self, state: bool) {
        // SAFETY: the caller holds the lock.
        unsafe { self.0.unlock(()) };
        INTERRUPTS.set(state && HOW != 5);
    }
}

fn run_lock<L: RawLock + Sync>() -> Report {
    let report = Report::new();
    raw_lock::check::<L>(&report, &HostThreads::new(3), Some(&|| INTERRUPTS.get()));
    report
}

#[test]
fn locks_pass_and_broken_ones_are_named() {
    run_lock::<Flagged<0>>().assert_ok();
    let report = Report::new();
    raw_lock::check::<Spin>(&report, &HostThreads::new(3), None);
    report.assert_ok();
    assert_eq!(report.not_checked()[0].1, "K3");
    names(&run_lock::<Flagged<1>>(), "RawLock", "K1");
    // Interrupts on while held, after a failed try, and not restored.
    names(&run_lock::<Flagged<3>>(), "RawLock", "K3");
    names(&run_lock::<Flagged<4>>(), "RawLock", "K3");
    names(&run_lock::<Flagged<5>>(), "RawLock", "K3");
}

/// Readers and writers; HOW 1: readers do not keep writers out; 2: they keep each other out.
struct Semaphore<const HOW: u8>(SpinWait);

// SAFETY: SpinWait's, except where HOW says otherwise.
unsafe impl<const HOW: u8> RawSleepLock for Semaphore<HOW> {
    const INIT: Self = Self(SpinWait::INIT);

    fn lock_shared(&self) {
        match HOW {
            1 => {}
            2 => self.0.lock_exclusive(),
            _ => self.0.lock_shared(),
        }
    }
    fn try_lock_shared(&self) -> bool {
        match HOW {
            1 => true,
            2 => self.0.try_lock_exclusive(),
            _ => self.0.try_lock_shared(),
        }
    }
    unsafe fn unlock_shared(&self) {
        // SAFETY: the caller holds what was taken.
        unsafe {
            match HOW {
                1 => {}
                2 => self.0.unlock_exclusive(),
                _ => self.0.unlock_shared(),
            }
        }
    }
    fn lock_exclusive(&self) {
        self.0.lock_exclusive();
    }
    fn try_lock_exclusive(&self) -> bool {
        self.0.try_lock_exclusive()
    }
    unsafe fn unlock_exclusive(&self) {
        // SAFETY: the caller holds the lock.
        unsafe { self.0.unlock_exclusive() }
    }
}

struct Impatient;

impl Wait for Impatient {
    fn wait_until(&self, _key: usize, done: &dyn Fn() -> bool) {
        done();
    }
    fn wake(&self, _key: usize) {}
}

#[test]
fn sleep_locks_pass_and_broken_ones_are_named() {
    fn run<L: RawSleepLock + Sync>() -> Report {
        let report = Report::new();
        raw_sleep_lock::check::<L>(&report, &HostThreads::new(3));
        report
    }
    run::<SpinWait>().assert_ok();
    names(&run::<Semaphore<1>>(), "RawSleepLock", "S1");
    names(&run::<Semaphore<2>>(), "RawSleepLock", "S1");

    let report = Report::new();
    let wait = SpinWait::INIT;
    raw_sleep_lock::check_wait(&report, &HostThreads::new(2), &wait);
    report.assert_ok();
    raw_sleep_lock::check_wait(&report, &HostThreads::new(1), &Impatient);
    names(&report, "Wait", "S4");
}

/// One count of readers for all.
struct Counting {
    readers: AtomicUsize,
    queue: Mutex<Vec<Deferred>>,
    clause: &'static str,
}

struct Reading<'a>(&'a Counting);

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        if self.0.clause == "G5" {
            self.0.readers.store(0, Ordering::Release);
        } else {
            self.0.readers.fetch_sub(1, Ordering::Release);
        }
    }
}

impl Counting {
    fn run_all(&self) -> usize {
        let calls = std::mem::take(&mut *self.queue.lock().unwrap());
        let count = calls.len();
        for call in calls {
            // SAFETY: the caller found no reader.
            unsafe { call.run() };
        }
        count
    }
}

// SAFETY: G1 to G3 by one count, except for the clause that a value is made to break; G4 is not kept.
unsafe impl Grace for Counting {
    type Guard<'a> = Reading<'a>;

    fn read(&self) -> Reading<'_> {
        self.readers.fetch_add(1, Ordering::SeqCst);
        Reading(self)
    }
    fn defer(&self, call: Deferred) -> Result<(), Deferred> {
        if self.clause == "G1" {
            // SAFETY: none.
            unsafe { call.run() };
            return Ok(());
        }
        let mut queue = self.queue.lock().unwrap();
        if queue.len() == 50 {
            return Err(call);
        }
        queue.push(call);
        Ok(())
    }
    fn poll(&self) -> usize {
        if self.readers.load(Ordering::SeqCst) == 0 {
            self.run_all()
        } else {
            0
        }
    }
    fn synchronize(&self) {
        while self.clause != "G2" && self.readers.load(Ordering::SeqCst) != 0 {
            std::thread::yield_now();
        }
        self.run_all();
    }
    fn pending(&self) -> usize {
        self.queue.lock().unwrap().len()
    }
}

#[test]
fn graces_pass_and_broken_ones_are_named() {
    let run = |clause| {
        let report = Report::new();
        let grace = Counting {
            readers: AtomicUsize::new(0),
            queue: Mutex::default(),
            clause,
        };
        grace::check(&report, &HostThreads::new(2), &grace);
        report
    };
    run("").assert_ok();
    for clause in ["G1", "G2", "G5"] {
        names(&run(clause), "Grace", clause);
    }
}

#[test]
fn hals_own_graces_pass() {
    let report = Report::new();
    // SAFETY: one thread uses it.
    let single = unsafe { SingleGrace::new() };
    grace::check(&report, &HostThreads::new(1), &single);
    report.assert_ok();

    let areas: Vec<_> = (0..3)
        .map(|_| CachePadded::new(EpochArea::<Spin>::new()))
        .collect();
    let epoch = EpochGrace::<_, Spin>::new(Leased::new(3, ""));
    epoch.init(&areas);
    grace::check(&report, &HostThreads::new(3), &epoch);
    report.assert_ok();

    // Nobody has an area: slower, and as right.
    let bare = EpochGrace::<_, Spin>::new(Leased::new(2, ""));
    grace::check(&report, &HostThreads::new(2), &bare);
    report.assert_ok();
}

struct Shaky(AtomicU64);

impl Clock for Shaky {
    fn now(&self) -> u64 {
        let now = self.0.fetch_add(1, Ordering::Relaxed);
        if now % 50 == 49 { now - 40 } else { now }
    }
}

#[test]
fn clocks_pass_and_broken_ones_are_named() {
    let report = Report::new();
    clock::check(&report, &HostThreads::new(2), &NoClock);
    report.assert_ok();
    clock::check(&report, &HostThreads::new(1), &Shaky(AtomicU64::new(0)));
    names(&report, "Clock", "N1");
}
