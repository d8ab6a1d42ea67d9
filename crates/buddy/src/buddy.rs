//! The allocator itself: construction, initialisation, what belongs to no single call.

use core::fmt;

use kmem_hal::sync::{AtomicPtr, AtomicU32, LocalBool, Ordering};
use kmem_hal::{
    Cpu, Frame, FrameRange, IrqSafe, NoCpuCall, NoPressure, Order, PhysMap, Pinned, RawLock,
};

use crate::boot::BootMap;
use crate::build::build;
use crate::config::Config;
use crate::cpu_cache::{CpuArea, set_holding};
use crate::error::{FreeError, InitError, Misuse};
use crate::state::{self, State};
use crate::watermark;
use crate::zone::Zone;
use crate::zone::bits::{BLOCK_FRAMES, WHOLE};
use crate::zone::core::Core;
use crate::zone::kind::ZoneKind;

const NEW: u32 = 0;
const INITIALISING: u32 = 1;
const READY: u32 = 2;

/// The page-frame allocator of a machine.
///
/// Implements hal's [`FrameSource`](kmem_hal::FrameSource) and [`FrameSink`](kmem_hal::FrameSink). A `static` can hold one: it is
/// const-constructible, keeps pointers only, and refuses everything with
/// [`NotInitialised`](kmem_hal::AllocError::NotInitialised) until [`init`](Self::init).
///
/// `M` is how physical memory is reached, `C` which CPU this is, `L` the lock of slow paths, `K` how other CPUs are
/// called to empty their caches, `P` who is told when memory is short.
///
/// All calls may be made from interrupts and, where `L` keeps interrupts out, from NMIs: see [the crate](crate).
#[doc(alias = "free_area")]
pub struct Buddy<M, C, L: RawLock + 'static = IrqSafe, K = NoCpuCall, P = NoPressure> {
    pub(crate) memory: M,
    pub(crate) cpu: C,
    pub(crate) call: K,
    pub(crate) pressure: P,
    state: AtomicPtr<State<L>>,
    /// The first of `C::count` areas' places; null until `init` has succeeded. A copy of what the state has, one load nearer.
    areas: AtomicPtr<AtomicPtr<CpuArea>>,
    phase: AtomicU32,
}

// SAFETY: the state is shared through its locks and atomics; per-CPU words are written under `C2` of `Cpu`.
unsafe impl<M: Sync, C: Sync, L: RawLock + Sync, K: Sync, P: Sync> Sync for Buddy<M, C, L, K, P> {}
// SAFETY: as above; the parts are owned.
unsafe impl<M: Send, C: Send, L: RawLock + Send + Sync, K: Send, P: Send> Send
    for Buddy<M, C, L, K, P>
{
}

impl<M, C, L: RawLock + 'static> Buddy<M, C, L> {
    kmem_hal::const_new! {
        /// An allocator that cannot call other CPUs and tells nobody when memory is short.
        pub fn new(memory: M, cpu: C) -> Self {
            Buddy::with(memory, cpu, NoCpuCall, NoPressure)
        }
    }
}

