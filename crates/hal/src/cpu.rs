//! CPUs, pins and per-CPU areas.
//!
//! Fast paths of kmem touch only what belongs to the CPU they run on, with plain moves. That is right as long as
//! the code stays on that CPU and nobody else thinks it is that CPU: a *pin*. A pin is cheap: preemption off, and
//! **interrupts stay on**. An interrupt or NMI may therefore enter the same code on the same CPU; it finds a busy
//! flag and takes another way. Nothing ever spins on what it may have interrupted.
//!
//! ```text
//!   pin ── id ── get_own ── plain moves ── drop        task
//!                    ▲ interrupt: same id, sees busy, finishes, returns
//! ```
//!
//! Decision record 003 tells why not `cli`, why not thread ids, and where per-CPU areas come from.

use core::fmt;
use core::marker::PhantomData;

use crate::sync::CachePadded;

/// The number of a CPU, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct CpuId(u32);

impl CpuId {
    /// CPU 0, which boots.
    pub const BOOT: Self = Self(0);

    /// The CPU with this number.
    #[must_use]
    pub const fn new(number: u32) -> Self {
        Self(number)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The number as an index.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for CpuId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Which CPU runs this code, and how to stay on it.
///
/// # Safety
///
/// The implementer promises:
/// - `C1`: while a guard lives, the code that made it runs on one CPU and [`id`](Self::id) gives that CPU's number.
/// - `C2`: while a guard lives, **no other context sees the same id, except interrupts and NMIs that finish before
///   the interrupted code resumes.** So preemption is off; interrupts may be on.
/// - `C3`: ids are below [`count`](Self::count), and `count` never changes and is at most [`CpuSet::CAPACITY`]: a CPU that no set can
///   name could not be called.
/// - `C4`: pins nest.
/// - `C5`: what a CPU wrote before it dropped its guard is visible to whoever pins the same id next.
pub unsafe trait Cpu {
    /// What undoes the pin when it is dropped.
    type Guard<'a>
    where
        Self: 'a;

    /// Keeps the caller on its CPU. Prefer [`pin`](Self::pin).
    fn raw_pin(&self) -> Self::Guard<'_>;

    /// As [`raw_pin`](Self::raw_pin), but `None` where that is more than a look: where a lock is taken, or the caller has no number yet.
    ///
    /// For fast paths, which have another way: a compiler sees that the guard has nothing to undo.
    #[inline(always)]
    fn raw_pin_at_once(&self) -> Option<Self::Guard<'_>> {
        Some(self.raw_pin())
    }

    /// The number of the pinned CPU.
    fn id<'a>(&'a self, guard: &Self::Guard<'a>) -> CpuId;

    /// How many CPUs there may ever be, at most [`CpuSet::CAPACITY`].
    #[doc(alias = "nr_cpu_ids")]
    fn count(&self) -> u32;

    /// Keeps the caller on its CPU until the guard is dropped.
    #[doc(alias = "get_cpu")]
    #[doc(alias = "preempt_disable")]
    #[inline]
    fn pin(&self) -> Pinned<'_, Self>
    where
        Self: Sized,
    {
        let raw = self.raw_pin();
        Pinned {
            id: self.id(&raw),
            _raw: raw,
            _thread: PhantomData,
        }
    }

    /// As [`pin`](Self::pin), but `None` where that is more than a look ([`raw_pin_at_once`](Self::raw_pin_at_once)).
    #[inline(always)]
    fn pin_at_once(&self) -> Option<Pinned<'_, Self>>
    where
        Self: Sized,
    {
        let raw = self.raw_pin_at_once()?;
        Some(Pinned {
            id: self.id(&raw),
            _raw: raw,
            _thread: PhantomData,
        })
    }
}

// SAFETY: a reference forwards to an implementation that keeps the contract.
unsafe impl<C: Cpu> Cpu for &C {
    type Guard<'a>
        = C::Guard<'a>
    where
        Self: 'a;

    #[inline]
    fn raw_pin(&self) -> Self::Guard<'_> {
        (**self).raw_pin()
    }
    #[inline(always)]
    fn raw_pin_at_once(&self) -> Option<Self::Guard<'_>> {
        (**self).raw_pin_at_once()
    }
    #[inline]
    fn id<'a>(&'a self, guard: &Self::Guard<'a>) -> CpuId {
        (**self).id(guard)
    }
    fn count(&self) -> u32 {
        (**self).count()
    }
}

