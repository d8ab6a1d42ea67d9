//! The machine: memory, CPUs, and the face that programs and tests use.
//!
//! ```text
//!   Machine --+-- PhysMemory          bytes, reached directly (PhysMap) or through a CPU
//!             +-- VirtualCpu 0..n     registers, TLBs, walk caches
//!             +-- frames              owners and histories
//!             `-- interrupts          shootdowns and calls on their way
//! ```
//!
//! Everything goes through `&Machine`, which is `Sync`. State lives behind one lock that is never held while user code runs or a
//! coroutine is switched. Without a [`Scheduler`](crate::Scheduler) the machine is an ordinary, deterministic object:
//! `machine.cpu(1).read_u64(address)` is one access of CPU 1.
//!
//! Invariants
//! - `I1` the lock is released before a violation panics, so that the machine can still be asked about it.

use std::io;
use std::panic::Location;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::adversary::{Adversary, Stats};
use crate::cpu::{CpuState, Features, Registers};
use crate::engine::{Core, STORY_EVENTS};
use crate::frames::{FrameEvent, FrameEventKind, FrameState, Frames};
use crate::hal_trace::Changes;
use crate::interrupt::Interrupts;
use crate::memory::PhysMemory;
use crate::memory_map::MemoryMap;
use crate::mode::Mode;
use crate::sched;
use crate::vcpu::VirtualCpu;
use crate::violation::{OnViolation, Violation};

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// How a machine is put together.
///
/// # Examples
///
/// ```
/// use kmem_mock_x86::{Adversary, Machine, MemoryMap};
///
/// let machine = Machine::builder().memory(MemoryMap::pc(64 << 20)).cpus(2).seed(7).adversary(Adversary::FULL).build()?;
/// assert_eq!(machine.cpu_count(), 2);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct MachineBuilder {
    map: MemoryMap,
    cpus: usize,
    features: Features,
    registers: Registers,
    seed: u64,
    adversary: Adversary,
    on_violation: OnViolation,
    history: usize,
    verify: bool,
    caching: bool,
    caches_absent: bool,
    watch_kernel: bool,
    mode: Option<&'static Mode>,
}

impl MachineBuilder {
    /// The memory (default: a PC with 64 MiB).
    pub fn memory(mut self, map: MemoryMap) -> Self {
        self.map = map;
        self
    }

    /// How many CPUs, at least 1 (default 1).
    pub fn cpus(mut self, count: usize) -> Self {
        self.cpus = count.max(1);
        self
    }

    /// What the processors can do.
    pub fn features(mut self, features: Features) -> Self {
        self.features = features;
        self
    }

    /// The registers that every CPU starts with (default: [`Registers::LONG`]).
    pub fn registers(mut self, registers: Registers) -> Self {
        self.registers = registers;
        self
    }

    /// The seed of everything that hardware decides (default 0).
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Which liberties the hardware takes (default: none).
    pub fn adversary(mut self, adversary: Adversary) -> Self {
        self.adversary = adversary;
        self
    }

    /// What becomes of a violation (default: panic).
    pub fn on_violation(mut self, action: OnViolation) -> Self {
        self.on_violation = action;
        self
    }

    /// How many frame events are remembered, machine-wide (default 2^18, 0 for none).
    pub fn history(mut self, events: usize) -> Self {
        self.history = events;
        self
    }

    /// Whether TLB hits are compared with the tables (default: yes). Without it only freed frames are noticed.
    pub fn verify(mut self, verify: bool) -> Self {
        self.verify = verify;
        self
    }

    /// Whether translations are cached at all (default: yes). Without it every access walks the tables: a machine on which no flush is
    /// ever missing, for showing what a test without stale TLBs would not have found.
    pub fn caching(mut self, caching: bool) -> Self {
        self.caching = caching;
        self
    }

    /// Whether entries that were not present are cached too, until they are flushed: x86 never does, RISC-V may (default: no).
    pub fn caches_absent(mut self, caches: bool) -> Self {
        self.caches_absent = caches;
        self
    }

    /// Whether the kernel's own accesses through hal's `PhysMap` are checked: asking for the address of a free frame is a
    /// violation (default: no, since an allocator may keep its lists in free frames).
    pub fn watch_kernel(mut self, watch: bool) -> Self {
        self.watch_kernel = watch;
        self
    }

