//! Checks of [`Cpu`], clauses `C1` to `C5`.

use kmem_hal::sync::{AtomicU32, LocalU64, Ordering};
use kmem_hal::{Cpu, CpuId, CpuSet};

use super::{Contexts, Report};

const NAME: &str = "Cpu";

/// What the contexts share about one id.
struct Area {
    /// 0: nobody is pinned here. Otherwise the context's number + 1.
    holder: AtomicU32,
    /// Changed with plain moves under a pin; the count of visits.
    visits: LocalU64,
}

struct World<'a, C> {
    report: &'a Report,
    contexts: &'a dyn Contexts,
    cpu: &'a C,
    areas: Vec<Area>,
    /// Contexts that have asked for a pin, over all rounds.
    attempts: AtomicU32,
    overlaps: AtomicU32,
}

/// Checks `cpu` in as many contexts as there are: each pins, looks, and lets go, again and again.
pub fn check<C: Cpu + Sync>(report: &Report, contexts: &dyn Contexts, cpu: &C) {
    let count = cpu.count();
    if !report.check(NAME, "C3", count > 0, || "count() is 0".into()) {
        return;
    }
    if !report.check(NAME, "C3", count <= CpuSet::CAPACITY, || {
        format!(
            "count() is {count}, more than the {} of a CpuSet",
            CpuSet::CAPACITY
        )
    }) {
        return;
    }
    let world = World::new(report, contexts, cpu);
    world.run(false);
    if world.overlaps.load(Ordering::SeqCst) != 0 {
        return;
    }
    world.run(true);
    world.sum(2);
}

/// The part of the check without nested pins, small enough for loom.
pub fn check_flat<C: Cpu + Sync>(report: &Report, contexts: &dyn Contexts, cpu: &C) {
    let world = World::new(report, contexts, cpu);
    world.run(false);
    world.sum(1);
}

impl<'a, C: Cpu + Sync> World<'a, C> {
    fn new(report: &'a Report, contexts: &'a dyn Contexts, cpu: &'a C) -> Self {
        let area = || Area {
            holder: AtomicU32::new(0),
            visits: LocalU64::new(0),
        };
        Self {
            report,
            contexts,
            cpu,
            areas: (0..cpu.count()).map(|_| area()).collect(),
            attempts: AtomicU32::new(0),
            overlaps: AtomicU32::new(0),
        }
    }

    fn run(&self, nested: bool) {
        self.attempts.store(0, Ordering::SeqCst);
        self.contexts.run(&|context| {
            for round in 0..self.contexts.rounds() {
                self.visit(context, round, nested);
            }
        });
    }

    /// After `runs` runs: where nobody shared an id, plain moves lose nothing, if each holder sees what the one before wrote.
    fn sum(&self, runs: u64) {
        if self.overlaps.load(Ordering::SeqCst) != 0 {
            return;
        }
        let visits: u64 = self.areas.iter().map(|area| area.visits.get()).sum();
        let expected = runs * u64::from(self.contexts.count()) * u64::from(self.contexts.rounds());
        self.report.check(NAME, "C5", visits == expected, || {
            format!("{expected} plain increments under pins gave {visits}: a holder did not see what the one before wrote")
        });
    }
}

impl<C: Cpu> World<'_, C> {
    fn visit(&self, context: u32, round: u32, nested: bool) {
        let report = self.report;
        self.attempts.fetch_add(1, Ordering::Relaxed);
        let outer = self.cpu.raw_pin();
        let id = self.cpu.id(&outer);
        let count = self.areas.len();
        let in_range = report.check(NAME, "C3", id.index() < count, || {
            format!("id {id} is not below count() = {count}")
        });
        if !in_range {
            self.overlaps.fetch_add(1, Ordering::SeqCst);
            return;
        }
        let area = &self.areas[id.index()];
        let clause = if nested { "C4" } else { "C2" };
        // Relaxed: the check must not do for the pin what C5 asks of the pin.
        let other = area.holder.swap(context + 1, Ordering::Relaxed);
        self.alone(clause, id, other == 0);
        area.visits.set(area.visits.get() + 1);
        if nested {
            let inner = self.cpu.raw_pin();
            let again = self.cpu.id(&inner);
            report.check(NAME, "C4", again == id, || {
                format!("an inner pin says CPU {again}, the outer one {id}")
            });
            drop(inner);
        }
        // Until every other context has asked for a pin in this round; whoever may come in comes now.
        let all = (round + 1) * self.contexts.count();
        self.contexts.wait_for(&|| {
            let again = self.cpu.id(&outer);
            report.check(NAME, "C1", again == id, || {
                format!("the id changed from {id} to {again} under one guard")
            });
            self.attempts.load(Ordering::Relaxed) >= all
        });
        for _ in 0..4 {
            if self.contexts.patience() > 0 {
                self.contexts.relax();
            }
        }
        let now = area.holder.swap(0, Ordering::Relaxed);
        self.alone(clause, id, now == context + 1);
        drop(outer);
        let after = self.cpu.count() as usize;
        report.check(NAME, "C3", after == count, || {
            format!("count() changed from {count} to {after}")
        });
    }

    fn alone(&self, clause: &'static str, id: CpuId, alone: bool) {
        if !alone {
            self.overlaps.fetch_add(1, Ordering::SeqCst);
        }
        self.report.check(NAME, clause, alone, || {
            let when = if clause == "C4" {
                ", after one of them had ended an inner pin"
            } else {
                ""
            };
            format!("two contexts were pinned to CPU {id} at the same time{when}")
        });
    }
}
