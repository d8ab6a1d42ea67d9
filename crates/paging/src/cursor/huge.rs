//! Splitting huge leaves into tables of smaller ones, and merging them back.
//!
//! Splitting keeps every translation as it is: the new table says the same, entry by entry, with the accessed and
//! dirty bits of the huge leaf. Merging takes the entry away first, drops its translations everywhere, and only then puts
//! the huge leaf there, so that no accessed or dirty bit is lost and no CPU sees both sizes. Where the hardware caches absent entries, the commit
//! flushes once more.
//!
//! Does not handle: a CPU that may see both sizes of one page at once while a split is not flushed yet. Intel allows it
//! (SDM volume 3A, 4.10.2.3) where both say the same; AMD family 10h erratum 383 does not.

use kmem_hal::{AllocError, DeviceFrame, Frame, FrameHandle, Order, OwnedFrame, Page, PageRange};

use super::Cursor;
use crate::attributes::{Attributes, Leaf, Rights};
use crate::env::Env;
use crate::error::{ChangeError, HugeError, MoveError};
use crate::format::{Format, Kind, leaf_level, level};
use crate::gather::{Gather, Stale};
use crate::mutants::mutant;
use crate::node::{self, Node};
use crate::quiescent::Liveness;
use crate::table::{Entry, decode, index_at};

/// A handle whose block may be cut into smaller ones of the same kind, and put together again.
///
/// Every call that changes a range asks for it, since a range may cover a huge leaf in part: unmapping, protecting, moving, forking. What is
/// not divisible can be mapped, replaced and looked at, and comes back one 4 KiB leaf at a time ([`Cursor::set_payload`](crate::Cursor::set_payload)) or
/// when the table is [destroyed](crate::PageTable::destroy). Handles of single frames alone are divisible: there is nothing to cut.
///
/// # Safety
///
/// - `D1`: the numbers that `into_entry` gave for a block may be turned by `from_entry` into handles of its parts, one
///   for each, as if the block had been mapped part by part; and the other way round.
pub unsafe trait Divisible: FrameHandle {}

// SAFETY: D1: owning a block is owning its halves (`OwnedFrame::split`).
unsafe impl Divisible for OwnedFrame {}
// SAFETY: D1: nothing is owned.
unsafe impl Divisible for DeviceFrame {}

/// Why a huge leaf is not split.
#[derive(Clone, Copy, Debug)]
pub(crate) enum SplitError {
    /// No frame for the table.
    Memory(AllocError),
    /// Smaller leaves cannot say what that of this page says: their frames are too high (PSE-36).
    Indivisible(Page),
}

impl From<AllocError> for SplitError {
    fn from(error: AllocError) -> Self {
        Self::Memory(error)
    }
}

impl From<SplitError> for HugeError {
    fn from(error: SplitError) -> Self {
        match error {
            SplitError::Memory(error) => Self::Memory(error),
            SplitError::Indivisible(_) => Self::NotPossible,
        }
    }
}

impl From<SplitError> for ChangeError {
    fn from(error: SplitError) -> Self {
        match error {
            SplitError::Memory(error) => Self::Memory(error),
            SplitError::Indivisible(at) => Self::Indivisible { at },
        }
    }
}

impl From<SplitError> for MoveError {
    fn from(error: SplitError) -> Self {
        match error {
            SplitError::Memory(error) => Self::Memory(error),
            SplitError::Indivisible(at) => Self::Indivisible { at },
        }
    }
}

/// Whether leaves of level `part` can say what a larger one says: where that with the highest frames can, all can (`F2`).
pub(super) fn check_parts<F: Format>(leaf: &Leaf, part: usize) -> Result<(), SplitError> {
    let last = leaf.order.frames() - level::<F>(part).order().frames();
    let last = Frame::from_number(leaf.frame.number() + last);
    if F::can_encode(part, last, &leaf.attributes) || mutant!("split-cuts-frames-off") {
        Ok(())
    } else {
        Err(SplitError::Indivisible(leaf.page))
    }
}

