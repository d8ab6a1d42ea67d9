//! The cursor: a position in a range of pages that keeps the table it is in, locked.
//!
//! ```text
//!   range   [first ........................................ last]
//!                        position ▲
//!   path    root ── level 3 ── level 2 ── held (locked): the next page of the same table costs no walk
//! ```
//!
//! Any number of cursors may work on one [`PageTable`] at once; cursors in different leaf tables never meet, but where tables are made or
//! emptied.
//!
//! What is held is the table that the next page is likely to need: a leaf table as long as pages are changed in it; the one above it where
//! page after page needs a leaf table of its own, or empties one. Then a table is made or detached below the held one, without a walk
//! and without its own lock being given up and taken again.
//!
//! Invariants
//! - `U1`: `held`, if any, is attached, and its lock is this cursor's. So the tables above it are attached too: each has
//!   a live entry.
//! - `U2`: `path[l]` for the levels above the held one are the tables from the root to it.
//! - `U4`: a table to which an entry points that says "shared", and everything below it, is changed by nobody, but that leaves and
//!   entries in it may lose the right to write, and but for `foreign.rs`, whose caller announces and flushes in every space. A held table of that
//!   kind is otherwise only read.
//! - `U5`: `window` is the part of `range` in the held table, where that is a leaf table that this space alone leads to; otherwise it is empty.
//! - `U3`: a walk runs inside a read section of the environment's `Grace`, and keeps nothing from it but a table that
//!   it locked and found attached.
//! - `U6`: nobody waits for a table's lock inside a read section: a context may commit while its cursor holds a table, and the commit may wait for
//!   a grace period. Who finds a lock taken leaves the section, waits a turn, and walks again from the root.
//!
//! Context: task context, interrupts on (`N4` in `node.rs`). A context that has a cursor with a held table must not open
//! another one on the same pages, nor on others of the held table, which may be any above the leaf tables, the root too;
//! [`Cursor::release`] lets go. Lock-free queries are always possible, and so is a commit, which takes no lock of an attached table.
//!
mod attach;
mod change;
mod detach;
mod divide;
mod foreign;
mod harvest;
mod huge;
mod leaf;
mod map;
mod moving;
mod replace;
mod reserve;
mod run;
mod share;
mod unmap;

use core::fmt;
use core::marker::PhantomData;

use kmem_hal::{Frame, FrameHandle, Grace, Page, PageRange};

pub use foreign::ForeignFlush;
pub use harvest::{Harvest, Harvested};
pub use huge::Divisible;
pub(crate) use huge::SplitError;
pub(crate) use leaf::{Change, Restricted, Unencodable, change_entry};
pub use map::MapStopped;
pub use replace::Replaced;
pub use run::Run;
pub use share::UnshareStep;
pub(crate) use share::{Shared, child, mark_shared};
pub use unmap::Cleared;

use crate::cache::TableReserve;
use crate::env::Env;
use crate::format::{Format, level};
use crate::mutants::mutant;
use crate::node::{Node, View};
use crate::quiescent::{Live, Liveness};
use crate::table::{Entry, MAX_LEVELS, PageTable, decode, index_at, seen_from};

/// A position in a range of a [`PageTable`]'s pages, and the only way to change them.
///
/// Keeps the table page that it is in locked until it moves on, is [released](Self::release) or dropped. Any number of
/// cursors may work on one table at once; a context that has one must not use another on pages of the same table page, or of one above it,
/// before it [releases](Self::release) this one.
///
/// `S` says what it may assume of the processors: [`Live`] tables are changed by atomics, [`Quiescent`](crate::Quiescent) ones by plain
/// stores.
///
/// Context: task context, interrupts on; waits for whoever has a table's lock, so not inside a read section of the environment's [`Grace`].
pub struct Cursor<'t, F: Format, E: Env, H: FrameHandle, S: Liveness = Live> {
    table: &'t PageTable<F, E, H>,
    range: PageRange,
    /// The page that [`next_run`](Self::next_run) starts at; past the end when `None`.
    position: Option<Page>,
    held: Option<Node<'t, F>>,
    /// The first page and the page count of what `held` covers.
    span: (u64, u64),
    path: [Frame; MAX_LEVELS + 1],
    /// Whether an entry above `held` says that it is shared (`U4`).
    shared: bool,
    /// Whether copies of shared tables may use the frames set aside for them.
    spares: bool,
    /// The first page and the page count of what may be changed without a walk (`U5`).
    window: (u64, u64),
    /// Whether the leaf table that was let go last had one entry: then the next page is likely to be in another table, and the table above
    /// stays the held one.
    lonely: bool,
    /// The leaf that was mapped last, for the next one like it.
    template: Template,
    reserve: TableReserve<'t, E>,
    liveness: PhantomData<S>,
}

