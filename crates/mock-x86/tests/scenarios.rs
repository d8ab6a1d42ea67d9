//! The flush protocol of a memory manager, played right and played wrong, on three CPUs under many schedules.
//!
//! Unmapping, taking write permission away, and write-protecting for fork, over hal's `Mmu` and `Trace` alone. A
//! wrapper around the MMU leaves out one duty at a time; each omission must be found, and the full protocol never accused.

mod common;

use std::cell::Cell;

use common::{P, RW, Tables, US, builder};
use kmem_hal::{
    Completion, CpuId, CpuSet, FlushRequest, FlushScope, Frame, Mmu, Order, Page, PageRange, Root,
    Trace, TraceEvent,
};
use kmem_mock_x86::{Adversary, Fault, Machine, Scheduler, Violation, ViolationKind};

const VA: u64 = 0x40_0000;

/// What a memory manager forgets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Forget {
    Nothing,
    LocalFlush,
    RemoteFlush,
    /// The interrupts are sent and not waited for.
    Wait,
}

/// The machine's MMU with a duty left out.
struct Careless<'m> {
    machine: &'m Machine,
    forget: Forget,
}

// SAFETY: it breaks M1 or M2 on purpose: that is what is tested.
unsafe impl Mmu for Careless<'_> {
    unsafe fn load_root(&self, root: Root, keep: bool) {
        // SAFETY: passed on.
        unsafe { self.machine.load_root(root, keep) }
    }
    fn flush_local(&self, request: &FlushRequest) {
        if self.forget != Forget::LocalFlush {
            self.machine.flush_local(request);
        }
    }
    fn active_cpus(&self, root: Root) -> CpuSet {
        self.machine.active_cpus(root)
    }
    fn this_cpu(&self) -> CpuId {
        self.machine.this_cpu()
    }
    fn shootdown(&self, cpus: &CpuSet, request: &FlushRequest) -> Completion {
        if self.forget == Forget::RemoteFlush {
            Completion::DONE
        } else {
            self.machine.shootdown(cpus, request)
        }
    }
    fn complete(&self, completion: Completion) {
        if self.forget != Forget::Wait {
            self.machine.complete(completion);
        }
    }
}

/// The commit of a gather: flush here and there, wait, say so.
fn commit(mmu: &impl Mmu, trace: &impl Trace, root: Root, range: PageRange) {
    let scope = FlushScope::Pages { range, stride: 1 };
    let request = FlushRequest {
        root,
        scope,
        global: false,
        tables_freed: false,
    };
    mmu.flush_local(&request);
    let mut cpus = mmu.active_cpus(root);
    cpus.remove(mmu.this_cpu());
    let completion = mmu.shootdown(&cpus, &request);
    mmu.complete(completion);
    trace.event(TraceEvent::Flushed(request));
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    Unmap,
    Protect,
    Fork,
}

