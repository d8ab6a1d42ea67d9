//! Copying a range of one table into another: what fork does to page tables.
//!
//! The parent's entries are read under its locks, a callback decides for each what the child gets and what the parent
//! keeps, and where the parent loses the right to write, the gather flushes that. Nobody may run in the parent's space
//! with the old rights after the commit.
//!
//! ```text
//!   parent leaf W ──callback──> Leaf { handle, child: !W, parent: Some(!W) }
//!        │ compare-and-exchange, A and D kept                 │
//!        ▼                                                    ▼
//!   parent leaf !W ── gather: flush                      child leaf !W   (child is loaded nowhere: no flush)
//! ```
//!
//! The child's tables are reserved before the first store, so a [`fork_into`](PageTable::fork_into) that lacks memory for tables has changed
//! nothing. `fork_sharing` reserves none: where it stops half-way the child is destroyed, and the parent takes its tables back as it writes.
//!
//! [`PageTable::fork_sharing`] copies entries above tables instead, and the tables themselves at their first change
//! ([`Cursor::unshare`](crate::Cursor::unshare)).

use kmem_hal::{Frame, Page, PageRange, Trace, TraceEvent};

use crate::attributes::{Attributes, Leaf, Payload};
use crate::cursor::{
    Change, Cursor, Divisible, Restricted, SplitError, Unencodable, change_entry, mark_shared,
};
use crate::env::Env;
use crate::error::{ForkError, HugeError};
use crate::format::{Format, Kind, Word, level};
use crate::gather::Gather;
use crate::mutants::mutant;
use crate::node::{self, Node, Slots};
use crate::quiescent::Live;
use crate::table::{Entry, PageTable, decode, index_at};

/// What fork found at a page of the parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForkItem {
    /// A leaf.
    Leaf(Leaf),
    /// A payload.
    Payload(Page, Payload),
}

/// What fork does about it.
#[derive(Debug, PartialEq, Eq)]
pub enum ForkStep<H> {
    /// The child gets nothing here (it can fault it in again).
    Skip,
    /// The child gets a leaf of the same size for `handle`.
    Leaf {
        /// What the child's entry stands for: another reference to the parent's frame, or a copy of it.
        handle: H,
        /// The child's attributes.
        child: Attributes,
        /// The parent's new attributes; `None` leaves the parent alone. Accessed and dirty bits that the hardware sets
        /// meanwhile are kept.
        parent: Option<Attributes>,
    },
    /// The child gets this payload.
    Payload(Payload),
    /// Stop here: memory for a copy ran out.
    Stop,
}

/// Whether a format's tables of this level can be shared: an entry of a copy can say that the tables below are, and nobody has to be told when the
/// right to write comes back at an entry above.
#[inline(always)]
fn can_share<const LEVEL: usize, F: Format>() -> bool {
    let passes_on = || F::shared_table(LEVEL, F::table(LEVEL, Frame::ZERO)).is_some();
    !F::TELLS_GAINS && (LEVEL == 1 || passes_on())
}

