//! hal's `Grace` on the machine: exact grace periods, as late as they may be and not later.
//!
//! ```text
//!   CPU 1   ..read [=========] end..
//!   CPU 0      defer(f)  ^ section 7 of CPU 1 is open: f waits for it, and for no later one
//!              poll: not yet ......... poll: f runs
//! ```
//!
//! Waiting lets the other virtual CPUs run, where hal's own implementation would spin and starve them.
//!
//! Invariants
//! - `I1` `sections[cpu]` is (depth, number of outermost sections that have ended); only that CPU's code changes it.
//! - `I2` a deferred call carries the sections that were open when it was deferred; it is made when each of them has ended.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use kmem_hal::{Deferred, Grace};

use crate::machine::Machine;
use crate::sched;
use crate::violation::{Violation, ViolationKind};

const MOST_DEFERRED: usize = 1024;

/// Sections that were open: CPU and number.
type Open = Vec<(usize, u64)>;

#[derive(Debug)]
struct State {
    sections: Vec<(u32, u64)>,
    queue: VecDeque<(Deferred, Open)>,
}

/// Read sections and grace periods of the virtual CPUs of one machine.
#[derive(Debug)]
pub struct MachineGrace<'m> {
    machine: &'m Machine,
    state: Mutex<State>,
}

/// A read section; ends when dropped.
#[derive(Debug)]
pub struct MachineGraceGuard<'a> {
    grace: &'a Mutex<State>,
    cpu: usize,
}

impl Drop for MachineGraceGuard<'_> {
    fn drop(&mut self) {
        let mut state = self.grace.lock().unwrap_or_else(PoisonError::into_inner);
        let (depth, ended) = &mut state.sections[self.cpu];
        *depth -= 1;
        *ended += u64::from(*depth == 0);
    }
}

impl State {
    fn open(&self) -> Open {
        let sections = self.sections.iter().enumerate();
        sections
            .filter(|(_, section)| section.0 > 0)
            .map(|(cpu, section)| (cpu, section.1))
            .collect()
    }

    fn over(&self, open: &Open) -> bool {
        open.iter()
            .all(|&(cpu, number)| self.sections[cpu].1 > number)
    }
}

impl<'m> MachineGrace<'m> {
    /// Grace periods of `machine`'s CPUs.
    pub fn new(machine: &'m Machine) -> Self {
        let sections = vec![(0, 0); machine.cpu_count()];
        Self {
            machine,
            state: Mutex::new(State {
                sections,
                queue: VecDeque::new(),
            }),
        }
    }

    fn state<R>(&self, run: impl FnOnce(&mut State) -> R) -> R {
        run(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

// SAFETY: G1: I2; G2: `synchronize` waits for every section that was open; G3: one lock orders sections and calls; G4: readers wait for
// nobody (the host's lock around the counters is never held across a switch).
unsafe impl Grace for MachineGrace<'_> {
    type Guard<'a>
        = MachineGraceGuard<'a>
    where
        Self: 'a;

    fn read(&self) -> MachineGraceGuard<'_> {
        sched::yield_point(self.machine);
        let cpu = self.machine.current_cpu();
        self.state(|state| state.sections[cpu].0 += 1);
        MachineGraceGuard {
            grace: &self.state,
            cpu,
        }
    }

    fn defer(&self, call: Deferred) -> Result<(), Deferred> {
        sched::yield_point(self.machine);
        self.state(|state| {
            if state.queue.len() == MOST_DEFERRED {
                return Err(call);
            }
            let open = state.open();
            state.queue.push_back((call, open));
            Ok(())
        })
    }

    fn poll(&self) -> usize {
        sched::yield_point(self.machine);
        let mut made = 0;
        // One at a time: a call may defer another.
        while let Some(call) = self.state(|state| {
            let due = state.queue.iter().position(|(_, open)| state.over(open))?;
            state.queue.remove(due).map(|(call, _)| call)
        }) {
            // SAFETY: I2: every section that was open at `defer` has ended, and the call has left the queue.
            unsafe { call.run() };
            made += 1;
        }
        made
    }

    fn synchronize(&self) {
        let me = self.machine.current_cpu();
        let open = self.state(|state| state.open());
        if open.iter().any(|&(cpu, _)| cpu == me) {
            panic!(
                "{}",
                stuck(
                    self.machine,
                    format!("CPU {me} waits for a grace period inside of a read section")
                )
            );
        }
        while !self.state(|state| state.over(&open)) {
            if !sched::spin_point() {
                let who =
                    format!("CPU {me} waits for read sections of {open:?}, and no other CPU runs");
                panic!("{}", stuck(self.machine, who));
            }
        }
        self.poll();
    }

    fn pending(&self) -> usize {
        self.state(|state| state.queue.len())
    }
}

fn stuck(machine: &Machine, line: String) -> Violation {
    Violation {
        kind: ViolationKind::Deadlock,
        step: machine.step(),
        cpu: machine.current_cpu(),
        linear: None,
        frame: None,
        history: Vec::new(),
        lines: vec![line],
    }
}
