//! The page table as one flat array: what every tree of tables must be equal to.
//!
//! Huge leaves are an optimisation that translation must not show, so the flat map has none: a leaf of 512 pages is 512
//! entries. What an operation did to a page is read off one entry.

use std::collections::BTreeMap;

use kmem_hal::{Frame, Page, PageRange};

/// A page's translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlatEntry<P> {
    /// The frame that the page leads to.
    pub frame: Frame,
    /// The rights, as the table under test says them.
    pub rights: P,
}

/// A flat page table.
///
/// # Examples
///
/// ```
/// use kmem_hal::{Frame, Page, PageRange};
/// use kmem_testkit::twins::FlatMap;
///
/// let pages = PageRange::with_count(Page::from_number(0x400), 3).unwrap();
/// let mut map = FlatMap::new();
/// assert_eq!(map.map(pages, Frame::from_number(7), "rw"), Ok(()));
/// map.protect(pages, "r");
/// assert_eq!(map.get(Page::from_number(0x402)).unwrap().frame, Frame::from_number(9));
/// assert_eq!(map.unmap(pages).len(), 3);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlatMap<P> {
    entries: BTreeMap<u64, FlatEntry<P>>,
}

impl<P: Copy> FlatMap<P> {
    /// Nothing is mapped.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            entries: BTreeMap::new(),
        }
    }

    /// Maps pages to frames from `first` on, all or none.
    ///
    /// # Errors
    ///
    /// The first page that is mapped already; nothing has changed.
    pub fn map(&mut self, pages: PageRange, first: Frame, rights: P) -> Result<(), Page> {
        if let Some(page) = pages.iter().find(|page| self.get(*page).is_some()) {
            return Err(page);
        }
        for (index, page) in pages.iter().enumerate() {
            let frame = Frame::from_number(first.number() + index as u64);
            self.entries
                .insert(page.number(), FlatEntry { frame, rights });
        }
        Ok(())
    }

    /// Unmaps what is mapped of the pages; what that was, ascending.
    pub fn unmap(&mut self, pages: PageRange) -> Vec<(Page, FlatEntry<P>)> {
        let mapped = self.mapped(pages);
        for (page, _) in &mapped {
            self.entries.remove(&page.number());
        }
        mapped
    }

    /// Gives what is mapped of the pages other rights; how many pages.
    pub fn protect(&mut self, pages: PageRange, rights: P) -> usize {
        let range = pages.first().number()..=pages.last().number();
        let mut changed = 0;
        for (_, entry) in self.entries.range_mut(range) {
            entry.rights = rights;
            changed += 1;
        }
        changed
    }

    /// The translation of one page.
    #[must_use]
    pub fn get(&self, page: Page) -> Option<FlatEntry<P>> {
        self.entries.get(&page.number()).copied()
    }

    /// What is mapped of the pages, ascending.
    #[must_use]
    pub fn mapped(&self, pages: PageRange) -> Vec<(Page, FlatEntry<P>)> {
        self.entries
            .range(pages.first().number()..=pages.last().number())
            .map(|(&page, &entry)| (Page::from_number(page), entry))
            .collect()
    }

    /// Pages mapped.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}
