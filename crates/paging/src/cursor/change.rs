//! Changing leaves in place: rights, memory types, software bits, accessed and dirty bits.
//!
//! Which changes ask for a flush (x86; other formats may ask for more):
//!
//! | change | flush |
//! |---|---|
//! | a right is added, software bits | none: the processor walks again before it faults |
//! | a right is taken away, memory type, key | yes |
//! | dirty cleared | yes: a CPU that remembers it as dirty would not set it again |
//! | accessed cleared | none: ageing only gets less exact (Linux does the same) |
//!
//! The hardware may set accessed and dirty bits until the moment of the store, so the store is a compare-and-exchange
//! that is repeated with a fresh look; except where nothing is left for the hardware to write (`F4`), where it is plain.
//!
//! Source: Intel SDM volume 3A, 4.10.4.2 (when no invalidation is needed), 4.8 (accessed and dirty flags).

use kmem_hal::{Page, PageRange, Trace, TraceEvent};

use super::{Cursor, Divisible};
use crate::attributes::{Attributes, Leaf, Rights};
use crate::env::Env;
use crate::error::ChangeError;
use crate::format::{Format, Kind, level};
use crate::gather::{Gather, Stale};
use crate::node::Node;
use crate::table::{Entry, decode, index_at};

bitflags::bitflags! {
    /// Which bits [`Cursor::harvest`] clears.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Harvest: u8 {
        /// The accessed bit.
        const ACCESSED = 1 << 0;
        /// The dirty bit.
        const DIRTY = 1 << 1;
    }
}

/// How much [`Cursor::harvest`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Harvested {
    /// Pages whose accessed bit was set.
    pub accessed: u64,
    /// Pages whose dirty bit was set.
    pub dirty: u64,
}

/// Whether a CPU may go on using `old` in a way that `new` forbids or that loses a dirty bit.
#[inline]
pub(crate) fn needs_flush<F: Format>(old: &Attributes, new: &Attributes) -> bool {
    if !old.rights.grants_access() {
        return F::CACHES_ABSENT && new.rights.grants_access();
    }
    let lost = old.rights.difference(new.rights);
    !lost.is_empty()
        || old.memory_type != new.memory_type
        || old.pkey != new.pkey
        || old.dirty && !new.dirty
        || F::CACHES_ABSENT && old.rights != new.rights
}

enum Step {
    Done,
    Next(u64),
    Split(u64),
    Unencodable(u64),
}

impl<'t, F: Format, E: Env, H: Divisible> Cursor<'t, F, E, H> {
    /// Gives every leaf in `range` these rights; gives how many pages changed.
    ///
    /// # Errors
    ///
    /// As [`update`](Self::update).
    #[doc(alias = "change_protection")]
    #[doc(alias = "pte_modify")]
    pub fn protect<const N: usize>(
        &mut self,
        range: PageRange,
        rights: Rights,
        gather: &mut Gather<'_, F, E, H, N>,
    ) -> Result<u64, ChangeError> {
        self.update(range, gather, |leaf| Some(leaf.attributes.rights(rights)))
    }

    /// Shows every leaf in `range` to `change` and gives it the attributes that this answers; `None` leaves it alone.
    /// Gives how many pages changed.
    ///
    /// `change` is asked again about a leaf whose accessed or dirty bit the hardware set meanwhile; what it clears was
    /// in the leaf that it saw last. It runs under a table's lock: it must not use this table's cursors. Huge leaves that
    /// the range covers in part are split.
    ///
    /// # Errors
    ///
    /// [`ChangeError::Memory`] where a huge leaf cannot be split; nothing changed. [`ChangeError::Unencodable`] where the
    /// format cannot say what `change` asked for; what is below was changed. The others change nothing; it is never
    /// [`ChangeError::Full`].
    pub fn update<const N: usize>(
        &mut self,
        range: PageRange,
        gather: &mut Gather<'_, F, E, H, N>,
        mut change: impl FnMut(&Leaf) -> Option<Attributes>,
    ) -> Result<u64, ChangeError> {
        if !self.range.contains_range(range) {
            return Err(ChangeError::OutOfRange);
        }
        if !gather.belongs_to(self.table) {
            return Err(ChangeError::ForeignGather);
        }
        self.reserve_splits(range).map_err(ChangeError::Memory)?;
        let mut pages = 0;
        let mut page = range.first().number();
        loop {
            let node = self.seek(Page::from_number(page), 1);
            match self.update_table(&node, page, range, gather, &mut change, &mut pages) {
                Step::Done => return Ok(pages),
                Step::Next(next) => page = next,
                Step::Split(next) => {
                    self.split_held(Page::from_number(next), gather)
                        .map_err(ChangeError::Memory)?;
                    page = next;
                }
                Step::Unencodable(at) => {
                    return Err(ChangeError::Unencodable {
                        at: Page::from_number(at),
                    });
                }
            }
        }
    }

