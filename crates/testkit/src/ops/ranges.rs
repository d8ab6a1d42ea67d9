//! Operations on ordered ranges of pages.

use arbitrary::Arbitrary;
use kmem_hal::{Page, PageRange};
use proptest::prelude::*;

use super::{Disagreement, strategy};
use crate::twins::{RangeModel, TreeVmas};

/// One operation on ranges. Pages are `0 .. 4096` of a window that the implementation places where it likes.
#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeOp {
    /// Put a value on pages, over what was there.
    Insert {
        /// First page, modulo 4096.
        first: u16,
        /// Pages, modulo 64, at least 1.
        count: u8,
        /// The value: neighbours with equal values may merge.
        value: u8,
    },
    /// Remove pages.
    Remove {
        /// First page, modulo 4096.
        first: u16,
        /// Pages, at least 1.
        count: u16,
    },
    /// Look a page up.
    Find {
        /// The page, modulo 4096.
        page: u16,
    },
    /// The lowest gap of so many pages.
    GapUp {
        /// Pages, at least 1.
        count: u8,
    },
    /// The highest gap of so many pages.
    GapDown {
        /// Pages, at least 1.
        count: u8,
    },
}

strategy!(
    RangeOp,
    prop_oneof![
        5 => (0u16..4096, 1u8..64, 0u8..4)
            .prop_map(|(first, count, value)| Self::Insert { first, count, value }),
        3 => (0u16..4096, 1u16..200).prop_map(|(first, count)| Self::Remove { first, count }),
        3 => (0u16..4096).prop_map(|page| Self::Find { page }),
        1 => (1u8..=255).prop_map(|count| Self::GapUp { count }),
        1 => (1u8..=255).prop_map(|count| Self::GapDown { count }),
    ]
);

/// What the operations are run on: a wrapper of an implementation. Pages are those of the window.
pub trait RangesUnderTest {
    /// Puts `value` on `range`, over what was there; `false` where memory ran out and nothing changed.
    fn insert(&mut self, range: PageRange, value: u8) -> bool;
    /// Removes every page of `range`; `false` where memory ran out and nothing changed.
    fn remove(&mut self, range: PageRange) -> bool;
    /// The value of one page.
    fn get(&self, page: Page) -> Option<u8>;
    /// The lowest gap of `count` pages inside `within`.
    fn gap_up(&self, count: u64, within: PageRange) -> Option<PageRange>;
    /// The highest gap of `count` pages inside `within`.
    fn gap_down(&self, count: u64, within: PageRange) -> Option<PageRange>;
    /// Every range, ascending, neighbours of equal value merged or not.
    fn ranges(&self) -> Vec<(PageRange, u8)>;
}

impl<M: RangeModel<u8>> RangesUnderTest for M {
    fn insert(&mut self, range: PageRange, value: u8) -> bool {
        RangeModel::insert(self, range, value);
        true
    }
    fn remove(&mut self, range: PageRange) -> bool {
        RangeModel::remove(self, range);
        true
    }
    fn get(&self, page: Page) -> Option<u8> {
        RangeModel::get(self, page)
    }
    fn gap_up(&self, count: u64, within: PageRange) -> Option<PageRange> {
        RangeModel::gap_up(self, count, within)
    }
    fn gap_down(&self, count: u64, within: PageRange) -> Option<PageRange> {
        RangeModel::gap_down(self, count, within)
    }
    fn ranges(&self) -> Vec<(PageRange, u8)> {
        RangeModel::ranges(self)
    }
}

const WINDOW: u64 = 4096;

fn pages(first: u16, count: u64) -> PageRange {
    let first = u64::from(first) % WINDOW;
    let count = count.clamp(1, WINDOW - first);
    PageRange::with_count(Page::from_number(first), count).expect("inside the window")
}

fn merged(ranges: Vec<(PageRange, u8)>) -> Vec<(PageRange, u8)> {
    let mut tree = TreeVmas::new();
    for (range, value) in ranges {
        RangeModel::insert(&mut tree, range, value);
    }
    tree.merge()
}

/// Runs operations on an implementation and on the textbook's tree.
///
/// # Errors
///
/// The first [`Disagreement`].
pub fn run_ranges(
    under_test: &mut impl RangesUnderTest,
    ops: &[RangeOp],
) -> Result<(), Disagreement> {
    let mut model = TreeVmas::new();
    let window = pages(0, WINDOW);
    for (at, op) in ops.iter().enumerate() {
        let differ = |what: String| Err(Disagreement::new(at, op, what));
        match *op {
            RangeOp::Insert {
                first,
                count,
                value,
            } => {
                let range = pages(first, u64::from(count % 64));
                if under_test.insert(range, value) {
                    RangeModel::insert(&mut model, range, value);
                }
            }
            RangeOp::Remove { first, count } => {
                let range = pages(first, u64::from(count));
                if under_test.remove(range) {
                    RangeModel::remove(&mut model, range);
                }
            }
            RangeOp::Find { page } => {
                let page = Page::from_number(u64::from(page) % WINDOW);
                let (found, expected) = (under_test.get(page), RangeModel::get(&model, page));
                if found != expected {
                    return differ(format!("page {page} is {found:?}, not {expected:?}"));
                }
            }
            RangeOp::GapUp { count } => {
                let count = u64::from(count.max(1));
                let found = under_test.gap_up(count, window);
                let expected = RangeModel::gap_up(&model, count, window);
                if found != expected {
                    return differ(format!("lowest gap {found:?}, not {expected:?}"));
                }
            }
            RangeOp::GapDown { count } => {
                let count = u64::from(count.max(1));
                let found = under_test.gap_down(count, window);
                let expected = RangeModel::gap_down(&model, count, window);
                if found != expected {
                    return differ(format!("highest gap {found:?}, not {expected:?}"));
                }
            }
        }
        if at % 16 == 15 || at + 1 == ops.len() {
            let (found, expected) = (merged(under_test.ranges()), model.merge());
            if found != expected {
                return differ(format!("the ranges are {found:?}, not {expected:?}"));
            }
        }
    }
    Ok(())
}
