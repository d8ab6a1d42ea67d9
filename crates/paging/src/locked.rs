//! One page's entry with its leaf table locked: all that a page fault needs.
//!
//! ```text
//!   read section:  root ── level 3 ── level 2 ── leaf table, try to lock      none, or one that others share: None, go on with a cursor
//!   lock held:                                    look at the word, change it      somebody has the lock: wait outside, walk again
//! ```
//!
//! A [`Cursor`](crate::Cursor) keeps a position, a path and a reserve for the pages that follow, takes shared tables back and makes
//! tables. A fault has one page, whose leaf table is there and its space's own nearly always: it walks, locks, and is done.
//!
//! Invariants
//! - `K1`: the table is an attached leaf table, its lock is this value's, and every entry that leads to it is this space's own (`U4`
//!   of the cursor): so the table is not shared before the lock is let go, since whoever forks waits for, or keeps out, whoever changes tables.
//! - `K2`: nobody waits for the lock inside a read section, so that a waiter keeps no grace period from its end.
//!
//! Costs: the loads of the walk, a read section, and two locked instructions.
//!
//! Does not handle: huge leaves, tables that are missing or shared ([`PageTable::lock_entry`] says `None`).
//!
//! Context: as for a cursor that holds a table.

use core::fmt;

use kmem_hal::{Frame, FrameHandle, Grace, Order, Page, PageRange, Trace, TraceEvent};

use crate::attributes::{Attributes, Leaf, Rights};
use crate::env::Env;
use crate::error::MapError;
use crate::format::{Format, Word};
use crate::gather::Stale;
use crate::mutants::mutant;
use crate::node::{Node, View};
use crate::quiescent::{Live, Liveness};
use crate::table::{Entry, PageTable, decode, index_at};

/// The entry of one page in a leaf table of the space's own, which stays locked until this is dropped.
///
/// Changes take effect at once: nothing that they do leaves a translation behind.
///
/// Context: task context, interrupts on. A context that has one must not open a [`Cursor`](crate::Cursor) on pages of the same leaf table, nor
/// lock another entry of it.
///
/// # Examples
///
/// ```
/// # mod example { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs")); }
/// # use example::*;
/// use kmem_paging::Rights;
///
/// let table = mapped(pages(0x400, 1));
/// let mut entry = table.lock_entry(page(0x400)).expect("a leaf table of its own");
/// // A right more, accessed and dirty: done, and nobody has to be told. A right less: a cursor's `update`, and a flush.
/// assert!(entry.relax(Rights::USER_DATA | Rights::EXECUTE, true));
/// assert!(!entry.relax(Rights::READ | Rights::USER, false));
/// ```
#[doc(alias = "pte_offset_map_lock")]
#[must_use = "the table is unlocked when this is dropped"]
pub struct LockedEntry<'t, F: Format, E: Env, H: FrameHandle> {
    table: &'t PageTable<F, E, H>,
    node: Node<'t, F>,
    page: Page,
}

/// What a walk found.
enum Found<'t, F: Format> {
    /// A leaf table, locked.
    Leaf(Node<'t, F>),
    /// A leaf table that somebody has locked or just detached.
    Again,
    /// No leaf table of the space's own.
    Nothing,
}

impl<F: Format, E: Env, H: FrameHandle> PageTable<F, E, H> {
    /// Locks the leaf table of `page`, where there is one that is this space's own; `None` where there is none, a huge leaf is in its place,
    /// another space shares it or a table above it, or the space does not own the page: a [cursor](Self::cursor) says which, and helps.
    ///
    /// Context: task context, interrupts on; waits for whoever has the table's lock, so not inside a read section of the environment's
    /// [`Grace`].
    #[doc(alias = "pte_offset_map_lock")]
    #[inline]
    pub fn lock_entry(&self, page: Page) -> Option<LockedEntry<'_, F, E, H>> {
        if !F::canonical(self.levels()).contains(page.start())
            || self.is_borrowed(page) && !mutant!("locked-entry-is-borrowed")
        {
            return None;
        }
        // SAFETY: the closure makes no guard and does not panic: an index is below the entries of its table.
        let found = unsafe {
            let grace = self.env().grace();
            grace.read_with(|| self.try_lock_leaf(page, false))
        };
        let node = match found {
            Found::Leaf(node) => node,
            Found::Again => self.wait_for_leaf(page)?,
            Found::Nothing => return None,
        };
        Some(LockedEntry {
            table: self,
            node,
            page,
        })
    }

    /// Locks the leaf table of `page`, where somebody had its lock.
    #[cold]
    fn wait_for_leaf(&self, page: Page) -> Option<Node<'_, F>> {
        loop {
            // K2
            self.env().relax();
            let _reading = self.env().grace().read();
            match self.try_lock_leaf(page, true) {
                Found::Leaf(node) => return Some(node),
                Found::Again => {}
                Found::Nothing => return None,
            }
        }
    }

    /// Inside a read section.
    #[inline(always)]
    fn try_lock_leaf(&self, page: Page, waited: bool) -> Found<'_, F> {
        let levels = self.levels();
        let map = self.env().map();
        let mut frame = self.root_frame();
        // Written out, so that every shift and mask is a constant.
        macro_rules! descend {
            ($($number:literal)*) => {$(
                if $number <= F::LEVELS.len() && $number <= levels {
                    // SAFETY: as in `PageTable::descend`.
                    let words = unsafe { F::Word::words(map, frame) };
                    let word = F::Word::load(&words[index_at::<F>(page.number(), $number)]);
                    let shared = F::is_shared_table($number, word) && !mutant!("locked-entry-in-a-shared-table");
                    if !F::is_table($number, word) || shared {
                        return Found::Nothing;
                    }
                    frame = F::table_frame(word);
                }
            )*};
        }
        descend!(5 4 3 2);
        // SAFETY: an entry of an attached table pointed to it during this section, so it is a table until the section ends; and once it
        // is locked and found attached (U3 of the cursor), until it is unlocked.
        let node = unsafe { View::<F>::new(self.env(), frame, 1) }.node(self.env());
        match node.try_lock_attached(waited) {
            true => Found::Leaf(node),
            false => Found::Again,
        }
    }
}

