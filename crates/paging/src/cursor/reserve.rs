//! How many tables an operation needs, so that they are there before its first store.
//!
//! The counts are made without locks, and are upper bounds: a table that reaches beyond the range may be emptied by others meanwhile, and counts as
//! missing.
//!
//! Costs: a walk from the root for each table that the range may need.

use kmem_hal::{AllocError, FrameHandle, Grace, Order, Page, PageRange};

use super::Cursor;
use crate::env::Env;
use crate::format::{Format, Kind, leaf_level, level};
use crate::mutants::mutant;
use crate::node::{Node, View};
use crate::quiescent::Liveness;
use crate::table::index_at;

impl<'t, F: Format, E: Env, H: FrameHandle, S: Liveness> Cursor<'t, F, E, H, S> {
    /// Takes frames for the tables that mapping all of `range` with leaves of `order` still needs, so that this cannot
    /// fail for want of memory; gives how many are in reserve. What is not used goes back when the cursor is dropped.
    ///
    /// Tables that others may empty meanwhile (those that reach beyond the range) count as missing.
    ///
    /// # Errors
    ///
    /// [`AllocError`]; the frames taken so far stay in reserve.
    pub fn reserve(&mut self, range: PageRange, order: Order) -> Result<usize, AllocError> {
        let missing = self.missing_tables(range, order);
        self.reserve.fill::<F>(missing)?;
        Ok(self.reserve.length())
    }

    /// Takes the frames for the tables that mapping `range` with leaves of `order` and larger needs.
    pub(super) fn reserve_for_map(
        &mut self,
        range: PageRange,
        order: Order,
    ) -> Result<(), AllocError> {
        let ((parts, whole), above) = self.missing_by_level(range, order);
        self.reserve.fill::<F>(parts + above)?;
        self.reserve.fill_plain::<F>(whole)
    }

    /// Takes `count` frames for tables into reserve.
    pub(crate) fn fill_reserve(&mut self, count: usize) -> Result<(), AllocError> {
        self.reserve.fill::<F>(count)
    }

    /// How many tables mapping `range` with leaves of `order` may need at most.
    pub(super) fn missing_tables(&self, range: PageRange, order: Order) -> usize {
        let (lowest, above) = self.missing_by_level(range, order);
        lowest.0 + lowest.1 + above
    }

    /// As `missing_tables`, as those of leaves of `order` that the range covers in part and whole, and those above.
    fn missing_by_level(&self, range: PageRange, order: Order) -> ((usize, usize), usize) {
        let env = self.table.env();
        let levels = self.table.levels();
        let target = leaf_level::<F>(levels, order).unwrap_or(1);
        let _reading = env.grace().read();
        let (mut parts, mut whole, mut above) = (0usize, 0usize, 0usize);
        // Level by level from below: which tables of level `target`, `target + 1`, .. cover the range?
        for number in target..levels {
            let pages = 1u64 << (level::<F>(number).shift + level::<F>(number).bits);
            let mut first = range.first().number() & !(pages - 1);
            loop {
                let end = first + (pages - 1);
                let straddles = first < range.first().number() || end > range.last().number();
                if straddles && !mutant!("reserve-not-for-straddling")
                    || !self.has_table(Page::from_number(first), number)
                {
                    let missing = match (number == target, straddles) {
                        (true, false) => &mut whole,
                        (true, true) => &mut parts,
                        (false, _) if mutant!("reserve-forgets-upper-levels") => &mut 0,
                        (false, _) => &mut above,
                    };
                    *missing += 1;
                }
                if end >= range.last().number() {
                    break;
                }
                first = end + 1;
            }
        }
        ((parts, whole), above)
    }

    /// How many tables below the root the range has now.
    pub(crate) fn tables_in_range(&self) -> usize {
        let env = self.table.env();
        let _reading = env.grace().read();
        let mut count = 0;
        let last = self.range.last().number();
        let mut page = self.range.first().number();
        // The lowest level whose table for `page` has been counted.
        let mut counted = self.table.levels();
        loop {
            let mut node = self.table.root_node();
            let mut shift = level::<F>(node.level).shift;
            loop {
                let word = node.load(index_at::<F>(page, node.level));
                if node.level == 1 || node.kind(word) != Kind::Table {
                    break;
                }
                if node.level - 1 < counted {
                    count += 1;
                }
                // SAFETY: as in `walk`, inside the read section.
                node = unsafe { Node::new(env, F::table_frame(word), node.level - 1) };
                shift = level::<F>(node.level).shift;
            }
            // A leaf table has no tables below it, so go on behind it; else go on behind the entry.
            if node.level == 1 {
                shift += level::<F>(1).bits;
            }
            let end = page | ((1u64 << shift) - 1);
            if end >= last {
                return count;
            }
            page = end + 1;
            // Tables whose span starts at `page` have not been counted, larger ones have.
            counted = (1..=self.table.levels())
                .find(|&number| {
                    let level = level::<F>(number);
                    page & ((1u64 << (level.shift + level.bits)) - 1) != 0
                })
                .unwrap_or(self.table.levels());
        }
    }

    /// Whether a table of level `number` exists for `page`. Inside a read section.
    pub(super) fn has_table(&self, page: Page, number: usize) -> bool {
        let env = self.table.env();
        // SAFETY: P1.
        let mut view = unsafe { View::<F>::new(env, self.table.root_frame(), self.table.levels()) };
        while view.level > number {
            let word = view.load(index_at::<F>(page.number(), view.level));
            if !F::is_table(view.level, word) {
                return false;
            }
            // SAFETY: as in `walk`; the caller is in a read section.
            view = unsafe { View::new(env, F::table_frame(word), view.level - 1) };
        }
        true
    }
}
