//! Interrupts between CPUs: shootdowns and calls, and waiting for them.
//!
//! ```text
//!  CPU 0: send ----> queue of CPU 1 --(CPU 1's next yield point with IF = 1, or later by seed)--> flush, answer
//!         wait_for <--------------------------------- all answered ---------------------------------------'
//! ```
//!
//! A CPU that runs no task is idle: it takes its interrupts while somebody waits for them. Without a scheduler every CPU but
//! the caller's is idle, so delivery happens as late as it possibly can: inside of `wait_for`.
//!
//! Invariants
//! - `I1` an interrupt is taken only with IF = 1, and runs with IF = 0.
//! - `I2` a ticket is open while one of its interrupts has not finished; a call's closure outlives its ticket, because the caller waits.

use std::collections::{BTreeMap, VecDeque};

use crate::cpu::Invpcid;
use crate::machine::{Inner, Machine};
use crate::manual::{cr3, cr4, rflags};
use crate::sched;
use crate::violation::{Violation, ViolationKind};

/// What a CPU must drop, in plain numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlushWork {
    /// Physical address of the root table of the space.
    pub root: u64,
    /// The space's PCID (ignored while CR4.PCIDE = 0).
    pub pcid: u16,
    /// Which translations.
    pub what: FlushWhat,
    /// Whether global entries may be among them.
    pub global: bool,
    /// Whether page tables were freed, so that walk caches must forget every table of the space.
    pub tables_freed: bool,
}

/// Which translations a [`FlushWork`] names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlushWhat {
    /// One `INVLPG` per `stride` bytes from the first to the last address.
    Range {
        /// Linear address of the first page.
        first: u64,
        /// Linear address of the last page (included).
        last: u64,
        /// Bytes per leaf.
        stride: u64,
    },
    /// Everything of the space.
    Space,
    /// Everything.
    Everything,
}

/// Above this many pages a whole space is dropped instead (Linux's `tlb_single_page_flush_ceiling` is 33).
const MOST_PAGES: u64 = 33;

/// A closure that another CPU runs, with the caller's lifetime taken off.
#[derive(Clone, Copy)]
struct RawCall(*const (dyn Fn(usize) + Sync));

impl std::fmt::Debug for RawCall {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RawCall")
    }
}

// SAFETY: the closure is Sync, so any thread may call it; I2 keeps it alive.
unsafe impl Send for RawCall {}

#[derive(Debug, Clone, Copy)]
enum Work {
    Flush(FlushWork),
    Call(RawCall),
}

#[derive(Debug)]
struct Pending {
    ticket: u64,
    work: Work,
    /// Yield points that it still lets pass.
    delay: u64,
}

/// The interrupts on their way.
#[derive(Debug)]
pub(crate) struct Interrupts {
    queues: Vec<VecDeque<Pending>>,
    /// Unanswered CPUs of each open ticket.
    open: BTreeMap<u64, Vec<usize>>,
    next: u64,
    /// A sender has unwound while a CPU was inside of its call: nobody may go on (`I2`).
    pub(crate) orphaned: bool,
}

impl Interrupts {
    pub(crate) fn new(cpus: usize) -> Self {
        Self {
            queues: (0..cpus).map(|_| VecDeque::new()).collect(),
            open: BTreeMap::new(),
            next: 1,
            orphaned: false,
        }
    }

    /// The CPUs that have not answered a ticket.
    pub(crate) fn unanswered(&self, ticket: u64) -> &[usize] {
        self.open.get(&ticket).map_or(&[], Vec::as_slice)
    }
}

impl Inner {
    fn send(&mut self, cpus: &[usize], work: Work) -> u64 {
        let ticket = self.interrupts.next;
        self.interrupts.next += 1;
        let longest = u64::from(self.core.adversary.delay_interrupts);
        for &cpu in cpus {
            let delay = if longest == 0 {
                0
            } else {
                self.core.rng.below(longest + 1)
            };
            self.core.stats.interrupts += 1;
            self.core.stats.delayed_interrupts += u64::from(delay > 0);
            self.interrupts.queues[cpu].push_back(Pending {
                ticket,
                work,
                delay,
            });
        }
        if !cpus.is_empty() {
            self.interrupts.open.insert(ticket, cpus.to_vec());
        }
        ticket
    }

