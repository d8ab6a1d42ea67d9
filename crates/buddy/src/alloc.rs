//! Allocation: from the CPU's array, else from the zones in order, else after a drain, else refused honestly.
//!
//! ```text
//!   hit in the array of the first allowed zone                     no locked instruction
//!   1. zones above the low watermark                               one lock for half an array, or a whole one
//!   2. zones above the min watermark           reclaim is told: Low
//!   3. the same after all CPUs' caches were emptied                reclaim is told: Min
//!   4. the same after page blocks that were kept for others were let go
//!   5. the same again as long as reclaim frees something           reclaim is asked: Refusing
//!   6. OutOfMemory, or OutOfMemoryHere where some CPU's cache could not be asked
//! ```
//!
//! An optional request goes no further than 2, and tells of `Low` where frames are short, not where only blocks of its order are.

use core::ops::ControlFlow;

use kmem_hal::{
    AllocError, Context, Cpu, CpuCall, CpuId, Frame, FrameRange, FrameRequest, FrameSource, NodeId,
    NodePolicy, Order, OwnedFrame, PhysMap, Pressure, PressureLevel, RawLock,
};

use crate::buddy::Buddy;
use crate::cpu_cache::{Arrays, CpuArea, MAX_BATCH, Refill, is_cached, is_fetched_ahead, stack_of};
use crate::cpus::Drained;
use crate::state::State;
use crate::wanted::{Wanted, is_plain};
use crate::zone::bits::TOP;
use crate::zone::core::Give;
use crate::zone::kind::MigrateType;
use crate::zone::{Mark, Zone, segment};

/// How often reclaim may say that it freed something before a request is refused all the same.
const RETRIES: u32 = 16;

/// Where blocks that are taken from a zone go: first to the caller, then into an array.
struct Taken<'a, 'b> {
    out: &'a mut [u64],
    given: usize,
    refill: Option<Refill<'b>>,
    /// The zone's first frame, from which entries count.
    start: u64,
}

impl Give for Taken<'_, '_> {
    #[inline]
    fn one(&mut self, first: u64) {
        self.run(first, 1, 0);
    }

    #[inline]
    fn run(&mut self, first: u64, count: usize, order: usize) {
        let places = &mut self.out[self.given..];
        let direct = places.len().min(count);
        for (at, place) in places[..direct].iter_mut().enumerate() {
            *place = first + ((at as u64) << order);
        }
        self.given += direct;
        if let Some(refill) = self.refill.as_mut().filter(|_| direct < count) {
            let entry = first + ((direct as u64) << order) - self.start;
            refill.push(entry as u32, count - direct, 1 << order);
        }
    }
}

/// What one look at the zones brought.
pub(crate) enum Attempt {
    /// So many blocks.
    Got(usize),
    Nothing,
    /// A nested call met a lock that only the interrupted code can let go.
    Busy,
}

