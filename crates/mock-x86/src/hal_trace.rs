//! hal's `Trace` on the machine: the library itself tells the detective what it does.
//!
//! | event | the machine notes |
//! |---|---|
//! | `FrameAllocated`, `FrameFreed` | the owner of the frames |
//! | `Mapped`, `Unmapped`, `Restricted` | history, and when the pages changed |
//! | `Flushed` | the changes of those pages by this CPU, up to the last one it reported, count as flushed |
//!
//! So a library that reports its changes and its commits is checked against itself: after `Flushed`, an access of
//! any CPU through an entry that is older than the change is a violation.
//!
//! Use either this or [`Tracked`](crate::Tracked) for owners, not both: the second note would be a double allocation.

use std::collections::VecDeque;

use kmem_hal::{FlushScope, Frame, Order, PageRange, Trace, TraceEvent};

use crate::frames::FrameEventKind;
use crate::machine::{Inner, Machine};

const MOST_CHANGES: usize = 256;

/// Changes of tables that a CPU has reported and not yet reported as flushed.
#[derive(Debug)]
pub(crate) struct Changes {
    /// First and last linear address and step, by CPU.
    pending: Vec<VecDeque<(u64, u64, u64)>>,
}

impl Changes {
    pub(crate) fn new(cpus: usize) -> Self {
        Self {
            pending: (0..cpus).map(|_| VecDeque::new()).collect(),
        }
    }
}

impl Inner {
    fn changed(&mut self, cpu: usize, range: PageRange) {
        self.core.step += 1;
        let (first, last) = bounds(range);
        let queue = &mut self.changes.pending[cpu];
        if queue.len() == MOST_CHANGES {
            queue.pop_front();
        }
        queue.push_back((first, last, self.core.step));
    }

    /// The step of this CPU's last change inside of the range, and forgets those changes.
    fn take_changes(&mut self, cpu: usize, first: u64, last: u64) -> Option<u64> {
        let queue = &mut self.changes.pending[cpu];
        let inside = |change: &(u64, u64, u64)| change.0 <= last && change.1 >= first;
        let newest = queue
            .iter()
            .filter(|change| inside(change))
            .map(|change| change.2)
            .max();
        queue.retain(|change| !inside(change));
        newest
    }
}

fn bounds(range: PageRange) -> (u64, u64) {
    (
        range.start().as_u64(),
        range.last().start().as_u64() | 0xfff,
    )
}

impl Machine {
    #[track_caller]
    fn trace_owner(&self, frame: Frame, order: Order, kind: FrameEventKind) {
        match kind {
            FrameEventKind::Allocated => self.note_allocated(frame.number(), order.frames()),
            _ => self.note_freed(frame.number(), order.frames()),
        }
    }
}

impl Trace for Machine {
    #[track_caller]
    fn event(&self, event: TraceEvent) {
        let cpu = self.current_cpu();
        match event {
            TraceEvent::FrameAllocated(frame, order) => {
                self.trace_owner(frame, order, FrameEventKind::Allocated)
            }
            TraceEvent::FrameFreed(frame, order) => {
                self.trace_owner(frame, order, FrameEventKind::Freed)
            }
            TraceEvent::Mapped(range, frame) => {
                self.note_mapping(frame.number(), range.start().as_u64(), true)
            }
            TraceEvent::Unmapped(range) | TraceEvent::Restricted(range) => {
                self.with(|inner| inner.changed(cpu, range));
            }
            TraceEvent::Flushed(request) => {
                let (first, last) = match request.scope {
                    FlushScope::Pages { range, .. } => bounds(range),
                    _ => (0, u64::MAX),
                };
                let root = request.root.frame.start().as_u64();
                self.with(|inner| {
                    if let Some(as_of) = inner.take_changes(cpu, first, last) {
                        inner.core.settle(Some(root), first, last, as_of);
                    }
                });
            }
            _ => {}
        }
    }
}
