//! Compaction: page blocks that become wholly free, because what is in them finds room in others.
//!
//! ```text
//!   zone by zone     pages move within their zone: what is free in another is no room for them
//!   1. survey        the partly free blocks of movable memory: those that are cheapest to empty, and how much room there is
//!   2. claim         the cheapest one whose pages find room in the others, and give it back
//! ```
//!
//! A block is gained only if its pages go into blocks that are partly free; in one that is wholly free they undo the gain. So what
//! counts as room follows the order in which a search for one frame takes runs: short ones in partly free blocks first, then whole
//! blocks, and what is left of *long* blocks (see [`Core`]) last. It is room only where no block is whole.
//!
//! Source: Linux mm/compaction.c for the task; the plan takes the place of its two scanners.

use kmem_hal::{Cpu, CpuCall, Frame, FrameRange, Migrate, Order, PhysMap, Pressure, RawLock};

use crate::buddy::Buddy;
use crate::claim::{ClaimError, Targets};
use crate::state::State;
use crate::zone::Zone;
use crate::zone::bits::BLOCK_FRAMES;
use crate::zone::core::{Core, STEP};
use crate::zone::kind::MigrateType;
use crate::zone::segment::Segment;

/// A page block that could be emptied, and what that takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Emptying {
    /// The block's first frame.
    pub first: Frame,
    /// Frames that would have to move.
    pub moves: u32,
}

/// What a compaction did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compacted {
    /// Page blocks that became wholly free.
    pub blocks: u64,
    /// Frames that were moved.
    pub moved: u64,
}

/// What the page blocks of zones are like.
#[derive(Default)]
struct Survey {
    /// Blocks in the plan.
    planned: usize,
    /// Blocks that are wholly free.
    whole: u64,
    /// Those of them that a movable request takes from before it breaks long runs.
    open: u64,
    /// Free frames of partly free blocks of movable memory.
    free: u64,
    /// Those of them that are long runs of long blocks.
    long: u64,
}

impl Survey {
    /// Free frames that pages move to before they break a whole block, of `free` of which `long` are long runs.
    const fn room(&self, free: u64, long: u64) -> u64 {
        if self.open == 0 { free } else { free - long }
    }

    /// Looks at some blocks of a segment.
    fn look(
        &mut self,
        core: &Core,
        segment: &Segment,
        blocks: core::ops::Range<usize>,
        out: &mut [Emptying],
    ) {
        for block in blocks {
            let free = core.free_in(block);
            let movable = core.type_of(block) == MigrateType::Movable;
            let whole = free / BLOCK_FRAMES;
            self.whole += whole;
            self.open += if movable { whole } else { 0 };
            if !movable || free == 0 || whole > 0 {
                continue;
            }
            self.free += free;
            self.long += core.long_in(block);
            // A block with frames that are not the allocator's is room, and can never be whole.
            let base = segment.base_of(block);
            if !core.is_unmanaged(block) && segment.contains(base, BLOCK_FRAMES) {
                let entry = Emptying {
                    first: Frame::from_number(base),
                    moves: (BLOCK_FRAMES - free) as u32,
                };
                self.planned = insert(out, self.planned, entry);
            }
        }
    }
}

