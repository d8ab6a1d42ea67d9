//! The gather of a purge, in a frame of its own.
//!
//! What one flush serves is what one gather holds. One that makes a shootdown rare is too large for a kernel's stack, so it
//! lives in a frame that the first purge takes and later ones use again. Where there is no frame, or another CPU purges at
//! the same time, the purge makes do with a small gather and some flushes more.
//!
//! Invariant `I5`: `frame` is 0, or one more than the number of a frame that this value owns and whose pages only the call
//! that set `busy` touches.

use core::fmt;
use core::mem::MaybeUninit;

use kmem_hal::sync::{AtomicU32, AtomicU64, Ordering};
use kmem_hal::{
    Frame, FrameRequest, FrameSink, FrameSource, FrameTag, Order, OwnedFrame, PAGE_SIZE, PhysMap,
};
use kmem_paging::format::Format;
use kmem_paging::{Env, Gather, PageTable};

use crate::page::KernelPage;

/// Leaves that one shootdown of a purge serves at most.
pub const BATCH: usize = 240;

/// A frame for a gather of [`BATCH`] leaves.
pub(crate) struct Batch {
    frame: AtomicU64,
    busy: AtomicU32,
}

impl Batch {
    pub fn new() -> Self {
        Self {
            frame: AtomicU64::new(0),
            busy: AtomicU32::new(0),
        }
    }

    /// Gives `work` an empty gather; `false` where there is none now.
    pub fn with<'a, F: Format, E: Env>(
        &self,
        table: &'a PageTable<F, E, KernelPage>,
        work: impl FnOnce(&mut Gather<'a, F, E, KernelPage, BATCH>),
    ) -> bool {
        const {
            assert!(size_of::<Gather<'_, F, E, KernelPage, BATCH>>() <= PAGE_SIZE as usize);
        }
        if self.busy.swap(1, Ordering::Acquire) != 0 {
            return false;
        }
        let frame = self.frame(table.env());
        if let Some(frame) = frame {
            let place = table.env().map().to_ptr(frame.start());
            let place = place.cast::<MaybeUninit<Gather<'a, F, E, KernelPage, BATCH>>>();
            // SAFETY: P1: the frame is in reach, so a page is valid there, aligned to its size; `I5`: nobody else touches it
            // before `busy` is cleared.
            Gather::with_in(unsafe { &mut *place }, table, work);
        }
        self.busy.store(0, Ordering::Release);
        frame.is_some()
    }

    fn frame<E: Env>(&self, env: &E) -> Option<Frame> {
        if let Some(number) = self.frame.load(Ordering::Relaxed).checked_sub(1) {
            return Frame::new(number);
        }
        let frame = env.frames().alloc(&FrameRequest::ONE).ok()?;
        if !env.map().reach().contains(frame.first()) {
            env.frames().free(frame);
            return None;
        }
        let (first, _) = frame.into_raw();
        if let Some(slot) = env.slots().slot(first) {
            slot.claim(FrameTag::Kernel, Order::ZERO);
        }
        self.frame.store(first.number() + 1, Ordering::Relaxed);
        Some(first)
    }

    /// Frames that it holds.
    pub fn frame_count(&self) -> u64 {
        u64::from(self.frame.load(Ordering::Relaxed) != 0)
    }

    /// Frees the frame.
    pub fn free<E: Env>(&mut self, env: &E) {
        let kept = self.frame.swap(0, Ordering::Relaxed);
        if let Some(first) = kept.checked_sub(1).and_then(Frame::new) {
            if let Some(slot) = env.slots().slot(first) {
                slot.release();
            }
            // SAFETY: O1: `I5`, and `&mut self` says that no call uses it; O2: order 0; O3: it was never mapped by a table
            // of this crate.
            env.frames()
                .free(unsafe { OwnedFrame::from_raw(first, Order::ZERO) });
        }
    }
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let frame = self.frame.load(Ordering::Relaxed);
        write!(f, "Batch({:?})", frame.checked_sub(1))
    }
}
