//! How a range is packed into a word: its distance from a base above the bits of its length.

use super::Raw;

/// How many bits of a key may hold the length. The first that fits is taken.
const WIDTHS: [u32; 8] = [28, 32, 24, 20, 16, 12, 40, 52];

/// The base and the width of a leaf's keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Coding {
    pub(super) base: u64,
    pub(super) width: u32,
}

impl Coding {
    /// A coding for `ranges` (ascending, not empty) in a leaf whose pages begin at `low`; `None` if none fits all.
    pub(crate) fn choose(low: u64, ranges: &[Raw]) -> Option<Self> {
        let mut longest = 0;
        for raw in ranges {
            longest = longest.max(raw.last - raw.first);
        }
        let (first, top) = (ranges.first()?.first, ranges.last()?.first);
        // From the lowest page of the leaf if that fits, so that a later range below the present ones does too.
        for base in [low.min(first), first] {
            for width in WIDTHS {
                let coding = Self { base, width };
                if coding.fits_length(longest) && top - base <= coding.reach() {
                    return Some(coding);
                }
            }
        }
        None
    }

    /// The largest distance from the base; one less than the bits allow, so that no key is all ones.
    #[inline(always)]
    pub(super) fn reach(self) -> u64 {
        (u64::MAX >> self.width) - 1
    }

    #[inline(always)]
    pub(super) fn length_mask(self) -> u64 {
        (1 << self.width) - 1
    }

    #[inline(always)]
    pub(super) fn fits_length(self, pages_less_one: u64) -> bool {
        pages_less_one <= self.length_mask()
    }

    #[inline(always)]
    pub(super) fn key(self, first: u64, last: u64) -> u64 {
        (first - self.base) << self.width | (last - first)
    }

    /// First and last page of a key.
    #[inline(always)]
    pub(super) fn range(self, key: u64) -> (u64, u64) {
        let first = self.base + (key >> self.width);
        (first, first + (key & self.length_mask()))
    }

    /// What the keys of two ranges with a gap of at least `need` pages between them differ by, less one at least: so most pairs are
    /// passed over with a subtraction, undecoded.
    ///
    /// The first pages then differ by more than `need` and the length of the lower range, and a difference of lengths takes less than that
    /// length away. Beyond the reach it is any number: no two ranges are so far apart, as whoever decodes them finds.
    #[inline(always)]
    pub(super) fn step_over(self, need: u64) -> u64 {
        need << self.width
    }

    /// The gap between the ranges of two keys if it has at least `need` pages: the first free page, and the page after the last.
    #[inline(always)]
    pub(super) fn gap(self, below: u64, above: u64, need: u64) -> Option<(u64, u64)> {
        let (free, end) = (self.range(below).1 + 1, self.range(above).0);
        (end - free >= need).then_some((free, end))
    }

    /// The largest key of a range that begins at or below `page`, all its bits turned; `None` below the base.
    #[inline(always)]
    pub(super) fn turned_probe(self, page: u64) -> Option<u64> {
        let distance = page.checked_sub(self.base)?;
        // Beyond the reach the probe is above every key, and below all ones.
        Some(!distance.min(self.reach()) << self.width)
    }
}
