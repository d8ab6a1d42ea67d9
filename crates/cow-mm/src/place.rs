//! Where a mapping goes when the caller leaves it to the kernel: Linux's `get_unmapped_area`.
//!
//! ```text
//!  hint free? ── yes ──> the hint
//!    no
//!  MAP_32BIT ──> lowest gap in the low window
//!  top-down  ──> highest gap below mmap_base, else lowest gap from bottom_up_base
//!  bottom-up ──> lowest gap from bottom_up_base
//! ```
//!
//! Memory without a file whose length is a multiple of 2 MiB is first sought at a 2 MiB boundary, so that huge pages can
//! back it. Gaps keep the guard of the stack above them.
//!
//! Source: Linux `mm/mmap.c` (`arch_get_unmapped_area_topdown`), `mm/huge_memory.c` (`__thp_get_unmapped_area`); observed
//! on 6.18 for 5,679 addresses.

use kmem_hal::{PAGE_SIZE, Page, PageRange, VirtAddr};
use kmem_vma_tree::GapRequest;

use crate::env::Env;
use crate::layout::Layout;
use crate::space::State;

/// Pages in 2 MiB.
const HUGE: u64 = 512;

/// Hints below this are raised to it (`vm.mmap_min_addr`).
const MIN_ADDRESS: u64 = 0x1_0000;

/// What is to be placed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Placement {
    /// Where the caller would like it; 0 for no wish.
    pub hint: u64,
    /// Pages.
    pub pages: u64,
    /// Only in the low window (`MAP_32BIT`).
    pub low: bool,
    /// Private memory without a file: huge multiples are aligned.
    pub huge_align: bool,
    /// Pages to keep free below the new mapping (it is a growing stack).
    pub guard_below: u64,
}

impl<E: Env> State<'_, E> {
    /// A free range for the mapping; `None` where there is no room.
    #[doc(alias = "get_unmapped_area")]
    pub(crate) fn place(&self, layout: &Layout, placement: &Placement) -> Option<PageRange> {
        if let Some(range) =
            hinted(layout, placement).filter(|range| self.hint_is_free(*range, placement))
        {
            return Some(range);
        }
        // A hint within the first page is none (`round_hint_to_min`).
        let huge = placement.huge_align && layout.huge_align && placement.hint < PAGE_SIZE;
        if huge && placement.pages.is_multiple_of(HUGE) {
            // A gap of 2 MiB more always holds an aligned place; the place is the highest (lowest) in the searched run.
            let padded = placement.pages + HUGE;
            if let Some(found) = self.search(layout, placement, padded) {
                let up = found.first().number().wrapping_neg() % HUGE;
                // Linux asks the space's direction here, not the search's: MAP_32BIT searches upwards all the same.
                let up = if up == 0 && layout.mmap_base.is_some() {
                    HUGE
                } else {
                    up
                };
                return PageRange::with_count(found.first().checked_add(up)?, placement.pages);
            }
        }
        self.search(layout, placement, placement.pages)
    }

    fn hint_is_free(&self, range: PageRange, placement: &Placement) -> bool {
        let next = self.vmas.at_or_after(range.first());
        let fits_next = next.is_none_or(|vma| {
            vma.range.first().number().saturating_sub(vma.guard_below()) > range.last().number()
        });
        let guarded = range.first().checked_sub(placement.guard_below);
        let fits_previous = placement.guard_below == 0
            || guarded.is_some_and(|low| {
                self.vmas
                    .before(range.first())
                    .is_none_or(|vma| vma.range.last() < low)
            });
        fits_next && fits_previous
    }

    fn search(&self, layout: &Layout, placement: &Placement, pages: u64) -> Option<PageRange> {
        let find = |limits: PageRange, top_down: bool| {
            let request = GapRequest::new(pages).limits(limits);
            self.vmas
                .find_gap(&request, top_down, placement.guard_below)
        };
        if placement.low {
            return find(layout.low_window, false);
        }
        let bottom_up = || {
            let first =
                Page::containing(VirtAddr::new(layout.bottom_up_base)).max(layout.search.first());
            find(PageRange::new(first, layout.search.last())?, false)
        };
        match layout.mmap_base {
            Some(base) => {
                let last = Page::containing(VirtAddr::new(base)).checked_sub(1)?;
                let below = PageRange::new(layout.search.first(), last.min(layout.search.last()))?;
                find(below, true).or_else(bottom_up)
            }
            None => bottom_up(),
        }
    }
}

/// The hint as a range, if it can be one.
fn hinted(layout: &Layout, placement: &Placement) -> Option<PageRange> {
    let address = placement.hint & !(PAGE_SIZE - 1);
    if address == 0 {
        return None;
    }
    let first = Page::containing(VirtAddr::new(address.max(MIN_ADDRESS)));
    let range = PageRange::with_count(first, placement.pages)?;
    let highest = if placement.low {
        layout.low_window.last()
    } else {
        layout.search.last()
    };
    (range.first() >= layout.search.first() && range.last() <= highest).then_some(range)
}
