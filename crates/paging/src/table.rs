//! A page table: the root, what is counted for all of it, and how it is flushed.
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

use core::fmt;
use core::marker::PhantomData;

use kmem_hal::lock::{IrqSafe, Lock};
use kmem_hal::sync::{AtomicBool, AtomicUsize, Ordering, fence};
use kmem_hal::{
    AllocError, Asid, Completion, Cpu, CpuSet, FlushRequest, FlushScope, Frame, FrameHandle, Grace,
    Mmu, Order, OwnedFrame, Page, PageRange, PhysAddr, Root, Trace, TraceEvent, VirtAddr,
};

use crate::attributes::{Leaf, Payload, Rights};
use crate::cache::{self, Chain};
use crate::cursor::Cursor;
use crate::env::Env;
use crate::error::{RangeError, RootKnown, TableError};
use crate::format::{Format, Kind, Word, is_sound, level};
use crate::gather::{FLUSH_CEILING, Gather, Stale};
use crate::mutants::mutant;
use crate::node::{self, Node, Slots};

/// The most levels that any format has.
pub(crate) const MAX_LEVELS: usize = 5;

/// What one page's entry holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Nothing.
    Empty,
    /// No frame, but something of the owner's.
    Payload(Payload),
    /// A leaf; it may cover more pages than the one asked for.
    Leaf(Leaf),
}

