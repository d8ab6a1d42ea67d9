//! Threads as CPUs.
//!
//! A thread leases a number at its first pin and gives it back when it ends. A number has one holder at a time, so whatever belongs to
//! the CPU of that number belongs to the thread; the next holder takes it over.
//!
//! Invariants
//! - `I1`: a clear bit in `FREE` means that one thread, or one walk over idle numbers ([`ThreadCpu::with_idle`], and that of the hook for short memory), has
//!   the number.
//! - `I2`: a number goes back with release and is leased with acquire: the next holder sees what the last one wrote (`C5`).
//! - `I3`: the last number is shared by threads that got none, and by threads that are past the end of their thread-local storage;
//!   whoever runs as it holds the lock `SHARED`.
//! - `I4`: a thread that runs as the shared number leases none before it stops: a nested pin, a signal handler's too, has the number of
//!   the pin around it. A handler that leases between two steps of its thread's own first pin wins; the thread's second number goes back.
//!
//! The numbers are the process's, like its threads: that is the one `static` here.

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use kmem_hal::{Cpu, CpuId};

/// How many numbers there are, the shared one included.
pub const MAX_THREADS: u32 = 256;

const SHARED_ID: u32 = MAX_THREADS - 1;
const NONE: u32 = u32::MAX;
const WORDS: usize = MAX_THREADS as usize / 64;

static FREE: [AtomicU64; WORDS] = [
    AtomicU64::new(u64::MAX),
    AtomicU64::new(u64::MAX),
    AtomicU64::new(u64::MAX),
    AtomicU64::new(u64::MAX >> 1), // without the shared one
];

/// How often a thread gave its number back, or began to run as the shared one.
static RELEASED: AtomicU64 = AtomicU64::new(0);

/// How many walks over idle numbers began, and how many of them ended.
static BEGUN: AtomicU64 = AtomicU64::new(0);
static ENDED: AtomicU64 = AtomicU64::new(0);

/// 0, or the holder of the shared number: the address of its thread-local `ID`.
static SHARED: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Has no destructor, so it can be read at any time.
    static ID: Cell<u32> = const { Cell::new(NONE) };
    static LEASE: Lease = const { Lease(AtomicU32::new(NONE)) };
}

/// Gives the number back at the end of the thread. Atomic for the thread's own signal handlers.
struct Lease(AtomicU32);

impl Lease {
    /// The thread has the number `id` from now on, unless a signal handler has leased one meanwhile: then `id` goes back (`I4`).
    fn adopt(&self, id: u32) {
        match self
            .0
            .compare_exchange(NONE, id, Ordering::Relaxed, Ordering::Relaxed)
        {
            Ok(_) => ID.set(id),
            Err(_) => give_back(id),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let id = self.0.swap(NONE, Ordering::Relaxed);
        if id != NONE {
            // From here on the thread runs as the shared number (I3).
            ID.set(NONE);
            give_back(id);
        }
    }
}

fn take() -> Option<u32> {
    for (index, word) in FREE.iter().enumerate() {
        let mut free = word.load(Ordering::Relaxed);
        while free != 0 {
            let bit = free & free.wrapping_neg();
            match word.compare_exchange_weak(
                free,
                free & !bit,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Some(index as u32 * 64 + bit.trailing_zeros()),
                Err(found) => free = found,
            }
        }
    }
    None
}

fn give_back(id: u32) {
    FREE[id as usize / 64].fetch_or(1 << (id % 64), Ordering::Release);
    RELEASED.fetch_add(1, Ordering::Release);
}

/// The threads of this process as CPUs.
#[derive(Clone, Copy, Debug, Default)]
pub struct ThreadCpu;

impl ThreadCpu {
    /// Runs `f` with the number of each CPU that no thread holds now, one after the other; none leases it meanwhile.
    ///
    /// The shared number is one of them, unless this thread has no other.
    pub fn with_idle(self, f: impl FnMut(CpuId)) {
        self.each_idle(|| Some(lock_shared()), f);
    }

