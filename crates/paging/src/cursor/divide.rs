//! Mapping one block of frames as many leaves.
//!
//! The words of the leaves of one block follow each other as their frames do: in nearly every format by one and the same difference. So the
//! inner loop is a store and an addition a leaf, and tables that the block covers whole are written in private, without having been
//! zeroed.
//!
//! ```text
//!   block    [ ....................... 2^n frames ....................... ]
//!   leaves   | 2^m | 2^m | 2^m |    m: the largest leaf that page and frame are aligned for, `largest` at most
//! ```
//!
//! All leaves of a block are of one size: where page and frame are aligned for it at the beginning, they are throughout.
//!
//! Frames that are no block, of devices or of the linear map, are mapped in runs of one size each ([`Cursor::map_frames`]): up to the boundary
//! of a larger leaf and down again, so at most two runs for each size but the largest, each with a reserve of its own.
//!
//! Does not handle: a larger leaf in the middle of a block that begins between two.

use core::marker::PhantomData;

use kmem_hal::{DeviceFrame, Frame, FrameRange, Order, Page, PageRange, Trace, TraceEvent};

use super::{Cursor, Divisible, MapStopped};
use crate::attributes::Attributes;
use crate::env::Env;
use crate::error::{ChangeError, MapError};
use crate::format::{Format, Word, level};
use crate::node;
use crate::quiescent::Liveness;
use crate::table::index_at;

