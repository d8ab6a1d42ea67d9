//! Whose turn it is to purge, and the gather of a purge in a frame of its own.
//!
//! One purge at a time, as in Linux (`vmap_purge_lock`): a call that finds another under way waits for it, since what it wants gone
//! may be in the other's hands.
//!
//! What one flush serves is what one gather holds. One that makes a shootdown rare is too large for a kernel's stack, so it
//! lives in a frame that the first purge takes, before its turn, and later ones use again. Where there is no frame, the purge
//! makes do with a small gather and some flushes more.
//!
//! Invariant `I5`: `frame` is 0, or one more than the number of a frame that this value owns and whose pages only the [`Turn`]
//! touches. `busy` is 1 exactly while there is one, and no memory is asked for its sake.

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

/// The turn, and a frame for a gather of [`BATCH`] leaves.
pub(crate) struct Batch {
    frame: AtomicU64,
    busy: AtomicU32,
}

/// The right to purge, until it is dropped.
pub(crate) struct Turn<'b>(&'b Batch);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.busy.store(0, Ordering::Release);
    }
}

impl Batch {
    pub fn new() -> Self {
        Self {
            frame: AtomicU64::new(0),
            busy: AtomicU32::new(0),
        }
    }

    /// Waits until nobody purges.
    pub fn turn<E: Env>(&self, env: &E) -> Turn<'_> {
        while self.busy.swap(1, Ordering::Acquire) != 0 {
            while self.busy.load(Ordering::Relaxed) != 0 {
                env.relax();
            }
        }
        Turn(self)
    }

    /// A frame for the gather, for [`Turn::keep`]: it is taken before the turn, since the allocator may look for
    /// memory in the middle of the call, and ask for a purge.
    pub fn take_frame<E: Env>(env: &E) -> Option<OwnedFrame> {
        let frame = env.frames().alloc(&FrameRequest::ONE).ok()?;
        if !env.map().reach().contains(frame.first()) {
            env.frames().free(frame);
            return None;
        }
        Some(frame)
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

impl Turn<'_> {
    /// Keeps a frame, which is in reach, for the gathers of this turn and later ones.
    ///
    /// # Errors
    ///
    /// The frame, where somebody has given one before.
    pub fn keep<E: Env>(&mut self, frame: OwnedFrame, env: &E) -> Result<(), OwnedFrame> {
        let kept = &self.0.frame;
        if kept.load(Ordering::Relaxed) != 0 {
            return Err(frame);
        }
        let (first, _) = frame.into_raw();
        if let Some(slot) = env.slots().slot(first) {
            slot.claim(FrameTag::Kernel, Order::ZERO);
        }
        kept.store(first.number() + 1, Ordering::Relaxed);
        Ok(())
    }

    /// Gives `work` an empty gather; `false` where there is no frame for it.
    pub fn with<'a, F: Format, E: Env>(
        &mut self,
        table: &'a PageTable<F, E, KernelPage>,
        work: impl FnOnce(&mut Gather<'a, F, E, KernelPage, BATCH>),
    ) -> bool {
        const {
            assert!(size_of::<Gather<'_, F, E, KernelPage, BATCH>>() <= PAGE_SIZE as usize);
        }
        let number = self.0.frame.load(Ordering::Relaxed).checked_sub(1);
        let Some(frame) = number.and_then(Frame::new) else {
            return false;
        };
        let place = table.env().map().to_ptr(frame.start());
        let place = place.cast::<MaybeUninit<Gather<'a, F, E, KernelPage, BATCH>>>();
        // SAFETY: P1: the frame is in reach, so a page is valid there, aligned to its size; `I5`: this turn is the only one, and
        // its `&mut` keeps a second gather away.
        Gather::with_in(unsafe { &mut *place }, table, work);
        true
    }
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let frame = self.frame.load(Ordering::Relaxed);
        write!(f, "Batch({:?})", frame.checked_sub(1))
    }
}