    #[inline]
    fn update_table<const N: usize>(
        &self,
        node: &Node<'t, F>,
        mut page: u64,
        range: PageRange,
        gather: &mut Gather<'_, F, E, H, N>,
        change: &mut impl FnMut(&Leaf) -> Option<Attributes>,
        pages: &mut u64,
    ) -> Step {
        let level = level::<F>(node.level);
        let covered = 1u64 << level.shift;
        let last = range.last().number();
        let mut index = index_at::<F>(page, node.level);
        loop {
            let first = page & !(covered - 1);
            let word = node.load(index);
            match node.kind(word) {
                Kind::Empty | Kind::Payload => {}
                Kind::Table => return Step::Next(page),
                Kind::Leaf => {
                    if first < range.first().number() || last - first < covered - 1 {
                        return Step::Split(page);
                    }
                    match update_entry(node, index, Page::from_number(first), word, gather, change)
                    {
                        Ok(None) => {}
                        Ok(Some(restricted)) => {
                            *pages += covered;
                            if let Some(range) = restricted {
                                self.table
                                    .env()
                                    .trace()
                                    .event(TraceEvent::Restricted(range));
                            }
                        }
                        Err(()) => return Step::Unencodable(first),
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

    /// Reads and clears accessed or dirty bits in `range`, shows each leaf that had one to `visit`.
    ///
    /// No bit is lost: what the hardware set before the clearing is seen now, what it sets after is seen next time,
    /// once the gather is committed.
    ///
    /// # Errors
    ///
    /// As [`update`](Self::update).
    #[doc(alias = "ptep_test_and_clear_young")]
    #[doc(alias = "page_mkclean")]
    pub fn harvest<const N: usize>(
        &mut self,
        range: PageRange,
        bits: Harvest,
        gather: &mut Gather<'_, F, E, H, N>,
        mut visit: impl FnMut(&Leaf),
    ) -> Result<Harvested, ChangeError> {
        let mut found = Harvested::default();
        // A leaf may be shown twice to the closure below (see `update`); it counts once, as it was shown last.
        let mut last: Option<Leaf> = None;
        let mut count = |leaf: Leaf| {
            if leaf.attributes.accessed {
                found.accessed += leaf.order.frames();
            }
            if leaf.attributes.dirty {
                found.dirty += leaf.order.frames();
            }
            visit(&leaf);
        };
        let result = self.update(range, gather, |leaf| {
            if let Some(previous) = last.take()
                && previous.page != leaf.page
            {
                count(previous);
            }
            let accessed = leaf.attributes.accessed && bits.contains(Harvest::ACCESSED);
            let dirty = leaf.attributes.dirty && bits.contains(Harvest::DIRTY);
            if !accessed && !dirty {
                return None;
            }
            last = Some(*leaf);
            let mut attributes = leaf.attributes;
            attributes.accessed &= !accessed;
            attributes.dirty &= !dirty;
            Some(attributes)
        });
        if let Some(previous) = last {
            count(previous);
        }
        result.map(|_| found)
    }
}

/// Changes one leaf of a locked table. `Ok(None)`: left alone; `Ok(Some(restricted))`: changed, and what was flushed.
#[inline]
pub(crate) fn update_entry<F: Format, E: Env, H: Divisible, const N: usize>(
    node: &Node<'_, F>,
    index: usize,
    page: Page,
    mut word: u64,
    gather: &mut Gather<'_, F, E, H, N>,
    change: &mut impl FnMut(&Leaf) -> Option<Attributes>,
) -> Result<Option<Option<PageRange>>, ()> {
    loop {
        let Entry::Leaf(leaf) = decode::<F>(page, node.level, word) else {
            unreachable!("a locked leaf became something else")
        };
        let Some(attributes) = change(&leaf) else {
            return Ok(None);
        };
        if !F::can_encode(node.level, leaf.frame, &attributes) {
            return Err(());
        }
        let new = F::leaf(node.level, leaf.frame, &attributes);
        if new == word {
            return Ok(None);
        }
        let expressed = F::attributes(node.level, new);
        let flush = needs_flush::<F>(&leaf.attributes, &expressed);
        if flush {
            gather.announce();
        }
        match node.change(index, word, new) {
            Ok(()) if flush => {
                let global = leaf.attributes.rights.contains(Rights::GLOBAL);
                gather.note(Stale::leaf(leaf.range(), global));
                return Ok(Some(Some(leaf.range())));
            }
            Ok(()) => return Ok(Some(None)),
            Err(found) => word = found,
        }
    }
}
