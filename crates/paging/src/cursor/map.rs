//! Filling entries: a page, and a range block by block.
//!
//! A hole that is filled needs no flush where the hardware does not cache absent entries, and where no earlier change of
//! the table waits for its flush: the page may still be translated to what was there before (`G1` of the gather). In
//! that case the fill flushes its own pages before it returns.
//!
//! A table that a range covers whole is filled in private before it is attached.

use kmem_hal::{Frame, FrameHandle, Order, Page, PageRange, Trace, TraceEvent};

use super::{Cursor, Template};
use crate::attributes::{Attributes, Rights};
use crate::env::Env;
use crate::error::MapError;
use crate::format::{Format, Word, leaf_level, level};
use crate::mutants::mutant;
use crate::node::Node;
use crate::quiescent::Liveness;
use crate::table::index_at;

/// How far [`Cursor::map_range`] came, when it could not go on.
#[derive(Debug, PartialEq, Eq)]
pub struct MapStopped<H> {
    /// Why.
    pub error: MapError,
    /// The first page that is not mapped. What is below was mapped.
    pub at: Page,
    /// The handle for that page.
    pub handle: Option<H>,
}

impl<'t, F: Format, E: Env, H: FrameHandle, S: Liveness> Cursor<'t, F, E, H, S> {
    /// Maps the block of `handle` at `page`, as one leaf of the block's order.
    ///
    /// # Errors
    ///
    /// [`MapError`] with the handle; nothing changed.
    #[doc(alias = "set_pte_at")]
    #[doc(alias = "remap_pfn_range")]
    #[inline]
    pub fn map(
        &mut self,
        page: Page,
        handle: H,
        attributes: impl Into<Attributes>,
    ) -> Result<(), (MapError, H)> {
        let attributes = attributes.into();
        let (frame, order) = handle.into_entry();
        // The next page of the held leaf table, mapped as the one before: no walk, and one word is changed into another.
        if order == Order::ZERO
            && self.template.key == attributes.key()
            && let Some(node) = self.held_leaf(page)
            && F::can_encode(1, frame, &Attributes::new(Rights::READ))
        {
            let entry = node.leaf_entry(page.number());
            if F::Word::load(entry) == 0 {
                if !mutant!("map-held-not-counted") {
                    node.add_live(1);
                }
                F::Word::store(entry, F::relocate(1, self.template.word, frame));
                if !mutant!("map-held-does-not-settle") {
                    self.settle(PageRange::single(page), order);
                }
                let trace = self.table.env().trace();
                trace.event(TraceEvent::Mapped(PageRange::single(page), frame));
                return Ok(());
            }
        }
        self.map_slowly(page, frame, order, &attributes)
    }

    #[inline(never)]
    fn map_slowly(
        &mut self,
        page: Page,
        frame: Frame,
        order: Order,
        attributes: &Attributes,
    ) -> Result<(), (MapError, H)> {
        match self.map_raw(page, frame, order, attributes) {
            Ok(()) => {
                if F::can_encode(1, Frame::ZERO, attributes) {
                    // The table knows of global leaves from now on, for good.
                    self.table.note_global(attributes.rights);
                    self.template = Template {
                        key: attributes.key(),
                        word: F::leaf(1, Frame::ZERO, attributes),
                    };
                }
                self.settle(block(page, order), order);
                self.table
                    .env()
                    .trace()
                    .event(TraceEvent::Mapped(block(page, order), frame));
                Ok(())
            }
            // SAFETY: H2: the numbers came from `into_entry` above, and no entry got them.
            Err(error) => Err((error, unsafe { H::from_entry(frame, order) })),
        }
    }

