//! CPUs: their areas come and go, and their arrays are emptied on demand.

use core::ptr::NonNull;

use kmem_hal::sync::{AtomicBool, Ordering};
use kmem_hal::{
    AllocError, Cpu, CpuCall, CpuId, CpuSet, FrameRequest, FrameSource, NodePolicy, Order, PhysMap,
    Pressure, RawLock,
};

use crate::buddy::Buddy;
use crate::build::build_area;
use crate::cpu_cache::{CpuArea, ZoneCache};
use crate::plan::area_room;
use crate::state::State;

/// Whether what was free is in the zones, where arrays stay closed meanwhile (a refusal's look); elsewhere a CPU may have filled its own again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Drained {
    /// All of it.
    All,
    /// Perhaps not: a CPU could not be called, or was interrupted in its arrays or inside a lock that they need, or a block that a
    /// nested call freed waits for the call that it interrupted. Of a look: frees may also have overtaken it 16 times.
    Here,
}

impl<M: PhysMap, C: Cpu, L: RawLock + 'static, K: CpuCall, P: Pressure> Buddy<M, C, L, K, P> {
    /// Empties the arrays of the CPU that the caller is pinned to; `false` where the caller interrupted their user, or the holder of a
    /// lock that they need.
    fn drain_area(&self, state: &State<L>, area: &CpuArea) -> bool {
        let Some(arrays) = area.enter_or_note() else {
            return false;
        };
        let mut all = true;
        let closing = state.is_refusing();
        if let Some((first, order, _)) = arrays.take_hot()
            && let Err(error) = self.give_direct(state, Some(area), first, order)
        {
            self.note_misuse(state, error, first, order);
        }
        for (index, zone) in state.zones.iter().enumerate() {
            let Some(cache) = arrays.zone(index) else {
                continue;
            };
            for (stack, order) in ZoneCache::stacks() {
                let count = cache.count(stack) as usize;
                if count > 0 {
                    all &= self.flush(state, area, zone, cache, (stack, order), count);
                }
                if closing {
                    cache.set_limit(stack, 0);
                }
            }
        }
        drop(arrays);
        self.settle(state, Some(area));
        all
    }

    /// Empties this CPU's arrays into the zones; `false` where some of it stayed there: the caller interrupted their user, or the holder
    /// of a lock that they need.
    pub fn drain_local(&self) -> bool {
        self.state().is_none_or(|state| self.drain_here(state).1)
    }

    /// Empties the arrays of one CPU, the caller's at some instant: which it was, and whether they are empty.
    fn drain_here(&self, state: &State<L>) -> (CpuId, bool) {
        let pin = self.cpu.pin();
        let cpu = pin.id();
        let area = state.area(cpu);
        let all = area.is_none_or(|area| self.drain_area(state, area));
        (cpu, all)
    }

    /// Empties the arrays of all CPUs, as far as they can be called; whether each was emptied, at some instant of the call, and no block that a
    /// nested call freed waits for the call that it interrupted.
    #[doc(alias = "drain_all_pages")]
    pub fn drain_all(&self) -> bool {
        self.drain() == Drained::All
    }

    pub(crate) fn drain(&self) -> Drained {
        let Some(state) = self.state() else {
            return Drained::All;
        };
        // From here on the caller may be on any CPU: what was drained is left out, not what it is on now (R1 of `CpuCall`).
        let (own, here) = self.drain_here(state);
        let mut others = CpuSet::EMPTY;
        for cpu in 0..state.cpus.len() as u32 {
            let cpu = CpuId::new(cpu);
            if cpu != own && state.area(cpu).is_some() {
                others.insert(cpu);
            }
        }
        // Blocks that wait for an interrupted call are in no zone.
        let drained = |arrays: bool| {
            if arrays && state.pending.is_empty() {
                Drained::All
            } else {
                Drained::Here
            }
        };
        if others.is_empty() {
            return drained(here);
        }
        let incomplete = AtomicBool::new(false);
        let empty = |cpu: CpuId| {
            // R1: this CPU is pinned while the closure runs, so the area is its own.
            let done = state
                .area(cpu)
                .is_none_or(|area| self.drain_area(state, area));
            if !done {
                incomplete.store(true, Ordering::Release);
            }
        };
        // SAFETY of sharing: see `Shared`.
        let empty = Shared(empty);
        let called = self.call.run_on(&others, &|cpu| empty.run(cpu));
        drained(called.is_ok() && here && !incomplete.load(Ordering::Acquire))
    }

    /// Gives a CPU that comes online its arrays.
    ///
    /// Until then it may use the allocator all the same, straight from the zones.
    ///
    /// # Errors
    ///
    /// [`AllocError`] where there is no memory for them; [`AllocError::Unsatisfiable`] for a CPU number beyond `Cpu::count`.
    pub fn cpu_online(&self, cpu: CpuId) -> Result<(), AllocError> {
        let state = self.state().ok_or(AllocError::NotInitialised)?;
        let slot = state
            .cpus
            .get(cpu.index())
            .ok_or(AllocError::Unsatisfiable)?;
        if !slot.load(Ordering::Acquire).is_null() {
            return Ok(());
        }
        let node = state.node_of(cpu);
        let order =
            Order::for_bytes(area_room(state.zones.len())).ok_or(AllocError::Unsatisfiable)?;
        let request = FrameRequest::new(order).node(NodePolicy::Preferred(node));
        let frames = self.alloc(&request)?;
        let memory = NonNull::new(self.memory.to_ptr(frames.first().start()));
        let area = memory.filter(|_| self.memory.reach().contains_range(frames.range()));
        // SAFETY: the frames are this call's, in reach, and never freed once the area is published.
        let area = area.and_then(|memory| unsafe {
            let list = state.list(node.index());
            let bare = state.bare.get(cpu.index());
            build_area(
                memory,
                order.bytes() as usize,
                node,
                bare,
                state.zones,
                list,
            )
        });
        let published = area.is_some_and(|area| {
            slot.compare_exchange(
                core::ptr::null_mut(),
                area.as_ptr(),
                Ordering::AcqRel,
                Ordering::Relaxed,
            )
            .is_ok()
        });
        if !published {
            // Somebody else was faster, or the frames are out of reach: either way they are still only ours.
            kmem_hal::FrameSink::free(self, frames);
            return if area.is_some() {
                Ok(())
            } else {
                Err(AllocError::OutOfMemory)
            };
        }
        // The area lives for ever: `frames` is not freed.
        let _kept = frames.into_raw();
        self.share_zones(state);
        Ok(())
    }

    /// Shares the zones among the CPUs that have arrays; larger arrays shrink when they are next filled or found full.
    fn share_zones(&self, state: &State<L>) {
        self.with_reserved(state, |_| {
            let slots = state.cpus.iter();
            let cpus = slots.filter(|slot| !slot.load(Ordering::Acquire).is_null());
            let cpus = cpus.count() as u32;
            state.zones.iter().for_each(|zone| zone.share_among(cpus));
        });
    }

    /// Empties the arrays of a CPU that has gone offline; it keeps them for its return. `false` where some frames stayed there, as all do
    /// where the caller has interrupted its own CPU inside a lock of the allocator.
    ///
    /// # Safety
    ///
    /// The CPU is offline: nobody is pinned to it until [`cpu_online`](Self::cpu_online) was called for it again, and what it
    /// wrote is visible to the caller.
    pub unsafe fn cpu_offline(&self, cpu: CpuId) -> bool {
        let Some(state) = self.state() else {
            return true;
        };
        if self.is_nested(state) {
            return false;
        }
        // Noted at this CPU as well, whose NMIs would wait for what it holds for the other.
        self.holding(state, || {
            state
                .area(cpu)
                .is_none_or(|area| self.drain_area(state, area))
        })
    }
}

/// Carries a closure to other CPUs.
struct Shared<F>(F);

impl<F: Fn(CpuId)> Shared<F> {
    fn run(&self, cpu: CpuId) {
        (self.0)(cpu);
    }
}

// SAFETY: the closure borrows the allocator and its state only. Both are made to be used by all CPUs at once; what is not
// behind locks and atomics is reached through the running CPU's own area (C2, R1).
unsafe impl<F> Sync for Shared<F> {}
