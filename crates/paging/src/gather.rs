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
//! - `G4`: a leaf table that an operation covers whole is detached whole: its leaves stay in it, their handles belong to the gather, and
//!   the commit takes them out after the flush, when no CPU writes accessed or dirty bits into it any more, by plain loads and stores.
//! - `G3`: a gather is bound to one table; an operation on another one refuses it.
//!
//! Dropping a gather commits it and drops the handles, and what a handle's drop does not give back is leaked, frames of a
//! kernel's own table among it (`I3` of `OwnedFrame`). Forgetting one (`core::mem::forget`) leaks its frames, and
//! every later commit on the table flushes everything; nothing becomes unsound.
//!
//! Costs: one flush and one interrupt for each CPU that has the space, whatever the gather holds. Above
//! [`FLUSH_CEILING`] single invalidations the whole space is flushed instead.
//!
//! Source: Linux mm/mmu_gather.c and arch/x86/mm/tlb.c (the idea and the ceiling).

use core::fmt;
use core::mem::MaybeUninit;

use kmem_hal::{Frame, FrameHandle, FrameSink, Order, OwnedFrame, Page, PageRange};

use crate::attributes::Payload;
use crate::cache::{self, Chain};
use crate::cursor::child;
use crate::env::Env;
use crate::format::{Format, Kind, Word, level};
use crate::mutants::mutant;
use crate::node::Node;
use crate::table::PageTable;

/// Single-page invalidations above which the whole space is flushed, as Linux has it.
#[doc(alias = "tlb_single_page_flush_ceiling")]
pub const FLUSH_CEILING: u64 = 33;

/// Room for an order beside a frame number in a word.
const ORDER_BITS: u32 = 8;

/// In place of an order: a share of a table, with its level.
const SHARE: u64 = 1 << 7;

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
}

/// What is noted of all changes: the hull of their pages. Empty where `first` is above `last`.
#[derive(Clone, Copy)]
struct Hull {
    first: u64,
    last: u64,
    stride: u64,
    global: bool,
    local: bool,
}

impl Hull {
    const EMPTY: Self = Self {
        first: u64::MAX,
        last: 0,
        stride: u64::MAX,
        global: false,
        local: false,
    };

    fn is_empty(self) -> bool {
        self.first > self.last
    }

    fn stale(self) -> Option<Stale> {
        if self.is_empty() {
            return None;
        }
        let (first, last) = (Page::from_number(self.first), Page::from_number(self.last));
        Some(Stale {
            range: PageRange::new(first, last)?,
            stride: self.stride,
            global: self.global,
            local: self.local,
        })
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
    /// The first `length` are set: frame number and order.
    blocks: [MaybeUninit<u64>; N],
    length: usize,
    stale: Hull,
    /// From this page on, a leaf of level 1 that is not global only raises the end of the hull: the gather is announced, and the hull has
    /// the rest.
    steady: u64,
    tables: Chain,
    /// Leaf tables that were detached with their leaves (`G4`).
    whole: Chain,
    /// Blocks that are shares of tables.
    shares: usize,
    announced: bool,
}

impl<'t, F: Format, E: Env, H: FrameHandle, const N: usize> Gather<'t, F, E, H, N> {
    pub(crate) fn new(table: &'t PageTable<F, E, H>) -> Self {
        const {
            assert!(N > 0, "a gather without room for one block can do nothing");
        }
        Self {
            table,
            blocks: [MaybeUninit::uninit(); N],
            length: 0,
            stale: Hull::EMPTY,
            steady: u64::MAX,
            tables: Chain::EMPTY,
            whole: Chain::EMPTY,
            shares: 0,
            announced: false,
        }
    }

