//! Frames for tables: fresh ones, reserved ones, and those that are known to be zero.
//!
//! A table that unmap emptied holds 512 zeros (`N2`), so after flush and grace period it is as good as a fresh one
//! without the half microsecond of zeroing a cold page. [`TableCache`] keeps such frames; a cursor's `TableReserve` holds
//! the frames that an operation will need, taken before its first store.
//!
//! ```text
//!   FrameSource ──zeroed──> TableReserve ──> attached tables ──> gather ──flush, grace──> TableCache
//!        ▲                      ▲                                                            │ │
//!        │                      └────────────────────────────────────────────────────────────┘ │
//!        └───────────────────────────── over capacity, shrink ─────────────────────────────────┘
//! ```
//!
//! A grace period costs an interrupt for each CPU, and the tables of one commit are seldom enough to pay for it. So flushed tables wait until
//! there are some of them ([`retire`]), and one grace period serves all.
//!
//! Invariants
//! - `T1`: a frame on a list here belongs to the list alone, holds zeros, lies in reach of the map, has a slot, and no TLB
//!   or paging-structure cache of any CPU refers to it.
//!
//! - `T2`: a frame that waits is as `T1` says, but that lock-free readers may still be in it.
//!
//! Costs: a list operation is a lock and two stores into slots; no memory beyond the slots.

use kmem_hal::lock::{IrqSafe, Lock};
use kmem_hal::{
    AllocError, Context, Frame, FrameRequest, FrameSink, FrameSlot, FrameSource, FrameTag, Grace,
    Order, OwnedFrame, PhysAddr, PhysMap,
};

use crate::env::Env;
use crate::format::{Format, Word};
use crate::mutants::mutant;
use crate::node;

/// Frames linked through their slots, newest first.
#[derive(Debug)]
pub(crate) struct Chain {
    head: Option<Frame>,
    tail: Option<Frame>,
    length: usize,
}

impl Chain {
    pub const EMPTY: Self = Self {
        head: None,
        tail: None,
        length: 0,
    };

    #[inline]
    pub fn is_empty(&self) -> bool {
        self.head.is_none()
    }

    #[inline]
    pub fn length(&self) -> usize {
        self.length
    }

    /// The newest.
    #[inline]
    pub fn first(&self) -> Option<Frame> {
        self.head
    }

    /// Puts a frame in front.
    #[inline]
    pub fn push(&mut self, frame: Frame, slot: &FrameSlot) {
        node::set_next(slot, self.head);
        self.head = Some(frame);
        self.tail = self.tail.or(Some(frame));
        self.length += 1;
    }

    /// Takes the newest frame out, whose slot this is.
    #[inline]
    pub fn pop(&mut self, slot: &FrameSlot) {
        self.head = node::next(slot);
        self.length -= 1;
        if self.head.is_none() {
            self.tail = None;
        }
    }

    /// Takes the newest frame out.
    fn take<E: Env>(&mut self, env: &E) -> Option<Frame> {
        let frame = self.head?;
        self.pop(env.slots().slot(frame)?);
        Some(frame)
    }

    /// Puts a zeroed frame that `T1` holds for in front.
    pub fn put<E: Env>(&mut self, env: &E, frame: OwnedFrame) {
        let (frame, _) = frame.into_raw();
        if let Some(slot) = env.slots().slot(frame) {
            slot.claim(FrameTag::Table, Order::ZERO);
            self.push(frame, slot);
        }
    }

    /// Takes the newest frame of a list that owns its frames.
    pub fn take_frame<E: Env>(&mut self, env: &E) -> Option<OwnedFrame> {
        let frame = self.take(env)?;
        // SAFETY: O1, O3: the list owned the frame (T1); O2: order 0.
        Some(unsafe { OwnedFrame::from_raw(frame, Order::ZERO) })
    }

    /// Takes the newest frame below number `limit` out, of a list that owns its frames.
    #[cold]
    fn take_below<E: Env>(&mut self, env: &E, limit: u64) -> Option<OwnedFrame> {
        let mut newer: Option<(Frame, &FrameSlot)> = None;
        let mut at = self.head;
        while let Some(frame) = at {
            let slot = env.slots().slot(frame)?;
            if frame.number() >= limit {
                newer = Some((frame, slot));
                at = node::next(slot);
                continue;
            }
            match newer {
                None => self.pop(slot),
                Some((newer, above)) => {
                    node::set_next(above, node::next(slot));
                    self.length -= 1;
                    if self.tail == Some(frame) {
                        self.tail = Some(newer);
                    }
                }
            }
            // SAFETY: O1, O3: the list owned the frame (T1); O2: order 0.
            return Some(unsafe { OwnedFrame::from_raw(frame, Order::ZERO) });
        }
        None
    }

