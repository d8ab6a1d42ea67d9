//! Moving a range to other pages of the same table (`mremap`).
//!
//! Leaves and payloads are taken out of the old pages and put, as they are, to the new ones; frames stay where they are.
//! No frame is freed, but the old pages may still be translated until the gather is committed: until then every other
//! commit on the table flushes everything (`G1`), so that a frame that is unmapped from its new page meanwhile is not
//! freed while the old page still reaches it (Linux had this bug: CVE-2018-18281). Where the hardware caches absent entries, the commit flushes
//! the new pages too.
//!
//! Context: the caller keeps faults and other changes away from both ranges (the address space's write lock).

use kmem_hal::{Frame, Grace, Order, Page, PageRange, Trace, TraceEvent};

use super::huge::check_parts;
use super::share::Shared;
use super::{Cursor, Divisible, Run};
use crate::attributes::{Leaf, Rights};
use crate::env::Env;
use crate::error::{MapError, MoveError};
use crate::format::{Format, Kind, leaf_level, level};
use crate::gather::{Gather, Stale};
use crate::mutants::mutant;
use crate::quiescent::Liveness;
use crate::table::{Entry, PageTable, decode, index_at};

/// Entries that are taken out of one table before they are put into another.
const BATCH: usize = 32;

impl<F: Format, E: Env, H: Divisible> PageTable<F, E, H> {
    /// Moves what is mapped in `from` to as many pages from `to` on; gives how many pages had something.
    ///
    /// The target must be empty and must not overlap the source. Huge leaves are moved whole where both ends allow it and
    /// split where not; where an empty table stays in the place of one that is moved whole (the target is lent) it is
    /// [`Occupied`](MoveError::Occupied). [Pins](Cursor::add_pins) stay with their tables.
    ///
    /// # Errors
    ///
    /// [`MoveError`]; nothing changed.
    ///
    /// # Examples
    ///
    /// ```
    /// # mod example { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs")); }
    /// # use example::*;
    /// let table = mapped(pages(0x400, 4));
    /// let mut gather = table.gather::<1>();
    /// assert_eq!(table.move_range(pages(0x400, 4), page(0x9000), &mut gather)?, 4);
    /// gather.commit(drop);
    /// assert_eq!(table.query(page(0x9003)).leaf().unwrap().frame.number(), 0x10_0403);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "move_page_tables")]
    pub fn move_range<const N: usize>(
        &self,
        from: PageRange,
        to: Page,
        gather: &mut Gather<'_, F, E, H, N>,
    ) -> Result<u64, MoveError> {
        let target = PageRange::with_count(to, from.count()).ok_or(MoveError::OutOfRange)?;
        if target.overlaps(from) || self.check(from).is_err() || self.check(target).is_err() {
            return Err(MoveError::OutOfRange);
        }
        if !gather.belongs_to(self) {
            return Err(MoveError::ForeignGather);
        }
        let mut source: Cursor<'_, F, E, H> = Cursor::new(self, from);
        let mut sink: Cursor<'_, F, E, H> = Cursor::new(self, target);
        while let Some(run) = sink.next_run() {
            if !matches!(run, Run::Absent(_)) {
                return Err(MoveError::Occupied);
            }
        }
        sink.release();
        source.own_range()?;
        sink.own_range()?;
        let splits = source.splits_to_move(&sink)?;
        source.fill_reserve(splits).map_err(MoveError::Memory)?;
        sink.fill_reserve(if mutant!("move-forgets-tables") {
            0
        } else {
            source.tables_to_move(splits, &sink)
        })
        .map_err(MoveError::Memory)?;
        // Splits come first; nothing can fail from here on, unless others interfere.
        source.split_for_move(target, gather)?;
        let mut moved = 0;
        let mut batch = [(0u64, 0usize, 0u64); BATCH];
        let mut page = from.first().number();
        loop {
            let (length, next) = source.take_batch(page, &mut batch, gather);
            source.release();
            for (done, &(first, number, word)) in batch[..length].iter().enumerate() {
                let pages = level::<F>(number).order();
                let page = Page::from_number(first - from.first().number() + to.number());
                match sink.place(page, number, word) {
                    Ok(()) => {}
                    // The caller broke its promise, and somebody mapped something there meanwhile; what was moved so far
                    // stays moved, this entry and the others of the batch go back. Where even that fails, because somebody
                    // mapped something there as well, the frame is leaked, as nobody could say whose it is.
                    Err(error) => {
                        sink.release();
                        for &(first, number, word) in &batch[done..length] {
                            let back = Page::from_number(first);
                            let _ = source.place(back, number, word);
                        }
                        return Err(match error {
                            MapError::Memory(error) => MoveError::Memory(error),
                            _ => MoveError::Occupied,
                        });
                    }
                }
                moved += pages.frames();
                if F::kind(number, word) == Kind::Leaf {
                    let range = super::map::block(page, pages);
                    if F::CACHES_ABSENT && !mutant!("move-does-not-settle") {
                        // Announced when the leaf was taken.
                        gather.note(Stale::leaf(range, F::is_global(number, word)));
                    }
                    let frame = F::leaf_frame(number, word);
                    self.env().trace().event(TraceEvent::Mapped(range, frame));
                }
            }
            sink.release();
            match next {
                Some(next) => page = next,
                None => return Ok(moved),
            }
        }
    }
}

