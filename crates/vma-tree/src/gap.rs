//! Free ranges: what a search asks for, and what it answers.

use core::fmt;

use kmem_hal::{Page, PageRange};

use crate::value::Entry;

/// What a gap search looks for.
///
/// # Examples
///
/// ```
/// use kmem_vma_tree::GapRequest;
///
/// // 2 MiB at a multiple of 2 MiB, as Linux asks for huge pages: only gaps that surely fit are considered.
/// let huge = GapRequest::new(512).aligned(512, 0).at_least(512 + 511);
/// assert_eq!(huge.pages(), 512);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[doc(alias = "vm_unmapped_area_info")]
pub struct GapRequest {
    pub(crate) limits: PageRange,
    pub(crate) pages: u64,
    pub(crate) alignment: u64,
    pub(crate) offset: u64,
    pub(crate) at_least: u64,
}

impl GapRequest {
    /// Asks for `pages` pages (0 counts as 1) anywhere.
    #[must_use]
    pub const fn new(pages: u64) -> Self {
        let pages = if pages == 0 { 1 } else { pages };
        Self {
            limits: PageRange::ALL,
            pages,
            alignment: 1,
            offset: 0,
            at_least: pages,
        }
    }

    /// Keeps the answer inside `limits`.
    #[must_use]
    pub const fn limits(mut self, limits: PageRange) -> Self {
        self.limits = limits;
        self
    }

    /// Asks for a first page that is `offset` modulo `alignment` pages (0 counts as 1).
    #[must_use]
    #[doc(alias = "align_mask")]
    #[doc(alias = "align_offset")]
    pub const fn aligned(mut self, alignment: u64, offset: u64) -> Self {
        self.alignment = if alignment == 0 { 1 } else { alignment };
        self.offset = offset % self.alignment;
        self
    }

    /// Passes over gaps of fewer than `pages` pages (after clipping to the limits), though the request might fit.
    ///
    /// With at least `pages() + alignment - 1` every gap that is considered fits, so the search never looks at a
    /// second one: that is how Linux searches (`vm_unmapped_area`), and it is O(log N) in the worst case. Without it
    /// the search is an exact first fit, which steps over gaps that are large enough and lie badly.
    #[must_use]
    pub const fn at_least(mut self, pages: u64) -> Self {
        self.at_least = if pages > self.pages {
            pages
        } else {
            self.pages
        };
        self
    }

    /// The number of pages asked for.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// The lowest place for the request in the free range `usable`.
    #[must_use]
    pub fn place_low(&self, usable: PageRange) -> Option<PageRange> {
        let first = usable.first().number();
        let up = (self.offset + self.alignment - first % self.alignment) % self.alignment;
        let place = PageRange::with_count(Page::new(first.checked_add(up)?)?, self.pages)?;
        (place.last() <= usable.last()).then_some(place)
    }

    /// The highest place for the request in the free range `usable`.
    #[must_use]
    pub fn place_high(&self, usable: PageRange) -> Option<PageRange> {
        let highest = usable.last().number().checked_sub(self.pages - 1)?;
        let down = (highest % self.alignment + self.alignment - self.offset) % self.alignment;
        let first = Page::new(highest.checked_sub(down)?)?;
        (first >= usable.first()).then_some(PageRange::with_count(first, self.pages)?)
    }
}

/// A free range between two neighbours, as a search shows it to its predicate.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Gap<V> {
    /// The free pages, clipped to the request's limits.
    pub range: PageRange,
    /// The entry that ends right below the gap; `None` at the bottom of the space, or where the limits clip the gap.
    pub below: Option<Entry<V>>,
    /// The entry that begins right above the gap; `None` at the top of the space, or where the limits clip the gap.
    pub above: Option<Entry<V>>,
}

impl<V: fmt::Debug> fmt::Debug for Gap<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gap")
            .field("range", &self.range)
            .field("below", &self.below)
            .field("above", &self.above)
            .finish()
    }
}
