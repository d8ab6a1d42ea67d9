//! Emptying ranges: CMA, taking memory offline and [compaction](crate::compact) are one mechanism.
//!
//! ```text
//!   1. isolate    the range's page blocks leave all lists: nothing is allocated from them any more
//!   2. drain      frames in CPUs' arrays come back
//!   3. move       each frame that is still taken: Migrate::migrate(frame, a new one), and the old one comes back
//!   4. take       all bits are free: cleared under one lock, and the range is the caller's
//! ```
//!
//! Whatever fails, the blocks go back on their lists and everything that was moved stays moved, which nobody can tell.
//!
//! Invariants
//! - `I1`: an isolated block remembers its type; exactly one claim has isolated it.
//! - `I2`: frees into isolated blocks pass the arrays by, so that step 3 ends.
//!
//! Source: Linux mm/page_alloc.c `alloc_contig_range`, mm/page_isolation.c, mm/cma.c.

use core::fmt;

use kmem_hal::{
    AllocError, Context, Cpu, CpuCall, Frame, FrameRange, FrameRequest, FrameSink, FrameSource,
    Migrate, MigrateError, NodePolicy, Order, OwnedFrame, PAGE_SIZE, PhysAddr, PhysMap, Pressure,
    RawLock,
};

use crate::buddy::Buddy;
use crate::cpus::Drained;
use crate::error::PlaceError;
use crate::range::OwnedRange;
use crate::state::State;
use crate::zone::Zone;
use crate::zone::bits::BLOCK_FRAMES;
use crate::zone::core::Core;
use crate::zone::kind::MigrateType;
use crate::zone::segment::{self, Segment};

/// How often a frame that is pinned, or was freed under our hands, is looked at again.
const RETRIES: u32 = 4;

/// Why a range could not be emptied and taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ClaimError {
    /// The allocator has not been initialised.
    NotInitialised,
    /// Not wholly memory of one zone of this allocator.
    Foreign,
    /// Another claim is emptying some of it, or a nested call met a lock of the interrupted code.
    Busy,
    /// This frame belongs to nobody who could move it.
    NotMovable(Frame),
    /// Nobody says that this frame is his: it may be free, in the cache of a CPU that could not be asked.
    NotAsked(Frame),
    /// This frame is pinned.
    Pinned(Frame),
    /// No frame was left to move this one to.
    OutOfMemory(Frame),
    /// No place in the area is free or can be emptied.
    NoRoom,
}

impl fmt::Display for ClaimError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotInitialised => f.write_str("the allocator has not been initialised"),
            Self::Foreign => f.write_str("not memory of one zone of this allocator"),
            Self::Busy => f.write_str("somebody else is emptying it"),
            Self::NotMovable(frame) => write!(f, "frame {frame} belongs to no movable owner"),
            Self::NotAsked(frame) => write!(
                f,
                "frame {frame} may be in the cache of a CPU that could not be asked"
            ),
            Self::Pinned(frame) => write!(f, "frame {frame} is pinned"),
            Self::OutOfMemory(frame) => write!(f, "no memory to move frame {frame} to"),
            Self::NoRoom => f.write_str("no place in the area can be emptied"),
        }
    }
}

impl core::error::Error for ClaimError {}

/// Memory that is lent to movable users until a device claims it.
///
/// Several areas may exist, one for each device or one that devices share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CmaArea {
    name: &'static str,
    range: FrameRange,
}

impl CmaArea {
    /// The area's name.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// The area's frames.
    #[must_use]
    pub const fn range(&self) -> FrameRange {
        self.range
    }
}

/// Which frames the pages of a range may move to.
pub(crate) struct Targets {
    request: FrameRequest,
    /// The index of the only zone that they may be of.
    zone: Option<u32>,
}

impl Targets {
    /// Whatever any movable request gets.
    const ANY: Self = Self {
        request: FrameRequest::ONE.movable().context(Context::NoReclaim),
        zone: None,
    };

    /// Those of one zone.
    pub fn of_zone<L: RawLock>(zone: &Zone<L>, index: u32) -> Self {
        // The zone is the first that such a request asks: others of its node that begin below its end are lower ones.
        let last = Frame::from_number(zone.end() - 1).start();
        let strict = NodePolicy::Strict(zone.node);
        let mut request = Self::ANY.request.node(strict).optional();
        request.max_address = PhysAddr::new(last.as_u64() | (PAGE_SIZE - 1));
        Self {
            request,
            zone: Some(index),
        }
    }

    fn admit<L>(&self, state: &State<L>, target: &OwnedFrame) -> bool {
        self.zone.is_none_or(|zone| {
            segment::find(state.segments, target.first().number())
                .is_some_and(|segment| segment.zone == zone)
        })
    }
}

impl Core {
    /// Takes the blocks of `first..end` off all lists; `false`, and nothing done, where one is isolated already.
    fn isolate(&mut self, segment: &Segment, first: u64, end: u64) -> bool {
        let blocks = segment.block_of(first)..=segment.block_of(end - 1);
        if blocks
            .clone()
            .any(|block| self.type_of(block) == MigrateType::Isolate)
        {
            return false;
        }
        for block in blocks {
            self.isolate_block(segment, block);
        }
        true
    }

