//! Freeing: into the CPU's array, which gives its older half, or all, back to the zone when it is full.
//!
//! What is wrong with a block is found as early as it costs nothing: a foreign or misaligned one at the call, since the
//! segment must be found anyway; a double free or a wrong order when the block's bits are set. A wrong block is never
//! reused: [`Buddy::misuse`] tells.

use kmem_hal::sync::{AtomicU8, LocalBool, Ordering};
use kmem_hal::{Cpu, CpuCall, Frame, FrameSink, Order, OwnedFrame, PhysMap, Pressure, RawLock};

use crate::buddy::{Buddy, needs_no_reach};
use crate::cpu_cache::{Arrays, CACHED_TYPES, CpuArea, ZoneCache, is_cached, stack_of};
use crate::error::FreeError;
use crate::state::State;
use crate::zone::Zone;
use crate::zone::bits::TOP;
use crate::zone::core::GiveError;
use crate::zone::kind::UNMANAGED;
use crate::zone::segment::{self, Segment};

impl From<GiveError> for FreeError {
    fn from(error: GiveError) -> Self {
        match error {
            GiveError::Free => Self::DoubleFree,
            GiveError::PartlyFree => Self::WrongOrder,
        }
    }
}

/// Whether a block's frames are the allocator's: not reserved, and in reach.
fn is_managed<L: RawLock + 'static>(
    state: &State<L>,
    zone: &Zone<L>,
    first: u64,
    order: usize,
) -> bool {
    let end = first + (1 << order);
    state
        .reserved
        .is_managed(first, end, !needs_no_reach(zone.kind))
}