impl<M: PhysMap, C: Cpu, L: RawLock + 'static, K: CpuCall, P: Pressure> Buddy<M, C, L, K, P> {
    /// Fills `out` with the page blocks that are cheapest to empty, cheapest first; how many there are.
    ///
    /// Counts blocks of movable memory that are partly free and wholly the allocator's. The same state gives the same plan. A lock is held
    /// for 1 GiB at a time.
    pub fn plan_blocks(&self, out: &mut [Emptying]) -> usize {
        let mut survey = Survey::default();
        if let Some(state) = self.state() {
            for zone in state.zones {
                self.survey(state, zone, &mut survey, out);
            }
        }
        survey.planned
    }

    /// Plans, and counts what there is to gain.
    fn survey(&self, state: &State<L>, zone: &Zone<L>, survey: &mut Survey, out: &mut [Emptying]) {
        for segment in zone.segments {
            let (mut at, end) = (segment.block as usize, segment.block_end());
            while at < end {
                let stop = end.min(at + STEP);
                let _ = self.in_zone(state, segment, |core| {
                    survey.look(core, segment, at..stop, out);
                });
                at = stop;
            }
        }
    }

    /// How many frames are free in the page block that begins with `first`, and how many of them are long runs of a long block.
    fn free_of(&self, state: &State<L>, first: Frame) -> Option<(u64, u64)> {
        let range = FrameRange::of_order(first, Order::HUGE_2M)?;
        let segment = self.whole_segment(state, range).ok()?;
        let block = segment.block_of(first.number());
        self.in_zone(state, segment, |core| {
            (core.free_in(block), core.long_in(block))
        })
        .ok()
    }

    /// Makes up to `blocks` wholly free page blocks by emptying those that are cheapest to empty, first of the zones that this CPU's
    /// requests ask first.
    ///
    /// Pages stay in their zone. Nothing is moved where no block is to be gained: a block is emptied only while its pages find room in
    /// other blocks that are partly free. Blocks that cannot be emptied are passed over; so is a zone whose free frames are its reserve, or
    /// kept from movable requests, as the first of its blocks shows. May sleep as far as `migrate` does; not for interrupts.
    #[doc(alias = "compact_zone")]
    pub fn compact(&self, blocks: u64, migrate: &impl Migrate) -> Compacted {
        let mut done = Compacted::default();
        let Some(state) = self.state() else {
            return done;
        };
        let node = state.node_of(self.cpu.pin().id());
        for &index in state.list(node.index()) {
            if done.blocks >= blocks {
                break;
            }
            if let Some(zone) = state.zones.get(usize::from(index)) {
                let targets = Targets::of_zone(zone, u32::from(index));
                let part =
                    self.compact_zone((state, zone), blocks - done.blocks, (migrate, &targets));
                done.blocks += part.blocks;
                done.moved += part.moved;
            }
        }
        done
    }

    fn compact_zone(
        &self,
        (state, zone): (&State<L>, &Zone<L>),
        blocks: u64,
        (migrate, targets): (&impl Migrate, &Targets),
    ) -> Compacted {
        /// Blocks planned at once; moving changes what is cheapest. So many may be emptied in vain before it ends.
        const PLANNED: usize = 16;
        let mut done = Compacted::default();
        let (mut failed, mut failures) = ([Frame::ZERO; PLANNED], 0);
        let (mut before, mut claimed) = (None, 0);
        loop {
            let mut plan = [Emptying {
                first: Frame::ZERO,
                moves: 0,
            }; PLANNED];
            // What is in arrays is in use by the zones' bits.
            self.drain();
            let mut survey = Survey::default();
            self.survey(state, zone, &mut survey, &mut plan);
            let whole = *before.get_or_insert(survey.whole);
            done.blocks = survey.whole.saturating_sub(whole).min(claimed);
            // A block that was emptied into one that was wholly free, or that others took, is none that was gained.
            let vain = (claimed - done.blocks) as usize + failures;
            let start = (claimed, failures);
            let mut room = survey.room(survey.free, survey.long);
            for next in &plan[..survey.planned] {
                let gained = done.blocks + claimed - start.0;
                let failing = vain + failures - start.1;
                if gained >= blocks || failing >= PLANNED {
                    break;
                }
                // From the first whole block on, long runs are no room.
                if survey.open == 0 && claimed > start.0 {
                    break;
                }
                if failed[..failures].contains(&next.first) {
                    continue;
                }
                let Some((free, long)) = self.free_of(state, next.first) else {
                    continue;
                };
                let moves = u64::from(next.moves);
                // Frames that moved went into blocks of the plan: one that grew is not the cheapest any more.
                let tried = (claimed, failures) != start;
                if tried && free + moves != BLOCK_FRAMES {
                    break;
                }
                // What is free in the block itself is no room for its pages.
                let left = room.saturating_sub(survey.room(free, long));
                if left < moves {
                    continue;
                }
                let range = FrameRange::of_order(next.first, Order::HUGE_2M);
                let emptied =
                    range.map(|range| self.claim_counted(range, migrate, targets, &mut done.moved));
                match emptied {
                    Some(Ok(range)) => {
                        claimed += 1;
                        room = left - moves;
                        // The range was just taken here: it is the allocator's and nobody else's.
                        let _ = self.free_range(range);
                    }
                    // Nor is there a frame for another block's pages: the zone has none, or keeps them from such requests.
                    Some(Err(ClaimError::OutOfMemory(_))) => failures = PLANNED,
                    _ => {
                        failed[failures] = next.first;
                        failures += 1;
                    }
                }
            }
            if (claimed, failures) == start {
                return done;
            }
        }
    }
}

/// Puts an entry into the sorted plan; how long that is now.
fn insert(out: &mut [Emptying], count: usize, entry: Emptying) -> usize {
    let key = |entry: &Emptying| (entry.moves, entry.first);
    let place = out[..count].partition_point(|other| key(other) <= key(&entry));
    if place == out.len() {
        return count;
    }
    let count = (count + 1).min(out.len());
    out[place..count].rotate_right(1);
    out[place] = entry;
    count
}
