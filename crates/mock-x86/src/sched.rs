//! Virtual CPUs as coroutines: one runs at a time, a seed decides which, and the same seed decides the same again.
//!
//! ```text
//!   run ----resume----> CPU 1's task .. instruction .. yield point --+
//!    ^                                                               |
//!    +--- pick by seed among the tasks that are not done <-----------+
//!                  (on its return a task first takes its interrupts)
//! ```
//!
//! Everything happens on the calling thread. Yield points are: every memory access and register or flush instruction of a
//! [`VirtualCpu`](crate::VirtualCpu), every call of the machine's hal traits, every turn of a [`MachineLock`](crate::MachineLock) that
//! waits, and [`Machine::yield_now`]. Between two of them a task runs undisturbed, so code that shares plain
//! memory between CPUs is interleaved at its yield points only (models of lock-free code belong under loom or shuttle).
//!
//! Invariants
//! - `I1` `CURRENT` names the task that runs; its pointers are valid while it is set, since it is set only inside of the calls that
//!   borrow what they point to.
//! - `I2` a coroutine is never suspended while it unwinds.
//! - `I3` a coroutine does not run after `run`, so what its closure borrows outlives it.
//! - `I4` when a schedule ends in a panic, a coroutine that is inside of another's call is never unwound, since the sender's stack may be gone
//!   before: its own stack is leaked.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};

use crate::machine::Machine;
use crate::manual::rflags;
use crate::rng::SeededRng;

/// What a task waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waiting {
    /// For nothing: it works.
    No,
    /// For the answers to an interrupt.
    Ticket(u64),
    /// For a lock or another condition.
    Spin,
}

/// A handler of a device's interrupts on one CPU.
struct Device<'env> {
    handler: RefCell<Handler<'env>>,
    per_1024: u32,
    active: Cell<bool>,
}

/// What a task shares with the scheduler.
struct Task<'env> {
    cpu: usize,
    waiting: Cell<Waiting>,
    yielder: Cell<*const Yielder<(), ()>>,
    device: Option<Device<'env>>,
    rng: RefCell<SeededRng>,
    /// Calls of interrupts that its stack is inside of (`I4`).
    calls: Cell<usize>,
}

/// The context that runs on this thread.
#[derive(Clone, Copy)]
struct Current {
    machine: *const Machine,
    id: u64,
    cpu: usize,
    /// The running task, erased; null outside of a scheduler.
    task: *const Task<'static>,
    /// Which CPUs run a task that is not done.
    busy: *const RefCell<Vec<bool>>,
}

const NOBODY: Current = Current {
    machine: ptr::null(),
    id: 0,
    cpu: 0,
    task: ptr::null(),
    busy: ptr::null(),
};

thread_local! {
    static CURRENT: Cell<Current> = const { Cell::new(NOBODY) };
}

/// Puts the former context back when dropped.
struct Restore(Current);

impl Drop for Restore {
    fn drop(&mut self) {
        CURRENT.set(self.0);
    }
}

fn enter(current: Current) -> Restore {
    Restore(CURRENT.replace(current))
}

pub(crate) fn current_cpu(machine: &Machine) -> usize {
    let current = CURRENT.get();
    if current.id == machine.id {
        current.cpu
    } else {
        0
    }
}

pub(crate) fn on_cpu<R>(machine: &Machine, cpu: usize, run: impl FnOnce() -> R) -> R {
    let before = CURRENT.get();
    let now = if before.id == machine.id {
        Current { cpu, ..before }
    } else {
        Current {
            machine,
            id: machine.id,
            cpu,
            ..NOBODY
        }
    };
    let _restore = enter(now);
    run()
}

/// Runs a call of an interrupt on a CPU, on whatever stack this is (`I4`).
pub(crate) fn call_on_cpu(machine: &Machine, cpu: usize, call: impl FnOnce()) {
    let task = running(machine).map(|(_, task)| task);
    if let Some(task) = task {
        task.calls.set(task.calls.get() + 1);
    }
    // A call that panics itself ends its coroutine, which then has nothing to unwind.
    on_cpu(machine, cpu, call);
    if let Some(task) = task {
        task.calls.set(task.calls.get() - 1);
    }
}

