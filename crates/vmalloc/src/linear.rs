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

use kmem_hal::{FrameRange, Order};
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
    let Some(frames) = FrameRange::new(frames.first(), pages.count()) else {
        return Ok(mapped);
    };
    let attributes = Attributes::new(Rights::KERNEL_DATA.union(Rights::GLOBAL))
        .accessed()
        .dirty();
    let mut cursor = table.cursor(pages).map_err(|_| MapError::OutOfRange)?;
    cursor
        .map_frames(pages.first(), frames, largest, attributes, |leaf| {
            let level = F::LEVELS
                .iter()
                .position(|level| level.order() == leaf.order());
            mapped.leaves[level.unwrap_or(0)] += 1;
            mapped.pages += leaf.order().frames();
            KernelPage::borrowed(leaf)
        })
        .map_err(|stopped| stopped.error)?;
    Ok(mapped)
}
