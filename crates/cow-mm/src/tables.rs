//! The space's page tables: what a VMA's pages look like to the processor.
//!
//! The only file that writes entries. Whatever takes something away goes through a gather, and pages are given back
//! only after its commit.

use kmem_hal::{Frame, Order, Page, PageRange};
use kmem_paging::{
    Attributes, ChangeError, Cursor, Entry, ForkItem, ForkStep, Gather, Leaf, LockedEntry,
    MapError, MoveError, Rights, Run, UnshareStep,
};

use crate::env::Env;
use crate::errno::Errno;
use crate::flags::VmFlags;
use crate::mm::{NearSlots, PageRef};
use crate::mutants::mutant;
use crate::space::AddressSpace;

/// Pages that a leaf table covers, in the formats whose tables can be shared.
pub(crate) const TABLE_PAGES: u64 = 512;

/// Table frames that a space which shares tables sets aside: an unmapping has two ends, and each may need a leaf table and one above it.
pub(crate) const SPARES: usize = 4;

/// A cursor over a space's tables.
pub(crate) type SpaceCursor<'t, 'm, E> =
    Cursor<'t, <E as Env>::Format, &'m <E as Env>::Paging, PageRef>;

/// A locked entry of a space's tables.
pub(crate) type SpaceEntry<'t, 'm, E> =
    LockedEntry<'t, <E as Env>::Format, &'m <E as Env>::Paging, PageRef>;

/// A gather for a space's tables.
pub(crate) type SpaceGather<'t, 'm, E, const N: usize> =
    Gather<'t, <E as Env>::Format, &'m <E as Env>::Paging, PageRef, N>;

/// The first page after those of a page's leaf table.
pub(crate) fn next_table(page: Page) -> Option<Page> {
    Page::new((page.number() | (TABLE_PAGES - 1)) + 1)
}

/// The rights of a leaf in a mapping with these flags, were its page its own.
pub(crate) fn rights(flags: VmFlags) -> Rights {
    if !flags.intersects(VmFlags::ACCESS) {
        return Rights::empty();
    }
    let mut rights = Rights::READ | Rights::USER;
    rights.set(Rights::WRITE, flags.contains(write_flag()));
    rights.set(Rights::EXECUTE, flags.contains(VmFlags::EXEC));
    rights
}

/// The flag without which a mapping's pages are not written to.
#[inline(always)]
pub(crate) fn write_flag() -> VmFlags {
    match mutant!("what-may-be-granted-is") {
        true => VmFlags::MAYWRITE,
        false => VmFlags::WRITE,
    }
}

/// What a new leaf of a mapping with these flags says, were its page its own: rights, and the protection key.
pub(crate) fn attributes(flags: VmFlags) -> Attributes {
    Attributes::new(rights(flags)).pkey(flags.key())
}

impl<'m, E: Env> AddressSpace<'m, E> {
    /// The pages that user mappings may lie in.
    pub(crate) fn all_pages(&self) -> PageRange {
        let last = Page::from_number(self.layout().task_size / kmem_hal::PAGE_SIZE - 1);
        PageRange::new(Page::ZERO, last).unwrap_or(PageRange::single(Page::ZERO))
    }

    /// Flushes what a gather noted, and gives back what it holds.
    pub(crate) fn settle<const N: usize>(&self, gather: &mut SpaceGather<'_, 'm, E, N>) {
        gather.commit_with(
            |page: PageRef| self.mm().put(page),
            |payload| self.mm().drop_payload(payload),
        );
    }

    /// Unmaps what is present in a range, flushes, and gives the pages back.
    ///
    /// Needs no memory where the tables at the range's ends are the space's own ([`own_ends`](Self::own_ends)).
    #[inline(never)]
    pub(crate) fn zap(&self, range: PageRange) {
        let Some(range) = range.intersection(self.all_pages()) else {
            return;
        };
        let Ok(mut cursor) = self.tables().cursor(range) else {
            return;
        };
        let mut gather = self.tables().gather::<32>();
        let mut rest = range;
        loop {
            let outcome =
                cursor.unmap_giving(rest, &mut gather, |payload| self.mm().drop_payload(payload));
            cursor.release();
            self.settle(&mut gather);
            let next = match outcome {
                Err(ChangeError::Full { next }) => next,
                Err(ChangeError::Shared { at }) => {
                    debug_assert!(
                        false,
                        "the ends of an unmapped range are not its space's own"
                    );
                    if self.unshare(&mut cursor, at).is_err() {
                        return;
                    }
                    at
                }
                _ => return,
            };
            match PageRange::new(next, range.last()) {
                Some(left) => rest = left,
                None => return,
            }
        }
    }