    /// A paging mode of the tester's own, in place of the one that the registers select while CR0.PG = 1: no processor has it, and the
    /// walker does not care.
    pub fn mode(mut self, mode: &'static Mode) -> Self {
        self.mode = Some(mode);
        self
    }

    /// Builds the machine.
    ///
    /// # Errors
    ///
    /// The host's, if it cannot reserve address space for the memory.
    pub fn build(self) -> io::Result<Machine> {
        let memory = Arc::new(PhysMemory::new(self.map)?);
        let frames = Frames::new(memory.frame_limit(), self.history)?;
        let cpus = (0..self.cpus)
            .map(|_| {
                let mut cpu = CpuState::new(self.registers, self.features);
                cpu.own_mode = self.mode;
                cpu
            })
            .collect();
        let mut core = Core::new(Arc::clone(&memory), cpus, frames, self.seed);
        core.adversary = self.adversary;
        core.verify = self.verify;
        core.caching = self.caching;
        core.caches_absent = self.caches_absent;
        let inner = Inner {
            core,
            interrupts: Interrupts::new(self.cpus),
            changes: Changes::new(self.cpus),
            recorded: Vec::new(),
        };
        Ok(Machine {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            memory,
            cpus: self.cpus,
            seed: self.seed,
            on_violation: self.on_violation,
            watch_kernel: self.watch_kernel,
            inner: Mutex::new(inner),
        })
    }
}

/// What is behind the machine's lock.
#[derive(Debug)]
pub(crate) struct Inner {
    pub core: Core,
    pub interrupts: Interrupts,
    pub changes: Changes,
    pub recorded: Vec<Violation>,
}

/// A mock x86 machine.
#[derive(Debug)]
pub struct Machine {
    pub(crate) id: u64,
    memory: Arc<PhysMemory>,
    cpus: usize,
    seed: u64,
    on_violation: OnViolation,
    watch_kernel: bool,
    inner: Mutex<Inner>,
}

/// Host threads may share a machine.
const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<Machine>();
};

impl Machine {
    /// Starts to put a machine together.
    pub fn builder() -> MachineBuilder {
        MachineBuilder {
            map: MemoryMap::pc(64 << 20),
            cpus: 1,
            features: Features::default(),
            registers: Registers::LONG,
            seed: 0,
            adversary: Adversary::OFF,
            on_violation: OnViolation::Panic,
            history: 1 << 18,
            verify: true,
            caching: true,
            caches_absent: false,
            watch_kernel: false,
            mode: None,
        }
    }

    /// A plain PC with this many bytes of memory and this many CPUs.
    ///
    /// # Panics
    ///
    /// If the host cannot reserve the address space.
    pub fn pc(bytes: u64, cpus: usize) -> Self {
        Self::builder()
            .memory(MemoryMap::pc(bytes))
            .cpus(cpus)
            .build()
            .expect("the host refuses address space")
    }

    /// Runs `f` on the state, then files or raises the violations it left.
    pub(crate) fn with<R>(&self, f: impl FnOnce(&mut Inner) -> R) -> R {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let result = f(&mut inner);
        if inner.core.raised.is_empty() {
            return result;
        }
        let raised = std::mem::take(&mut inner.core.raised);
        if self.on_violation == OnViolation::Record || std::thread::panicking() {
            inner.recorded.extend(raised);
            return result;
        }
        // I1
        drop(inner);
        let stories: Vec<String> = raised.iter().map(ToString::to_string).collect();
        panic!("{}(machine seed {})", stories.join(""), self.seed);
    }

    /// Its memory.
    pub fn memory(&self) -> &PhysMemory {
        &self.memory
    }

    /// How many CPUs it has.
    pub fn cpu_count(&self) -> usize {
        self.cpus
    }

