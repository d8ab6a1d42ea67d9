//! A space's page tables, to be looked at.
//!
//! The tables of `kmem-paging` are changed through shared references, so whoever is given them can unmap and replace what the space relies on.
//! Outside of this crate there is a view of them, which answers questions and gives no cursor.
//!
//! Its numbers are those that the tables remember; `tests/common/recount.rs` holds them against a walk through the frames.

use kmem_hal::{Page, PageRange};
use kmem_paging::{Entry, Path};

use crate::env::Env;
use crate::space::AddressSpace;

/// What a space's page tables say at the moment; see [`AddressSpace::page_tables`].
#[derive(Debug)]
pub struct PageTables<'s, 'm, E: Env>(&'s AddressSpace<'m, E>);

impl<'m, E: Env> AddressSpace<'m, E> {
    /// The page tables, to be looked at: none of it waits for a lock, and all of it may have changed by the time that it is read.
    #[must_use]
    pub fn page_tables(&self) -> PageTables<'_, 'm, E> {
        PageTables(self)
    }
}

impl<E: Env> PageTables<'_, '_, E> {
    /// What the entry of a page says.
    #[must_use]
    pub fn query(&self, page: Page) -> Entry {
        self.0.tables().query(page)
    }

    /// The way to a page's entry, table by table.
    #[must_use]
    pub fn path(&self, page: Page) -> Path {
        self.0.tables().path(page)
    }

    /// Frames that are tables of this space; those of the kernel's half are not.
    #[must_use]
    pub fn table_count(&self) -> usize {
        self.0.tables().table_count()
    }

    /// How many pins the leaf table of a page counts; 0 where there is none.
    ///
    /// Context: waits for whoever changes the table.
    #[must_use]
    pub fn pins(&self, page: Page) -> u32 {
        let cursor = self.0.tables().cursor(PageRange::single(page));
        cursor.map_or(0, |mut cursor| cursor.pins(page))
    }

    /// Frames that are set aside, so that unmapping a part of a table that spaces share needs no memory.
    #[must_use]
    pub fn spares(&self) -> usize {
        self.0.tables().spares()
    }
}
