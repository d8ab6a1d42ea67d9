//! Reading and clearing what was written down about accesses: accessed and dirty bits.

use kmem_hal::PageRange;

use super::{Cursor, Divisible};
use crate::attributes::Leaf;
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
        // A leaf may be shown twice to the closure below (see `update`); it counts once, as it was shown last.
        let mut last: Option<Leaf> = None;
        let mut count = |leaf: Leaf| {
            if leaf.attributes.accessed {
                found.accessed += leaf.order.frames();
            }
            if leaf.attributes.dirty {
                found.dirty += leaf.order.frames();
            }
            visit(&leaf);
        };
        let result = self.update(range, gather, |leaf| {
            if let Some(previous) = last.take()
                && previous.page != leaf.page
            {
                count(previous);
            }
            let accessed = leaf.attributes.accessed && bits.contains(Harvest::ACCESSED);
            let dirty = leaf.attributes.dirty && bits.contains(Harvest::DIRTY);
            if !accessed && !dirty {
                return None;
            }
            last = Some(*leaf);
            let mut attributes = leaf.attributes;
            attributes.accessed &= !accessed;
            attributes.dirty &= !dirty;
            Some(attributes)
        });
        if let Some(previous) = last {
            count(previous);
        }
        match result {
            Ok(_) => Ok(found),
            Err(error) => Err((error, found)),
        }
    }
}