    /// Makes the blocks of `first..end`, which are whole, a CMA area's; `false`, and nothing done, where they are not free.
    fn lend(&mut self, segment: &Segment, first: u64, end: u64) -> bool {
        let free =
            self.is_uniform(segment, first, end, true) && self.is_takeable(segment, first, end);
        if free {
            for block in segment.block_of(first)..=segment.block_of(end - 1) {
                self.set_type(segment, block, MigrateType::Cma);
            }
        }
        free
    }

    fn restore(&mut self, segment: &Segment, first: u64, end: u64) {
        for block in segment.block_of(first)..=segment.block_of(end - 1) {
            self.restore_block(segment, block);
        }
    }
}

impl<M: PhysMap, C: Cpu, L: RawLock + 'static, K: CpuCall, P: Pressure> Buddy<M, C, L, K, P> {
    /// Runs `f` under the lock of the zone of a segment.
    pub(crate) fn in_zone<R>(
        &self,
        state: &State<L>,
        segment: &Segment,
        f: impl FnOnce(&mut Core) -> R,
    ) -> Result<R, ClaimError> {
        let pin = self.cpu.pin();
        let area = state.area(pin.id());
        let zone = &state.zones[segment.zone as usize];
        let result = self.locked(area, zone, f);
        self.settle(state, area);
        result.ok_or(ClaimError::Busy)
    }

    /// The segment that wholly contains a range.
    pub(crate) fn whole_segment(
        &self,
        state: &State<L>,
        range: FrameRange,
    ) -> Result<&'static Segment, ClaimError> {
        segment::find(state.segments, range.first().number())
            .filter(|segment| {
                !range.is_empty() && segment.contains(range.first().number(), range.count())
            })
            .ok_or(ClaimError::Foreign)
    }

    /// Lends `range` to movable users as a CMA area.
    ///
    /// The range consists of whole page blocks (2 MiB) and is free now: called at boot. No CPU may remember a block of it as one of another
    /// type that it lent: so where other CPUs have arrays, they are asked, and a kernel that cannot ask them
    /// ([`NoCpuCall`](kmem_hal::NoCpuCall)) makes its areas before it brings them up.
    ///
    /// # Errors
    ///
    /// [`PlaceError`]; nothing has changed then. [`PlaceError::Busy`] where a CPU could not be asked.
    #[doc(alias = "cma_declare_contiguous")]
    pub fn cma_area(&self, name: &'static str, range: FrameRange) -> Result<CmaArea, PlaceError> {
        let state = self.state().ok_or(PlaceError::NotInitialised)?;
        let (first, end) = (range.first().number(), range.end_number());
        let segment = self
            .whole_segment(state, range)
            .map_err(|_| PlaceError::Foreign)?;
        if !first.is_multiple_of(BLOCK_FRAMES) || !end.is_multiple_of(BLOCK_FRAMES) {
            return Err(PlaceError::Foreign);
        }
        let lend = |drained| {
            // A CPU that was not asked may remember a block of the range.
            if drained != Drained::All {
                return Some(Err(PlaceError::Busy));
            }
            let lent = self.in_zone(state, segment, |core| core.lend(segment, first, end));
            match lent {
                Ok(true) => Some(Ok(CmaArea { name, range })),
                Ok(false) => None,
                Err(_) => Some(Err(PlaceError::Busy)),
            }
        };
        match self.look_honestly(state, lend) {
            Ok(result) => result,
            Err(Drained::All) => Err(PlaceError::InUse),
            Err(Drained::Here) => Err(PlaceError::InUseHere),
        }
    }

    /// Claims `frames` contiguous frames of an area, aligned to `align`: free ones, or ones that `migrate` can empty.
    ///
    /// Given back with [`free_range`](Self::free_range). May sleep as far as `migrate` does.
    ///
    /// # Errors
    ///
    /// [`ClaimError`]; nothing was taken then. [`ClaimError::NoRoom`] where nothing in the area can be emptied; where that is because
    /// somebody else is emptying some of it, or a CPU could not be asked, the error says so.
    ///
    /// Source: Linux mm/cma.c `cma_alloc`, which goes on at `EBUSY`.
    #[doc(alias = "cma_alloc")]
    pub fn cma_claim(
        &self,
        area: &CmaArea,
        frames: u64,
        align: Order,
        migrate: &impl Migrate,
    ) -> Result<OwnedRange, ClaimError> {
        let state = self.state().ok_or(ClaimError::NotInitialised)?;
        let segment = self.whole_segment(state, area.range)?;
        let end = area.range.end_number();
        if frames > area.range.count() {
            return Err(ClaimError::NoRoom);
        }
        let round = |at: u64| (at + align.frames() - 1) & !(align.frames() - 1);
        let first = round(area.range.first().number());
        if frames == 0 || first + frames > end {
            return Err(ClaimError::NoRoom);
        }
        // A place where nothing has to move, if there is one.
        let mut free = first;
        while free + frames <= end {
            let taken = self.in_zone(state, segment, |core| {
                core.next_taken(segment, free, free + frames)
            })?;
            match taken {
                None => break,
                Some(taken) => free = round(taken + 1),
            }
        }
        if free + frames > end {
            free = first;
        }
        // Otherwise the first place that can be emptied; whatever stands in the way is stepped over.
        let mut refusal = ClaimError::NoRoom;
        for (from, stop) in [(free, end), (first, free)] {
            let mut at = from;
            while at < stop && at + frames <= end {
                let range = FrameRange::from_numbers(at, at + frames).ok_or(ClaimError::Foreign)?;
                let after = match self.claim(range, migrate) {
                    Ok(claimed) => return Ok(claimed),
                    Err(ClaimError::NotMovable(frame) | ClaimError::Pinned(frame)) => {
                        frame.number()
                    }
                    Err(error @ ClaimError::NotAsked(frame)) => {
                        refusal = error;
                        frame.number()
                    }
                    // Somebody else empties a page block of it: on to the next one.
                    Err(ClaimError::Busy) => {
                        refusal = ClaimError::Busy;
                        at | (BLOCK_FRAMES - 1)
                    }
                    Err(error) => return Err(error),
                };
                at = round(after + 1);
            }
        }
        Err(refusal)
    }

    /// Empties and takes exactly the frames of `range`.
    ///
    /// For CMA, for taking memory offline (the range is then kept), and for compaction (it is then freed). May sleep as far
    /// as `migrate` does; not for interrupts.
    ///
    /// # Errors
    ///
    /// [`ClaimError`] with the frame that stood in the way; nothing was taken then.
    #[doc(alias = "alloc_contig_range")]
    pub fn claim(
        &self,
        range: FrameRange,
        migrate: &impl Migrate,
    ) -> Result<OwnedRange, ClaimError> {
        self.claim_counted(range, migrate, &Targets::ANY, &mut 0)
    }

    /// The same; counts the pages that moved, also those of a claim that fails.
    pub(crate) fn claim_counted(
        &self,
        range: FrameRange,
        migrate: &impl Migrate,
        targets: &Targets,
        moved: &mut u64,
    ) -> Result<OwnedRange, ClaimError> {
        let state = self.state().ok_or(ClaimError::NotInitialised)?;
        let segment = self.whole_segment(state, range)?;
        let (first, end) = (range.first().number(), range.end_number());
        if !self.in_zone(state, segment, |core| core.isolate(segment, first, end))? {
            return Err(ClaimError::Busy);
        }
        let drained = self.drain();
        let emptied = self
            .empty(state, segment, (first, end), (migrate, targets), moved)
            .map_err(|error| match error {
                // No owner spoke for the frame, and not everybody was asked for free ones.
                ClaimError::NotMovable(frame) if drained == Drained::Here => {
                    ClaimError::NotAsked(frame)
                }
                error => error,
            });
        // Nested calls never get here: what isolated the blocks had the lock, and waits for it again.
        self.in_zone(state, segment, |core| {
            let free = emptied.is_ok() && core.is_uniform(segment, first, end, true);
            if free {
                core.mark_range(segment, first, end, false);
            }
            core.restore(segment, first, end);
            free
        })
        .inspect(|_| state.gave())
        .and_then(|taken| {
            emptied?;
            // A frame that came and went between the last look and the lock.
            taken
                .then_some(OwnedRange::made(range))
                .ok_or(ClaimError::Busy)
        })
    }

    /// Moves away whatever is left in an isolated range.
    fn empty(
        &self,
        state: &State<L>,
        segment: &Segment,
        (first, end): (u64, u64),
        (migrate, targets): (&impl Migrate, &Targets),
        moved: &mut u64,
    ) -> Result<(), ClaimError> {
        let mut at = first;
        let mut tries = 0;
        loop {
            let taken = self.in_zone(state, segment, |core| core.next_taken(segment, at, end))?;
            let Some(number) = taken else {
                return Ok(());
            };
            let frame = Frame::from_number(number);
            if number != at {
                (at, tries) = (number, 0);
            }
            let target = self.alloc(&targets.request).map_err(|error| match error {
                AllocError::Busy => ClaimError::Busy,
                _ => ClaimError::OutOfMemory(frame),
            })?;
            if !targets.admit(state, &target) {
                self.free(target);
                return Err(ClaimError::OutOfMemory(frame));
            }
            tries += 1;
            match migrate.migrate(frame, target) {
                Ok(old) => {
                    *moved += 1;
                    self.free(old);
                }
                Err((reason, target)) => {
                    self.free(target);
                    match reason {
                        MigrateError::Gone | MigrateError::Pinned if tries < RETRIES => {}
                        MigrateError::Pinned => return Err(ClaimError::Pinned(frame)),
                        MigrateError::OutOfMemory => return Err(ClaimError::OutOfMemory(frame)),
                        _ => return Err(ClaimError::NotMovable(frame)),
                    }
                }
            }
        }
    }
}
