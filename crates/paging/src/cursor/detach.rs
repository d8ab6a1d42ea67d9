//! Detaching tables: emptied ones, whole ones with their leaves, and shares of tables that other spaces have too.
//!
//! ```text
//!   held table, live 1 ── take ──> live 0 ── unlock ── lock parent ── lock table ── still 0? ── stray, parent entry 0
//!                                                                                     no: somebody mapped: leave it
//! ```
//!
//! Where the table above is the held one, the leaf table is locked, cleared and detached in one go.

use kmem_hal::{Grace, Order, Page, PageRange, Trace, TraceEvent};

use super::{Cursor, Divisible};
use crate::env::Env;
use crate::error::ChangeError;
use crate::format::{Format, Word, level};
use crate::gather::{FLUSH_CEILING, Gather, Stale};
use crate::mutants::mutant;
use crate::node::{self, Node};
use crate::quiescent::Liveness;
use crate::table::index_at;

impl<'t, F: Format, E: Env, H: Divisible, S: Liveness> Cursor<'t, F, E, H, S> {
    /// Clears the only leaf of a leaf table below the held table of level 2, and detaches the table; whether that was so. Else the leaf table,
    /// where there is one, is the held one.
    #[inline(never)]
    pub(super) fn unmap_alone<const N: usize>(
        &mut self,
        page: Page,
        gather: &mut Gather<'_, F, E, H, N>,
    ) -> bool {
        let Some(parent) = self.held else {
            return false;
        };
        let number = page.number();
        if parent.level != 2
            || parent.level >= self.table.levels()
            || number.wrapping_sub(self.span.0) >= self.span.1
            || !self.range.contains(page)
            || S::QUIESCENT
            || !gather.belongs_to(self.table)
            || gather.is_full()
        {
            return false;
        }
        let index = index_at::<F>(number, 2);
        let word = parent.load(index);
        if !F::is_table(2, word) || F::is_shared_table(2, word) {
            return false;
        }
        let env = self.table.env();
        // SAFETY: an entry of a locked table points to an attached table.
        let table: Node<'t, F> = unsafe { Node::new(env, F::table_frame(word), 1) };
        table.lock(env);
        let entry = table.leaf_entry(number);
        let word = F::Word::load(entry);
        if !F::is_present(1, word) || table.live() != 1 && !mutant!("alone-does-not-look") {
            self.let_go();
            parent.unlock();
            self.hold(table, page);
            return false;
        }
        if !mutant!("alone-not-noted") {
            gather.announce_page(number, F::is_global(1, word));
        }
        let word = node::take_known::<F, S>(entry, word);
        table.sub_live(1);
        gather.push(F::leaf_frame(1, word), Order::ZERO);
        self.table
            .env()
            .trace()
            .event(TraceEvent::Unmapped(PageRange::single(page)));
        let left = self.detach(&parent, index, &table, gather);
        if left == 0 {
            self.prune(gather);
        }
        true
    }

    /// Takes an empty, locked table out of the locked one above it, whose live count it gives, and lets its lock go.
    #[inline(always)]
    fn detach<const N: usize>(
        &self,
        parent: &Node<'t, F>,
        index: usize,
        child: &Node<'t, F>,
        gather: &mut Gather<'_, F, E, H, N>,
    ) -> u32 {
        if !mutant!("prune-forgets-the-parent") {
            parent.store(index, 0);
            self.table.mirror(parent, index, 0);
        }
        let left = parent.sub_live(1);
        if mutant!("prune-not-stray") {
            child.unlock();
        } else {
            child.unlock_stray();
        }
        self.table.discount_table(child.frame, child.level);
        if !mutant!("prune-leaks") {
            gather.push_table(child);
        }
        left
    }

