//! How the announcement of a reader is ordered against the scan of a writer.
//!
//! ```text
//!   reader   announce ── reader() ── reads X         writer   unlink X ── writer() ── looks for announcements
//! ```
//!
//! One of the two must see the other. Fences on both sides do it, at 6 to 18 ns for every reader; where writers are rare and can make
//! every CPU execute a fence, the reader's side needs none at all: [`CallBarrier`] in a kernel, `membarrier(2)` under Linux.
//!
//! Source: Dice, Huang, Yang, "Asymmetric Dekker synchronization", 2001; membarrier(2); Linux `arch/x86` `membarrier_arch_switch_mm`.

use crate::cpu::{Cpu, CpuCall, CpuSet};
use crate::sync::{Ordering, compiler_fence, fence};

/// Orders readers that announce themselves against writers that look for them.
///
/// # Safety
///
/// - `B1`: a store before [`reader`](Self::reader) on one CPU and a load after [`writer`](Self::writer) on another, and a store before `writer` and
///   a load after `reader`: at least one of the two loads sees the other side's store, or a later one.
/// - `B2`: both also order as `fence(SeqCst)` does towards the compiler.
pub unsafe trait Barrier {
    /// Between a reader's announcement and its first read.
    fn reader(&self);

    /// Between what a writer unlinked and its look at the announcements.
    ///
    /// Context: task context, interrupts on, unless the implementation says otherwise.
    fn writer(&self);
}

// SAFETY: a reference forwards to a barrier that keeps the contract.
unsafe impl<B: Barrier + ?Sized> Barrier for &B {
    #[inline]
    fn reader(&self) {
        (**self).reader();
    }
    fn writer(&self) {
        (**self).writer();
    }
}

/// A full fence on both sides: needs nothing of the kernel and works in every context.
#[doc(alias = "smp_mb")]
#[derive(Clone, Copy, Debug, Default)]
pub struct FullBarrier;

// SAFETY: B1, B2: two sequentially consistent fences, of which one is first in their single order.
unsafe impl Barrier for FullBarrier {
    #[inline(always)]
    fn reader(&self) {
        fence(Ordering::SeqCst);
    }
    #[inline]
    fn writer(&self) {
        fence(Ordering::SeqCst);
    }
}

/// Nothing for readers; a writer makes every CPU execute a fence, by interrupting it.
///
/// A writer waits for all CPUs, so [`Grace::poll`](super::Grace::poll) and [`Grace::synchronize`](super::Grace::synchronize) belong into
/// task context with interrupts on. A CPU whose call is refused cannot be ordered: see [`writer`](Barrier::writer).
///
/// # Examples
///
/// ```
/// use kmem_hal::{CallBarrier, EpochGrace, Grace, SingleCpu, Spin};
///
/// // SAFETY: one thread runs this example.
/// let cpu = unsafe { SingleCpu::new() };
/// let grace: EpochGrace<'_, _, Spin, 32, _> = EpochGrace::with_barrier(cpu, CallBarrier::new(cpu, cpu));
/// drop(grace.read());
/// grace.synchronize();
/// ```
#[derive(Clone, Copy, Debug)]
pub struct CallBarrier<C, R> {
    cpus: C,
    calls: R,
}

impl<C: Cpu, R: CpuCall> CallBarrier<C, R> {
    /// A barrier over all CPUs of `cpus`, reached through `calls`.
    pub const fn new(cpus: C, calls: R) -> Self {
        Self { cpus, calls }
    }
}

// SAFETY: B1: every CPU executes a fence during `writer` (R1, R3). A reader whose announcement comes before its CPU's fence is seen by the
// loads after; one whose announcement comes after it reads after it too, and sees what the writer stored before (R3). B2: compiler
// fences.
unsafe impl<C: Cpu, R: CpuCall> Barrier for CallBarrier<C, R> {
    #[inline(always)]
    fn reader(&self) {
        compiler_fence(Ordering::SeqCst);
    }

    /// # Panics
    ///
    /// Where the CPUs cannot be called ([`CpuCallError`](crate::CpuCallError)), or are more than a [`CpuSet`] can name: to go on would free
    /// memory under a reader.
    fn writer(&self) {
        fence(Ordering::SeqCst);
        let count = self.cpus.count();
        assert!(
            count <= CpuSet::CAPACITY,
            "a grace period needs every CPU: more than a set can name"
        );
        let all = CpuSet::first(count);
        let called = self.calls.run_on(&all, &|_cpu| fence(Ordering::SeqCst));
        assert!(called.is_ok(), "a grace period needs every CPU to answer");
        fence(Ordering::SeqCst);
    }
}
