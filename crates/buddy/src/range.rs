//! Memory by place and by length: fixed addresses, ranges above the top order, memory that joins later.

use core::fmt;

use kmem_hal::{
    AllocError, Cpu, CpuCall, Frame, FrameRange, FrameRequest, NodePolicy, Order, OwnedFrame,
    PhysMap, Pressure, RawLock,
};

use crate::boot::Reservation;
use crate::buddy::{Buddy, take_over};
use crate::cpus::Drained;
use crate::error::{FreeError, PlaceError};
use crate::reserved::Reserved;
use crate::state::{self, State};
use crate::wanted::Wanted;
use crate::watermark;
use crate::zone::Mark;
use crate::zone::bits::{BLOCK_FRAMES, WHOLE};
use crate::zone::core::Core;
use crate::zone::kind::MigrateType;
use crate::zone::segment;

/// The sole ownership of a run of frames of any length.
///
/// Like an [`OwnedFrame`] it frees nothing when it is dropped: [`Buddy::free_range`] does.
#[must_use = "dropping an owned range leaks it; free it"]
#[derive(PartialEq, Eq)]
pub struct OwnedRange(FrameRange);

impl OwnedRange {
    /// The owner of frames that were just taken for it.
    pub(crate) const fn made(range: FrameRange) -> Self {
        Self(range)
    }

    /// The frames.
    #[must_use]
    pub const fn range(&self) -> FrameRange {
        self.0
    }

    /// The range as naturally aligned blocks, each to be freed alone.
    pub fn into_blocks(self, top: Order) -> impl Iterator<Item = OwnedFrame> {
        // SAFETY: the range owned the frames; the blocks tile it without overlap and are naturally aligned.
        self.0
            .blocks(top)
            .map(|(first, order)| unsafe { OwnedFrame::from_raw(first, order) })
    }
}

impl fmt::Debug for OwnedRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Owned{:?}", self.0)
    }
}

impl Core {
    /// Takes `count` free frames from number `first`, which lie in one segment.
    pub(crate) fn mark_found(&mut self, first: u64, count: u64) {
        if let Some(segment) = segment::find(self.segments, first) {
            self.mark_range(segment, first, first + count, false);
        }
    }
}

