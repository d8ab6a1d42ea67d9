//! Clearing entries.
//!
//! An entry that is cleared goes into the gather with its pages; a table whose last entry was cleared is taken out of
//! its parent at once (`detach.rs`), and so on upwards. Nobody scans for empty tables: each has a live count.

use kmem_hal::{Order, Page, PageRange, Trace, TraceEvent};

use super::leaf::Trail;
use super::{Cursor, Divisible};
use crate::attributes::{Leaf, Payload};
use crate::env::Env;
use crate::error::ChangeError;
use crate::format::{Format, Kind, Word, level};
use crate::gather::Gather;
use crate::mutants::mutant;
use crate::node::{self, Node};
use crate::quiescent::Liveness;
use crate::table::{Entry, decode, index_at};

/// What was cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cleared {
    /// A leaf, with its last accessed and dirty bits. Its handle is in the gather.
    Leaf(Leaf),
    /// A payload; it is the caller's to release.
    Payload(Page, Payload),
}

/// What the inner loop of a range operation came to.
enum Step {
    Done,
    /// Go on with this page in another table.
    Next(u64),
    Full(u64),
    /// A huge leaf that the range covers only in part: split it and look again.
    Split(u64),
}

/// What a loop over one table has cleared and not yet told the live count and the gather: it tells them when it is
/// dropped, at the loop's end or where the visitor panics, and so before the gather can be committed.
struct Batch<'a, 'g, 't, F: Format, E: Env, H: Divisible, const N: usize> {
    node: &'a Node<'t, F>,
    gather: &'a mut Gather<'g, F, E, H, N>,
    cleared: u32,
    trail: Trail,
}

impl<'a, 'g, 't, F: Format, E: Env, H: Divisible, const N: usize> Batch<'a, 'g, 't, F, E, H, N> {
    fn new(node: &'a Node<'t, F>, gather: &'a mut Gather<'g, F, E, H, N>) -> Self {
        Self {
            node,
            gather,
            cleared: 0,
            trail: Trail::new::<F>(node.level),
        }
    }

    /// Counts a leaf by its first page.
    #[inline(always)]
    fn add(&mut self, first: u64, global: bool) {
        self.cleared += 1;
        let one = mutant!("unmap-notes-the-first-page") && self.trail.stale().is_some();
        if !one && !mutant!("unmap-not-noted") {
            self.trail.add(first, global);
        }
    }
}

impl<F: Format, E: Env, H: Divisible, const N: usize> Drop for Batch<'_, '_, '_, F, E, H, N> {
    #[inline]
    fn drop(&mut self) {
        if self.cleared > 0 {
            let few = u32::from(self.cleared > 1 && mutant!("unmap-counts-one-less"));
            self.node.sub_live(self.cleared - few);
        }
        if let Some(stale) = self.trail.stale() {
            self.gather.note(stale);
        }
    }
}

impl<'t, F: Format, E: Env, H: Divisible, S: Liveness> Cursor<'t, F, E, H, S> {
    /// Clears every leaf and payload in `range`; gives how many pages they covered. Tables of level 2 whose share is given up are
    /// counted as if those below were full.
    ///
    /// Payloads are lost; [`unmap_with`](Self::unmap_with) shows them. So are the dirty bits of leaves: who writes pages back uses that too.
    ///
    /// # Errors
    ///
    /// As [`unmap_with`](Self::unmap_with).
    #[doc(alias = "zap_page_range")]
    #[doc(alias = "unmap_page_range")]
    #[inline(always)]
    pub fn unmap<const N: usize>(
        &mut self,
        range: PageRange,
        gather: &mut Gather<'_, F, E, H, N>,
    ) -> Result<u64, ChangeError> {
        // A leaf of the held leaf table, and not its last: no walk, and nothing to detach.
        let page = range.first();
        if page == range.last()
            && let Some(node) = self.held_leaf(page)
            && gather.belongs_to(self.table)
            && !gather.is_full()
            && node.live() > 1
        {
            let entry = node.leaf_entry(page.number());
            let word = F::Word::load(entry);
            if F::is_present(1, word) {
                if !mutant!("unmap-one-not-noted") {
                    gather.announce_page(page.number(), F::is_global(1, word));
                }
                let word = node::take_known::<F, S>(entry, word);
                if !mutant!("unmap-one-not-counted") {
                    node.sub_live(1);
                }
                gather.push(F::leaf_frame(1, word), Order::ZERO);
                self.table.env().trace().event(TraceEvent::Unmapped(range));
                return Ok(1);
            }
        }
        if page == range.last() && self.unmap_alone(page, gather) {
            return Ok(1);
        }
        self.unmap_giving(range, gather, drop)
    }

