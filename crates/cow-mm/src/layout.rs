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
//! [`Layout::randomised`] moves each part by a random number of pages, so that nobody knows an address by heart:
//!
//! | part | 64-bit | 32-bit | in Linux |
//! |---|---|---|---|
//! | mappings (`mmap_base` down, `bottom_up_base` up) | 28 bits | 8 bits | `arch_mmap_rnd`, `CONFIG_ARCH_MMAP_RND_BITS`, `.._COMPAT_BITS` |
//! | position-independent images, up | 28 bits | 8 bits | the same, drawn again (`load_elf_binary`) |
//! | stack, down | 22 bits | 11 bits | `randomize_stack_top`, `__STACK_RND_MASK` |
//! | heap, behind the image | 1 GiB | 32 MiB | `arch_randomize_brk` |
//!
//! Source: Linux `arch/x86/mm/mmap.c` (`mmap_base`, `arch_pick_mmap_layout`, `stack_maxrandom_size`), `TASK_UNMAPPED_BASE` = task size / 3,
//! `arch/x86/include/asm/elf.h`.

use kmem_hal::{PAGE_SIZE, Page, PageRange, Rng, VirtAddr};

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
    /// Where position-independent images with an interpreter go: their first page, at most so much lower as their alignment asks for
    /// (`ELF_ET_DYN_BASE`).
    pub image_base: u64,
    /// Bytes between an image's end and the heap, whole pages.
    pub heap_gap: u64,
    /// The stack's size limit in bytes that a new space has (`RLIMIT_STACK`), and for which mappings leave room
    /// ([`with_stack_limit`](Self::with_stack_limit)).
    pub stack_limit: u64,
    /// Bytes that the stack may have been moved down by, for which mappings leave room too: 0 without randomness
    /// (`stack_maxrandom_size`).
    pub stack_random: u64,
    /// Bytes that `mmap_base` has been moved down by: 0 without randomness (`arch_mmap_rnd`).
    pub mmap_random: u64,
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
            image_base: image_base(task_size),
            heap_gap: 0,
            stack_limit: 8 << 20,
            stack_random: 0,
            mmap_random: 0,
            huge_align: true,
        }
    }

    /// The same with another limit on the stack, which mappings leave room for: what exec does with the limit of the process that calls it.
    /// A layout that is random stays so.
    #[must_use]
    pub fn with_stack_limit(mut self, bytes: u64) -> Self {
        self.stack_limit = bytes;
        self.place_mappings();
        self
    }

    /// Lets mappings begin below the room of the stack, wherever that ends, and as far below as chance said.
    fn place_mappings(&mut self) {
        if self.mmap_base.is_some() && !self.is_window() {
            let room = self.stack_limit.saturating_add(self.stack_random);
            let highest = mmap_base(self.task_size, room);
            self.mmap_base = Some(highest.saturating_sub(self.mmap_random));
        }
    }

    /// The same with every part elsewhere: one layout for each exec. How far a part moves at most the module says, and never by more than an
    /// eighth of the space; below the stack there is room for its limit wherever it is. Mappings stay in the window of a
    /// [`window`](Self::window).
    ///
    /// Of a layout that is random already this makes no better one: the numbers add up.
    ///
    /// # Examples
    ///
    /// ```
    /// use kmem_cow_mm::Layout;
    /// use kmem_hal::Rng;
    ///
    /// struct Hardware;
    /// impl Rng for Hardware {
    ///     fn next_u64(&self) -> u64 {
    ///         0x0123_4567_89ab_cdef // A kernel asks its generator.
    ///     }
    /// }
    ///
    /// let layout = Layout::x86_64().randomised(&Hardware);
    /// assert!(layout.stack_top < Layout::x86_64().stack_top);
    /// ```
    #[doc(alias = "ASLR")]
    #[doc(alias = "randomize_va_space")]
    #[must_use]
    pub fn randomised(mut self, rng: &(impl Rng + ?Sized)) -> Self {
        let (mappings, stack, heap) = match self.is_narrow() {
            true => (1 << 8, 1 << 11, (32 << 20) / PAGE_SIZE),
            false => (1 << 28, 1 << 22, (1 << 30) / PAGE_SIZE),
        };
        // A narrow format's whole space may be smaller than what a part moves by elsewhere.
        let most = (self.task_size / PAGE_SIZE / 8).max(1);
        let [mappings, stack, heap] = [mappings, stack, heap].map(|pages: u64| pages.min(most));
        let below = |pages: u64| rng.next_u64() % pages * PAGE_SIZE;
        let moved = below(mappings);
        if !self.is_window() {
            self.mmap_random += moved;
            self.bottom_up_base += moved;
        }
        // What the stack moves by at most: one page less than there are places.
        self.stack_random += (stack - 1) * PAGE_SIZE;
        self.place_mappings();
        self.image_base += below(mappings);
        self.stack_top = self.stack_top.saturating_sub(below(stack));
        // A page at least, so that a heap is no image's data.
        self.heap_gap += below(heap) + PAGE_SIZE;
        self
    }

    /// Whether a part of the space alone may be chosen from.
    fn is_window(&self) -> bool {
        self.search.last().number() + 1 < self.task_size / PAGE_SIZE
    }

    /// Whether addresses have 32 bits.
    pub(crate) fn is_narrow(&self) -> bool {
        is_narrow(self.task_size)
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
            image_base: image_base(task_size),
            heap_gap: 0,
            stack_limit: 8 << 20,
            stack_random: 0,
            mmap_random: 0,
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

/// Where position-independent images go without randomness: two thirds up, or at 4 MiB in a space of 32 bits (`ELF_ET_DYN_BASE`).
pub(crate) const fn image_base(task_size: u64) -> u64 {
    match is_narrow(task_size) {
        true => 0x40_0000,
        false => task_size / 3 * 2 / PAGE_SIZE * PAGE_SIZE,
    }
}

/// Whether addresses below this one have 32 bits.
const fn is_narrow(task_size: u64) -> bool {
    task_size <= 1 << 32
}

fn pages(low: u64, high: u64) -> PageRange {
    let first = Page::containing(VirtAddr::new(low));
    let last = Page::containing(VirtAddr::new(high - 1));
    PageRange::new(first, last).unwrap_or(PageRange::single(first))
}
