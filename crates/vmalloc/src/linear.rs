//! The linear map: all low memory at one offset, on the largest leaves that fit.
//!
//! ```text
//!   frames    | 4K 4K .. | 2M | 2M | ...... 1G ...... | 2M | 4K |
//!   pages     the same, from the layout's `linear` on
//! ```
//!
//! Nobody owns what the linear map's leaves lead to: it is a window to memory whose owners come and go.
//!
//! Source: Linux `arch/x86/mm/init.c` (`kernel_physical_mapping_init`, `split_mem_range`).

use kmem_hal::{DeviceFrame, Frame, FrameRange, Order, PageRange};
use kmem_paging::format::Format;
use kmem_paging::{Attributes, Env, MapError, PageTable, Rights};

use crate::layout::KernelLayout;
use crate::page::KernelPage;

/// What [`map_linear`] put into the table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinearMapped {
    /// Leaves by the format's level, the smallest first.
    pub leaves: [u64; 3],
    /// The pages that they cover.
    pub pages: u64,
}

/// Maps what the layout's linear map may hold of `frames`: writable, not executable, global, on the largest leaves.
///
/// High memory is left out. `largest` bounds the leaves: 1 GiB leaves need a processor that has them.
///
/// # Errors
///
/// [`MapError`]; what was mapped before stays, so that the caller may give the table up.
///
/// # Examples
///
/// See the tests of this crate: `tests/classic.rs` maps 896 MiB with 4 MiB leaves.
#[doc(alias = "init_memory_mapping")]
pub fn map_linear<F: Format, E: Env>(
    table: &PageTable<F, E, KernelPage>,
    layout: &KernelLayout,
    frames: FrameRange,
    largest: Order,
) -> Result<LinearMapped, MapError> {
    let mut mapped = LinearMapped::default();
    let Some(pages) = layout.linear_pages(frames) else {
        return Ok(mapped);
    };
    let base = frames.first().number();
    let attributes = Attributes::new(Rights::KERNEL_DATA.union(Rights::GLOBAL))
        .accessed()
        .dirty();
    let levels = table.levels().min(mapped.leaves.len());
    // In pieces that begin and end at the largest leaf's boundaries, so that no table is reserved that large leaves spare.
    let piece = 1 << 18;
    let mut first = pages.first();
    loop {
        let end = (first.number() | (piece - 1)).min(pages.last().number());
        let range = PageRange::new(first, kmem_hal::Page::from_number(end)).unwrap_or(pages);
        let smallest = smallest_leaf::<F>(range, base, pages, levels, largest);
        let mut cursor = table.cursor(range).map_err(|_| MapError::OutOfRange)?;
        cursor
            .map_range(range, smallest, attributes, |page, left| {
                let frame = Frame::new(base + (page.number() - pages.first().number()))?;
                let (level, order) = largest_leaf::<F>(frame, page, left, levels, largest);
                mapped.leaves[level] += 1;
                mapped.pages += order.frames();
                DeviceFrame::new(frame, order).map(KernelPage::borrowed)
            })
            .map_err(|stopped| stopped.error)?;
        match kmem_hal::Page::new(end + 1).filter(|next| *next <= pages.last()) {
            Some(next) => first = next,
            None => return Ok(mapped),
        }
    }
}

/// The level (from 0) and order of the largest leaf that may begin here.
fn largest_leaf<F: Format>(
    frame: Frame,
    page: kmem_hal::Page,
    left: u64,
    levels: usize,
    largest: Order,
) -> (usize, Order) {
    (1..levels)
        .rev()
        .map(|level| (level, F::LEVELS[level]))
        .filter(|(_, level)| level.leaf && level.order() <= largest)
        .map(|(number, level)| (number, level.order()))
        .find(|(_, order)| {
            left >= order.frames()
                && frame.is_aligned(*order)
                && page.number().is_multiple_of(order.frames())
        })
        .unwrap_or((0, Order::ZERO))
}

/// The smallest leaf that mapping the range will need: what its ends are aligned to.
fn smallest_leaf<F: Format>(
    range: PageRange,
    base: u64,
    pages: PageRange,
    levels: usize,
    largest: Order,
) -> Order {
    let frame = base + (range.first().number() - pages.first().number());
    let ends = range.first().number() | frame | range.count();
    (1..levels)
        .rev()
        .map(|level| F::LEVELS[level])
        .filter(|level| level.leaf && level.order() <= largest)
        .map(|level| level.order())
        .find(|order| ends.is_multiple_of(order.frames()))
        .unwrap_or(Order::ZERO)
}
