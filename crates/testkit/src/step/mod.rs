//! An interrupt before every machine instruction of an operation: a single-stepper over ptrace (Linux, x86-64).
//!
//! Fast paths of kmem run with interrupts on, and NMIs come even where interrupts are off. Whatever enters the same code on
//! the same CPU must find a way around what it interrupted (`C2` of [`kmem_hal::Cpu`]). [`Stepper`] puts that to the test at
//! the grain at which it happens: a child process runs the operation under ptrace with the trap flag set, and before
//! each of its instructions it enters the interrupt, which runs to its end before the next instruction does.
//!
//! ```text
//!   parent (tracer)                    child (traced)
//!     continue with SIGUSR1 ──────────▶  signal frame; the interrupt runs to its end on the same stack
//!                                        sigreturn, trap flag set: one instruction of the operation
//!     SIGTRAP           ◀──────────────  trap
//!     .. until the child says that the operation is over; then it checks and exits
//! ```
//!
//! Two ways to spend an instruction:
//! - [`together`](Stepper::together): one run of the operation with an interrupt before each instruction. Finds what goes
//!   wrong when interrupts pile up; every address of the path is entered.
//! - [`alone`](Stepper::alone): at each instruction the child forks; the copy takes one interrupt there, ends the operation at
//!   full speed and checks. So each run has exactly one interrupt, as real ones mostly have, and a path that starts again after
//!   an interrupt (a restartable sequence) ends.
//!
//! The interrupt comes at any instruction, inside of locks too, since the host cannot mask it: it is an **NMI**, and may do what
//! the contract of the tested call lets NMIs do. It must not call the host's `malloc`, which the operation may be inside of.
//!
//! Invariants
//! - `S1`: nothing of the operation runs while the interrupt does (one thread, one signal frame above the operation's).
//! - `S2`: whatever spins or sleeps is found: timers of the child's user time and of real time, looked at by the tracer.
//! - `S3`: a failure names the instruction, as an offset into the test's executable.
//!
//! Costs: some 10 µs an instruction together and some 500 µs alone, with what the interrupt and the check cost. Does not handle operations that start threads.
//!
//! Source: ptrace(2), sigreturn(2); Intel SDM volume 3B, 19.3.1.4 (single-step exception).

mod board;
mod child;
mod tracer;

use std::fmt;
use std::sync::atomic::Ordering::Relaxed;

use board::Shared;

/// What was stepped through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Steps {
    /// Instructions of the operation that were stepped.
    pub instructions: u64,
    /// How many of them were preceded by an interrupt: all of them, with a stride of 1.
    pub interrupts: u64,
}

/// How a run went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StepError {
    /// Nothing went on for two seconds of user time or forty of real time: something waits for what it interrupted.
    Spun,
    /// The check, the interrupt or the operation panicked.
    Panicked(String),
    /// A signal, such as the 11 of a wrong access.
    Signal(i32),
    /// More instructions than the stepper's limit.
    TooLong,
}

impl fmt::Display for StepError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Spun => f.write_str("something spins on what it interrupted"),
            Self::Panicked(what) => f.write_str(what),
            Self::Signal(number) => write!(f, "signal {number}"),
            Self::TooLong => f.write_str("the operation does not end"),
        }
    }
}

/// Where and how a run went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepFailure {
    /// The number of the instruction, from 1; 0 outside the operation.
    pub step: u64,
    /// The last instruction that was interrupted, as an offset into the executable.
    pub offset: u64,
    /// What happened.
    pub error: StepError,
}

impl fmt::Display for StepFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "interrupted before instruction {} (addr2line -f -i -e {} {:#x}): {}",
            self.step,
            std::env::current_exe().unwrap_or_default().display(),
            self.offset,
            self.error
        )
    }
}

impl std::error::Error for StepFailure {}

