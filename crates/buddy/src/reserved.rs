//! The runs that are present and not the allocator's.
//!
//! Writers hold the lock of [`State::reserved_lock`](crate::state::State) and make `version` odd meanwhile; readers of single frames take no
//! lock and look at the version before and after. A free looks here only where its page block is in part not the allocator's.

use kmem_hal::sync::{AtomicU64, Ordering, fence, spin_loop};
use kmem_hal::{Frame, FrameRange};

use crate::boot::Reservation;
use crate::error::FreeError;

/// A reserved run of frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReservedRun {
    pub first: u64,
    pub end: u64,
    pub why: Reservation,
}

/// A place of the reserved list; empty where a run's end is not above its first frame.
pub(crate) struct ReservedSlot {
    /// The first frame's number, and in the upper byte why.
    first: AtomicU64,
    end: AtomicU64,
}

const WHY: u32 = 56;
// An end may be one beyond the last frame number.
const _: () = assert!(Frame::LIMIT < 1 << WHY);

impl ReservedSlot {
    kmem_hal::const_new! {
        /// An empty place.
        pub fn new() -> Self {
            Self { first: AtomicU64::new(0), end: AtomicU64::new(0) }
        }
    }

    fn run(&self) -> ReservedRun {
        let first = self.first.load(Ordering::Relaxed);
        ReservedRun {
            first: first & ((1 << WHY) - 1),
            end: self.end.load(Ordering::Relaxed),
            why: Reservation::from_byte((first >> WHY) as u8),
        }
    }

    fn set(&self, run: ReservedRun) {
        let first = run.first | (run.why as u64) << WHY;
        self.first.store(first, Ordering::Relaxed);
        self.end.store(run.end, Ordering::Relaxed);
    }
}

/// The list: see the module.
pub(crate) struct Reserved {
    slots: &'static [ReservedSlot],
    version: AtomicU64,
    reach_first: AtomicU64,
    reach_end: AtomicU64,
}

impl Reserved {
    pub fn new(slots: &'static [ReservedSlot]) -> Self {
        Self {
            slots,
            version: AtomicU64::new(0),
            reach_first: AtomicU64::new(0),
            reach_end: AtomicU64::new(0),
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = ReservedRun> + '_ {
        let runs = self.slots.iter().map(ReservedSlot::run);
        runs.filter(|run| run.first < run.end)
    }

    /// The frames that had been mapped when memory was last taken over.
    pub fn reach(&self) -> FrameRange {
        let first = self.reach_first.load(Ordering::Relaxed);
        FrameRange::from_numbers(first, self.reach_end.load(Ordering::Relaxed))
            .unwrap_or(FrameRange::EMPTY)
    }

    /// Whether `first..end` are the allocator's: not reserved, and in reach unless the zone needs none.
    ///
    /// Takes no lock. A call that interrupted a change of the list believes its caller.
    #[cold]
    pub fn is_managed(&self, first: u64, end: u64, needs_reach: bool) -> bool {
        for _ in 0..64 {
            let before = self.version.load(Ordering::Acquire);
            let reserved = self.iter().any(|run| run.first < end && first < run.end);
            let reach = self.reach();
            let reached =
                !needs_reach || first >= reach.first().number() && end <= reach.end_number();
            if !planted!(ReservedReaderUnfenced) {
                fence(Ordering::Acquire);
            }
            if before & 1 == 0 && self.version.load(Ordering::Relaxed) == before {
                return reached && !reserved;
            }
            spin_loop();
        }
        true
    }

    /// Runs `f`, which changes the list; the caller holds the lock.
    pub fn change<R>(&self, f: impl FnOnce(&Self) -> R) -> R {
        let version = self.version.load(Ordering::Relaxed);
        if !planted!(ReservedVersionEven) {
            self.version.store(version | 1, Ordering::Relaxed);
        }
        if !planted!(ReservedWriterUnfenced) {
            fence(Ordering::Release);
        }
        let result = f(self);
        self.version.store((version | 1) + 1, Ordering::Release);
        result
    }

    pub fn set_reach(&self, reach: FrameRange) {
        self.reach_first
            .store(reach.first().number(), Ordering::Relaxed);
        self.reach_end.store(reach.end_number(), Ordering::Relaxed);
    }

    /// Adds a run where the list has room.
    pub fn push(&self, run: ReservedRun) -> bool {
        let is_empty = |slot: &&ReservedSlot| slot.run().first >= slot.run().end;
        let free = self.slots.iter().find(is_empty);
        free.inspect(|slot| slot.set(run)).is_some()
    }

    /// Takes `first..end` off a run that wholly contains it and is reserved for what `of` names, the allocator's own tables apart.
    ///
    /// # Errors
    ///
    /// [`FreeError::Foreign`] where there is none, [`FreeError::ListFull`] where it would be cut in two and there is no room.
    pub fn remove(
        &self,
        first: u64,
        end: u64,
        of: impl Fn(Reservation) -> bool,
    ) -> Result<(), FreeError> {
        let holds = |run: ReservedRun| {
            let freed = run.why != Reservation::Tables && of(run.why);
            freed && run.first <= first && end <= run.end
        };
        let holder = self.slots.iter().find(|slot| holds(slot.run()));
        let Some(slot) = holder.filter(|_| first < end) else {
            return Err(FreeError::Foreign);
        };
        let run = slot.run();
        let (below, above) = (
            ReservedRun { end: first, ..run },
            ReservedRun { first: end, ..run },
        );
        if run.first == first {
            slot.set(above);
        } else if run.end == end || self.push(above) {
            slot.set(below);
        } else {
            return Err(FreeError::ListFull);
        }
        Ok(())
    }
}
