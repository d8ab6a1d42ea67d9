//! What memory is used for, and what reclaim has done: the fields of `/proc/meminfo` and `/proc/vmstat` that are this crate's.
//!
//! Nothing of the first is kept: [`Mm::meminfo`] walks the slots of all frames and counts, so it is a recount by itself. That costs about
//! a millisecond a gibibyte and nothing at a fault.
//!
//! Source: proc_meminfo(5), proc_vmstat(5).

use core::fmt;

use kmem_hal::sync::{AtomicU64, Ordering};
use kmem_hal::{Frame, FrameTag, SECTION_FRAMES, SlotFlags, UserSlot};
use kmem_paging::Env as _;

use crate::env::Env;
use crate::mm::Mm;
use crate::reclaim::LAZY_FREE;
use crate::swap::SwapTotals;

/// Events, as they happen.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub swapped_in: AtomicU64,
    pub swapped_out: AtomicU64,
    pub read_ahead: AtomicU64,
    pub written_back: AtomicU64,
    pub write_errors: AtomicU64,
    pub scanned: AtomicU64,
    pub freed: AtomicU64,
    pub moved: AtomicU64,
    /// How short memory is, as the allocator says, until somebody looks.
    pub pressure: AtomicU64,
}

/// How often things have happened since the start. Pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Events {
    /// Read from swap, read-ahead included (`pswpin`).
    #[doc(alias = "pswpin")]
    pub swapped_in: u64,
    /// Written to swap (`pswpout`).
    #[doc(alias = "pswpout")]
    pub swapped_out: u64,
    /// Read from swap or a file before anybody asked (`swap_ra`).
    pub read_ahead: u64,
    /// Written to files.
    pub written_back: u64,
    /// Writes that failed.
    pub write_errors: u64,
    /// Judged by a policy (`pgscan`).
    #[doc(alias = "pgscan")]
    pub scanned: u64,
    /// Freed by reclaim (`pgsteal`).
    #[doc(alias = "pgsteal")]
    pub freed: u64,
    /// Moved to another frame (`pgmigrate_success`).
    pub moved: u64,
}

/// What the frames of programs and files are used for. Pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemInfo {
    /// Anonymous pages that are mapped.
    #[doc(alias = "AnonPages")]
    pub anonymous: u64,
    /// Pages of files and of shared memory in page caches.
    #[doc(alias = "Cached")]
    pub cached: u64,
    /// Of these, shared memory's.
    #[doc(alias = "Shmem")]
    pub shared: u64,
    /// Of these, mapped by somebody.
    #[doc(alias = "Mapped")]
    pub mapped: u64,
    /// Pages of files that are to be written back.
    #[doc(alias = "Dirty")]
    pub dirty: u64,
    /// Pages that are on their way to a file or to swap.
    #[doc(alias = "Writeback")]
    pub writeback: u64,
    /// Pages that a policy was asked about and kept, or that were used since.
    #[doc(alias = "Active")]
    pub active: u64,
    /// The other pages of programs and files.
    #[doc(alias = "Inactive")]
    pub inactive: u64,
    /// Anonymous pages that go without a copy unless they are written again.
    #[doc(alias = "LazyFree")]
    pub lazily_freed: u64,
    /// Swap.
    pub swap: SwapTotals,
}

impl<E: Env> Mm<'_, E> {
    /// What has happened since the start.
    #[must_use]
    pub fn events(&self) -> Events {
        let counts = self.counts();
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Events {
            swapped_in: read(&counts.swapped_in),
            swapped_out: read(&counts.swapped_out),
            read_ahead: read(&counts.read_ahead),
            written_back: read(&counts.written_back),
            write_errors: read(&counts.write_errors),
            scanned: read(&counts.scanned),
            freed: read(&counts.freed),
            moved: read(&counts.moved),
        }
    }

    /// Shows every frame that is a program's or a file's page now.
    pub(crate) fn for_each_page(&self, mut show: impl FnMut(Frame, UserSlot<'_>)) {
        let end = self.frame_end();
        let mut number = 0;
        while number < end {
            let frame = Frame::from_number(number);
            let Some(slot) = self.env().paging().slots().used_slot(frame) else {
                number = (number / SECTION_FRAMES + 1) * SECTION_FRAMES;
                continue;
            };
            if let Some(page) = slot.as_user() {
                show(frame, page);
            }
            number += 1;
        }
    }

    /// Counts what frames are used for.
    #[must_use]
    pub fn meminfo(&self) -> MemInfo {
        let mut info = MemInfo {
            swap: self.swap().totals(),
            ..MemInfo::default()
        };
        self.for_each_page(|frame, page| {
            if frame == self.zero_page() {
                return;
            }
            let flags = page.slot().flags();
            let mapped = page.mappings() > 0;
            if page.slot().tag() == FrameTag::Anon {
                info.anonymous += u64::from(mapped);
                info.lazily_freed += u64::from(flags.contains(LAZY_FREE));
            } else {
                info.cached += 1;
                info.mapped += u64::from(mapped);
                let shared = self.is_shared_memory(page.object());
                info.shared += u64::from(shared);
                info.dirty += u64::from(flags.contains(SlotFlags::DIRTY) && !shared);
            }
            info.writeback += u64::from(flags.contains(SlotFlags::WRITEBACK));
            if page.age() > 0 || flags.contains(SlotFlags::REFERENCED) {
                info.active += 1;
            } else {
                info.inactive += 1;
            }
        });
        info
    }

    fn is_shared_memory(&self, number: u32) -> bool {
        let visit = self.visit_number(number);
        visit.is_some_and(|visit| self.info(visit.file).is_shared_memory)
    }
}

/// The lines of `/proc/meminfo` that are about these pages.
impl fmt::Display for MemInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, pages) in [
            ("Cached", self.cached),
            ("SwapCached", self.swap.cached),
            ("Active", self.active),
            ("Inactive", self.inactive),
            ("SwapTotal", self.swap.total),
            ("SwapFree", self.swap.free),
            ("Dirty", self.dirty),
            ("Writeback", self.writeback),
            ("AnonPages", self.anonymous),
            ("Mapped", self.mapped),
            ("Shmem", self.shared),
        ] {
            let padding = 15usize.saturating_sub(name.len());
            writeln!(f, "{name}:{:padding$}{:>8} kB", "", pages * 4)?;
        }
        Ok(())
    }
}