impl<M, C, L: RawLock + 'static, K, P> Buddy<M, C, L, K, P> {
    kmem_hal::const_new! {
        /// An allocator with everything a kernel may bring.
        pub fn with(memory: M, cpu: C, call: K, pressure: P) -> Self {
            Self {
                memory,
                cpu,
                call,
                pressure,
                state: AtomicPtr::new(core::ptr::null_mut()),
                areas: AtomicPtr::new(core::ptr::null_mut()),
                phase: AtomicU32::new(NEW),
            }
        }
    }

    /// How physical memory is reached.
    pub const fn memory(&self) -> &M {
        &self.memory
    }

    /// Which CPU this is.
    pub const fn cpu(&self) -> &C {
        &self.cpu
    }

    /// Who is told when memory is short.
    pub const fn pressure(&self) -> &P {
        &self.pressure
    }

    #[inline(always)]
    pub(crate) fn state(&self) -> Option<&'static State<L>> {
        // SAFETY: a non-null pointer came from a `&'static State` in `init`.
        unsafe { self.state.load(Ordering::Acquire).as_ref() }
    }

    /// Whether `init` has succeeded.
    #[must_use]
    pub fn is_initialised(&self) -> bool {
        self.state().is_some()
    }

    /// Notes a wrong free; the block stays out of use.
    pub(crate) fn note_misuse(&self, state: &State<L>, error: FreeError, first: u64, order: usize) {
        state
            .misuse_last
            .store(first << 8 | order as u64, Ordering::Relaxed);
        let kind = FreeError::ALL.iter().position(|&known| known == error);
        state
            .misuse_kind
            .store(kind.unwrap_or(0) as u32, Ordering::Relaxed);
        state.misuse_count.fetch_add(1, Ordering::Relaxed);
    }

    /// The last block that was freed wrongly, if any was; such blocks are kept out of use.
    ///
    /// Foreign and misaligned blocks are found at the call, double frees and wrong orders when the block reaches its
    /// zone: at the call for orders that are not cached, otherwise when the CPU's cache is flushed.
    pub fn misuse(&self) -> Option<Misuse> {
        let state = self.state()?;
        let count = state.misuse_count.load(Ordering::Relaxed);
        let last = state.misuse_last.load(Ordering::Relaxed);
        let kind = state.misuse_kind.load(Ordering::Relaxed);
        (count > 0).then(|| Misuse {
            error: FreeError::ALL[kind as usize % FreeError::ALL.len()],
            first: Frame::from_number(last >> 8),
            order: Order::new(last as u8).unwrap_or(Order::ZERO),
            count,
        })
    }

    /// The frames that hold the allocator's own tables.
    pub fn metadata(&self) -> FrameRange {
        self.state()
            .map_or(FrameRange::EMPTY, |state| state.metadata)
    }
}

impl<M: PhysMap, C: Cpu, L: RawLock + 'static, K, P> Buddy<M, C, L, K, P> {
    /// The area of the CPU that the caller is pinned to; `None` before `init` and where the CPU is not online.
    #[inline(always)]
    pub(crate) fn own_area(&self, pin: &Pinned<'_, C>) -> Option<&CpuArea> {
        let areas = self.areas.load(Ordering::Acquire);
        if areas.is_null() {
            return None;
        }
        // SAFETY: the state has a place for each of `C::count` CPUs, whose ids are smaller (C3).
        let area = unsafe { (*areas.add(pin.id().index())).load(Ordering::Acquire) };
        // SAFETY: a non-null pointer came from a `&'static CpuArea` in `build` or `cpu_online`.
        unsafe { area.as_ref() }
    }

    /// Runs `f` under a zone's lock; `None` where this call interrupted a holder and the lock is not free.
    ///
    /// The caller is pinned: to the CPU of `area`, to one without an area, or it is [`holding`](Self::holding) for the area's.
    pub(crate) fn locked<R>(
        &self,
        area: Option<&CpuArea>,
        zone: &Zone<L>,
        f: impl FnOnce(&mut Core) -> R,
    ) -> Option<R> {
        /// Looks at a lock that another CPU may hold, from a context that must not spin for ever.
        const TRIES: u32 = 256;
        let (nested, flag) = match area {
            Some(area) => (area.is_holding(), Some(&area.holding)),
            None => {
                let flag = self.bare_flag();
                (flag.is_some_and(LocalBool::get), flag)
            }
        };
        match flag {
            _ if nested => zone.try_locked(TRIES, f),
            None => Some(zone.locked(f)),
            Some(flag) => {
                set_holding(flag, true);
                let result = zone.locked(f);
                set_holding(flag, false);
                Some(result)
            }
        }
    }

    /// The flag of this CPU, which has no area.
    #[cold]
    #[inline(never)]
    pub(crate) fn bare_flag(&self) -> Option<&'static LocalBool> {
        let cpu = self.cpu.pin().id();
        self.state()?.bare.get(cpu.index())
    }

    /// Whether the caller has interrupted this CPU inside a lock, or about to take one.
    pub(crate) fn is_nested(&self, state: &State<L>) -> bool {
        let cpu = self.cpu.pin().id();
        match state.area(cpu) {
            Some(area) => area.is_holding(),
            None => state.bare.get(cpu.index()).is_some_and(LocalBool::get),
        }
    }

    /// Runs `f`, which takes locks by itself and returns with none, so that calls that interrupt it do not wait for them (`I2` of the
    /// CPUs' areas).
    pub(crate) fn holding<R>(&self, state: &State<L>, f: impl FnOnce() -> R) -> R {
        let pin = self.cpu.pin();
        let area = state.area(pin.id());
        let own = area.map(|area| &area.holding);
        let flag = own.or_else(|| state.bare.get(pin.id().index()));
        let nested = flag.is_some_and(LocalBool::get);
        if let Some(flag) = flag {
            set_holding(flag, true);
        }
        let result = f();
        if let Some(flag) = flag {
            set_holding(flag, nested);
        }
        self.settle(state, area);
        result
    }
}