impl<M: PhysMap, C: Cpu, L: RawLock + 'static, K, P> Buddy<M, C, L, K, P> {
    /// The segment of a frame; the last one used is tried first.
    #[inline]
    pub(crate) fn segment(
        &self,
        state: &State<L>,
        area: Option<&CpuArea>,
        first: u64,
    ) -> Option<&'static Segment> {
        let last = area.and_then(CpuArea::last_segment);
        if let Some(last) = last.filter(|last| last.contains(first, 1)) {
            return Some(last);
        }
        let found = segment::find(state.segments, first)?;
        if let Some(area) = area {
            area.set_last_segment(found);
        }
        Some(found)
    }

    /// Gives a block back that was no plain hit, and notes it where something is wrong with it.
    pub(crate) fn put_or_note(&self, area: Option<&CpuArea>, first: u64, order: usize) {
        let Some(state) = self.state() else { return };
        if let Err(error) = self.put(state, area, first, order) {
            self.note_misuse(state, error, first, order);
        }
    }

    /// Gives blocks that nested calls left behind to their zones, once the lock is free again.
    #[inline]
    pub(crate) fn settle(&self, state: &State<L>, area: Option<&CpuArea>) {
        // Another call may have taken them and be on its way to the zones with them: nobody waits for that.
        while !state.pending.is_empty() && !self.is_holding(area) {
            let give = |first, order| {
                if let Err(error) = self.give_direct(state, area, first, order) {
                    self.note_misuse(state, error, first, order);
                }
            };
            let wrong = |first, order| {
                self.note_misuse(state, FreeError::DoubleFree, first, order);
            };
            let any = state.pending.take(&self.memory, give, wrong);
            if !any {
                break;
            }
        }
    }

    /// Whether the call interrupted one that is inside a zone's lock, or about to be.
    fn is_holding(&self, area: Option<&CpuArea>) -> bool {
        match area {
            Some(area) => area.is_holding(),
            None => self.bare_flag().is_some_and(LocalBool::get),
        }
    }

    /// Gives a block to its zone at once.
    #[cold]
    pub(crate) fn give_direct(
        &self,
        state: &State<L>,
        area: Option<&CpuArea>,
        first: u64,
        order: usize,
    ) -> Result<(), FreeError> {
        let segment = self.segment(state, area, first).ok_or(FreeError::Foreign)?;
        if !segment.contains(first, 1 << order) {
            return Err(FreeError::Foreign);
        }
        let zone = &state.zones[segment.zone as usize];
        // A block above order 9 is of several page blocks.
        let blocks = segment.block_of(first)..=segment.block_of(first + (1 << order) - 1);
        let unmanaged = |byte: &AtomicU8| byte.load(Ordering::Relaxed) & UNMANAGED != 0;
        if zone.types[blocks].iter().any(unmanaged)
            && !segment.is_clean(first, 1 << order)
            && !is_managed(state, zone, first, order)
        {
            return Err(FreeError::Foreign);
        }
        let given = self.locked(area, zone, |core| {
            if order <= TOP {
                return core.give(segment, first, order);
            }
            let end = first + (1 << order);
            if !core.is_uniform(segment, first, end, false) {
                return Err(GiveError::PartlyFree);
            }
            core.mark_range(segment, first, end, true);
            Ok(())
        });
        // A nested call that must not wait: the interrupted call takes the block along.
        if given.is_none() && !state.pending.leave(&self.memory, first, order) {
            return Err(FreeError::DoubleFree);
        }
        state.gave();
        Ok(given.unwrap_or(Ok(()))?)
    }

    /// Gives the oldest `count` blocks of an array (its number and order) back to the zone; `false` where the lock could not be had.
    pub(crate) fn flush(
        &self,
        state: &State<L>,
        area: &CpuArea,
        zone: &Zone<L>,
        cache: &ZoneCache,
        (stack, order): (usize, usize),
        count: usize,
    ) -> bool {
        let mut wrong: Option<(GiveError, u64)> = None;
        let mut more = 0;
        let done = self.locked(Some(area), zone, |core| {
            let entries = cache.oldest(stack, count);
            if order <= 5 {
                core.give_entries(zone.start, entries, order, |error, first| {
                    wrong = Some((error, first));
                    more += 1;
                });
            } else {
                for entry in entries {
                    let first = zone.start + u64::from(entry.get());
                    let Some(segment) = segment::find(zone.segments, first) else {
                        continue;
                    };
                    if let Err(error) = core.give(segment, first, order) {
                        wrong = Some((error, first));
                        more += 1;
                    }
                }
            }
            cache.remove_oldest(stack, entries.len());
        });
        if let Some((error, first)) = wrong {
            self.note_misuse(state, error.into(), first, order);
            state.misuse_count.fetch_add(more - 1, Ordering::Relaxed);
        }
        state.gave();
        done.is_some()
    }

    /// Puts the hot block into its array, or gives it to its zone.
    pub(crate) fn stow(&self, state: &State<L>, area: &CpuArea, arrays: &Arrays<'_>) {
        let Some((first, order, migrate)) = arrays.take_hot() else {
            return;
        };
        let kept = self.segment(state, Some(area), first).is_some_and(|part| {
            let cache = arrays.zone(part.zone as usize);
            let entry = first.wrapping_sub(part.start) as u32;
            cache.is_some_and(|cache| cache.push(stack_of(order, migrate), entry))
        });
        if !kept && let Err(error) = self.give_direct(state, Some(area), first, order) {
            self.note_misuse(state, error, first, order);
        }
    }

    /// Gives a block of any order back, from wherever it was.
    fn put(
        &self,
        state: &State<L>,
        area: Option<&CpuArea>,
        first: u64,
        order: usize,
    ) -> Result<(), FreeError> {
        if first & ((1 << order) - 1) != 0 {
            return Err(FreeError::Misaligned);
        }
        if let Some(area) = area
            && is_cached(order)
        {
            let segment = self
                .segment(state, Some(area), first)
                .ok_or(FreeError::Foreign)?;
            if !segment.contains(first, 1 << order) {
                return Err(FreeError::Foreign);
            }
            let index = segment.zone as usize;
            let mut migrate = segment
                .types
                .get(segment.block_of(first))
                .map_or(u8::MAX, |byte| byte.load(Ordering::Relaxed));
            if migrate & UNMANAGED != 0 {
                migrate &= !UNMANAGED;
                let zone = state.zones.get(index).ok_or(FreeError::Foreign)?;
                if !segment.is_clean(first, 1 << order) && !is_managed(state, zone, first, order) {
                    return Err(FreeError::Foreign);
                }
            }
            if usize::from(migrate) < CACHED_TYPES
                && let Some(arrays) = area.enter_or_note()
                && let Some(cache) = arrays.zone(index)
            {
                arrays.look_at(segment, cache, usize::from(migrate));
                let stack = stack_of(order, usize::from(migrate));
                let entry = (first - segment.start) as u32;
                if cache.push(stack, entry) {
                    return Ok(());
                }
                if self.make_room(state, area, index, cache, (stack, order))
                    && cache.push(stack, entry)
                {
                    drop(arrays);
                    self.settle(state, Some(area));
                    return Ok(());
                }
            }
        }
        let result = self.give_direct(state, area, first, order);
        self.settle(state, area);
        result
    }

    /// Empties half of a full array, or all of it where none was refilled since it was flushed last; `false` where nothing can be
    /// cached now.
    #[cold]
    fn make_room(
        &self,
        state: &State<L>,
        area: &CpuArea,
        index: usize,
        cache: &ZoneCache,
        (stack, order): (usize, usize),
    ) -> bool {
        let Some(zone) = state.zones.get(index) else {
            return false;
        };
        let limit = if state.is_refusing() {
            0
        } else {
            zone.limits[order].load(Ordering::Relaxed)
        };
        let count = cache.count(stack);
        cache.set_limit(stack, limit);
        let limit = cache.limit(stack);
        if limit == 0 {
            return false;
        }
        // A limit that was never set, or has grown, has room already.
        if count < limit {
            return true;
        }
        let again = area.note_flush(stack);
        let most = if again { limit } else { limit.div_ceil(2) };
        self.flush(state, area, zone, cache, (stack, order), most as usize)
    }
}

