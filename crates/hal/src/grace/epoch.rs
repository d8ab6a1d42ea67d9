//! Grace periods on several CPUs, by epochs.
//!
//! There is one global epoch, and a word per CPU that says whether a reader is active there and in which epoch it began.
//! The epoch may advance from `e` to `e + 1` when every active reader began in `e`. A call deferred in epoch `e` is
//! made once the epoch is `e + 2`.
//!
//! ```text
//!   global            e               e+1              e+2
//!   reader A   ────[ e ]──────┐        │                │
//!   reader B          │  [ e ]└──┐  [e+1]───┐           │
//!   writer     unlink X, defer (tag e)      │           run(X)
//!                     └── A, B gone ──┘└─ nobody from e ┘
//! ```
//!
//! Why two steps: a reader that can still see X announced an epoch of at most `e`, because its fence came before the
//! writer's, and the writer read `e` after its own. The step from `e + 1` to `e + 2` scans every word after a fence of its
//! own and finds each such reader gone.
//!
//! Invariants
//! - `I1`: while a CPU's `depth` is not 0 and `fenced` is set, or `read_with` runs, its word says "active", and a full fence lies between the
//!   store of the word and every load of the reader (or what a `Barrier` puts in its place).
//! - `I2`: `depth` is the number of guards alive on the CPU; a nested context leaves all three words as it found them, so it may
//!   interrupt a reader between any two instructions. It announces itself only where nobody is announced: otherwise what it interrupted
//!   speaks for it, and goes on to do so until it is done.
//! - `I3`: tags in a queue ascend, so the front is the oldest.
//! - `I4`: a call is made outside every lock, once, by whoever took it out of its queue.
//! - `I5`: a CPU that has no area yet counts its readers in `strays`, and the epoch stands still while there are any.
//! - `I6`: an area is that of one value: `init` takes only areas that none has taken before.
//!
//! # What a reader pays
//!
//! The outermost `read` of a CPU is a load of the global epoch, one store to its own word, **one full fence** (an `MFENCE`
//! or a locked instruction on x86, 6 to 18 ns), and two plain stores; dropping it is three stores and no fence. A nested
//! one is a load, a test and a store; `read_with` is two stores, two loads and the fence. The fence cannot be left out where nothing stands in for it: the processor may hold the store in its store buffer while
//! it already executes the reader's loads (x86 reorders exactly this pair, Intel SDM volume 3A 9.2.3.4), and then a writer's
//! scan finds the CPU idle while it reads. Readers of different CPUs write to no common line.
//!
//! A kernel that can interrupt its CPUs moves the fence to the writers, and a reader then pays 1 to 2 ns: a [`CallBarrier`](super::CallBarrier)
//! in place of the [`FullBarrier`].
//!
//! A scan costs one load per CPU, and every CPU's word is a line that its owner writes: `poll` and `synchronize` are for
//! slow paths. Memory: one [`EpochArea`] per CPU, about 1.2 KiB with the default queue of 32 calls.
//!
//! # Context
//!
//! `read` anywhere, NMIs included. `defer` and `poll` where the lock `L` may be taken: with [`IrqSafe`] also in interrupts, not
//! in NMIs. `synchronize` waits for readers: not in interrupts and not under a guard.
//!
//! Source: Fraser, "Practical lock-freedom", 2004, 5.2.3; for the fence, McKenney, "Is Parallel Programming Hard", 9.5.

use core::fmt;
use core::marker::PhantomData;
use core::ptr;

use super::announcement::Announcement;
use super::barrier::{Barrier, FullBarrier};
use super::queue::Queue;
use super::{Deferred, Grace};
use crate::cpu::{Cpu, Pinned};
use crate::lock::{IrqSafe, Lock, RawLock};
use crate::sync::{
    AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, CachePadded, Ordering, compiler_fence, fence,
    spin_loop,
};

/// What [`EpochGrace`] keeps for one CPU: its announcement and up to `Q` deferred calls.
#[derive(Debug)]
pub struct EpochArea<L = IrqSafe, const Q: usize = 32> {
    announcement: CachePadded<Announcement>,
    queue: Lock<Queue<Q>, L>,
    /// Calls queued, as a hint that needs no lock.
    queued: AtomicUsize,
    /// Whether a value has the area (`I6`).
    taken: AtomicBool,
}

impl<L: RawLock, const Q: usize> EpochArea<L, Q> {
    crate::const_new! {
        /// The area of a CPU on which nobody reads.
        pub fn new() -> Self {
            Self {
                announcement: CachePadded::new(Announcement::new()),
                queue: Lock::new(Queue::new()),
                queued: AtomicUsize::new(0),
                taken: AtomicBool::new(false),
            }
        }
    }
}