impl<M: PhysMap, C: Cpu, L: RawLock + 'static, K, P> Buddy<M, C, L, K, P> {
    /// Builds zones from a boot map and takes over all of its free frames.
    ///
    /// Called once, on the boot CPU, before any allocation. The tables are carved from the map's memory. Frames that
    /// `memory` does not reach yet (those of HIGHMEM apart) join with [`extend`](Self::extend).
    ///
    /// # Errors
    ///
    /// [`InitError`]; the boot map is as it was, and `init` may be called again.
    ///
    /// # Safety
    ///
    /// `X1` of [`EarlyAllocator::new`](crate::EarlyAllocator::new): the memory that `map` calls usable is in use by nobody where it is not reserved in
    /// `map`, and no other allocator is started on it.
    pub unsafe fn init<const N: usize>(
        &self,
        map: &mut BootMap<N>,
        config: &Config,
    ) -> Result<(), InitError> {
        self.phase
            .compare_exchange(NEW, INITIALISING, Ordering::Acquire, Ordering::Relaxed)
            .map_err(|_| InitError::Twice)?;
        // SAFETY: X1, by contract.
        let built = unsafe { build::<N, M, L>(map, &self.memory, config, self.cpu.count()) };
        let state = match built {
            Ok(state) => state,
            Err(error) => {
                self.phase.store(NEW, Ordering::Release);
                return Err(error);
            }
        };
        let reach = self.memory.reach();
        map.for_each_free(|range| take_over(state, range, reach));
        state.reserved.change(|reserved| reserved.set_reach(reach));
        for zone in state.zones {
            mark_unmanaged(zone);
        }
        watermark::set_up(state);
        self.state
            .store(core::ptr::from_ref(state).cast_mut(), Ordering::Release);
        self.areas
            .store(state.cpus.as_ptr().cast_mut(), Ordering::Release);
        self.phase.store(READY, Ordering::Release);
        Ok(())
    }
}

/// Whether frames of the zone are usable though no permanent mapping reaches them.
pub(crate) fn needs_no_reach(kind: ZoneKind) -> bool {
    kind == ZoneKind::HighMem
}

/// Frees the part of `range` that is in segments and in `reach`, as memory that was never allocated.
pub(crate) fn take_over<L: RawLock + 'static>(
    state: &State<L>,
    range: FrameRange,
    reach: FrameRange,
) {
    for (segment, part) in state::cut(state.zones, range) {
        let zone = &state.zones[segment.zone as usize];
        let part = if needs_no_reach(zone.kind) {
            part
        } else {
            part.intersection(reach)
        };
        if !part.is_empty() {
            zone.locked(|core| {
                core.mark_range(segment, part.first().number(), part.end_number(), true);
            });
            zone.add_managed(part.count());
        }
    }
}

/// Flags the blocks that have frames which are not the allocator's; right while nothing is allocated.
fn mark_unmanaged<L: RawLock + 'static>(zone: &Zone<L>) {
    zone.locked(|core| {
        for segment in zone.segments {
            for block in segment.block as usize..segment.block_end() {
                if core.summaries_of(block) == WHOLE {
                    continue;
                }
                let base = segment.base_of(block);
                let here = (base + BLOCK_FRAMES).min(segment.end) - base.max(segment.first);
                if core.free_in(block) != here {
                    core.set_unmanaged(block, true);
                }
            }
        }
    });
}

impl<M, C, L: RawLock + 'static, K, P> fmt::Debug for Buddy<M, C, L, K, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.state() {
            None => f.write_str("Buddy(not initialised)"),
            Some(state) => {
                let free: u64 = state.zones.iter().map(Zone::free).sum();
                write!(f, "Buddy({} zones, {free} frames free)", state.zones.len())
            }
        }
    }
}