    /// Puts all of `front` in front.
    fn prepend<E: Env>(&mut self, env: &E, front: Self) {
        let Some(slot) = front.tail.and_then(|tail| env.slots().slot(tail)) else {
            return;
        };
        node::set_next(slot, self.head);
        self.head = front.head;
        self.tail = self.tail.or(front.tail);
        self.length += front.length;
    }

    /// Takes up to `count` frames off the front.
    fn split_front<E: Env>(&mut self, env: &E, count: usize) -> Self {
        let mut front = Self::EMPTY;
        if count >= self.length {
            return core::mem::replace(self, front);
        }
        front.head = self.head;
        while front.length < count {
            let Some(frame) = self.head else { break };
            let Some(slot) = env.slots().slot(frame) else {
                break;
            };
            self.pop(slot);
            front.tail = Some(frame);
            front.length += 1;
        }
        if let Some(slot) = front.tail.and_then(|tail| env.slots().slot(tail)) {
            node::set_next(slot, None);
        } else {
            front.head = None;
        }
        front
    }
}

/// Emptied tables, known to be zero, ready to be tables again.
///
/// Belongs to an [`Env`]; shared by all its page tables.
///
/// What waits for its grace period serves no cursor, which could not wait for it: where memory is short, [`shrink`](Self::shrink) is what
/// gives it back.
#[derive(Debug)]
pub struct TableCache {
    list: Lock<Chain, IrqSafe>,
    /// Tables that wait for their grace period (`T2`).
    waiting: Lock<Chain, IrqSafe>,
    capacity: usize,
}

/// The most tables that wait for a grace period: 256 KiB.
const MOST_WAITING: usize = 64;

impl TableCache {
    /// Tables that are kept when nobody says otherwise: 1 MiB.
    pub const DEFAULT_CAPACITY: usize = 256;

    kmem_hal::const_new! {
        /// A cache that keeps up to `capacity` tables, and lets a quarter as many wait for a grace period, 64 at most.
        #[must_use]
        pub fn new(capacity: usize) -> Self {
            Self {
                list: Lock::new(Chain::EMPTY),
                waiting: Lock::new(Chain::EMPTY),
                capacity,
            }
        }
    }

    /// Tables kept now, those that wait for a grace period included.
    #[must_use]
    pub fn length(&self) -> usize {
        self.list.lock().length + self.waiting.lock().length
    }

    /// Gives up to `count` tables back to the environment's frames; answers how many.
    ///
    /// `env` is the environment that the cache belongs to.
    ///
    /// Context: may wait for a grace period: not in interrupts, and not inside a read section of the environment's [`Grace`].
    pub fn shrink<E: Env>(env: &E, count: usize) -> usize {
        for done in 0..count {
            let frame = env.cache().pop(env).or_else(|| {
                env.cache().settle(env, 0);
                env.cache().pop(env)
            });
            match frame {
                Some(frame) => free(env, frame),
                None => return done,
            }
        }
        count
    }

    /// Where more than `most` tables wait, waits for a grace period with them, and keeps or frees them; whether it did.
    fn settle<E: Env>(&self, env: &E, most: usize) -> bool {
        let due = {
            let mut waiting = self.waiting.lock();
            if waiting.length <= most {
                return false;
            }
            core::mem::replace(&mut *waiting, Chain::EMPTY)
        };
        // Lock-free readers may be in the tables until now.
        if !mutant!("tables-freed-without-grace") {
            env.grace().synchronize();
        }
        // SAFETY: T2, and the grace period that it waits for: so T1 holds.
        unsafe { give_chain(env, due) };
        true
    }

    /// Takes the newest frame below number `limit`.
    fn pop_below<E: Env>(&self, env: &E, limit: u64) -> Option<OwnedFrame> {
        self.list.lock().take_below(env, limit)
    }

    fn pop<E: Env>(&self, env: &E) -> Option<OwnedFrame> {
        self.list.lock().take_frame(env)
    }

    /// Takes up to `count` frames.
    fn pop_chain<E: Env>(&self, env: &E, count: usize) -> Chain {
        self.list.lock().split_front(env, count)
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
        list.push(frame, slot);
        Ok(())
    }