impl<'t, F: Format, E: Env, H: Divisible, S: Liveness> Cursor<'t, F, E, H, S> {
    /// Splits the huge leaf that covers `page` into leaves of the next smaller size. Translations stay as they are.
    ///
    /// # Errors
    ///
    /// [`HugeError`]; nothing changed.
    ///
    /// # Examples
    ///
    /// ```
    /// # mod example { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs")); }
    /// # use example::*;
    /// use kmem_hal::Order;
    /// use kmem_paging::Rights;
    ///
    /// let table = table();
    /// let mut gather = table.gather::<1>();
    /// let mut cursor = table.cursor(pages(0x400, 512))?;
    /// cursor.map(page(0x400), block(0x8000, Order::HUGE_2M), Rights::USER_DATA).map_err(|(error, _)| error)?;
    /// cursor.split(page(0x423), &mut gather)?;
    /// let leaf = cursor.query(page(0x423)).leaf().unwrap();
    /// assert_eq!((leaf.order, leaf.frame.number()), (Order::ZERO, 0x8023));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "split_huge_pmd")]
    pub fn split<const N: usize>(
        &mut self,
        page: Page,
        gather: &mut Gather<'_, F, E, H, N>,
    ) -> Result<(), HugeError> {
        if !self.range.contains(page) {
            return Err(HugeError::OutOfRange);
        }
        if !gather.belongs_to(self.table) {
            return Err(HugeError::ForeignGather);
        }
        let node = self.seek_own(page, 1)?;
        let word = node.load(index_at::<F>(page.number(), node.level));
        if node.level == 1 || node.kind(word) != Kind::Leaf {
            return Err(HugeError::NotPossible);
        }
        Ok(self.split_held(page, gather)?)
    }

    /// Splits the leaf of `page` in the held table, which is above level 1.
    pub(super) fn split_held<const N: usize>(
        &mut self,
        page: Page,
        gather: &mut Gather<'_, F, E, H, N>,
    ) -> Result<(), SplitError> {
        let node = self.seek(page, 1);
        let index = index_at::<F>(page.number(), node.level);
        let mut word = node.load(index);
        if node.level == 1 || node.kind(word) != Kind::Leaf {
            return Ok(());
        }
        if let Entry::Leaf(leaf) = decode::<F>(page, node.level, word) {
            check_parts::<F>(&leaf, node.level - 1)?;
        }
        let table = self.make_table(node.level - 1, page)?;
        let entries = level::<F>(table.level).entries();
        let part = level::<F>(table.level).order();
        gather.announce();
        // While it is private (`N1`): others unmap in it as soon as it is there.
        table.add_live(entries as u32 - u32::from(mutant!("split-counts-one-less")));
        self.table.note_level(table.level);
        self.table.count_table(table.frame, table.level);
        let leaf = loop {
            let Entry::Leaf(leaf) = decode::<F>(page, node.level, word) else {
                unreachable!("checked above, and the table is locked")
            };
            for entry in 0..entries {
                let frame = Frame::from_number(leaf.frame.number() + entry as u64 * part.frames());
                let attributes = Attributes {
                    dirty: leaf.attributes.dirty && !mutant!("split-loses-dirty"),
                    ..leaf.attributes
                };
                let frame = if mutant!("split-repeats-the-frame") {
                    leaf.frame
                } else {
                    frame
                };
                table.store(entry, F::leaf(table.level, frame, &attributes));
            }
            match node.change::<S>(index, word, F::table(node.level, table.frame)) {
                Ok(()) => break leaf,
                Err(found) => word = found,
            }
        };
        let global = leaf.attributes.rights.contains(Rights::GLOBAL);
        gather.note(Stale::leaf(leaf.range(), global));
        Ok(())
    }