/// Runs operations an instruction at a time.
///
/// # Examples
///
/// A counter that is read and written in two instructions loses what an interrupt adds between them:
///
/// ```
/// use std::cell::Cell;
/// use kmem_testkit::step::Stepper;
///
/// let result = Stepper::alone().run(
///     || Cell::new(0u64),
///     |count| {
///         let old = core::hint::black_box(count.get());
///         count.set(old + 1);
///     },
///     |count| count.set(count.get() + 1),
///     |count| assert_eq!(count.get(), 2, "an interrupt was lost"),
/// );
/// // `Ok(None)` where ptrace is refused, which `run` says on the standard error.
/// assert!(matches!(result, Err(_) | Ok(None)));
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Stepper {
    alone: bool,
    stride: u64,
    limit: u64,
}

impl Stepper {
    /// One run, with an interrupt before each instruction.
    #[must_use]
    pub const fn together() -> Self {
        Self {
            alone: false,
            stride: 1,
            limit: 5_000_000,
        }
    }

    /// A run for each instruction, with one interrupt before it.
    #[must_use]
    pub const fn alone() -> Self {
        Self {
            alone: true,
            stride: 1,
            limit: 1_000_000,
        }
    }

    /// The most instructions that the operation may have.
    #[must_use]
    pub const fn limit(mut self, instructions: u64) -> Self {
        self.limit = instructions;
        self
    }

    /// Interrupts one instruction in `stride` only, the first of each so many: for long operations in quick tests.
    ///
    /// With `KMEM_STEP_ALL` in the environment every instruction is interrupted all the same, and under AddressSanitizer
    /// (`ASAN_OPTIONS`) fewer are where copies are made.
    #[must_use]
    pub const fn stride(mut self, stride: u64) -> Self {
        self.stride = if stride == 0 { 1 } else { stride };
        self
    }

    /// Steps through `operation(world)` in a world of `setup`, with `interrupt(world)` before its instructions, and `check(world)`
    /// afterwards. All of it runs in child processes: what they change is not seen here.
    ///
    /// `Ok(None)` where the host refuses ptrace, which is said on the standard error.
    ///
    /// # Errors
    ///
    /// [`StepFailure`]: the first instruction at which something went wrong.
    ///
    /// # Panics
    ///
    /// Where the host has no memory or process to spare.
    pub fn run<W>(
        &self,
        setup: impl FnOnce() -> W,
        operation: impl FnOnce(&W),
        interrupt: impl Fn(&W),
        check: impl FnOnce(&W),
    ) -> Result<Option<Steps>, StepFailure> {
        let shared = Shared::new();
        let set = |name| std::env::var_os(name).is_some();
        let stride = match (set("KMEM_STEP_ALL"), set("ASAN_OPTIONS") && self.alone) {
            (true, _) => 1,
            (false, false) => self.stride,
            // A process under AddressSanitizer has terabytes of shadow to copy.
            (false, true) => self.stride * 128 + 1,
        };
        shared.stride.store(stride, Relaxed);
        child::hook_panics();
        // SAFETY: the child runs `child::run`, which never returns, in a copy of this process with this one thread.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0, "no process to step in");
        if pid == 0 {
            child::run(&shared, self.alone, setup, operation, interrupt, check);
        }
        let ended = tracer::run(pid, &shared, self.limit);
        let steps = shared.steps.load(Relaxed);
        let failed = |error| {
            Err(StepFailure {
                step: shared.failed_at.load(Relaxed).max(steps),
                offset: tracer::offset(shared.address.load(Relaxed)),
                error,
            })
        };
        match ended {
            tracer::Ended::Exit(0) if steps < 2 => {
                board::say("SKIPPED: this host single-steps nothing\n");
                Ok(None)
            }
            tracer::Ended::Exit(0) => Ok(Some(Steps {
                instructions: steps,
                interrupts: shared.interrupts.load(Relaxed),
            })),
            tracer::Ended::Exit(child::REFUSED) => {
                board::say("SKIPPED: this host refuses ptrace (PTRACE_TRACEME)\n");
                Ok(None)
            }
            tracer::Ended::Exit(child::SPUN) | tracer::Ended::Spun => failed(StepError::Spun),
            tracer::Ended::Exit(_) => failed(StepError::Panicked(shared.message())),
            tracer::Ended::Signal(number) => failed(StepError::Signal(number)),
            tracer::Ended::TooLong => failed(StepError::TooLong),
        }
    }
}