/// Leaks the stacks that are inside of others' calls (`I4`).
fn leak_callees(live: &mut Vec<Live>, states: &[Task<'_>]) {
    let inside = live.extract_if(.., |(index, _)| states[*index].calls.get() > 0);
    inside.for_each(std::mem::forget);
}

/// The task that runs now on this machine, if a scheduler does and it may be suspended.
fn running(machine: &Machine) -> Option<(Current, &Task<'static>)> {
    let current = CURRENT.get();
    if current.id != machine.id || current.task.is_null() || std::thread::panicking() {
        return None;
    }
    // SAFETY: I1.
    Some((current, unsafe { &*current.task }))
}

/// Lets other CPUs run, then takes this CPU's interrupts. Does nothing without a scheduler.
#[inline]
pub(crate) fn yield_point(machine: &Machine) {
    if let Some((current, task)) = running(machine) {
        suspend(machine, current, task, Waiting::No);
    }
}

/// As a yield point, for a task that cannot go on before a ticket is answered. `false` without a scheduler: nobody else
/// will ever run.
pub(crate) fn wait_point(machine: &Machine, ticket: u64) -> bool {
    match running(machine) {
        Some((current, task)) => {
            suspend(machine, current, task, Waiting::Ticket(ticket));
            true
        }
        None => false,
    }
}

/// As a yield point of whatever machine runs here, for a task that waits for a lock. `false` without a scheduler.
pub(crate) fn spin_point() -> bool {
    let current = CURRENT.get();
    if current.machine.is_null() {
        return false;
    }
    // SAFETY: I1.
    let machine = unsafe { &*current.machine };
    match running(machine) {
        Some((current, task)) => {
            suspend(machine, current, task, Waiting::Spin);
            true
        }
        None => false,
    }
}

/// The machine and CPU that run here, for code that has no handle to them.
pub(crate) fn with_current<R>(run: impl FnOnce(&Machine, usize) -> R) -> Option<R> {
    let current = CURRENT.get();
    if current.machine.is_null() {
        return None;
    }
    // SAFETY: I1.
    Some(run(unsafe { &*current.machine }, current.cpu))
}

/// Whether a CPU runs no task of the scheduler that runs here, so that it takes interrupts whenever asked.
pub(crate) fn is_idle(machine: &Machine, cpu: usize) -> bool {
    let current = CURRENT.get();
    if current.id != machine.id || current.busy.is_null() {
        return true;
    }
    // SAFETY: I1.
    let busy = unsafe { &*current.busy };
    !busy.borrow()[cpu]
}

fn suspend(machine: &Machine, current: Current, task: &Task<'static>, waiting: Waiting) {
    task.waiting.set(waiting);
    // SAFETY: I1: the yielder belongs to the coroutine that runs this code; I2: `running` has looked.
    unsafe { (*task.yielder.get()).suspend(()) };
    // The scheduler set its own idea of the CPU; an interrupt handler may have been acting for another one.
    CURRENT.set(current);
    machine.take_interrupts(current.cpu, false);
    if let Some(device) = &task.device
        && current.cpu == task.cpu
        && !device.active.get()
        && task.rng.borrow_mut().chance(device.per_1024)
    {
        device_interrupt(machine, task.cpu, device);
    }
}

/// Runs a device's handler with IF = 0, unless interrupts are off.
fn device_interrupt(machine: &Machine, cpu: usize, device: &Device<'_>) {
    let was_on = machine.with(|inner| {
        let flags = &mut inner.core.cpus[cpu].regs.rflags;
        let was = *flags & rflags::IF != 0;
        *flags &= !rflags::IF;
        was
    });
    if !was_on {
        return;
    }
    device.active.set(true);
    (device.handler.borrow_mut())();
    device.active.set(false);
    machine.with(|inner| inner.core.cpus[cpu].regs.rflags |= rflags::IF);
}

impl Machine {
    /// Lets other CPUs run, if a scheduler runs this code: for loops that wait on plain memory.
    pub fn yield_now(&self) {
        yield_point(self);
    }
}

/// What a run did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// How often a task was resumed.
    pub switches: u64,
    /// A hash of the order in which CPUs ran and of all accesses: equal for equal runs.
    pub digest: u64,
}

