//! Advice about pages: which may go without a copy, which are not needed soon, which are needed at once.
//!
//! | advice | what happens to the pages of the range |
//! |---|---|
//! | `MADV_FREE` | their dirty bits go; reclaim drops them where they are still clean then, and reads find the old bytes until it does |
//! | `MADV_COLD` | they count as not used, and go before others |
//! | `MADV_PAGEOUT` | they are reclaimed now |
//! | `MADV_WILLNEED` | those in swap and of files are read, without waiting; of a file 2 MiB for each mapping in the range |
//! | `MADV_REMOVE` | those of shared memory go, out of every space and out of their object |
//!
//! Costs: what is in the range, not its size: a walk passes what was never touched table by table, and what an object does not have
//! entry by entry.
//!
//! Pages that other spaces map too are left alone, as in Linux: one process's advice is not the others'.
//!
//! Source: madvise(2); Linux `mm/madvise.c` (`madvise_free_pte_range`, `madvise_cold_or_pageout_pte_range`, `madvise_willneed`).

use kmem_hal::{FrameTag, Page, PageRange, SlotFlags};
use kmem_paging::{ChangeError, Cleared, Entry, Leaf, Run};

use crate::absent::Absent;
use crate::env::Env;
use crate::errno::Errno;
use crate::flags::Advice;
use crate::object::FileRef;
use crate::page_cache::ObjectPage;
use crate::reclaim::LAZY_FREE;
use crate::space::AddressSpace;
use crate::swap_in::Swapped;
use crate::tables::next_table;

/// Pages of a file that a mapping's part of one piece of advice reads at most: a large range would push out what is used
/// (`force_page_cache_ra`, bounded there by what the device takes at once and by the window of read-ahead).
const FETCH: u64 = 512;