    /// Takes the frames for the tables that `range`'s two ends need, where they cut huge leaves, which can be split.
    #[inline(always)]
    pub(super) fn reserve_splits(&mut self, range: PageRange) -> Result<(), SplitError> {
        if self.held_leaves(range).is_some() {
            // A leaf table: nothing huge is in the range.
            return Ok(());
        }
        self.reserve_splits_slowly(range)
    }

    fn reserve_splits_slowly(&mut self, range: PageRange) -> Result<(), SplitError> {
        let first = self.splits_at(range.first(), range.first().number())?;
        let last = self.splits_at(range.last(), range.last().number().wrapping_add(1))?;
        if first + last == 0 || mutant!("split-reserves-nothing") {
            return Ok(());
        }
        Ok(self.reserve.fill::<F>(first + last)?)
    }

    /// Takes the frames for the tables that the two ends of the cursor's range need, where they cut huge leaves; gives how many.
    pub(crate) fn reserve_cuts(&mut self) -> Result<usize, SplitError> {
        self.reserve_splits(self.range)?;
        Ok(self.reserve.length())
    }

    /// Splits the huge leaves that the ends of the cursor's range cut.
    #[cold]
    pub(crate) fn cut_ends<const N: usize>(
        &mut self,
        gather: &mut Gather<'_, F, E, H, N>,
    ) -> Result<(), HugeError> {
        for page in [self.range.first(), self.range.last()] {
            while let Entry::Leaf(leaf) = self.query(page)
                && !self.range.contains_range(leaf.range())
            {
                self.split(page, gather)?;
            }
        }
        self.release();
        Ok(())
    }

    /// How many tables it takes until `boundary` is between two leaves at `page`, where those can be split.
    pub(super) fn splits_at(&self, page: Page, boundary: u64) -> Result<usize, SplitError> {
        let levels = self.table.levels();
        let cuts = |number| {
            let level = level::<F>(number);
            level.leaf && boundary & (level.order().frames() - 1) != 0
        };
        if !(2..=levels).any(cuts) {
            // Aligned for every leaf that there may be.
            return Ok(0);
        }
        let Entry::Leaf(leaf) = self.table.query(page) else {
            return Ok(0);
        };
        let top = leaf_level::<F>(levels, leaf.order).unwrap_or(1);
        let mut tables = 0;
        for number in 2..=top {
            let order = level::<F>(number).order();
            if boundary & (order.frames() - 1) != 0 {
                // What is cut at this level is the part with the boundary in it.
                let before = (page.number() & !(order.frames() - 1)) - leaf.page.number();
                let frame = Frame::from_number(leaf.frame.number() + before);
                let part = Leaf {
                    frame,
                    order,
                    ..leaf
                };
                check_parts::<F>(&part, number - 1)?;
                tables += 1;
            }
        }
        Ok(tables)
    }

