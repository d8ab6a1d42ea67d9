//! Tables that several spaces share since a fork: taking one back, copying one.
//!
//! ```text
//!   parent  entry, not writable ──┐                  parent  entry, not writable ──> table, 1 share: retaken at the next change
//!                                 ├─> table, 2 shares    ── unshare (child) ──>
//!   child   entry, not writable ──┘                  child   entry, writable ──────> a copy of it
//! ```
//!
//! A shared table is changed by nobody who sees one space alone (`U4`), so its change needs no flush in other spaces: what a space changes is a copy first, to which only its own
//! root leads. The handles of a shared table's leaves are the table's, not each space's; a copy has handles of its own, which a
//! callback makes. Where a copy is made, the leaves of both sides lose the right to write, since both now stand for the same
//! frames.
//!
//! The share that the space gives up is counted until the gather is committed: until then a CPU may still walk through it.
//!
//! Lock order: a table's before those it points to, whichever space leads there.

use kmem_hal::{AllocError, FrameHandle, Grace, Page, PageRange};

use super::{Cursor, Divisible};
use crate::attributes::Payload;
use crate::env::Env;
use crate::error::{ChangeError, HugeError, MapError, MoveError, UnshareError};
use crate::fork::ForkItem;
use crate::format::{Format, Kind, Word, level};
use crate::gather::{Gather, Stale};
use crate::mutants::mutant;
use crate::node::{self, Node, Slots, View};
use crate::quiescent::{Live, Liveness};
use crate::table::{Entry, decode, index_at};

/// The table of this page is shared.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shared(pub Page);

/// Somebody has the lock of a table, or changed it meanwhile: look again.
struct Taken;

impl From<Shared> for MapError {
    fn from(_: Shared) -> Self {
        Self::Shared
    }
}

impl From<Shared> for HugeError {
    fn from(_: Shared) -> Self {
        Self::Shared
    }
}

impl From<Shared> for MoveError {
    fn from(Shared(at): Shared) -> Self {
        Self::Shared { at }
    }
}

impl From<Shared> for ChangeError {
    fn from(Shared(at): Shared) -> Self {
        Self::Shared { at }
    }
}

impl From<AllocError> for UnshareError {
    fn from(error: AllocError) -> Self {
        Self::Memory(error)
    }
}

/// What [`Cursor::unshare`] does about an entry.
#[derive(Debug, PartialEq, Eq)]
pub enum UnshareStep<H> {
    /// The copy gets a leaf for this handle: another reference to the same block. Both sides lose the right to write.
    Protected(H),
    /// The copy gets a leaf for this handle, of the same block. Both sides keep their rights: the pages are shared memory.
    Kept(H),
    /// The copy gets the payload too.
    Payload,
    /// The copy gets nothing here; what CPUs remember of a leaf is flushed.
    Skip,
    /// Stop here: a reference could not be counted.
    Stop,
}

impl<'t, F: Format, E: Env, H: FrameHandle, S: Liveness> Cursor<'t, F, E, H, S> {
    /// Lets [`unshare`](Self::unshare) draw on the table's [spares](crate::PageTable::keep_spares) where there is no other memory: for
    /// changes that must go through.
    pub fn use_spares(&mut self) {
        self.spares = true;
    }

    /// What is mapped at `page`, in a table of this space's own: nobody else changes it, nor the path to it, until the cursor
    /// [lets go](Self::release) or moves on. Tables that nobody else shares any more are taken back on the way.
    ///
    /// This is what deciding "is this page ours alone" has to begin with: a count of the frame means something only where
    /// every table of the path counts one share.
    ///
    /// # Errors
    ///
    /// [`ChangeError::Shared`] where another space shares the page's table, [`ChangeError::OutOfRange`].
    #[doc(alias = "pte_offset_map_lock")]
    pub fn own(&mut self, page: Page) -> Result<Entry, ChangeError> {
        if !self.range().contains(page) {
            return Err(ChangeError::OutOfRange);
        }
        let node = self.seek_own(page, 1)?;
        let word = node.load(index_at::<F>(page.number(), node.level));
        Ok(decode::<F>(page, node.level, word))
    }

