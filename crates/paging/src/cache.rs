//! Frames for tables: fresh ones, reserved ones, and those that are known to be zero.
//!
//! A table that unmap emptied holds 512 zeros (`N2`), so after flush and grace period it is as good as a fresh one
//! without the half microsecond of zeroing a cold page. [`TableCache`] keeps such frames; [`TableReserve`] holds the
//! frames that an operation will need, taken before its first store.
//!
//! ```text
//!   FrameSource ──zeroed──> TableReserve ──> attached tables ──> gather ──flush, grace──> TableCache
//!        ▲                      ▲                                                            │ │
//!        │                      └────────────────────────────────────────────────────────────┘ │
//!        └───────────────────────────── over capacity, shrink ─────────────────────────────────┘
//! ```
//!
//! Invariants
//! - `T1`: a frame on a list here belongs to the list alone, holds zeros, lies in reach of the map, has a slot, and no TLB
//!   or paging-structure cache of any CPU refers to it.
//!
//! Costs: a list operation is a lock and two stores into slots; no memory beyond the slots.

use core::fmt;

use kmem_hal::lock::{IrqSafe, Lock};
use kmem_hal::{
    AllocError, Context, Frame, FrameRequest, FrameSink, FrameSource, FrameTag, Order, OwnedFrame,
    PhysAddr, PhysMap,
};

use crate::env::Env;
use crate::format::Format;
use crate::node;

#[derive(Debug)]
struct List {
    head: Option<Frame>,
    length: usize,
}

/// Emptied tables, known to be zero, ready to be tables again.
///
/// Belongs to an [`Env`]; shared by all its page tables.
#[derive(Debug)]
pub struct TableCache {
    list: Lock<List, IrqSafe>,
    capacity: usize,
}

impl TableCache {
    /// Tables that are kept when nobody says otherwise: 1 MiB.
    pub const DEFAULT_CAPACITY: usize = 256;

    kmem_hal::const_new! {
        /// A cache that keeps up to `capacity` tables.
        #[must_use]
        pub fn new(capacity: usize) -> Self {
            Self {
                list: Lock::new(List { head: None, length: 0 }),
                capacity,
            }
        }
    }

    /// Tables kept now.
    #[must_use]
    pub fn length(&self) -> usize {
        self.list.lock().length
    }

    /// Gives up to `count` tables back to the environment's frames; answers how many.
    ///
    /// `env` is the environment that the cache belongs to.
    pub fn shrink<E: Env>(env: &E, count: usize) -> usize {
        for done in 0..count {
            match env.cache().pop(env) {
                Some(frame) => free(env, frame),
                None => return done,
            }
        }
        count
    }

    fn pop<E: Env>(&self, env: &E) -> Option<OwnedFrame> {
        let mut list = self.list.lock();
        let frame = list.head?;
        let slot = env.slots().slot(frame)?;
        list.head = node::next(slot);
        list.length -= 1;
        drop(list);
        // SAFETY: O1, O3: the list owned the frame (T1); O2: order 0.
        Some(unsafe { OwnedFrame::from_raw(frame, Order::ZERO) })
    }

    /// Keeps a frame that `T1` holds for; gives it back where the cache is full.
    fn push<E: Env>(&self, env: &E, frame: OwnedFrame) -> Result<(), OwnedFrame> {
        let Some(slot) = env.slots().slot(frame.first()) else {
            return Err(frame);
        };
        let mut list = self.list.lock();
        if list.length >= self.capacity {
            return Err(frame);
        }
        let (frame, _) = frame.into_raw();
        slot.claim(FrameTag::Table, Order::ZERO);
        node::set_next(slot, list.head);
        list.head = Some(frame);
        list.length += 1;
        Ok(())
    }
}

/// Takes one zeroed frame for a table that lies below frame number `limit`.
pub(crate) fn take<E: Env>(env: &E, limit: u64) -> Result<OwnedFrame, AllocError> {
    let reach = env.map().reach();
    let limit = limit.min(reach.end_number());
    // The common case; a root below 4 GiB must not get any other frame.
    if let Some(frame) = env.cache().pop(env) {
        if frame.first().number() < limit {
            return Ok(frame);
        }
        give(env, frame);
    }
    let top = limit << kmem_hal::PAGE_SHIFT;
    let request = FrameRequest {
        max_address: PhysAddr::new(top.wrapping_sub(1)),
        ..FrameRequest::ONE.zeroed().context(Context::Atomic)
    };
    let frame = env.frames().alloc(&request)?;
    if !reach.contains(frame.first()) || env.slots().slot(frame.first()).is_none() {
        env.frames().free(frame);
        return Err(AllocError::Unsatisfiable);
    }
    Ok(frame)
}

/// Keeps a zeroed frame for which `T1` holds, or frees it.
pub(crate) fn give<E: Env>(env: &E, frame: OwnedFrame) {
    if let Err(frame) = env.cache().push(env, frame) {
        free(env, frame);
    }
}

/// Frees a frame whose slot may say that it is a table.
fn free<E: Env>(env: &E, frame: OwnedFrame) {
    if let Some(slot) = env.slots().slot(frame.first()) {
        slot.release();
    }
    env.frames().free(frame);
}

/// Frames for tables, taken before the first store of an operation. Gives back what is left when it is dropped.
///
/// # Examples
///
/// An operation on a range that draws from a reserve cannot run out of memory half-way; see
/// [`PageTable::reserve`](crate::PageTable::reserve).
#[must_use = "a reserve that is dropped gives its frames back"]
pub struct TableReserve<'e, E: Env> {
    env: &'e E,
    list: List,
}

impl<'e, E: Env> TableReserve<'e, E> {
    pub(crate) fn empty(env: &'e E) -> Self {
        Self {
            env,
            list: List {
                head: None,
                length: 0,
            },
        }
    }

    /// Takes frames until there are `count`.
    pub(crate) fn fill<F: Format>(&mut self, count: usize) -> Result<(), AllocError> {
        while self.list.length < count {
            let frame = take(self.env, F::TABLE_FRAME_LIMIT)?;
            let (frame, _) = frame.into_raw();
            if let Some(slot) = self.env.slots().slot(frame) {
                slot.claim(FrameTag::Table, Order::ZERO);
                node::set_next(slot, self.list.head);
            }
            self.list.head = Some(frame);
            self.list.length += 1;
        }
        Ok(())
    }

    /// Frames in it.
    #[must_use]
    pub fn length(&self) -> usize {
        self.list.length
    }

    pub(crate) fn take(&mut self) -> Option<OwnedFrame> {
        let frame = self.list.head?;
        let slot = self.env.slots().slot(frame)?;
        self.list.head = node::next(slot);
        self.list.length -= 1;
        // SAFETY: O1, O3: the list owned the frame (T1); O2: order 0.
        Some(unsafe { OwnedFrame::from_raw(frame, Order::ZERO) })
    }
}

impl<E: Env> Drop for TableReserve<'_, E> {
    fn drop(&mut self) {
        while let Some(frame) = self.take() {
            give(self.env, frame);
        }
    }
}

impl<E: Env> fmt::Debug for TableReserve<'_, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TableReserve({} frames)", self.list.length)
    }
}