impl<M: PhysMap, C: Cpu, L: RawLock + 'static, K: CpuCall, P: Pressure> Buddy<M, C, L, K, P> {
    /// Finds and takes a run of `frames` frames that starts at a multiple of `align`.
    pub(crate) fn take_range(
        &self,
        frames: u64,
        align: Order,
        request: &FrameRequest,
    ) -> Result<FrameRange, AllocError> {
        let state = self.state().ok_or(AllocError::NotInitialised)?;
        let wanted = Wanted::new(request);
        let fits = |zone: &crate::zone::Zone<L>| {
            wanted.admits(zone)
                && zone
                    .segments
                    .iter()
                    .any(|part| part.end - part.first >= frames)
        };
        if frames == 0 || !state.zones.iter().any(fits) {
            return Err(AllocError::Unsatisfiable);
        }
        let look = || {
            self.look_for_range(state, frames, align, (&wanted, request.node))
                .transpose()
        };
        if let Some(result) = look() {
            return result;
        }
        if request.optional {
            // As in `alloc_slow`.
            return Err(AllocError::OutOfMemoryHere);
        }
        loop {
            let refusal = match self.look_honestly(state, |_| look()) {
                Ok(result) => return result,
                Err(Drained::All) => AllocError::OutOfMemory,
                Err(Drained::Here) => AllocError::OutOfMemoryHere,
            };
            if !self.release_high_atomic(state, &wanted) {
                return Err(refusal);
            }
        }
    }

    fn look_for_range(
        &self,
        state: &State<L>,
        frames: u64,
        align: Order,
        (wanted, node): (&Wanted, NodePolicy),
    ) -> Result<Option<FrameRange>, AllocError> {
        let pin = self.cpu.pin();
        let area = state.area(pin.id());
        let node = self.node_for(state, area, node);
        for &index in state.list(node) {
            let zone = &state.zones[usize::from(index)];
            if !wanted.admits(zone) || wanted.spare(zone, Mark::Min) < frames {
                continue;
            }
            let found = self.locked(area, zone, |core| {
                let first = core.find_range(frames, align.frames(), wanted.limit, |migrate| {
                    wanted.may_use(migrate)
                })?;
                core.mark_found(first, frames);
                let segment = segment::find(core.segments, first)?;
                let mut at = first.next_multiple_of(BLOCK_FRAMES);
                while at + BLOCK_FRAMES <= first + frames {
                    let block = segment.block_of(at);
                    if !matches!(
                        core.type_of(block),
                        MigrateType::Cma | MigrateType::HighAtomic
                    ) {
                        core.set_type(segment, block, wanted.migrate);
                    }
                    at += BLOCK_FRAMES;
                }
                Some(first)
            });
            self.settle(state, area);
            match found {
                Some(Some(first)) => return Ok(FrameRange::from_numbers(first, first + frames)),
                Some(None) => {}
                None => return Err(AllocError::Busy),
            }
        }
        Ok(None)
    }

    /// Allocates `frames` contiguous frames, any number of them, that start at a multiple of `align`.
    ///
    /// The request's order is not looked at; its address limit, node, mobility, zeroing and reserve are.
    ///
    /// # Errors
    ///
    /// [`AllocError`] as for a block.
    ///
    /// # Examples
    ///
    /// ```
    /// # use kmem_buddy::{BootMap, Buddy, Config, PlaceError, RegionKind, ZoneLimits};
    /// # use kmem_hal::{Frame, FrameRange, FrameRequest, FrameSink, OffsetMap, Order, PhysAddr, SingleCpu};
    /// # let arena = Box::leak(vec![0u8; 17 << 20].into_boxed_slice());
    /// # let base = (arena.as_mut_ptr().expose_provenance() + 0xf_ffff) & !0xf_ffff;
    /// # let mut map: BootMap = BootMap::new();
    /// # map.push(PhysAddr::new(0), 16 << 20, RegionKind::Usable)?;
    /// # let (memory, cpu) = unsafe { (OffsetMap::new(base, 4096), SingleCpu::new()) };
    /// # let buddy: Buddy<_, _> = Buddy::new(memory, cpu);
    /// # // SAFETY: X1: nobody else uses the memory of the map.
    /// # unsafe { buddy.init(&mut map, &Config::new().limits(ZoneLimits::NORMAL_ONLY))? };
    /// // 6 MiB, more than the largest block, on a boundary of 2 MiB.
    /// let range = buddy.alloc_range(1536, Order::HUGE_2M, &FrameRequest::ONE.movable())?;
    /// assert!(range.range().first().is_aligned(Order::HUGE_2M));
    /// buddy.free_range(range).unwrap();
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "alloc_contig_pages")]
    pub fn alloc_range(
        &self,
        frames: u64,
        align: Order,
        request: &FrameRequest,
    ) -> Result<OwnedRange, AllocError> {
        let range = OwnedRange(self.take_range(frames, align, request)?);
        if request.zeroed && !self.zero(range.0) {
            // Taken by this call and given to nobody: no wrong free is possible.
            let _ = self.free_range(range);
            return Err(AllocError::Busy);
        }
        Ok(range)
    }

    /// Frees a range.
    ///
    /// # Errors
    ///
    /// [`FreeError`] with the range, unchanged.
    #[doc(alias = "free_contig_range")]
    pub fn free_range(&self, range: OwnedRange) -> Result<(), (FreeError, OwnedRange)> {
        let Some(state) = self.state() else {
            return Err((FreeError::NotInitialised, range));
        };
        let (first, end) = (range.0.first().number(), range.0.end_number());
        let pin = self.cpu.pin();
        let area = state.area(pin.id());
        let Some(segment) = self.segment(state, area, first) else {
            return Err((FreeError::Foreign, range));
        };
        if range.0.is_empty() || !segment.contains(first, end - first) {
            return Err((FreeError::Foreign, range));
        }
        let zone = &state.zones[segment.zone as usize];
        let freed = self.locked(area, zone, |core| {
            let taken = core.is_uniform(segment, first, end, false);
            if taken {
                core.mark_range(segment, first, end, true);
            } else if core.is_uniform(segment, first, end, true) {
                return Err(FreeError::DoubleFree);
            }
            taken.then_some(()).ok_or(FreeError::WrongOrder)
        });
        state.gave();
        self.settle(state, area);
        match freed {
            Some(Ok(())) => Ok(()),
            Some(Err(error)) => Err((error, range)),
            None => {
                // Nested in a holder: block by block, which the interrupted call takes along.
                for block in range.into_blocks(Order::MAX_BUDDY) {
                    let (first, order) = block.into_raw();
                    if let Err(error) = self.give_direct(state, area, first.number(), order.index())
                    {
                        self.note_misuse(state, error, first.number(), order.index());
                    }
                }
                Ok(())
            }
        }
    }

    /// Allocates the block of `order` at exactly `first`.
    ///
    /// # Errors
    ///
    /// [`PlaceError`]; nothing was taken then.
    ///
    /// # Examples
    ///
    /// ```
    /// # use kmem_buddy::{BootMap, Buddy, Config, PlaceError, RegionKind, ZoneLimits};
    /// # use kmem_hal::{Frame, FrameRange, FrameRequest, FrameSink, OffsetMap, Order, PhysAddr, SingleCpu};
    /// # let arena = Box::leak(vec![0u8; 17 << 20].into_boxed_slice());
    /// # let base = (arena.as_mut_ptr().expose_provenance() + 0xf_ffff) & !0xf_ffff;
    /// # let mut map: BootMap = BootMap::new();
    /// # map.push(PhysAddr::new(0), 16 << 20, RegionKind::Usable)?;
    /// # let (memory, cpu) = unsafe { (OffsetMap::new(base, 4096), SingleCpu::new()) };
    /// # let buddy: Buddy<_, _> = Buddy::new(memory, cpu);
    /// # // SAFETY: X1: nobody else uses the memory of the map.
    /// # unsafe { buddy.init(&mut map, &Config::new().limits(ZoneLimits::NORMAL_ONLY))? };
    /// let vga = Frame::new(0xa0).unwrap();
    /// let block = buddy.alloc_at(vga, Order::new(5).unwrap())?;
    /// assert_eq!(buddy.alloc_at(vga, Order::ZERO), Err(PlaceError::InUse));
    /// buddy.free(block);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn alloc_at(&self, first: Frame, order: Order) -> Result<OwnedFrame, PlaceError> {
        if !first.is_aligned(order) {
            return Err(PlaceError::Foreign);
        }
        let range = FrameRange::of_order(first, order).ok_or(PlaceError::Foreign)?;
        let _owned = self.alloc_range_at(range)?;
        // SAFETY: O1: just taken for this call; O2: checked above; O3: it was free.
        Ok(unsafe { OwnedFrame::from_raw(first, order) })
    }

    /// Allocates exactly the frames of `range`.
    ///
    /// # Errors
    ///
    /// [`PlaceError`]; nothing was taken then.
    ///
    /// # Examples
    ///
    /// ```
    /// # use kmem_buddy::{BootMap, Buddy, Config, PlaceError, RegionKind, ZoneLimits};
    /// # use kmem_hal::{Frame, FrameRange, FrameRequest, FrameSink, OffsetMap, Order, PhysAddr, SingleCpu};
    /// # let arena = Box::leak(vec![0u8; 17 << 20].into_boxed_slice());
    /// # let base = (arena.as_mut_ptr().expose_provenance() + 0xf_ffff) & !0xf_ffff;
    /// # let mut map: BootMap = BootMap::new();
    /// # map.push(PhysAddr::new(0), 16 << 20, RegionKind::Usable)?;
    /// # let (memory, cpu) = unsafe { (OffsetMap::new(base, 4096), SingleCpu::new()) };
    /// # let buddy: Buddy<_, _> = Buddy::new(memory, cpu);
    /// # // SAFETY: X1: nobody else uses the memory of the map.
    /// # unsafe { buddy.init(&mut map, &Config::new().limits(ZoneLimits::NORMAL_ONLY))? };
    /// let buffer = FrameRange::from_numbers(0x300, 0x345).unwrap();
    /// let owned = buddy.alloc_range_at(buffer)?;
    /// // Freed as a whole, or in pieces that are blocks.
    /// owned.into_blocks(Order::MAX_BUDDY).for_each(|block| buddy.free(block));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn alloc_range_at(&self, range: FrameRange) -> Result<OwnedRange, PlaceError> {
        let state = self.state().ok_or(PlaceError::NotInitialised)?;
        let look = || self.take_at(state, range).transpose();
        if let Some(result) = look() {
            return result;
        }
        match self.look_honestly(state, |_| look()) {
            Ok(result) => result,
            Err(Drained::All) => Err(PlaceError::InUse),
            Err(Drained::Here) => Err(PlaceError::InUseHere),
        }
    }

    /// Takes the frames of `range` where all of them are in the zone.
    fn take_at(
        &self,
        state: &State<L>,
        range: FrameRange,
    ) -> Result<Option<OwnedRange>, PlaceError> {
        let pin = self.cpu.pin();
        let area = state.area(pin.id());
        let (first, end) = (range.first().number(), range.end_number());
        let segment = self
            .segment(state, area, first)
            .filter(|part| !range.is_empty() && part.contains(first, end - first))
            .ok_or(PlaceError::Foreign)?;
        let zone = &state.zones[segment.zone as usize];
        let taken = self.locked(area, zone, |core| {
            let free =
                core.is_uniform(segment, first, end, true) && core.is_takeable(segment, first, end);
            if free {
                core.mark_range(segment, first, end, false);
            }
            free
        });
        self.settle(state, area);
        let taken = taken.ok_or(PlaceError::Busy)?;
        Ok(taken.then_some(OwnedRange(range)))
    }

    /// Runs `f` with the list of reserved runs; interrupts of this CPU will not wait for it.
    pub(crate) fn with_reserved<R>(&self, state: &State<L>, f: impl FnOnce(&Reserved) -> R) -> R {
        self.holding(state, || {
            let _guard = state.reserved_lock.lock();
            f(&state.reserved)
        })
    }

    /// Takes over the frames that became mapped since `init` or the last call; how many.
    ///
    /// Not to be called from interrupts.
    pub fn extend(&self) -> u64 {
        let Some(state) = self.state() else { return 0 };
        let reach = self.memory.reach();
        let gained = self.with_reserved(state, |reserved| {
            let before = reserved.reach();
            // First: whoever gets one of the new frames may free it before the last part has joined.
            reserved.change(|reserved| reserved.set_reach(reach));
            let mut gained = 0;
            for part in difference(reach, before) {
                for_each_unreserved(reserved, part, |range| {
                    gained += join(state, range, reach);
                });
            }
            gained
        });
        watermark::set_up(state);
        gained
    }

    /// Frees everything that was reserved for `why` at boot: boot structures once read, the initrd, init sections.
    ///
    /// Gives the number of frames. The allocator's own tables ([`Reservation::Tables`]) are never freed. Not to be called from
    /// interrupts.
    ///
    /// # Safety
    ///
    /// Nobody uses that memory any more, and no TLB translates to it.
    #[doc(alias = "free_initmem")]
    pub unsafe fn release(&self, why: Reservation) -> u64 {
        let Some(state) = self.state() else { return 0 };
        let mut freed = 0;
        loop {
            let next = self.with_reserved(state, |reserved| {
                let run = reserved.iter().find(|run| run.why == why)?;
                release_run(state, reserved, (run.first, run.end), |of| of == why).ok()
            });
            match next {
                Some(frames) => freed += frames,
                None => break,
            }
        }
        watermark::set_up(state);
        freed
    }

    /// Frees reserved frames, such as an early allocation; how many.
    ///
    /// # Errors
    ///
    /// [`FreeError::Foreign`] where the frames are not one reserved run or a part of one, or are the allocator's own tables;
    /// [`FreeError::ListFull`] where they lie amid a run and there is no room to cut it in two.
    ///
    /// # Safety
    ///
    /// As [`release`](Self::release).
    #[doc(alias = "free_reserved_area")]
    pub unsafe fn release_range(&self, range: FrameRange) -> Result<u64, FreeError> {
        let state = self.state().ok_or(FreeError::NotInitialised)?;
        let run = (range.first().number(), range.end_number());
        let freed = self.with_reserved(state, |reserved| {
            release_run(state, reserved, run, |_| true)
        });
        watermark::set_up(state);
        freed
    }
}