impl<'t, F: Format, E: Env, H: Divisible, S: Liveness> Cursor<'t, F, E, H, S> {
    /// Maps the block of `handle`, of any order, from `page` on, as leaves of the largest size that page and frame are aligned for, and of
    /// `largest` at most: [`Order::ZERO`] forces the smallest leaves, [`Order::MAX`] leaves the choice to alignment.
    ///
    /// Each leaf stands for its part of the block: what unmap gives back are the parts.
    ///
    /// # Errors
    ///
    /// [`MapError`] with the handle; nothing changed. [`MapError::Memory`] comes before the first store; where a page is occupied, the leaves
    /// made so far are taken back, and flushed.
    ///
    /// # Examples
    ///
    /// ```
    /// # mod machine { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/machine.rs")); }
    /// use kmem_hal::{DeviceFrame, Frame, Order, Page, PageRange};
    /// use kmem_paging::{PageTable, Rights, format::X86_64};
    ///
    /// # let machine = machine::Machine::new(64);
    /// # let env = machine.env();
    /// let table = PageTable::<X86_64, _, DeviceFrame>::new(env)?;
    /// // 16 MiB of a device: eight leaves of 2 MiB.
    /// let window = DeviceFrame::new(Frame::from_number(1 << 20), Order::new(12).unwrap()).unwrap();
    /// let first = Page::new(1 << 20).unwrap();
    /// let mut cursor = table.cursor(PageRange::with_count(first, 1 << 12).unwrap())?;
    /// cursor.map_divided(first, window, Order::MAX, Rights::KERNEL_DATA).map_err(|(error, _)| error)?;
    /// assert_eq!(cursor.query(first).leaf().unwrap().order.get(), 9);
    /// # drop(cursor);
    /// # table.destroy(|_, _| {}, |_, _| {});
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "remap_pfn_range")]
    #[doc(alias = "ioremap_page_range")]
    pub fn map_divided(
        &mut self,
        page: Page,
        handle: H,
        largest: Order,
        attributes: impl Into<Attributes>,
    ) -> Result<(), (MapError, H)> {
        let (frame, order) = handle.into_entry();
        self.divide(page, (frame, order), largest, &attributes.into())
            // SAFETY: H2: the numbers came from `into_entry` above, and no entry has them any more.
            .map_err(|error| (error, unsafe { H::from_entry(frame, order) }))
    }

    /// Maps device memory from `page` on, as leaves of the largest size that alignment allows at each place, and of `largest` at most: small
    /// ones up to the first boundary of larger ones, and so on up and down again.
    ///
    /// ```text
    ///   4K 4K | 2M | 2M | ...... 1G ...... | 2M | 4K 4K 4K
    /// ```
    ///
    /// `own` makes the table's kind of handle of each leaf; it runs under a table's lock.
    ///
    /// # Errors
    ///
    /// [`MapStopped`]; what is below its page was mapped.
    ///
    /// # Examples
    ///
    /// ```
    /// # mod machine { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/machine.rs")); }
    /// use kmem_hal::{DeviceFrame, FrameRange, Order, Page, PageRange};
    /// use kmem_paging::{PageTable, Rights, format::X86_64};
    ///
    /// # let machine = machine::Machine::new(64);
    /// # let env = machine.env();
    /// let table = PageTable::<X86_64, _, DeviceFrame>::new(env)?;
    /// // Three pages, 2 MiB, and a page.
    /// let frames = FrameRange::from_numbers(0x1_01fd, 0x1_0401).unwrap();
    /// let first = Page::new(0x9fd).unwrap();
    /// let mut cursor = table.cursor(PageRange::with_count(first, frames.count()).unwrap())?;
    /// cursor.map_frames(first, frames, Order::MAX, Rights::KERNEL_DATA, |frame| frame).map_err(|stopped| stopped.error)?;
    /// let order = |page| table.query(Page::new(page).unwrap()).leaf().unwrap().order.get();
    /// assert_eq!([0x9fd, 0x9ff, 0xa00, 0xc00].map(order), [0, 0, 9, 0]);
    /// # drop(cursor);
    /// # table.destroy(|_, _| {}, |_, _| {});
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "init_memory_mapping")]
    pub fn map_frames(
        &mut self,
        page: Page,
        frames: FrameRange,
        largest: Order,
        attributes: impl Into<Attributes>,
        mut own: impl FnMut(DeviceFrame) -> H,
    ) -> Result<(), MapStopped<H>> {
        let attributes = attributes.into();
        let levels = self.table.levels();
        let offset = frames.first().number().wrapping_sub(page.number());
        let stopped = |error, at| MapStopped {
            error,
            at,
            handle: None,
        };
        let mut at = page;
        let mut left = frames.count();
        if !PageRange::with_count(page, left).is_some_and(|pages| self.range.contains_range(pages))
        {
            return Err(stopped(MapError::OutOfRange, page));
        }
        while left > 0 {
            let (order, larger) = leaf_at::<F>(levels, at.number(), offset, left, largest);
            // Leaves of one size: as many as there are before a larger one may begin.
            let mut count = left & !(order.frames() - 1);
            if let Some(larger) = larger {
                count = count.min(larger - (at.number() & (larger - 1)));
            }
            let range =
                PageRange::with_count(at, count).ok_or(stopped(MapError::OutOfRange, at))?;
            self.map_range(range, order, attributes, |page, _| {
                let frame = Frame::from_number(page.number().wrapping_add(offset));
                DeviceFrame::new(frame, order).map(&mut own)
            })?;
            left -= count;
            if left > 0 {
                at = Page::from_number(at.number() + count);
            }
        }
        Ok(())
    }

    fn divide(
        &mut self,
        page: Page,
        (frame, order): (Frame, Order),
        largest: Order,
        attributes: &Attributes,
    ) -> Result<(), MapError> {
        let range = PageRange::with_count(page, order.frames()).ok_or(MapError::OutOfRange)?;
        if !self.range.contains_range(range) {
            return Err(MapError::OutOfRange);
        }
        let aligned = (page.number() | frame.number() | order.frames()).trailing_zeros();
        let number = (1..=self.table.levels())
            .rev()
            .find(|&number| {
                let level = level::<F>(number);
                level.leaf && level.shift <= aligned.min(u32::from(largest.get()))
            })
            .ok_or(MapError::BadOrder)?;
        let size = level::<F>(number).order();
        let last = frame.number() + (order.frames() - size.frames());
        let words = Words::<F>::new(number, frame, last, attributes)?;
        self.reserve_for_map(range, size)
            .map_err(MapError::Memory)?;
        self.table.note_global(attributes.rights);
        self.table.note_level(number);
        let mut done = 0;
        while done < order.frames() {
            let at = Page::from_number(page.number() + done);
            let left = (order.frames() - done) >> size.get();
            let (filled, failed) = self.fill_next(at, done >> size.get(), left, &words);
            if filled > 0 {
                let end = Page::from_number(at.number() + (filled << size.get()) - 1);
                if let Some(range) = PageRange::new(at, end) {
                    let frame = Frame::from_number(frame.number() + done);
                    let trace = self.table.env().trace();
                    trace.event(TraceEvent::Mapped(range, frame));
                }
            }
            done += filled << size.get();
            if let Some(error) = failed {
                self.take_parts_back(page, done);
                return Err(error);
            }
        }
        self.settle(range, size);
        Ok(())
    }

    /// Maps the next of the `left` leaves from number `start` on, which begins at `page`, as far as one table has room; gives how many, and
    /// what is in the way of the others.
    fn fill_next(
        &mut self,
        page: Page,
        start: u64,
        left: u64,
        words: &Words<F>,
    ) -> (u64, Option<MapError>) {
        let number = words.level;
        let level = level::<F>(number);
        let index = index_at::<F>(page.number(), number);
        let whole = index == 0 && left >= level.entries() as u64 && number < self.table.levels();
        let target = if whole { number + 1 } else { number };
        let node = match self.seek_own(page, target) {
            Ok(node) => node,
            Err(error) => return (0, Some(error.into())),
        };
        if whole && node.level == number + 1 {
            let above = index_at::<F>(page.number(), node.level);
            if node.load(above) == 0
                && let Some(table) = self.make_plain_table(number, page)
            {
                words.write(table.entries(0, level.entries()), start);
                table.add_live(level.entries() as u32);
                self.attach(&node, page, &table);
                return (level.entries() as u64, None);
            }
        }
        let node = match self.seek_own(page, number) {
            Ok(node) => node,
            Err(error) => return (0, Some(error.into())),
        };
        if node.level != number {
            // A table of which the block covers a part: it comes with its first leaf.
            return match self.place(page, number, words.at(start)) {
                Ok(()) => (1, None),
                Err(error) => (0, Some(error)),
            };
        }
        let room = left.min((level.entries() - index) as u64) as usize;
        let entries = node.entries(index, room);
        let free = entries
            .iter()
            .position(|entry| F::Word::load(entry) != 0)
            .unwrap_or(room);
        words.write(&entries[..free], start);
        node.add_live(free as u32);
        (free as u64, (free < room).then_some(MapError::Occupied))
    }

    /// Unmaps the first `pages` of a block whose rest could not be mapped. Its parts are one handle again.
    #[cold]
    fn take_parts_back(&mut self, page: Page, pages: u64) {
        let Some(range) = PageRange::with_count(page, pages) else {
            return;
        };
        let mut gather = self.table.gather::<32>();
        let mut rest = range;
        // D1: the parts are put together by whoever has their numbers.
        let forget = |part: H| {
            let _ = part.into_entry();
        };
        while let Err(ChangeError::Full { next }) = self.unmap(rest, &mut gather) {
            self.release();
            gather.commit(forget);
            match PageRange::new(next, range.last()) {
                Some(left) => rest = left,
                None => break,
            }
        }
        self.release();
        gather.commit(forget);
    }
}