    /// One of its CPUs, for kernel accesses.
    ///
    /// # Panics
    ///
    /// If there is no such CPU.
    pub fn cpu(&self, number: usize) -> VirtualCpu<'_> {
        assert!(number < self.cpus, "CPU {number} of {}", self.cpus);
        VirtualCpu::new(self, number)
    }

    /// The CPU that runs the calling code: 0 unless inside of [`on_cpu`](Self::on_cpu) or a scheduler's task.
    pub fn current_cpu(&self) -> usize {
        sched::current_cpu(self)
    }

    /// Runs `f` as CPU `number`.
    ///
    /// # Panics
    ///
    /// If there is no such CPU.
    pub fn on_cpu<R>(&self, number: usize, f: impl FnOnce() -> R) -> R {
        assert!(number < self.cpus, "CPU {number} of {}", self.cpus);
        sched::on_cpu(self, number, f)
    }

    /// The seed of the hardware's choices.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The number of the last step: accesses and notes are steps.
    pub fn step(&self) -> u64 {
        self.with(|inner| inner.core.step)
    }

    /// What the hardware has done so far.
    pub fn stats(&self) -> Stats {
        self.with(|inner| inner.core.stats)
    }

    /// A hash of every access and its outcome so far: equal digests mean equal runs.
    pub fn digest(&self) -> u64 {
        self.with(|inner| inner.core.digest)
    }

    /// Changes which liberties the hardware takes from here on.
    pub fn set_adversary(&self, adversary: Adversary) {
        self.with(|inner| inner.core.adversary = adversary);
    }

    /// Says that `count` frames from `first` on got an owner. Giving out a frame that has one is a violation.
    #[track_caller]
    pub fn note_allocated(&self, first: u64, count: u64) {
        self.note_owner(first, count, FrameEventKind::Allocated);
    }

    /// Says that `count` frames from `first` on are free: from here on every use of them through an older translation, and every
    /// translation to them, is a violation.
    #[track_caller]
    pub fn note_freed(&self, first: u64, count: u64) {
        self.note_owner(first, count, FrameEventKind::Freed);
    }

    #[track_caller]
    fn note_owner(&self, first: u64, count: u64, kind: FrameEventKind) {
        let by = Location::caller();
        let cpu = self.current_cpu();
        self.with(|inner| inner.core.note_owner(first, count, kind, cpu, by));
    }

    /// Says that a frame was mapped at a linear address, or unmapped from it: for stories only.
    #[track_caller]
    pub fn note_mapping(&self, frame: u64, linear: u64, mapped: bool) {
        let by = Location::caller();
        let cpu = self.current_cpu();
        let kind = if mapped {
            FrameEventKind::Mapped(linear)
        } else {
            FrameEventKind::Unmapped(linear)
        };
        self.with(|inner| {
            inner.core.step += 1;
            let step = inner.core.step;
            inner.core.frames.note(frame, kind, step, cpu, Some(by));
        });
    }

    /// What the machine knows about a frame's owner.
    pub fn frame_state(&self, frame: u64) -> FrameState {
        self.with(|inner| inner.core.frames.state(frame))
    }

    /// The remembered events of a frame, oldest first.
    pub fn frame_history(&self, frame: u64) -> Vec<FrameEvent> {
        self.with(|inner| inner.core.frames.history(frame, STORY_EVENTS))
    }

    /// Says that linear addresses `first..=last` may map free frames: a kernel's map of all memory.
    pub fn exempt(&self, first: u64, last: u64) {
        self.with(|inner| inner.core.exempt.push((first, last)));
    }

    /// Declares that every change of the tables for `first..=last` made up to step `as_of`, in the space whose root table
    /// is at physical address `root` (`None`: in all), has been flushed everywhere it had to be.
    ///
    /// From here on, an access through an entry that is older than `as_of` and that the tables do not back is a violation.
    pub fn declare_flushed(&self, root: Option<u64>, first: u64, last: u64, as_of: u64) {
        self.with(|inner| inner.core.settle(root, first, last, as_of));
    }

    /// Looks through the caches of all CPUs for entries that they could use at once (current PCID or global) for addresses
    /// `first..=last` and that the tables no longer back: frame freed, page gone or moved, rights or D taken away.
    ///
    /// Empty if every change of that range has been flushed. Reports are returned, not raised.
    pub fn audit(&self, first: u64, last: u64) -> Vec<Violation> {
        self.with(|inner| inner.core.audit(first, last))
    }

    /// The violations recorded so far ([`OnViolation::Record`]); they are forgotten here.
    pub fn take_violations(&self) -> Vec<Violation> {
        self.with(|inner| std::mem::take(&mut inner.recorded))
    }

    /// Checks an access of the kernel's own, through its map of physical memory.
    #[inline]
    pub(crate) fn kernel_reaches(&self, address: u64) {
        if self.watch_kernel {
            let cpu = self.current_cpu();
            self.with(|inner| inner.core.kernel_reaches(cpu, address));
        }
    }

    /// What the tables of a CPU say about an address, entry by entry.
    pub fn explain(&self, cpu: usize, linear: u64) -> String {
        self.with(|inner| inner.core.tables_text(cpu, linear))
    }
}
