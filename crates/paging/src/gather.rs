//! The gather: what a change leaves behind until every CPU has forgotten it.
//!
//! An entry that was cleared still lives in TLBs; a table that was detached still lives in paging-structure
//! caches and under lock-free readers. So an operation that takes something away puts it here, and only
//! [`Gather::commit`] gives it back, after the flush and, for tables, after a grace period.
//!
//! ```text
//!   cursor.unmap ──┬─ (frame, order) ──> [ . . . N ] ──┐
//!                  ├─ pages to flush ──> one hull      ├─ commit: flush ─> shoot down ─> wait ─> H, H, H ..
//!                  └─ empty tables ────> a list        ┘                     grace ─> zeroed tables
//! ```
//!
//! Invariants
//! - `G1`: from before the first store that needs a flush until that flush is complete, the gather is counted in its
//!   table's `unflushed`. Whoever flushes anything of a table with other unflushed gathers flushes the whole space,
//!   and whoever fills a hole meanwhile flushes what it filled. So a frame that moved from one page to another, or
//!   a gather that was forgotten, never leaves a translation that a later operation relied on to be gone.
//! - `G2`: what is in the gather is in no table, and no handle for it exists.
//! - `G3`: a gather is bound to one table; an operation on another one refuses it.
//!
//! Dropping a gather commits it and drops the handles. Forgetting one (`core::mem::forget`) leaks its frames, and
//! every later commit on the table flushes everything; nothing becomes unsound.
//!
//! Costs: one flush and one interrupt for each CPU that has the space, whatever the gather holds. Above
//! [`FLUSH_CEILING`] single invalidations the whole space is flushed instead.
//!
//! Source: Linux mm/mmu_gather.c and arch/x86/mm/tlb.c (the idea and the ceiling).

use core::fmt;
use core::mem::MaybeUninit;

use kmem_hal::{Frame, FrameHandle, FrameSink, Grace, Order, OwnedFrame, PageRange};

use crate::cache;
use crate::env::Env;
use crate::format::Format;
use crate::node::{self, Node};
use crate::table::PageTable;

/// Single-page invalidations above which the whole space is flushed, as Linux has it.
#[doc(alias = "tlb_single_page_flush_ceiling")]
pub const FLUSH_CEILING: u64 = 33;

/// The translations that a change may have left in TLBs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stale {
    /// The hull of the pages.
    pub range: PageRange,
    /// Pages of the smallest leaf among them.
    pub stride: u64,
    /// Whether some of them were global.
    pub global: bool,
    /// Whether some of them were not.
    pub local: bool,
}

impl Stale {
    pub(crate) fn leaf(range: PageRange, global: bool) -> Self {
        Self {
            range,
            stride: range.count(),
            global,
            local: !global,
        }
    }

    #[inline]
    fn join(self, other: Self) -> Self {
        Self {
            range: self.range.hull(other.range),
            stride: self.stride.min(other.stride),
            global: self.global || other.global,
            local: self.local || other.local,
        }
    }
}

/// Frames, tables and translations on their way out of a [`PageTable`].
///
/// `N` is how many blocks it can hold; tables need no room. 8 bytes each, on the caller's stack.
///
/// # Examples
///
/// See the crate's first page. Freeing a frame before the commit does not compile, since no value for it exists:
///
/// ```compile_fail,E0599
/// # use kmem_hal::{FrameSink, OwnedFrame};
/// # use kmem_paging::{Env, Gather, format::Format};
/// fn early<F: Format, E: Env>(gather: Gather<'_, F, E, OwnedFrame>, sink: &impl FrameSink) {
///     sink.free(gather.first_frame());
/// }
/// ```
#[doc(alias = "mmu_gather")]
#[must_use = "what a gather holds comes free only when it is committed"]
pub struct Gather<'t, F: Format, E: Env, H: FrameHandle, const N: usize = 32> {
    table: &'t PageTable<F, E, H>,
    blocks: [(u64, Order); N],
    length: usize,
    stale: Option<Stale>,
    tables: Option<Frame>,
    announced: bool,
}

impl<'t, F: Format, E: Env, H: FrameHandle, const N: usize> Gather<'t, F, E, H, N> {
    pub(crate) fn new(table: &'t PageTable<F, E, H>) -> Self {
        const {
            assert!(N > 0, "a gather without room for one block can do nothing");
        }
        Self {
            table,
            blocks: [(0, Order::ZERO); N],
            length: 0,
            stale: None,
            tables: None,
            announced: false,
        }
    }