    /// As [`with_idle`](Self::with_idle), waiting for nobody: the shared number is passed over while a thread runs as it.
    ///
    /// Answers whether that were all idle numbers: neither that one was passed over, nor one that another walk had at that moment.
    pub(crate) fn try_with_idle(self, f: impl FnMut(CpuId)) -> bool {
        self.each_idle(try_lock_shared, f)
    }

    fn each_idle(
        self,
        shared: impl FnOnce() -> Option<HostGuard>,
        mut f: impl FnMut(CpuId),
    ) -> bool {
        drop(self.raw_pin()); // leases a number, if there is one
        let before = BEGUN.fetch_add(1, Ordering::AcqRel);
        // Each walk that began before has ended: what it held is free again. (Where later ones are counted here, `BEGUN` tells in the end.)
        let is_first = ENDED.load(Ordering::Acquire) == before;
        for (index, word) in FREE.iter().enumerate() {
            for bit in 0..64 {
                let mask = 1 << bit;
                // Release, and acquire: who sees that this walk has the number sees that it began.
                if word.load(Ordering::Acquire) & mask != 0
                    && word.fetch_and(!mask, Ordering::AcqRel) & mask != 0
                {
                    f(CpuId::new(index as u32 * 64 + bit));
                    word.fetch_or(mask, Ordering::Release);
                }
            }
        }
        // A handler that interrupted its thread here, or as the shared number, leaves it alone.
        let may_share = ID.get() != NONE && SHARED.load(Ordering::Relaxed) != me();
        let guard = if may_share { shared() } else { None };
        if guard.is_some() {
            f(CpuId::new(SHARED_ID));
        }
        let is_alone = is_first && BEGUN.load(Ordering::Acquire) == before.wrapping_add(1);
        ENDED.fetch_add(1, Ordering::Release);
        guard.is_some() && is_alone
    }

    /// How often a thread gave its number back, or ran as the shared one: where this has not changed, idle numbers hold what they held.
    pub(crate) fn released(self) -> u64 {
        RELEASED.load(Ordering::Acquire)
    }

    /// How many threads hold a number of their own.
    #[must_use]
    pub fn leased(self) -> u32 {
        let free: u32 = FREE
            .iter()
            .map(|word| word.load(Ordering::Relaxed).count_ones())
            .sum();
        MAX_THREADS - 1 - free
    }
}

/// A thread's hold on its number; the lock of the shared number, where it is that.
#[derive(Debug)]
pub struct HostGuard {
    id: u32,
    unlock: bool,
}

impl Drop for HostGuard {
    #[inline(always)]
    fn drop(&mut self) {
        if self.unlock {
            SHARED.store(0, Ordering::Release);
        }
    }
}

// SAFETY: C1, C2: a leased number belongs to one thread (I1), a shared one to the holder of the lock (I3), and signal handlers
// finish before the code that they interrupted; C3: numbers are below the constant; C4: a nested pin of the shared number finds
// its own lock; C5: I2, and the lock's release and acquire.
unsafe impl Cpu for ThreadCpu {
    type Guard<'a> = HostGuard;

    #[inline(always)]
    fn raw_pin(&self) -> HostGuard {
        let id = ID.get();
        if id != NONE {
            return HostGuard { id, unlock: false };
        }
        first_pin()
    }

    #[inline(always)]
    fn raw_pin_at_once(&self) -> Option<HostGuard> {
        let id = ID.get();
        (id != NONE).then_some(HostGuard { id, unlock: false })
    }

    #[inline(always)]
    fn id(&self, guard: &HostGuard) -> CpuId {
        CpuId::new(guard.id)
    }