impl<L: RawLock, const Q: usize> Default for EpochArea<L, Q> {
    fn default() -> Self {
        Self::new()
    }
}

/// [`Grace`] for several CPUs, by per-CPU epochs.
///
/// Const-constructible. Works before [`init`](Self::init), with a counter that all CPUs share; `init` gives each CPU an area of
/// its own. `'m` is how long the areas live: `'static` in a kernel.
///
/// # Examples
///
/// ```
/// use kmem_hal::{CachePadded, EpochArea, EpochGrace, Grace, SingleCpu, lock::Spin};
///
/// static AREAS: [CachePadded<EpochArea<Spin>>; 1] = [CachePadded::new(EpochArea::new())];
/// // SAFETY: one thread runs this example.
/// static GRACE: EpochGrace<'static, SingleCpu, Spin> = EpochGrace::new(unsafe { SingleCpu::new() });
///
/// GRACE.init(&AREAS);
/// {
///     let _reading = GRACE.read();
///     // Lock-free readers look at shared structures here.
/// }
/// GRACE.synchronize(); // whoever read before is done
/// assert_eq!(GRACE.pending(), 0);
/// ```
#[doc(alias = "rcu")]
#[doc(alias = "ebr")]
pub struct EpochGrace<'m, C, L = IrqSafe, const Q: usize = 32, B = FullBarrier> {
    cpu: C,
    barrier: B,
    epoch: CachePadded<AtomicU64>,
    /// Readers on CPUs that have no area (`I5`).
    strays: AtomicUsize,
    /// Calls taken out of a queue and not finished yet.
    running: AtomicUsize,
    areas: AtomicPtr<CachePadded<EpochArea<L, Q>>>,
    count: AtomicUsize,
    /// The queue of CPUs that have no area.
    shared: EpochArea<L, Q>,
    #[cfg(loom)]
    plant: Plant,
    /// Invariant in 'm: a value for long-lived areas must not take short-lived ones through a shorter reference.
    _areas: PhantomData<fn(&'m ()) -> &'m ()>,
}

/// A bug to plant, so that the models can show that they would find it. Other builds have none.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plant {
    /// No bug.
    Nothing,
    /// A reader announces itself without a fence.
    NoReaderFence,
    /// The epoch moves on without a fence before the scan.
    NoScannerFence,
    /// One step of the epoch is taken for a grace period.
    OneStep,
}

impl<C: Cpu, L: RawLock, const Q: usize> EpochGrace<'_, C, L, Q> {
    crate::const_new! {
        /// Grace periods for the CPUs of `cpu`, none of which has an area yet.
        pub fn new(cpu: C) -> Self {
            Self::with_barrier(cpu, FullBarrier)
        }
    }

    /// The same with a bug.
    #[cfg(loom)]
    #[doc(hidden)]
    pub fn with_bug(cpu: C, plant: Plant) -> Self {
        Self {
            plant,
            ..Self::new(cpu)
        }
    }
}

impl<'m, C: Cpu, L: RawLock, const Q: usize, B: Barrier> EpochGrace<'m, C, L, Q, B> {
    const NOT_EMPTY: () = assert!(Q > 0, "a queue of deferred calls holds at least one");

    crate::const_new! {
        /// The same, with another barrier between readers and writers than two full fences.
        pub fn with_barrier(cpu: C, barrier: B) -> Self {
            #[allow(clippy::let_unit_value)]
            let () = Self::NOT_EMPTY;
            Self {
                cpu,
                barrier,
                epoch: CachePadded::new(AtomicU64::new(2)),
                strays: AtomicUsize::new(0),
                running: AtomicUsize::new(0),
                areas: AtomicPtr::new(ptr::null_mut()),
                count: AtomicUsize::new(0),
                shared: EpochArea::new(),
                #[cfg(loom)]
                plant: Plant::Nothing,
                _areas: PhantomData,
            }
        }
    }

    #[cfg(loom)]
    fn plant(&self) -> Plant {
        self.plant
    }

    #[cfg(not(loom))]
    #[inline(always)]
    fn plant(&self) -> Plant {
        Plant::Nothing
    }

