//! Making tables, and attaching them.
//!
//! ```text
//!   held table, entry empty ── make ──> leaf table (locked), the ones above it ── attach ──> one store: the branch is there
//! ```
//!
//! Tables that are missing are built from the leaf up, in private, and appear by one store: a walker sees the hole or
//! the finished branch. Where the hardware remembers absent entries it is told of the table at once.
//!
//! Where the pages before needed a table each, the held table of level 2 stays the held one, and the new leaf table is not taken.

use kmem_hal::{AllocError, FrameHandle, Order, OwnedFrame, Page};

use super::Cursor;
use crate::cache;
use crate::env::Env;
use crate::error::MapError;
use crate::format::{Format, level};
use crate::mutants::mutant;
use crate::node::Node;
use crate::quiescent::Liveness;
use crate::table::index_at;

impl<'t, F: Format, E: Env, H: FrameHandle, S: Liveness> Cursor<'t, F, E, H, S> {
    /// Puts `word` into the empty entry of `page` in a table of level `target`, with the tables that lead there.
    #[inline]
    pub(crate) fn place(&mut self, page: Page, target: usize, word: u64) -> Result<(), MapError> {
        let node = self.seek_own(page, target)?;
        let index = index_at::<F>(page.number(), node.level);
        if node.load(index) != 0 && !(node.level == target && mutant!("map-over-anything")) {
            return Err(MapError::Occupied);
        }
        if node.level == target {
            if !mutant!("map-not-counted") {
                node.add_live(1);
            }
            node.store(index, word);
            return Ok(());
        }
        if self.lonely && node.level == 2 && target == 1 {
            return self.grow_aside(&node, page, word);
        }
        self.grow(node, page, target, word)
    }

    /// As `grow`, for a leaf table, and the held table of level 2 stays the held one: the next page that needs a table costs neither a walk
    /// nor a lock.
    fn grow_aside(&mut self, node: &Node<'t, F>, page: Page, word: u64) -> Result<(), MapError> {
        let table = self.make_table(1, page).map_err(MapError::Memory)?;
        table.store(index_at::<F>(page.number(), 1), word);
        table.add_live(1);
        self.attach(node, page, &table);
        if mutant!("grow-aside-not-counted") {
            node.sub_live(1);
        }
        Ok(())
    }

    /// As `place`, where `node` is above `target` and its entry for `page` is empty.
    #[inline(never)]
    fn grow(
        &mut self,
        node: Node<'t, F>,
        page: Page,
        target: usize,
        word: u64,
    ) -> Result<(), MapError> {
        self.reserve
            .hold::<F>(node.level - target)
            .map_err(MapError::Memory)?;
        let lowest = self.make_table(target, page).map_err(MapError::Memory)?;
        lowest.lock_private();
        lowest.store(index_at::<F>(page.number(), target), word);
        lowest.add_live(1);
        let mut branch = lowest;
        for number in target + 1..node.level {
            let Some(frame) = self.reserve.take() else {
                unreachable!("held above")
            };
            let above = self.claimed(frame, number, page);
            self.link(&above, page, &branch);
            self.path[number] = above.frame;
            branch = above;
        }
        self.attach(&node, page, &branch);
        if mutant!("grow-not-counted") {
            node.sub_live(1);
        }
        node.unlock();
        self.hold(lowest, page);
        Ok(())
    }

    /// Puts a finished table, or a branch of tables, into the empty entry of `page` in a locked one.
    #[inline(always)]
    pub(super) fn attach(&self, parent: &Node<'t, F>, page: Page, table: &Node<'t, F>) {
        if F::CACHES_ABSENT {
            // Who comes into the table before all CPUs were told of it must not tell them of its entry alone.
            self.table.announce();
        }
        let word = self.link(parent, page, table);
        let index = index_at::<F>(page.number(), parent.level);
        self.table.mirror(parent, index, word);
        if F::CACHES_ABSENT {
            self.table.tell_made(page);
            self.table.retract();
        }
    }

    /// Puts a finished table into the empty entry of `page` in another, locked or private; gives the entry's word.
    #[inline(always)]
    fn link(&self, parent: &Node<'t, F>, page: Page, table: &Node<'t, F>) -> u64 {
        self.table.count_table(table.frame, table.level);
        parent.add_live(1);
        let word = F::table(parent.level, table.frame);
        parent.store(index_at::<F>(page.number(), parent.level), word);
        word
    }

    /// A private, empty table of `level` that will cover `page`, from the reserve or fresh.
    #[inline]
    pub(super) fn make_table(
        &mut self,
        number: usize,
        page: Page,
    ) -> Result<Node<'t, F>, AllocError> {
        let frame = self.reserve.take_or_fresh::<F>()?;
        Ok(self.claimed(frame, number, page))
    }

    /// A private table of `level` that will cover `page`, whose words may be anything: the caller writes them all.
    pub(super) fn make_plain_table(&mut self, number: usize, page: Page) -> Option<Node<'t, F>> {
        let frame = self.reserve.take_plain()?;
        Some(self.claimed(frame, number, page))
    }

    /// A private table of `level` that will cover `page`, for a copy of another: as `make_plain_table`.
    pub(super) fn make_copy(
        &mut self,
        number: usize,
        page: Page,
    ) -> Result<Node<'t, F>, AllocError> {
        let frame = match self.reserve.take_unzeroed::<F>() {
            Err(error) if self.spares => self.table.take_spare().ok_or(error)?,
            frame => frame?,
        };
        Ok(self.claimed(frame, number, page))
    }

    /// A table of `level` that will cover `page`, in a private frame that is in reach and has a slot (`T1`); not locked.
    #[inline]
    fn claimed(&self, frame: OwnedFrame, number: usize, page: Page) -> Node<'t, F> {
        let (frame, _) = frame.into_raw();
        // SAFETY: the frame is private, in reach and has a slot (T1).
        let node = unsafe { Node::<F>::new(self.table.env(), frame, number) };
        node.claim(first_page::<F>(number, page), self.table.root_frame());
        node
    }

    /// Gives back a private, zero table.
    pub(super) fn unmake_table(&self, node: Node<'t, F>) {
        // SAFETY: O1 to O3: it came from `make_table` and was never attached.
        cache::give(self.table.env(), unsafe {
            OwnedFrame::from_raw(node.frame, Order::ZERO)
        });
    }
}

/// The first page that a table of `level` with `page` in it covers.
#[inline(always)]
pub(super) fn first_page<F: Format>(number: usize, page: Page) -> Page {
    let level = level::<F>(number);
    Page::from_number(page.number() & !((1u64 << (level.shift + level.bits)) - 1))
}
