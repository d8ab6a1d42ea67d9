//! A page table: the root, and what is counted for all of it.
//!
//! | file | what |
//! |---|---|
//! | `make.rs` | empty tables, tables that borrow their upper part, lending |
//! | `look_up.rs` | one page, without a lock |
//! | `entry.rs` | what a word says, and which word is a page's |
//! | `flush.rs` | which translations a change must drop, on which CPUs |
//! | `destroy.rs` | the end |
//!
//! Invariants
//! - `P1`: `root` is an attached table of the top level from `new` to `destroy`.
//! - `P2`: every present entry of an attached table, the borrowed top entries excepted, stands for one handle of type
//!   `H` or for one attached table.
//! - `P3`: top entries from `borrowed_from` on are copies of another table's, which never change: the lender holds the
//!   tables below them for ever.
//! - `P4`: `unflushed` counts the gathers that are dirty (see `G1` in [`gather`](crate::Gather)).
//!
//! Locks: none of its own; one bit per table page (see `node.rs`).

mod destroy;
mod entry;
mod flush;
mod look_up;
mod make;

use core::fmt;
use core::marker::PhantomData;

use kmem_hal::lock::{IrqSafe, Lock};
use kmem_hal::sync::{AtomicBool, AtomicUsize, Ordering, fence};
use kmem_hal::{
    AllocError, Asid, Frame, FrameHandle, OwnedFrame, Page, PageRange, Root, Trace, TraceEvent,
};

pub use entry::Entry;
pub(crate) use entry::{decode, index_at, seen_from};

use crate::attributes::Rights;
use crate::cache::{self, Chain};
use crate::cursor::Cursor;
use crate::env::Env;
use crate::error::{RangeError, RootKnown};
use crate::format::{Format, level};
use crate::gather::Gather;
use crate::mutants::mutant;
use crate::node::Node;

/// The most levels that any format has.
pub(crate) const MAX_LEVELS: usize = 5;

/// The page table of one address space, or of the kernel.
///
/// Dropping one leaks everything it maps; [`destroy`](Self::destroy) gives it back.
#[doc(alias = "pgd")]
pub struct PageTable<F: Format, E: Env, H: FrameHandle> {
    env: E,
    root: Frame,
    levels: usize,
    asid: Asid,
    /// Top entries from here on belong to another table.
    borrowed_from: usize,
    /// Top entries from here on are lent to other tables.
    lent_from: AtomicUsize,
    unflushed: AtomicUsize,
    tables: AtomicUsize,
    exposed: AtomicBool,
    /// Whether a leaf was ever global.
    global: AtomicBool,
    /// Whether a table of level 2 ever had a leaf.
    huge: AtomicBool,
    /// Frames for copies of shared tables when there are no others ([`keep_spares`](Self::keep_spares)).
    spares: Lock<Chain, IrqSafe>,
    /// Whether there is a second root for user mode.
    pub(crate) isolated: bool,
    // Handles go in and come out on any thread that has a reference.
    handles: PhantomData<(F, Lock<H, ()>)>,
}

impl<F: Format, E: Env, H: FrameHandle> PageTable<F, E, H> {
    /// The first top entry that is lent to others, as all behind it; `usize::MAX` where none is.
    pub(crate) fn lent_from(&self) -> usize {
        self.lent_from.load(Ordering::Acquire)
    }

    /// Whether top entries from `index` on are lent to others.
    pub(crate) fn lends(&self, index: usize) -> bool {
        index >= self.lent_from()
    }

    #[inline(always)]
    pub(crate) fn top_index(&self, page: Page) -> usize {
        index_at::<F>(page.number(), self.levels())
    }

    /// Whether the entries that lead to a page are another table's.
    #[inline(always)]
    pub(crate) fn is_borrowed(&self, page: Page) -> bool {
        self.top_index(page) >= self.borrowed_from
    }

    /// What CR3 should hold.
    #[must_use]
    pub fn root(&self) -> Root {
        if !self.was_given_out() {
            self.exposed.store(true, Ordering::Relaxed);
            // Before the first load of the root, and so before the first walk: see `flush`.
            fence(Ordering::SeqCst);
        }
        self.root_quietly()
    }

    /// Whether somebody knows the root, and so may have loaded it.
    pub(crate) fn was_given_out(&self) -> bool {
        self.exposed.load(Ordering::Relaxed)
    }

    pub(crate) fn root_quietly(&self) -> Root {
        Root {
            frame: self.root,
            asid: self.asid,
        }
    }

    /// Gives the space the tag under which CPUs cache its translations, before anybody asks for the [`root`](Self::root). The caller flushed
    /// what the tag meant before.
    ///
    /// # Errors
    ///
    /// [`RootKnown`] where somebody asked for the root: what CPUs hold is under the tag that it had, and is flushed under that one.
    pub fn set_asid(&mut self, asid: Asid) -> Result<(), RootKnown> {
        if self.was_given_out() && !mutant!("tag-changes-while-loaded") {
            return Err(RootKnown);
        }
        self.asid = asid;
        Ok(())
    }

    /// The levels in use.
    #[must_use]
    #[inline(always)]
    pub fn levels(&self) -> usize {
        // Known when compiled, for most formats.
        if F::MIN_LEVELS == F::LEVELS.len() {
            F::MIN_LEVELS
        } else {
            self.levels
        }
    }

    /// Table frames of this table: the root and those shared with other spaces included, borrowed ones excepted.
    #[must_use]
    pub fn table_count(&self) -> usize {
        self.tables.load(Ordering::Relaxed)
    }