impl<F: Format, E: Env, H: FrameHandle> LockedEntry<'_, F, E, H> {
    /// The page.
    #[must_use]
    pub const fn page(&self) -> Page {
        self.page
    }

    /// What is there.
    #[must_use]
    #[inline]
    pub fn get(&self) -> Entry {
        decode::<F>(self.page, 1, self.load())
    }

    /// How many pins the page's table counts ([`Cursor::add_pins`](crate::Cursor::add_pins)).
    #[must_use]
    pub fn pins(&self) -> u32 {
        self.node.slot.as_table().map_or(0, |slot| slot.pins())
    }

    /// Gives a leaf rights that take nothing away from it, and marks it accessed, with `dirty` written to as well; `false`, and nothing changes,
    /// where there is no leaf, it would lose something, or one that grants access would become global or, where a CPU may refuse for what it
    /// remembers, the user's.
    ///
    /// On x86 nobody has to be told. Where a CPU may refuse for what it remembers (RISC-V, AArch64), every CPU is told before this returns.
    ///
    /// Context: in such formats waits for other CPUs, under the table's lock.
    #[doc(alias = "ptep_set_access_flags")]
    #[inline]
    pub fn relax(&mut self, rights: Rights, dirty: bool) -> bool {
        let mut word = self.load();
        loop {
            if !F::is_present(1, word) && decode::<F>(self.page, 1, word).leaf().is_none() {
                return false;
            }
            let new = F::touched(1, word, rights, dirty);
            if F::needs_flush(1, word, new) && !mutant!("locked-entry-takes-away") {
                return F::TELLS_GAINS
                    && !loses::<F>(word, new)
                    && self.relax_and_tell(word, rights, dirty);
            }
            self.table.note_global(rights);
            match self.node.change::<Live>(self.index(), word, new) {
                Ok(()) => return true,
                // The hardware wrote meanwhile.
                Err(found) => word = found,
            }
        }
    }

    /// As `relax`, of a leaf that loses nothing, where every CPU must be told.
    #[cold]
    fn relax_and_tell(&mut self, mut word: u64, rights: Rights, dirty: bool) -> bool {
        self.table.note_global(rights);
        while let Err(found) =
            self.node
                .change::<Live>(self.index(), word, F::touched(1, word, rights, dirty))
        {
            word = found;
        }
        let page = PageRange::single(self.page);
        let global = rights.contains(Rights::GLOBAL);
        self.table.flush_now(Stale::leaf(page, global));
        true
    }

    /// Maps a 4 KiB frame where nothing is, and lets the table go.
    ///
    /// # Errors
    ///
    /// [`MapError`] with the handle; nothing changed.
    #[doc(alias = "set_pte_at")]
    #[inline]
    pub fn map(self, handle: H, attributes: Attributes) -> Result<(), (MapError, H)> {
        let (frame, word) = self.encode(handle, &attributes)?;
        if self.load() != 0 {
            // SAFETY: H2: the numbers came from `into_entry`, and no entry got them.
            return Err((MapError::Occupied, unsafe {
                H::from_entry(frame, Order::ZERO)
            }));
        }
        if !mutant!("locked-entry-not-counted") {
            self.node.add_live(1);
        }
        self.node.store(self.index(), word);
        let (table, page) = (self.table, self.page);
        drop(self);
        if !mutant!("locked-entry-does-not-settle") {
            table.settle(PageRange::single(page), 1);
        }
        let trace = table.env().trace();
        trace.event(TraceEvent::Mapped(PageRange::single(page), frame));
        Ok(())
    }

    /// Puts another 4 KiB frame in place of a leaf, and lets the table go; gives the leaf and its handle, of which no translation is left.
    ///
    /// The leaf is cleared first and flushed on every CPU, then the new one appears, as [`Cursor::replace`](crate::Cursor::replace) does it.
    ///
    /// Context: waits for other CPUs, under the table's lock.
    ///
    /// # Errors
    ///
    /// [`MapError`] with the handle; nothing changed. [`MapError::Occupied`] where there is no leaf.
    #[doc(alias = "ptep_clear_flush")]
    #[inline]
    pub fn replace(self, handle: H, attributes: Attributes) -> Result<(Leaf, H), (MapError, H)> {
        let (frame, word) = self.encode(handle, &attributes)?;
        if decode::<F>(self.page, 1, self.load()).leaf().is_none() {
            // SAFETY: as in `map`.
            return Err((MapError::Occupied, unsafe {
                H::from_entry(frame, Order::ZERO)
            }));
        }
        let old = exchange_leaf::<F, E, H, Live>(self.table, &self.node, self.page, word);
        let (table, page) = (self.table, self.page);
        drop(self);
        // The leaf was absent after its flush, until the new one was stored.
        if F::CACHES_ABSENT && !mutant!("replace-does-not-settle") {
            table.settle(PageRange::single(page), 1);
        }
        let trace = table.env().trace();
        trace.event(TraceEvent::Mapped(PageRange::single(page), frame));
        Ok(old)
    }

    /// The frame of a handle, and its word.
    #[inline(always)]
    fn encode(&self, handle: H, attributes: &Attributes) -> Result<(Frame, u64), (MapError, H)> {
        let (frame, order) = handle.into_entry();
        let error = if order != Order::ZERO {
            MapError::BadOrder
        } else if !F::can_encode(1, frame, attributes) {
            MapError::Unencodable
        } else {
            self.table.note_global(attributes.rights);
            return Ok((frame, F::leaf(1, frame, attributes)));
        };
        // SAFETY: H2: the numbers came from `into_entry` above, and no entry got them.
        Err((error, unsafe { H::from_entry(frame, order) }))
    }

    #[inline(always)]
    fn index(&self) -> usize {
        index_at::<F>(self.page.number(), 1)
    }

    #[inline(always)]
    fn load(&self) -> u64 {
        F::Word::load(self.node.leaf_entry(self.page.number()))
    }
}