    /// Keeps frames that `T1` holds for, as far as there is room; gives the others back.
    fn push_chain<E: Env>(&self, env: &E, mut frames: Chain) -> Chain {
        let mut list = self.list.lock();
        let room = self.capacity.saturating_sub(list.length);
        let front = frames.split_front(env, room);
        list.prepend(env, front);
        frames
    }
}

/// Takes tables that were detached and flushed, to be kept or freed after a grace period.
///
/// # Safety
///
/// `T2` holds for each, and their slots say that they are tables.
pub(crate) unsafe fn retire<E: Env>(env: &E, tables: Chain) {
    let cache = env.cache();
    cache.waiting.lock().prepend(env, tables);
    cache.settle(env, (cache.capacity / 4).min(MOST_WAITING));
}

/// Keeps zeroed frames, or frees them.
///
/// # Safety
///
/// `T1` holds for each, and their slots say that they are tables.
pub(crate) unsafe fn give_chain<E: Env>(env: &E, frames: Chain) {
    if frames.is_empty() {
        return;
    }
    let mut rest = env.cache().push_chain(env, frames);
    while let Some(frame) = rest.take(env) {
        // SAFETY: O1, O3: the chain owned the frame (T1); O2: order 0.
        free(env, unsafe { OwnedFrame::from_raw(frame, Order::ZERO) });
    }
}

/// Takes one frame for a table whose words will all be written before anybody sees them: zeroed or not.
pub(crate) fn take_plain<E: Env>(env: &E, limit: u64) -> Result<OwnedFrame, AllocError> {
    // Known-zero ones are of more use elsewhere, but not if this is all there is.
    fresh(env, limit, FrameRequest::ONE)
}

/// Takes one zeroed frame for a table that lies below frame number `limit`.
pub(crate) fn take<E: Env>(env: &E, limit: u64) -> Result<OwnedFrame, AllocError> {
    // The common case; a root below 4 GiB must not get any other frame.
    if let Some(frame) = env.cache().pop(env) {
        if frame.first().number() < limit.min(env.map().reach().end_number()) {
            return Ok(frame);
        }
        give(env, frame);
    }
    let zeroed = if mutant!("tables-not-zeroed") {
        FrameRequest::ONE
    } else {
        FrameRequest::ONE.zeroed()
    };
    fresh(env, limit, zeroed)
}

/// As [`take`], for a caller that may wait for a grace period: where there is no other frame, those that wait for one are waited for.
pub(crate) fn take_waiting<E: Env>(env: &E, limit: u64) -> Result<OwnedFrame, AllocError> {
    match take(env, limit) {
        Err(_) if !mutant!("cache-keeps-who-waits") && env.cache().settle(env, 0) => {
            take(env, limit)
        }
        taken => taken,
    }
}

/// Takes one frame below number `limit` from the environment, or, if there is none, whichever of the cache's lies there.
fn fresh<E: Env>(env: &E, limit: u64, request: FrameRequest) -> Result<OwnedFrame, AllocError> {
    let reach = env.map().reach();
    let limit = limit.min(reach.end_number());
    let top = limit << kmem_hal::PAGE_SHIFT;
    let request = FrameRequest {
        max_address: PhysAddr::new(top.wrapping_sub(1)),
        ..request.context(Context::Atomic)
    };
    let taken = env.frames().alloc(&request).and_then(|frame| {
        if reach.contains(frame.first()) && env.slots().slot(frame.first()).is_some() {
            return Ok(frame);
        }
        env.frames().free(frame);
        Err(AllocError::Unsatisfiable)
    });
    taken.or_else(|error| env.cache().pop_below(env, limit).ok_or(error))
}

/// Keeps a zeroed frame for which `T1` holds, or frees it.
pub(crate) fn give<E: Env>(env: &E, frame: OwnedFrame) {
    if let Err(frame) = env.cache().push(env, frame) {
        free(env, frame);
    }
}

/// Frees a frame whose slot may say that it is a table, whatever its words are.
pub(crate) fn free<E: Env>(env: &E, frame: OwnedFrame) {
    if let Some(slot) = env.slots().slot(frame.first()) {
        slot.release();
    }
    env.frames().free(frame);
}

