//! fork: a second space with the same contents.
//!
//! ```text
//!   parent  level 2 ─┐ not writable            parent  level 2 ── writable ──> table (a copy, or taken back)
//!                    ├──> table ── pages  ─>                                       │ not writable
//!   child   level 2 ─┘ 2 shares                child   level 2 ── as before ──> table ──> pages
//!                                              first write of either side in these 2 MiB: the table is copied;
//!                                              each write to a page of both: the page is
//! ```
//!
//! Leaf tables are shared, not copied: one entry above each, on both sides, loses the right to write. The first change in a table's
//! 2 MiB copies its entries; whoever is left alone with a table takes it back, pages and all, without a copy. Of a space of
//! [`LEVEL2_FROM`] pages and more the tables one level up are shared, so that 64 GiB cost 64 entries.
//!
//! Which tables? Those with anonymous pages. Pages of files and shared memory alone are not inherited: the child finds them again by faults;
//! where they lie in one table with anonymous pages they come along. A table that holds pages of a mapping which the
//! child does not get, or gets empty (`DONTFORK`, `WIPEONFORK`), is copied entry by entry, as are tables with pinned pages.
//!
//! Before the parent goes on, its write permissions are flushed from every CPU. Both sides set a few frames aside, so that unmapping part
//! of a shared table needs no memory.
//!
//! Source: fork(2); Linux `kernel/fork.c` (`dup_mmap`), `mm/memory.c` (`copy_page_range`); Zhao et al., "On-demand-fork", EuroSys 2021.

use kmem_hal::sync::Ordering;
use kmem_hal::{Page, PageRange};

use crate::env::Env;
use crate::errno::Errno;
use crate::flags::VmFlags;
use crate::mutants::mutant;
use crate::space::AddressSpace;
use crate::tables::{SPARES, SpaceGather, TABLE_PAGES};
use crate::vma::{AnonLink, Vma};

/// Spaces of so many pages (8 GiB) share level-2 tables too. Below that, a fork has at most 4096 tables to share, which is less than a
/// level-2 table more to copy at each first write in its gibibyte is worth.
pub const LEVEL2_FROM: u64 = 2 << 20;

/// Pages that a level-2 table covers.
const LEVEL2_PAGES: u64 = TABLE_PAGES * TABLE_PAGES;

impl<'m, E: Env> AddressSpace<'m, E> {
    /// Makes a child with the same mappings and contents.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`]; no child exists then, and the parent is as it was (its pages may fault once more before they
    /// are written again).
    #[doc(alias = "dup_mmap")]
    pub fn fork(&self) -> Result<Self, Errno> {
        let child = self.empty_child()?;
        self.copy_to(&child, true)?;
        Ok(child)
    }

