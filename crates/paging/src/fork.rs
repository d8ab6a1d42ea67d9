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
//! The child's tables are reserved before the first store, so a fork that lacks memory for tables has changed nothing.
//!
//! Does not handle: leaf tables that both spaces share; every entry is copied.

use kmem_hal::{Page, PageRange, Trace, TraceEvent};

use crate::attributes::{Attributes, Leaf, Payload};
use crate::cursor::{Change, Cursor, Divisible, Restricted, Unencodable, change_entry};
use crate::env::Env;
use crate::error::ForkError;
use crate::format::{Format, Kind, level};
use crate::gather::Gather;
use crate::mutants::mutant;
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

impl<F: Format, E: Env, H: Divisible> PageTable<F, E, H> {
    /// Copies what is mapped in `range` to the same pages of `child`, entry by entry, as `step` decides; gives how many
    /// pages the child got.
    ///
    /// `step` is called once for each entry, under a table's lock: it must not use cursors of either table. The child is
    /// new and loaded nowhere.
    ///
    /// # Errors
    ///
    /// [`ForkError`] with a handle that could not be placed. After [`ForkError::Stopped`] the part below `at` was copied:
    /// destroy the child, commit the gather.
    #[doc(alias = "copy_page_range")]
    #[doc(alias = "dup_mmap")]
    pub fn fork_into<const N: usize>(
        &self,
        child: &Self,
        range: PageRange,
        gather: &mut Gather<'_, F, E, H, N>,
        mut step: impl FnMut(ForkItem) -> ForkStep<H>,
    ) -> Result<u64, (ForkError, Option<H>)> {
        if !gather.belongs_to(self) {
            return Err((ForkError::ForeignGather, None));
        }
        self.check(range)
            .and_then(|()| child.check(range))
            .map_err(|error| (ForkError::Range(error), None))?;
        let mut parent = Cursor::new(self, range);
        let mut child = Cursor::new(child, range);
        child
            .fill_reserve(if mutant!("fork-reserves-nothing") {
                0
            } else {
                parent.tables_in_range()
            })
            .map_err(|error| (ForkError::Memory(error), None))?;
        let mut copied = 0;
        let mut page = range.first().number();
        let last = range.last().number();
        'tables: loop {
            let node = parent.seek_lowest(Page::from_number(page));
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
                                match change_entry(
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
