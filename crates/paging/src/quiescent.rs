//! Tables that no processor walks: the typestate of cursors, and the proof that it takes.
//!
//! A processor writes accessed and dirty bits into the entries that it walks, so a change of a live leaf is a locked instruction unless
//! the leaf has nothing left to be written. Of a table that is loaded nowhere every entry belongs to software alone.
//!
//! ```text
//!   PageTable ── cursor(&self) ────────────────────────> Cursor<.., Live>        locked AND, exchange, compare-and-exchange
//!       │
//!       └─ quiesce(&mut self) ──> QuiescentTable ──────> Cursor<.., Quiescent>   plain loads and stores
//!            loaded nowhere? not lent?     └─ gather        each table of a path: share count 1?
//! ```
//!
//! Invariants
//! - `Q1`: while a [`QuiescentTable`] lives, no processor walks from the root: it was never given to anybody, or the MMU says that no CPU
//!   has it loaded; and whoever loads a root promised that no `QuiescentTable` of it exists ([`Mmu::load_root`]). The exclusive borrow
//!   keeps everybody else from the table, and neither it nor its cursors and gathers give the table away: nobody can ask for the root.
//! - `Q2`: no other root leads to what a quiescent cursor changes: the table lends nothing, and a table whose share count is not 1 is
//!   refused at every level of the path, each time that one is entered.
//! - `Q3`: what left entries behind in caches is still flushed. Translations under the space's tag outlive its last load, so the gather
//!   works as ever; only a table that was never loaded needs no flush, live or quiescent.
//!
//! The locks of table pages stay: two quiescent cursors of one table may run on two CPUs.
//!
//! Does not handle: borrowed top entries, which no cursor touches.
//!
//! Source: Intel SDM volume 3A, 4.8 (the processor sets the bits during a walk) and 4.10.2 (walks start at CR3 alone).

use core::fmt;

use kmem_hal::{FrameHandle, Mmu, Page, PageRange};

use crate::cursor::Cursor;
use crate::env::Env;
use crate::error::{QuiesceError, RangeError};
use crate::format::{Format, Word};
use crate::gather::Gather;
use crate::mutants::mutant;
use crate::node;
use crate::table::{Entry, PageTable};

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::Live {}
    impl Sealed for super::Quiescent {}
}

/// What a [`Cursor`] may assume of the processors: [`Live`] or [`Quiescent`].
pub trait Liveness: sealed::Sealed {
    /// Whether no processor walks the tables.
    const QUIESCENT: bool;
}

/// Processors may walk the tables, and write accessed and dirty bits, at any moment.
#[derive(Clone, Copy, Debug)]
pub struct Live(());

/// No processor walks the tables: plain loads and stores do.
#[derive(Clone, Copy, Debug)]
pub struct Quiescent(());

impl Liveness for Live {
    const QUIESCENT: bool = false;
}

impl Liveness for Quiescent {
    const QUIESCENT: bool = true;
}

/// A [`PageTable`] that is loaded nowhere, for as long as this value lives.
///
/// # Examples
///
/// A space that was just made and never loaded:
///
/// ```
/// # mod machine { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/machine.rs")); }
/// use kmem_hal::{FrameRequest, FrameSource, OwnedFrame, Page, PageRange};
/// use kmem_paging::{PageTable, Rights, format::X86_64};
///
/// # let machine = machine::Machine::new(64);
/// # let env = machine.env();
/// # let frames = machine.frames();
/// let mut table = PageTable::<X86_64, _, OwnedFrame>::new(env)?;
/// let page = PageRange::single(Page::new(0x400).unwrap());
/// let quiescent = table.quiesce()?;
/// let mut cursor = quiescent.cursor(page)?;
/// let frame = frames.alloc(&FrameRequest::ONE.zeroed())?;
/// cursor.map(page.first(), frame, Rights::USER_DATA).map_err(|(error, _)| error)?;
/// let mut gather = quiescent.gather::<1>();
/// // A plain store, and no flush.
/// cursor.protect(page, Rights::READ | Rights::USER, &mut gather)?;
/// # cursor.unmap(page, &mut gather)?; drop(cursor); gather.commit_to(frames); drop(gather);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct QuiescentTable<'t, F: Format, E: Env, H: FrameHandle> {
    // Made from an exclusive borrow of the same lifetime.
    table: &'t PageTable<F, E, H>,
}

