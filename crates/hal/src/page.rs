//! Linear pages by number, and ranges of them with an inclusive last page.
//!
//! Invariants
//! - `I1`: a `Page` is `address >> 12` of a 64-bit linear address: `0 ..= 2^52 - 1`.
//! - `I2`: a [`PageRange`] is never empty and its last page is inclusive, so that the range
//!   that ends with the last page of the space needs no number outside the space.

use core::fmt;

use crate::addr::{PAGE_SHIFT, PAGE_SIZE, VirtAddr};

/// The number of a 4 KiB linear page.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Page(u64);

impl Page {
    /// Pages in a 64-bit linear space.
    pub const LIMIT: u64 = 1 << (64 - PAGE_SHIFT);
    /// The last page of the space.
    pub const MAX: Self = Self(Self::LIMIT - 1);
    /// Page 0.
    pub const ZERO: Self = Self(0);

    /// The page with this number; `None` at 2^52 and above.
    #[must_use]
    pub const fn new(number: u64) -> Option<Self> {
        if number < Self::LIMIT {
            Some(Self(number))
        } else {
            None
        }
    }

    /// The page with this number modulo 2^52.
    #[must_use]
    pub const fn from_number(number: u64) -> Self {
        Self(number & (Self::LIMIT - 1))
    }

    /// The page that contains `address`.
    #[must_use]
    pub const fn containing(address: VirtAddr) -> Self {
        Self(address.as_u64() >> PAGE_SHIFT)
    }

    /// The page that starts at `address`; `None` if it is not a multiple of 4096.
    #[must_use]
    pub const fn starting_at(address: VirtAddr) -> Option<Self> {
        if address.is_aligned(PAGE_SIZE) {
            Some(Self::containing(address))
        } else {
            None
        }
    }

    /// The page's number.
    #[must_use]
    pub const fn number(self) -> u64 {
        self.0
    }

    /// The address of the page's first byte.
    #[must_use]
    pub const fn start(self) -> VirtAddr {
        VirtAddr::new(self.0 << PAGE_SHIFT)
    }

    /// The page `pages` higher; `None` above the last one.
    #[must_use]
    pub const fn checked_add(self, pages: u64) -> Option<Self> {
        match self.0.checked_add(pages) {
            Some(number) => Self::new(number),
            None => None,
        }
    }

    /// The page `pages` lower; `None` below 0.
    #[must_use]
    pub const fn checked_sub(self, pages: u64) -> Option<Self> {
        match self.0.checked_sub(pages) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }
}

impl fmt::Debug for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Page({:#x})", self.0)
    }
}

impl fmt::Display for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A run of pages from `first` through `last`, both included; never empty (`I2`).
///
/// # Examples
///
/// ```
/// use kmem_hal::{Page, PageRange, VirtAddr};
///
/// let range = PageRange::from_bytes(VirtAddr::new(0x1000), 0x3000).unwrap();
/// assert_eq!(range.count(), 3);
/// assert_eq!(range.last(), Page::new(3).unwrap());
/// // The last page of the space is an ordinary page.
/// assert!(PageRange::from_bytes(VirtAddr::new(0xffff_ffff_ffff_f000), 0x1000).is_some());
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRange {
    first: Page,
    last: Page,
}

impl PageRange {
    /// Every page of the space.
    pub const ALL: Self = Self {
        first: Page::ZERO,
        last: Page::MAX,
    };

    /// The pages `first ..= last`; `None` if `last < first`.
    #[must_use]
    pub const fn new(first: Page, last: Page) -> Option<Self> {
        if first.0 <= last.0 {
            Some(Self { first, last })
        } else {
            None
        }
    }

    /// The pages numbered `first ..= last`, for whoever keeps ranges in a form of its own and must not pay for the check.
    ///
    /// # Safety
    ///
    /// `first <= last` and `last < Page::LIMIT` (`I1`, `I2`).
    #[must_use]
    #[inline(always)]
    pub const unsafe fn from_numbers_unchecked(first: u64, last: u64) -> Self {
        debug_assert!(first <= last && last < Page::LIMIT);
        Self {
            first: Page(first),
            last: Page(last),
        }
    }

    /// One page.
    #[must_use]
    pub const fn single(page: Page) -> Self {
        Self {
            first: page,
            last: page,
        }
    }

    /// `count` pages from `first`; `None` if `count` is 0 or the end is passed.
    #[must_use]
    pub const fn with_count(first: Page, count: u64) -> Option<Self> {
        match count {
            0 => None,
            n => match first.checked_add(n - 1) {
                Some(last) => Some(Self { first, last }),
                None => None,
            },
        }
    }

    /// The pages of `length` bytes at `start`, length rounded up to whole pages.
    ///
    /// `None` if `start` is not a multiple of 4096, `length` is 0, or the end is passed.
    #[must_use]
    pub const fn from_bytes(start: VirtAddr, length: u64) -> Option<Self> {
        match Page::starting_at(start) {
            Some(first) => Self::with_count(first, length.div_ceil(PAGE_SIZE)),
            None => None,
        }
    }

    /// The first page.
    #[must_use]
    pub const fn first(self) -> Page {
        self.first
    }

    /// The last page, inclusive.
    #[must_use]
    pub const fn last(self) -> Page {
        self.last
    }

    /// The address of the first byte.
    #[must_use]
    pub const fn start(self) -> VirtAddr {
        self.first.start()
    }

    /// The number of pages, 1 ..= 2^52.
    #[must_use]
    pub const fn count(self) -> u64 {
        self.last.0 - self.first.0 + 1
    }

    /// Whether `page` is in the range.
    #[must_use]
    pub const fn contains(self, page: Page) -> bool {
        self.first.0 <= page.0 && page.0 <= self.last.0
    }

    /// Whether every page of `other` is in the range.
    #[must_use]
    pub const fn contains_range(self, other: Self) -> bool {
        self.first.0 <= other.first.0 && other.last.0 <= self.last.0
    }

    /// Whether the ranges share a page.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.first.0 <= other.last.0 && other.first.0 <= self.last.0
    }

    /// The pages in both ranges.
    #[must_use]
    pub const fn intersection(self, other: Self) -> Option<Self> {
        let first = if self.first.0 > other.first.0 {
            self.first
        } else {
            other.first
        };
        let last = if self.last.0 < other.last.0 {
            self.last
        } else {
            other.last
        };
        Self::new(first, last)
    }

    /// The smallest range that contains both.
    #[must_use]
    pub const fn hull(self, other: Self) -> Self {
        Self {
            first: if self.first.0 < other.first.0 {
                self.first
            } else {
                other.first
            },
            last: if self.last.0 > other.last.0 {
                self.last
            } else {
                other.last
            },
        }
    }

    /// The pages one by one, ascending.
    pub fn iter(self) -> impl DoubleEndedIterator<Item = Page> + Clone {
        (self.first.0..=self.last.0).map(Page)
    }
}

impl fmt::Debug for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageRange({:#x}..={:#x})", self.first.0, self.last.0)
    }
}