    /// Gives the CPUs `0..areas.len()` an area each; gives how many got one. Only the first call has an effect.
    ///
    /// An area serves one value for ever: one that another has been given is not taken, nor are those behind it. CPUs without one go
    /// on all the same: correct, slower, and they delay each other.
    pub fn init(&self, areas: &'m [CachePadded<EpochArea<L, Q>>]) -> usize {
        let first = areas.as_ptr().cast_mut();
        let given = self.areas.compare_exchange(
            ptr::null_mut(),
            first,
            Ordering::Relaxed,
            Ordering::Relaxed,
        );
        if given.is_err() {
            return 0;
        }
        let untaken =
            |area: &&CachePadded<EpochArea<L, Q>>| !area.taken.swap(true, Ordering::AcqRel);
        let count = areas.iter().take_while(untaken).count();
        self.count.store(count, Ordering::Release);
        count
    }

    /// The CPUs that the value serves.
    pub const fn cpu(&self) -> &C {
        &self.cpu
    }

    fn areas(&self) -> &[CachePadded<EpochArea<L, Q>>] {
        let count = self.count.load(Ordering::Acquire);
        if count == 0 {
            return &[];
        }
        let first = self.areas.load(Ordering::Relaxed);
        // SAFETY: both words come from one slice of lifetime 'm in `init`; the acquire load orders them.
        unsafe { core::slice::from_raw_parts(first, count) }
    }

    /// A CPU's area.
    #[inline(always)]
    fn area(&self, index: usize) -> Option<&EpochArea<L, Q>> {
        if index >= self.count.load(Ordering::Acquire) {
            return None;
        }
        let first = self.areas.load(Ordering::Relaxed);
        // SAFETY: as in `areas`; the index is below the count.
        Some(unsafe { &*first.add(index) })
    }

    /// A section on a CPU without an area.
    #[cold]
    fn stray(&self) -> Section<'_> {
        self.strays.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        Section::Stray(&self.strays)
    }

    /// [`read_with`](Grace::read_with) on a CPU without an area. The caller is pinned.
    #[cold]
    #[inline(never)]
    fn read_as_stray<R>(&self, f: impl FnOnce() -> R) -> R {
        let _ = self.stray();
        let answer = f();
        self.strays.fetch_sub(1, Ordering::Release);
        answer
    }

    /// [`read_with`](Grace::read_with) where a reader is announced already, which speaks for this one. The caller is pinned.
    #[cold]
    #[inline(never)]
    fn read_announced<R>(&self, announcement: &Announcement, f: impl FnOnce() -> R) -> R {
        // A guard's fence lies behind every load here; an announcement that this context interrupted may have none yet.
        if !announcement.fenced.get() && self.plant() != Plant::NoReaderFence {
            self.barrier.reader();
        }
        compiler_fence(Ordering::SeqCst);
        f()
    }

    /// Moves the epoch on if nobody prevents it; gives the epoch seen last.
    fn try_advance(&self) -> u64 {
        let epoch = self.epoch.load(Ordering::Acquire);
        // Every reader that began before the writer's fence is visible to the loads below.
        if self.plant() != Plant::NoScannerFence {
            self.barrier.writer();
        }
        let blocked = self.strays.load(Ordering::Acquire) != 0
            || self
                .areas()
                .iter()
                .any(|area| area.announcement.blocks(epoch));
        if blocked {
            return epoch;
        }
        match self
            .epoch
            .compare_exchange(epoch, epoch + 1, Ordering::AcqRel, Ordering::Acquire)
        {
            Ok(_) => epoch + 1,
            Err(found) => found,
        }
    }

    /// Makes the calls of one queue whose tag is at most `tag`.
    fn drain(&self, area: &EpochArea<L, Q>, tag: u64) -> usize {
        let mut made = 0;
        while area.queued.load(Ordering::Acquire) != 0 {
            let call = {
                let mut queue = area.queue.lock();
                let call = queue.pop(tag);
                if call.is_some() {
                    // Seen by whoever sees the queue without the call: `synchronize` waits for it.
                    self.running.fetch_add(1, Ordering::Relaxed);
                    area.queued.store(queue.len, Ordering::Release);
                }
                call
            };
            let Some(call) = call else { break };
            // SAFETY: the tag says that the epoch moved twice since the call was deferred: a grace period. It was taken
            // out of the queue under the lock, so nobody else makes it (`I4`).
            unsafe { call.run() };
            self.running.fetch_sub(1, Ordering::Release);
            made += 1;
        }
        made
    }

    fn drain_all(&self, epoch: u64) -> usize {
        let steps = if self.plant() == Plant::OneStep { 1 } else { 2 };
        let Some(tag) = epoch.checked_sub(steps) else {
            return 0;
        };
        self.areas()
            .iter()
            .map(|area| self.drain(area, tag))
            .sum::<usize>()
            + self.drain(&self.shared, tag)
    }
}