    fn answer(&mut self, ticket: u64, cpu: usize) {
        if let Some(waiting) = self.interrupts.open.get_mut(&ticket) {
            waiting.retain(|&other| other != cpu);
            if waiting.is_empty() {
                self.interrupts.open.remove(&ticket);
            }
        }
    }

    /// Does a flush on a CPU, with the instructions that a kernel would use.
    pub(crate) fn flush(&mut self, cpu: usize, work: &FlushWork) {
        let core = &mut self.core;
        core.step += 1;
        let step = core.step;
        let state = &mut core.cpus[cpu];
        let pcide = state.regs.cr4 & cr4::PCIDE != 0;
        let pages = match work.what {
            FlushWhat::Range {
                first,
                last,
                stride,
            } => Some((first, last, stride.max(4096))),
            FlushWhat::Space | FlushWhat::Everything => None,
        };
        let few =
            pages.filter(|(first, last, stride)| last.saturating_sub(*first) / stride < MOST_PAGES);
        let current = !pcide || state.pcid() == work.pcid;
        let whole = few.is_none() || (work.tables_freed && !current);
        let everything = work.what == FlushWhat::Everything || (work.global && whole);
        // The operands are in range and the features present, so that none of these instructions can fault.
        if everything {
            core.stats.flushes += 1;
            if state.features.pcid {
                let done = state.invpcid(step, Invpcid::AllWithGlobal);
                debug_assert!(done.is_ok());
            } else {
                let value = state.regs.cr4;
                for value in [value ^ cr4::PGE, value] {
                    let done = state.write_cr4(&core.memory, step, value);
                    debug_assert!(done.is_ok());
                }
            }
            return;
        }
        if current && !work.global && state.regs.cr3 & !cr3::PCID_MASK != work.root && !pcide {
            // Without PCIDs leaving the space has dropped everything of it.
            return;
        }
        // INVPCID of an address leaves the other walk-cache entries of the PCID; INVLPG leaves none.
        match few.filter(|_| current || !work.tables_freed) {
            Some((first, last, stride)) => {
                let mut at = first;
                loop {
                    core.stats.flushes += 1;
                    if current || work.global {
                        state.invlpg(step, at);
                    }
                    if !current {
                        let done = state.invpcid(
                            step,
                            Invpcid::Address {
                                pcid: work.pcid,
                                linear: at,
                            },
                        );
                        debug_assert!(done.is_ok());
                    }
                    match at.checked_add(stride) {
                        Some(next) if next <= last => at = next,
                        _ => return,
                    }
                }
            }
            None => {
                core.stats.flushes += 1;
                if state.features.pcid {
                    let pcid = if pcide { work.pcid } else { 0 };
                    let done = state.invpcid(step, Invpcid::Context { pcid });
                    debug_assert!(done.is_ok());
                } else {
                    let value = state.regs.cr3;
                    let done = state.write_cr3(&core.memory, step, value);
                    debug_assert!(done.is_ok());
                }
            }
        }
    }
}

impl Machine {
    /// Drops translations on one CPU, at once.
    pub fn flush_cpu(&self, cpu: usize, work: &FlushWork) {
        sched::yield_point(self);
        self.with(|inner| inner.flush(cpu, work));
    }

    /// Sends a flush to other CPUs and returns a ticket for [`wait_for`](Self::wait_for); 0 if `cpus` is empty.
    ///
    /// # Panics
    ///
    /// If a CPU does not exist.
    pub fn send_flush(&self, cpus: &[usize], work: FlushWork) -> u64 {
        sched::yield_point(self);
        if cpus.is_empty() {
            return 0;
        }
        self.with(|inner| inner.send(cpus, Work::Flush(work)))
    }

    /// Waits until every CPU of a ticket has answered. A finished ticket returns at once.
    ///
    /// # Panics
    ///
    /// With a story if it would wait for ever: a CPU of the ticket has interrupts off and cannot go on.
    pub fn wait_for(&self, ticket: u64) {
        loop {
            let waiting = self.with(|inner| inner.interrupts.unanswered(ticket).to_vec());
            if waiting.is_empty() {
                return;
            }
            for &cpu in &waiting {
                if sched::is_idle(self, cpu) {
                    self.take_interrupts(cpu, true);
                }
            }
            if self.with(|inner| inner.interrupts.unanswered(ticket).is_empty()) {
                return;
            }
            if !sched::wait_point(self, ticket) {
                panic!(
                    "{}",
                    self.deadlock(&[format!(
                        "CPU {} waits for interrupt {ticket}",
                        self.current_cpu()
                    )])
                );
            }
        }
    }