/// CPU 0 changes the page again and again; CPUs 1 and 2 run the program. Returns the violations.
fn play(change: Change, forget: Forget, seed: u64, adversary: Adversary) -> Vec<Violation> {
    let machine = builder()
        .cpus(3)
        .adversary(adversary)
        .seed(seed)
        .build()
        .unwrap();
    let mut tables = Tables::new(&machine, 0x20_0000);
    let leaf = tables.map(VA, 0, 12, 0);
    let root = Root {
        frame: Frame::from_number(tables.root >> 12),
        ..machine.loaded_root(0)
    };
    for cpu in 0..3 {
        tables.load(cpu);
    }
    let range = PageRange::single(Page::from_number(VA >> 12));
    let done = &Cell::new(false);
    let m = &machine;
    let mut scheduler = Scheduler::new(m, seed);
    scheduler.spawn(0, move || {
        let mmu = Careless { machine: m, forget };
        let set = |value| assert!(m.memory().store(leaf, 8, value));
        for round in 0..24u64 {
            let frame = 0x800 + round % 3;
            m.event(TraceEvent::FrameAllocated(
                Frame::from_number(frame),
                Order::ZERO,
            ));
            set(frame << 12 | P | RW | US);
            m.event(TraceEvent::Mapped(range, Frame::from_number(frame)));
            // This CPU runs the program too.
            for _ in 0..4 {
                let _ = m.cpu(0).user().write_u64(VA, round);
            }
            if change == Change::Protect || change == Change::Fork {
                set(m.memory().load(leaf, 8).unwrap() & !RW);
                m.event(TraceEvent::Restricted(range));
                commit(&mmu, m, root, range);
                // After fork the page belongs to the child as it is now: nobody may change it.
                let before = m.memory().load(frame << 12, 8);
                for _ in 0..6 {
                    let _ = m.cpu(0).user().write_u64(VA, 1000 + round);
                }
                if change == Change::Fork && forget == Forget::Nothing {
                    assert_eq!(
                        m.memory().load(frame << 12, 8),
                        before,
                        "the child's page changed"
                    );
                }
            }
            set(0);
            m.event(TraceEvent::Unmapped(range));
            // Only the change under test is played carelessly.
            let careful = Careless {
                machine: m,
                forget: Forget::Nothing,
            };
            commit(
                if change == Change::Unmap {
                    &mmu
                } else {
                    &careful
                },
                m,
                root,
                range,
            );
            m.event(TraceEvent::FrameFreed(
                Frame::from_number(frame),
                Order::ZERO,
            ));
            for _ in 0..2 {
                let _ = m.cpu(0).user().read_u64(VA);
            }
        }
        done.set(true);
    });
    for cpu in 1..3 {
        scheduler.spawn(cpu, move || {
            while !done.get() {
                for outcome in [
                    m.cpu(cpu).user().write_u64(VA, 7),
                    m.cpu(cpu).user().read_u64(VA).map(drop),
                ] {
                    assert!(matches!(outcome, Ok(()) | Err(Fault::Page { .. })));
                }
            }
        });
    }
    scheduler.run();
    machine.take_violations()
}

#[test]
fn the_full_protocol_is_never_accused() {
    for change in [Change::Unmap, Change::Protect, Change::Fork] {
        for seed in 0..12 {
            for adversary in [Adversary::OFF, Adversary::FULL] {
                let violations = play(change, Forget::Nothing, seed, adversary);
                assert!(
                    violations.is_empty(),
                    "{change:?}, seed {seed}: {}",
                    violations[0]
                );
            }
        }
    }
}

#[test]
fn every_omission_is_found_whatever_the_seed() {
    for change in [Change::Unmap, Change::Protect, Change::Fork] {
        for forget in [Forget::LocalFlush, Forget::RemoteFlush, Forget::Wait] {
            for seed in 0..6 {
                let violations = play(
                    change,
                    forget,
                    seed,
                    Adversary {
                        delay_interrupts: 8,
                        ..Adversary::OFF
                    },
                );
                assert!(
                    !violations.is_empty(),
                    "{change:?} without {forget:?}, seed {seed}"
                );
                let expected = match change {
                    Change::Unmap => {
                        [ViolationKind::FreedFrame, ViolationKind::Unflushed].as_slice()
                    }
                    Change::Protect | Change::Fork => &[ViolationKind::Unflushed],
                };
                for violation in &violations {
                    assert!(expected.contains(&violation.kind), "{violation}");
                    let remote = forget != Forget::LocalFlush;
                    assert_eq!(
                        violation.cpu != 0,
                        remote,
                        "{forget:?} is blamed on the wrong CPU: {violation}"
                    );
                }
            }
        }
    }
}

#[test]
fn the_liberties_of_hardware_hide_no_omission_for_long() {
    for change in [Change::Unmap, Change::Protect, Change::Fork] {
        let found = (0..6)
            .filter(|&seed| !play(change, Forget::RemoteFlush, seed, Adversary::FULL).is_empty())
            .count();
        assert_eq!(found, 6, "{change:?}");
    }
}