/// Proof that the code stays on one CPU; never leaves the thread that made it.
///
/// # Examples
///
/// A pin cannot be sent to another thread:
///
/// ```compile_fail,E0277
/// use kmem_hal::{Cpu, SingleCpu};
///
/// // SAFETY: one thread runs this example.
/// let cpu = unsafe { SingleCpu::new() };
/// let pin = cpu.pin();
/// std::thread::scope(|s| { s.spawn(move || drop(pin)); });
/// ```
pub struct Pinned<'a, C: Cpu + 'a> {
    id: CpuId,
    _raw: C::Guard<'a>,
    _thread: PhantomData<*mut ()>,
}

impl<'a, C: Cpu + 'a> Pinned<'a, C> {
    /// The CPU that the code is pinned to.
    #[inline]
    #[must_use]
    pub fn id(&self) -> CpuId {
        self.id
    }
}

impl<'a, C: Cpu + 'a> fmt::Debug for Pinned<'a, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pinned(CPU {})", self.id)
    }
}

/// One CPU and no preemption: a pin costs nothing and the id is 0.
///
/// Honest under `C2` because whatever else runs on the only CPU is an interrupt or NMI that finishes first.
#[derive(Clone, Copy, Debug)]
pub struct SingleCpu(());

impl SingleCpu {
    /// The platform of one CPU.
    ///
    /// # Safety
    ///
    /// Only one CPU ever uses what this value is given to, and code that may use it is never preempted by other
    /// code that may use it, other than interrupts and NMIs that finish first.
    #[must_use]
    pub const unsafe fn new() -> Self {
        Self(())
    }
}

// SAFETY: C1 to C5 hold on one CPU without preemption, which `new` demands.
unsafe impl Cpu for SingleCpu {
    type Guard<'a> = ();

    #[inline(always)]
    fn raw_pin(&self) {}

    #[inline(always)]
    fn id(&self, _guard: &()) -> CpuId {
        CpuId::BOOT
    }

    #[inline(always)]
    fn count(&self) -> u32 {
        1
    }
}

/// Runs a function on other CPUs: what a remote drain needs.
///
/// Optional. Without it no allocator can empty another CPU's cache, and a refusal says so.
///
/// # Safety
///
/// - `R1`: `f` has run to its end once on every online CPU of `cpus` (the calling one included, if named) when the
///   call returns `Ok`, with each CPU pinned meanwhile.
/// - `R2`: on `Err` no CPU runs `f` any more.
/// - `R3`: what a CPU wrote before and in `f` is visible to the caller afterwards, and the other way round.
pub unsafe trait CpuCall {
    /// Calls `f(id)` on each CPU of `cpus` and waits.
    ///
    /// # Errors
    ///
    /// [`CpuCallError`] where CPUs cannot be interrupted from here.
    #[doc(alias = "on_each_cpu")]
    #[doc(alias = "smp_call_function_many")]
    fn run_on(&self, cpus: &CpuSet, f: &(dyn Fn(CpuId) + Sync)) -> Result<(), CpuCallError>;
}

// SAFETY: a reference forwards to an implementation that keeps the contract.
unsafe impl<C: CpuCall + ?Sized> CpuCall for &C {
    fn run_on(&self, cpus: &CpuSet, f: &(dyn Fn(CpuId) + Sync)) -> Result<(), CpuCallError> {
        (**self).run_on(cpus, f)
    }
}

/// Why other CPUs were not called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CpuCallError {
    /// The kernel has no way to do it.
    Unsupported,
    /// Interrupts are off here, so that two callers could wait for each other.
    WouldDeadlock,
}

impl fmt::Display for CpuCallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unsupported => "the kernel cannot call other CPUs",
            Self::WouldDeadlock => "other CPUs cannot be called with interrupts off",
        })
    }
}

impl core::error::Error for CpuCallError {}

// SAFETY: R1 to R3: no other CPU exists; the only one runs `f` here.
unsafe impl CpuCall for SingleCpu {
    fn run_on(&self, cpus: &CpuSet, f: &(dyn Fn(CpuId) + Sync)) -> Result<(), CpuCallError> {
        if cpus.contains(CpuId::BOOT) {
            f(CpuId::BOOT);
        }
        Ok(())
    }
}

/// The absence of a way to call other CPUs.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoCpuCall;

// SAFETY: R2: nothing ever runs.
unsafe impl CpuCall for NoCpuCall {
    fn run_on(&self, _cpus: &CpuSet, _f: &(dyn Fn(CpuId) + Sync)) -> Result<(), CpuCallError> {
        Err(CpuCallError::Unsupported)
    }
}

/// A set of CPUs; 512 bytes, so pass it by reference.
#[doc(alias = "cpumask")]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct CpuSet {
    words: [u64; Self::WORDS],
}

impl CpuSet {
    const WORDS: usize = (Self::CAPACITY / 64) as usize;
    /// How many CPUs a set can name.
    pub const CAPACITY: u32 = 4096;
    /// No CPU.
    pub const EMPTY: Self = Self {
        words: [0; Self::WORDS],
    };