    /// Makes an empty gather in `place`, which `work` fills: for one that is too large for a kernel's stack. What it did not commit is
    /// committed as by a drop.
    pub fn with_in<R>(
        place: &mut MaybeUninit<Self>,
        table: &'t PageTable<F, E, H>,
        work: impl FnOnce(&mut Self) -> R,
    ) -> R {
        const {
            assert!(N > 0, "a gather without room for one block can do nothing");
        }
        let gather = place.as_mut_ptr();
        // SAFETY: each write goes to a field of `place`, and after them all fields are initialised; the blocks need not be.
        unsafe {
            (&raw mut (*gather).table).write(table);
            (&raw mut (*gather).length).write(0);
            (&raw mut (*gather).stale).write(Hull::EMPTY);
            (&raw mut (*gather).steady).write(u64::MAX);
            (&raw mut (*gather).tables).write(Chain::EMPTY);
            (&raw mut (*gather).whole).write(Chain::EMPTY);
            (&raw mut (*gather).shares).write(0);
            (&raw mut (*gather).announced).write(false);
        }
        let placed = Placed(place);
        // SAFETY: initialised above.
        work(unsafe { placed.0.assume_init_mut() })
    }

    /// Blocks that it holds, those in tables that were detached whole excepted.
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
        self.stale.is_empty() && self.length == 0 && self.tables.is_empty() && self.whole.is_empty()
    }