impl<M: PhysMap, C: Cpu, L: RawLock + 'static, K: CpuCall, P: Pressure> Buddy<M, C, L, K, P> {
    /// The node whose list serves the request.
    #[inline]
    pub(crate) fn node_for(
        &self,
        state: &State<L>,
        area: Option<&CpuArea>,
        node: NodePolicy,
    ) -> usize {
        let local = area.map_or(0, |area| area.node.get() as usize);
        let wanted = match node {
            NodePolicy::Local => local,
            NodePolicy::Preferred(node) | NodePolicy::Strict(node) => node.index(),
            NodePolicy::Interleave => area.map_or(0, |area| {
                let next = area.interleave.get();
                area.interleave.set(next.wrapping_add(1));
                next as usize % state.nodes
            }),
        };
        if wanted < state.nodes { wanted } else { local }
    }

    /// The common case: the newest entry of the CPU's array for the zone that served last.
    #[inline(always)]
    fn hit(&self, request: &FrameRequest) -> Option<u64> {
        if !is_plain(request) {
            return None;
        }
        let pin = self.cpu.pin();
        let arrays = self.own_area(&pin)?.enter()?;
        arrays.pop(request.order.index(), MigrateType::of(request.mobility))
    }

    /// Looks at all zones once, at one watermark, and fills `out` as far as it goes.
    pub(crate) fn attempt(
        &self,
        state: &State<L>,
        request: &FrameRequest,
        level: Mark,
        out: &mut [u64],
    ) -> Attempt {
        let wanted = Wanted::new(request);
        let pin = self.cpu.pin();
        let area = state.area(pin.id());
        let arrays = area.and_then(CpuArea::enter_or_note);
        if let (Some(area), Some(arrays)) = (area, arrays.as_ref()) {
            self.stow(state, area, arrays);
        }
        let node = self.node_for(state, area, request.node);
        let mut busy = false;
        for &index in state.list(node) {
            let index = usize::from(index);
            let Some(zone) = state.zones.get(index) else {
                continue;
            };
            if !wanted.admits(zone) {
                continue;
            }
            match self.fill_from(area, arrays.as_ref(), zone, index, &wanted, level, out) {
                Some(0) => {}
                Some(given) => {
                    drop(arrays);
                    self.settle(state, area);
                    return Attempt::Got(given);
                }
                None => busy = true,
            }
        }
        drop(arrays);
        self.settle(state, area);
        if busy {
            Attempt::Busy
        } else {
            Attempt::Nothing
        }
    }

    /// Fills `out` from one zone and its array; `None` where the lock could not be had.
    #[allow(clippy::too_many_arguments)]
    fn fill_from(
        &self,
        area: Option<&CpuArea>,
        arrays: Option<&Arrays<'_>>,
        zone: &Zone<L>,
        index: usize,
        wanted: &Wanted,
        level: Mark,
        out: &mut [u64],
    ) -> Option<usize> {
        let cached = is_cached(wanted.order) && wanted.align == wanted.order;
        let array = arrays.filter(|_| cached).and_then(|arrays| {
            let stack = stack_of(wanted.order, wanted.migrate as usize);
            Some((arrays, stack, arrays.zone(index)?))
        });
        let mut given = 0;
        if let Some((_, stack, cache)) = array {
            let limit = wanted.limit - zone.start;
            given = cache.pop_batch(stack, 1 << wanted.order, limit, out.len(), |entry| {
                out[given] = zone.start + u64::from(entry);
                given += 1;
            });
        }
        let missing = out.len() - given;
        let spare = wanted.spare(zone, level) >> wanted.order;
        if missing == 0 || spare == 0 {
            return Some(given);
        }
        // Half an array with what is missing, of single frames a whole word; all of it where nothing came back since the last time.
        // As far as the watermark lets.
        let mut refill = None;
        if let Some((_, stack, cache)) = array {
            let closed = self.state().is_some_and(State::is_refusing);
            let limit = if closed {
                0
            } else {
                zone.limits[wanted.order].load(kmem_hal::sync::Ordering::Relaxed)
            };
            cache.set_limit(stack, limit);
            // A batch call takes what it needs and leaves the array as it is.
            if is_fetched_ahead(wanted.order) && wanted.limit >= zone.end() && out.len() == 1 {
                let limit = cache.limit(stack) as usize;
                let again = area.is_some_and(|area| area.note_refill(stack));
                let fetch = if again { limit } else { limit / 2 };
                refill = Some(cache.refill(stack, fetch.max(2) - 1));
            }
        }
        let extra = refill.as_ref().map_or(0, Refill::room);
        let most = (missing + extra)
            .min(MAX_BATCH)
            .min(usize::try_from(spare).unwrap_or(MAX_BATCH));
        let before = given;
        let mut taken = Taken {
            out,
            given,
            refill,
            start: zone.start,
        };
        let mut done = Some(true);
        while done == Some(true) {
            done = self.locked(area, zone, |core| {
                if level == Mark::Min && wanted.atomic {
                    wanted.take_atomic(core, zone.most_high_atomic(), &mut taken)
                } else {
                    wanted.take(core, most, &mut taken)
                }
            });
        }
        given = taken.given;
        drop(taken);
        if let Some((arrays, _, cache)) = array
            && wanted.plain
            && given > before
        {
            arrays.serve_from(wanted.migrate, cache);
        }
        if done.is_none() && given == 0 {
            return None;
        }
        Some(given)
    }

    /// Fills `out` with at least one block or says why not: everything beyond a hit.
    #[cold]
    pub(crate) fn alloc_slow(
        &self,
        state: &State<L>,
        request: &FrameRequest,
        out: &mut [u64],
    ) -> Result<usize, AllocError> {
        let node = match request.node {
            NodePolicy::Strict(node) | NodePolicy::Preferred(node) => node,
            _ => state.memory_node_of(self.cpu.pin().id()),
        };
        let mut look = |level| match self.attempt(state, request, level, out) {
            Attempt::Got(count) => ControlFlow::Break(Ok(count)),
            Attempt::Busy => ControlFlow::Break(Err(AllocError::Busy)),
            Attempt::Nothing => ControlFlow::Continue(()),
        };
        if let ControlFlow::Break(result) = look(Mark::Low) {
            return result;
        }
        let wanted = Wanted::new(request);
        if !state.zones.iter().any(|zone| wanted.admits(zone)) {
            return Err(AllocError::Unsatisfiable);
        }
        let admitted = || state.zones.iter().filter(|zone| wanted.admits(zone));
        // Frames that lie in smaller blocks than it wants are no reason to reclaim for what has another way.
        let has_frames = |zone| wanted.spare(zone, Mark::Low) >> wanted.order > 0;
        if !request.optional || !admitted().any(has_frames) {
            self.pressure.pressure(node, PressureLevel::Low, request);
            admitted().for_each(Zone::calm);
        }
        if let ControlFlow::Break(result) = look(Mark::Min) {
            return result;
        }
        if request.optional {
            // Neither arrays of other CPUs nor what is kept for others goes for it.
            return Err(AllocError::OutOfMemoryHere);
        }
        self.pressure.pressure(node, PressureLevel::Min, request);
        let mut retries = 0;
        loop {
            let found = self.look_honestly(state, |_| look(Mark::Min).break_value());
            let drained = match found {
                Ok(result) => return result,
                Err(drained) => drained,
            };
            if self.release_high_atomic(state, &wanted) {
                continue;
            }
            // Only a caller that may wait may ask for reclaim; a caller that is part of reclaim must not.
            let may_reclaim = request.context >= Context::NoIo && retries < RETRIES;
            if may_reclaim
                && self
                    .pressure
                    .pressure(node, PressureLevel::Refusing, request)
            {
                retries += 1;
                continue;
            }
            return Err(match drained {
                Drained::All => AllocError::OutOfMemory,
                Drained::Here => AllocError::OutOfMemoryHere,
            });
        }
    }

    /// Lets the request have what was kept from it; whether that was anything.
    pub(crate) fn release_high_atomic(&self, state: &State<L>, wanted: &Wanted) -> bool {
        let pin = self.cpu.pin();
        let area = state.area(pin.id());
        let mut any = false;
        for zone in state.zones {
            if wanted.admits(zone) && zone.high_atomic() > 0 {
                let to = wanted.migrate;
                any |= self.locked(area, zone, |core| core.release_high_atomic(to)) == Some(true);
            }
        }
        self.settle(state, area);
        any
    }

    /// An allocation that was no plain hit. The request comes by value: a caller that makes one for a hit need not store it.
    #[cold]
    #[inline(never)]
    fn alloc_cold(
        &self,
        request: FrameRequest,
        hit: Option<u64>,
    ) -> Result<OwnedFrame, AllocError> {
        if let Some(first) = hit {
            return self.finish(&request, first);
        }
        if request.order.index() > TOP {
            return self.alloc_huge(&request);
        }
        let state = self.state().ok_or(AllocError::NotInitialised)?;
        let mut out = [0];
        self.alloc_slow(state, &request, &mut out)?;
        self.finish(&request, out[0])
    }

    /// Makes the value for a block that was just taken, zeroed if asked.
    #[inline]
    pub(crate) fn finish(
        &self,
        request: &FrameRequest,
        first: u64,
    ) -> Result<OwnedFrame, AllocError> {
        // SAFETY: O1: the zone's bits, an array's entry, gave the block to this call alone; O2: runs are naturally
        // aligned in segments; O3: frames come back to the allocator as `OwnedFrame`s, which no TLB translates to.
        let frame = unsafe { OwnedFrame::from_raw(Frame::from_number(first), request.order) };
        if request.zeroed && !self.zero(frame.range()) {
            kmem_hal::FrameSink::free(self, frame);
            return Err(AllocError::Busy);
        }
        Ok(frame)
    }

    /// Fills frames that this call owns with zeros; `false` where no temporary mapping was to be had.
    pub(crate) fn zero(&self, range: FrameRange) -> bool {
        if self.memory.reach().contains_range(range) {
            // SAFETY: the caller owns the frames, and they are in reach.
            unsafe { self.memory.zero(range) };
            return true;
        }
        range.iter().all(|frame| {
            // A temporary mapping is its CPU's.
            let _pin = self.cpu.pin();
            let Some(pointer) = self.memory.map_temporary(frame) else {
                return false;
            };
            // SAFETY: P5: the mapping is this call's and covers a frame that the caller owns.
            unsafe {
                pointer
                    .as_ptr()
                    .write_bytes(0, kmem_hal::PAGE_SIZE as usize);
                self.memory.unmap_temporary(pointer);
            }
            true
        })
    }

    /// A block above the top order: a range that is as long as it is aligned.
    #[cold]
    pub(crate) fn alloc_huge(&self, request: &FrameRequest) -> Result<OwnedFrame, AllocError> {
        let order = request.order;
        if order > Order::HUGE_1G && order.frames() > Frame::LIMIT / 2 {
            return Err(AllocError::Unsatisfiable);
        }
        let align = request.alignment.max(order);
        let range = self.take_range(order.frames(), align, request)?;
        self.finish(request, range.first().number())
    }
}