    /// Counts `pins` of frames that the leaf table of `page` maps: a fork copies a table with pins, and does not share it, and
    /// [`merge`](Self::merge) leaves it.
    ///
    /// The count is the table's, which does not know whose pins they are: it goes with the table when that is emptied, and
    /// [`move_range`](crate::PageTable::move_range) leaves it where it is. Who moves pinned pages moves their pins.
    ///
    /// # Errors
    ///
    /// As [`own`](Self::own); [`ChangeError::Unencodable`] where there is no leaf table, or it has as many pins as can be counted.
    pub fn add_pins(&mut self, page: Page, pins: u32) -> Result<(), ChangeError> {
        self.own(page)?;
        let slot = self.held.filter(|node| node.level == 1);
        let slot = slot.and_then(|node| node.slot.as_table());
        let sum = slot.and_then(|slot| Some((slot, slot.pins().checked_add(pins)?)));
        let (slot, sum) = sum.ok_or(ChangeError::Unencodable { at: page })?;
        slot.set_pins(sum);
        Ok(())
    }

    /// How many pins the leaf table of `page` counts; 0 where there is none.
    pub fn pins(&mut self, page: Page) -> u32 {
        if !self.range().contains(page) {
            return 0;
        }
        let node = self.seek(page, 1);
        let slot = node.slot.as_table().filter(|_| node.level == 1);
        slot.map_or(0, |slot| slot.pins())
    }

    /// Takes pins back that the leaf table of `page` counted, if it is there and counted as many.
    pub fn sub_pins(&mut self, page: Page, pins: u32) {
        if !self.range().contains(page) {
            return;
        }
        let node = self.seek(page, 1);
        if node.level == 1
            && let Some(slot) = node.slot.as_table()
        {
            slot.set_pins(slot.pins().saturating_sub(pins));
        }
    }

    /// Makes the path to `page` writable again where nobody else shares its tables any more.
    #[cold]
    pub(super) fn retake(&mut self, page: Page) -> Result<(), Shared> {
        self.release();
        while let Some((parent, index)) = self.lock_shared(page) {
            let env = self.table.env();
            let table = child(env, &parent, index);
            table.lock(env);
            let alone = table.shares() == 1 || mutant!("share-retakes-from-others");
            if alone {
                own(&parent, index);
            }
            table.unlock();
            parent.unlock();
            if !alone {
                return Err(Shared(page));
            }
        }
        self.shared = false;
        Ok(())
    }

    /// The highest entry on the way to `page` that says "shared", with its table locked. The cursor holds nothing.
    fn lock_shared(&mut self, page: Page) -> Option<(Node<'t, F>, usize)> {
        let env = self.table.env();
        let mut waited = false;
        loop {
            let found = {
                let _reading = env.grace().read();
                self.try_lock_shared(page, waited)
            };
            match found {
                Ok(found) => return found,
                // U6
                Err(Taken) => env.relax(),
            }
            waited = true;
        }
    }

    /// As `lock_shared`, where nobody has the lock. Inside a read section.
    fn try_lock_shared(
        &self,
        page: Page,
        waited: bool,
    ) -> Result<Option<(Node<'t, F>, usize)>, Taken> {
        let env = self.table.env();
        // SAFETY: P1: the root is attached.
        let mut view = unsafe { View::<F>::new(env, self.table.root_frame(), self.table.levels()) };
        loop {
            let number = view.level;
            let index = index_at::<F>(page.number(), number);
            let word = view.load(index);
            if !F::is_table(number, word) {
                return Ok(None);
            }
            if F::is_shared_table(number, word) {
                // Above it nothing is shared, so it is this space's, unless it was detached.
                let node = view.node(env);
                if !node.try_lock_attached(waited) {
                    return Err(Taken);
                }
                if node.load(index) == word {
                    return Ok(Some((node, index)));
                }
                node.unlock();
                return Err(Taken);
            }
            // SAFETY: as in `walk`, inside the read section.
            view = unsafe { View::new(env, F::table_frame(word), number - 1) };
        }
    }
}