impl Entry {
    /// The leaf, if it is one.
    #[must_use]
    pub const fn leaf(self) -> Option<Leaf> {
        match self {
            Self::Leaf(leaf) => Some(leaf),
            _ => None,
        }
    }
}

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
    /// Makes an empty table with as many levels as the format has.
    ///
    /// Context: as everything that makes a table: where memory is short it may wait for a grace period, so not inside a read section of the
    /// environment's [`Grace`].
    ///
    /// # Errors
    ///
    /// [`TableError::Memory`] where there is no frame for the root.
    #[doc(alias = "pgd_alloc")]
    pub fn new(env: E) -> Result<Self, TableError> {
        Self::with_levels(env, F::LEVELS.len())
    }

    /// Makes an empty table of `levels` levels: for formats whose number of levels is known at run time.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    pub fn with_levels(env: E, levels: usize) -> Result<Self, TableError> {
        if !(F::MIN_LEVELS..=F::LEVELS.len()).contains(&levels) {
            return Err(TableError::BadLevels);
        }
        let root = Self::make_root(&env, levels).map_err(TableError::Memory)?;
        let table = Self::with_root(env, root, levels, level::<F>(levels).entries());
        if F::FIXED_TOP
            && let Err(error) = table.hold_top_from(0)
        {
            table.destroy(|_, _| {}, |_, _| {});
            return Err(TableError::Memory(error));
        }
        Ok(table)
    }

    /// A table of this root, whose top entries from `borrowed_from` on are another table's.
    pub(crate) fn with_root(env: E, root: Frame, levels: usize, borrowed_from: usize) -> Self {
        const {
            let word = core::mem::size_of::<F::Word>();
            assert!(
                is_sound(F::LEVELS, F::MIN_LEVELS, word),
                "the levels of this page-table format do not fit together"
            );
        }
        Self {
            root,
            env,
            levels,
            asid: Asid::ZERO,
            borrowed_from,
            lent_from: AtomicUsize::new(usize::MAX),
            unflushed: AtomicUsize::new(0),
            tables: AtomicUsize::new(1),
            exposed: AtomicBool::new(false),
            global: AtomicBool::new(false),
            huge: AtomicBool::new(false),
            isolated: false,
            spares: Lock::new(Chain::EMPTY),
            handles: PhantomData,
        }
    }

    /// Makes a table that shares the upper part of `kernel`, from page `from` to the top.
    ///
    /// What `kernel` maps there later is seen here as well. Pages from `from` on cannot be changed through the new
    /// table, whose own leaves may stand for another kind of handle. The lender must have called [`lend_from`](Self::lend_from) for that part.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    ///
    /// # Examples
    ///
    /// ```
    /// # mod example { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs")); }
    /// # use example::*;
    /// use kmem_hal::{DeviceFrame, Page};
    /// use kmem_paging::{PageTable, Rights, format::{Format, X86_64}};
    ///
    /// // The upper half is the kernel's in every space.
    /// let kernel = table();
    /// let half = Page::containing(X86_64::canonical(4).upper_start().unwrap());
    /// kernel.lend_from(half)?;
    /// let space = PageTable::<X86_64, _, DeviceFrame>::sharing(*kernel.env(), &kernel, half)?;
    /// let range = kmem_hal::PageRange::single(half);
    /// kernel.cursor(range)?.map(half, frame(0x8000), Rights::KERNEL_DATA).map_err(|(error, _)| error)?;
    /// assert_eq!(space.query(half), kernel.query(half));
    /// assert!(space.cursor(range).is_err(), "it is changed through the kernel's table");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn sharing<G: Env, K: FrameHandle>(
        env: E,
        kernel: &PageTable<F, G, K>,
        from: Page,
    ) -> Result<Self, TableError> {
        let index = kernel.top_index(from);
        if !kernel.lends(index) {
            return Err(TableError::CannotShare);
        }
        Self::borrowing(env, kernel, index)
    }

    /// Makes an empty table with as many levels as `other`, which shares what `other` shares: a fork's child.
    ///
    /// # Errors
    ///
    /// [`TableError::Memory`] where there is no frame for the root.
    pub fn empty_like(env: E, other: &Self) -> Result<Self, TableError> {
        if other.isolated {
            Self::paired(
                env,
                &other.root_node(),
                &other.user_node(),
                other.borrowed_from,
            )
        } else if other.borrowed_from < level::<F>(other.levels).entries() {
            // What was borrowed stays as it is for ever (P3), so it can be passed on.
            Self::borrowing(env, other, other.borrowed_from)
        } else {
            Self::with_levels(env, other.levels)
        }
    }

    /// Makes a table whose top entries from `index` on are `lender`'s, which never change.
    fn borrowing<G: Env, K: FrameHandle>(
        env: E,
        lender: &PageTable<F, G, K>,
        index: usize,
    ) -> Result<Self, TableError> {
        let root = Self::make_root(&env, lender.levels).map_err(TableError::Memory)?;
        let table = Self::with_root(env, root, lender.levels, index);
        {
            let own = table.root_node();
            let levels = lender.levels;
            let lender = lender.root_node();
            for index in index..level::<F>(levels).entries() {
                if mutant!("sharing-forgets-the-top") && index % 256 == 0 {
                    continue;
                }
                own.store(index, lender.load(index));
            }
        }
        if F::FIXED_TOP
            && let Err(error) = table.hold_top_from(0)
        {
            table.destroy(|_, _| {}, |_, _| {});
            return Err(TableError::Memory(error));
        }
        Ok(table)
    }

    /// Fills every top entry from the one of page `from` to the last with a table that stays for ever, so that other
    /// tables can share them.
    ///
    /// A boot-time call for the kernel's table: the upper half of x86-64 takes 256 tables. A table that was lent from
    /// cannot be destroyed.
    ///
    /// # Errors
    ///
    /// [`TableError::Memory`]; the tables made so far stay. [`TableError::CannotShare`] where the top entries can be
    /// leaves, or belong to another table.
    pub fn lend_from(&self, from: Page) -> Result<(), TableError> {
        let index = self.top_index(from);
        if level::<F>(self.levels).leaf || self.borrowed_from < level::<F>(self.levels).entries() {
            return Err(TableError::CannotShare);
        }
        if !F::FIXED_TOP {
            self.hold_top_from(index).map_err(TableError::Memory)?;
        }
        self.lent_from.fetch_min(index, Ordering::AcqRel);
        Ok(())
    }

    /// Whether top entries from `index` on are lent to others.
    pub(crate) fn lends(&self, index: usize) -> bool {
        index >= self.lent_from.load(Ordering::Acquire)
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

    /// Makes a table below every own top entry from `first` on, with a hold that keeps it attached.
    fn hold_top_from(&self, first: usize) -> Result<(), AllocError> {
        let entries = level::<F>(self.levels).entries().min(self.borrowed_from);
        for index in first..entries {
            let (frame, _) = cache::take_waiting(&self.env, F::TABLE_FRAME_LIMIT)?.into_raw();
            let page = Page::from_number((index as u64) << level::<F>(self.levels).shift);
            // SAFETY: the frame is private, zero, in reach and has a slot (T1).
            unsafe { Node::<F>::new(&self.env, frame, self.levels - 1) }.claim(page, self.root);
            let root = self.root_node();
            root.lock(&self.env);
            let word = root.load(index);
            let held = if root.kind(word) == Kind::Table {
                // SAFETY: an entry of the locked root points to an attached table.
                let node =
                    unsafe { Node::<F>::new(&self.env, F::table_frame(word), self.levels - 1) };
                node.lock(&self.env);
                node.add_live(1);
                node.unlock();
                false
            } else {
                // SAFETY: the table was made above and is private.
                unsafe { Node::<F>::new(&self.env, frame, self.levels - 1) }.add_live(1);
                root.store(index, F::table(self.levels, frame));
                root.add_live(1);
                true
            };
            root.unlock();
            if held {
                self.tables.fetch_add(1, Ordering::Relaxed);
                self.env
                    .trace()
                    .event(TraceEvent::TableMade(frame, self.levels as u8 - 1));
            } else {
                // SAFETY: O1 to O3: made above, private, never attached.
                cache::give(&self.env, unsafe {
                    OwnedFrame::from_raw(frame, Order::ZERO)
                });
            }
        }
        Ok(())
    }

    /// Makes a private, empty root table.
    fn make_root(env: &E, levels: usize) -> Result<Frame, AllocError> {
        let (frame, _) = cache::take_waiting(env, F::ROOT_FRAME_LIMIT)?.into_raw();
        // SAFETY: the frame is private, zero, in reach and has a slot (T1).
        unsafe { Node::<F>::new(env, frame, levels) }.claim(Page::ZERO, frame);
        Ok(frame)
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

    /// What is mapped at `page`, without a lock: safe against a concurrent free of the tables on the way.
    ///
    /// The answer may be old by the time it is used; decide under a [`cursor`](Self::cursor).
    ///
    /// Context: any, interrupts included.
    #[doc(alias = "follow_page")]
    #[inline]
    #[must_use]
    pub fn query(&self, page: Page) -> Entry {
        let levels = self.levels();
        if !F::canonical(levels).contains(page.start()) {
            return Entry::Empty;
        }
        // SAFETY: the closure makes no guard and does not panic: an index is below the entries of its table.
        unsafe { self.env.grace().read_with(|| self.descend(page)) }
    }

    /// Where an access to `address` ends, if it is mapped: as [`query`](Self::query), for the address alone.
    ///
    /// Costs the loads of the walk and a read section of the environment's [`Grace`].
    ///
    /// Context: any, interrupts included.
    ///
    /// # Examples
    ///
    /// See the crate's first page.
    #[doc(alias = "translate_addr")]
    #[doc(alias = "virt_to_phys")]
    #[inline]
    #[must_use]
    pub fn translate(&self, address: VirtAddr) -> Option<PhysAddr> {
        let levels = self.levels();
        if !F::canonical(levels).contains(address) {
            return None;
        }
        // SAFETY: as in `query`.
        unsafe { self.env.grace().read_with(|| self.find(address)) }
    }

    /// As `translate`, inside a read section.
    #[inline(always)]
    fn find(&self, address: VirtAddr) -> Option<PhysAddr> {
        let levels = self.levels();
        let map = self.env.map();
        let page = address.as_u64() >> kmem_hal::PAGE_SHIFT;
        let mut frame = self.root;
        macro_rules! find {
            ($($number:literal)*) => {$(
                if $number <= F::LEVELS.len() && $number <= levels {
                    // SAFETY: as in `descend`.
                    let words = unsafe { F::Word::words(map, frame) };
                    let word = F::Word::load(&words[index_at::<F>(page, $number)]);
                    if !F::is_table($number, word) {
                        let level = level::<F>($number);
                        if !level.leaf || !F::is_present($number, word) {
                            return None;
                        }
                        let inside = address.as_u64() & ((1 << (level.shift + kmem_hal::PAGE_SHIFT)) - 1);
                        return Some(PhysAddr::new(F::leaf_frame($number, word).start().as_u64() | inside));
                    }
                    frame = F::table_frame(word);
                }
            )*};
        }
        find!(5 4 3 2 1);
        let _ = frame;
        unreachable!("level 1 has no tables below it")
    }

    /// As `query`, inside a read section.
    #[inline(always)]
    fn descend(&self, page: Page) -> Entry {
        let levels = self.levels();
        let map = self.env.map();
        let mut shared = false;
        let mut frame = self.root;
        // Written out, so that every shift and mask is a constant: half the instructions of the loop.
        macro_rules! descend {
            ($($number:literal)*) => {$(
                if $number <= F::LEVELS.len() && $number <= levels {
                    // SAFETY: the root is attached (P1), and a table that an entry pointed to during this read section stays
                    // a table until the section ends: it is freed only after a grace period. Tables are in reach.
                    let words = unsafe { F::Word::words(map, frame) };
                    let word = F::Word::load(&words[index_at::<F>(page.number(), $number)]);
                    if !F::is_table($number, word) {
                        return seen_from(decode::<F>(page, $number, word), shared);
                    }
                    shared |= F::is_shared_table($number, word);
                    frame = F::table_frame(word);
                }
            )*};
        }
        descend!(5 4 3 2 1);
        let _ = (frame, shared);
        unreachable!("level 1 has no tables below it")
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
        if rights.contains(Rights::GLOBAL) {
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

    pub(crate) fn announce(&self) {
        self.unflushed.fetch_add(1, Ordering::AcqRel);
    }

    pub(crate) fn retract(&self) {
        self.unflushed.fetch_sub(1, Ordering::AcqRel);
    }

    /// Whether a change of this table has not been flushed yet, by this context or another.
    #[inline]
    pub(crate) fn has_unflushed(&self) -> bool {
        self.unflushed.load(Ordering::Acquire) != 0 && !mutant!("unflushed-not-counted")
    }

    /// Whether a hole that is filled must be flushed before anybody relies on it (see the cursor's `map.rs`).
    #[inline(always)]
    pub(crate) fn must_settle(&self) -> bool {
        F::CACHES_ABSENT || self.has_unflushed()
    }

    /// Flushes leaves of `stride` pages that were just filled, where that is needed. The caller holds no lock.
    #[inline]
    pub(crate) fn settle(&self, range: PageRange, stride: u64) {
        if self.must_settle() {
            self.flush_filled(range, stride);
        }
    }

    #[cold]
    fn flush_filled(&self, range: PageRange, stride: u64) {
        // What was there before may have been of any kind.
        self.flush_now(Stale {
            range,
            stride,
            global: true,
            local: true,
        });
    }

    /// Tells the CPUs, where they remember absent entries, that a table leads to `page` since now: whoever fills an entry of it tells them of that
    /// alone ([`settle`](Self::settle)).
    #[inline(always)]
    pub(crate) fn tell_made(&self, page: Page) {
        if F::CACHES_ABSENT {
            self.flush_made(page);
        }
    }

    #[cold]
    fn flush_made(&self, page: Page) {
        let stale = Stale {
            range: PageRange::single(page),
            stride: 1,
            global: true,
            local: true,
        };
        self.flush(Some(stale), true, 0);
    }

    /// Whether translations of this table are in the caches of CPUs that run other spaces.
    pub(crate) fn is_lent(&self) -> bool {
        self.lent_from.load(Ordering::Acquire) != usize::MAX
    }

    /// Drops translations on every CPU that may hold them, and waits. `own` is how many of the unflushed gathers are the
    /// caller's.
    pub(crate) fn flush(&self, stale: Option<Stale>, tables_freed: bool, own: usize) {
        let others = self.unflushed.load(Ordering::Acquire) > own;
        let lent = self.is_lent() && !mutant!("flush-of-a-lender-is-local");
        // Where all of the space goes, its global leaves go too.
        let global = stale.map_or_else(
            || self.may_be_global() && !mutant!("flush-of-all-spares-global"),
            |stale| stale.global,
        );
        // A lent table's translations sit under the tags of all spaces, where only a flush of everything reaches those
        // that are not global, and paging-structure caches.
        let everywhere = lent && (tables_freed || stale.is_none_or(|stale| stale.local));
        let scope = match stale {
            Some(Stale { range, stride, .. })
                if !others
                    && !everywhere
                    && (range.count().div_ceil(stride) <= FLUSH_CEILING
                        || mutant!("flush-takes-thirty-three")) =>
            {
                let range = if mutant!("flush-takes-thirty-three") {
                    let count = range.count().min(FLUSH_CEILING * stride);
                    PageRange::with_count(range.first(), count).unwrap_or(range)
                } else {
                    range
                };
                FlushScope::Pages { range, stride }
            }
            None if !tables_freed && !others => return,
            _ if everywhere || global || lent || others => FlushScope::Everything,
            _ => FlushScope::Space,
        };
        let request = FlushRequest {
            root: if mutant!("flush-under-tag-zero") {
                Root {
                    asid: Asid::ZERO,
                    ..self.root_quietly()
                }
            } else {
                self.root_quietly()
            },
            scope,
            global: (global || lent) && !mutant!("flush-spares-global"),
            tables_freed: tables_freed || others,
        };
        // The entry stores come before this look, as the flag's store comes before the first load of the root: either a CPU that loads it
        // now walks what was stored, or the root is seen to be out.
        fence(Ordering::SeqCst);
        let loaded = self.was_given_out() && !mutant!("loaded-is-never-loaded");
        if !loaded && !lent {
            // No CPU ever walked from here.
            self.env.trace().event(TraceEvent::Flushed(request));
            return;
        }
        let mmu = self.env.mmu();
        let pin = self.env.cpu().pin();
        let mut cpus = if lent {
            CpuSet::first(self.env.cpu().count())
        } else {
            mmu.flush_targets(&request)
        };
        cpus.remove(mmu.this_cpu());
        let sent = if cpus.is_empty() || mutant!("flush-interrupts-nobody") {
            Completion::DONE
        } else {
            mmu.shootdown(&cpus, &request)
        };
        if !mutant!("flush-forgets-this-cpu") {
            mmu.flush_local(&request);
        }
        if !mutant!("flush-does-not-wait") {
            mmu.complete(sent);
        }
        drop(pin);
        self.env.trace().event(TraceEvent::Flushed(request));
    }

    /// Flushes the translations of a change that was made without a gather.
    pub(crate) fn flush_now(&self, stale: Stale) {
        self.flush(Some(stale), false, 0);
    }

    /// Takes everything down: every handle goes to `leaves`, every payload to `payloads`, every table back.
    ///
    /// Whoever loaded the root promised that the tables stay while it is loaded
    /// ([`Mmu::load_root`](kmem_hal::Mmu::load_root)); so it is loaded nowhere.
    ///
    /// A table that was lent from is leaked instead: other tables point into it.
    ///
    /// Context: outside of read sections of the environment's `Grace`; waits for a grace period where tables were shared.
    #[doc(alias = "exit_mmap")]
    #[doc(alias = "free_pgtables")]
    pub fn destroy(self, mut leaves: impl FnMut(Leaf, H), mut payloads: impl FnMut(Page, Payload)) {
        if self.is_lent() {
            return;
        }
        while let Some(spare) = self.take_spare() {
            cache::give(&self.env, spare);
        }
        // Nobody loads the root any more, so what is dropped now does not come back.
        if self.exposed.load(Ordering::Relaxed) && !mutant!("destroy-does-not-flush") {
            self.flush(None, true, 0);
        }
        let mut node = self.root_node();
        let mut slots = Slots::new(&self.env);
        let mut indices = [0usize; MAX_LEVELS + 1];
        let mut parents = [Frame::ZERO; MAX_LEVELS + 2];
        let mut first = 0u64;
        loop {
            let number = node.level;
            let entries = if number == self.levels {
                level::<F>(number).entries().min(self.borrowed_from)
            } else {
                level::<F>(number).entries() - usize::from(mutant!("destroy-forgets-an-entry"))
            };
            let shift = level::<F>(number).shift;
            let mut below = None;
            if indices[number] == 0 && number > 1 {
                // Who gave its share of these tables up may have readers that are in them still.
                if drop_shares(&node, entries, &mut slots) {
                    self.env.grace().synchronize();
                }
            }
            // Entries are cleared and counted down, so that the rest of an empty table is not looked at.
            while indices[number] < entries && node.live() > 0 {
                let index = indices[number];
                indices[number] += 1;
                let word = node.load(index);
                if word == 0 {
                    continue;
                }
                node.store(index, 0);
                node.sub_live(1);
                let page = Page::containing(
                    F::canonical(self.levels)
                        .sign_extend(Page::from_number(first | (index as u64) << shift).start()),
                );
                match decode::<F>(page, number, word) {
                    Entry::Leaf(leaf) => {
                        // SAFETY: the entry is gone, and every translation was flushed above, after the root was
                        // loaded for the last time.
                        let handle = unsafe { H::from_entry(leaf.frame, leaf.order) };
                        leaves(leaf, handle);
                    }
                    Entry::Payload(payload) => payloads(page, payload),
                    Entry::Empty => {
                        below = Some((F::table_frame(word), index));
                        break;
                    }
                }
            }
            match below {
                Some((frame, index)) => {
                    parents[number] = node.frame;
                    first |= (index as u64) << shift;
                    indices[number - 1] = 0;
                    // SAFETY: an entry of an attached table pointed to it, and this is the only user left.
                    node = unsafe { Node::new(&self.env, frame, number - 1) };
                }
                None => {
                    for index in entries..level::<F>(number).entries() {
                        if number == self.levels {
                            node.store(index, 0);
                        }
                    }
                    self.discount_table(node.frame, number);
                    if number == self.levels {
                        self.drop_user_root();
                    }
                    // SAFETY: O1: nothing points to the table any more, no reader has a reference to `self`, and those of spaces that
                    // shared the table were waited for; O3: as above. It holds zeros.
                    cache::give(&self.env, unsafe {
                        OwnedFrame::from_raw(node.frame, Order::ZERO)
                    });
                    if number == self.levels {
                        return;
                    }
                    let shift = level::<F>(number + 1).shift;
                    first &= !((1u64 << (shift + level::<F>(number + 1).bits)) - 1);
                    // SAFETY: the parent is given back only after this child.
                    node = unsafe { Node::new(&self.env, parents[number + 1], number + 1) };
                }
            }
        }
    }
}

/// Gives up the shares of tables to which the first `count` entries of a table point, and clears those that point to other spaces' tables
/// now. Whether one that other spaces had shared is left to this one alone.
fn drop_shares<F: Format>(node: &Node<'_, F>, count: usize, slots: &mut Slots<'_>) -> bool {
    let mut left = node.live();
    let mut dropped = 0;
    let mut inherited = false;
    for entry in node.entries(0, count) {
        let word = F::Word::load(entry);
        if word == 0 {
            continue;
        }
        if F::is_table(node.level, word) && F::is_shared_table(node.level, word) {
            if node::drop_share(slots.of(F::table_frame(word))) {
                F::Word::store(entry, 0);
                dropped += 1;
            } else {
                inherited = true;
            }
        }
        left = left.saturating_sub(1);
        if left == 0 {
            break;
        }
    }
    node.sub_live(dropped);
    inherited
}

/// What an entry is worth below tables that are shared, if they are: rights are the AND over all levels.
#[inline(always)]
pub(crate) fn seen_from(entry: Entry, shared: bool) -> Entry {
    match entry {
        Entry::Leaf(mut leaf) if shared && !mutant!("share-shows-the-leafs-rights") => {
            leaf.attributes = leaf.attributes.write_protected();
            Entry::Leaf(leaf)
        }
        entry => entry,
    }
}

/// The index of a page in a table of level `number`.
#[inline(always)]
pub(crate) fn index_at<F: Format>(page: u64, number: usize) -> usize {
    let level = level::<F>(number);
    (page >> level.shift) as usize & (level.entries() - 1)
}

/// What the word of `page` in a table of level `number` says; a table is nothing.
#[inline(always)]
pub(crate) fn decode<F: Format>(page: Page, number: usize, word: u64) -> Entry {
    match F::kind(number, word) {
        Kind::Empty | Kind::Table => Entry::Empty,
        Kind::Payload => Entry::Payload(F::payload_of(word)),
        Kind::Leaf => {
            let level = level::<F>(number);
            Entry::Leaf(Leaf {
                page: Page::from_number(page.number() & !((1 << level.shift) - 1)),
                frame: F::leaf_frame(number, word),
                order: level.order(),
                attributes: F::attributes(number, word),
            })
        }
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
