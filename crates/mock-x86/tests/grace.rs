//! Grace periods on virtual CPUs: never early, and no later than they must.

use std::cell::Cell;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

use kmem_hal::{Deferred, Grace};
use kmem_mock_x86::{Machine, MachineGrace, Scheduler};

static MADE: [AtomicUsize; 4] = [const { AtomicUsize::new(0) }; 4];

fn call(counter: usize) -> Deferred {
    fn run(context: *const (), _object: NonNull<()>) {
        MADE[context.addr()].fetch_add(1, Ordering::Relaxed);
    }
    // SAFETY: the call only counts; it may be made at any time and on any thread.
    unsafe {
        Deferred::new(
            run,
            std::ptr::without_provenance(counter),
            NonNull::dangling(),
        )
    }
}

fn made(counter: usize) -> usize {
    MADE[counter].load(Ordering::Relaxed)
}

#[test]
fn a_call_waits_for_the_sections_that_were_open_and_for_no_other() {
    let machine = Machine::pc(4 << 20, 2);
    let grace = MachineGrace::new(&machine);
    let old = machine.on_cpu(1, || grace.read());
    assert!(grace.defer(call(0)).is_ok());
    assert_eq!(grace.poll(), 0);
    let nested = machine.on_cpu(1, || grace.read());
    drop(old);
    assert_eq!(
        (grace.poll(), grace.pending()),
        (0, 1),
        "the outermost section is still open"
    );
    drop(nested);
    let new = machine.on_cpu(1, || grace.read());
    assert_eq!(
        (grace.poll(), made(0)),
        (1, 1),
        "a later section does not count"
    );
    drop(new);
    grace.synchronize();
}

#[test]
fn the_queue_is_bounded_and_gives_the_call_back() {
    let machine = Machine::pc(4 << 20, 2);
    let grace = MachineGrace::new(&machine);
    let section = machine.on_cpu(1, || grace.read());
    let mut taken = 0;
    while grace.defer(call(1)).is_ok() {
        taken += 1;
    }
    assert_eq!(grace.pending(), taken);
    drop(section);
    assert_eq!((grace.poll(), made(1)), (taken, taken));
}

#[test]
fn synchronize_lets_the_readers_end_under_every_schedule() {
    for seed in 0..20 {
        let machine = Machine::pc(4 << 20, 3);
        let grace = MachineGrace::new(&machine);
        let version = Cell::new(0u64);
        let oldest_allowed = Cell::new(0u64);
        let mut scheduler = Scheduler::new(&machine, seed);
        let (m, grace, version, allowed) = (&machine, &grace, &version, &oldest_allowed);
        scheduler.spawn(0, move || {
            for round in 1..10 {
                version.set(round);
                grace.synchronize();
                allowed.set(round);
            }
        });
        for cpu in 1..3 {
            scheduler.spawn(cpu, move || {
                for _ in 0..40 {
                    let section = grace.read();
                    let seen = version.get();
                    m.yield_now();
                    assert!(seen >= allowed.get(), "a section outlived its grace period");
                    drop(section);
                    m.yield_now();
                }
            });
        }
        scheduler.run();
    }
}

#[test]
fn waiting_inside_of_a_section_is_told() {
    let machine = Machine::pc(4 << 20, 1);
    let grace = MachineGrace::new(&machine);
    let section = grace.read();
    let panic =
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| grace.synchronize())).unwrap_err();
    assert!(
        panic
            .downcast_ref::<String>()
            .unwrap()
            .contains("inside of a read section")
    );
    drop(section);
}
