//! A cache of kernel stacks: what a dead thread leaves, the next one takes.
//!
//! ```text
//!   alloc ── a slot of this CPU ── a slot of another ── vmalloc      free ── a slot of this CPU ── vmalloc
//! ```
//!
//! A stack in the cache is still mapped, so neither tables nor TLBs change when it is taken. Each CPU keeps up to `N`; what
//! does not fit goes back to vmalloc, and all of them do under pressure ([`Shrink`]).
//!
//! Invariant `S1`: a slot is 0 or the top of a stack of `pages` pages that this cache alone knows. It changes hands by an
//! exchange, so that interrupts and other CPUs may come at any time.
//!
//! A reused stack holds what its last thread left; a kernel that minds zeroes it.
//!
//! Source: Linux `kernel/fork.c` (`NR_CACHED_STACKS`, 2 a CPU).

use core::fmt;

use kmem_hal::sync::{AtomicU64, Ordering};
use kmem_hal::{CachePadded, Cpu, CpuId, ObjectAlloc, RawLock, Shrink, VirtAddr};
use kmem_paging::Env;
use kmem_paging::format::Format;
use kmem_vma_tree::Node;

use crate::request::{NotAnArea, VmallocError};
use crate::vmalloc::Vmalloc;

/// The stacks that one CPU keeps.
pub struct StackSlots<const N: usize = 2>(CachePadded<[AtomicU64; N]>);

impl<const N: usize> StackSlots<N> {
    /// None.
    #[must_use]
    pub fn new() -> Self {
        Self(CachePadded::new([const { 0u64 }; N].map(AtomicU64::new)))
    }

    /// Takes a stack out.
    fn take(&self) -> Option<VirtAddr> {
        self.0
            .iter()
            .map(|slot| slot.swap(0, Ordering::AcqRel))
            .find(|&top| top != 0)
            .map(VirtAddr::new)
    }

    /// Puts a stack in; `false` where all slots are taken.
    fn put(&self, top: VirtAddr) -> bool {
        self.0.iter().any(|slot| {
            slot.compare_exchange(0, top.as_u64(), Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        })
    }

    fn count(&self) -> usize {
        self.0
            .iter()
            .filter(|slot| slot.load(Ordering::Relaxed) != 0)
            .count()
    }
}

impl<const N: usize> Default for StackSlots<N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const N: usize> fmt::Debug for StackSlots<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StackSlots({} of {N})", self.count())
    }
}

/// Guarded kernel stacks of one size, with up to `N` kept by each CPU.
pub struct StackCache<
    'v,
    'a,
    F: Format,
    E: Env,
    T: ObjectAlloc<Node>,
    L: RawLock,
    C: Cpu,
    const N: usize = 2,
> {
    source: &'v Vmalloc<'a, F, E, T, L>,
    cpu: C,
    slots: &'v [StackSlots<N>],
    pages: u64,
}

impl<'v, 'a, F: Format, E: Env, T: ObjectAlloc<Node>, L: RawLock, C: Cpu, const N: usize>
    StackCache<'v, 'a, F, E, T, L, C, N>
{
    /// Stacks of `pages` pages; `slots` has one entry for each CPU that keeps some, and serves this cache alone (`S1`):
    ///
    /// ```compile_fail,E0499
    /// use kmem_hal::{Cpu, ObjectAlloc, RawLock};
    /// use kmem_paging::{Env, format::Format};
    /// use kmem_vma_tree::Node;
    /// use kmem_vmalloc::{StackCache, StackSlots, Vmalloc};
    ///
    /// fn two<'v, 'a, F: Format, E: Env, T: ObjectAlloc<Node>, L: RawLock, C: Cpu + Copy>(
    ///     source: &'v Vmalloc<'a, F, E, T, L>,
    ///     cpu: C,
    ///     slots: &'v mut [StackSlots],
    /// ) {
    ///     let small = StackCache::new(source, cpu, slots, 2);
    ///     let large = StackCache::new(source, cpu, slots, 4); // would hand out the small ones
    ///     drop((small, large));
    /// }
    /// ```
    #[must_use]
    pub fn new(
        source: &'v Vmalloc<'a, F, E, T, L>,
        cpu: C,
        slots: &'v mut [StackSlots<N>],
        pages: u64,
    ) -> Self {
        Self {
            source,
            cpu,
            slots,
            pages,
        }
    }

    /// Pages of each stack.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    fn local(&self) -> Option<&StackSlots<N>> {
        let pin = self.cpu.pin();
        self.slots.get(pin.id().index())
    }

    /// A stack, unmapped below and above; gives the address one past its top.
    ///
    /// # Errors
    ///
    /// As [`Vmalloc::alloc_stack`]; stacks of other CPUs are tried before a refusal.
    #[doc(alias = "alloc_thread_stack_node")]
    #[track_caller]
    pub fn alloc(&self) -> Result<VirtAddr, VmallocError> {
        if let Some(top) = self.local().and_then(StackSlots::take) {
            return Ok(top);
        }
        self.source
            .alloc_stack(self.pages)
            .or_else(|error| self.slots.iter().find_map(StackSlots::take).ok_or(error))
    }

    /// Takes a stack back, by its top. Nobody runs on it any more.
    ///
    /// # Errors
    ///
    /// [`NotAnArea`] where no guarded stack of exactly this size ends there, or it is in the cache already.
    #[doc(alias = "free_thread_stack")]
    pub fn free(&self, top: VirtAddr) -> Result<(), NotAnArea> {
        let bytes = self.pages * kmem_hal::PAGE_SIZE;
        let bottom = top.checked_sub(bytes).ok_or(NotAnArea(top))?;
        let kept = self.slots.iter().any(|cpu| {
            cpu.0
                .iter()
                .any(|slot| slot.load(Ordering::Relaxed) == top.as_u64())
        });
        if kept || !self.source.is_stack(bottom, self.pages) {
            return Err(NotAnArea(top));
        }
        if self.local().is_some_and(|slots| slots.put(top)) {
            return Ok(());
        }
        self.source.free_stack(top, self.pages)
    }

    /// Gives back what a CPU keeps that goes offline; gives how many stacks.
    pub fn drain(&self, cpu: CpuId) -> usize {
        self.slots
            .get(cpu.index())
            .map_or(0, |slots| self.give_back(slots, usize::MAX))
    }

    fn give_back(&self, slots: &StackSlots<N>, most: usize) -> usize {
        let mut given = 0;
        while given < most
            && let Some(top) = slots.take()
        {
            // What is in a slot was checked when it came.
            let _ = self.source.free_stack(top, self.pages);
            given += 1;
        }
        given
    }
}

impl<F: Format, E: Env, T: ObjectAlloc<Node>, L: RawLock, C: Cpu, const N: usize> Shrink
    for StackCache<'_, '_, F, E, T, L, C, N>
{
    fn count(&self) -> usize {
        self.slots.iter().map(StackSlots::count).sum()
    }

    fn scan(&self, objects: usize) -> usize {
        let mut given = 0;
        for slots in self.slots {
            given += self.give_back(slots, objects - given);
        }
        if given > 0 {
            // Only a purge makes frames of them.
            self.source.purge();
        }
        given
    }
}

impl<F: Format, E: Env, T: ObjectAlloc<Node>, L: RawLock, C: Cpu, const N: usize> fmt::Debug
    for StackCache<'_, '_, F, E, T, L, C, N>
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StackCache")
            .field("pages", &self.pages)
            .field("cached", &self.count())
            .finish_non_exhaustive()
    }
}
