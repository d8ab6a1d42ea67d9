//! Several virtual CPUs: shootdowns, calls, interrupts, locks, and exact replay.

mod common;

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use common::{P, RW, Tables, US, builder};
use kmem_hal::{Cpu, CpuCall, CpuCallError, CpuSet, Lock, RawLock, RawSleepLock, SleepLock, Wait};
use kmem_mock_x86::manual::rflags;
use kmem_mock_x86::{
    Adversary, FlushWhat, FlushWork, Machine, MachineLock, MachineSleepLock, Scheduler,
    ViolationKind,
};

const VA: u64 = 0x40_0000;
const FRAME: u64 = 0x800;

fn page_work(root: u64) -> FlushWork {
    let what = FlushWhat::Range {
        first: VA,
        last: VA,
        stride: 4096,
    };
    FlushWork {
        root,
        pcid: 0,
        what,
        global: false,
        tables_freed: false,
    }
}

/// One CPU unmaps, shoots down and frees in a loop, the others read and write all the time. Returns what was seen.
fn unmap_race(
    seed: u64,
    adversary: Adversary,
    send: bool,
    wait: bool,
) -> (Vec<ViolationKind>, u64, u64) {
    let machine = builder()
        .cpus(3)
        .adversary(adversary)
        .seed(seed)
        .build()
        .unwrap();
    let mut tables = Tables::new(&machine, 0x20_0000);
    let leaf = tables.map(VA, 0, 12, 0);
    let root = tables.root;
    for cpu in 0..3 {
        tables.load(cpu);
    }
    let done = Cell::new(false);
    let mut scheduler = Scheduler::new(&machine, seed);
    let (m, done) = (&machine, &done);
    scheduler.spawn(0, move || {
        for round in 0..40 {
            let frame = FRAME + round % 2;
            m.note_allocated(frame, 1);
            assert!(m.memory().store(leaf, 8, frame << 12 | P | RW | US));
            for _ in 0..5 {
                m.yield_now();
            }
            assert!(m.memory().store(leaf, 8, 0));
            m.cpu(0).invlpg(VA).unwrap();
            let ticket = if send {
                m.send_flush(&[1, 2], page_work(root))
            } else {
                0
            };
            if wait {
                m.wait_for(ticket);
            }
            m.note_freed(frame, 1);
        }
        done.set(true);
    });
    for cpu in 1..3 {
        scheduler.spawn(cpu, move || {
            while !done.get() {
                let _ = m.cpu(cpu).user().write_u64(VA, cpu as u64);
                let _ = m.cpu(cpu).user().read_u64(VA);
            }
        });
    }
    let run = scheduler.run();
    let kinds = machine
        .take_violations()
        .iter()
        .map(|violation| violation.kind)
        .collect();
    (kinds, run.digest, machine.stats().delayed_interrupts)
}

#[test]
fn a_waited_for_shootdown_protects_the_frame_whatever_the_schedule() {
    let mut delayed = 0;
    for seed in 0..30 {
        for adversary in [Adversary::OFF, Adversary::FULL] {
            let (kinds, _, late) = unmap_race(seed, adversary, true, true);
            assert_eq!(kinds, [], "seed {seed}");
            delayed += late;
        }
    }
    assert!(delayed > 0, "interrupts were late and it did not matter");
}

#[test]
fn freeing_before_the_answers_is_found() {
    let found = (0..10)
        .filter(|&seed| !unmap_race(seed, Adversary::FULL, true, false).0.is_empty())
        .count();
    assert_eq!(found, 10, "found by every one of ten seeds");
}

#[test]
fn a_dropped_shootdown_is_found() {
    let found = (0..10)
        .filter(|&seed| !unmap_race(seed, Adversary::OFF, false, true).0.is_empty())
        .count();
    assert_eq!(found, 10);
}

#[test]
fn the_same_seed_is_the_same_run() {
    for seed in 0..5 {
        let first = unmap_race(seed, Adversary::FULL, true, false);
        assert_eq!(
            first,
            unmap_race(seed, Adversary::FULL, true, false),
            "seed {seed}"
        );
        assert_ne!(
            first.1,
            unmap_race(seed + 1, Adversary::FULL, true, false).1
        );
    }
}

