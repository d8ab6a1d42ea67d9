//! Exchanging what a page has: another frame, or a payload.
//!
//! A leaf that is replaced is cleared first and flushed everywhere, and then the new one appears (`exchange_leaf` of `locked.rs`). A leaf that
//! becomes a payload changes in one step, and its frame goes into the gather.

use kmem_hal::{Frame, FrameHandle, Order, Page, Trace, TraceEvent};

use super::Cursor;
use super::map::block;
use crate::attributes::{Attributes, Leaf, Payload, Rights};
use crate::env::Env;
use crate::error::{ChangeError, MapError};
use crate::format::{Format, Kind};
use crate::gather::{Gather, Stale};
use crate::locked::exchange_leaf;
use crate::mutants::mutant;
use crate::quiescent::Liveness;
use crate::table::{Entry, decode, index_at};

/// What [`Cursor::replace`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum Replaced<H> {
    /// Nothing: the page was just mapped.
    Nothing,
    /// A payload.
    Payload(Payload),
    /// A leaf; its translations are gone from every CPU, so here is its handle.
    Leaf(Leaf, H),
}

impl<'t, F: Format, E: Env, H: FrameHandle, S: Liveness> Cursor<'t, F, E, H, S> {
    /// Puts the block of `handle` where a leaf of the same order, a payload or nothing is.
    ///
    /// An old leaf is cleared first and its translations are dropped on every CPU, then the new one appears: no CPU
    /// reads the old frame after another has written to the new one. So the old handle comes back at once and needs no
    /// gather.
    ///
    /// Context: may wait for other CPUs, under the table's lock.
    ///
    /// # Errors
    ///
    /// [`MapError`] with the handle; nothing changed. [`MapError::Occupied`] where a leaf of another order or a table
    /// is there.
    ///
    /// # Examples
    ///
    /// ```
    /// # mod example { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs")); }
    /// # use example::*;
    /// use kmem_paging::{Replaced, Rights};
    ///
    /// // A page that a program may only read is copied, and the copy takes its place.
    /// let table = mapped(pages(0x400, 1));
    /// let mut cursor = table.cursor(pages(0x400, 1))?;
    /// let replaced = cursor.replace(page(0x400), frame(0x9000), Rights::USER_DATA).map_err(|(error, _)| error)?;
    /// let Replaced::Leaf(old, handle) = replaced else { panic!("it was mapped") };
    /// // No CPU uses the old frame any more: the handle may be given back at once.
    /// assert_eq!((old.frame.number(), handle), (0x10_0400, frame(0x10_0400)));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "ptep_clear_flush")]
    pub fn replace(
        &mut self,
        page: Page,
        handle: H,
        attributes: impl Into<Attributes>,
    ) -> Result<Replaced<H>, (MapError, H)> {
        let attributes = attributes.into();
        let (frame, order) = handle.into_entry();
        let result = self.replace_raw(page, frame, order, &attributes);
        match result {
            Ok(before) => {
                // A leaf was absent after its flush, until the new one was stored.
                let absent = F::CACHES_ABSENT && !mutant!("replace-does-not-settle");
                if absent || !matches!(before, Replaced::Leaf(..)) {
                    self.settle(block(page, order), order);
                }
                self.table
                    .env()
                    .trace()
                    .event(TraceEvent::Mapped(block(page, order), frame));
                Ok(before)
            }
            // SAFETY: H2: the numbers came from `into_entry` above, and no entry got them.
            Err(error) => Err((error, unsafe { H::from_entry(frame, order) })),
        }
    }

    fn replace_raw(
        &mut self,
        page: Page,
        frame: Frame,
        order: Order,
        attributes: &Attributes,
    ) -> Result<Replaced<H>, MapError> {
        let (target, word) = self.encode(page, frame, order, attributes)?;
        let node = self.seek_own(page, target)?;
        let index = index_at::<F>(page.number(), node.level);
        let before = node.load(index);
        if node.level != target || before == 0 {
            return self.place(page, target, word).map(|()| Replaced::Nothing);
        }
        match decode::<F>(page, target, before) {
            Entry::Payload(payload) => {
                node.store(index, word);
                Ok(Replaced::Payload(payload))
            }
            Entry::Leaf(_) => {
                let (leaf, handle) = exchange_leaf::<F, E, H, S>(self.table, &node, page, word);
                Ok(Replaced::Leaf(leaf, handle))
            }
            Entry::Empty => Err(MapError::Occupied),
        }
    }

