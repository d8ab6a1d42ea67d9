//! Reading and clearing what was written down about accesses: by the hardware in accessed and dirty bits, by the kernel in a software bit.
//!
//! No bit is lost: what is set before the clearing is seen now, and what is set after it next time, once the gather is committed.

use kmem_hal::PageRange;

use super::{Cursor, Divisible};
use crate::attributes::{Attributes, Leaf, Soft};
use crate::env::Env;
use crate::error::ChangeError;
use crate::format::Format;
use crate::gather::Gather;
use crate::quiescent::Liveness;

bitflags::bitflags! {
    /// Which bits [`Cursor::harvest`] clears.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Harvest: u8 {
        /// The accessed bit.
        const ACCESSED = 1 << 0;
        /// The dirty bit.
        const DIRTY = 1 << 1;
    }
}

/// How much [`Cursor::harvest`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Harvested {
    /// Pages whose accessed bit was set.
    pub accessed: u64,
    /// Pages whose dirty bit was set.
    pub dirty: u64,
}

impl<'t, F: Format, E: Env, H: Divisible, S: Liveness> Cursor<'t, F, E, H, S> {
    /// Reads and clears accessed or dirty bits in `range`, shows each leaf that had one to `visit`.
    ///
    /// No bit is lost: what the hardware set before the clearing is seen now, what it sets after is seen next time,
    /// once the gather is committed.
    ///
    /// # Errors
    ///
    /// As [`update`](Self::update), with what was found, and cleared, before.
    ///
    /// # Examples
    ///
    /// ```
    /// # mod example { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs")); }
    /// # use example::*;
    /// use kmem_paging::{Attributes, Harvest, Rights};
    ///
    /// let table = table();
    /// let range = pages(0x400, 2);
    /// let mut cursor = table.cursor(range)?;
    /// let written = Attributes::new(Rights::USER_DATA).accessed().dirty();
    /// cursor.map(page(0x400), frame(0x8000), written).map_err(|(error, _)| error)?;
    /// cursor.map(page(0x401), frame(0x8001), Rights::USER_DATA).map_err(|(error, _)| error)?;
    /// let mut gather = table.gather::<1>();
    /// let mut to_write = Vec::new();
    /// let found = cursor.harvest(range, Harvest::DIRTY, &mut gather, |leaf| to_write.push(leaf.page));
    /// assert_eq!((found.unwrap().dirty, to_write), (1, vec![page(0x400)]));
    /// drop(cursor);
    /// // Before the pages are written out: from now on a write sets the bit again.
    /// gather.commit(drop);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "ptep_test_and_clear_young")]
    #[doc(alias = "page_mkclean")]
    pub fn harvest<const N: usize>(
        &mut self,
        range: PageRange,
        bits: Harvest,
        gather: &mut Gather<'_, F, E, H, N>,
        mut visit: impl FnMut(&Leaf),
    ) -> Result<Harvested, (ChangeError, Harvested)> {
        let mut found = Harvested::default();
        let take = |leaf: &Leaf| {
            let accessed = leaf.attributes.accessed && bits.contains(Harvest::ACCESSED);
            let dirty = leaf.attributes.dirty && bits.contains(Harvest::DIRTY);
            let mut attributes = leaf.attributes;
            attributes.accessed &= !accessed;
            attributes.dirty &= !dirty;
            (accessed || dirty).then_some(attributes)
        };
        let result = self.harvest_by(range, gather, take, |leaf| {
            if leaf.attributes.accessed {
                found.accessed += leaf.order.frames();
            }
            if leaf.attributes.dirty {
                found.dirty += leaf.order.frames();
            }
            visit(leaf);
        });
        match result {
            Ok(()) => Ok(found),
            Err(error) => Err((error, found)),
        }
    }

    /// Reads and clears a software bit in `range`, takes the right to write from each leaf that had it, and shows it to `visit`; gives how many pages
    /// had it.
    ///
    /// The next write to such a page faults, and whoever serves the fault gives the right back together with the bit. So with a bit that every page
    /// gets with its right to write this is Linux's *soft-dirty*: which pages were written to since the last harvest. A checkpoint asks for it, beside
    /// the dirty bit, which write-back clears. Payloads have no software bits: what is known of a page that has one is its owner's.
    ///
    /// # Errors
    ///
    /// As [`update`](Self::update), with how many pages were cleared before.
    ///
    /// # Examples
    ///
    /// ```
    /// # mod example { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs")); }
    /// # use example::*;
    /// use kmem_paging::{Attributes, Rights, SoftBit, format::X86_64};
    ///
    /// let written = SoftBit::<X86_64, 0>::BIT;
    /// let data = Attributes::new(Rights::USER_DATA).soft(written);
    /// let table = table();
    /// let range = pages(0x400, 2);
    /// let mut cursor = table.cursor(range)?;
    /// cursor.map(page(0x400), frame(0x8000), data).map_err(|(error, _)| error)?;
    /// cursor.map(page(0x401), frame(0x8001), data).map_err(|(error, _)| error)?;
    /// let mut gather = table.gather::<1>();
    /// assert_eq!(cursor.harvest_soft(range, written, &mut gather, |_| {}).map_err(|(error, _)| error)?, 2);
    /// cursor.release();
    /// gather.commit(drop);
    /// assert!(!table.query(page(0x400)).leaf().unwrap().is_writable());
    /// // A fault for writing to the first page.
    /// cursor.update(pages(0x400, 1), &mut gather, |_| Some(data))?;
    /// let mut dirty = Vec::new();
    /// cursor.harvest_soft(range, written, &mut gather, |leaf| dirty.push(leaf.page)).map_err(|(error, _)| error)?;
    /// assert_eq!(dirty, [page(0x400)]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "clear_soft_dirty")]
    #[doc(alias = "soft-dirty")]
    pub fn harvest_soft<const N: usize>(
        &mut self,
        range: PageRange,
        bit: Soft,
        gather: &mut Gather<'_, F, E, H, N>,
        mut visit: impl FnMut(&Leaf),
    ) -> Result<u64, (ChangeError, u64)> {
        let mut pages = 0;
        let take = |leaf: &Leaf| {
            let Attributes { soft, .. } = leaf.attributes;
            let clean = leaf.attributes.write_protected().soft(soft.without(bit));
            soft.contains(bit).then_some(clean)
        };
        let result = self.harvest_by(range, gather, take, |leaf| {
            pages += leaf.order.frames();
            visit(leaf);
        });
        match result {
            Ok(()) => Ok(pages),
            Err(error) => Err((error, pages)),
        }
    }

    /// Gives the leaves of `range` for which `take` has attributes these, and shows each to `seen` once, as it was when it got them.
    fn harvest_by<const N: usize>(
        &mut self,
        range: PageRange,
        gather: &mut Gather<'_, F, E, H, N>,
        take: impl Fn(&Leaf) -> Option<Attributes>,
        mut seen: impl FnMut(&Leaf),
    ) -> Result<(), ChangeError> {
        // `update` asks again about a leaf that the hardware changed meanwhile.
        let mut last: Option<Leaf> = None;
        let result = self.update(range, gather, |leaf| {
            if let Some(previous) = last.take()
                && previous.page != leaf.page
            {
                seen(&previous);
            }
            let attributes = take(leaf)?;
            last = Some(*leaf);
            Some(attributes)
        });
        if let Some(previous) = last {
            seen(&previous);
        }
        result.map(drop)
    }
}