#[test]
fn without_a_scheduler_delivery_is_as_late_as_it_can_be() {
    let machine = builder().cpus(2).build().unwrap();
    let mut tables = Tables::new(&machine, 0x20_0000);
    let leaf = tables.map(VA, FRAME << 12, 12, P);
    for cpu in 0..2 {
        tables.load(cpu);
        machine.cpu(cpu).read_u8(VA).unwrap();
    }
    tables.set(leaf, 0);
    let ticket = machine.send_flush(&[1], page_work(tables.root));
    assert!(machine.cpu(1).read_u8(VA).is_ok(), "still on its way");
    machine.wait_for(ticket);
    assert!(machine.cpu(1).read_u8(VA).is_err());
    assert!(machine.cpu(0).holds(VA), "only the CPUs that were named");
    machine.wait_for(ticket);
    machine.wait_for(machine.send_flush(&[], page_work(tables.root)));
}

#[test]
fn a_cpu_with_interrupts_off_answers_when_they_are_on_again() {
    let machine = Machine::pc(4 << 20, 2);
    let order = RefCell::new(Vec::new());
    let mut scheduler = Scheduler::new(&machine, 1);
    let (m, order) = (&machine, &order);
    let off = &Cell::new(false);
    scheduler.spawn(0, move || {
        while !off.get() {
            m.yield_now();
        }
        let ticket = m.send_flush(&[1], page_work(0));
        m.wait_for(ticket);
        order.borrow_mut().push("answered");
    });
    scheduler.spawn(1, move || {
        m.cpu(1).set_interrupts(false).unwrap();
        off.set(true);
        for _ in 0..50 {
            m.yield_now();
        }
        order.borrow_mut().push("on");
        m.cpu(1).set_interrupts(true).unwrap();
        for _ in 0..50 {
            m.yield_now();
        }
    });
    scheduler.run();
    assert_eq!(*order.borrow(), ["on", "answered"]);
}

#[test]
fn two_cpus_that_shoot_at_each_other_with_interrupts_off_are_a_deadlock() {
    let panic = std::panic::catch_unwind(|| {
        let machine = Machine::pc(4 << 20, 2);
        let mut scheduler = Scheduler::new(&machine, 1);
        for cpu in 0..2 {
            let m = &machine;
            scheduler.spawn(cpu, move || {
                m.cpu(cpu).set_interrupts(false).unwrap();
                m.yield_now();
                m.wait_for(m.send_flush(&[1 - cpu], page_work(0)));
            });
        }
        scheduler.run();
    })
    .unwrap_err();
    let text = panic.downcast_ref::<String>().unwrap();
    assert!(
        text.contains("no CPU can go on") && text.contains("CPU 1 (interrupts off)"),
        "{text}"
    );
}

#[test]
fn calls_run_on_every_cpu_as_that_cpu() {
    let machine = Machine::pc(4 << 20, 4);
    let all = CpuSet::first(4);
    let seen = [const { AtomicUsize::new(0) }; 4];
    let caller = AtomicUsize::new(2);
    let count = |cpu: kmem_hal::CpuId| {
        assert_eq!(machine.pin().id(), cpu);
        let on = machine.cpu(cpu.index()).registers().rflags & rflags::IF != 0;
        assert_eq!(
            on,
            cpu.index() == caller.load(Ordering::Relaxed),
            "interrupts are off in an interrupt"
        );
        seen[cpu.index()].fetch_add(1, Ordering::Relaxed);
    };
    // Idle CPUs: the caller is alone.
    machine
        .on_cpu(2, || CpuCall::run_on(&machine, &all, &count))
        .unwrap();
    caller.store(0, Ordering::Relaxed);
    // Busy ones: at their yield points, interrupts off inside.
    let mut scheduler = Scheduler::new(&machine, 5);
    let (m, count) = (&machine, &count);
    let finished = &Cell::new(false);
    scheduler.spawn(0, move || {
        CpuCall::run_on(m, &all, count).unwrap();
        finished.set(true);
    });
    scheduler.spawn(1, move || {
        while !finished.get() {
            assert_eq!(m.pin().id().get(), 1);
        }
    });
    scheduler.run();
    assert!(
        seen.iter().all(|seen| seen.load(Ordering::Relaxed) == 2),
        "{seen:?}"
    );
    machine.cpu(0).set_interrupts(false).unwrap();
    assert_eq!(
        CpuCall::run_on(&machine, &all, &|_| ()),
        Err(CpuCallError::WouldDeadlock)
    );
}