/// Shares tables of level `LEVEL` from `page` on, as far as they lie in `page ..= last` whole and one after the other below one table;
/// gives the pages of their entries that are in use (of those one level down, for tables of tables) and where to go on. `None` where none is
/// there to share; the page where the child has no room.
///
/// A table costs loads of its entry and its slot, a store to each and one to the child's entry, none of them locked where nobody shares it yet.
fn share_run<const LEVEL: usize, F: Format, E: Env, H: Divisible, const N: usize>(
    parent: &mut Cursor<'_, F, E, H>,
    child: &mut Cursor<'_, F, E, H>,
    page: u64,
    last: u64,
    gather: &mut Gather<'_, F, E, H, N>,
) -> Result<Option<(u64, Option<u64>)>, u64> {
    if LEVEL + 1 > parent.table().levels() || !can_share::<LEVEL, F>() {
        return Ok(None);
    }
    let upper = level::<F>(LEVEL + 1);
    let covered = 1u64 << upper.shift;
    if page & (covered - 1) != 0 || last - page < covered - 1 {
        return Ok(None);
    }
    let node = parent.seek(Page::from_number(page), LEVEL + 1);
    if node.level != LEVEL + 1 {
        return Ok(None);
    }
    let first = index_at::<F>(page, LEVEL + 1);
    let end = if LEVEL + 1 == parent.table().levels() {
        // The copies of a lent entry, in other roots, would not say that its table is shared.
        parent.table().lent_from().min(upper.entries())
    } else {
        upper.entries()
    };
    if first >= end {
        return Ok(None);
    }
    let word = node.load(first);
    if !F::is_table(LEVEL + 1, word) || F::shared_table(LEVEL + 1, word).is_none() {
        return Ok(None);
    }
    let env = parent.table().env();
    let mut slots = Slots::new(env);
    if node::has_pins(slots.of(F::table_frame(word))) {
        return Ok(None);
    }
    // Makes the child's table there; the entry itself comes when its share is counted.
    let at = Page::from_number(page);
    if child.place(at, LEVEL + 1, word).is_err() {
        return Err(page);
    }
    let into = child.seek(at, LEVEL + 1);
    into.store(first, 0);
    let whole = ((last - page + 1) >> upper.shift).min((end - first) as u64) as usize;
    // In a table that was there already, one at a time, so that each place is looked at.
    let whole = if into.live() == 1 { whole } else { 1 };
    let huge = LEVEL == 2 && parent.table().may_be_huge();
    let mut live = 0;
    let mut below = 0;
    let mut shared = 0;
    gather.announce();
    let entries = node.entries(first, whole);
    for (entry, place) in entries.iter().zip(into.entries(first, whole)) {
        let word = F::Word::load(entry);
        if !F::is_table(LEVEL + 1, word) {
            break;
        }
        let Some(used) = node::share(slots.of(F::table_frame(word))) else {
            break;
        };
        let Some(word) = mark_shared::<F>(LEVEL + 1, entry, word) else {
            unreachable!("all tables of a level can be shared, or none")
        };
        F::Word::store(place, word);
        live += u64::from(used);
        if huge {
            // SAFETY: an entry of a locked table points to an attached table.
            let table = unsafe { Node::<F>::new(env, F::table_frame(word), LEVEL) };
            below += table.tables();
        }
        shared += 1;
    }
    if shared == 0 {
        into.sub_live(1);
        return Ok(None);
    }
    into.add_live(shared - 1);
    if LEVEL == 2 && !huge {
        below = live as usize;
    }
    child.table().count_shared(shared as usize + below, true);
    let end = page + u64::from(shared) * covered;
    // Nothing in these pages may be written to any more.
    if !mutant!("share-not-noted") {
        gather.note_pages(page, end - 1, 1, parent.table().may_be_global(), true);
    }
    let pages = live << level::<F>(LEVEL).shift;
    Ok(Some((pages, (end - 1 < last).then_some(end))))
}

impl<F: Format, E: Env, H: Divisible> PageTable<F, E, H> {
    /// Copies what is mapped in `range` to the same pages of `child`, entry by entry, as `step` decides; gives how many
    /// pages the child got.
    ///
    /// `step` is called once for each entry, under a table's lock: it must not use cursors of either table. The child is
    /// new and loaded nowhere. Huge leaves that the range has in part are split before.
    ///
    /// # Errors
    ///
    /// [`ForkError`] with a handle that could not be placed. After [`ForkError::Stopped`] the part below `at` was copied:
    /// destroy the child, commit the gather.
    ///
    /// # Examples
    ///
    /// ```
    /// # mod example { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs")); }
    /// # use example::*;
    /// use kmem_paging::{ForkItem, ForkStep, PageTable};
    ///
    /// // Both sides keep the frame, and neither may write to it.
    /// let parent = mapped(pages(0x400, 2));
    /// let child = PageTable::new(*parent.env())?;
    /// let mut gather = parent.gather::<1>();
    /// let copied = parent.fork_into(&child, pages(0x400, 2), &mut gather, |item| match item {
    ///     ForkItem::Leaf(leaf) => ForkStep::Leaf {
    ///         handle: block(leaf.frame.number(), leaf.order),
    ///         child: leaf.attributes.write_protected(),
    ///         parent: Some(leaf.attributes.write_protected()),
    ///     },
    ///     ForkItem::Payload(_, payload) => ForkStep::Payload(payload),
    /// });
    /// assert_eq!(copied.map_err(|(error, _)| error)?, 2);
    /// // The child may run from here on.
    /// gather.commit(drop);
    /// assert!(!child.query(page(0x401)).leaf().unwrap().is_writable());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "copy_page_range")]
    #[doc(alias = "dup_mmap")]
    pub fn fork_into<const N: usize>(
        &self,
        child: &Self,
        range: PageRange,
        gather: &mut Gather<'_, F, E, H, N>,
        mut step: impl FnMut(ForkItem) -> ForkStep<H>,
    ) -> Result<u64, (ForkError, Option<H>)> {
        self.fork_tables(child, range, 0, gather, &mut step)
    }

