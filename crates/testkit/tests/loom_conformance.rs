//! The suite under loom, where clauses about memory order show: what hal brings keeps them, and implementations that
//! leave out one ordering are named.
#![cfg(loom)]

use std::sync::Mutex;

use kmem_hal::sync::{AtomicBool, AtomicU32, Ordering};
use kmem_hal::{
    CachePadded, Cpu, CpuCall, CpuCallError, CpuId, CpuSet, Deferred, EpochArea, EpochGrace, Grace,
    RawLock, RawSleepLock, Spin, SpinWait,
};
use kmem_testkit::conformance::{
    LoomThreads, Report, cpu, cpu_call, grace, raw_lock, raw_sleep_lock,
};
use kmem_testkit::model::{ModelCpu, explore};

/// Whether some interleaving makes `check` name the clause.
fn names(subject: &'static str, contract: &'static str, check: fn(&Report)) {
    let found = std::sync::Arc::new(Mutex::new(false));
    let seen = found.clone();
    explore(2, move || {
        let report = Report::new();
        check(&report);
        let failures = report.failures();
        if report.fails(subject, contract) {
            *seen.lock().unwrap() = true;
        } else {
            assert!(
                failures.is_empty(),
                "another clause was named: {failures:?}"
            );
        }
    });
    assert!(*found.lock().unwrap(), "{subject} {contract} was not found");
}

fn holds(check: fn(&Report)) {
    explore(2, move || {
        let report = Report::new();
        check(&report);
        report.assert_ok();
    });
}

/// One CPU that contexts lease for their pin; given back with `ORDER` 0 relaxed, 1 released.
struct Leased<const ORDER: u8> {
    taken: AtomicBool,
}

struct Lease<'a>(&'a AtomicBool, Ordering);

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        self.0.store(false, self.1);
    }
}

// SAFETY: C1 to C3 by the exchange; C5 by its order, unless ORDER leaves it out. Pins of one context do not nest here.
unsafe impl<const ORDER: u8> Cpu for Leased<ORDER> {
    type Guard<'a> = Lease<'a>;
    fn raw_pin(&self) -> Lease<'_> {
        while self
            .taken
            .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
            .is_err()
        {
            loom::thread::yield_now();
        }
        let order = if ORDER == 0 {
            Ordering::Relaxed
        } else {
            Ordering::Release
        };
        Lease(&self.taken, order)
    }
    fn id<'a>(&'a self, _guard: &Lease<'a>) -> CpuId {
        CpuId::BOOT
    }
    fn count(&self) -> u32 {
        1
    }
}

fn leased<const ORDER: u8>(report: &Report) {
    let leased = Leased::<ORDER> {
        taken: AtomicBool::new(false),
    };
    cpu::check_flat(report, &LoomThreads::new(2), &leased);
}

#[test]
fn loom_c5_is_named() {
    holds(leased::<1>);
    names("Cpu", "C5", leased::<0>);
}

/// A lock that lets go with a relaxed store.
struct Loose(AtomicBool);

// SAFETY: K1 by the exchange; K2 is not kept.
unsafe impl RawLock for Loose {
    type State = ();
    fn init() -> Self {
        Self(AtomicBool::new(false))
    }
    fn lock(&self) {
        while self.try_lock().is_none() {
            loom::thread::yield_now();
        }
    }
    fn try_lock(&self) -> Option<()> {
        self.0
            .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
            .ok()
            .map(|_| ())
    }
    unsafe fn unlock(&self, (): ()) {
        self.0.store(false, Ordering::Relaxed);
    }
}

// SAFETY: S1 by the exchange, readers alone too; S2 is not kept.
unsafe impl RawSleepLock for Loose {
    fn init() -> Self {
        RawLock::init()
    }
    fn lock_shared(&self) {
        self.lock();
    }
    fn try_lock_shared(&self) -> bool {
        self.try_lock().is_some()
    }
    unsafe fn unlock_shared(&self) {
        // SAFETY: the caller holds it.
        unsafe { self.unlock(()) }
    }
    fn lock_exclusive(&self) {
        self.lock();
    }
    fn try_lock_exclusive(&self) -> bool {
        self.try_lock().is_some()
    }
    unsafe fn unlock_exclusive(&self) {
        // SAFETY: the caller holds it.
        unsafe { self.unlock(()) }
    }
}