    /// Makes an empty gather in `place`: for one that is too large for a kernel's stack.
    pub fn init_in<'p>(
        place: &'p mut MaybeUninit<Self>,
        table: &'t PageTable<F, E, H>,
    ) -> &'p mut Self {
        const {
            assert!(N > 0, "a gather without room for one block can do nothing");
        }
        let gather = place.as_mut_ptr();
        // SAFETY: each write goes to a field of `place`, and after them all fields are initialised.
        unsafe {
            (&raw mut (*gather).table).write(table);
            for index in 0..N {
                (&raw mut (*gather).blocks[index]).write((0, Order::ZERO));
            }
            (&raw mut (*gather).length).write(0);
            (&raw mut (*gather).stale).write(None);
            (&raw mut (*gather).tables).write(None);
            (&raw mut (*gather).announced).write(false);
            place.assume_init_mut()
        }
    }

    /// Blocks that it holds.
    #[must_use]
    pub fn length(&self) -> usize {
        self.length
    }

    /// Whether the next block would not fit.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.length == N
    }

    /// Whether there is nothing to flush and nothing to give back.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.stale.is_none() && self.length == 0 && self.tables.is_none()
    }

    /// Whether this gather may take what comes out of `table` (`G3`).
    pub(crate) fn belongs_to(&self, table: &PageTable<F, E, H>) -> bool {
        core::ptr::eq(self.table, table)
    }

    /// Counts this gather as unflushed. Called before the first store that needs a flush (`G1`).
    #[inline]
    pub(crate) fn announce(&mut self) {
        if !self.announced {
            self.announced = true;
            self.table.announce();
        }
    }

    /// Notes translations to flush. Announced before.
    #[inline]
    pub(crate) fn note(&mut self, stale: Stale) {
        debug_assert!(self.announced);
        self.stale = Some(match self.stale {
            Some(before) => before.join(stale),
            None => stale,
        });
    }

    /// Takes a block whose entry was cleared. There is room.
    #[inline]
    pub(crate) fn push(&mut self, frame: Frame, order: Order) {
        self.blocks[self.length] = (frame.number(), order);
        self.length += 1;
    }

    /// Takes a table that was detached.
    pub(crate) fn push_table(&mut self, table: &Node<'_, F>) {
        debug_assert!(self.announced);
        table.set_next(self.tables);
        self.tables = Some(table.frame);
    }

    /// Flushes every CPU that may hold what was taken away, waits for their answers, and hands every block back.
    ///
    /// Context: may wait for other CPUs. Not in interrupts, not with interrupts off, not inside a read section of the
    /// environment's [`Grace`](kmem_hal::Grace). The gather can be used again.
    #[doc(alias = "tlb_finish_mmu")]
    pub fn commit(&mut self, mut give: impl FnMut(H)) {
        if self.announced {
            self.table.flush(self.stale, self.tables.is_some(), 1);
            self.announced = false;
            self.stale = None;
            self.table.retract();
        }
        while let Some(last) = self.length.checked_sub(1) {
            self.length = last;
            let (number, order) = self.blocks[last];
            // SAFETY: the numbers were in an entry, which `into_entry` of this type filled; the entry is gone (G2) and
            // its translations were flushed above, since it was noted before it was pushed.
            give(unsafe { H::from_entry(Frame::from_number(number), order) });
        }
        if self.tables.is_some() {
            self.free_tables();
        }
    }

    #[cold]
    fn free_tables(&mut self) {
        let env = self.table.env();
        // Lock-free readers may be in the tables until now.
        env.grace().synchronize();
        while let Some(frame) = self.tables {
            let Some(slot) = env.slots().slot(frame) else {
                break;
            };
            self.tables = node::next(slot);
            // SAFETY: O1: a detached table is on this list alone (G2) and has no reader after the grace period; O2:
            // order 0; O3: the flush above was told that tables are freed.
            let table = unsafe { OwnedFrame::from_raw(frame, Order::ZERO) };
            // It holds zeros (N2), so T1 holds.
            cache::give(env, table);
        }
    }
}

impl<F: Format, E: Env, const N: usize> Gather<'_, F, E, OwnedFrame, N> {
    /// Commits, and frees every block into `sink`; gives how many.
    pub fn commit_to(&mut self, sink: &impl FrameSink) -> usize {
        let mut count = 0;
        self.commit(|block| {
            sink.free(block);
            count += 1;
        });
        count
    }
}

impl<F: Format, E: Env, H: FrameHandle, const N: usize> Drop for Gather<'_, F, E, H, N> {
    fn drop(&mut self) {
        self.commit(drop);
    }
}

impl<F: Format, E: Env, H: FrameHandle, const N: usize> fmt::Debug for Gather<'_, F, E, H, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gather")
            .field("length", &self.length)
            .field("capacity", &N)
            .field("stale", &self.stale)
            .field("tables", &self.tables.is_some())
            .finish()
    }
}