impl<'t, F: Format, E: Env, H: Divisible, S: Liveness> Cursor<'t, F, E, H, S> {
    /// Makes sure that no table of the range is shared.
    fn own_range(&mut self) -> Result<(), Shared> {
        let mut page = self.range.first().number();
        loop {
            let node = self.seek_own(Page::from_number(page), 1)?;
            let level = level::<F>(node.level);
            let shift = if node.level == 1 {
                level.bits
            } else {
                level.shift
            };
            let end = page | ((1u64 << shift) - 1);
            if end >= self.range.last().number() {
                self.release();
                return Ok(());
            }
            page = end + 1;
        }
    }

    /// How many tables the target may need for what is in this cursor's range, once `splits` tables more are there.
    ///
    /// Each table's span falls on at most two at the target. A small range counts what is missing there instead, which is
    /// less.
    fn tables_to_move(&self, splits: usize, target: &Self) -> usize {
        const SMALL: u64 = 1 << 18;
        let most = 2 * (self.tables_in_range() + splits + self.table.levels());
        if self.range.count() <= SMALL {
            most.min(target.missing_tables(target.range, Order::ZERO))
        } else {
            most
        }
    }

    /// How many tables it takes to split every huge leaf that cannot be moved whole to the range of `target`, where each can be split, and no
    /// empty table is in the place of those that can be moved.
    fn splits_to_move(&mut self, target: &Self) -> Result<usize, MoveError> {
        let from = self.range;
        let distance = target
            .range
            .first()
            .number()
            .wrapping_sub(from.first().number());
        let levels = self.table.levels();
        self.splits_at(from.first(), from.first().number())?;
        self.splits_at(from.last(), from.last().number().wrapping_add(1))?;
        let mut splits = 0;
        self.move_to(from.first());
        while let Some(run) = self.next_run() {
            let Run::Leaves { range, first } = run else {
                continue;
            };
            if first.order == Order::ZERO {
                continue;
            }
            let leaves = (range.count() / first.order.frames()) as usize;
            let Some(number) = leaf_level::<F>(levels, first.order) else {
                continue;
            };
            // The one with the highest frames.
            let before = range.count() - first.order.frames();
            let last = Leaf {
                page: Page::from_number(first.page.number() + before),
                frame: Frame::from_number(first.frame.number() + before),
                ..first
            };
            // Down to the size that fits the distance, everywhere ...
            let mut tables = leaves;
            let mut fits = number;
            while fits > 1 && distance & (level::<F>(fits).order().frames() - 1) != 0 {
                fits -= 1;
                check_parts::<F>(&last, fits)?;
                splits += tables;
                tables *= level::<F>(fits).entries();
            }
            let inside = [
                range.first().max(from.first()),
                range.last().min(from.last()),
            ];
            let [first, last] = inside.map(|page| page.number().wrapping_add(distance));
            if fits > 1 && target.is_blocked(first, last, fits) {
                return Err(MoveError::Occupied);
            }
            // ... and down to pages at the two ends, where they are inside a leaf.
            if !from.contains_range(range) {
                splits += 2 * (number - 1);
            }
        }
        self.release();
        Ok(splits)
    }