impl<F: Format, E: Env, H: FrameHandle> PageTable<F, E, H> {
    /// Says that no CPU has the table loaded, and keeps everybody from loading it.
    ///
    /// # Errors
    ///
    /// [`QuiesceError`] where a CPU has the root loaded, lazily or not, or where other roots lead to the table.
    pub fn quiesce(&mut self) -> Result<QuiescentTable<'_, F, E, H>, QuiesceError> {
        if self.is_lent() {
            return Err(QuiesceError::Lent);
        }
        if self.was_given_out()
            && !mutant!("quiescent-though-loaded")
            && self.env().mmu().is_loaded(self.root_quietly())
        {
            return Err(QuiesceError::Loaded);
        }
        Ok(QuiescentTable { table: self })
    }
}

impl<'t, F: Format, E: Env, H: FrameHandle> QuiescentTable<'t, F, E, H> {
    /// A cursor that changes entries by plain stores.
    ///
    /// A table that other spaces share is refused as [`Live`] cursors refuse it: unshare it first.
    ///
    /// # Errors
    ///
    /// As [`PageTable::cursor`].
    pub fn cursor(&self, range: PageRange) -> Result<Cursor<'t, F, E, H, Quiescent>, RangeError> {
        self.table.check(range)?;
        Ok(Cursor::new(self.table, range))
    }

    /// A gather for changes to this table; `N` blocks fit in it.
    pub fn gather<const N: usize>(&self) -> Gather<'t, F, E, H, N> {
        Gather::new(self.table)
    }

    /// As [`PageTable::query`].
    #[must_use]
    pub fn query(&self, page: Page) -> Entry {
        self.table.query(page)
    }
}

impl<F: Format, E: Env, H: FrameHandle> fmt::Debug for QuiescentTable<'_, F, E, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "quiescent {:?}", self.table)
    }
}

/// What [`patch_present`] did.
pub(crate) struct Patched {
    /// Entries from the first on that were present.
    pub entries: usize,
    /// How many of them changed.
    pub changed: u64,
    /// The bits that any of the old words had.
    pub union: u64,
    /// The bits that all of the old words had.
    pub common: u64,
}

/// Words that are looked at together.
const CHUNK: usize = 8;

/// Changes present leaves of level 1 to `word & keep | set`, as far as whole chunks of them follow each other. The caller holds the
/// table's lock, and no processor walks there (`Q1`).
///
/// A chunk whose words agree about what changes is counted by its union and intersection alone: six instructions an entry.
#[inline(always)]
pub(crate) fn patch_present<F: Format>(
    entries: &[node::Entry<F>],
    (keep, set): (u64, u64),
) -> Patched {
    let cleared = !(keep | set);
    let mut done = Patched {
        entries: 0,
        changed: 0,
        union: 0,
        common: u64::MAX,
    };
    for chunk in entries.chunks_exact(CHUNK) {
        let mut words = [0; CHUNK];
        let (mut present, mut union, mut common) = (true, 0, u64::MAX);
        for (word, entry) in words.iter_mut().zip(chunk) {
            *word = F::Word::load(entry);
            present &= F::is_present(1, *word);
            union |= *word;
            common &= *word;
        }
        if !present {
            break;
        }
        let left = usize::from(mutant!("quiescent-leaves-one-in-eight"));
        for (word, entry) in words.iter().zip(chunk).skip(left) {
            F::Word::store(entry, word & keep | set);
        }
        done.changed += if common & cleared != 0 || union & set != set {
            CHUNK as u64
        } else if union & cleared == 0 && common & set == set {
            0
        } else {
            let changed = words.iter().filter(|&word| word & keep | set != *word);
            changed.count() as u64
        };
        done.entries += CHUNK;
        done.union |= union;
        done.common &= common;
    }
    done
}
