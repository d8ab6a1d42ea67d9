//! Operations on a page table.

use arbitrary::Arbitrary;
use kmem_hal::{Frame, Page, PageRange};
use proptest::prelude::*;

use super::{Disagreement, strategy};
use crate::twins::FlatMap;

/// One operation on a page table. Pages and frames are numbers in windows that the implementation places where it likes.
#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageOp {
    /// Map pages to consecutive frames.
    Map {
        /// First page, modulo the window.
        first: u16,
        /// Pages, modulo 600, at least 1: more than a table now and then.
        count: u16,
        /// First frame.
        frame: u16,
        /// Whether writes are allowed.
        writable: bool,
    },
    /// Unmap pages, mapped or not.
    Unmap {
        /// First page, modulo the window.
        first: u16,
        /// Pages, modulo 1200, at least 1.
        count: u16,
    },
    /// Change the rights of pages, mapped or not.
    Protect {
        /// First page, modulo the window.
        first: u16,
        /// Pages, modulo 1200, at least 1.
        count: u16,
        /// Whether writes are allowed.
        writable: bool,
    },
    /// Look a page up.
    Query {
        /// The page, modulo the window.
        page: u16,
    },
}

/// Pages of the window: four level-1 tables of x86-64.
const WINDOW: u64 = 2048;

strategy!(
    PageOp,
    prop_oneof![
        4 => (0u16..2048, prop_oneof![3 => 1u16..8, 1 => 1u16..600], any::<u16>(), any::<bool>())
            .prop_map(|(first, count, frame, writable)| Self::Map { first, count, frame, writable }),
        3 => (0u16..2048, prop_oneof![3 => 1u16..40, 1 => 1u16..1200])
            .prop_map(|(first, count)| Self::Unmap { first, count }),
        2 => (0u16..2048, 1u16..600, any::<bool>())
            .prop_map(|(first, count, writable)| Self::Protect { first, count, writable }),
        3 => (0u16..2048).prop_map(|page| Self::Query { page }),
    ]
);

/// What the operations are run on: a wrapper of a page table. Pages are those of the window.
pub trait PageTableUnderTest {
    /// Maps pages to frames from `first` on, all or none; `false` where one is mapped, or memory ran out.
    fn map(&mut self, pages: PageRange, first: Frame, writable: bool) -> bool;
    /// Unmaps what is mapped of the pages; the frames that were mapped, in the order of their pages.
    fn unmap(&mut self, pages: PageRange) -> Vec<Frame>;
    /// Changes the rights of what is mapped of the pages.
    fn protect(&mut self, pages: PageRange, writable: bool);
    /// Translates a page: its frame, and whether it may be written.
    fn query(&self, page: Page) -> Option<(Frame, bool)>;
    /// Flushes: whatever the table put off is done now.
    fn commit(&mut self) {}
}

fn pages(first: u16, count: u16, most: u16) -> PageRange {
    let first = u64::from(first) % WINDOW;
    let count = u64::from(count % most).clamp(1, WINDOW - first);
    PageRange::with_count(Page::from_number(first), count).expect("inside the window")
}

/// Runs operations on a page table and on the flat map, and compares every page of the window at the end.
///
/// `out_of_memory` says that the table may refuse a mapping though no page is mapped.
///
/// # Errors
///
/// The first [`Disagreement`].
pub fn run_pages(
    table: &mut impl PageTableUnderTest,
    ops: &[PageOp],
    out_of_memory: bool,
) -> Result<(), Disagreement> {
    let mut model = FlatMap::new();
    let expect = |model: &FlatMap<bool>, page: Page| {
        model.get(page).map(|entry| (entry.frame, entry.rights))
    };
    for (at, op) in ops.iter().enumerate() {
        let differ = |what: String| Err(Disagreement::new(at, op, what));
        match *op {
            PageOp::Map {
                first,
                count,
                frame,
                writable,
            } => {
                let pages = pages(first, count, 600);
                let frame = Frame::from_number(u64::from(frame));
                let free = model.mapped(pages).is_empty();
                let mapped = table.map(pages, frame, writable);
                if mapped && !free {
                    return differ("mapped over a page that is mapped".into());
                }
                if !mapped && free && !out_of_memory {
                    return differ("refused, though no page is mapped".into());
                }
                if mapped {
                    let _ = model.map(pages, frame, writable);
                }
            }
            PageOp::Unmap { first, count } => {
                let pages = pages(first, count, 1200);
                let found = table.unmap(pages);
                let expected: Vec<_> = model
                    .unmap(pages)
                    .into_iter()
                    .map(|(_, entry)| entry.frame)
                    .collect();
                if found != expected {
                    return differ(format!("gave back {found:?}, not {expected:?}"));
                }
            }
            PageOp::Protect {
                first,
                count,
                writable,
            } => {
                let pages = pages(first, count, 1200);
                table.protect(pages, writable);
                model.protect(pages, writable);
            }
            PageOp::Query { page } => {
                let page = Page::from_number(u64::from(page) % WINDOW);
                let (found, expected) = (table.query(page), expect(&model, page));
                if found != expected {
                    return differ(format!("page {page} is {found:?}, not {expected:?}"));
                }
            }
        }
        table.commit();
    }
    for page in pages(0, WINDOW as u16, u16::MAX).iter() {
        let (found, expected) = (table.query(page), expect(&model, page));
        if found != expected {
            let what = format!("page {page} is {found:?}, not {expected:?}");
            return Err(Disagreement::new(ops.len(), &"comparing every page", what));
        }
    }
    Ok(())
}