    /// Leaves `payload` at an empty page.
    ///
    /// # Errors
    ///
    /// [`MapError`]; nothing changed.
    pub fn map_payload(&mut self, page: Page, payload: Payload) -> Result<(), MapError> {
        if !self.range.contains(page) {
            return Err(MapError::OutOfRange);
        }
        if !payload.fits::<F>() && !mutant!("payload-cut-off") {
            return Err(MapError::Unencodable);
        }
        self.place(page, 1, F::payload(payload))
    }

    /// Leaves `payload` where a 4 KiB leaf, a payload or nothing is; gives what was there. The leaf's frame goes into
    /// the gather.
    ///
    /// # Errors
    ///
    /// [`ChangeError`]; nothing changed. A page inside a huge leaf is refused as [`ChangeError::Unencodable`]: split it
    /// first. So is a payload that was made for a format with more room.
    ///
    /// # Examples
    ///
    /// ```
    /// # mod example { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs")); }
    /// # use example::*;
    /// use kmem_paging::{Entry, Payload, format::X86_64};
    ///
    /// // A page goes to block 77 of a disk.
    /// let table = mapped(pages(0x400, 1));
    /// let mut gather = table.gather::<1>();
    /// let block = Payload::new::<X86_64>(77).unwrap();
    /// let before = table.cursor(pages(0x400, 1))?.set_payload(page(0x400), block, &mut gather)?;
    /// assert!(before.leaf().is_some());
    /// let mut freed = 0;
    /// gather.commit(|_frame| freed += 1);
    /// assert_eq!((freed, table.query(page(0x400))), (1, Entry::Payload(block)));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "set_swap_pte")]
    pub fn set_payload<const N: usize>(
        &mut self,
        page: Page,
        payload: Payload,
        gather: &mut Gather<'_, F, E, H, N>,
    ) -> Result<Entry, ChangeError> {
        if !self.range.contains(page) {
            return Err(ChangeError::OutOfRange);
        }
        if !gather.belongs_to(self.table) {
            return Err(ChangeError::ForeignGather);
        }
        if !payload.fits::<F>() {
            return Err(ChangeError::Unencodable { at: page });
        }
        let word = F::payload(payload);
        let node = self.seek_own(page, 1)?;
        let index = index_at::<F>(page.number(), node.level);
        let before = node.load(index);
        if before == 0 {
            return match self.place(page, 1, word) {
                Ok(()) => Ok(Entry::Empty),
                Err(MapError::Memory(error)) => Err(ChangeError::Memory(error)),
                Err(MapError::Shared) => Err(ChangeError::Shared { at: page }),
                Err(_) => Err(ChangeError::Unencodable { at: page }),
            };
        }
        if node.level != 1 {
            return Err(ChangeError::Unencodable { at: page });
        }
        if node.kind(before) == Kind::Payload {
            node.store(index, word);
            return Ok(decode::<F>(page, 1, before));
        }
        if gather.is_full() {
            self.release();
            return Err(ChangeError::Full { next: page });
        }
        gather.announce();
        let mut before = before;
        while let Err(found) = node.change::<S>(index, before, word) {
            before = found;
        }
        let entry = decode::<F>(page, 1, before);
        if let Entry::Leaf(leaf) = entry {
            let global = leaf.attributes.rights.contains(Rights::GLOBAL);
            if !mutant!("payload-not-noted") {
                gather.note(Stale::leaf(leaf.range(), global));
            }
            if !mutant!("payload-leaks") {
                gather.push(leaf.frame, leaf.order);
            }
            self.table
                .env()
                .trace()
                .event(TraceEvent::Unmapped(leaf.range()));
        }
        Ok(entry)
    }
}