    /// As [`unmap`](Self::unmap), and gives the payloads to their owner: those of tables that are taken down whole at the commit
    /// ([`Gather::commit_with`]), the others now, under a table's lock. Nobody is told of dirty bits.
    ///
    /// # Errors
    ///
    /// As [`unmap_with`](Self::unmap_with).
    #[inline(never)]
    pub fn unmap_giving<const N: usize>(
        &mut self,
        range: PageRange,
        gather: &mut Gather<'_, F, E, H, N>,
        mut payloads: impl FnMut(Payload),
    ) -> Result<u64, ChangeError> {
        let visit = &mut |cleared| {
            if let Cleared::Payload(_, payload) = cleared {
                payloads(payload);
            }
        };
        self.check_change(range, gather)?;
        let mut pages = 0;
        let mut page = range.first().number();
        loop {
            let last = range.last().number();
            let next = match self.give_up_level2(page, last, gather, &mut pages)? {
                Some(next) => Some(next),
                None => self.detach_whole(page, last, gather, &mut pages)?,
            };
            let next = match next {
                Some(next) => next,
                None => self.unmap_step(page, range, gather, visit, &mut pages)?,
            };
            match next {
                Some(next) => page = next,
                None => return Ok(pages),
            }
        }
    }

    /// Clears every leaf and payload in `range`, shows each to `visit`; gives how many pages they covered.
    ///
    /// Huge leaves that the range covers in part are split. `visit` runs under a table's lock: it must not use this
    /// table's cursors.
    ///
    /// # Errors
    ///
    /// [`ChangeError::Full`] where the gather has no room: commit it and call again from `next`.
    /// [`ChangeError::Memory`] and [`ChangeError::Indivisible`] where a huge leaf cannot be split; nothing changed. [`ChangeError::Shared`] where another space shares a table
    /// of the range: what is below its page was done. The others change nothing.
    ///
    /// # Examples
    ///
    /// ```
    /// # mod example { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs")); }
    /// # use example::*;
    /// use kmem_paging::Cleared;
    ///
    /// let table = mapped(pages(0x400, 2));
    /// let mut gather = table.gather::<8>();
    /// let mut dirty = 0;
    /// table.cursor(pages(0x400, 2))?.unmap_with(pages(0x400, 2), &mut gather, |cleared| {
    ///     if let Cleared::Leaf(leaf) = cleared {
    ///         dirty += u64::from(leaf.attributes.dirty);
    ///     }
    /// })?;
    /// let mut frames = 0;
    /// gather.commit(|_frame| frames += 1);
    /// assert_eq!((frames, dirty), (2, 0));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn unmap_with<const N: usize>(
        &mut self,
        range: PageRange,
        gather: &mut Gather<'_, F, E, H, N>,
        mut visit: impl FnMut(Cleared),
    ) -> Result<u64, ChangeError> {
        self.check_change(range, gather)?;
        let mut pages = 0;
        let mut page = range.first().number();
        while let Some(next) = self.unmap_step(page, range, gather, &mut visit, &mut pages)? {
            page = next;
        }
        Ok(pages)
    }

    /// What every change of a range begins with.
    #[inline]
    pub(super) fn check_change<const N: usize>(
        &mut self,
        range: PageRange,
        gather: &Gather<'_, F, E, H, N>,
    ) -> Result<(), ChangeError> {
        if !self.range.contains_range(range) {
            return Err(ChangeError::OutOfRange);
        }
        if !gather.belongs_to(self.table) {
            return Err(ChangeError::ForeignGather);
        }
        Ok(self.reserve_splits(range)?)
    }

    /// Clears what one table has of the range from `page` on; gives where to go on.
    #[inline]
    fn unmap_step<const N: usize>(
        &mut self,
        page: u64,
        range: PageRange,
        gather: &mut Gather<'_, F, E, H, N>,
        visit: &mut impl FnMut(Cleared),
        pages: &mut u64,
    ) -> Result<Option<u64>, ChangeError> {
        let node = self.seek_own(Page::from_number(page), 1)?;
        let step = if node.level == 1 {
            self.clear_leaves(&node, page, range.last().number(), gather, visit, pages)
        } else {
            self.clear(&node, page, range, gather, visit, pages)
        };
        if let Step::Split(page) = step {
            self.split_held(Page::from_number(page), gather)?;
        } else if node.live() == 0 && node.level < self.table.levels() {
            self.prune(gather);
        }
        match step {
            Step::Done => Ok(None),
            Step::Next(next) | Step::Split(next) => Ok(Some(next)),
            Step::Full(next) => {
                self.release();
                Err(ChangeError::Full {
                    next: Page::from_number(next),
                })
            }
        }
    }

    /// Clears the entries of a leaf table from `page` to `last` or to its end.
    #[inline(always)]
    fn clear_leaves<const N: usize>(
        &self,
        node: &Node<'t, F>,
        page: u64,
        last: u64,
        gather: &mut Gather<'_, F, E, H, N>,
        visit: &mut impl FnMut(Cleared),
        pages: &mut u64,
    ) -> Step {
        let index = index_at::<F>(page, 1);
        let room = (level::<F>(1).entries() - index) as u64;
        let count = (last - page + 1).min(room);
        let trace = self.table.env().trace();
        let mut batch = Batch::new(node, gather);
        let few = u64::from(count > 1 && mutant!("unmap-stops-early"));
        for (at, entry) in (page..).zip(node.entries(index, (count - few) as usize)) {
            let word = F::Word::load(entry);
            if word == 0 {
                continue;
            }
            if F::kind(1, word) == Kind::Payload {
                F::Word::store(entry, 0);
                batch.cleared += 1;
                *pages += 1;
                visit(Cleared::Payload(Page::from_number(at), F::payload_of(word)));
                continue;
            }
            if batch.gather.is_full() {
                return Step::Full(at);
            }
            batch.gather.announce();
            let word = node::take::<F, S>(entry);
            batch.add(at, F::is_global(1, word));
            if !mutant!("unmap-leaks") {
                batch.gather.push(F::leaf_frame(1, word), Order::ZERO);
            }
            *pages += 1;
            trace.event(TraceEvent::Unmapped(PageRange::single(Page::from_number(
                at,
            ))));
            if let Entry::Leaf(leaf) = decode::<F>(Page::from_number(at), 1, word) {
                visit(Cleared::Leaf(leaf));
            }
        }
        let end = page + (count - 1);
        if end < last {
            Step::Next(end + 1)
        } else {
            Step::Done
        }
    }

    /// As `clear_leaves`, for tables of any level: finds tables below, and huge leaves that must be split.
    fn clear<const N: usize>(
        &self,
        node: &Node<'t, F>,
        mut page: u64,
        range: PageRange,
        gather: &mut Gather<'_, F, E, H, N>,
        visit: &mut impl FnMut(Cleared),
        pages: &mut u64,
    ) -> Step {
        let number = node.level;
        let level = level::<F>(number);
        let covered = 1u64 << level.shift;
        let last = range.last().number();
        let trace = self.table.env().trace();
        let mut index = index_at::<F>(page, number);
        let mut batch = Batch::new(node, gather);
        loop {
            let first = page & !(covered - 1);
            let word = node.load(index);
            match F::kind(number, word) {
                Kind::Empty => {}
                Kind::Table => return Step::Next(page),
                Kind::Payload => {
                    node.store(index, 0);
                    batch.cleared += 1;
                    *pages += covered;
                    visit(Cleared::Payload(
                        Page::from_number(first),
                        F::payload_of(word),
                    ));
                }
                Kind::Leaf => {
                    if (first < range.first().number() || last - first < covered - 1)
                        && !mutant!("unmap-cuts-no-leaf")
                    {
                        return Step::Split(page);
                    }
                    if batch.gather.is_full() {
                        return Step::Full(page);
                    }
                    batch.gather.announce();
                    let word = node.take::<S>(index);
                    batch.add(first, F::is_global(number, word));
                    batch.gather.push(
                        F::leaf_frame(number, word),
                        if mutant!("unmap-huge-gives-one-frame") {
                            Order::ZERO
                        } else {
                            level.order()
                        },
                    );
                    *pages += covered;
                    if let Entry::Leaf(leaf) = decode::<F>(Page::from_number(first), number, word) {
                        trace.event(TraceEvent::Unmapped(leaf.range()));
                        visit(Cleared::Leaf(leaf));
                    }
                }
            }
            if last - first < covered {
                return Step::Done;
            }
            page = first + covered;
            index += 1;
            if index == level.entries() {
                return Step::Next(page);
            }
        }
    }
}