#[test]
fn a_machine_lock_excludes_under_every_schedule() {
    static LOCK: Lock<u64, MachineLock> = Lock::new(0);
    for seed in 0..20 {
        *LOCK.lock() = 0;
        let machine = Machine::pc(4 << 20, 3);
        let mut scheduler = Scheduler::new(&machine, seed);
        for cpu in 0..3 {
            let m = &machine;
            scheduler.spawn(cpu, move || {
                for _ in 0..10 {
                    let mut held = LOCK.lock();
                    let before = *held;
                    m.yield_now();
                    *held = before + 1;
                    assert!(LOCK.try_lock().is_none());
                }
            });
        }
        scheduler.run();
        assert_eq!(*LOCK.lock(), 30, "seed {seed}");
    }
    let free = MachineLock::INIT;
    let state = free.lock();
    // SAFETY: taken in the line above.
    unsafe { free.unlock(state) };
}

#[test]
fn a_sleep_lock_is_shared_by_readers_and_kept_from_them_by_a_writer() {
    for seed in 0..10 {
        let lock: SleepLock<(u64, u64), MachineSleepLock> = SleepLock::new((0, 0));
        let most = Cell::new(0u32);
        let readers = Cell::new(0u32);
        let machine = Machine::pc(4 << 20, 4);
        let mut scheduler = Scheduler::new(&machine, seed);
        let (m, lock, most, readers) = (&machine, &lock, &most, &readers);
        for cpu in 0..4 {
            scheduler.spawn(cpu, move || {
                for _ in 0..20 {
                    if cpu == 0 {
                        let mut pair = lock.write();
                        pair.0 += 1;
                        m.yield_now();
                        pair.1 += 1;
                    } else {
                        let pair = lock.read();
                        readers.set(readers.get() + 1);
                        most.set(most.get().max(readers.get()));
                        m.yield_now();
                        assert_eq!(pair.0, pair.1);
                        readers.set(readers.get() - 1);
                    }
                    m.yield_now();
                }
            });
        }
        scheduler.run();
        assert_eq!(*lock.read(), (20, 20));
        assert!(most.get() > 1, "readers share");
    }
}

#[test]
fn waiting_for_a_condition_lets_the_others_make_it_true() {
    let machine = Machine::pc(4 << 20, 2);
    let ready = Cell::new(false);
    let mut scheduler = Scheduler::new(&machine, 2);
    let (m, ready) = (&machine, &ready);
    let waits = MachineSleepLock::INIT;
    scheduler.spawn(0, move || waits.wait_until(1, &|| ready.get()));
    scheduler.spawn(1, move || {
        m.yield_now();
        ready.set(true);
    });
    scheduler.run();
    assert!(ready.get());
}

#[test]
fn device_interrupts_come_between_but_never_under_a_lock() {
    static LOCK: Lock<bool, MachineLock> = Lock::new(false);
    let machine = Machine::pc(4 << 20, 1);
    let count = Cell::new(0);
    let inside = Cell::new(false);
    let mut scheduler = Scheduler::new(&machine, 3);
    let (m, count, inside) = (&machine, &count, &inside);
    scheduler.interrupt(0, 512, move || {
        assert!(!inside.get(), "the lock keeps interrupts out");
        assert_eq!(m.cpu(0).registers().rflags & rflags::IF, 0);
        count.set(count.get() + 1);
        m.yield_now();
    });
    scheduler.spawn(0, move || {
        for _ in 0..200 {
            m.yield_now();
            let held = LOCK.lock();
            inside.set(true);
            m.yield_now();
            inside.set(false);
            drop(held);
        }
    });
    scheduler.run();
    assert!(count.get() > 20, "{}", count.get());
}

