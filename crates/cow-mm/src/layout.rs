//! The layout of an address space: where things go when nobody says where.
//!
//! ```text
//!  64-bit, top-down                         32-bit, legacy (bottom-up)
//!  7fff_ffff_f000  task_size                c000_0000  task_size
//!     stack  v                                 stack v
//!     -- gap of the stack's limit --
//!     mmap_base  v  mappings                   mappings ^
//!                                           4000_0000  bottom_up_base = task_size / 3
//!     brk ^                                    brk ^
//!     image                                    image
//!        1_0000  floor                         1_0000  floor
//! ```
//!
//! Source: Linux `arch/x86/mm/mmap.c` (`mmap_base`, `arch_pick_mmap_layout`), `TASK_UNMAPPED_BASE` = task size / 3.

use kmem_hal::{PAGE_SIZE, Page, PageRange, VirtAddr};

use crate::mutants::mutant;

/// Bytes of unmapped space that a growing stack keeps below itself: 256 pages (`stack_guard_gap`).
#[doc(alias = "stack_guard_gap")]
pub const STACK_GUARD_PAGES: u64 = 256;

/// How many mappings a space may have (`sysctl vm.max_map_count`).
#[doc(alias = "DEFAULT_MAX_MAP_COUNT")]
pub const MAX_MAP_COUNT: usize = 65530;

/// The first address that may be mapped where nobody chose another one (`CONFIG_DEFAULT_MMAP_MIN_ADDR`).
const FLOOR: u64 = 0x1_0000;

/// Where an address space puts what it may place freely.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// One past the last user address.
    pub task_size: u64,
    /// The lowest page that may be mapped (`vm.mmap_min_addr`) and the highest that a search may use.
    pub search: PageRange,
    /// A top-down search starts below this address; `None`: bottom-up (the legacy layout).
    pub mmap_base: Option<u64>,
    /// A bottom-up search starts here (`TASK_UNMAPPED_BASE`).
    pub bottom_up_base: u64,
    /// The window of `MAP_32BIT`.
    pub low_window: PageRange,
    /// Where a new image's stack ends (exclusive).
    pub stack_top: u64,
    /// Bytes below the strings that exec maps for the stack at once; from there it grows.
    pub stack_room: u64,
    /// The stack's size limit in bytes (`RLIMIT_STACK`).
    pub stack_limit: u64,
    /// Whether searches for huge multiples align to 2 MiB (transparent huge pages are built in).
    pub huge_align: bool,
}

impl Layout {
    /// x86-64 with four levels, 8 MiB of stack, no randomisation.
    #[must_use]
    pub fn x86_64() -> Self {
        let task_size = 0x7fff_ffff_f000;
        Self {
            task_size,
            search: pages(FLOOR, task_size),
            mmap_base: Some(mmap_base(task_size, 8 << 20)),
            bottom_up_base: (task_size / 3).next_multiple_of(PAGE_SIZE),
            low_window: pages(0x4000_0000, 0x8000_0000),
            stack_top: task_size,
            stack_room: 128 << 10,
            stack_limit: 8 << 20,
            huge_align: true,
        }
    }

    /// Whether a page is one of the first, which nobody may map (`vm.mmap_min_addr`).
    #[doc(alias = "cap_mmap_addr")]
    pub(crate) fn is_too_low(&self, page: Page) -> bool {
        let low = page < self.search.first() && page.number() < FLOOR / PAGE_SIZE;
        low && !mutant!("first-pages-are-mapped")
    }

    /// 32-bit x86 with 3 GiB of user space and the legacy bottom-up layout of the classic course.
    #[must_use]
    pub fn x86_32_legacy() -> Self {
        let task_size = 0xc000_0000;
        Self {
            task_size,
            search: pages(FLOOR, task_size),
            mmap_base: None,
            bottom_up_base: task_size / 3,
            low_window: pages(0x4000_0000, 0x8000_0000),
            stack_top: task_size,
            stack_room: 0,
            stack_limit: 8 << 20,
            huge_align: false,
        }
    }

    /// A space in which only `[low, high)` may be chosen: what a recorder that occupied all else has seen.
    ///
    /// `None` unless both are page addresses and `low < high`.
    #[must_use]
    pub fn window(low: u64, high: u64) -> Option<Self> {
        let first = Page::starting_at(VirtAddr::new(low))?;
        let range = PageRange::new(
            first,
            Page::starting_at(VirtAddr::new(high))?.checked_sub(1)?,
        )?;
        Some(Self {
            search: range,
            mmap_base: Some(high),
            bottom_up_base: low,
            low_window: range,
            ..Self::x86_64()
        })
    }
}

/// Where top-down searches begin: below the room that the stack may take, without randomness.
///
/// The room is the stack's limit and its guard, at least 128 MiB and at most five sixths of the space.
#[must_use]
pub const fn mmap_base(task_size: u64, stack_limit: u64) -> u64 {
    let gap = stack_limit.saturating_add(STACK_GUARD_PAGES * PAGE_SIZE);
    let (least, most) = (128 << 20, task_size / 6 * 5);
    let gap = if gap < least {
        least
    } else if gap > most {
        most
    } else {
        gap
    };
    (task_size - gap).next_multiple_of(PAGE_SIZE)
}

fn pages(low: u64, high: u64) -> PageRange {
    let first = Page::containing(VirtAddr::new(low));
    let last = Page::containing(VirtAddr::new(high - 1));
    PageRange::new(first, last).unwrap_or(PageRange::single(first))
}