    /// The CPUs `0..count`, at most [`CAPACITY`](Self::CAPACITY).
    #[must_use]
    pub fn first(count: u32) -> Self {
        let mut set = Self::EMPTY;
        for id in 0..count.min(Self::CAPACITY) {
            set.insert(CpuId::new(id));
        }
        set
    }

    /// The set of one CPU.
    #[must_use]
    pub fn single(cpu: CpuId) -> Self {
        let mut set = Self::EMPTY;
        set.insert(cpu);
        set
    }

    /// Adds a CPU; `false` where it was there already or its number is beyond the capacity.
    pub fn insert(&mut self, cpu: CpuId) -> bool {
        let Some(word) = self.words.get_mut(cpu.index() / 64) else {
            return false;
        };
        let bit = 1 << (cpu.get() % 64);
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    /// Removes a CPU; `false` where it was not there.
    pub fn remove(&mut self, cpu: CpuId) -> bool {
        let Some(word) = self.words.get_mut(cpu.index() / 64) else {
            return false;
        };
        let bit = 1 << (cpu.get() % 64);
        let was = *word & bit != 0;
        *word &= !bit;
        was
    }

    /// Whether the CPU is in the set.
    #[must_use]
    pub fn contains(&self, cpu: CpuId) -> bool {
        self.words
            .get(cpu.index() / 64)
            .is_some_and(|word| word & (1 << (cpu.get() % 64)) != 0)
    }

    /// Adds every CPU of `other`.
    pub fn union_with(&mut self, other: &Self) {
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word |= other;
        }
    }

    /// Whether no CPU is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// How many CPUs are in the set.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.words.iter().map(|word| word.count_ones()).sum()
    }

    /// The CPUs, ascending.
    pub fn iter(&self) -> impl Iterator<Item = CpuId> + '_ {
        self.words.iter().enumerate().flat_map(|(index, &word)| {
            (0..64u32)
                .filter(move |bit| word & (1 << bit) != 0)
                .map(move |bit| CpuId::new(index as u32 * 64 + bit))
        })
    }
}

impl Default for CpuSet {
    fn default() -> Self {
        Self::EMPTY
    }
}

impl fmt::Debug for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter().map(CpuId::get)).finish()
    }
}

impl FromIterator<CpuId> for CpuSet {
    fn from_iter<I: IntoIterator<Item = CpuId>>(cpus: I) -> Self {
        let mut set = Self::EMPTY;
        for cpu in cpus {
            set.insert(cpu);
        }
        set
    }
}

/// One value per CPU, each on cache lines of its own.
///
/// The areas are carved at `init` and when a CPU comes online, for CPUs that exist; before that a crate uses a
/// shared area of capacity zero. The borrow of the pin keeps a reference from outliving it:
///
/// ```compile_fail,E0505
/// # use kmem_hal::{Cpu, PerCpu, SingleCpu, CachePadded, sync::LocalU64};
/// // SAFETY: one thread runs this example.
/// let cpu = unsafe { SingleCpu::new() };
/// let areas = [CachePadded::new(LocalU64::new(0))];
/// let counters = PerCpu::new(&areas);
/// let pin = cpu.pin();
/// let mine = counters.get_own(&pin).unwrap();
/// drop(pin);
/// mine.set(1); // may be another CPU's by now
/// ```
#[derive(Debug)]
pub struct PerCpu<'m, T> {
    areas: &'m [CachePadded<T>],
}

impl<'m, T> PerCpu<'m, T> {
    /// Areas for the CPUs `0..areas.len()`.
    #[must_use]
    pub const fn new(areas: &'m [CachePadded<T>]) -> Self {
        Self { areas }
    }

    /// The pinned CPU's own area; `None` where it has none yet.
    #[doc(alias = "this_cpu_ptr")]
    #[inline]
    pub fn get_own<'g, C: Cpu>(&self, pin: &'g Pinned<'_, C>) -> Option<&'g T>
    where
        'm: 'g,
    {
        self.areas.get(pin.id().index()).map(|area| &**area)
    }

    /// Some CPU's area, to be read: its owner may be writing.
    #[doc(alias = "per_cpu_ptr")]
    #[must_use]
    pub fn get_remote(&self, cpu: CpuId) -> Option<&'m T> {
        self.areas.get(cpu.index()).map(|area| &**area)
    }

    /// Every area with its CPU, to be read.
    pub fn iter(&self) -> impl Iterator<Item = (CpuId, &'m T)> + use<'m, T> {
        self.areas
            .iter()
            .enumerate()
            .map(|(index, area)| (CpuId::new(index as u32), &**area))
    }
}

impl<T> Clone for PerCpu<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for PerCpu<'_, T> {}
