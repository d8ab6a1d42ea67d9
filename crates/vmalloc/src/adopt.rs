//! Taking over the tables that a boot loader left: every leaf of theirs, in tables of the kernel's own.
//!
//! ```text
//!   loader's root ── .. ── leaf ── leaf ──┐ read, leaf by leaf        loader's tables: free after the switch
//!   kernel's root ── .. ── leaf ── leaf <─┘ the same frame, rights, memory type and size
//! ```
//!
//! A boot loader's tables lie in memory that the kernel wants back, have no slots and no locks, and may share tables where
//! the kernel must not. So they are not kept: the kernel's own table gets the same leaves, and the code that switches to it
//! notices nothing. Nobody owns what these leaves lead to.

use kmem_hal::{DeviceFrame, Frame, Page, PageRange};
use kmem_paging::format::{Format, Kind, Word};
use kmem_paging::{Attributes, Env, MapError, PageTable, Rights, Soft};

use crate::page::KernelPage;

/// Maps in `table` what the live tables at `root` map in `pages`; gives the leaves and the pages that they cover.
///
/// Leaves keep frame, memory type, size, accessed and dirty bits; software bits are dropped. Their rights are those that they had:
/// what an entry above a leaf denied is denied by the leaf now, since upper entries of the kernel's tables deny nothing. Leaves for which `wanted`
/// answers `false` are passed over: an identity map of the boot loader's, say.
///
/// # Errors
///
/// [`MapError`]; what was mapped before stays, so that the caller may give the table up. [`MapError::Misaligned`] and
/// [`MapError::OutOfRange`] where a large leaf reaches over an end of `pages`.
///
/// # Safety
///
/// At `root` are tables of the format, with as many levels as `table` has, that the processor walks or could walk. They lie
/// in reach of the environment's map, and nobody but the processor changes them during the call.
pub unsafe fn adopt<F: Format, E: Env>(
    table: &PageTable<F, E, KernelPage>,
    root: Frame,
    pages: PageRange,
    mut wanted: impl FnMut(Page, Frame, &Attributes) -> bool,
) -> Result<(u64, u64), MapError> {
    let mut cursor = table.cursor(pages).map_err(|_| MapError::OutOfRange)?;
    let mut adopted = (0, 0);
    let mut next = Some(pages.first());
    while let Some(page) = next.filter(|page| *page <= pages.last()) {
        // SAFETY: the caller's promise is passed on.
        let (number, word, rights) = unsafe { find(table, root, table.levels(), page) };
        let level = F::LEVELS[number - 1];
        let first = Page::from_number(page.number() & !(level.order().frames() - 1));
        if F::kind(number, word) == Kind::Leaf {
            let attributes = F::attributes(number, word).soft(Soft::NONE).rights(rights);
            let frame = F::leaf_frame(number, word);
            if wanted(first, frame, &attributes) {
                let block = DeviceFrame::new(frame, level.order()).ok_or(MapError::Misaligned)?;
                cursor
                    .map(first, KernelPage::borrowed(block), attributes)
                    .map_err(|(error, _)| error)?;
                adopted.0 += 1;
                adopted.1 += level.order().frames();
            }
        }
        next = first.checked_add(level.order().frames());
    }
    Ok(adopted)
}

/// The lowest entry for `page` in the tables below `frame`, a table of level `number`: its level, and what all levels together grant.
///
/// # Safety
///
/// As [`adopt`].
unsafe fn find<F: Format, E: Env>(
    table: &PageTable<F, E, KernelPage>,
    frame: Frame,
    number: usize,
    page: Page,
) -> (usize, u64, Rights) {
    let level = F::LEVELS[number - 1];
    let index = (page.number() >> level.shift) as usize & (level.entries() - 1);
    // SAFETY: the caller's promise: a table lies there, in reach, and only the processor writes it.
    let word = F::Word::load(unsafe { &F::Word::words(table.env().map(), frame)[index] });
    match F::kind(number, word) {
        Kind::Table if number > 1 => {
            // SAFETY: as above.
            let (lowest, leaf, rights) =
                unsafe { find(table, F::table_frame(word), number - 1, page) };
            (lowest, leaf, F::rights_below(number, word, rights))
        }
        Kind::Leaf => (number, word, F::attributes(number, word).rights),
        _ => (number, word, Rights::empty()),
    }
}