    /// Holds the table of level `number`, and gives how many pages an entry of it covers: `page ..= last` covers the one at `page` whole. `None`
    /// where it does not, there is no such table, or it is the root: tables right below that may be held (`N1`).
    #[inline(always)]
    fn seek_above(&mut self, number: usize, page: u64, last: u64) -> Option<(Node<'t, F>, u64)> {
        if self.table.levels() <= number {
            // Tables below the root may be lent, and stay for ever.
            return None;
        }
        let covered = 1u64 << level::<F>(number).shift;
        if page & (covered - 1) != 0 || last - page < covered - 1 {
            return None;
        }
        let node = self.seek_own(Page::from_number(page), number).ok()?;
        (node.level == number).then_some((node, covered))
    }

    /// Detaches the well-filled leaf tables that `page ..= last` covers whole, as far as one level-2 table has them one after the other; gives
    /// where to go on, or `None` where there is none at `page`.
    ///
    /// Costs two locks and a store a table, whatever is in it; the commit looks at the leaves (`G4` of the gather).
    pub(super) fn detach_whole<const N: usize>(
        &mut self,
        page: u64,
        last: u64,
        gather: &mut Gather<'_, F, E, H, N>,
        pages: &mut u64,
    ) -> Result<Option<Option<u64>>, ChangeError> {
        let Some((node, covered)) = self.seek_above(2, page, last) else {
            return Ok(None);
        };
        let env = self.table.env();
        let trace = env.trace();
        let mut index = index_at::<F>(page, 2);
        let mut at = page;
        let mut detached = 0;
        let mut full = false;
        let next = loop {
            let word = node.load(index);
            if F::is_table(2, word) {
                // SAFETY: an entry of a locked table points to an attached table.
                let table: Node<'t, F> = unsafe { Node::new(env, F::table_frame(word), 1) };
                // Before the first store.
                gather.announce();
                table.lock(env);
                if F::is_shared_table(2, word)
                    && table.shares() > 1
                    && !mutant!("share-unmapped-for-all")
                {
                    // What is in it stays with the others: a share is given up.
                    let live = u64::from(table.live());
                    table.unlock();
                    if gather.is_full() {
                        full = true;
                        break Some(at);
                    }
                    *pages += live;
                    node.store(index, 0);
                    gather.push_share(table.frame, 1);
                    self.table.count_shared(1, false);
                } else if u64::from(table.live()) <= FLUSH_CEILING {
                    // Few leaves: cleared one by one they need no full flush.
                    table.unlock();
                    break Some(at);
                } else {
                    *pages += u64::from(table.live());
                    if !mutant!("whole-stays-attached") {
                        node.store(index, 0);
                    }
                    table.unlock_stray();
                    gather.push_whole(&table);
                    self.table.discount_table(table.frame, 1);
                }
                trace.event(TraceEvent::Unmapped(super::map::block(
                    Page::from_number(at),
                    level::<F>(2).order(),
                )));
                detached += 1;
            } else if word != 0 {
                // A huge leaf or a payload.
                break Some(at);
            }
            if last - at < covered {
                break None;
            }
            at += covered;
            index += 1;
            if index == level::<F>(2).entries() || last - at < covered - 1 {
                break Some(at);
            }
        };
        if detached > 0 {
            let end = match next {
                Some(next) => next - 1,
                None => last,
            };
            if let Some(range) = PageRange::new(Page::from_number(page), Page::from_number(end))
                && !mutant!("whole-not-noted")
            {
                gather.note(Stale {
                    range,
                    stride: 1,
                    global: self.table.may_be_global(),
                    local: true,
                });
            }
            if node.sub_live(if mutant!("whole-not-counted") {
                0
            } else {
                detached
            }) == 0
            {
                self.prune(gather);
            }
        }
        if full {
            self.release();
            let next = Page::from_number(next.unwrap_or(page));
            return Err(ChangeError::Full { next });
        }
        // Nothing was done at all: the other way has to go on from here.
        Ok((next != Some(page)).then_some(next))
    }

