//! Checks of [`Mmu`], clauses `M1` to `M4`.
//!
//! A flush shows only in what programs read, so the check needs a [`Probe`]: somebody who stores entries and reads through them.
//! The page it works on holds one of two frames, whose first words tell them apart; a CPU that reads the wrong one used a
//! translation that it should have dropped.

use std::collections::BTreeSet;
use std::sync::Mutex;

use kmem_hal::sync::{AtomicU32, Ordering};
use kmem_hal::{Cpu, CpuId, CpuSet, FlushRequest, FlushScope, Mmu, Page, PageRange, Root};

use super::{Contexts, Report};

const NAME: &str = "Mmu";

/// How the check reaches tables and memory of the machine under test.
pub trait Probe {
    /// The space that the check may use. It is loaded nowhere yet; the kernel's own memory is mapped in it.
    fn root(&self) -> Root;

    /// A page of that space with a leaf entry of its own.
    fn page(&self) -> Page;

    /// Stores the page's entry so that it leads to frame 0 or 1 of the probe's. No flush.
    fn point_at(&self, frame: usize);

    /// Reads the first word of the page as a program on the calling CPU does; the answer is which frame it was.
    fn read(&self) -> Option<usize>;
}

/// Checks `mmu` with as many CPUs as there are contexts: each context runs on a CPU of its own for the whole check.
///
/// # Safety
///
/// The tables of the probe's space map what [`Mmu::load_root`] demands, on every CPU.
pub unsafe fn check<M: Mmu + Sync, C: Cpu + Sync>(
    report: &Report,
    contexts: &dyn Contexts,
    mmu: &M,
    cpu: &C,
    probe: &(dyn Probe + Sync),
) {
    let root = probe.root();
    let page = FlushScope::Pages {
        range: PageRange::single(probe.page()),
        stride: 1,
    };
    let request = |scope| FlushRequest {
        root,
        scope,
        global: false,
        tables_freed: false,
    };
    let steps = Steps::new(contexts);
    contexts.run(&|context| {
        // SAFETY: the caller's promise is passed on.
        unsafe { mmu.load_root(root, false) };
        let me = cpu.pin().id();
        steps.cpus.lock().unwrap().insert(me.get());
        steps.meet();

        // Nothing is cached yet: what a walk reads is what was stored before the flush.
        if context == 0 {
            probe.point_at(1);
            probe.point_at(0);
            flush_everywhere(mmu, &request(FlushScope::Everything), me, &steps.others(me));
        }
        steps.meet();
        let read = probe.read();
        report.check(NAME, "M4", read == Some(0), || {
            format!("the entry was stored before a flush of everything, and a walk of CPU {me} then read frame {read:?}, not 0")
        });

        for (round, scope) in [page, FlushScope::Space, FlushScope::Everything, page]
            .into_iter()
            .enumerate()
        {
            let new = 1 - round % 2;
            // Every CPU fills its TLB.
            let _ = (probe.read(), probe.read());
            steps.meet();
            if context == 0 {
                let active = mmu.active_cpus(root);
                for other in steps.all().iter() {
                    report.check(NAME, "M3", active.contains(other), || {
                        format!("CPU {other} has the root loaded and is not among active_cpus: {active:?}")
                    });
                }
                probe.point_at(new);
                mmu.flush_local(&request(scope));
                let read = probe.read();
                report.check(NAME, "M1", read == Some(new), || {
                    format!("flush_local({scope:?}) on CPU {me} returned, and it reads frame {read:?}, not {new}")
                });
                let completion = mmu.shootdown(&steps.others(me), &request(scope));
                mmu.complete(completion);
            }
            steps.meet();
            if context != 0 {
                let read = probe.read();
                report.check(NAME, "M2", read == Some(new), || {
                    format!("shootdown({scope:?}) is complete, and CPU {me} reads frame {read:?}, not {new}")
                });
            }
            steps.meet();
        }
    });
}

fn flush_everywhere<M: Mmu>(mmu: &M, request: &FlushRequest, me: CpuId, others: &CpuSet) {
    debug_assert!(!others.contains(me));
    mmu.flush_local(request);
    let completion = mmu.shootdown(others, request);
    mmu.complete(completion);
}

/// The contexts wait for each other, and know who they are.
struct Steps<'a> {
    contexts: &'a dyn Contexts,
    arrived: AtomicU32,
    cpus: Mutex<BTreeSet<u32>>,
}

impl<'a> Steps<'a> {
    fn new(contexts: &'a dyn Contexts) -> Self {
        Self {
            contexts,
            arrived: AtomicU32::new(0),
            cpus: Mutex::default(),
        }
    }

    fn meet(&self) {
        let count = self.contexts.count();
        let arrival = self.arrived.fetch_add(1, Ordering::AcqRel);
        let target = (arrival / count + 1) * count;
        while self.arrived.load(Ordering::Acquire) < target {
            self.contexts.relax();
        }
    }

    fn all(&self) -> CpuSet {
        let cpus = self.cpus.lock().unwrap();
        cpus.iter().map(|&cpu| CpuId::new(cpu)).collect()
    }

    fn others(&self, me: CpuId) -> CpuSet {
        let mut cpus = self.all();
        cpus.remove(me);
        cpus
    }
}