impl<C: fmt::Debug, L, const Q: usize, B> fmt::Debug for EpochGrace<'_, C, L, Q, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "EpochGrace(epoch {}, {} areas)",
            self.epoch.load(Ordering::Relaxed),
            self.count.load(Ordering::Relaxed)
        )
    }
}

// SAFETY: G1, G2: a call is made, and `synchronize` returns, after two steps of the epoch, and the module's comment
// says why no guard survives both; G3: a guard's release store is acquired by the scan that passes it, and the
// exchange of the epoch hands that on; G4: `read` writes the CPU's own area only (a shared counter where there is none).
unsafe impl<'m, C: Cpu, L: RawLock, const Q: usize, B: Barrier> Grace
    for EpochGrace<'m, C, L, Q, B>
{
    type Guard<'a>
        = EpochGuard<'a, C>
    where
        Self: 'a;

    #[inline]
    fn read(&self) -> EpochGuard<'_, C> {
        let pin = self.cpu.pin();
        let section = match self.area(pin.id().index()) {
            Some(area) => {
                area.announcement
                    .enter(&self.epoch, &self.barrier, self.plant());
                Section::Own(&area.announcement)
            }
            None => self.stray(),
        };
        EpochGuard { section, _pin: pin }
    }

    #[inline(always)]
    unsafe fn read_with<R>(&self, f: impl FnOnce() -> R) -> R {
        let pin = self.cpu.pin();
        let index = pin.id().index();
        if index >= self.count.load(Ordering::Acquire) {
            return self.read_as_stray(f);
        }
        let first = self.areas.load(Ordering::Relaxed);
        // SAFETY: as in `areas`; the index is below the count.
        let area = unsafe { &*first.add(index) };
        let announcement = &area.announcement;
        if !announcement.announce(&self.epoch) {
            return self.read_announced(announcement, f);
        }
        if self.plant() != Plant::NoReaderFence {
            self.barrier.reader();
        }
        compiler_fence(Ordering::SeqCst);
        let answer = f();
        // What `f` began it ended, and it ended nothing else (the caller's promise): the word is this section's.
        announcement.silence();
        drop(pin);
        answer
    }

    fn defer(&self, call: Deferred) -> Result<(), Deferred> {
        let pin = self.cpu.pin();
        let areas = self.areas();
        let area = areas
            .get(pin.id().index())
            .map_or(&self.shared, |area| &**area);
        let mut queue = area.queue.lock();
        // The unlinking comes before the epoch is read.
        fence(Ordering::SeqCst);
        let tag = self.epoch.load(Ordering::Relaxed);
        queue.push(tag, call)?;
        area.queued.store(queue.len, Ordering::Release);
        Ok(())
    }

    fn poll(&self) -> usize {
        if self.pending() == 0 {
            return 0;
        }
        self.try_advance();
        let epoch = self.try_advance();
        self.drain_all(epoch)
    }

    fn synchronize(&self) {
        fence(Ordering::SeqCst);
        let steps = if self.plant() == Plant::OneStep { 1 } else { 2 };
        let target = self.epoch.load(Ordering::Relaxed) + steps;
        let mut epoch = self.try_advance();
        while epoch < target {
            let next = self.try_advance();
            if next == epoch {
                spin_loop();
            }
            epoch = next;
        }
        self.drain_all(epoch);
        // Calls that another CPU took out of a queue may still run.
        while self.running.load(Ordering::Acquire) != 0 {
            spin_loop();
        }
    }

    fn pending(&self) -> usize {
        self.areas()
            .iter()
            .map(|area| area.queued.load(Ordering::Acquire))
            .sum::<usize>()
            + self.shared.queued.load(Ordering::Acquire)
    }
}

#[derive(Debug)]
enum Section<'a> {
    Own(&'a Announcement),
    Stray(&'a AtomicUsize),
}

/// A read section of an [`EpochGrace`]; keeps its reader on the CPU.
#[must_use = "the section ends when the guard is dropped"]
pub struct EpochGuard<'a, C: Cpu + 'a> {
    section: Section<'a>,
    // Dropped after the section has ended.
    _pin: Pinned<'a, C>,
}

impl<'a, C: Cpu + 'a> fmt::Debug for EpochGuard<'a, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EpochGuard")
    }
}

impl<'a, C: Cpu + 'a> Drop for EpochGuard<'a, C> {
    #[inline]
    fn drop(&mut self) {
        match self.section {
            Section::Own(announcement) => announcement.leave(),
            Section::Stray(strays) => {
                strays.fetch_sub(1, Ordering::Release);
            }
        }
    }
}