impl<'t, F: Format, E: Env, H: Divisible, S: Liveness> Cursor<'t, F, E, H, S> {
    /// Makes the tables that lead to `page` this space's own, by copies where others share them; gives whether a table was copied.
    ///
    /// A shared table of leaves is copied entry by entry: `step` says for each what the copy gets, and counts a reference for its handle.
    /// Of a shared level-2 table the copy shares the leaf tables, and that of `page` is copied after it. Where the other spaces have
    /// given a table up, nothing is copied. `step` runs under tables' locks: it must not use cursors of any space that shares them.
    ///
    /// The share comes back when the gather is committed, which is due before the copy matters to another CPU of this space.
    ///
    /// # Errors
    ///
    /// [`UnshareError`]. Handles that `step` had given for a copy that was not finished go to `undo`, as does one that stands for another block than
    /// the leaf that `step` was asked about.
    ///
    /// # Examples
    ///
    /// ```
    /// # mod example { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs")); }
    /// # use example::*;
    /// use kmem_paging::{ChangeError, ForkItem, ForkStep, UnshareStep};
    ///
    /// let parent = mapped(pages(0x400, 512));
    /// let child = PageTable::empty_like(*parent.env(), &parent)?;
    /// let mut gather = parent.gather::<1>();
    /// // SAFETY: nobody runs in either space.
    /// let pages_shared = unsafe { parent.fork_sharing(&child, pages(0x400, 512), 1, &mut gather, |_| ForkStep::Skip) };
    /// assert_eq!(pages_shared.map_err(|(error, _)| error)?, 512);
    /// gather.commit(drop);
    ///
    /// // The child's first change of the table asks for a copy of it.
    /// let mut gather = child.gather::<4>();
    /// let mut cursor = child.cursor(pages(0x400, 512))?;
    /// let at = page(0x400);
    /// assert_eq!(cursor.unmap(pages(0x400, 1), &mut gather), Err(ChangeError::Shared { at }));
    /// let copied = cursor.unshare(at, &mut gather, |item| match item {
    ///     ForkItem::Leaf(leaf) => UnshareStep::Protected(block(leaf.frame.number(), leaf.order)),
    ///     ForkItem::Payload(..) => UnshareStep::Payload,
    /// }, drop)?;
    /// assert!(copied);
    /// cursor.unmap(pages(0x400, 1), &mut gather)?;
    /// # use kmem_paging::PageTable;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "copy_pte_range")]
    pub fn unshare<const N: usize>(
        &mut self,
        page: Page,
        gather: &mut Gather<'_, F, E, H, N>,
        step: impl FnMut(ForkItem) -> UnshareStep<H>,
        undo: impl FnMut(H),
    ) -> Result<bool, UnshareError> {
        self.unshare_counted(page, gather, step, undo, drop)
    }