// SAFETY: F1: a block's bits are set while it is free, and cleared under the lock when it is taken, so that no two calls get
// it; segments are memory that firmware calls usable. F2: limits, alignment and zones are checked where runs are found,
// zeroing in `finish`. F3: a refused call moved blocks between caches and zones at most.
unsafe impl<M: PhysMap, C: Cpu, L: RawLock + 'static, K: CpuCall, P: Pressure> FrameSource
    for Buddy<M, C, L, K, P>
{
    // Always: with the request known where it is made, most of a hit is folded away.
    #[inline(always)]
    fn alloc(&self, request: &FrameRequest) -> Result<OwnedFrame, AllocError> {
        match self.hit(request) {
            Some(first) if !request.zeroed => {
                // SAFETY: O1, O2, O3 as in `finish`: the entry was this CPU's alone and is out of the array now.
                Ok(unsafe { OwnedFrame::from_raw(Frame::from_number(first), request.order) })
            }
            hit => self.alloc_cold(*request, hit),
        }
    }

    fn alloc_batch(
        &self,
        request: &FrameRequest,
        count: usize,
        give: &mut dyn FnMut(OwnedFrame),
    ) -> Result<usize, AllocError> {
        self.alloc_bulk(request, count, give)
    }

    /// 1 before `init`.
    fn node_count(&self) -> u16 {
        self.state().map_or(1, |state| state.nodes as u16)
    }

    fn node_of_cpu(&self, cpu: CpuId) -> NodeId {
        self.state()
            .map_or(NodeId::ZERO, |state| state.memory_node_of(cpu))
    }

    fn node_of_frame(&self, frame: Frame) -> NodeId {
        let zone = self.state().and_then(|state| {
            let segment = segment::find(state.segments, frame.number())?;
            state.zones.get(segment.zone as usize)
        });
        zone.map_or(NodeId::ZERO, |zone| zone.node)
    }

    fn node_distance(&self, from: NodeId, to: NodeId) -> u8 {
        self.state()
            .map_or(10, |state| state.distance_between(from, to))
    }
}
