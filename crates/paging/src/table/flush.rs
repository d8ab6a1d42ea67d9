//! Which translations a change of the table must drop, and on which CPUs.
//!
//! ```text
//!   announce   before the first store that needs a flush: `unflushed` + 1 (`P4`)
//!   flush      what was noted: single pages, the space, or everything  ── local, one interrupt each for the others, wait
//!   retract    `unflushed` - 1
//! ```
//!
//! A change of one leaf that is flushed under its table's lock ([`flush_now`](PageTable::flush_now)) is not announced: whoever could build on
//! it waits for that lock.
//!
//! - Where other changes are not flushed yet, a flush drops everything (`G1` of the gather), and who fills a hole flushes it
//!   ([`settle`](PageTable::settle)).
//! - A table that lends its upper part is under the tags of all spaces, so its flushes go to every CPU.
//! - Where nobody ever asked for the root, no CPU walked from it, and nothing is flushed.

use kmem_hal::sync::{Ordering, fence};
use kmem_hal::{
    Asid, Completion, Cpu, CpuSet, FlushRequest, FlushScope, FrameHandle, Mmu, Page, PageRange,
    Root, Trace, TraceEvent,
};

use super::PageTable;
use crate::env::Env;
use crate::format::Format;
use crate::gather::{FLUSH_CEILING, Stale};
use crate::mutants::mutant;

impl<F: Format, E: Env, H: FrameHandle> PageTable<F, E, H> {
    pub(crate) fn announce(&self) {
        self.unflushed.fetch_add(1, Ordering::AcqRel);
    }

    pub(crate) fn retract(&self) {
        self.unflushed.fetch_sub(1, Ordering::AcqRel);
    }

    /// Whether a change of this table has not been flushed yet, by this context or another.
    #[inline]
    pub(crate) fn has_unflushed(&self) -> bool {
        self.unflushed.load(Ordering::Acquire) != 0 && !mutant!("unflushed-not-counted")
    }

    /// Whether a hole that is filled must be flushed before anybody relies on it (see the cursor's `map.rs`).
    #[inline(always)]
    pub(crate) fn must_settle(&self) -> bool {
        F::CACHES_ABSENT || self.has_unflushed()
    }

    /// Flushes leaves of `stride` pages that were just filled, where that is needed. The caller holds no lock.
    #[inline]
    pub(crate) fn settle(&self, range: PageRange, stride: u64) {
        if self.must_settle() {
            self.flush_filled(range, stride, false);
        }
    }

    /// Tells the CPUs, which remember absent entries, that a table leads to `page` since now: whoever fills an entry of it tells them of that
    /// alone ([`settle`](Self::settle)). The caller has announced it.
    #[inline]
    pub(crate) fn tell_made(&self, page: Page) {
        self.flush_filled(PageRange::single(page), 1, true);
    }

    #[cold]
    fn flush_filled(&self, range: PageRange, stride: u64, table: bool) {
        // What was there before may have been of any kind.
        let stale = Stale {
            range,
            stride,
            global: true,
            local: true,
        };
        self.flush(Some(stale), table, usize::from(table));
    }

    /// Drops translations on every CPU that may hold them, and waits. `own` is how many of the unflushed gathers are the
    /// caller's.
    pub(crate) fn flush(&self, stale: Option<Stale>, tables_freed: bool, own: usize) {
        let others = self.unflushed.load(Ordering::Acquire) > own;
        let lent = self.is_lent() && !mutant!("flush-of-a-lender-is-local");
        // Where all of the space goes, its global leaves go too.
        let global = stale.map_or_else(
            || self.may_be_global() && !mutant!("flush-of-all-spares-global"),
            |stale| stale.global,
        );
        // A lent table's translations sit under the tags of all spaces, where only a flush of everything reaches those
        // that are not global, and paging-structure caches.
        let everywhere = lent && (tables_freed || stale.is_none_or(|stale| stale.local));
        // Holes are remembered page by page, from when there was a table of small leaves.
        let stale = stale.map(|stale| Stale {
            stride: if F::CACHES_ABSENT { 1 } else { stale.stride },
            ..stale
        });
        let scope = match stale {
            Some(Stale { range, stride, .. })
                if !others
                    && !everywhere
                    && (range.count().div_ceil(stride) <= FLUSH_CEILING
                        || mutant!("flush-takes-thirty-three")) =>
            {
                let range = if mutant!("flush-takes-thirty-three") {
                    let count = range.count().min(FLUSH_CEILING * stride);
                    PageRange::with_count(range.first(), count).unwrap_or(range)
                } else {
                    range
                };
                FlushScope::Pages { range, stride }
            }
            None if !tables_freed && !others => return,
            _ if everywhere || global || lent || others => FlushScope::Everything,
            _ => FlushScope::Space,
        };
        let request = FlushRequest {
            root: if mutant!("flush-under-tag-zero") {
                Root {
                    asid: Asid::ZERO,
                    ..self.root_quietly()
                }
            } else {
                self.root_quietly()
            },
            scope,
            global: (global || lent) && !mutant!("flush-spares-global"),
            tables_freed: tables_freed || others,
        };
        // The entry stores come before this look, as the flag's store comes before the first load of the root: either a CPU that loads it
        // now walks what was stored, or the root is seen to be out.
        fence(Ordering::SeqCst);
        let loaded = self.was_given_out() && !mutant!("loaded-is-never-loaded");
        if !loaded && !lent {
            // No CPU ever walked from here.
            self.env.trace().event(TraceEvent::Flushed(request));
            return;
        }
        let mmu = self.env.mmu();
        let pin = self.env.cpu().pin();
        let mut cpus = if lent {
            CpuSet::first(self.env.cpu().count())
        } else {
            mmu.flush_targets(&request)
        };
        cpus.remove(mmu.this_cpu());
        let sent = if cpus.is_empty() || mutant!("flush-interrupts-nobody") {
            Completion::DONE
        } else {
            mmu.shootdown(&cpus, &request)
        };
        if !mutant!("flush-forgets-this-cpu") {
            mmu.flush_local(&request);
        }
        if !mutant!("flush-does-not-wait") {
            mmu.complete(sent);
        }
        drop(pin);
        self.env.trace().event(TraceEvent::Flushed(request));
    }

    /// Flushes the translations of a change that was made without a gather.
    pub(crate) fn flush_now(&self, stale: Stale) {
        self.flush(Some(stale), false, 0);
    }
}
