//! When memory is short: who waits for what, and who has to go.
//!
//! ```text
//!   fault ── OutOfMemory ── reclaim ── freed some ──> fault again
//!     │                        ├─ all on its way to a device ── wait ──> fault again
//!     │                        └─ nothing ──> OutOfMemory: the kernel asks for a victim (badness) and ends it
//!     └──── NeedIo(ticket) ── wait ──> fault again
//! ```
//!
//! Source: Linux `mm/oom_kill.c` (`oom_badness`), `mm/page_alloc.c` (`__alloc_pages_slowpath`).

use kmem_hal::sync::Ordering;
use kmem_hal::{FrameRequest, IoTicket, NodeId, PageFault, Pressure, PressureLevel, Shrink};

use crate::env::Env;
use crate::fault::Outcome;
use crate::mm::Mm;
use crate::reclaim::Reclaimer;
use crate::replacement::{Clock, Replacement};
use crate::space::AddressSpace;

/// Pages that are asked for at a time (`SWAP_CLUSTER_MAX`).
const BATCH: u64 = 32;

/// How often in a row nothing may come of reclaim before it is believed.
const TRIES: u32 = 8;

/// A process as the choice of a victim sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OomScore {
    /// Pages in memory, in swap and of page tables: what its end gives back.
    pub pages: u64,
    /// `oom_score_adj`: thousandths of all memory that are added, -1000 for "never".
    pub adjustment: i16,
}

impl OomScore {
    /// How bad it is that the process lives, in pages; `None` for one that may not be chosen.
    ///
    /// `total` is all memory and swap, in pages.
    ///
    /// # Examples
    ///
    /// ```
    /// use kmem_cow_mm::OomScore;
    ///
    /// let small = OomScore { pages: 100, adjustment: 500 };
    /// let large = OomScore { pages: 400, adjustment: 0 };
    /// assert_eq!(small.badness(1000), Some(600));
    /// assert_eq!(large.badness(1000), Some(400));
    /// assert_eq!(OomScore { adjustment: -1000, ..large }.badness(1000), None);
    /// ```
    #[doc(alias = "oom_badness")]
    #[must_use]
    pub fn badness(&self, total: u64) -> Option<u64> {
        if self.adjustment <= -1000 {
            return None;
        }
        let part = total / 1000;
        let weight = part.saturating_mul(u64::from(self.adjustment.unsigned_abs()));
        Some(if self.adjustment < 0 {
            self.pages.saturating_sub(weight)
        } else {
            self.pages.saturating_add(weight)
        })
    }
}

/// The process whose end gives back most: of `processes`, whatever names them; the first of several equals.
///
/// `total` is all memory and swap, in pages.
///
/// # Examples
///
/// ```
/// use kmem_cow_mm::{OomScore, oom_victim};
///
/// let scores = [("init", 50, -1000), ("editor", 300, 0), ("browser", 900, 0)];
/// let processes = scores.map(|(name, pages, adjustment)| (name, OomScore { pages, adjustment }));
/// assert_eq!(oom_victim(processes, 4096), Some("browser"));
/// ```
#[doc(alias = "select_bad_process")]
pub fn oom_victim<T>(processes: impl IntoIterator<Item = (T, OomScore)>, total: u64) -> Option<T> {
    let mut worst: Option<(T, u64)> = None;
    for (process, score) in processes {
        let Some(badness) = score.badness(total) else {
            continue;
        };
        if worst.as_ref().is_none_or(|(_, most)| badness > *most) {
            worst = Some((process, badness));
        }
    }
    worst.map(|(process, _)| process)
}

impl<E: Env> AddressSpace<'_, E> {
    /// What the choice of a victim needs to know of this space: a walk over its tables.
    #[must_use]
    pub fn oom_score(&self, adjustment: i16) -> OomScore {
        let usage = self.recount();
        let resident = usage.rss_anon + usage.rss_file + usage.rss_shmem;
        OomScore {
            pages: resident + self.swapped() + usage.tables,
            adjustment,
        }
    }

    /// Handles a fault, and waits and reclaims until it has an answer: never [`Outcome::NeedIo`], and
    /// [`Outcome::OutOfMemory`] only where nothing can be reclaimed any more.
    ///
    /// `wait` returns when the I/O of a ticket may be done, or at once: it is asked after again.
    ///
    /// Context: as [`Reclaimer::reclaim`]; for kernels whose faults may sleep.
    pub fn fault_with<P: Replacement>(
        &self,
        fault: &PageFault,
        reclaimer: &mut Reclaimer<P>,
        mut wait: impl FnMut(IoTicket),
    ) -> Outcome {
        let mut tries = 0;
        loop {
            match self.fault(fault) {
                Outcome::NeedIo(ticket) => wait(ticket),
                Outcome::OutOfMemory if tries < TRIES => {
                    let made = reclaimer.reclaim(self.mm(), BATCH);
                    match made.ticket {
                        _ if made.freed > 0 => tries = 0,
                        Some(ticket) => {
                            wait(ticket);
                            tries += 1;
                        }
                        None => tries += 1,
                    }
                }
                outcome => return outcome,
            }
        }
    }
}

/// What memory pressure asked for, until the background thread looks.
impl<E: Env> Mm<'_, E> {
    /// How short memory was since the last call: what a background thread reclaims for.
    ///
    /// [`Pressure::pressure`] notes it, from wherever an allocation was made; nothing is reclaimed there, since whoever allocates may hold
    /// any lock.
    pub fn take_pressure(&self) -> Option<PressureLevel> {
        match self.counts().pressure.swap(0, Ordering::AcqRel) {
            0 => None,
            1 => Some(PressureLevel::Low),
            2 => Some(PressureLevel::Min),
            _ => Some(PressureLevel::Refusing),
        }
    }

    /// Does what a background thread does once: where memory was short since the last call, frees a batch of pages for each step of
    /// shortness. Gives how many pages were freed.
    #[doc(alias = "balance_pgdat")]
    pub fn balance<P: Replacement>(&self, reclaimer: &mut Reclaimer<P>) -> u64 {
        let batches = match self.take_pressure() {
            None => return 0,
            Some(PressureLevel::Low) => 1,
            Some(PressureLevel::Min) => 2,
            Some(PressureLevel::Refusing) => 4,
        };
        reclaimer.reclaim(self, BATCH * batches).freed
    }
}

impl<E: Env> Pressure for Mm<'_, E> {
    /// Notes how short memory is ([`Mm::take_pressure`]); frees nothing by itself.
    fn pressure(&self, _node: NodeId, level: PressureLevel, _request: &FrameRequest) -> bool {
        let level = match level {
            PressureLevel::Low => 1,
            PressureLevel::Min => 2,
            PressureLevel::Refusing => 3,
        };
        self.counts().pressure.fetch_max(level, Ordering::AcqRel);
        false
    }
}

impl<E: Env> Shrink for Mm<'_, E> {
    /// Pages of programs and files that nothing keeps: an upper bound, by a walk over all frames.
    fn count(&self) -> usize {
        let info = self.meminfo();
        let pages = info.inactive + info.active - info.shared;
        usize::try_from(pages).unwrap_or(usize::MAX)
    }

    /// Frees pages that were not used lately: the clock, from the first frame on. Context as [`Reclaimer::reclaim`].
    fn scan(&self, objects: usize) -> usize {
        let made = Reclaimer::new(Clock).reclaim(self, objects as u64);
        usize::try_from(made.freed).unwrap_or(usize::MAX)
    }
}
