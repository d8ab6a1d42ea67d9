//! Checks of [`Cpu`], clauses `C1` to `C5`.

use kmem_hal::sync::{AtomicU32, LocalU64, Ordering};
use kmem_hal::{Cpu, CpuId};

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
    let world = World {
        report,
        contexts,
        cpu,
        areas: (0..count)
            .map(|_| Area {
                holder: AtomicU32::new(0),
                visits: LocalU64::new(0),
            })
            .collect(),
        attempts: AtomicU32::new(0),
        overlaps: AtomicU32::new(0),
    };
    let rounds = contexts.rounds();
    let run = |nested: bool| {
        world.attempts.store(0, Ordering::SeqCst);
        contexts.run(&|context| {
            for round in 0..rounds {
                world.visit(context, round, nested);
            }
        });
    };
    run(false);
    if world.overlaps.load(Ordering::SeqCst) != 0 {
        return;
    }
    run(true);
    if world.overlaps.load(Ordering::SeqCst) == 0 {
        // Nobody shared an id, so plain moves lose nothing, if each holder sees what the one before wrote.
        let visits: u64 = world.areas.iter().map(|area| area.visits.get()).sum();
        let expected = 2 * u64::from(contexts.count()) * u64::from(rounds);
        report.check(NAME, "C5", visits == expected, || {
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
