//! Whether what the machine did was right: the checks behind an access, and those of frames that change hands.
//!
//! An access that used a cache is compared with the tables. Old is not wrong by itself: a translation may be used until it is flushed. It is a violation
//! where a frame or a table was freed since, where it is another space's, or where the changes of its address were declared flushed ([`Core::settle`]).
//!
//! Reads and never writes what a program sees (`I1` of the module above).

use std::panic::Location;

use super::Core;
use crate::frames::{FrameEventKind, FrameState};
use crate::tlb::{GLOBAL, TlbEntry};
use crate::violation::ViolationKind;
use crate::walker::{self, Access, AccessKind, Touch, WalkContext};

/// A range of linear addresses whose changes were declared complete.
#[derive(Debug, Clone, Copy)]
pub(super) struct Settled {
    root: Option<u64>,
    first: u64,
    last: u64,
    step: u64,
}

/// The most declarations that are remembered.
const MOST_SETTLED: usize = 4096;

impl Core {
    /// Checks a translation that came straight from the tables: they must not lead to free frames.
    pub(super) fn check_fresh(&mut self, cpu: usize, linear: u64, entry: &TlbEntry) {
        if let Some(&table) = entry
            .origin
            .tables()
            .iter()
            .find(|&&table| self.frames.state(table) == FrameState::Free)
        {
            let line = format!(
                "CPU {cpu} walked to {linear:#x} through a table in frame {table:#x}, which is free"
            );
            self.raise(
                ViolationKind::WalkedFreeTable,
                cpu,
                Some(linear),
                Some(table),
                vec![line],
            );
        }
        let frame = entry.translation.physical(linear) >> 12;
        if self.frames.state(frame) == FrameState::Free && !self.is_exempt(linear) {
            let lines = vec![
                format!(
                    "CPU {cpu} used {linear:#x}, and the tables map it to frame {frame:#x}, which is free"
                ),
                self.tables_text(cpu, linear),
            ];
            self.raise(
                ViolationKind::MappedFreeFrame,
                cpu,
                Some(linear),
                Some(frame),
                lines,
            );
        }
    }

    /// Checks a translation that came from a cache.
    #[inline]
    pub(super) fn verify(
        &mut self,
        cpu: usize,
        context: &WalkContext,
        linear: u64,
        access: Access,
        entry: &TlbEntry,
        source: &'static str,
    ) {
        let physical = entry.translation.physical(linear);
        if self.frames.freed_since(physical >> 12, entry.origin.event) && !self.is_exempt(linear) {
            let fresh = walker::walk(&self.memory, context, linear, None, Touch::Nothing);
            let mapped = fresh
                .outcome
                .is_ok_and(|now| now.physical(linear) == physical);
            // An old table on the way is no crime where the last entry was read after the frame got its present owner, and
            // the tables agree.
            if !mapped || self.frames.freed_since(physical >> 12, entry.origin.read) {
                self.stats.stale_hits += 1;
                let kind = if mapped && self.frames.state(physical >> 12) == FrameState::Free {
                    ViolationKind::MappedFreeFrame
                } else {
                    ViolationKind::FreedFrame
                };
                self.stale(kind, cpu, linear, Some(access), entry, source);
                return;
            }
        }
        if !self.verify {
            return;
        }
        let fresh = walker::walk(&self.memory, context, linear, None, Touch::Nothing);
        if let Ok(now) = fresh.outcome
            && now.physical(linear) == physical
            && walker::check(context, now.rights, now.key, access).is_ok()
        {
            if access.kind == AccessKind::Write && !now.dirty {
                self.stats.stale_dirty += 1;
                if self.settled_since(context.root(), linear, entry.origin.step) {
                    self.stale(
                        ViolationKind::Unflushed,
                        cpu,
                        linear,
                        Some(access),
                        entry,
                        source,
                    );
                }
            }
            return;
        }
        self.stats.stale_hits += 1;
        let kind = if entry.tag != GLOBAL && entry.origin.root != context.root() {
            ViolationKind::ForeignSpace
        } else if self.table_freed(entry) {
            ViolationKind::FreedTable
        } else if self.settled_since(context.root(), linear, entry.origin.step) {
            ViolationKind::Unflushed
        } else {
            return;
        };
        self.stale(kind, cpu, linear, Some(access), entry, source);
    }

    /// Whether a table was freed that an entry rests on. A global entry serves every space, so it outlives the root that it was found
    /// through; all below that is as for others.
    pub(crate) fn table_freed(&self, entry: &TlbEntry) -> bool {
        let root = (entry.tag == GLOBAL).then_some(entry.origin.root >> 12);
        entry
            .origin
            .reached()
            .any(|(table, reached)| Some(table) != root && self.frames.freed_since(table, reached))
    }

    pub(crate) fn is_exempt(&self, linear: u64) -> bool {
        self.exempt
            .iter()
            .any(|&(first, last)| first <= linear && linear <= last)
    }

    fn settled_since(&self, root: u64, linear: u64, step: u64) -> bool {
        self.settled.iter().any(|settled| {
            settled.step >= step
                && settled.root.is_none_or(|of| of == root)
                && settled.first <= linear
                && linear <= settled.last
        })
    }

    /// Declares every change of these addresses up to step `as_of`, in the space of `root` (or in all), complete and flushed.
    pub(crate) fn settle(&mut self, root: Option<u64>, first: u64, last: u64, as_of: u64) {
        self.step += 1;
        // A newer declaration replaces what it covers.
        self.settled.retain(|old| {
            !(first <= old.first
                && old.last <= last
                && old.step <= as_of
                && (root.is_none() || root == old.root))
        });
        if self.settled.len() == MOST_SETTLED {
            self.settled.pop_front();
        }
        self.settled.push_back(Settled {
            root,
            first,
            last,
            step: as_of,
        });
    }

    /// Checks that a frame the kernel reaches for directly is not free.
    pub(crate) fn kernel_reaches(&mut self, cpu: usize, address: u64) {
        let frame = address >> 12;
        if self.frames.state(frame) == FrameState::Free {
            let line = format!(
                "CPU {cpu} asked for a pointer to physical address {address:#x}, and frame {frame:#x} is free"
            );
            self.raise(
                ViolationKind::KernelFreedFrame,
                cpu,
                None,
                Some(frame),
                vec![line],
            );
        }
    }

    /// Notes a change of owner of `count` frames.
    pub(crate) fn note_owner(
        &mut self,
        first: u64,
        count: u64,
        kind: FrameEventKind,
        cpu: usize,
        by: &'static Location<'static>,
    ) {
        self.step += 1;
        for frame in first..first.saturating_add(count) {
            let wrong = match (kind, self.frames.state(frame)) {
                (FrameEventKind::Allocated, FrameState::Allocated) => {
                    "given out while it was in use"
                }
                (FrameEventKind::Freed, FrameState::Free) => "freed while it was free",
                _ => "",
            };
            self.frames.note(frame, kind, self.step, cpu, Some(by));
            if !wrong.is_empty() {
                let line = format!(
                    "frame {frame:#x} was {wrong}, by {}:{}",
                    by.file(),
                    by.line()
                );
                self.raise(ViolationKind::Ownership, cpu, None, Some(frame), vec![line]);
            }
        }
    }
}