    /// Puts one leaf of `order` where a full table of leaves of the next smaller size is, that map consecutive frames of
    /// an aligned block with the same attributes (accessed and dirty bits are joined). A table with
    /// [pins](Self::add_pins) is left as it is.
    ///
    /// While it runs the pages are absent for a moment: a fault there finds the table's lock taken, and the leaf after it.
    ///
    /// Context: may wait for other CPUs, under the table's locks.
    ///
    /// # Errors
    ///
    /// [`HugeError`]; nothing changed.
    ///
    /// # Examples
    ///
    /// ```
    /// # mod example { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs")); }
    /// # use example::*;
    /// use kmem_hal::Order;
    ///
    /// // 512 pages that happen to lie in a row, aligned at both ends.
    /// let table = mapped(pages(0x400, 512));
    /// let mut gather = table.gather::<1>();
    /// table.cursor(pages(0x400, 512))?.merge(page(0x400), Order::HUGE_2M, &mut gather)?;
    /// gather.commit(drop);
    /// assert_eq!(table.query(page(0x423)).leaf().unwrap().order, Order::HUGE_2M);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "collapse_huge_page")]
    pub fn merge<const N: usize>(
        &mut self,
        page: Page,
        order: Order,
        gather: &mut Gather<'_, F, E, H, N>,
    ) -> Result<(), HugeError> {
        let target = leaf_level::<F>(self.table.levels(), order).ok_or(HugeError::NotPossible)?;
        if target == 1 {
            return Err(HugeError::NotPossible);
        }
        let last = page.number() | (order.frames() - 1);
        if page.number() & (order.frames() - 1) != 0
            || !self.range.contains(page)
            || last > self.range.last().number()
        {
            return Err(HugeError::OutOfRange);
        }
        if !gather.belongs_to(self.table) {
            return Err(HugeError::ForeignGather);
        }
        let node = self.seek_own(page, target)?;
        let index = index_at::<F>(page.number(), node.level);
        let word = node.load(index);
        if node.level != target || node.kind(word) != Kind::Table {
            return Err(HugeError::NotPossible);
        }
        let env = self.table.env();
        // SAFETY: an entry of the held table points to an attached table, which stays attached while we have the lock.
        let table: Node<'t, F> = unsafe { Node::new(env, F::table_frame(word), target - 1) };
        table.lock(env);
        // Nobody else comes to lead here while the lock above is held.
        let others = F::is_shared_table(target, word)
            && table.shares() > 1
            && !mutant!("merge-takes-from-others");
        if others {
            table.unlock();
            return Err(HugeError::Shared);
        }
        let Some((frame, _)) = mergeable(&table, order) else {
            table.unlock();
            return Err(HugeError::NotPossible);
        };
        gather.announce();
        // From here on no CPU can walk into the table; after the flush none has it cached, so the bits stand still.
        node.store(index, 0);
        let range = super::map::block(page, order);
        let mut stale = Stale::leaf(range, true);
        stale.local = true;
        stale.stride = level::<F>(target - 1).order().frames();
        if !mutant!("merge-does-not-flush") {
            self.table.flush(Some(stale), true, 1);
        }
        let attributes = mergeable(&table, order).map_or(Attributes::default(), |found| found.1);
        for entry in 0..level::<F>(table.level).entries() {
            if !mutant!("merge-leaves-words") {
                table.store(entry, 0);
            }
        }
        table.sub_live(level::<F>(table.level).entries() as u32);
        node.store(index, F::leaf(target, frame, &attributes));
        self.table.note_level(target);
        table.unlock_stray();
        self.table.discount_table(table.frame, table.level);
        gather.push_table(&table);
        if F::CACHES_ABSENT {
            // Since the flush the page was absent, until the leaf was stored.
            gather.note(stale);
        }
        Ok(())
    }
}

/// The block and the joined attributes of a full table of leaves that could be one; the caller holds its lock.
fn mergeable<F: Format>(table: &Node<'_, F>, order: Order) -> Option<(Frame, Attributes)> {
    let level = level::<F>(table.level);
    let pinned = node::has_pins(table.slot) && !mutant!("merge-ignores-pins");
    if table.live() != level.entries() as u32 || pinned {
        return None;
    }
    let mut all: Option<(Frame, Attributes)> = None;
    for entry in 0..level.entries() {
        let Entry::Leaf(leaf) = decode::<F>(Page::ZERO, table.level, table.load(entry)) else {
            return None;
        };
        let mut attributes = leaf.attributes;
        let (frame, joined) = *all.get_or_insert((leaf.frame, attributes));
        let expected = frame.checked_add(entry as u64 * level.order().frames())?;
        attributes.accessed |= joined.accessed;
        attributes.dirty =
            (attributes.dirty && !mutant!("merge-takes-the-first-dirty")) || joined.dirty;
        let same = Attributes {
            accessed: attributes.accessed,
            dirty: attributes.dirty,
            ..joined
        };
        if leaf.frame != expected && !mutant!("merge-ignores-frames") || attributes != same {
            return None;
        }
        all = Some((frame, attributes));
    }
    all.filter(|(frame, _)| frame.is_aligned(order) || mutant!("merge-ignores-alignment"))
}