    /// Maps `range` with the blocks that `next` gives, one after the other, each as one leaf.
    ///
    /// `next(page, pages)` gives the block for `page`, at which `pages` pages of the range are left; sizes may be mixed
    /// as far as alignment allows. Tables are reserved before the first store, so that memory is not a reason to stop
    /// half-way: `smallest` is the smallest order that `next` will give.
    ///
    /// `next` may run under a table's lock: it must not use this table's cursors.
    ///
    /// # Errors
    ///
    /// [`MapStopped`]: where the reserve could not be had, at the first page; where `next` gave `None`, with
    /// [`MapError::OutOfRange`]; where the page was occupied or a block did not fit.
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
    /// let range = pages(0x400, 3);
    /// let mut cursor = table.cursor(range)?;
    /// // The first frames come to hand one by one; all tables are there before the first store.
    /// let mut next = 0x8000;
    /// cursor
    ///     .map_range(range, Order::ZERO, Rights::USER_DATA, |_page, _left| {
    ///         next += 1;
    ///         Some(frame(next))
    ///     })
    ///     .map_err(|stopped| stopped.error)?;
    /// assert_eq!(cursor.query(page(0x402)).leaf().unwrap().frame.number(), 0x8003);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn map_range(
        &mut self,
        range: PageRange,
        smallest: Order,
        attributes: impl Into<Attributes>,
        mut next: impl FnMut(Page, u64) -> Option<H>,
    ) -> Result<(), MapStopped<H>> {
        let attributes = attributes.into();
        let stopped = |error, at, handle| Err(MapStopped { error, at, handle });
        let mut page = range.first();
        if !self.range.contains_range(range) {
            return stopped(MapError::OutOfRange, page, None);
        }
        if let Err(error) = self.reserve_for_map(range, smallest) {
            return stopped(MapError::Memory(error), page, None);
        }
        // What `next` gave that did not continue the run before it.
        let mut given: Option<Option<H>> = None;
        loop {
            let left = range.last().number() - page.number() + 1;
            if given.is_none()
                && let Some(built) = self.build(page, left, smallest, &attributes, &mut next)
            {
                if built.pages > 0 {
                    let end = page.number() + (built.pages - 1);
                    if let Some(filled) = PageRange::new(page, Page::from_number(end)) {
                        self.settle(filled, smallest);
                    }
                    if end == range.last().number() {
                        return Ok(());
                    }
                    page = Page::from_number(end + 1);
                }
                given = built.given;
                continue;
            }
            let handle = match given.take() {
                Some(handle) => handle,
                None => next(page, left),
            };
            let Some(handle) = handle else {
                return stopped(MapError::OutOfRange, page, None);
            };
            let (frame, order) = handle.into_entry();
            let mapped = if order.frames() > left {
                Err(MapError::OutOfRange)
            } else {
                self.map_raw(page, frame, order, &attributes)
            };
            if let Err(error) = mapped {
                // SAFETY: H2: the numbers came from `into_entry` above, and no entry got them.
                let handle = unsafe { H::from_entry(frame, order) };
                return stopped(error, page, Some(handle));
            }
            self.table
                .env()
                .trace()
                .event(TraceEvent::Mapped(block(page, order), frame));
            let mut end = page.number() + (order.frames() - 1);
            if end < range.last().number() {
                (end, given) = self.fill(page, end, range.last(), order, &attributes, &mut next);
            }
            if let Some(filled) = PageRange::new(page, Page::from_number(end)) {
                self.settle(filled, order);
            }
            if end == range.last().number() {
                return Ok(());
            }
            page = Page::from_number(end + 1);
        }
    }

    /// Where the table of leaves of `order` from `page` on is missing, and all of it is to be mapped: builds it in private, so that
    /// nobody has to zero it first, and attaches it under the lock of its parent. `None` where that is not so.
    #[inline(always)]
    fn build(
        &mut self,
        page: Page,
        left: u64,
        order: Order,
        attributes: &Attributes,
        next: &mut impl FnMut(Page, u64) -> Option<H>,
    ) -> Option<Built<H>> {
        let number = leaf_level::<F>(self.table.levels(), order)?;
        let level = level::<F>(number);
        let pages = 1u64 << (level.shift + level.bits);
        if page.number() & (pages - 1) != 0 || left < pages || number == self.table.levels() {
            return None;
        }
        let parent = self.seek_own(page, number + 1).ok()?;
        let index = index_at::<F>(page.number(), parent.level);
        if parent.level != number + 1 || parent.load(index) != 0 {
            return None;
        }
        let node = self.make_plain_table(number, page)?;
        self.table.note_global(attributes.rights);
        self.table.note_level(number);
        let template = F::leaf(number, Frame::ZERO, attributes);
        let trace = self.table.env().trace();
        let blocks = order.frames();
        let entries = node.entries(0, level.entries());
        let mut filled = 0u64;
        let mut at = page.number();
        let mut left = left;
        let mut given = None;
        for entry in entries {
            let page = Page::from_number(at);
            let Some(handle) = next(page, left) else {
                given = Some(None);
                break;
            };
            let (frame, found) = handle.into_entry();
            if found != order || !F::can_encode(number, frame, attributes) {
                // SAFETY: H2: the numbers came from `into_entry` above, and no entry got them.
                given = Some(Some(unsafe { H::from_entry(frame, found) }));
                break;
            }
            F::Word::store(entry, F::relocate(number, template, frame));
            trace.event(TraceEvent::Mapped(block(page, order), frame));
            filled += 1;
            at += blocks;
            left -= blocks;
        }
        for entry in &entries[filled as usize..] {
            if !mutant!("build-leaves-garbage") {
                F::Word::store(entry, 0);
            }
        }
        if filled == 0 {
            self.unmake_table(node);
        } else {
            node.add_live(filled as u32);
            self.attach(&parent, page, &node);
            if mutant!("build-forgets-the-user-root") {
                self.table.mirror(&parent, index, 0);
            }
        }
        Some(Built {
            pages: filled * blocks,
            given,
        })
    }

    /// Goes on mapping blocks of `order` behind page `end` of the held table, as long as its entries are empty and `next`
    /// gives such blocks; gives the last page that is mapped, and an answer of `next` that was of another kind.
    #[inline(always)]
    fn fill(
        &mut self,
        page: Page,
        mut end: u64,
        last: Page,
        order: Order,
        attributes: &Attributes,
        next: &mut impl FnMut(Page, u64) -> Option<H>,
    ) -> (u64, Option<Option<H>>) {
        let Some(node) = self.held else {
            return (end, None);
        };
        let number = node.level;
        let level = level::<F>(number);
        if u32::from(order.get()) != level.shift {
            return (end, None);
        }
        let template = F::leaf(number, Frame::ZERO, attributes);
        let trace = self.table.env().trace();
        let mut index = index_at::<F>(page.number(), number) + 1;
        let mut filled = Filled {
            node: &node,
            entries: 0,
        };
        while index < level.entries() && last.number() - end >= order.frames() {
            if node.load(index) != 0 {
                break;
            }
            let page = Page::from_number(end + 1);
            let Some(handle) = next(page, last.number() - end) else {
                return (end, Some(None));
            };
            let (frame, found) = handle.into_entry();
            if found != order || !F::can_encode(number, frame, attributes) {
                // SAFETY: H2: the numbers came from `into_entry` above, and no entry got them.
                let handle = unsafe { H::from_entry(frame, found) };
                return (end, Some(Some(handle)));
            }
            node.store(index, F::relocate(number, template, frame));
            filled.entries += 1;
            trace.event(TraceEvent::Mapped(block(page, order), frame));
            end += order.frames();
            index += 1;
        }
        (end, None)
    }

    fn map_raw(
        &mut self,
        page: Page,
        frame: Frame,
        order: Order,
        attributes: &Attributes,
    ) -> Result<(), MapError> {
        let (target, word) = self.encode(page, frame, order, attributes)?;
        self.place(page, target, word)
    }

    /// The level and the word of a leaf, after every check that needs no table.
    #[inline]
    pub(super) fn encode(
        &self,
        page: Page,
        frame: Frame,
        order: Order,
        attributes: &Attributes,
    ) -> Result<(usize, u64), MapError> {
        let target = leaf_level::<F>(self.table.levels(), order).ok_or(MapError::BadOrder)?;
        if page.number() & (order.frames() - 1) != 0 {
            return Err(MapError::Misaligned);
        }
        if !self.range.contains(page)
            || order.frames() - 1 > self.range.last().number() - page.number()
        {
            return Err(MapError::OutOfRange);
        }
        if !F::can_encode(target, frame, attributes) {
            return Err(MapError::Unencodable);
        }
        self.table.note_global(attributes.rights);
        self.table.note_level(target);
        Ok((target, F::leaf(target, frame, attributes)))
    }

    /// Flushes pages that were just filled, where that is needed (see the [module](self)).
    #[inline]
    pub(super) fn settle(&mut self, range: PageRange, order: Order) {
        if self.table.must_settle() {
            self.release();
            self.table.settle(range, order.frames());
        }
    }
}

/// What [`Cursor::build`] did.
struct Built<H> {
    /// Pages mapped.
    pages: u64,
    /// What `next` gave last, where that ended it.
    given: Option<Option<H>>,
}

/// Entries of a locked table that were filled and are not in its live count yet; they are when this is dropped.
struct Filled<'a, 't, F: Format> {
    node: &'a Node<'t, F>,
    entries: u32,
}

impl<F: Format> Drop for Filled<'_, '_, F> {
    #[inline]
    fn drop(&mut self) {
        if self.entries > 0 {
            self.node
                .add_live(self.entries - u32::from(mutant!("fill-counts-one-less")));
        }
    }
}

/// The pages of a block that starts at `page`.
pub(super) fn block(page: Page, order: Order) -> PageRange {
    let last = Page::from_number(page.number() | (order.frames() - 1));
    PageRange::new(page, last).unwrap_or(PageRange::single(page))
}