    /// Whether this gather may take what comes out of `table` (`G3`).
    #[inline]
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
        let (first, last) = (stale.range.first().number(), stale.range.last().number());
        self.note_pages(first, last, stale.stride, stale.global, stale.local);
    }

    /// As [`note`](Self::note), by numbers: leaves of `stride` pages each in pages `first ..= last`.
    #[inline(always)]
    pub(crate) fn note_pages(
        &mut self,
        first: u64,
        last: u64,
        stride: u64,
        global: bool,
        local: bool,
    ) {
        debug_assert!(self.announced);
        let hull = &mut self.stale;
        if !hull.is_empty() && mutant!("hull-keeps-the-first") {
            return;
        }
        if mutant!("hull-takes-the-larger-stride") {
            hull.stride = if hull.is_empty() { 0 } else { hull.stride }.max(stride);
            hull.first = hull.first.min(first);
            hull.last = hull.last.max(last);
            hull.global |= global;
            hull.local |= local;
            return;
        }
        let last = if mutant!("hull-ends-early") && last > first {
            last - 1
        } else {
            last
        };
        let global = global && !mutant!("hull-forgets-global");
        hull.first = hull.first.min(first);
        hull.last = hull.last.max(last);
        hull.stride = hull.stride.min(stride);
        hull.global |= global;
        hull.local |= local;
    }

    /// Announces and notes one leaf of level 1, before its store.
    #[inline(always)]
    pub(crate) fn announce_page(&mut self, page: u64, global: bool) {
        if page < self.steady || global {
            return self.announce_first_page(page, global);
        }
        if page > self.stale.last && !mutant!("hull-does-not-grow") {
            self.stale.last = page;
        }
    }

    #[inline(never)]
    fn announce_first_page(&mut self, page: u64, global: bool) {
        self.announce();
        self.note_pages(page, page, 1, global, !global);
        let hull = &self.stale;
        let mixed = !hull.local || hull.stride > 1;
        let keeps = mutant!("hull-keeps-the-first");
        let takes = mutant!("hull-takes-the-larger-stride");
        self.steady = if mixed || keeps || takes {
            u64::MAX
        } else {
            hull.first
        };
    }

    /// Takes a block whose entry was cleared. There is room.
    #[inline]
    pub(crate) fn push(&mut self, frame: Frame, order: Order) {
        let packed = frame.number() << ORDER_BITS | u64::from(order.get());
        self.blocks[self.length] = MaybeUninit::new(packed);
        self.length += 1;
    }

    /// Takes a share of a table of `level` that this space gives up. There is room.
    #[inline]
    pub(crate) fn push_share(&mut self, table: Frame, level: usize) {
        debug_assert!(self.announced);
        if mutant!("share-not-given-up") {
            return;
        }
        let packed = table.number() << ORDER_BITS | (SHARE | level as u64);
        self.blocks[self.length] = MaybeUninit::new(packed);
        self.length += 1;
        self.shares += 1;
    }

    /// Takes a table that was detached empty.
    #[inline]
    pub(crate) fn push_table(&mut self, table: &Node<'_, F>) {
        debug_assert!(self.announced);
        self.tables.push(table.frame, table.slot);
    }

    /// Takes a leaf table that was detached with its leaves (`G4`).
    #[inline]
    pub(crate) fn push_whole(&mut self, table: &Node<'_, F>) {
        debug_assert!(self.announced);
        self.whole.push(table.frame, table.slot);
    }

    /// Flushes every CPU that may hold what was taken away, waits for their answers, and hands every block back.
    ///
    /// Context: may wait for other CPUs. Not in interrupts, not with interrupts off, not inside a read section of the
    /// environment's [`Grace`](kmem_hal::Grace). The gather can be used again.
    #[doc(alias = "tlb_finish_mmu")]
    #[inline]
    pub fn commit(&mut self, give: impl FnMut(H)) {
        self.commit_with(give, drop);
    }

    /// As [`commit`](Self::commit), and hands over the payloads of the tables that were detached whole or given up; those of other tables
    /// were shown by [`unmap_with`](crate::Cursor::unmap_with) or [`unmap_giving`](crate::Cursor::unmap_giving).
    #[inline(always)]
    pub fn commit_with(&mut self, mut give: impl FnMut(H), mut payloads: impl FnMut(Payload)) {
        if mutant!("commit-gives-before-the-flush") {
            while let Some(last) = self.length.checked_sub(1) {
                self.length = last;
                // SAFETY: none, on purpose: the fault is that the translations are not flushed yet.
                let packed = unsafe { self.blocks[last].assume_init() };
                let order = Order::new((packed & ((1 << ORDER_BITS) - 1)) as u8);
                let frame = Frame::from_number(packed >> ORDER_BITS);
                // SAFETY: as above.
                give(unsafe { H::from_entry(frame, order.unwrap_or(Order::ZERO)) });
            }
        }
        self.flush();
        while let Some(last) = self.length.checked_sub(1) {
            self.length = last;
            // SAFETY: `push` set it, and `length` went beyond it since.
            let packed = unsafe { self.blocks[last].assume_init() };
            let frame = Frame::from_number(packed >> ORDER_BITS);
            if packed & SHARE != 0 {
                self.shares -= 1;
                self.give_share(
                    frame,
                    (packed & (SHARE - 1)) as usize,
                    &mut give,
                    &mut payloads,
                );
                continue;
            }
            let order = Order::new((packed & ((1 << ORDER_BITS) - 1)) as u8).unwrap_or(Order::ZERO);
            // SAFETY: the numbers were in an entry, which `into_entry` of this type filled; the entry is gone (G2) and
            // its translations were flushed above, since it was noted before it was pushed.
            give(unsafe { H::from_entry(frame, order) });
        }
        if !self.whole.is_empty() {
            self.empty_whole(&mut give, &mut payloads);
        }
        if !self.tables.is_empty() {
            self.free_tables();
        }
    }

    /// Flushes what was noted.
    #[inline(never)]
    fn flush(&mut self) {
        if self.announced {
            let freed = !self.tables.is_empty() || !self.whole.is_empty() || self.shares > 0;
            if !mutant!("commit-does-not-flush") {
                let freed = freed && !mutant!("commit-hides-freed-tables");
                let own = if mutant!("commit-thinks-it-is-alone") {
                    usize::MAX
                } else {
                    1
                };
                self.table.flush(self.stale.stale(), freed, own);
            }
            self.announced = false;
            self.stale = Hull::EMPTY;
            self.steady = u64::MAX;
            self.table.retract();
        }
    }

    /// Gives up a share of a table: where it is the last, the table comes down.
    #[cold]
    fn give_share(
        &mut self,
        frame: Frame,
        number: usize,
        give: &mut impl FnMut(H),
        payloads: &mut impl FnMut(Payload),
    ) {
        let env = self.table.env();
        // SAFETY: the share keeps the table.
        let table = unsafe { Node::<F>::new(env, frame, number) };
        if table.drop_share() {
            return;
        }
        // Nobody else leads here, and after the flush no CPU walks here.
        table.lock(env);
        table.unlock_stray();
        let mut cleared = 0;
        for (index, entry) in table
            .entries(0, level::<F>(number).entries())
            .iter()
            .enumerate()
        {
            let word = F::Word::load(entry);
            if word == 0 {
                continue;
            }
            if F::is_table(number, word) {
                let below = child(env, &table, index);
                if !below.drop_share() {
                    below.lock(env);
                    below.unlock_stray();
                    self.whole.push(below.frame, below.slot);
                }
            } else if F::kind(number, word) == Kind::Leaf {
                let order = level::<F>(number).order();
                // SAFETY: `into_entry` of this type filled the entry; nobody leads to it, and its translations were flushed by
                // each space that gave its share up.
                give(unsafe { H::from_entry(F::leaf_frame(number, word), order) });
            } else {
                payloads(F::payload_of(word));
            }
            F::Word::store(entry, 0);
            cleared += 1;
        }
        table.sub_live(cleared);
        self.tables.push(frame, table.slot);
    }

    /// Takes the leaves out of tables that were detached whole. The loop of unmapping a range: present leaves come first in it, and its loads and
    /// stores order nothing.
    #[inline(always)]
    fn empty_whole(&mut self, give: &mut impl FnMut(H), payloads: &mut impl FnMut(Payload)) {
        let env = self.table.env();
        while let Some(frame) = self.whole.first() {
            // SAFETY: a detached table that the list owns, of the format's level 1.
            let table = unsafe { Node::<F>::new(env, frame, 1) };
            for entry in table.entries(0, level::<F>(1).entries()) {
                // No CPU reaches the entry after the flush, so nothing else writes to it (G4).
                let word = F::Word::load_private(entry);
                let clear = || {
                    if !mutant!("whole-keeps-its-words") {
                        F::Word::clear_private(entry);
                    }
                };
                // SAFETY: `into_entry` of this type filled the entry; it is gone, and its translations were flushed.
                let handle = || unsafe { H::from_entry(F::leaf_frame(1, word), Order::ZERO) };
                if F::is_present(1, word) {
                    clear();
                    give(handle());
                } else if word != 0 {
                    clear();
                    match F::kind(1, word) {
                        Kind::Leaf => give(handle()),
                        _ => payloads(F::payload_of(word)),
                    }
                }
            }
            table.sub_live(table.live());
            self.whole.pop(table.slot);
            self.tables.push(frame, table.slot);
        }
    }

    #[cold]
    fn free_tables(&mut self) {
        let env = self.table.env();
        // SAFETY: a detached table is on this list alone (G2); the flush above was told that tables are freed; they hold zeros (N2, G4).
        // So T2 holds.
        unsafe { cache::retire(env, core::mem::replace(&mut self.tables, Chain::EMPTY)) };
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

/// An initialised value in a place that would forget it.
struct Placed<'p, G>(&'p mut MaybeUninit<G>);

impl<G> Drop for Placed<'_, G> {
    fn drop(&mut self) {
        if !mutant!("placed-gather-is-forgotten") {
            // SAFETY: whoever made this initialised it, and it is used no more.
            unsafe { self.0.assume_init_drop() };
        }
    }
}

impl<F: Format, E: Env, H: FrameHandle, const N: usize> fmt::Debug for Gather<'_, F, E, H, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gather")
            .field("length", &self.length)
            .field("capacity", &N)
            .field("stale", &self.stale.stale())
            .field("tables", &(self.tables.length() + self.whole.length()))
            .finish()
    }
}
