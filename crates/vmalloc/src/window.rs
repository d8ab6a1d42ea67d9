//! Pages whose tables exist for ever, so that an entry is one store.
//!
//! kmap in interrupts can take no table's lock and no memory. So the pages of its window are given a payload when it is
//! made: no table of the window is ever empty, none is freed, and the entry of each page can be found and written at any time.
//!
//! ```text
//!   root ── .. ── leaf table   | payload | payload | leaf | payload |      an entry is never 0
//! ```
//!
//! Invariant `W1`: while the value exists, the window is in use by its owner alone, each of its entries is a payload or a
//! leaf of one page, and so the tables that lead to it stay.

use core::marker::PhantomData;

use kmem_hal::{Frame, Page, PageRange, PhysMap};
use kmem_paging::format::{Format, Kind, Word};
use kmem_paging::{Divisible, Env, MapError, PageTable, Payload};

use crate::purge::unmap_all;

/// What an entry of a window holds while nothing is mapped there.
const VACANT: u64 = 1;

/// The same as the payload that it is; `None` where the format has none.
pub(crate) fn vacancy<F: Format>() -> Option<Payload> {
    Payload::new::<F>(VACANT)
}

/// A payload for an entry of a window that maps nothing.
pub(crate) fn vacant<F: Format>() -> u64 {
    const {
        assert!(
            F::PAYLOAD_BITS > 0,
            "a format without payloads has no vacant entries"
        );
    }
    match Payload::new::<F>(VACANT) {
        Some(payload) => F::payload(payload),
        None => unreachable!("one bit is there"),
    }
}

/// Pages with a payload or a leaf each.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window<F> {
    root: Frame,
    levels: usize,
    pages: PageRange,
    _format: PhantomData<F>,
}

impl<F: Format> Window<F> {
    /// Gives each page of `pages` its payload.
    ///
    /// # Errors
    ///
    /// [`MapError`]; nothing changed.
    pub fn new<E: Env, H: Divisible>(
        table: &PageTable<F, E, H>,
        pages: PageRange,
    ) -> Result<Self, MapError> {
        let payload = vacancy::<F>().ok_or(MapError::Unencodable)?;
        let mut cursor = table.cursor(pages).map_err(|_| MapError::OutOfRange)?;
        for page in pages.iter() {
            if let Err(error) = cursor.map_payload(page, payload) {
                drop(cursor);
                if let Some(done) = page
                    .checked_sub(1)
                    .and_then(|last| PageRange::new(pages.first(), last))
                {
                    Self::clear(table, done);
                }
                return Err(error);
            }
        }
        Ok(Self {
            root: table.root().frame,
            levels: table.levels(),
            pages,
            _format: PhantomData,
        })
    }

    /// The window that was made for these pages of the table with this root.
    pub fn from_raw(root: Frame, levels: usize, pages: PageRange) -> Self {
        Self {
            root,
            levels,
            pages,
            _format: PhantomData,
        }
    }

    /// Makes the pages empty again, flushed.
    pub fn clear<E: Env, H: Divisible>(table: &PageTable<F, E, H>, pages: PageRange) {
        let Ok(mut cursor) = table.cursor(pages) else {
            return;
        };
        let mut gather = table.gather::<16>();
        // What is mapped in a window belongs to others.
        unmap_all(&mut cursor, pages, &mut gather, &mut core::mem::forget);
        drop(cursor);
        gather.commit(core::mem::forget);
    }

    pub fn pages(&self) -> PageRange {
        self.pages
    }

    pub fn root(&self) -> Frame {
        self.root
    }

    /// The page with this index.
    pub fn page(&self, index: u64) -> Option<Page> {
        let page = self.pages.first().checked_add(index)?;
        self.pages.contains(page).then_some(page)
    }

    /// The index of a page.
    pub fn index(&self, page: Page) -> Option<u64> {
        self.pages
            .contains(page)
            .then(|| page.number() - self.pages.first().number())
    }

    /// Writes the entry of a page of the window.
    ///
    /// The word is a leaf's of one page, or [`vacant`]. Costs a walk and a plain store; any context.
    pub fn set<M: PhysMap>(&self, map: &M, page: Page, word: u64) {
        if !self.pages.contains(page) {
            return;
        }
        let mut frame = self.root;
        for number in (1..=self.levels).rev() {
            let level = F::LEVELS[number - 1];
            let index = (page.number() >> level.shift) as usize & (level.entries() - 1);
            // SAFETY: `W1`: the tables that lead to the page are attached and stay; everybody reaches them by atomics.
            let entry = unsafe { &F::Word::words(map, frame)[index] };
            if number == 1 {
                F::Word::store(entry, word);
                return;
            }
            let found = F::Word::load(entry);
            if F::kind(number, found) != Kind::Table {
                debug_assert!(false, "a table of a window is gone");
                return;
            }
            frame = F::table_frame(found);
        }
    }
}