    /// As [`fork_into`](Self::fork_into), but tables of level `most` and below that lie in `range` whole are shared: both sides lose the right to
    /// write at the entry above, and what is in them is copied at the first change ([`Cursor::unshare`](crate::Cursor::unshare)). `step` is asked
    /// about the rest. The pages of tables of level 2 are counted as if those below were full.
    ///
    /// `most` is 1 for tables of leaves, 2 for a level more: then 1 GiB of 4 KiB pages costs one entry, and its first change two
    /// copies. A shared table's leaves stand for one handle each, however many spaces share it. Tables with pins are not shared (pins are counted in leaf tables
    /// only: with pins anywhere in `range`, `most` is 1), nor are those right below the root that are [lent](Self::lend_from), nor is anything in
    /// formats that cannot forbid writing above the leaves, or whose CPUs must be told when it is allowed again ([`Format::shared_table`]).
    ///
    /// # Errors
    ///
    /// As [`fork_into`](Self::fork_into); want of memory for the child's upper tables is [`ForkError::Stopped`].
    ///
    /// # Safety
    ///
    /// No cursor is open on either table but inside this call, neither is lent from meanwhile, and nobody runs in this space with the old rights after the gather's
    /// commit, which comes before anything else is changed in either.
    #[doc(alias = "copy_page_range")]
    pub unsafe fn fork_sharing<const N: usize>(
        &self,
        child: &Self,
        range: PageRange,
        most: usize,
        gather: &mut Gather<'_, F, E, H, N>,
        mut step: impl FnMut(ForkItem) -> ForkStep<H>,
    ) -> Result<u64, (ForkError, Option<H>)> {
        self.fork_tables(child, range, most.min(2), gather, &mut step)
    }