/// A task's index and its coroutine.
type Live = (usize, Coroutine<(), (), (), DefaultStack>);
type Body<'env> = Box<dyn FnOnce() + 'env>;
type Handler<'env> = Box<dyn FnMut() + 'env>;

/// Runs one closure per CPU, interleaved by a seed.
///
/// # Examples
///
/// ```
/// use kmem_mock_x86::{Machine, Scheduler};
/// use std::cell::Cell;
///
/// let machine = Machine::pc(4 << 20, 2);
/// let turns = Cell::new(0);
/// let mut scheduler = Scheduler::new(&machine, 42);
/// for cpu in 0..2 {
///     let (machine, turns) = (&machine, &turns);
///     scheduler.spawn(cpu, move || {
///         for _ in 0..10 {
///             assert_eq!(machine.current_cpu(), cpu);
///             turns.set(turns.get() + 1);
///             machine.yield_now();
///         }
///     });
/// }
/// scheduler.run();
/// assert_eq!(turns.get(), 20);
/// ```
pub struct Scheduler<'env> {
    machine: &'env Machine,
    seed: u64,
    tasks: Vec<(usize, Body<'env>)>,
    /// CPU, rate and handler.
    devices: Vec<(usize, u32, Handler<'env>)>,
}

impl fmt::Debug for Scheduler<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Scheduler(seed {}, {} tasks)",
            self.seed,
            self.tasks.len()
        )
    }
}

/// Resumptions in a row in which every task only waited, after which nobody ever goes on. Interrupts are late by
/// at most [`Adversary::delay_interrupts`](crate::Adversary), which is far less.
const MOST_IDLE: u64 = 100_000;
const STACK_BYTES: usize = 512 << 10;

impl<'env> Scheduler<'env> {
    /// A schedule of `machine` that `seed` decides.
    pub fn new(machine: &'env Machine, seed: u64) -> Self {
        Self {
            machine,
            seed,
            tasks: Vec::new(),
            devices: Vec::new(),
        }
    }

    /// Gives a CPU its task.
    ///
    /// # Panics
    ///
    /// If there is no such CPU, or it has a task.
    pub fn spawn(&mut self, cpu: usize, body: impl FnOnce() + 'env) -> &mut Self {
        assert!(
            cpu < self.machine.cpu_count(),
            "CPU {cpu} of {}",
            self.machine.cpu_count()
        );
        assert!(
            self.tasks.iter().all(|task| task.0 != cpu),
            "CPU {cpu} has a task already"
        );
        self.tasks.push((cpu, Box::new(body)));
        self
    }

    /// Lets a device interrupt a CPU's task at `per_1024` of 1024 of its yield points, where its interrupts are on.
    pub fn interrupt(
        &mut self,
        cpu: usize,
        per_1024: u32,
        handler: impl FnMut() + 'env,
    ) -> &mut Self {
        self.devices.push((cpu, per_1024, Box::new(handler)));
        self
    }

