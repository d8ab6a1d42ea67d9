//! Finding a run: in blocks of the request's type, else in those of others.

use super::super::bits::{self, BLOCK_FRAMES, BLOCK_ORDER, EACH, ORDERS, STALE, TOP, WORDS};
use super::super::kind::MigrateType;
use super::super::segment;
use super::{Core, LONG, LONG_ORDERS, ROWS};

/// A run to be taken: in `block`, from frame `offset` of it, maximal of order `order`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    pub block: usize,
    pub offset: u32,
    pub order: usize,
}

impl Core {
    /// Finds the lowest maximal run of the smallest order >= `order` in blocks of `migrate`, ending its first
    /// `2^order` frames at or below frame number `limit`.
    ///
    /// Short orders are sought in short blocks, then in whole ones, then in long ones; orders 7 and 8 in long blocks, then in whole
    /// ones, then in short ones.
    pub fn find(&mut self, order: usize, migrate: MigrateType, limit: u64) -> Option<Found> {
        const WHOLE_ROWS: u16 = 1 << BLOCK_ORDER | 1 << TOP;
        let set = migrate.hint_set()?;
        let present = self.present[set];
        if !LONG_ORDERS.contains(&order) {
            // Rows of long blocks come last.
            let rows = present >> order << order;
            return self.find_in(set, rows, order, migrate, limit);
        }
        let long = present >> (order + LONG) << (order + LONG);
        let short = (present >> order << order) & !(!0 << LONG_ORDERS.end);
        [long, present & WHOLE_ROWS, short]
            .into_iter()
            .find_map(|rows| self.find_in(set, rows, order, migrate, limit))
    }

    /// The same in some rows, lowest first.
    #[inline]
    fn find_in(
        &mut self,
        set: usize,
        mut rows: u16,
        order: usize,
        migrate: MigrateType,
        limit: u64,
    ) -> Option<Found> {
        while rows != 0 {
            let row = rows.trailing_zeros() as usize;
            rows &= rows - 1;
            let run = if row < ORDERS { row } else { row - LONG };
            if run >= order {
                let found = self.find_exact(set, row, run, order, migrate, limit);
                if found.is_some() {
                    return found;
                }
            }
        }
        None
    }

    /// The lowest maximal run of exactly order `run` in a row, of which `2^order` frames fit below `limit`.
    pub(super) fn find_exact(
        &mut self,
        set: usize,
        row: usize,
        run: usize,
        order: usize,
        migrate: MigrateType,
        limit: u64,
    ) -> Option<Found> {
        let mut from = 0;
        while self.present[set] >> row & 1 != 0
            && let Some(block) = self.hint_next(set, row, from)
        {
            if self.type_of(block) == migrate {
                if self.summaries_of(block) & STALE != 0 {
                    // The run may be part of a longer one by now.
                    self.refresh_block(block);
                    from = block;
                    continue;
                }
                let offset = self.locate(block, run);
                let found = Found {
                    block,
                    offset,
                    order: run,
                };
                // The first one is the lowest: where it ends too high, all do.
                return (self.frame_of(&found)? + (1 << order) <= limit).then_some(found);
            }
            from = block + 1;
        }
        None
    }

    /// The lowest maximal run of order `order` in `block`, which has one.
    pub(super) fn locate(&self, block: usize, order: usize) -> u32 {
        if order >= BLOCK_ORDER {
            return 0;
        }
        let summaries = self.summaries_of(block);
        if order >= 6 {
            let starts = bits::maximal_words(bits::whole_words(summaries), order);
            return starts.trailing_zeros() * 64;
        }
        let having = summaries & (EACH << order);
        let word = having.trailing_zeros() as usize / 8;
        let starts = bits::maximal(self.words[block * WORDS + word % WORDS], order);
        word as u32 * 64 + starts.trailing_zeros()
    }

    /// The frame number of a run.
    pub fn frame_of(&self, found: &Found) -> Option<u64> {
        let segment = segment::of_block(self.segments, found.block)?;
        Some(segment.base_of(found.block) + u64::from(found.offset))
    }

    /// Finds a run in blocks of other types, and makes a block this type's where most of it is free.
    ///
    /// Movable requests first borrow from CMA. Then the largest run of a fallback type, whose block then changes type (a free block, or one that is free by
    /// half); otherwise the smallest run that fits, whose block keeps its type. Source: Linux mm/page_alloc.c,
    /// `__rmqueue_cma_fallback`,
    /// `__rmqueue_claim` and `__rmqueue_steal`.
    pub fn find_fallback(
        &mut self,
        order: usize,
        migrate: MigrateType,
        limit: u64,
    ) -> Option<Found> {
        if migrate == MigrateType::Movable
            && let Some(lent) = self.find(order, MigrateType::Cma, limit)
        {
            return Some(lent);
        }
        /// Rows by falling length of their runs.
        const LONGEST_FIRST: [usize; ROWS] = [10, 9, 8 + LONG, 8, 7 + LONG, 7, 6, 5, 4, 3, 2, 1, 0];
        for row in LONGEST_FIRST {
            let run = if row < ORDERS { row } else { row - LONG };
            if run < order {
                break;
            }
            for &from in migrate.fallbacks() {
                let found = from
                    .hint_set()
                    .and_then(|set| self.find_exact(set, row, run, order, from, limit));
                let Some(found) = found else { continue };
                let segment = segment::of_block(self.segments, found.block)?;
                if run >= BLOCK_ORDER || self.free_in(found.block) >= BLOCK_FRAMES / 2 {
                    self.set_type(segment, found.block, migrate);
                    self.stolen += 1;
                    if run > BLOCK_ORDER {
                        self.set_type(segment, found.block + 1, migrate);
                    }
                    return self.find(order, migrate, limit);
                }
            }
        }
        migrate
            .fallbacks()
            .iter()
            .find_map(|&from| self.find(order, from, limit))
    }
}
