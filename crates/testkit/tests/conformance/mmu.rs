//! `Mmu`, on a toy: one page, one entry, a TLB entry per CPU, and a store buffer.

use std::sync::Mutex;

use kmem_hal::{Asid, Completion, Cpu, CpuId, CpuSet, FlushRequest, Frame, Mmu, Page, Root};
use kmem_testkit::conformance::mmu::{Probe, check};
use kmem_testkit::conformance::{HostThreads, Report};

use super::names;

#[derive(Default)]
struct State {
    /// What walks read.
    entry: Option<usize>,
    /// Stored and not visible to walks yet.
    buffered: Option<usize>,
    /// What each CPU has cached.
    tlb: [Option<usize>; 4],
    loaded: Vec<u32>,
}

struct Toy {
    state: Mutex<State>,
    clause: &'static str,
}

thread_local! {
    static ME: std::cell::Cell<Option<u32>> = const { std::cell::Cell::new(None) };
}

impl Toy {
    fn new(clause: &'static str) -> Self {
        Self {
            state: Mutex::default(),
            clause,
        }
    }

    /// The thread's CPU: the first free number, for good.
    fn me(&self) -> u32 {
        ME.get().unwrap_or_else(|| {
            let mut state = self.state.lock().unwrap();
            let id = state.loaded.len() as u32;
            state.loaded.push(id);
            ME.set(Some(id));
            id
        })
    }

    fn flush(&self, cpu: u32) {
        let mut state = self.state.lock().unwrap();
        if self.clause != "M4"
            && let Some(entry) = state.buffered.take()
        {
            state.entry = Some(entry);
        }
        state.tlb[cpu as usize] = None;
    }
}

// SAFETY: threads keep their numbers.
unsafe impl Cpu for Toy {
    type Guard<'a> = ();
    fn raw_pin(&self) {}
    fn id(&self, (): &()) -> CpuId {
        CpuId::new(self.me())
    }
    fn count(&self) -> u32 {
        4
    }
}

// SAFETY: M1 to M4 by the mutex, except for the clause that a value is made to break.
unsafe impl Mmu for Toy {
    unsafe fn load_root(&self, _root: Root, _keep: bool) {
        self.me();
    }
    fn flush_local(&self, _request: &FlushRequest) {
        if self.clause != "M1" {
            self.flush(self.me());
        } else {
            // The store drains, the TLB stays.
            let mut state = self.state.lock().unwrap();
            if let Some(entry) = state.buffered.take() {
                state.entry = Some(entry);
            }
        }
    }
    fn active_cpus(&self, _root: Root) -> CpuSet {
        if self.clause == "M3" {
            return CpuSet::single(CpuId::new(self.me()));
        }
        let state = self.state.lock().unwrap();
        state.loaded.iter().map(|&id| CpuId::new(id)).collect()
    }
    fn shootdown(&self, cpus: &CpuSet, _request: &FlushRequest) -> Completion {
        if self.clause != "M2" {
            for cpu in cpus.iter() {
                self.flush(cpu.get());
            }
        }
        Completion::DONE
    }
}

impl Probe for Toy {
    fn root(&self) -> Root {
        Root {
            frame: Frame::ZERO,
            asid: Asid::ZERO,
        }
    }
    fn page(&self) -> Page {
        Page::ZERO
    }
    fn point_at(&self, frame: usize) {
        let mut state = self.state.lock().unwrap();
        if let Some(older) = state.buffered.replace(frame) {
            state.entry = Some(older);
        }
    }
    fn read(&self) -> Option<usize> {
        let me = self.me() as usize;
        let mut state = self.state.lock().unwrap();
        if state.tlb[me].is_none() {
            state.tlb[me] = state.entry;
        }
        state.tlb[me]
    }
}

fn run(clause: &'static str, threads: u32) -> Report {
    let toy = Toy::new(clause);
    let report = Report::new();
    // Threads keep their number for good, and the caller's is reused: one thread a run.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // SAFETY: the toy maps nothing, and its threads need nothing mapped.
            unsafe { check(&report, &HostThreads::new(threads), &toy, &toy, &toy) };
        });
    });
    report
}

#[test]
fn mmus_pass_and_broken_ones_are_named() {
    run("", 1).assert_ok();
    run("", 3).assert_ok();
    for clause in ["M1", "M2", "M3", "M4"] {
        names(&run(clause, 2), "Mmu", clause);
    }
}
