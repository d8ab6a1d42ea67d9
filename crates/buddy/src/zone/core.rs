//! The free bits of a zone and everything derived from them: what the zone's lock guards.
//!
//! ```text
//!   request of order k, type t
//!      hints[set of t][j], j = k..=10      the first block that has a maximal run of the smallest order j >= k
//!            |
//!      summaries[block]                    which of its words
//!            |
//!      words[8 * block ..]                 which frames: the lower 2^k of the run are given; the rest stays free
//! ```
//!
//! The words are the truth. The summaries and hints follow, at once where frames are taken, later where single frames or short
//! runs are freed: such a free sets its bits and, where the word's summary changes, marks the word *stale*, which costs a few
//! instructions. A search brings the lowest stale blocks up to date first, and all of them before it says that there is no run, so
//! that under the lock a search that finds nothing has proved that no run exists.
//!
//! Invariants
//! - `I1`: a set bit is a free frame of a segment; bits outside segments are never set.
//! - `I2`: `summaries[b]` byte w is `bits::summary(words[8 b + w])`, or has its stale bit and is the summary of the word at an
//!   earlier time, since when frames of it were only freed.
//! - `I3`: `hints[s][j]` has bit b exactly if block b's type is in set s and it has a maximal run of order j by its summaries,
//!   where orders 9 and 10 are: wholly free without or with a wholly free pair of compatible type (bit of the even block).
//!   Orders 7 and 8 of a *long* block have rows of their own.
//! - `I4`: `free` is the number of set bits.
//! - `I5`: the last hint bitmap has the bit of every block that has a stale word (and may have others').
//!
//! Short and long blocks are kept apart: a page block that is broken up for order 7 or 8 serves these orders only, as long as others can
//! be had. Where few objects share a page block it is soon free as a whole again; one small object among them would keep it.
//!
//! Costs: a take changes words of one block, their summary bytes, and the hints of the orders that appear or vanish in
//! the block; a give of order <= 5 a word, and a stale bit where the word's summary changes. A find is one bitmap search
//! an order. Stale blocks are brought up to date once for all frees since the last time, at most [`STEP`] of them while the lock is held.

mod check;
mod find;
mod give;
mod lists;
mod span;
mod stale;
mod take;
mod types;

use kmem_hal::sync::AtomicU8;

use super::bitmap::Shape;
use super::bits::{ORDERS, WHOLE, WORDS};
use super::kind::MigrateType;
use super::segment::Segment;

pub(crate) use find::Found;
pub(crate) use give::GiveError;
pub(crate) use take::Give;

/// Stale blocks that a search brings up to date before it begins.
pub(crate) const FEW: usize = 64;
/// Stale blocks that are brought up to date under one lock before a refusal.
pub(crate) const STEP: usize = 512;
/// Bitmaps of a set: one for each order, and those of orders 7 and 8 in long blocks.
const ROWS: usize = ORDERS + 2;
/// The row of an order in long blocks is so much higher.
const LONG: usize = ORDERS - LONG_ORDERS.start;
/// Orders that are kept apart from shorter ones; longer ones take whole blocks.
const LONG_ORDERS: core::ops::Range<usize> = 7..9;
/// Bitmaps: the hints of both sets, and the stale blocks.
const BITMAPS: usize = 2 * ROWS + 1;
/// The set whose only bitmap is that of the stale blocks.
const STALE_SET: usize = 2;

/// The locked part of a zone.
pub(crate) struct Core {
    pub segments: &'static [Segment],
    pub words: &'static mut [u64],
    /// A byte a word.
    pub summaries: &'static mut [[u8; WORDS]],
    /// Written under the lock; read by frees without it, as a hint which cache to use.
    pub types: &'static [AtomicU8],
    /// Both sets, all rows, one after the other; then the stale blocks, then a bit for each long block.
    pub hints: &'static mut [u64],
    pub shape: Shape,
    /// For each set the rows whose bitmap is not empty, a bit each; then whether blocks are stale.
    pub present: [u16; 3],
    /// Page blocks that changed their type for a request of another, since the zone last looked.
    pub stolen: u64,
    /// Page blocks of type `HighAtomic`.
    pub high_atomic: u64,
    pub free: u64,
    /// Free frames in blocks of type `Cma`, of which movable requests alone may count.
    pub free_cma: u64,
}

impl Core {
    /// Words of hints for `blocks` blocks.
    pub const fn hint_words(blocks: usize) -> usize {
        BITMAPS * Shape::new(blocks).words() + blocks.div_ceil(64)
    }

    pub(super) fn is_whole(&self, block: usize) -> bool {
        self.summaries_of(block) == WHOLE
    }

    /// The summaries of a block's words; that of the first word is the lowest byte.
    #[inline(always)]
    pub fn summaries_of(&self, block: usize) -> u64 {
        u64::from_le_bytes(self.summaries[block])
    }

    #[inline(always)]
    pub(super) fn put_summaries(&mut self, block: usize, summaries: u64) {
        self.summaries[block] = summaries.to_le_bytes();
    }

    /// Free frames of a block.
    pub fn free_in(&self, block: usize) -> u64 {
        self.words[block * WORDS..(block + 1) * WORDS]
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    pub(super) fn account(&mut self, block: usize, frames: u64, freed: bool) {
        let cma = self.type_of(block) == MigrateType::Cma;
        if freed {
            self.free += frames;
            self.free_cma += if cma { frames } else { 0 };
        } else {
            self.free -= frames;
            self.free_cma -= if cma { frames } else { 0 };
        }
    }
}