    /// The environment.
    #[must_use]
    pub fn env(&self) -> &E {
        &self.env
    }

    /// A gather for changes to this table; `N` blocks fit in it.
    pub fn gather<const N: usize>(&self) -> Gather<'_, F, E, H, N> {
        Gather::new(self)
    }

    /// Sees to it that `tables` frames are set aside for copies of shared tables, on which a cursor draws that
    /// [may](crate::Cursor::use_spares) when there are no others. [`destroy`](Self::destroy) gives them back.
    ///
    /// What lets an unmapping go through without memory: it copies at most the tables at both ends of its range.
    ///
    /// # Errors
    ///
    /// [`AllocError`]; those that were found are kept.
    pub fn keep_spares(&self, tables: usize) -> Result<(), AllocError> {
        loop {
            if self.spares.lock().length() >= tables {
                return Ok(());
            }
            let frame = cache::take(&self.env, F::TABLE_FRAME_LIMIT)?;
            self.spares.lock().put(&self.env, frame);
        }
    }

    /// How many frames are set aside.
    #[must_use]
    pub fn spares(&self) -> usize {
        self.spares.lock().length()
    }

    pub(crate) fn take_spare(&self) -> Option<OwnedFrame> {
        self.spares.lock().take_frame(&self.env)
    }

    /// A cursor over the pages of `range`.
    ///
    /// # Errors
    ///
    /// [`RangeError`] where the table does not translate all of the range, or does not own it.
    pub fn cursor(&self, range: PageRange) -> Result<Cursor<'_, F, E, H>, RangeError> {
        self.check(range)?;
        Ok(Cursor::new(self, range))
    }

    pub(crate) fn check(&self, range: PageRange) -> Result<(), RangeError> {
        let canonical = F::canonical(self.levels);
        let first = range.start();
        let inside = canonical.contains(first)
            && canonical
                .checked_add(first, (range.count() - 1) << kmem_hal::PAGE_SHIFT)
                .is_some();
        if !inside {
            return Err(RangeError::NotCanonical);
        }
        if self.is_borrowed(range.last()) {
            return Err(RangeError::Borrowed);
        }
        Ok(())
    }

    /// The part of one half of the space that is not borrowed.
    pub(crate) fn own_part(&self, half: PageRange) -> Option<PageRange> {
        let top = level::<F>(self.levels);
        if self.borrowed_from >= top.entries() || self.top_index(half.last()) < self.borrowed_from {
            return Some(half);
        }
        let base = half.first().number() & !((1u64 << (top.shift + top.bits)) - 1);
        let end = base + ((self.borrowed_from as u64) << top.shift);
        PageRange::new(half.first(), Page::new(end.checked_sub(1)?)?)
    }

    pub(crate) fn root_frame(&self) -> Frame {
        self.root
    }

    pub(crate) fn root_node(&self) -> Node<'_, F> {
        // SAFETY: P1.
        unsafe { Node::new(&self.env, self.root, self.levels) }
    }

    pub(crate) fn count_table(&self, frame: Frame, level: usize) {
        self.tables.fetch_add(1, Ordering::Relaxed);
        self.env
            .trace()
            .event(TraceEvent::TableMade(frame, level as u8));
    }

    pub(crate) fn discount_table(&self, frame: Frame, level: usize) {
        self.tables.fetch_sub(1, Ordering::Relaxed);
        self.env
            .trace()
            .event(TraceEvent::TableFreed(frame, level as u8));
    }

    /// Notes that a leaf gets these rights.
    #[inline(always)]
    pub(crate) fn note_global(&self, rights: Rights) {
        if rights.contains(Rights::GLOBAL) && !mutant!("global-not-noted") {
            // Before the entry that it is about.
            self.global.store(true, Ordering::Release);
        }
    }

    /// Notes that a table of this level gets a leaf.
    #[inline(always)]
    pub(crate) fn note_level(&self, number: usize) {
        if number == 2 && !self.huge.load(Ordering::Relaxed) {
            self.huge.store(true, Ordering::Relaxed);
        }
    }

    /// Notes what `parent` ever held: it is this table's too where they share tables.
    pub(crate) fn inherit(&self, parent: &Self) {
        if parent.may_be_global() && !mutant!("share-forgets-global") {
            self.note_global(Rights::GLOBAL);
        }
        if parent.huge.load(Ordering::Relaxed) {
            self.note_level(2);
        }
    }

    /// Whether tables of level 2 may have leaves: if not, their live counts are what they have of tables.
    #[inline]
    pub(crate) fn may_be_huge(&self) -> bool {
        self.huge.load(Ordering::Relaxed) && !mutant!("share-counts-huge-leaves")
    }

    /// Whether a leaf may be global.
    #[inline]
    pub(crate) fn may_be_global(&self) -> bool {
        self.global.load(Ordering::Acquire)
    }

    /// Counts tables that are reachable since a table was shared, or no more since one was given back.
    pub(crate) fn count_shared(&self, tables: usize, more: bool) {
        if more {
            self.tables.fetch_add(tables, Ordering::Relaxed);
        } else {
            self.tables.fetch_sub(tables, Ordering::Relaxed);
        }
    }

    /// Whether translations of this table are in the caches of CPUs that run other spaces.
    pub(crate) fn is_lent(&self) -> bool {
        self.lent_from() != usize::MAX
    }
}

impl<F: Format, E: Env, H: FrameHandle> fmt::Debug for PageTable<F, E, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "PageTable({}, root {}, {} tables)",
            F::NAME,
            self.root,
            self.table_count()
        )
    }
}