    /// Gives up the share of a level-2 table from `page` on that other spaces have too and the range covers whole; gives where to go on, or
    /// `None` where there is none at `page`.
    pub(super) fn give_up_level2<const N: usize>(
        &mut self,
        page: u64,
        last: u64,
        gather: &mut Gather<'_, F, E, H, N>,
        pages: &mut u64,
    ) -> Result<Option<Option<u64>>, ChangeError> {
        let Some((node, covered)) = self.seek_above(3, page, last) else {
            return Ok(None);
        };
        let index = index_at::<F>(page, 3);
        let word = node.load(index);
        if !F::is_table(3, word) || !F::is_shared_table(3, word) {
            return Ok(None);
        }
        if gather.is_full() {
            self.release();
            return Err(ChangeError::Full {
                next: Page::from_number(page),
            });
        }
        let env = self.table.env();
        // SAFETY: an entry of a locked table points to an attached table.
        let table: Node<'t, F> = unsafe { Node::new(env, F::table_frame(word), 2) };
        table.lock(env);
        if table.shares() == 1 {
            table.unlock();
            return Ok(None);
        }
        let live = table.live();
        let below = if self.table.may_be_huge() {
            table.tables()
        } else {
            live as usize
        };
        table.unlock();
        gather.announce();
        node.store(index, 0);
        gather.push_share(table.frame, 2);
        self.table.count_shared(1 + below, false);
        *pages += u64::from(live) << level::<F>(2).shift;
        let end = page + (covered - 1);
        if let Some(range) = PageRange::new(Page::from_number(page), Page::from_number(end)) {
            gather.note(Stale {
                range,
                stride: 1,
                global: self.table.may_be_global(),
                local: true,
            });
            self.table.env().trace().event(TraceEvent::Unmapped(range));
        }
        if node.sub_live(1) == 0 && node.level < self.table.levels() {
            self.prune(gather);
        }
        Ok(Some((end < last).then_some(end + 1)))
    }

    /// Detaches the held table, which is empty, and every table above that this empties.
    #[cold]
    pub(super) fn prune<const N: usize>(&mut self, gather: &mut Gather<'_, F, E, H, N>) {
        let Some(mut child) = self.let_go() else {
            return;
        };
        let env = self.table.env();
        let page = self.span.0;
        while child.level < self.table.levels() {
            let Some(parent) = self.exchange_for_parent(&child, page) else {
                return;
            };
            let index = index_at::<F>(page, parent.level);
            child.lock(env);
            if child.live() != 0 && !mutant!("prune-does-not-look-again") {
                child.unlock();
                parent.unlock();
                return;
            }
            gather.announce();
            let left = self.detach(&parent, index, &child, gather);
            if left != 0 || mutant!("prune-stops-at-one") {
                if left != 0 && !self.range_ends_in(page, child.level) {
                    // The next page may be below it too.
                    self.hold(parent, Page::from_number(page));
                } else {
                    parent.unlock();
                }
                return;
            }
            child = parent;
        }
        child.unlock();
    }

    /// Lets a locked table of the path go and locks the one above it; `None`, and nothing is locked, where that one does not lead to it any
    /// more.
    fn exchange_for_parent(&mut self, child: &Node<'t, F>, page: u64) -> Option<Node<'t, F>> {
        let env = self.table.env();
        let above = child.level + 1;
        let at = {
            // Begins while the child's lock keeps the path attached (U1), so the tables of the path stay tables.
            let _reading = env.grace().read();
            child.unlock();
            // SAFETY: a table of the path (U2), inside the read section.
            let parent: Node<'t, F> = unsafe { Node::new(env, self.path[above], above) };
            parent.try_lock_attached(false).then_some(parent)
        };
        let parent = match at {
            Some(parent) => parent,
            None => {
                // U6
                env.relax();
                let parent = self.seek(Page::from_number(page), above);
                self.let_go();
                parent
            }
        };
        let word = parent.load(index_at::<F>(page, parent.level));
        let leads = parent.level == above
            && !self.shared
            && F::is_table(above, word)
            && F::table_frame(word) == child.frame;
        if leads {
            return Some(parent);
        }
        parent.unlock();
        None
    }

    /// Whether the cursor's range ends in the table of `level` with `page`.
    fn range_ends_in(&self, page: u64, number: usize) -> bool {
        let level = level::<F>(number);
        (page ^ self.range.last().number()) >> (level.shift + level.bits) == 0
    }
}