impl<M: PhysMap, C: Cpu, L: RawLock + 'static, K: CpuCall, P: Pressure> Buddy<M, C, L, K, P> {
    /// Frees one block, or says what is wrong with it.
    ///
    /// # Errors
    ///
    /// [`FreeError`] with the block. What is found only when a CPU's cache is flushed is told by [`misuse`](Self::misuse).
    pub fn try_free(&self, frame: OwnedFrame) -> Result<(), (FreeError, OwnedFrame)> {
        let Some(state) = self.state() else {
            return Err((FreeError::NotInitialised, frame));
        };
        let pin = self.cpu.pin();
        let area = state.area(pin.id());
        self.put(state, area, frame.first().number(), frame.order().index())
            .map_err(|error| (error, frame))
    }

    /// Frees a block that was no plain hit.
    #[cold]
    #[inline(never)]
    fn free_cold(&self, first: u64, order: usize) {
        let pin = self.cpu.pin();
        let area = self.own_area(&pin);
        let arrays = area.filter(|_| is_cached(order)).and_then(CpuArea::enter);
        let done = arrays.is_some_and(|arrays| {
            arrays.guess_for(first);
            arrays.push(first, order)
        });
        if !done {
            self.put_or_note(area, first, order);
        }
    }

    /// Gives back a block that this crate took and did not hand out.
    pub(crate) fn give_back(&self, first: u64, order: Order) {
        // SAFETY: the block was taken by this call and given to nobody.
        self.free(unsafe { OwnedFrame::from_raw(Frame::from_number(first), order) });
    }
}

impl<M: PhysMap, C: Cpu, L: RawLock + 'static, K: CpuCall, P: Pressure> FrameSink
    for Buddy<M, C, L, K, P>
{
    #[inline(always)]
    fn free(&self, frame: OwnedFrame) {
        let (first, order) = frame.into_raw();
        let (first, order) = (first.number(), order.index());
        let pin = self.cpu.pin();
        let arrays = self.own_area(&pin).and_then(CpuArea::enter);
        if !arrays.is_some_and(|arrays| arrays.push(first, order)) {
            // The pin is let go first, so that the call is the last thing done here and needs no frame of its own.
            drop(pin);
            self.free_cold(first, order);
        }
    }

    fn free_batch(&self, next: &mut dyn FnMut() -> Option<OwnedFrame>) {
        self.free_bulk(core::iter::from_fn(next));
    }
}