    /// As [`unshare`](Self::unshare), for payloads that count as handles do: those of a copy that was not finished go to
    /// `undo_payload`.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn unshare_counted<const N: usize>(
        &mut self,
        page: Page,
        gather: &mut Gather<'_, F, E, H, N>,
        mut step: impl FnMut(ForkItem) -> UnshareStep<H>,
        undo: impl FnMut(H),
        undo_payload: impl FnMut(Payload),
    ) -> Result<bool, UnshareError> {
        if !self.range().contains(page) {
            return Err(UnshareError::OutOfRange);
        }
        if !gather.belongs_to(self.table) {
            return Err(UnshareError::ForeignGather);
        }
        self.release();
        let mut undo = (undo, undo_payload);
        let mut copied = false;
        while let Some((parent, index)) = self.lock_shared(page) {
            let outcome = self.unshare_one(&parent, index, page, gather, &mut step, &mut undo);
            parent.unlock();
            copied |= outcome?;
        }
        self.shared = false;
        Ok(copied)
    }

    /// Makes the shared table below a locked entry of this space's its own; whether it was copied.
    fn unshare_one<const N: usize>(
        &mut self,
        parent: &Node<'t, F>,
        index: usize,
        page: Page,
        gather: &mut Gather<'_, F, E, H, N>,
        step: &mut impl FnMut(ForkItem) -> UnshareStep<H>,
        undo: &mut (impl FnMut(H), impl FnMut(Payload)),
    ) -> Result<bool, UnshareError> {
        let env = self.table.env();
        let table = child(env, parent, index);
        if gather.is_full() {
            return Err(UnshareError::Full);
        }
        table.lock(env);
        if table.shares() == 1 || mutant!("share-is-not-copied") {
            own(parent, index);
            table.unlock();
            return Ok(false);
        }
        let copy = match self.make_copy(table.level, page) {
            Ok(copy) => copy,
            Err(error) => {
                table.unlock();
                return Err(error.into());
            }
        };
        let first = super::attach::first_page::<F>(table.level, page);
        let outcome = copy_table(env, &table, &copy, first, step);
        table.unlock();
        let lost = match outcome {
            Ok(lost) => lost,
            Err((error, refused)) => {
                refused.into_iter().for_each(&mut undo.0);
                self.take_back(&copy, undo);
                self.unmake_table(copy);
                return Err(error);
            }
        };
        gather.announce();
        // The old entry lost no dirty bit: it points to a table.
        parent.store(index, F::table(parent.level, copy.frame));
        // The translations of what was copied stay right: the same frames, not to be written to. What must go are the paths to the table.
        gather.note(Stale::leaf(
            PageRange::single(page),
            self.table.may_be_global(),
        ));
        if lost && !mutant!("share-lost-not-noted") {
            // But for what the copy lacks: once the share is given up, the other side frees it without a word to this space.
            let level = level::<F>(table.level);
            let last = first.number() + ((1u64 << (level.shift + level.bits)) - 1);
            let global = self.table.may_be_global();
            gather.note_pages(first.number(), last, 1, global, true);
        }
        gather.push_share(table.frame, table.level);
        Ok(true)
    }

    /// Empties a private copy that was not finished.
    fn take_back(&self, copy: &Node<'t, F>, undo: &mut (impl FnMut(H), impl FnMut(Payload))) {
        let env = self.table.env();
        for index in 0..level::<F>(copy.level).entries() {
            let word = copy.load(index);
            copy.store(index, 0);
            match copy.kind(word) {
                Kind::Table => {
                    // SAFETY: `copy_table` counted a share of it.
                    let below: Node<'_, F> =
                        unsafe { Node::new(env, F::table_frame(word), copy.level - 1) };
                    let _ = below.drop_share();
                }
                Kind::Leaf => {
                    let order = level::<F>(copy.level).order();
                    // SAFETY: H2: `into_entry` gave the numbers, and no CPU ever saw the entry.
                    (undo.0)(unsafe { H::from_entry(F::leaf_frame(copy.level, word), order) });
                }
                Kind::Payload => (undo.1)(F::payload_of(word)),
                Kind::Empty => {}
            }
        }
    }
}

/// The table below an entry of a locked, attached table.
#[inline(always)]
pub(crate) fn child<'t, F: Format, E: Env>(
    env: &'t E,
    parent: &Node<'t, F>,
    index: usize,
) -> Node<'t, F> {
    // SAFETY: an entry of a locked, attached table points to an attached table.
    unsafe { Node::new(env, F::table_frame(parent.load(index)), parent.level - 1) }
}

/// Makes an entry of a locked table this space's own again. A right is added, of which nobody needs to be told: where CPUs do, no table is shared.
fn own<F: Format>(parent: &Node<'_, F>, index: usize) {
    let mut word = parent.load(index);
    while let Err(found) = parent.change::<Live>(index, word, F::own_table(parent.level, word)) {
        word = found;
    }
}

/// Says "shared" in an entry of a locked table of `level`, which had this word. The word that it has then; `None` where the format cannot say
/// so.
#[inline(always)]
pub(crate) fn mark_shared<F: Format>(
    level: usize,
    entry: &node::Entry<F>,
    mut word: u64,
) -> Option<u64> {
    loop {
        let new = F::shared_table(level, word)?;
        if new == word {
            return Some(word);
        }
        match node::change::<F, Live>(entry, word, new) {
            Ok(()) => return Some(new),
            Err(found) => word = found,
        }
    }
}

/// Writes a copy of a locked table, which covers from `first`, into a private one, of which every word is written; gives whether a leaf that
/// CPUs may use is missing there. With the error comes a handle that was none of the copied block's.
#[inline(always)]
fn copy_table<F: Format, E: Env, H: Divisible>(
    env: &E,
    table: &Node<'_, F>,
    copy: &Node<'_, F>,
    first: Page,
    step: &mut impl FnMut(ForkItem) -> UnshareStep<H>,
) -> Result<bool, (UnshareError, Option<H>)> {
    if table.level == 1 {
        // Every shift is a constant.
        copy_words(env, table, copy, first, 1, step)
    } else {
        copy_words(env, table, copy, first, table.level, step)
    }
}

