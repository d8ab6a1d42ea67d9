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
//! back it. Gaps keep the guard of the stack above them; a new mapping that will grow down keeps none of its own.
//!
//! Source: Linux `mm/mmap.c` (`arch_get_unmapped_area_topdown`), `mm/huge_memory.c` (`__thp_get_unmapped_area`); observed
//! on 6.18 for 5,679 addresses.

use kmem_hal::{PAGE_SIZE, Page, PageRange, VirtAddr};

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
}

impl<E: Env> State<'_, E> {
    /// A free range for the mapping; `None` where there is no room.
    #[doc(alias = "get_unmapped_area")]
    pub(crate) fn place(&self, layout: &Layout, placement: &Placement) -> Option<PageRange> {
        if let Some(range) = hinted(layout, placement).filter(|range| self.hint_is_free(*range)) {
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

    fn hint_is_free(&self, range: PageRange) -> bool {
        let next = self.vmas.at_or_after(range.first());
        next.is_none_or(|vma| {
            vma.range.first().number().saturating_sub(vma.guard_below()) > range.last().number()
        })
    }

    fn search(&self, layout: &Layout, placement: &Placement, pages: u64) -> Option<PageRange> {
        let find = |limits: PageRange, top_down: bool| match top_down {
            true => self.vmas.find_gap_down(pages, limits),
            false => self.vmas.find_gap_up(pages, limits),
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