/// What of `whole` is not in `hole`: up to two ranges.
fn difference(whole: FrameRange, hole: FrameRange) -> impl Iterator<Item = FrameRange> {
    let parts = if hole.is_empty() {
        [whole, FrameRange::EMPTY]
    } else {
        let (below, rest) = whole.split_at(hole.first().number());
        [below, rest.split_at(hole.end_number()).1]
    };
    parts.into_iter().filter(|part| !part.is_empty())
}

/// Calls `give` for each part of `range` that no reserved run touches.
fn for_each_unreserved(reserved: &Reserved, range: FrameRange, mut give: impl FnMut(FrameRange)) {
    let (mut at, end) = (range.first().number(), range.end_number());
    while at < end {
        let next = reserved
            .iter()
            .filter(|run| run.end > at && run.first < end)
            .min_by_key(|run| run.first);
        let stop = next.map_or(end, |run| run.first.max(at));
        if let Some(part) = FrameRange::from_numbers(at, stop)
            && !part.is_empty()
        {
            give(part);
        }
        at = next.map_or(end, |run| run.end);
    }
}

/// Frees `range`, which came into reach; how many frames.
fn join<L: RawLock + 'static>(state: &State<L>, range: FrameRange, reach: FrameRange) -> u64 {
    let managed = |state: &State<L>| -> u64 { state.zones.iter().map(|zone| zone.managed()).sum() };
    let old = managed(state);
    for (segment, part) in state::cut(state.zones, range) {
        let zone = &state.zones[segment.zone as usize];
        if crate::buddy::needs_no_reach(zone.kind) {
            // High memory joined at `init`.
            continue;
        }
        take_over(state, part, reach);
        state.gave();
        clear_flags(zone, segment, part);
    }
    managed(state) - old
}