/// A cursor's frames for tables, taken before the first store of an operation. Gives back what is left when it is dropped.
pub(crate) struct TableReserve<'e, E: Env> {
    env: &'e E,
    /// Zeroed.
    list: Chain,
    /// Not zeroed: for tables that are written whole.
    plain: Chain,
    /// How many frames to take from the cache at the next need.
    batch: usize,
}

/// The most frames that a cursor takes from the cache at once, beyond what it asked for.
const MOST_AT_ONCE: usize = 16;

impl<'e, E: Env> TableReserve<'e, E> {
    #[inline]
    pub(crate) fn empty(env: &'e E) -> Self {
        Self {
            env,
            list: Chain::EMPTY,
            plain: Chain::EMPTY,
            batch: 1,
        }
    }

    /// Takes zeroed frames until there are `count`.
    pub(crate) fn fill<F: Format>(&mut self, count: usize) -> Result<(), AllocError> {
        while self.list.length() < count {
            let frame = take(self.env, F::TABLE_FRAME_LIMIT)?;
            self.list.put(self.env, frame);
        }
        Ok(())
    }

    /// Takes frames that need not be zeroed until there are `count`.
    pub(crate) fn fill_plain<F: Format>(&mut self, count: usize) -> Result<(), AllocError> {
        while self.plain.length() < count {
            let frame = take_plain(self.env, F::TABLE_FRAME_LIMIT)?;
            self.plain.put(self.env, frame);
        }
        Ok(())
    }

    /// Frames in it.
    pub(crate) fn length(&self) -> usize {
        self.list.length() + self.plain.length()
    }

    /// A zeroed frame of the reserve.
    pub(crate) fn take(&mut self) -> Option<OwnedFrame> {
        self.list.take_frame(self.env)
    }

    /// A frame of the reserve that need not be zeroed.
    pub(crate) fn take_plain(&mut self) -> Option<OwnedFrame> {
        self.plain.take_frame(self.env)
    }

    /// A frame of which every word will be written: of the reserve, or fresh.
    pub(crate) fn take_unzeroed<F: Format>(&mut self) -> Result<OwnedFrame, AllocError> {
        match self.take_plain().or_else(|| self.take()) {
            Some(frame) => Ok(frame),
            None => take_plain(self.env, F::TABLE_FRAME_LIMIT),
        }
    }

    /// A zeroed frame: of the reserve, of the cache (some more come along, twice as many each time), or fresh.
    #[inline]
    pub(crate) fn take_or_fresh<F: Format>(&mut self) -> Result<OwnedFrame, AllocError> {
        if self.list.is_empty() {
            self.hold::<F>(1)?;
        }
        self.take().ok_or(AllocError::Unsatisfiable)
    }

    /// Sees to it that there are `count` zeroed frames: of the cache, of those not zeroed, or fresh.
    ///
    /// # Errors
    ///
    /// The source's; what was found is kept for the next call.
    pub(crate) fn hold<F: Format>(&mut self, count: usize) -> Result<(), AllocError> {
        // Frames of the cache lie in reach; a format with a smaller space has them looked at one by one.
        let all_fit = F::TABLE_FRAME_LIMIT >= 1 << 40;
        while self.list.length() < count {
            if all_fit {
                let cached = self.env.cache().pop_chain(self.env, self.batch);
                self.batch = (self.batch * 2).min(MOST_AT_ONCE);
                if !cached.is_empty() {
                    self.list.prepend(self.env, cached);
                    continue;
                }
            }
            let frame = match self.take_plain() {
                Some(frame) => {
                    // SAFETY: the frame is the reserve's own, and in reach.
                    for word in unsafe { F::Word::words(self.env.map(), frame.first()) } {
                        F::Word::store(word, 0);
                    }
                    frame
                }
                None => match take(self.env, F::TABLE_FRAME_LIMIT) {
                    Ok(frame) => frame,
                    Err(error) => {
                        if mutant!("grow-leaks") {
                            self.list = Chain::EMPTY;
                        }
                        return Err(error);
                    }
                },
            };
            self.list.put(self.env, frame);
        }
        Ok(())
    }
}

impl<E: Env> Drop for TableReserve<'_, E> {
    #[inline]
    fn drop(&mut self) {
        let frames = core::mem::replace(&mut self.list, Chain::EMPTY);
        // SAFETY: T1 holds for what is on the list, and `push` or the cache marked the slots.
        unsafe { give_chain(self.env, frames) };
        while let Some(frame) = self.take_plain() {
            free(self.env, frame);
        }
    }
}