#[test]
fn a_panic_in_one_task_ends_the_run_and_unwinds_the_others() {
    struct Told<'a>(&'a Cell<bool>, &'a Machine);
    impl Drop for Told<'_> {
        fn drop(&mut self) {
            // A destructor may use the machine although its coroutine is being torn down.
            self.1.yield_now();
            self.0.set(true);
        }
    }
    let told = Cell::new(false);
    let machine = Machine::pc(4 << 20, 2);
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let mut scheduler = Scheduler::new(&machine, 9);
        let (m, told) = (&machine, &told);
        scheduler.spawn(0, move || {
            for _ in 0..50 {
                m.yield_now();
            }
            panic!("on purpose");
        });
        scheduler.spawn(1, move || {
            let _told = Told(told, m);
            loop {
                m.yield_now();
            }
        });
        scheduler.run();
    }));
    assert_eq!(
        outcome.unwrap_err().downcast_ref::<&str>(),
        Some(&"on purpose")
    );
    assert!(told.get());
    assert_eq!(machine.current_cpu(), 0);
}

#[test]
fn a_call_does_not_outlive_its_sender_when_a_schedule_ends_in_a_panic() {
    struct Note<F: Fn()>(F);
    impl<F: Fn()> Drop for Note<F> {
        fn drop(&mut self) {
            (self.0)();
        }
    }
    // Statics, so that the test itself touches nothing of the sender's.
    static GONE: AtomicBool = AtomicBool::new(false);
    static INSIDE: AtomicBool = AtomicBool::new(false);
    static LATE: AtomicBool = AtomicBool::new(false);
    let machine = Machine::pc(4 << 20, 3);
    let m = &machine;
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let mut scheduler = Scheduler::new(m, 1);
        scheduler.spawn(0, move || {
            let _sender = Note(|| GONE.store(true, Relaxed));
            m.call_on(&[1], &|_| {
                let _closure = Note(|| {
                    LATE.fetch_or(GONE.load(Relaxed), Relaxed);
                });
                INSIDE.store(true, Relaxed);
                loop {
                    m.yield_now();
                }
            });
        });
        scheduler.spawn(1, move || {
            loop {
                m.yield_now();
            }
        });
        scheduler.spawn(2, move || {
            while !INSIDE.load(Relaxed) {
                m.yield_now();
            }
            panic!("the end");
        });
        scheduler.run();
    }));
    assert!(outcome.is_err() && INSIDE.load(Relaxed) && GONE.load(Relaxed));
    assert!(
        !LATE.load(Relaxed),
        "the closure unwound on another stack after its sender's was gone"
    );
}

#[test]
fn a_sender_that_catches_its_panic_does_not_leave_its_call_behind() {
    static LEFT: AtomicBool = AtomicBool::new(false);
    static LATE: AtomicBool = AtomicBool::new(false);
    let machine = Machine::pc(4 << 20, 2);
    let m = &machine;
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let mut scheduler = Scheduler::new(m, 1);
        scheduler.spawn(0, move || {
            let inside = AtomicBool::new(false);
            let sent = catch_unwind(AssertUnwindSafe(|| {
                m.call_on(&[0, 1], &|cpu| {
                    if cpu == 0 {
                        while !inside.load(Relaxed) {
                            m.yield_now();
                        }
                        panic!("the sender's own part");
                    }
                    inside.store(true, Relaxed);
                    for _ in 0..50 {
                        m.yield_now();
                        LATE.fetch_or(LEFT.load(Relaxed), Relaxed);
                    }
                });
            }));
            assert!(sent.is_err());
            LEFT.store(true, Relaxed);
            m.yield_now();
        });
        scheduler.spawn(1, move || {
            for _ in 0..200 {
                m.yield_now();
            }
        });
        scheduler.run();
    }));
    assert!(LEFT.load(Relaxed) && !LATE.load(Relaxed));
    assert!(outcome.is_err());
}