    /// Makes the tables that a range covers in part the space's own, from the frames set aside if there are no others: after that,
    /// unmapping the range needs no memory.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`] where even those are used up; contents have not changed.
    #[inline(never)]
    pub(crate) fn own_ends(&self, range: PageRange) -> Result<(), Errno> {
        let Some(range) = range
            .intersection(self.all_pages())
            .filter(|_| self.shares_tables())
        else {
            return Ok(());
        };
        let Ok(mut cursor) = self.tables().cursor(range) else {
            return Ok(());
        };
        cursor.use_spares();
        let unit = self.share_unit();
        let (first, last) = (range.first(), range.last());
        if !first.number().is_multiple_of(unit) {
            self.own(&mut cursor, first)?;
        }
        if !(last.number() + 1).is_multiple_of(unit) {
            self.own(&mut cursor, last)?;
        }
        drop(cursor);
        // For the next call; what cannot be had now is tried again then.
        let _ = self.tables().keep_spares(SPARES);
        Ok(())
    }

    /// Makes all tables of a range the space's own, so that its leaves can be changed.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`]; contents have not changed.
    pub(crate) fn own_range(&self, range: PageRange) -> Result<(), Errno> {
        let Some(range) = range
            .intersection(self.all_pages())
            .filter(|_| self.shares_tables())
        else {
            return Ok(());
        };
        let Ok(mut cursor) = self.tables().cursor(range) else {
            return Ok(());
        };
        while let Some(run) = cursor.next_run() {
            if matches!(run, Run::Absent(_)) {
                continue;
            }
            let page = run.range().first().max(range.first());
            self.own(&mut cursor, page)?;
            // On with the next table.
            match next_table(page) {
                Some(next) => cursor.move_to(next),
                None => break,
            }
        }
        Ok(())
    }