    /// Runs `call(cpu)` on each of `cpus` as an interrupt (on the calling CPU directly) and waits for all.
    ///
    /// # Panics
    ///
    /// As [`wait_for`](Self::wait_for).
    pub fn call_on(&self, cpus: &[usize], call: &(dyn Fn(usize) + Sync)) {
        sched::yield_point(self);
        let me = self.current_cpu();
        let others: Vec<usize> = cpus.iter().copied().filter(|&cpu| cpu != me).collect();
        let raw: *const (dyn Fn(usize) + Sync) = call;
        // SAFETY: only the lifetime changes; I2: the closure is called only while its ticket is open, and this function does
        // not return, nor unwind past `wait_for`, before the ticket is closed or withdrawn (the guard below); if a
        // CPU is inside of the call then, the scheduler ends at the next switch and resumes nobody.
        let raw: *const (dyn Fn(usize) + Sync + 'static) = unsafe { std::mem::transmute(raw) };
        let ticket = self.with(|inner| inner.send(&others, Work::Call(RawCall(raw))));
        let withdraw = Withdraw {
            machine: self,
            ticket,
        };
        if cpus.contains(&me) {
            call(me);
        }
        self.wait_for(ticket);
        drop(withdraw);
    }

    /// Takes the interrupts that a CPU has waiting and that are due; `late` takes those too that are not.
    pub(crate) fn take_interrupts(&self, cpu: usize, late: bool) {
        loop {
            let taken = self.with(|inner| {
                // I1
                if inner.core.cpus[cpu].regs.rflags & rflags::IF == 0 {
                    return None;
                }
                let queue = &mut inner.interrupts.queues[cpu];
                let front = queue.front_mut()?;
                if front.delay > 0 && !late {
                    front.delay -= 1;
                    return None;
                }
                let pending = queue.pop_front()?;
                inner.core.step += 1;
                match pending.work {
                    Work::Flush(work) => {
                        inner.flush(cpu, &work);
                        inner.answer(pending.ticket, cpu);
                        Some(None)
                    }
                    Work::Call(call) => {
                        inner.core.cpus[cpu].regs.rflags &= !rflags::IF;
                        Some(Some((pending.ticket, call)))
                    }
                }
            });
            match taken {
                None => return,
                Some(None) => {}
                Some(Some((ticket, call))) => {
                    // SAFETY: I2: the ticket is open, so the caller of `call_on` still waits and the closure lives; a
                    // schedule that ends in a panic resumes nobody in it (I4 of `sched`).
                    sched::call_on_cpu(self, cpu, || unsafe { (*call.0)(cpu) });
                    self.with(|inner| {
                        inner.core.cpus[cpu].regs.rflags |= rflags::IF;
                        inner.answer(ticket, cpu);
                    });
                }
            }
        }
    }

    /// Says who waits for what, for a state that nobody can leave.
    pub(crate) fn deadlock(&self, who: &[String]) -> Violation {
        self.with(|inner| {
            let mut lines = who.to_vec();
            for (ticket, cpus) in &inner.interrupts.open {
                for &cpu in cpus {
                    let on = inner.core.cpus[cpu].regs.rflags & rflags::IF != 0;
                    let state = if on { "on" } else { "off" };
                    lines.push(format!(
                        "interrupt {ticket} is not answered by CPU {cpu} (interrupts {state})"
                    ));
                }
            }
            let step = inner.core.step;
            let kind = ViolationKind::Deadlock;
            Violation {
                kind,
                step,
                cpu: 0,
                linear: None,
                frame: None,
                history: Vec::new(),
                lines,
            }
        })
    }
}

/// Takes a call's interrupts back if its sender unwinds (`I2`).
struct Withdraw<'m> {
    machine: &'m Machine,
    ticket: u64,
}

impl Drop for Withdraw<'_> {
    fn drop(&mut self) {
        self.machine.with(|inner| {
            let mut withdrawn = 0;
            for queue in &mut inner.interrupts.queues {
                let before = queue.len();
                queue.retain(|pending| pending.ticket != self.ticket);
                withdrawn += before - queue.len();
            }
            // Answers that were not withdrawn with the queues come from inside of the call.
            let inside = inner.interrupts.unanswered(self.ticket).len();
            inner.interrupts.orphaned |= inside > withdrawn;
            inner.interrupts.open.remove(&self.ticket);
        });
    }
}
