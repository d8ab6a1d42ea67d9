//! What a gap search looks for, and where it fits.

use kmem_hal::{Page, PageRange};

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
    pub(super) limits: PageRange,
    pub(super) pages: u64,
    pub(super) alignment: u64,
    pub(super) offset: u64,
    pub(super) at_least: u64,
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

    /// How far up it is from one remainder to the other.
    #[inline(always)]
    fn distance(&self, from: u64, to: u64) -> u64 {
        if from <= to {
            to - from
        } else {
            // No sum: it could be beyond what a word holds.
            self.alignment - (from - to)
        }
    }

    /// The lowest place for the request in the free range `usable`.
    #[must_use]
    #[inline]
    pub fn place_low(&self, usable: PageRange) -> Option<PageRange> {
        let first = usable.first().number();
        if self.alignment == 1 {
            let place = PageRange::with_count(usable.first(), self.pages)?;
            return (place.last() <= usable.last()).then_some(place);
        }
        let up = self.distance(first % self.alignment, self.offset);
        let place = PageRange::with_count(Page::new(first.checked_add(up)?)?, self.pages)?;
        (place.last() <= usable.last()).then_some(place)
    }

    /// The highest place for the request in the free range `usable`.
    #[must_use]
    #[inline]
    pub fn place_high(&self, usable: PageRange) -> Option<PageRange> {
        let highest = usable.last().number().checked_sub(self.pages - 1)?;
        if self.alignment == 1 {
            let first = Page::new(highest)?;
            return (first >= usable.first()).then_some(PageRange::with_count(first, self.pages)?);
        }
        let down = self.distance(self.offset, highest % self.alignment);
        let first = Page::new(highest.checked_sub(down)?)?;
        (first >= usable.first()).then_some(PageRange::with_count(first, self.pages)?)
    }
}