impl<E: Env> AddressSpace<'_, E> {
    /// Lets anonymous pages of a range go when memory is short, unless they are written before. The space's lock is held.
    #[inline(never)]
    pub(crate) fn free_lazily(&self, range: PageRange) {
        let mm = self.mm();
        let Some(range) = range.intersection(self.all_pages()) else {
            return;
        };
        let Ok(mut cursor) = self.tables().cursor(range) else {
            return;
        };
        let mut gather = self.tables().gather::<1>();
        let mut rest = Some(range);
        while let Some(part) = rest {
            let outcome = cursor.update(part, &mut gather, |leaf| {
                if !self.is_mine_alone(leaf) {
                    return None;
                }
                let page = mm.user(leaf.frame);
                // What the kernel or a device wrote until now goes like what the program wrote.
                page.slot().clear_flags(SlotFlags::DIRTY);
                page.slot().set_flags(LAZY_FREE);
                page.set_age(0);
                let mut attributes = leaf.attributes;
                attributes.dirty = false;
                Some(attributes)
            });
            // What is in a shared table is the others' too.
            rest = match outcome {
                Err(ChangeError::Shared { at }) => {
                    next_table(at).and_then(|next| PageRange::new(next, range.last()))
                }
                _ => None,
            };
        }
        cursor.release();
        self.settle(&mut gather);
        self.forget_swapped(range);
    }

    /// Clears the entries of swap in a range: the next read finds zeros.
    #[inline(never)]
    fn forget_swapped(&self, range: PageRange) {
        let mut next = Some(range.first());
        let is_swapped = |payload| matches!(Absent::of(payload), Some(Absent::Swapped(_)));
        while let Some((page, payload)) = next.and_then(|from| self.next_payload(from, range)) {
            let single = PageRange::single(page);
            // Guard regions stay, and pages on their way to another frame.
            if is_swapped(payload)
                && let Ok(mut cursor) = self.tables().cursor(single)
            {
                let mut gather = self.tables().gather::<1>();
                // A page that came back meanwhile stays as it is.
                let mut gone = None;
                if let (Entry::Payload(payload), false) = cursor.look(page)
                    && is_swapped(payload)
                {
                    let _ = cursor.unmap_with(single, &mut gather, |cleared| {
                        if let Cleared::Payload(_, payload) = cleared {
                            gone = Some(payload);
                        }
                    });
                }
                cursor.release();
                self.settle(&mut gather);
                gone.inspect(|&payload| self.mm().drop_payload(payload));
            }
            next = page.checked_add(1).filter(|next| range.contains(*next));
        }
    }

    /// Whether an anonymous page has this one mapping, and nobody else looks at it.
    fn is_mine_alone(&self, leaf: &Leaf) -> bool {
        let page = self.mm().user(leaf.frame);
        page.slot().tag() == FrameTag::Anon && page.mappings() == 1 && page.references() == 1
    }

    /// Does what an advice says to the pages of a range in which it was accepted. No lock is held.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`] for [`Advice::Remove`].
    #[inline(never)]
    pub(crate) fn advise_pages(&self, range: PageRange, advice: Advice) -> Result<(), Errno> {
        let mut at = Some(range.first());
        while let Some(from) = at {
            let state = self.read();
            let next = state.vmas.at_or_after(from);
            let Some(vma) = next.filter(|vma| vma.range.first() <= range.last()) else {
                break;
            };
            let Some(part) = vma.range.intersection(range) else {
                break;
            };
            // The file lives as long as the mapping, which may go as soon as the lock does.
            let uses_file = matches!(advice, Advice::WillNeed | Advice::Remove);
            let file = vma.file.filter(|_| uses_file);
            file.inspect(|&file| self.mm().get_object(file));
            drop(state);
            match advice {
                Advice::Cold => self.make_cold(part),
                Advice::PageOut => self.page_out(part),
                Advice::WillNeed => {
                    self.fetch(part, file, vma.object_page(part.first()));
                    file.inspect(|&file| self.mm().put_object(file));
                }
                Advice::Remove => {
                    let Some(file) = file else { return Ok(()) };
                    let mut outcome = Ok(());
                    // Another thread may have changed the mapping since it was looked at.
                    if Self::may_remove(&vma) && self.mm().info(file).is_shared_memory {
                        let first = vma.object_page(part.first());
                        outcome = self.mm().punch(file, first, part.count());
                    }
                    self.mm().put_object(file);
                    outcome?;
                }
                _ => return Ok(()),
            }
            at = part
                .last()
                .checked_add(1)
                .filter(|next| range.contains(*next));
        }
        Ok(())
    }

    /// Makes pages look as if nobody had used them.
    #[doc(alias = "madvise_cold")]
    #[inline(never)]
    fn make_cold(&self, range: PageRange) {
        let Ok(mut cursor) = self.tables().cursor(range) else {
            return;
        };
        while let Some(run) = cursor.next_run() {
            for at in leaves_of(&run, range) {
                let (Entry::Leaf(leaf), false) = cursor.look(at) else {
                    continue;
                };
                // The range may have become a device's since the advice was accepted.
                if let Some(page) = self.mm().counted(leaf.frame)
                    && page.mappings() == 1
                {
                    page.set_age(0);
                    cursor.clear_accessed(at);
                    self.core().entry.note_aged();
                }
            }
        }
        drop(cursor);
        self.mm().flush_aged();
    }

    /// Reclaims the pages of a range that no other table maps.
    #[doc(alias = "madvise_pageout")]
    #[inline(never)]
    fn page_out(&self, range: PageRange) {
        let mut next = Some(range.first());
        while let Some(pages) = next.and_then(|from| self.next_leaves(from, range)) {
            pages.iter().for_each(|page| self.page_out_one(page));
            next = pages.last().checked_add(1);
        }
    }

    fn page_out_one(&self, page: Page) {
        let Some(frame) = self.frame_at(page) else {
            return;
        };
        // One mapping in a table that a fork shares is several spaces'.
        let cursor = self.tables().cursor(PageRange::single(page));
        if cursor.is_ok_and(|mut cursor| cursor.look(page).1) {
            return;
        }
        self.mm().with_page(frame, |page| {
            if page.mappings() == 1 && self.mm().may_go(frame, page) {
                self.mm().evict(frame, page);
            }
        });
    }

    /// The first pages of a range, from one on, that have leaves.
    fn next_leaves(&self, from: Page, range: PageRange) -> Option<PageRange> {
        let rest = PageRange::new(from, range.last())?;
        let mut cursor = self.tables().cursor(rest).ok()?;
        while let Some(run) = cursor.next_run() {
            if let Run::Leaves { range, .. } = run {
                return range.intersection(rest);
            }
        }
        None
    }

    /// Starts reading what is missing.
    #[doc(alias = "madvise_willneed")]
    #[inline(never)]
    fn fetch(&self, range: PageRange, file: Option<FileRef>, index: u64) {
        let mm = self.mm();
        let mut next = Some(range.first());
        while let Some((page, payload)) = next.and_then(|from| self.next_payload(from, range)) {
            if let Some(Absent::Swapped(entry)) = Absent::of(payload) {
                match mm.swapped_page(entry, true) {
                    Ok(Swapped::Ready(frame)) => mm.put_reference(frame),
                    Err(Errno::ENOMEM) => return,
                    _ => {}
                }
            }
            next = page.checked_add(1);
        }
        let Some(file) = file else { return };
        if !mm.info(file).is_shared_memory {
            return mm.read_ahead(file, index, range.count().min(FETCH));
        }
        // What was written, in memory or in swap.
        let end = index.saturating_add(range.count());
        let mut next = mm.next_entry(file, index, end);
        while let Some(index) = next {
            match mm.object_page(file, index) {
                Ok(ObjectPage::Ready(frame)) => mm.put_reference(frame),
                Ok(ObjectPage::NeedIo(_)) => {}
                Ok(ObjectPage::Beyond) | Err(_) => return,
            }
            next = mm.next_entry(file, index + 1, end);
        }
    }
}

/// The pages of a run that have leaves, as far as they lie in a range.
fn leaves_of(run: &Run, range: PageRange) -> impl Iterator<Item = Page> + use<> {
    let pages = match run {
        Run::Leaves { range: pages, .. } => pages.intersection(range),
        _ => None,
    };
    pages.into_iter().flat_map(PageRange::iter)
}