    fn fork_tables<const N: usize>(
        &self,
        child: &Self,
        range: PageRange,
        most: usize,
        gather: &mut Gather<'_, F, E, H, N>,
        step: &mut impl FnMut(ForkItem) -> ForkStep<H>,
    ) -> Result<u64, (ForkError, Option<H>)> {
        if !gather.belongs_to(self) {
            return Err((ForkError::ForeignGather, None));
        }
        if core::ptr::eq(self, child) {
            // Its tables would be locked twice.
            return Err((ForkError::SameTable, None));
        }
        self.check(range)
            .and_then(|()| child.check(range))
            .map_err(|error| (ForkError::Range(error), None))?;
        let mut parent = Cursor::new(self, range);
        let mut child = Cursor::new(child, range);
        let memory = |error| (ForkError::Memory(error), None);
        let at = range.first();
        let cuts = parent.reserve_cuts().map_err(|error| match error {
            SplitError::Memory(error) => memory(error),
            SplitError::Indivisible(_) => (ForkError::Stopped { at }, None),
        })?;
        if most == 0 && !mutant!("fork-reserves-nothing") {
            child
                .fill_reserve(parent.tables_in_range() + cuts)
                .map_err(memory)?;
        }
        if cuts > 0 && !mutant!("fork-cuts-no-leaf") {
            parent.cut_ends(gather).map_err(|error| match error {
                HugeError::Memory(error) => memory(error),
                _ => (ForkError::Stopped { at }, None),
            })?;
        }
        if most > 0 {
            child.table().inherit(self);
        }
        let mut copied = 0;
        let mut page = range.first().number();
        let last = range.last().number();
        'tables: loop {
            for number in (1..=most).rev() {
                let run = match number {
                    1 => share_run::<1, _, _, _, N>(&mut parent, &mut child, page, last, gather),
                    _ => share_run::<2, _, _, _, N>(&mut parent, &mut child, page, last, gather),
                };
                match run {
                    Ok(None) => {}
                    Ok(Some((pages, next))) => {
                        copied += pages;
                        let Some(next) = next else { return Ok(copied) };
                        page = next;
                        continue 'tables;
                    }
                    Err(at) => {
                        let at = Page::from_number(at);
                        return Err((ForkError::Stopped { at }, None));
                    }
                }
            }
            let node = parent.seek(Page::from_number(page), 1);
            let level = level::<F>(node.level);
            let covered = 1u64 << level.shift;
            let mut index = index_at::<F>(page, node.level);
            loop {
                let first = page & !(covered - 1);
                let at = Page::from_number(first);
                let word = node.load(index);
                let stopped = |handle| Err((ForkError::Stopped { at }, handle));
                let item = match decode::<F>(at, node.level, word) {
                    Entry::Leaf(leaf) => Some(ForkItem::Leaf(leaf)),
                    Entry::Payload(payload) => Some(ForkItem::Payload(at, payload)),
                    Entry::Empty if node.kind(word) == Kind::Table => continue 'tables,
                    Entry::Empty => None,
                };
                if let Some(item) = item {
                    match step(item) {
                        ForkStep::Skip => {}
                        ForkStep::Stop => return stopped(None),
                        ForkStep::Payload(payload) => {
                            if child.map_payload(at, payload).is_err() {
                                return stopped(None);
                            }
                            copied += covered;
                        }
                        ForkStep::Leaf {
                            handle,
                            child: attributes,
                            parent: own,
                        } => {
                            if let Some(own) = own
                                && !mutant!("fork-keeps-the-parent-writable")
                            {
                                let mut restricted = Restricted::new(gather, node.level);
                                let mut change = |number, page, word| {
                                    let Entry::Leaf(leaf) = decode::<F>(page, number, word) else {
                                        return Ok(None);
                                    };
                                    let own = Attributes {
                                        accessed: own.accessed || leaf.attributes.accessed,
                                        dirty: own.dirty
                                            || leaf.attributes.dirty
                                                && !mutant!("fork-loses-dirty"),
                                        ..own
                                    };
                                    if !F::can_encode(number, leaf.frame, &own) {
                                        return Err(Unencodable);
                                    }
                                    Ok(Some(F::leaf(number, leaf.frame, &own)))
                                };
                                match change_entry::<F, E, H, Live, N>(
                                    node.level,
                                    node.entry(index),
                                    at,
                                    word,
                                    &mut restricted,
                                    &mut change,
                                ) {
                                    Ok(Change::Restricted) => {
                                        let last = Page::from_number(first + (covered - 1));
                                        if let Some(range) = PageRange::new(at, last) {
                                            self.env().trace().event(TraceEvent::Restricted(range));
                                        }
                                    }
                                    Ok(_) => {}
                                    Err(Unencodable) => {
                                        drop(restricted);
                                        return stopped(Some(handle));
                                    }
                                }
                            }
                            if let Err((_, handle)) = child.map(at, handle, attributes) {
                                return stopped(Some(handle));
                            }
                            copied += covered;
                        }
                    }
                }
                if last - first < covered {
                    return Ok(copied);
                }
                page = first + covered;
                index += 1;
                if mutant!("fork-skips-the-last") && index + 1 == level.entries() {
                    page += covered;
                    index += 1;
                }
                if index == level.entries() {
                    break;
                }
            }
        }
    }
}