#[inline(always)]
fn copy_words<F: Format, E: Env, H: Divisible>(
    env: &E,
    table: &Node<'_, F>,
    copy: &Node<'_, F>,
    first: Page,
    number: usize,
    step: &mut impl FnMut(ForkItem) -> UnshareStep<H>,
) -> Result<bool, (UnshareError, Option<H>)> {
    let shift = level::<F>(number).shift;
    let count = level::<F>(number).entries();
    let mut live = 0;
    let mut lost = false;
    let mut failed = None;
    let mut done = count;
    let entries = table.entries(0, count);
    let copies = copy.entries(0, count);
    let mut slots = Slots::new(env);
    for (index, (entry, into)) in entries.iter().zip(copies).enumerate() {
        let word = F::Word::load(entry);
        let copied = if word == 0 {
            0
        } else if F::is_table(number, word) {
            let slot = slots.of(F::table_frame(word));
            let counted = node::add_share(slot);
            let shared = if counted {
                mark_shared::<F>(number, entry, word)
            } else {
                None
            };
            let Some(shared) = shared else {
                if counted {
                    // The format cannot say so here, against its contract.
                    node::drop_share(slot);
                }
                failed = Some((UnshareError::Saturated, None));
                done = index;
                break;
            };
            shared
        } else {
            let page = Page::from_number(first.number() + ((index as u64) << shift));
            match copy_entry::<F, H>(number, entry, page, word, step, &mut lost) {
                Ok(copied) => copied,
                Err(stopped) => {
                    failed = Some(stopped);
                    done = index;
                    break;
                }
            }
        };
        F::Word::store(into, copied);
        live += u32::from(copied != 0);
    }
    for into in &copies[done..] {
        F::Word::store(into, 0);
    }
    copy.add_live(live);
    match failed {
        Some(failed) => Err(failed),
        None => Ok(lost),
    }
}

/// The word of a copy for an entry of a locked table that is no table, as `step` says; notes in `lost` where CPUs may use a leaf that the copy
/// lacks.
#[inline(always)]
fn copy_entry<F: Format, H: Divisible>(
    number: usize,
    entry: &node::Entry<F>,
    page: Page,
    mut word: u64,
    step: &mut impl FnMut(ForkItem) -> UnshareStep<H>,
    lost: &mut bool,
) -> Result<u64, (UnshareError, Option<H>)> {
    let item = match decode::<F>(page, number, word) {
        Entry::Leaf(leaf) => ForkItem::Leaf(leaf),
        Entry::Payload(payload) => ForkItem::Payload(page, payload),
        Entry::Empty => return Ok(0),
    };
    match step(item) {
        UnshareStep::Skip => {
            *lost |= F::is_present(number, word);
            Ok(0)
        }
        UnshareStep::Payload if matches!(item, ForkItem::Payload(..)) => Ok(word),
        // A leaf stands for a handle.
        UnshareStep::Payload | UnshareStep::Stop => Err((UnshareError::Stopped, None)),
        UnshareStep::Protected(handle) => {
            put_in(handle, &item)?;
            loop {
                let new = F::write_protected(number, word);
                if new == word || mutant!("share-copy-keeps-write") {
                    return Ok(word);
                }
                // The others may have it loaded.
                match node::change::<F, Live>(entry, word, new) {
                    Ok(()) => return Ok(new),
                    Err(found) => word = found,
                }
            }
        }
        UnshareStep::Kept(handle) => {
            put_in(handle, &item)?;
            Ok(word)
        }
    }
}

/// Turns a handle into the leaf that it stands for; gives it back where it stands for another block.
#[inline(always)]
fn put_in<H: FrameHandle>(handle: H, item: &ForkItem) -> Result<(), (UnshareError, Option<H>)> {
    let (frame, order) = handle.into_entry();
    match item {
        ForkItem::Leaf(leaf) if (leaf.frame, leaf.order) == (frame, order) => Ok(()),
        _ => {
            // SAFETY: H2: the numbers came from `into_entry` above, and no entry got them.
            let handle = unsafe { H::from_entry(frame, order) };
            Err((UnshareError::Stopped, Some(handle)))
        }
    }
}