impl<'t, F: Format, E: Env, H: FrameHandle> Cursor<'t, F, E, H> {
    /// The table. A quiescent cursor does not give it, since who has it could ask for the root (`Q1`).
    #[must_use]
    pub fn table(&self) -> &'t PageTable<F, E, H> {
        self.table
    }
}

impl<'t, F: Format, E: Env, H: FrameHandle, S: Liveness> Cursor<'t, F, E, H, S> {
    /// The caller has what `S` says.
    pub(crate) fn new(table: &'t PageTable<F, E, H>, range: PageRange) -> Self {
        Self {
            table,
            range,
            position: Some(range.first()),
            held: None,
            span: (0, 0),
            path: [Frame::ZERO; MAX_LEVELS + 1],
            shared: false,
            spares: false,
            window: (0, 0),
            lonely: false,
            template: Template::NONE,
            reserve: TableReserve::empty(table.env()),
            liveness: PhantomData,
        }
    }

    /// The pages that the cursor may touch.
    #[must_use]
    pub fn range(&self) -> PageRange {
        self.range
    }

    /// Lets the held table go. The next operation takes it again.
    pub fn release(&mut self) {
        if let Some(node) = self.let_go() {
            node.unlock();
        }
    }

    /// The held table, which is no longer the cursor's; it is locked still.
    #[inline]
    fn let_go(&mut self) -> Option<Node<'t, F>> {
        self.window.1 = 0;
        self.held.take()
    }

    /// What is mapped at `page`, read under the table's lock.
    #[must_use]
    pub fn query(&mut self, page: Page) -> Entry {
        if !self.range.contains(page) {
            return Entry::Empty;
        }
        let node = self.seek(page, 1);
        let word = node.load(index_at::<F>(page.number(), node.level));
        seen_from(decode::<F>(page, node.level, word), self.shared)
    }

    /// The held table, if it is a leaf table that has `page`, which may be changed.
    #[inline(always)]
    fn held_leaf(&self, page: Page) -> Option<&Node<'t, F>> {
        if page.number().wrapping_sub(self.window.0) < self.window.1 {
            self.held.as_ref()
        } else {
            None
        }
    }

    /// The held table, if it is a leaf table that has all of `range`, which may be changed.
    #[inline(always)]
    fn held_leaves(&self, range: PageRange) -> Option<&Node<'t, F>> {
        self.held_leaf(range.last())?;
        self.held_leaf(range.first())
    }

    /// Goes to the lowest table for `page` that exists and is not below level `target`; locks and holds it.
    ///
    /// The page's entry in the result is no table, unless the result's level is `target`.
    #[inline]
    pub(crate) fn seek(&mut self, page: Page, target: usize) -> Node<'t, F> {
        if let Some(node) = self.held
            && page.number().wrapping_sub(self.span.0) < self.span.1
            && (node.level == target
                || node.level > target
                    && !F::is_table(
                        node.level,
                        node.load(index_at::<F>(page.number(), node.level)),
                    ))
        {
            return node;
        }
        self.walk(page, target)
    }

    #[inline(never)]
    fn walk(&mut self, page: Page, target: usize) -> Node<'t, F> {
        let env = self.table.env();
        let mut waited = false;
        loop {
            {
                // Begins while the held lock keeps the path attached (U1): its tables stay tables until the section ends.
                let _reading = env.grace().read();
                let (frame, level) = self.leave_for(page, target);
                // SAFETY: a table of the path (U2), inside the section; or P1.
                let start = unsafe { View::<F>::new(env, frame, level) };
                if let Some(node) = self.descend(start, page, target, waited) {
                    return node;
                }
            }
            // U6; nothing is held now, so the next walk begins at the root.
            env.relax();
            waited = true;
        }
    }

    /// Walks down from a table; `None` where somebody has the lock of the table that it comes to, or that one was just detached. Inside a read
    /// section.
    #[inline(always)]
    fn descend(
        &mut self,
        mut view: View<'t, F>,
        page: Page,
        target: usize,
        waited: bool,
    ) -> Option<Node<'t, F>> {
        let env = self.table.env();
        let mut shared = false;
        // The table whose entry led to `view`, where that is shared.
        let mut above: Option<Node<'t, F>> = None;
        loop {
            self.path[view.level] = view.frame;
            let index = index_at::<F>(page.number(), view.level);
            let mut word = view.load(index);
            let level = view.level;
            if level == target || !F::is_table(level, word) {
                let node = view.node(env);
                let locked = match above {
                    Some(above) => try_lock_below(&above, &node, page, waited),
                    None => node.try_lock_attached(waited),
                };
                if !locked {
                    return None;
                }
                word = node.load(index);
                if level == target || !F::is_table(level, word) {
                    if shared && !self.is_path_of(page, level) {
                        node.unlock();
                        return None;
                    }
                    self.hold(node, page);
                    self.shared = shared;
                    if shared {
                        // Looked up again at every call.
                        self.span.1 = 0;
                        self.window.1 = 0;
                    }
                    return Some(node);
                }
                node.unlock();
            }
            shared |= F::is_shared_table(level, word);
            if shared {
                // SAFETY: as below.
                above = Some(unsafe { Node::new(env, self.path[level], level) });
            }
            // SAFETY: an entry that this read section found in an attached table, or in one that was attached when
            // the section began, points to a table until the section ends (U3).
            view = unsafe { View::new(env, F::table_frame(word), level - 1) };
        }
    }

    /// Lets the held table go; gives the lowest table of its path that covers `page` and is at `target` or above.
    #[inline]
    fn leave_for(&mut self, page: Page, target: usize) -> (Frame, usize) {
        let levels = self.table.levels();
        if let Some(node) = self.let_go() {
            self.lonely = node.level == 1 && node.live() == 1;
            node.unlock();
            if self.shared {
                return (self.table.root_frame(), levels);
            }
            let differ = page.number() ^ self.span.0;
            for number in (node.level + 1).max(target)..levels {
                let level = level::<F>(number);
                if differ >> (level.shift + level.bits) == 0 {
                    return (self.path[number], number);
                }
            }
        }
        (self.table.root_frame(), levels)
    }

    /// Whether the path still leads to its table of `level`, whose lock is this cursor's: a shared one may have been exchanged for a
    /// copy before it was locked. Inside a read section.
    #[cold]
    fn is_path_of(&self, page: Page, level: usize) -> bool {
        let env = self.table.env();
        let mut number = self.table.levels();
        while number > level {
            // SAFETY: a table that this read section found.
            let view = unsafe { View::<F>::new(env, self.path[number], number) };
            let word = view.load(index_at::<F>(page.number(), number));
            if !F::is_table(number, word) || F::table_frame(word) != self.path[number - 1] {
                return false;
            }
            number -= 1;
        }
        true
    }

    /// As `seek`, for a change: the path is this space's alone, or becomes so where nobody shares it any more.
    #[inline]
    fn seek_own(&mut self, page: Page, target: usize) -> Result<Node<'t, F>, Shared> {
        loop {
            let node = self.seek(page, target);
            if S::QUIESCENT && mutant!("quiescent-ignores-shared") {
                return Ok(node);
            }
            if !self.shared {
                if S::QUIESCENT && !self.is_alone(node.level) {
                    return Err(Shared(page));
                }
                return Ok(node);
            }
            self.retake(page)?;
        }
    }

    /// Whether no other root leads to the held table, of `level`, nor to one above it (`Q2`).
    fn is_alone(&self, level: usize) -> bool {
        let env = self.table.env();
        (level..self.table.levels()).all(|number| {
            let slot = env.slots().slot(self.path[number]);
            slot.is_some_and(|slot| slot.count() <= 1)
        })
    }

    /// Makes a locked table the held one.
    #[inline]
    fn hold(&mut self, node: Node<'t, F>, page: Page) {
        let level = level::<F>(node.level);
        let pages = 1u64 << (level.shift + level.bits);
        self.path[node.level] = node.frame;
        self.span = (page.number() & !(pages - 1), pages);
        if node.level == 1 && (!S::QUIESCENT || self.is_alone(1)) {
            let first = self.span.0.max(self.range.first().number());
            let last = (self.span.0 + (pages - 1)).min(self.range.last().number());
            // A table on the way to a page of the range.
            self.window = (first, last - first + 1);
        }
        self.held = Some(node);
    }
}