    /// Whether an empty table that stays (it is lent, or was emptied from outside) is in the place of a leaf above level 1: of those that come to
    /// pages `page ..= last`, cut at both ends, from leaves of level `fits`.
    fn is_blocked(&self, mut page: u64, last: u64, fits: usize) -> bool {
        let size = |number| level::<F>(number).order().frames();
        let _reading = self.table.env().grace().read();
        loop {
            // The largest leaf that begins here.
            let whole =
                |&number: &usize| page & (size(number) - 1) == 0 && last - page >= size(number) - 1;
            let step = match (2..=fits).rev().find(whole) {
                Some(number) if self.has_table(Page::from_number(page), number - 1) => return true,
                Some(number) => size(number),
                // Those of level 1 go into tables.
                None => size(2) - (page & (size(2) - 1)),
            };
            if last - page < step {
                return false;
            }
            page += step;
        }
    }

    /// Splits every huge leaf that cannot be moved whole to `target`.
    fn split_for_move<const N: usize>(
        &mut self,
        target: PageRange,
        gather: &mut Gather<'_, F, E, H, N>,
    ) -> Result<(), MoveError> {
        let from = self.range;
        let distance = target.first().number().wrapping_sub(from.first().number());
        let mut page = from.first().number();
        loop {
            let Entry::Leaf(leaf) = self.query(Page::from_number(page)) else {
                // Holes and payloads: go on behind this page's run.
                self.move_to(Page::from_number(page));
                let end = self
                    .next_run()
                    .map_or(from.last(), |run| run.range().last());
                if end >= from.last() {
                    self.release();
                    return Ok(());
                }
                page = end.number() + 1;
                continue;
            };
            let whole = from.contains_range(leaf.range());
            if leaf.order > Order::ZERO && (!whole || distance & (leaf.order.frames() - 1) != 0) {
                self.split_held(Page::from_number(page), gather)?;
                continue;
            }
            if leaf.range().last() >= from.last() {
                self.release();
                return Ok(());
            }
            page = leaf.range().last().number() + 1;
        }
    }

    /// Takes entries out of the table of `page`; gives how many, and where to go on.
    fn take_batch<const N: usize>(
        &mut self,
        mut page: u64,
        batch: &mut [(u64, usize, u64); BATCH],
        gather: &mut Gather<'_, F, E, H, N>,
    ) -> (usize, Option<u64>) {
        let node = self.seek(Page::from_number(page), 1);
        let covered = 1u64 << level::<F>(node.level).shift;
        let entries = level::<F>(node.level).entries();
        let last = self.range.last().number();
        let mut index = index_at::<F>(page, node.level);
        let mut length = 0;
        let next = loop {
            if length == BATCH {
                break Some(page);
            }
            let first = page & !(covered - 1);
            let word = node.load(index);
            match node.kind(word) {
                Kind::Empty => {}
                Kind::Table => break Some(page),
                Kind::Payload => {
                    node.store(index, 0);
                    node.sub_live(1);
                    batch[length] = (first, node.level, word);
                    length += 1;
                }
                Kind::Leaf => {
                    gather.announce();
                    let word = node.take::<S>(index);
                    if !mutant!("move-keeps-the-place") {
                        node.sub_live(1);
                    }
                    if let Entry::Leaf(leaf) =
                        decode::<F>(Page::from_number(first), node.level, word)
                    {
                        let global = leaf.attributes.rights.contains(Rights::GLOBAL);
                        if !mutant!("move-not-noted") {
                            gather.note(Stale::leaf(leaf.range(), global));
                        }
                        self.table
                            .env()
                            .trace()
                            .event(TraceEvent::Unmapped(leaf.range()));
                    }
                    batch[length] = (first, node.level, word);
                    length += 1;
                }
            }
            if last - first < covered {
                break None;
            }
            page = first + covered;
            index += 1;
            if index == entries {
                break Some(page);
            }
        };
        if node.live() == 0 && node.level < self.table.levels() {
            self.prune(gather);
        }
        (length, next)
    }
}
