//! hal's `FrameSource` and `FrameSink` on the machine: a pool for tests, and a wrapper that keeps the books for any other source.
//!
//! The pool hands out the block that was freed last: reuse at once is what brings a use after free to light.
//!
//! Invariants
//! - `I1` a block is in exactly one of: the bump area, a free list of its order, a caller's hands.
//! - `I2` a frame is noted as freed before anybody can get it again.

use std::sync::{Mutex, PoisonError};

use kmem_hal::{AllocError, Frame, FrameRequest, FrameSink, FrameSource, Order, OwnedFrame};

use crate::machine::Machine;
use crate::memory_map::MemoryKind;

/// Tells the machine of every block that a source gives and a sink takes.
#[derive(Debug, Clone, Copy)]
pub struct Tracked<'m, S> {
    machine: &'m Machine,
    inner: S,
}

impl<'m, S> Tracked<'m, S> {
    /// Watches `inner`.
    pub fn new(machine: &'m Machine, inner: S) -> Self {
        Self { machine, inner }
    }

    /// The source behind.
    pub fn inner(&self) -> &S {
        &self.inner
    }
}

// SAFETY: F1 to F3 are the inner source's.
unsafe impl<S: FrameSource> FrameSource for Tracked<'_, S> {
    #[track_caller]
    fn alloc(&self, request: &FrameRequest) -> Result<OwnedFrame, AllocError> {
        let frame = self.inner.alloc(request)?;
        self.machine
            .note_allocated(frame.first().number(), frame.order().frames());
        Ok(frame)
    }
    kmem_hal::forward_nodes!(inner);
}

impl<S: FrameSink> FrameSink for Tracked<'_, S> {
    #[track_caller]
    fn free(&self, frame: OwnedFrame) {
        self.machine
            .note_freed(frame.first().number(), frame.order().frames());
        self.inner.free(frame);
    }
}

/// A simple source of the machine's RAM: free lists by order, last in first out, over a bump area. It never merges.
#[derive(Debug)]
pub struct FramePool<'m> {
    machine: &'m Machine,
    state: Mutex<PoolState>,
}

#[derive(Debug)]
struct PoolState {
    /// Whole frames of RAM not handed out yet, as (next, end).
    bump: Vec<(u64, u64)>,
    free: Vec<Vec<u64>>,
    in_use: u64,
    /// Allocations that still succeed; `None` for all of them.
    fuse: Option<u64>,
}

impl<'m> FramePool<'m> {
    /// All RAM of `machine` from frame `first` on.
    pub fn new(machine: &'m Machine, first: u64) -> Self {
        let ram = machine
            .memory()
            .map()
            .ranges()
            .iter()
            .filter(|range| range.kind == MemoryKind::Ram);
        let bump = ram
            .map(|range| (range.start.div_ceil(4096).max(first), range.end / 4096))
            .filter(|(start, end)| start < end)
            .collect();
        let free = vec![Vec::new(); usize::from(Order::MAX.get()) + 1];
        Self {
            machine,
            state: Mutex::new(PoolState {
                bump,
                free,
                in_use: 0,
                fuse: None,
            }),
        }
    }

    /// Frames in callers' hands.
    pub fn in_use(&self) -> u64 {
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .in_use
    }

    /// Lets the next `allocations` succeed and every later one fail; `None` lets all succeed again.
    pub fn set_fuse(&self, allocations: Option<u64>) {
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .fuse = allocations;
    }
}

impl PoolState {
    fn take(&mut self, request: &FrameRequest) -> Result<u64, AllocError> {
        match &mut self.fuse {
            Some(0) => return Err(AllocError::OutOfMemory),
            Some(left) => *left -= 1,
            None => {}
        }
        let frames = request.order.frames();
        let align = frames.max(request.alignment.frames());
        let below = request.max_address.as_u64() / 4096;
        let fits = |first: u64| {
            first.is_multiple_of(align)
                && first
                    .checked_add(frames - 1)
                    .is_some_and(|last| last <= below)
        };
        let list = &mut self.free[request.order.index()];
        if let Some(at) = list.iter().rposition(|&first| fits(first)) {
            return Ok(list.remove(at));
        }
        for (next, end) in &mut self.bump {
            let first = next.next_multiple_of(align);
            if first.checked_add(frames).is_some_and(|after| after <= *end) && fits(first) {
                // What alignment skips stays unused: this pool is for tests.
                *next = first + frames;
                return Ok(first);
            }
        }
        Err(AllocError::OutOfMemory)
    }
}

// SAFETY: F1: I1; RAM only, and the machine reports whoever still translates to a freed block; F2: `take` checks order, alignment
// and limit, zeroing happens here, and the machine's nodes are not told apart (a strict node is refused); F3: `take` changes nothing
// on failure.
unsafe impl FrameSource for FramePool<'_> {
    #[track_caller]
    fn alloc(&self, request: &FrameRequest) -> Result<OwnedFrame, AllocError> {
        if let kmem_hal::NodePolicy::Strict(node) = request.node
            && (node.get() != 0 || self.machine.memory().map().nodes() > 1)
        {
            return Err(AllocError::Unsatisfiable);
        }
        let first = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let first = state.take(request)?;
            state.in_use += request.order.frames();
            first
        };
        self.machine.note_allocated(first, request.order.frames());
        if request.zeroed {
            // Also gives the host its memory back, so that a pool that is used and freed stays small.
            self.machine.memory().discard(first, request.order.frames());
        }
        // SAFETY: O1: I1; O2: `take` aligned it; O3: as F1 above.
        Ok(unsafe { OwnedFrame::from_raw(Frame::from_number(first), request.order) })
    }
}

impl FrameSink for FramePool<'_> {
    #[track_caller]
    fn free(&self, frame: OwnedFrame) {
        let (first, order) = frame.into_raw();
        // I2
        self.machine.note_freed(first.number(), order.frames());
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.free[order.index()].push(first.number());
        state.in_use -= order.frames();
    }
}