/// Locks a table that others share, under the lock of the table above it (`N5`); `false`, and nothing is locked, where somebody has one of the
/// locks, or that one does not lead to it any more. Inside a read section.
#[cold]
fn try_lock_below<F: Format>(
    above: &Node<'_, F>,
    node: &Node<'_, F>,
    page: Page,
    waited: bool,
) -> bool {
    if !above.try_lock_attached(waited) {
        return false;
    }
    let word = above.load(index_at::<F>(page.number(), above.level));
    let leads = F::is_table(above.level, word) && F::table_frame(word) == node.frame;
    let locked = leads && node.try_lock_attached(waited);
    above.unlock();
    locked
}

/// What a leaf of level 1 with certain attributes looks like.
struct Template {
    /// [`Attributes::key`] of them.
    key: u64,
    /// For frame 0.
    word: u64,
}

impl Template {
    const NONE: Self = Self {
        key: u64::MAX,
        word: 0,
    };
}

impl<F: Format, E: Env, H: FrameHandle, S: Liveness> Drop for Cursor<'_, F, E, H, S> {
    fn drop(&mut self) {
        self.release();
    }
}

impl<F: Format, E: Env, H: FrameHandle, S: Liveness> fmt::Debug for Cursor<'_, F, E, H, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cursor")
            .field("range", &self.range)
            .field("position", &self.position)
            .field("holds", &self.held.map(|node| (node.frame, node.level)))
            .finish_non_exhaustive()
    }
}