#[test]
fn loom_k2_is_named() {
    holds(|report| raw_lock::check::<Spin>(report, &LoomThreads::new(2), None));
    names("RawLock", "K2", |report| {
        raw_lock::check::<Loose>(report, &LoomThreads::new(2), None);
    });
}

#[test]
fn loom_spin_wait_keeps_its_contract() {
    holds(|report| raw_sleep_lock::check::<SpinWait>(report, &LoomThreads::new(2)));
}

/// Runs `f` on a thread and does not wait for it properly: its end is announced with a relaxed store.
struct Hasty<const ORDER: u8> {
    threads: Mutex<Vec<loom::thread::JoinHandle<()>>>,
}

// SAFETY: R1 by the flag; R3 by its order, unless ORDER leaves it out.
unsafe impl<const ORDER: u8> CpuCall for Hasty<ORDER> {
    fn run_on(&self, cpus: &CpuSet, f: &(dyn Fn(CpuId) + Sync)) -> Result<(), CpuCallError> {
        let (store, load) = if ORDER == 0 {
            (Ordering::Relaxed, Ordering::Relaxed)
        } else {
            (Ordering::Release, Ordering::Acquire)
        };
        for id in cpus.iter() {
            let done = std::sync::Arc::new(AtomicU32::new(0));
            let flag = done.clone();
            // SAFETY: only the lifetime changes; the flag is set after the last use.
            let f: &'static (dyn Fn(CpuId) + Sync) = unsafe { std::mem::transmute(f) };
            let thread = loom::thread::spawn(move || {
                ModelCpu::bind(id.get());
                f(id);
                flag.store(1, store);
            });
            self.threads.lock().unwrap().push(thread);
            while done.load(load) == 0 {
                loom::thread::yield_now();
            }
        }
        Ok(())
    }
}

fn called<const ORDER: u8>(report: &Report) {
    let call = Hasty::<ORDER> {
        threads: Mutex::default(),
    };
    let cpu = ModelCpu::new(2);
    cpu_call::check_once(report, &call, &cpu, &CpuSet::single(CpuId::new(1)));
    for thread in call.threads.into_inner().unwrap() {
        thread.join().unwrap();
    }
}

#[test]
fn loom_r3_is_named() {
    holds(called::<1>);
    names("CpuCall", "R3", called::<0>);
}

/// One count of readers, taken down with a relaxed subtraction.
struct Counting<const ORDER: u8> {
    readers: AtomicU32,
}

struct Reading<'a>(&'a AtomicU32, Ordering);

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, self.1);
    }
}

// SAFETY: G2 by the count; G3 by its order, unless ORDER leaves it out.
unsafe impl<const ORDER: u8> Grace for Counting<ORDER> {
    type Guard<'a> = Reading<'a>;
    fn read(&self) -> Reading<'_> {
        self.readers.fetch_add(1, Ordering::AcqRel);
        kmem_hal::sync::fence(Ordering::SeqCst);
        let order = if ORDER == 0 {
            Ordering::Relaxed
        } else {
            Ordering::Release
        };
        Reading(&self.readers, order)
    }
    fn defer(&self, call: Deferred) -> Result<(), Deferred> {
        Err(call)
    }
    fn poll(&self) -> usize {
        0
    }
    fn synchronize(&self) {
        kmem_hal::sync::fence(Ordering::SeqCst);
        while self.readers.load(Ordering::Acquire) != 0 {
            loom::thread::yield_now();
        }
    }
    fn pending(&self) -> usize {
        0
    }
}

fn counted<const ORDER: u8>(report: &Report) {
    let grace = Counting::<ORDER> {
        readers: AtomicU32::new(0),
    };
    grace::check_readers(report, &LoomThreads::new(2), &grace);
}

#[test]
fn loom_g3_is_named() {
    holds(counted::<1>);
    names("Grace", "G3", counted::<0>);
}

#[test]
fn loom_epochs_keep_the_contract() {
    holds(|report| {
        let areas: Box<[_]> = (0..2)
            .map(|_| CachePadded::new(EpochArea::<Spin, 2>::new()))
            .collect();
        let grace = EpochGrace::<_, Spin, 2>::new(ModelCpu::new(2));
        grace.init(&areas);
        grace::check_readers(report, &LoomThreads::new(2), &grace);
    });
}