    /// What is mapped at a page, in a table of the space's own whose lock the cursor holds.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`] where a shared table cannot be copied.
    pub(crate) fn own<'t>(
        &'t self,
        cursor: &mut SpaceCursor<'t, 'm, E>,
        page: Page,
    ) -> Result<Entry, Errno> {
        loop {
            match cursor.own(page) {
                Ok(entry) => return Ok(entry),
                Err(ChangeError::Shared { .. }) => self.unshare(cursor, page)?,
                Err(_) => return Err(Errno::EFAULT),
            }
        }
    }

    /// The entry of a page that something is mapped at, in a table of the space's own, whose lock it holds; `None` where there is
    /// nothing, or no single page.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`] where a shared table cannot be copied.
    #[inline]
    pub(crate) fn lock_own(&self, page: Page) -> Result<Option<SpaceEntry<'_, 'm, E>>, Errno> {
        loop {
            let entry = self.tables().lock_entry(page);
            if entry.is_some() || !self.own_table_of(page)? {
                return Ok(entry);
            }
        }
    }

    /// Makes the table of a page the space's own; whether a single page is mapped there, or something stands in for one.
    #[cold]
    #[inline(never)]
    fn own_table_of(&self, page: Page) -> Result<bool, Errno> {
        let cursor = self.tables().cursor(PageRange::single(page));
        let mut cursor = cursor.map_err(|_| Errno::EFAULT)?;
        // Copies it or takes it back, whichever it is: no look before.
        self.unshare(&mut cursor, page)?;
        Ok(match self.own(&mut cursor, page)? {
            Entry::Leaf(leaf) => leaf.order == Order::ZERO,
            Entry::Payload(_) => true,
            Entry::Empty => false,
        })
    }

    /// Copies the tables that lead to a page where other spaces share them. Anonymous pages lose the right to be written in both
    /// tables, and are nobody's alone any more.
    #[inline(never)]
    fn unshare<'t>(&'t self, cursor: &mut SpaceCursor<'t, 'm, E>, page: Page) -> Result<(), Errno> {
        let mut gather = self.tables().gather::<2>();
        let mut near = NearSlots::new();
        let outcome = cursor.unshare_counted(
            page,
            &mut gather,
            |item| {
                let leaf = match item {
                    ForkItem::Leaf(leaf) => leaf,
                    ForkItem::Payload(_, payload) => {
                        return match self.mm().copy_payload(payload) {
                            true => UnshareStep::Payload,
                            false => UnshareStep::Stop,
                        };
                    }
                };
                match self.mm().map_again(&mut near, leaf.frame) {
                    Some((handle, true)) => UnshareStep::Protected(handle),
                    Some((handle, false)) => UnshareStep::Kept(handle),
                    None => UnshareStep::Stop,
                }
            },
            |unplaced| self.mm().put(unplaced),
            |payload| self.mm().drop_payload(payload),
        );
        self.settle(&mut gather);
        outcome.map(|_| ()).map_err(|_| Errno::ENOMEM)
    }

    /// Takes away what a mapping's new flags no longer grant; what they grant newly comes by faults. The tables are the space's
    /// own ([`own_range`](Self::own_range)).
    #[inline(never)]
    pub(crate) fn restrict(&self, range: PageRange, flags: VmFlags) {
        let Some(range) = range.intersection(self.all_pages()) else {
            return;
        };
        let Ok(mut cursor) = self.tables().cursor(range) else {
            return;
        };
        let granted = rights(flags);
        let mut gather = self.tables().gather::<1>();
        let mut rest = range;
        loop {
            // Single pages only: nothing to split, so nothing to fail; and the gather takes no pages here.
            let outcome = cursor.update(rest, &mut gather, |leaf| {
                // A page that could be written stays writable only if the mapping still is; one that could not be may be
                // shared with another space, so only a fault can make it writable.
                let mut after = granted;
                let writable = granted.contains(Rights::WRITE) && leaf.is_writable();
                after.set(Rights::WRITE, writable);
                Some(leaf.attributes.rights(after).pkey(flags.key()))
            });
            // A table that is still shared has nothing in the range.
            let next = match outcome {
                Err(ChangeError::Shared { at }) => next_table(at),
                _ => None,
            };
            match next.and_then(|next| PageRange::new(next, range.last())) {
                Some(left) => rest = left,
                None => break,
            }
        }
        cursor.release();
        self.settle(&mut gather);
    }

    /// The leaf of a page.
    pub(crate) fn leaf(&self, page: Page) -> Option<Leaf> {
        self.tables().query(page).leaf()
    }

    /// Maps a page where nothing is; `false` where another fault was faster.
    pub(crate) fn install(
        &self,
        page: Page,
        mapping: PageRef,
        attributes: Attributes,
    ) -> Result<bool, Errno> {
        let Some(entry) = self.tables().lock_entry(page) else {
            return self.install_with_tables(page, mapping, attributes);
        };
        match entry.map(mapping, attributes) {
            Ok(()) => Ok(true),
            Err((error, mapping)) => self.not_installed(error, mapping),
        }
    }

    /// As `install`, where tables are missing or shared.
    #[cold]
    #[inline(never)]
    fn install_with_tables(
        &self,
        page: Page,
        mapping: PageRef,
        attributes: Attributes,
    ) -> Result<bool, Errno> {
        let Ok(mut cursor) = self.tables().cursor(PageRange::single(page)) else {
            return self.not_installed(MapError::OutOfRange, mapping);
        };
        let mut mapping = mapping;
        loop {
            let (error, back) = match cursor.map(page, mapping, attributes) {
                Ok(()) => return Ok(true),
                Err(refused) => refused,
            };
            if error != MapError::Shared || self.unshare(&mut cursor, page).is_err() {
                drop(cursor);
                return self.not_installed(error, back);
            }
            mapping = back;
        }
    }

    /// Gives up the mapping of a page that was not installed; `false` where another fault was faster.
    fn not_installed(&self, error: MapError, mapping: PageRef) -> Result<bool, Errno> {
        self.mm().put(mapping);
        match error {
            MapError::Occupied => Ok(false),
            // A device's frame that this format cannot name.
            MapError::Unencodable | MapError::OutOfRange => Err(Errno::EFAULT),
            // No memory for a table, or for a copy of one that is shared.
            _ => Err(Errno::ENOMEM),
        }
    }

    /// Moves leaves to another range of the same length.
    // Its gather stands on the stack only while it works.
    #[inline(never)]
    pub(crate) fn move_leaves(&self, from: PageRange, to: PageRange) -> Result<(), Errno> {
        let mut gather = self.tables().gather::<32>();
        loop {
            let outcome = self.tables().move_range(from, to.first(), &mut gather);
            self.settle(&mut gather);
            let at = match outcome {
                Ok(_) => {
                    self.move_pins(to);
                    return Ok(());
                }
                Err(MoveError::Shared { at }) => at,
                Err(_) => return Err(Errno::ENOMEM),
            };
            let cursor = self.tables().cursor(PageRange::single(at));
            self.unshare(&mut cursor.map_err(|_| Errno::EFAULT)?, at)?;
        }
    }

    /// Shows every leaf in a range.
    pub(crate) fn for_each_leaf(&self, range: PageRange, mut show: impl FnMut(&Leaf)) {
        let Some(range) = range.intersection(self.all_pages()) else {
            return;
        };
        let Ok(mut cursor) = self.tables().cursor(range) else {
            return;
        };
        while let Some(run) = cursor.next_run() {
            for_each_leaf_of(&run, range, &mut show);
        }
    }

    /// Gives the child what is mapped in a range: whole tables of level `most` and below are shared, entries of the others copied. Anonymous pages lose the right to
    /// be written on both sides, which is flushed when the gather is committed.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`]; the child may have part of the pages, the parent is whole.
    ///
    /// # Safety
    ///
    /// Nobody else changes either space's tables, nor until the gather was committed.
    pub(crate) unsafe fn share_leaves<const N: usize>(
        &self,
        child: &Self,
        range: PageRange,
        most: usize,
        gather: &mut SpaceGather<'_, 'm, E, N>,
    ) -> Result<(), Errno> {
        let (mut counted, mut near) = (None, NearSlots::new());
        let step = |item| {
            let leaf = match item {
                ForkItem::Leaf(leaf) => leaf,
                ForkItem::Payload(page, payload) => {
                    if !self.mm().copy_payload(payload) {
                        return ForkStep::Stop;
                    }
                    counted = Some((page, payload));
                    return ForkStep::Payload(payload);
                }
            };
            if self.mm().pins_of(leaf.frame) > 0 {
                // It stays this space's own, and what a device does with it is the child's no more.
                let index = self.mm().user(leaf.frame).page();
                let copy = self
                    .mm()
                    .new_anonymous(self.family(), index, Some(leaf.frame));
                let Ok(handle) = copy else {
                    return ForkStep::Stop;
                };
                return ForkStep::Leaf {
                    handle,
                    child: leaf.attributes,
                    parent: None,
                };
            }
            let Some((handle, anonymous)) = self.mm().map_again(&mut near, leaf.frame) else {
                return ForkStep::Stop;
            };
            let shared = if anonymous {
                leaf.attributes.write_protected()
            } else {
                leaf.attributes
            };
            ForkStep::Leaf {
                handle,
                child: shared,
                parent: (anonymous && leaf.is_writable()).then_some(shared),
            }
        };
        // SAFETY: the caller's promise is passed on.
        let outcome = unsafe {
            self.tables()
                .fork_sharing(child.tables(), range, most, gather, step)
        };
        outcome.map(|_| ()).map_err(|(_, unplaced)| {
            if let Some(page) = unplaced {
                self.mm().put(page);
            }
            // The last one that was counted, unless the child has it.
            if let Some((page, payload)) = counted
                && child.tables().query(page) != Entry::Payload(payload)
            {
                self.mm().drop_payload(payload);
            }
            Errno::ENOMEM
        })
    }

    /// The leaf of a page and its frame, held by a reference that the caller [puts](Mm::put_reference); rights are those of the whole path.
    ///
    /// The reference is taken under the lock of the table: where a fork left that shared, reclaim takes the entry out of it without
    /// any lock of this space, and frees the frame.
    ///
    /// # Errors
    ///
    /// [`Errno::EFAULT`] where it is a device's memory, or has as many references as can be counted.
    #[doc(alias = "get_user_page_fast_only")]
    pub(crate) fn hold_leaf(&self, page: Page) -> Result<Option<(Leaf, Frame)>, Errno> {
        let cursor = self.tables().cursor(PageRange::single(page));
        let mut cursor = cursor.map_err(|_| Errno::EFAULT)?;
        let (entry, shared) = cursor.look(page);
        let found = entry
            .leaf()
            .and_then(|leaf| Some((leaf, leaf.frame_of(page)?)));
        let Some((mut leaf, frame)) = found else {
            return Ok(None);
        };
        if shared {
            leaf.attributes.rights.remove(Rights::WRITE);
        }
        let counted = self.mm().counted(frame).ok_or(Errno::EFAULT)?;
        counted.add_reference().map_err(|_| Errno::EFAULT)?;
        Ok(Some((leaf, frame)))
    }

    /// The frame behind a page, if one is mapped.
    #[must_use]
    pub fn frame_at(&self, page: Page) -> Option<Frame> {
        self.leaf(page).and_then(|leaf| leaf.frame_of(page))
    }
}

/// Shows the single pages of a run, as leaves.
fn for_each_leaf_of(run: &Run, range: PageRange, show: &mut impl FnMut(&Leaf)) {
    let Run::Leaves {
        range: pages,
        first,
    } = run
    else {
        return;
    };
    for page in pages
        .intersection(range)
        .into_iter()
        .flat_map(PageRange::iter)
    {
        let above = page.number() - first.page.number();
        let frame = Frame::from_number(first.frame.number() + above);
        show(&Leaf {
            page,
            frame,
            ..*first
        });
    }
}
