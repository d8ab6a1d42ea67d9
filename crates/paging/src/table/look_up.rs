//! Looking up without a lock.
//!
//! A walk runs inside a read section of the environment's [`Grace`]: a table to which an entry pointed during the section stays a table until
//! the section ends, as it is freed only after a grace period. So a look-up stores to no word but those of the section.
//!
//! Costs: a load a level, and the section.

use kmem_hal::{FrameHandle, Grace, Page, PhysAddr, VirtAddr};

use super::{Entry, PageTable, decode, index_at, seen_from};
use crate::env::Env;
use crate::format::{Format, Word, level};

impl<F: Format, E: Env, H: FrameHandle> PageTable<F, E, H> {
    /// What is mapped at `page`, without a lock: safe against a concurrent free of the tables on the way.
    ///
    /// The answer may be old by the time it is used; decide under a [`cursor`](Self::cursor).
    ///
    /// Context: any, interrupts included.
    #[doc(alias = "follow_page")]
    #[inline]
    #[must_use]
    pub fn query(&self, page: Page) -> Entry {
        let levels = self.levels();
        if !F::canonical(levels).contains(page.start()) {
            return Entry::Empty;
        }
        // SAFETY: the closure makes no guard and does not panic: an index is below the entries of its table.
        unsafe { self.env.grace().read_with(|| self.descend(page)) }
    }

    /// Where an access to `address` ends, if it is mapped: as [`query`](Self::query), for the address alone.
    ///
    /// Costs the loads of the walk and a read section of the environment's [`Grace`].
    ///
    /// Context: any, interrupts included.
    ///
    /// # Examples
    ///
    /// See the crate's first page.
    #[doc(alias = "translate_addr")]
    #[doc(alias = "virt_to_phys")]
    #[inline]
    #[must_use]
    pub fn translate(&self, address: VirtAddr) -> Option<PhysAddr> {
        let levels = self.levels();
        if !F::canonical(levels).contains(address) {
            return None;
        }
        // SAFETY: as in `query`.
        unsafe { self.env.grace().read_with(|| self.find(address)) }
    }

    /// As `translate`, inside a read section.
    #[inline(always)]
    fn find(&self, address: VirtAddr) -> Option<PhysAddr> {
        let levels = self.levels();
        let map = self.env.map();
        let page = address.as_u64() >> kmem_hal::PAGE_SHIFT;
        let mut frame = self.root;
        macro_rules! find {
            ($($number:literal)*) => {$(
                if $number <= F::LEVELS.len() && $number <= levels {
                    // SAFETY: as in `descend`.
                    let words = unsafe { F::Word::words(map, frame) };
                    let word = F::Word::load(&words[index_at::<F>(page, $number)]);
                    if !F::is_table($number, word) {
                        let level = level::<F>($number);
                        if !level.leaf || !F::is_present($number, word) {
                            return None;
                        }
                        let inside = address.as_u64() & ((1 << (level.shift + kmem_hal::PAGE_SHIFT)) - 1);
                        return Some(PhysAddr::new(F::leaf_frame($number, word).start().as_u64() | inside));
                    }
                    frame = F::table_frame(word);
                }
            )*};
        }
        find!(5 4 3 2 1);
        let _ = frame;
        unreachable!("level 1 has no tables below it")
    }

    /// As `query`, inside a read section.
    #[inline(always)]
    fn descend(&self, page: Page) -> Entry {
        let levels = self.levels();
        let map = self.env.map();
        let mut shared = false;
        let mut frame = self.root;
        // Written out, so that every shift and mask is a constant: half the instructions of the loop.
        macro_rules! descend {
            ($($number:literal)*) => {$(
                if $number <= F::LEVELS.len() && $number <= levels {
                    // SAFETY: the root is attached (P1), and a table that an entry pointed to during this read section stays
                    // a table until the section ends: it is freed only after a grace period. Tables are in reach.
                    let words = unsafe { F::Word::words(map, frame) };
                    let word = F::Word::load(&words[index_at::<F>(page.number(), $number)]);
                    if !F::is_table($number, word) {
                        return seen_from(decode::<F>(page, $number, word), shared);
                    }
                    shared |= F::is_shared_table($number, word);
                    frame = F::table_frame(word);
                }
            )*};
        }
        descend!(5 4 3 2 1);
        let _ = (frame, shared);
        unreachable!("level 1 has no tables below it")
    }
}
