//! The space's page tables: what a VMA's pages look like to the processor.
//!
//! The only file that writes entries. Whatever takes something away goes through a gather, and pages are given back
//! only after its commit.

use kmem_hal::{Frame, Page, PageRange};
use kmem_paging::{
    Attributes, ChangeError, ForkItem, ForkStep, Leaf, MapError, Replaced, Rights, Run,
};

use crate::env::Env;
use crate::errno::Errno;
use crate::flags::VmFlags;
use crate::mm::PageRef;
use crate::space::AddressSpace;
use crate::vma::Vma;

/// The rights of a leaf in a mapping with these flags, were its page its own.
pub(crate) fn rights(flags: VmFlags) -> Rights {
    if !flags.intersects(VmFlags::ACCESS) {
        return Rights::empty();
    }
    let mut rights = Rights::READ | Rights::USER;
    rights.set(Rights::WRITE, flags.contains(VmFlags::WRITE));
    rights.set(Rights::EXECUTE, flags.contains(VmFlags::EXEC));
    rights
}

impl<E: Env> AddressSpace<'_, E> {
    /// The pages that user mappings may lie in.
    pub(crate) fn all_pages(&self) -> PageRange {
        let last = Page::from_number(self.layout().task_size / kmem_hal::PAGE_SIZE - 1);
        PageRange::new(Page::ZERO, last).unwrap_or(PageRange::single(Page::ZERO))
    }

    /// Unmaps what is present in a range, flushes, and gives the pages back.
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
            let outcome = cursor.unmap(rest, &mut gather);
            cursor.release();
            gather.commit(|page: PageRef| self.mm().put(page));
            match outcome {
                Err(ChangeError::Full { next }) => match PageRange::new(next, range.last()) {
                    Some(left) => rest = left,
                    None => return,
                },
                _ => return,
            }
        }
    }

    /// Takes away what a mapping's new flags no longer grant; what they grant newly comes by faults.
    pub(crate) fn restrict(&self, range: PageRange, flags: VmFlags) {
        let granted = rights(flags);
        self.change(range, |leaf| {
            let before = leaf.attributes.rights;
            // A page that could be written stays writable only if the mapping still is; one that could not be may be
            // shared with another space, so only a fault can make it writable.
            let mut after = granted;
            after.set(
                Rights::WRITE,
                granted.contains(Rights::WRITE) && before.contains(Rights::WRITE),
            );
            leaf.attributes.rights(after)
        });
    }

    fn change(&self, range: PageRange, mut attributes: impl FnMut(&Leaf) -> Attributes) {
        let Some(range) = range.intersection(self.all_pages()) else {
            return;
        };
        let Ok(mut cursor) = self.tables().cursor(range) else {
            return;
        };
        let mut gather = self.tables().gather::<1>();
        // Single pages only: nothing to split, so nothing to fail; and the gather takes no pages here.
        let _ = cursor.update(range, &mut gather, |leaf| Some(attributes(leaf)));
        cursor.release();
        gather.commit(|page: PageRef| self.mm().put(page));
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
        let Ok(mut cursor) = self.tables().cursor(PageRange::single(page)) else {
            self.mm().put(mapping);
            return Err(Errno::EFAULT);
        };
        let outcome = cursor.map(page, mapping, attributes);
        drop(cursor);
        match outcome {
            Ok(()) => Ok(true),
            Err((error, mapping)) => {
                self.mm().put(mapping);
                match error {
                    MapError::Occupied => Ok(false),
                    _ => Err(Errno::ENOMEM),
                }
            }
        }
    }

    /// Maps another page where one is; the old one is flushed everywhere first and given back.
    pub(crate) fn exchange(
        &self,
        page: Page,
        mapping: PageRef,
        attributes: Attributes,
    ) -> Result<(), Errno> {
        let Ok(mut cursor) = self.tables().cursor(PageRange::single(page)) else {
            self.mm().put(mapping);
            return Err(Errno::EFAULT);
        };
        let outcome = cursor.replace(page, mapping, attributes);
        drop(cursor);
        match outcome {
            Ok(Replaced::Leaf(_, old)) => {
                self.mm().put(old);
                Ok(())
            }
            Ok(_) => Ok(()),
            Err((_, mapping)) => {
                self.mm().put(mapping);
                Err(Errno::ENOMEM)
            }
        }
    }

    /// Gives a leaf other attributes; they grant more than before or equal.
    pub(crate) fn raise(&self, page: Page, attributes: Attributes) {
        self.change(PageRange::single(page), |_| attributes);
    }

    /// Moves leaves to another range of the same length.
    pub(crate) fn move_leaves(&self, from: PageRange, to: PageRange) -> Result<(), Errno> {
        let mut gather = self.tables().gather::<32>();
        let outcome = self.tables().move_range(from, to.first(), &mut gather);
        gather.commit(|page: PageRef| self.mm().put(page));
        outcome.map(|_| ()).map_err(|_| Errno::ENOMEM)
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

    /// Maps a mapping's pages in the child too; in private memory both sides lose the right to write, flushed.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`]; the child may have part of the pages, the parent is whole.
    pub(crate) fn copy_leaves(&self, child: &Self, vma: &Vma) -> Result<(), Errno> {
        let Some(range) = vma.range.intersection(self.all_pages()) else {
            return Ok(());
        };
        let cow = vma.is_cow();
        let mut gather = self.tables().gather::<1>();
        let outcome = self
            .tables()
            .fork_into(child.tables(), range, &mut gather, |item| {
                let ForkItem::Leaf(leaf) = item else {
                    return ForkStep::Skip;
                };
                let Ok(handle) = self.mm().map_page(leaf.frame) else {
                    return ForkStep::Stop;
                };
                let shared = if cow {
                    leaf.attributes.write_protected()
                } else {
                    leaf.attributes
                };
                ForkStep::Leaf {
                    handle,
                    child: shared,
                    parent: (cow && leaf.is_writable()).then_some(shared),
                }
            });
        gather.commit(|page: PageRef| self.mm().put(page));
        outcome.map(|_| ()).map_err(|(_, unplaced)| {
            if let Some(page) = unplaced {
                self.mm().put(page);
            }
            Errno::ENOMEM
        })
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