    #[inline(always)]
    fn count(&self) -> u32 {
        MAX_THREADS
    }
}

/// What the calling thread writes to `SHARED`.
fn me() -> usize {
    ID.with(|id| std::ptr::from_ref(id).addr())
}

#[cold]
fn first_pin() -> HostGuard {
    if SHARED.load(Ordering::Relaxed) == me() {
        // A nested pin, or a signal handler, of the holder: the same number, even where one of its own could be had now (I4).
        return HostGuard {
            id: SHARED_ID,
            unlock: false,
        };
    }
    // Past the end of the thread's storage nobody would give a number back.
    let leased = LEASE.try_with(|lease| {
        // Registering the destructor may have pinned already, and a signal handler may do so here.
        if lease.0.load(Ordering::Relaxed) == NONE
            && let Some(id) = take()
        {
            lease.adopt(id);
        }
        lease.0.load(Ordering::Relaxed)
    });
    match leased {
        Ok(id) if id != NONE => HostGuard { id, unlock: false },
        _ => shared(),
    }
}

/// Runs as the shared number, or as the thread's own where a signal handler has leased one while it waited (`I4`).
fn shared() -> HostGuard {
    let guard = lock_shared();
    RELEASED.fetch_add(1, Ordering::Release);
    match ID.get() {
        NONE => guard,
        id => HostGuard { id, unlock: false },
    }
}

fn lock_shared() -> HostGuard {
    loop {
        if let Some(guard) = try_lock_shared() {
            return guard;
        }
        // SAFETY: has no preconditions.
        unsafe { libc::sched_yield() };
    }
}

fn try_lock_shared() -> Option<HostGuard> {
    SHARED
        .compare_exchange(0, me(), Ordering::Acquire, Ordering::Relaxed)
        .is_ok()
        .then(|| HostGuard {
            id: SHARED_ID,
            unlock: true,
        })
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::{Mutex, MutexGuard, PoisonError};

    use super::*;

    /// The numbers are the process's: tests that lease some, or look at them, run one after the other.
    pub(crate) fn alone() -> MutexGuard<'static, ()> {
        static ALONE: Mutex<()> = Mutex::new(());
        ALONE.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[test]
    fn a_pin_at_once_is_none_before_the_first_and_as_the_shared_number() {
        let _alone = alone();
        let at_once = || ThreadCpu.pin_at_once().map(|pin| pin.id());
        std::thread::spawn(move || {
            assert_eq!(at_once(), None);
            let first = ThreadCpu.pin().id();
            assert_eq!(at_once(), Some(first));
            // As past the end of the thread's storage: only who has the lock runs as the shared number.
            ID.set(NONE);
            assert_eq!(at_once(), None);
            ID.set(first.get());
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_walk_beside_another_does_not_know_that_it_saw_all() {
        let _alone = alone();
        assert!(ThreadCpu.try_with_idle(|_| {}), "alone");
        let (mut held, mut inner) = (None, true);
        let outer = ThreadCpu.try_with_idle(|cpu| {
            if held.is_none() {
                held = Some(cpu);
                // As the hook of another heap, or its `shrink`, at this moment.
                inner = ThreadCpu.try_with_idle(|other| assert_ne!(other, cpu));
            }
        });
        assert!(held.is_some(), "no number was idle");
        assert!(!inner, "it passed over {held:?}");
        // The inner walk held numbers, which the outer one might have met.
        assert!(!outer);
        assert!(ThreadCpu.try_with_idle(|_| {}), "alone again");
    }

    #[test]
    fn the_second_of_two_numbers_goes_back() {
        let _alone = alone();
        let is_free = |id: u32| FREE[id as usize / 64].load(Ordering::Relaxed) >> (id % 64) & 1;
        LEASE.with(|lease| {
            let (first, second) = (take().unwrap(), take().unwrap());
            // As a signal handler does between the thread's search and what it does with its number.
            lease.adopt(first);
            lease.adopt(second);
            assert_eq!(lease.0.load(Ordering::Relaxed), first);
            assert_eq!((ID.get(), is_free(first), is_free(second)), (first, 0, 1));
        });
    }
}