    /// As [`fork`](Self::fork), but copies every entry now and shares no table: for a program that forks once and cannot have the copies later, and to
    /// compare with.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn fork_copying(&self) -> Result<Self, Errno> {
        let child = self.empty_child()?;
        self.copy_to(&child, false)?;
        Ok(child)
    }

    fn copy_to(&self, child: &Self, share: bool) -> Result<(), Errno> {
        let mut parent = self.lock();
        let mut state = child.lock();
        state.brk = parent.brk;
        state.limits = parent.limits;
        state.segments = parent.segments;
        state.keys = parent.keys;
        state.guards = parent.guards;
        let mut pages = 0;
        let is_admin = parent.limits.is_admin;
        state.vmas.copy_from(&parent.vmas, is_admin, |vma| {
            pages += vma.range.count();
            (!vma.flags.contains(VmFlags::DONTCOPY)).then(|| self.inherited(vma))
        })?;
        if pages >= LEVEL2_FROM && share {
            self.core().sharing.level2.store(true, Ordering::Relaxed);
            child.core().sharing.level2.store(true, Ordering::Relaxed);
        }
        // From here on no fault is at work in this space.
        parent.vmas.lock_all();
        let mut gather = self.tables().gather::<1>();
        let outcome = self.share_all(child, share, parent.vmas.iter(), &mut gather);
        self.settle(&mut gather);
        outcome
    }

    /// Shares the tables that have anonymous pages.
    fn share_all<const N: usize>(
        &self,
        child: &Self,
        share: bool,
        vmas: impl Iterator<Item = Vma>,
        gather: &mut SpaceGather<'_, 'm, E, N>,
    ) -> Result<(), Errno> {
        let unit = self.share_unit();
        let levels = if share { self.levels_to_share() } else { 0 };
        let mut share = |first: u64, last: u64| {
            let range = PageRange::new(Page::from_number(first), Page::from_number(last));
            let Some(range) = range else { return Ok(()) };
            if levels > 0 && !self.shares_tables() {
                self.tables().keep_spares(SPARES)?;
                self.core().sharing.tables.store(true, Ordering::Relaxed);
            }
            // SAFETY: the space's lock is held and every VMA of it is, so nothing else is at work in its tables; nobody runs in the
            // child yet, whose lock is held too.
            unsafe { self.share_leaves(child, range, levels, gather) }
        };
        // Pages in whole tables with something to inherit, not shared yet; and the page after the last mapping that is not inherited.
        let mut pending: Option<(u64, u64)> = None;
        let mut after_gap = 0;
        for vma in vmas {
            let (first, last) = (vma.range.first().number(), vma.range.last().number());
            if vma
                .flags
                .intersects(VmFlags::DONTCOPY | VmFlags::WIPEONFORK)
            {
                if let Some((from, to)) = pending.take() {
                    share(from, to.min(first - 1))?;
                }
                after_gap = last + 1;
                continue;
            }
            if vma.anon.is_none() && !vma.flags.contains(VmFlags::MAYBE_GUARD) {
                continue;
            }
            let (first, last) = ((first & !(unit - 1)).max(after_gap), last | (unit - 1));
            pending = match pending {
                Some((from, to)) if to + 1 >= first => Some((from, to.max(last))),
                Some((from, to)) => {
                    share(from, to)?;
                    Some((first, last))
                }
                None => Some((first, last)),
            };
        }
        if let Some((from, to)) = pending {
            share(from, to)?;
        }
        if levels > 0 && self.shares_tables() {
            child.core().sharing.tables.store(true, Ordering::Relaxed);
            child.tables().keep_spares(SPARES)?;
        }
        Ok(())
    }

    /// Whether tables were ever shared with another space.
    pub(crate) fn shares_tables(&self) -> bool {
        self.core().sharing.tables.load(Ordering::Relaxed)
    }

    /// The highest level whose tables are shared.
    pub(crate) fn share_levels(&self) -> usize {
        1 + usize::from(self.core().sharing.level2.load(Ordering::Relaxed))
    }

    /// The highest level whose tables may be shared now: pins are counted in leaf tables, and a table above would hide them.
    pub(crate) fn levels_to_share(&self) -> usize {
        match self.pins() {
            0 => self.share_levels(),
            _ => 1,
        }
    }

    /// Pages that the largest table covers that may be shared.
    pub(crate) fn share_unit(&self) -> u64 {
        match self.share_levels() {
            1 => TABLE_PAGES,
            _ => LEVEL2_PAGES,
        }
    }

    /// The child's VMA: its reverse map is new and hangs below the parent's, so it is not a single one.
    fn inherited(&self, vma: &Vma) -> Vma {
        let wiped = vma.flags.contains(VmFlags::WIPEONFORK);
        let anon = vma.anon.filter(|_| !wiped).map(|_| AnonLink {
            id: self.mm().next_anon_id(),
            singular: false,
        });
        Vma {
            anon,
            flags: match mutant!("fork-locks-the-child") {
                true => vma.flags,
                false => vma.flags.difference(VmFlags::LOCKED_MASK),
            },
            ..*vma
        }
    }
}
