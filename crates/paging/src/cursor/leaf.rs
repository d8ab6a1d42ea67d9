//! Changing one leaf of a locked table, and what is noted of several of them.
//!
//! The hardware may set accessed and dirty bits until the moment of the store, so the store is a compare-and-exchange
//! that is repeated with a fresh look; except where nothing is left for the hardware to write (`F4`), where it is plain.

use kmem_hal::{Page, PageRange};

use super::Divisible;
use crate::env::Env;
use crate::format::{Format, Word, level};
use crate::gather::{Gather, Stale};
use crate::mutants::mutant;
use crate::node;
use crate::quiescent::Liveness;

/// The format cannot say it.
pub(crate) struct Unencodable;

/// What became of one leaf.
pub(crate) enum Change {
    /// Nothing.
    None,
    /// It changed, and nobody needs to know.
    Relaxed,
    /// It changed, and is noted for the flush.
    Restricted,
}

/// Which translations leaves of one table, given in ascending order, may have left behind.
pub(super) struct Trail {
    stride: u64,
    /// The first page of the lowest and of the highest leaf.
    ends: Option<(u64, u64)>,
    global: bool,
    local: bool,
}

impl Trail {
    /// For leaves of a level.
    pub(super) fn new<F: Format>(number: usize) -> Self {
        Self {
            stride: level::<F>(number).order().frames(),
            ends: None,
            global: false,
            local: false,
        }
    }

    /// Adds a leaf by its first page.
    #[inline(always)]
    pub(super) fn add(&mut self, first: u64, global: bool) {
        self.ends = Some((self.ends.map_or(first, |ends| ends.0), first));
        self.global |= global;
        self.local |= !global;
    }

    /// What is to be flushed.
    #[inline(always)]
    pub(super) fn stale(&self) -> Option<Stale> {
        let (first, last) = self.ends?;
        let last = Page::from_number(last + (self.stride - 1));
        Some(Stale {
            range: PageRange::new(Page::from_number(first), last)?,
            stride: self.stride,
            global: self.global,
            local: self.local,
        })
    }
}

/// Leaves of one table that changed and must be flushed; the gather hears of them when this is dropped.
pub(crate) struct Restricted<'a, 'g, F: Format, E: Env, H: Divisible, const N: usize> {
    gather: &'a mut Gather<'g, F, E, H, N>,
    trail: Trail,
}

impl<'a, 'g, F: Format, E: Env, H: Divisible, const N: usize> Restricted<'a, 'g, F, E, H, N> {
    /// For leaves of the table's level.
    pub(crate) fn new(gather: &'a mut Gather<'g, F, E, H, N>, number: usize) -> Self {
        Self {
            gather,
            trail: Trail::new::<F>(number),
        }
    }
}

impl<F: Format, E: Env, H: Divisible, const N: usize> Drop for Restricted<'_, '_, F, E, H, N> {
    #[inline]
    fn drop(&mut self) {
        if let Some(stale) = self.trail.stale() {
            self.gather.note(stale);
        }
    }
}

/// Changes one leaf of a locked table. Leaves are given in ascending order.
#[inline(always)]
pub(crate) fn change_entry<F: Format, E: Env, H: Divisible, S: Liveness, const N: usize>(
    number: usize,
    entry: &node::Entry<F>,
    page: Page,
    mut word: u64,
    restricted: &mut Restricted<'_, '_, F, E, H, N>,
    change: &mut impl FnMut(usize, Page, u64) -> Result<Option<u64>, Unencodable>,
) -> Result<Change, Unencodable> {
    loop {
        let new = match change(number, page, word)? {
            Some(new) if new != word => new,
            _ => return Ok(Change::None),
        };
        let flush = F::needs_flush(number, word, new);
        if flush {
            restricted.gather.announce();
        }
        match node::change::<F, S>(entry, word, new) {
            Ok(()) if flush => {
                if !mutant!("change-not-noted") {
                    restricted
                        .trail
                        .add(page.number(), F::is_global(number, word));
                }
                return Ok(Change::Restricted);
            }
            Ok(()) => return Ok(Change::Relaxed),
            Err(found) if mutant!("change-overwrites") => {
                let _ = found;
                F::Word::store(entry, new);
                restricted
                    .trail
                    .add(page.number(), F::is_global(number, word));
                return Ok(Change::Restricted);
            }
            Err(found) => word = found,
        }
    }
}