/// The words of the leaves of one block, by their place in it.
struct Words<F: Format> {
    level: usize,
    /// The first leaf's frame.
    frame: u64,
    first: u64,
    /// From each word to the next, where that is the same throughout.
    step: Option<u64>,
    /// A leaf of frame 0.
    template: u64,
    format: PhantomData<F>,
}

impl<F: Format> Words<F> {
    /// For leaves of `level`, from that of `frame` to that of `last`.
    fn new(
        number: usize,
        frame: Frame,
        last: u64,
        attributes: &Attributes,
    ) -> Result<Self, MapError> {
        let size = level::<F>(number).order().frames();
        let ends = [frame, Frame::from_number(last)];
        if !ends
            .iter()
            .all(|end| F::can_encode(number, *end, attributes))
        {
            return Err(MapError::Unencodable);
        }
        let [first, end] = ends.map(|frame| F::leaf(number, frame, attributes));
        let more = (last - frame.number()) / size;
        let step = if more == 0 {
            Some(0)
        } else {
            let second = Frame::from_number(frame.number() + size);
            let step = F::leaf(number, second, attributes).wrapping_sub(first);
            // A frame number that is in one piece in the word: no carry leaves it, or the last word would be another.
            (first.wrapping_add(step.wrapping_mul(more)) == end).then_some(step)
        };
        Ok(Self {
            level: number,
            frame: frame.number(),
            first,
            step,
            template: F::leaf(number, Frame::ZERO, attributes),
            format: PhantomData,
        })
    }

    /// The word of leaf number `index` of the block.
    #[inline]
    fn at(&self, index: u64) -> u64 {
        if let Some(step) = self.step {
            return self.first.wrapping_add(step.wrapping_mul(index));
        }
        let frame = self.frame + index * level::<F>(self.level).order().frames();
        F::relocate(self.level, self.template, Frame::from_number(frame))
    }

    /// Writes the words from leaf number `index` on.
    #[inline]
    fn write(&self, entries: &[node::Entry<F>], index: u64) {
        if let Some(step) = self.step {
            let mut word = self.at(index);
            for entry in entries {
                F::Word::store(entry, word);
                word = word.wrapping_add(step);
            }
            return;
        }
        for (entry, index) in entries.iter().zip(index..) {
            F::Word::store(entry, self.at(index));
        }
    }
}

/// The order of the largest leaf that may begin at a page whose frame is `offset` above it, where `left` pages are left; and the pages of the next
/// larger one that may begin further up.
fn leaf_at<F: Format>(
    levels: usize,
    page: u64,
    offset: u64,
    left: u64,
    largest: Order,
) -> (Order, Option<u64>) {
    let mut found = Order::ZERO;
    for number in 1..=levels {
        let level = level::<F>(number);
        let order = level.order();
        if !level.leaf || order > largest {
            continue;
        }
        let low = order.frames() - 1;
        if offset & low != 0 {
            // Page and frame are never aligned for it together, nor for a larger one.
            break;
        }
        if page & low != 0 || order.frames() > left {
            return (found, Some(order.frames()));
        }
        found = order;
    }
    (found, None)
}