    /// Runs every task to its end.
    ///
    /// # Panics
    ///
    /// With a task's panic, after naming the seed on standard error; with a story if nobody can go on.
    pub fn run(self) -> Run {
        let Self {
            machine,
            seed,
            tasks,
            mut devices,
        } = self;
        let mut rng = SeededRng::new(seed);
        let busy = RefCell::new(vec![false; machine.cpu_count()]);
        let states: Vec<Task<'env>> = tasks
            .iter()
            .map(|&(cpu, _)| {
                let device = devices
                    .iter()
                    .position(|device| device.0 == cpu)
                    .map(|at| devices.swap_remove(at));
                Task {
                    cpu,
                    waiting: Cell::new(Waiting::No),
                    yielder: Cell::new(ptr::null()),
                    device: device.map(|(_, per_1024, handler)| Device {
                        handler: RefCell::new(handler),
                        per_1024,
                        active: Cell::new(false),
                    }),
                    rng: RefCell::new(SeededRng::new(rng.next())),
                    calls: Cell::new(0),
                }
            })
            .collect();
        let mut live: Vec<Live> = Vec::new();
        for (index, (cpu, body)) in tasks.into_iter().enumerate() {
            busy.borrow_mut()[cpu] = true;
            let task: *const Task<'env> = &states[index];
            let stack = DefaultStack::new(STACK_BYTES).expect("the host has no memory for a stack");
            // SAFETY: I3: `live` is dropped (or leaked, and then never resumed: I4) before `states`, and both before `run` returns,
            // while 'env still holds.
            let coroutine = unsafe {
                Coroutine::with_stack_unchecked(stack, move |yielder: &Yielder<(), ()>, ()| {
                    (*task).yielder.set(yielder);
                    body();
                })
            };
            live.push((index, coroutine));
        }
        machine.with(|inner| inner.interrupts.orphaned = false);
        let mut digest = 0u64;
        let mut switches = 0u64;
        let mut idle = 0u64;
        while !live.is_empty() {
            let pick = rng.below(live.len() as u64) as usize;
            let (index, coroutine) = &mut live[pick];
            let task = &states[*index];
            switches += 1;
            digest = (digest ^ (task.cpu as u64 + 1))
                .wrapping_mul(0x100_0000_01b3)
                .rotate_left(13);
            let now = Current {
                machine,
                id: machine.id,
                cpu: task.cpu,
                task: ptr::from_ref(task).cast(),
                busy: &busy,
            };
            let unanswered = open_answers(machine, task);
            let outcome = {
                let _restore = enter(now);
                catch_unwind(AssertUnwindSafe(|| coroutine.resume(())))
            };
            if outcome.is_ok() && machine.with(|inner| inner.interrupts.orphaned) {
                leak_callees(&mut live, &states);
                panic!("a sender left while its call ran (schedule seed {seed})");
            }
            match outcome {
                Ok(CoroutineResult::Yield(())) => {
                    let progress = task.waiting.get() == Waiting::No
                        || open_answers(machine, task) < unanswered;
                    idle = if progress { 0 } else { idle + 1 };
                }
                Ok(CoroutineResult::Return(())) => {
                    busy.borrow_mut()[task.cpu] = false;
                    live.swap_remove(pick);
                    idle = 0;
                }
                Err(panic) => {
                    eprintln!(
                        "CPU {} panicked in a schedule of seed {seed} (machine seed {})",
                        task.cpu,
                        machine.seed()
                    );
                    leak_callees(&mut live, &states);
                    resume_unwind(panic);
                }
            }
            if idle > MOST_IDLE {
                let who: Vec<String> = live
                    .iter()
                    .map(|(index, _)| describe(&states[*index]))
                    .collect();
                leak_callees(&mut live, &states);
                panic!("{}(schedule seed {seed})", machine.deadlock(&who));
            }
        }
        machine.with(|inner| inner.core.stats.switches += switches);
        Run {
            switches,
            digest: digest ^ machine.digest(),
        }
    }
}

/// How many CPUs have still to answer what a task waits for.
fn open_answers(machine: &Machine, task: &Task<'_>) -> usize {
    match task.waiting.get() {
        Waiting::Ticket(ticket) => machine.with(|inner| inner.interrupts.unanswered(ticket).len()),
        Waiting::No | Waiting::Spin => 0,
    }
}

fn describe(task: &Task<'_>) -> String {
    match task.waiting.get() {
        Waiting::No => format!("CPU {} runs", task.cpu),
        Waiting::Ticket(ticket) => format!(
            "CPU {} waits for the answers to interrupt {ticket}",
            task.cpu
        ),
        Waiting::Spin => format!("CPU {} waits for a lock", task.cpu),
    }
}