/// Whether the leaf `new` of level 1 forbids something that `old` allows. The kernel may not touch every page of the user's (SMAP, PAN), and what
/// becomes global is cached under a tag.
#[cold]
fn loses<F: Format>(old: u64, new: u64) -> bool {
    let [old, new] = [old, new].map(|word| F::attributes(1, word).rights);
    let barred = Rights::USER | Rights::GLOBAL;
    old.grants_access()
        && (!old.difference(new).is_empty() || new.difference(old).intersects(barred))
}

/// Puts `word` in place of the leaf that a locked table has for `page`: clears it, flushes it on every CPU, and stores. So no CPU reads the
/// old frame after another has written to the new one, and the old handle is free at once.
///
/// Announces nothing (`P4`): the flush is made before the lock is let go, without which nobody fills the page or takes the table away. So copies on
/// write in one space share no word for it.
pub(crate) fn exchange_leaf<F: Format, E: Env, H: FrameHandle, S: Liveness>(
    table: &PageTable<F, E, H>,
    node: &Node<'_, F>,
    page: Page,
    word: u64,
) -> (Leaf, H) {
    let index = index_at::<F>(page.number(), node.level);
    let before = node.take::<S>(index);
    let Some(leaf) = decode::<F>(page, node.level, before).leaf() else {
        unreachable!("a locked leaf became something else")
    };
    if !mutant!("replace-does-not-flush") {
        let global = leaf.attributes.rights.contains(Rights::GLOBAL);
        table.flush_now(Stale::leaf(leaf.range(), global));
    }
    node.store(index, word);
    // SAFETY: the entry is gone, and its translations were flushed.
    let handle = unsafe { H::from_entry(leaf.frame, leaf.order) };
    (leaf, handle)
}

impl<F: Format, E: Env, H: FrameHandle> Drop for LockedEntry<'_, F, E, H> {
    #[inline]
    fn drop(&mut self) {
        self.node.unlock();
    }
}

impl<F: Format, E: Env, H: FrameHandle> fmt::Debug for LockedEntry<'_, F, E, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LockedEntry({}: {:?})", self.page, self.get())
    }
}