/// Blocks that became wholly free have no frames any more that are not the allocator's.
fn clear_flags<L: RawLock + 'static>(
    zone: &crate::zone::Zone<L>,
    segment: &segment::Segment,
    part: FrameRange,
) {
    let Some(last) = part.last() else { return };
    zone.locked(|core| {
        for block in segment.block_of(part.first().number())..=segment.block_of(last.number()) {
            if core.summaries_of(block) == WHOLE {
                core.set_unmanaged(block, false);
            }
        }
    });
}

/// Takes `first..end` off what is reserved for what `of` names and frees what no other run touches; how many frames.
fn release_run<L: RawLock + 'static>(
    state: &State<L>,
    reserved: &Reserved,
    (first, end): (u64, u64),
    of: impl Fn(Reservation) -> bool,
) -> Result<u64, FreeError> {
    let range = FrameRange::from_numbers(first, end).ok_or(FreeError::Foreign)?;
    reserved.change(|reserved| reserved.remove(first, end, of))?;
    let reach = reserved.reach();
    let mut freed = 0;
    for_each_unreserved(reserved, range, |part| {
        for (segment, part) in state::cut(state.zones, part) {
            let zone = &state.zones[segment.zone as usize];
            let before = zone.managed();
            take_over(state, part, reach);
            state.gave();
            clear_flags(zone, segment, part);
            freed += zone.managed() - before;
        }
    });
    Ok(freed)
}
