//! What all address spaces of a kernel share: the environment, the zero page, and pages' lives.
//!
//! ```text
//!   new_anonymous ── 1 mapping ─────────────────────────┐
//!   new_page ── 1 reference (the maker's) ── +1 mapping ┴ ... ── last mapping gone, 0 references ── free_page
//! ```
//!
//! Invariants
//! - `I1`: a [`PageRef`] stands for one mapping counted in the frame's slot; one of device memory, whose frames are no pages, is not
//!   counted (`device.rs`).
//! - `I2`: the zero page always has a reference of the `Mm`'s own, so no mapping's end frees it.
//! - `I3`: an anonymous page is exclusive while it has one mapping and that mapping's reference only; or pins, and was exclusive (`EXCLUSIVE`)
//!   when it got the first; its table counts them then. Whether the mapping is one space's alone its table says: a shared table's leaves are mapped once and seen by
//!   many. So a second mapping costs one count, and the bit may stay.

use core::marker::PhantomData;

use kmem_hal::sync::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use kmem_hal::{
    Frame, FrameHandle, FrameRange, FrameRequest, FrameSink, FrameSlot, FrameSource, FrameTag,
    Order, OwnedFrame, PhysMap, SleepLock, SlotFlags, UserSlot,
};
use kmem_paging::Env as PagingEnv;

use crate::commit::Commit;
use crate::env::Env;
use crate::errno::Errno;
use crate::meminfo::Counts;
use crate::mutants::mutant;
use crate::names::{NameLock, Names};
use crate::object::ObjectList;
use crate::pin::PIN;
use crate::registry::Registry;
use crate::swap::Swap;
use crate::transfer::Transfers;

/// What every address space of a kernel shares.
///
/// Whatever is given to it lives for `'m`: providers of files, devices of swap, names. So no other lifetime can be taken for `'m`:
///
/// ```compile_fail
/// # use kmem_cow_mm::{Env, Errno, FileRef, Mm};
/// # use kmem_hal::PageProvider;
/// fn open<E: Env>(mm: &Mm<'_, E>, local: &(dyn PageProvider + Sync)) -> Result<FileRef, Errno> {
///     mm.open_file(local, "gone soon", 0)
/// }
/// ```
///
/// ```
/// # use kmem_cow_mm::{Env, Errno, FileRef, Mm};
/// # use kmem_hal::PageProvider;
/// fn open<'m, E: Env>(mm: &Mm<'m, E>, kept: &'m (dyn PageProvider + Sync)) -> Result<FileRef, Errno> {
///     mm.open_file(kept, "lives as long as what maps it", 0)
/// }
/// ```
#[derive(Debug)]
pub struct Mm<'m, E: Env> {
    env: &'m E,
    /// What objects and swap point to without saying so: a shorter `'m` would let them outlive it.
    given: PhantomData<fn(&'m ()) -> &'m ()>,
    zero: Frame,
    registry: Registry<E::Lock>,
    commit: Commit,
    names: NameLock<E::Lock>,
    objects: ObjectList<E::Lock>,
    swap: Swap,
    transfers: SleepLock<Transfers, E::Lock>,
    counts: Counts,
    numbers: AtomicU32,
    anon_ids: AtomicU64,
    /// Whether there has been a droppable mapping.
    droppable: AtomicBool,
}

/// One mapping of a page: what a leaf of a user table stands for (`I1`).
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a dropped mapping keeps its page for ever; give it to Mm::put"]
pub struct PageRef {
    frame: Frame,
}

impl PageRef {
    /// The page.
    #[must_use]
    pub const fn frame(&self) -> Frame {
        self.frame
    }

    /// A mapping of device memory, which nobody counts.
    pub(crate) const fn of_device(frame: Frame) -> Self {
        Self { frame }
    }
}

// SAFETY: H1, H2: the mapping's count passes through the numbers; single frames are naturally aligned.
unsafe impl FrameHandle for PageRef {
    fn into_entry(self) -> (Frame, Order) {
        (self.frame, Order::ZERO)
    }

    unsafe fn from_entry(first: Frame, _order: Order) -> Self {
        Self { frame: first }
    }
}

// SAFETY: D1: a mapping is always of a single frame, so there is nothing to divide.
unsafe impl kmem_paging::Divisible for PageRef {}

impl<'m, E: Env> Mm<'m, E> {
    /// Prepares to make address spaces: takes one frame for the zero page.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`].
    pub fn new(env: &'m E) -> Result<Self, Errno> {
        let mm = Self {
            env,
            given: PhantomData,
            zero: Frame::ZERO,
            registry: Registry::new(),
            commit: Commit::new(),
            names: NameLock::new(),
            objects: ObjectList::new(),
            swap: Swap::new(),
            transfers: SleepLock::new(Transfers::new()),
            counts: Counts::default(),
            numbers: AtomicU32::new(1),
            anon_ids: AtomicU64::new(1),
            droppable: AtomicBool::new(false),
        };
        let zero = mm.new_page(FrameTag::File, 0, 0, &FrameRequest::ONE.zeroed())?;
        Ok(Self { zero, ..mm })
    }

    /// Gives the zero page back.
    ///
    /// # Safety
    ///
    /// Every address space and object is gone, and none is made any more; this is called once.
    pub unsafe fn finish(&self) {
        self.put_reference(self.zero);
    }

    /// The environment.
    #[must_use]
    pub fn env(&self) -> &'m E {
        self.env
    }

    /// The page of zeros that first reads map.
    #[doc(alias = "ZERO_PAGE")]
    #[must_use]
    pub fn zero_page(&self) -> Frame {
        self.zero
    }

    /// What is promised to all spaces.
    pub(crate) fn commit(&self) -> &Commit {
        &self.commit
    }

    /// The names that programs gave to memory.
    pub(crate) fn names(&self) -> Names<'_, 'm, E> {
        Names(self)
    }

    pub(crate) fn name_lock(&self) -> &NameLock<E::Lock> {
        &self.names
    }

    /// Every space made with this.
    pub(crate) fn registry(&self) -> &Registry<E::Lock> {
        &self.registry
    }

    /// Every object made with this.
    pub(crate) fn objects(&self) -> &ObjectList<E::Lock> {
        &self.objects
    }

    pub(crate) fn swap(&self) -> &Swap {
        &self.swap
    }

    pub(crate) fn transfers(&self) -> &SleepLock<Transfers, E::Lock> {
        &self.transfers
    }

    /// Counts an event.
    pub(crate) fn count(&self, which: impl Fn(&Counts) -> &AtomicU64) {
        which(&self.counts).fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Notes that a mapping is made whose pages may go at any time.
    pub(crate) fn note_droppable(&self) {
        self.droppable.store(true, Ordering::Relaxed);
    }

    /// Whether there may be a page of such a mapping.
    pub(crate) fn has_droppable(&self) -> bool {
        self.droppable.load(Ordering::Relaxed)
    }

    /// A number for an object or a family. They come again after 2^32, but never 0, which is the zero page's.
    pub(crate) fn next_number(&self) -> u32 {
        loop {
            match self.numbers.fetch_add(1, Ordering::Relaxed) {
                0 => {}
                number => return number,
            }
        }
    }

    pub(crate) fn next_anon_id(&self) -> core::num::NonZeroU64 {
        let id = self.anon_ids.fetch_add(1, Ordering::Relaxed);
        core::num::NonZeroU64::new(id).unwrap_or(core::num::NonZeroU64::MIN)
    }

    #[inline]
    pub(crate) fn slot(&self, frame: Frame) -> &'m FrameSlot {
        match self.env.paging().slots().slot(frame) {
            Some(slot) => slot,
            None => unreachable!("E2: a frame of the source without a slot"),
        }
    }

    /// A page of its own with one reference, the caller's.
    pub(crate) fn new_page(
        &self,
        tag: FrameTag,
        object: u32,
        index: u64,
        request: &FrameRequest,
    ) -> Result<Frame, Errno> {
        let owned = self.env.paging().frames().alloc(request)?;
        let (frame, order) = owned.into_raw();
        match UserSlot::claim(
            self.slot(frame),
            tag,
            order,
            object,
            index & ((1 << 52) - 1),
        ) {
            Some(_) => Ok(frame),
            None => unreachable!("user pages are anonymous or of a file"),
        }
    }

    /// The first mapping of a new anonymous page, of zeros or a copy of `source`: one space's alone.
    #[inline]
    pub(crate) fn new_anonymous(
        &self,
        family: u32,
        index: u64,
        source: Option<Frame>,
    ) -> Result<PageRef, Errno> {
        let request = FrameRequest::ONE.movable();
        let request = if source.is_none() {
            request.zeroed()
        } else {
            request
        };
        let (frame, _) = self.env.paging().frames().alloc(&request)?.into_raw();
        if let Some(source) = source {
            // SAFETY: the caller keeps `source` referenced; `frame` is new and nobody else's; E2: both are in reach.
            unsafe { self.env.paging().map().copy(source, frame) };
        }
        UserSlot::claim_exclusive(self.slot(frame), family, index);
        Ok(PageRef { frame })
    }

    /// One more mapping of a page, for another table; anonymous pages are nobody's alone from now on. Also whether it is anonymous,
    /// so that a write through either mapping must copy.
    ///
    /// The caller holds the lock of a table that maps it.
    #[inline(always)]
    pub(crate) fn map_again(
        &self,
        near: &mut NearSlots<'m>,
        frame: Frame,
    ) -> Option<(PageRef, bool)> {
        let Some(page) = near.of(self, frame).and_then(FrameSlot::as_user) else {
            // Device memory.
            if mutant!("device-memory-stops-a-copy") {
                return None;
            }
            return Some((PageRef::of_device(frame), false));
        };
        // Looked at before the count: behind a locked instruction it would wait for it.
        let anonymous = page.slot().tag() == FrameTag::Anon;
        if page.add_mapping().is_err() && !mutant!("counts-wrap") {
            return None;
        }
        Some((PageRef { frame }, anonymous))
    }

    /// Whether a page is its mapper's alone: the licence to write to it in place, and to pin it. `pins` says how many pins its table counts:
    /// so many references that they could be a pin's are one only where that has some.
    ///
    /// The caller holds the lock of the table that maps it, and every table that leads there is its own space's: so nobody
    /// maps the page anew meanwhile.
    #[doc(alias = "PageAnonExclusive")]
    #[doc(alias = "wp_can_reuse_anon_folio")]
    #[inline]
    pub(crate) fn is_exclusive(&self, frame: Frame, pins: impl FnOnce() -> u32) -> bool {
        let page = self.user(frame);
        let shared = page.mappings() != 1 && !mutant!("shared-stays-exclusive");
        if page.slot().tag() != FrameTag::Anon || shared {
            return false;
        }
        if mutant!("mappings-alone-decide") {
            return true;
        }
        let exclusive = page.slot().flags().contains(SlotFlags::EXCLUSIVE);
        match page.references() {
            // Nobody looks at it but its one mapping.
            1 => {
                if !exclusive {
                    page.slot().set_flags(SlotFlags::EXCLUSIVE);
                }
                true
            }
            // Pinned while it was exclusive; whoever else looks at it, it stays with its pins.
            PIN.. => exclusive && (pins() > 0 || mutant!("references-are-pins")),
            _ => mutant!("reuse-ignores-references"),
        }
    }

    /// A mapping of a page on which the caller holds a reference or the lock that keeps it mapped.
    pub(crate) fn map_page(&self, frame: Frame) -> Result<PageRef, Errno> {
        let page = self.user(frame);
        page.add_mapping().map_err(|_| Errno::ENOMEM)?;
        Ok(PageRef { frame })
    }

    /// Ends a mapping whose translation has been flushed everywhere.
    #[inline]
    pub(crate) fn put(&self, mapping: PageRef) {
        let frame = mapping.frame;
        if let Some(page) = self.counted(frame)
            && page.sub_mapping() == Ok((0, 0))
        {
            self.free_page(frame, Order::ZERO);
        }
    }

    /// Takes a reference away; the last one frees the page.
    pub(crate) fn put_reference(&self, frame: Frame) {
        if let Some(page) = self.slot(frame).as_user()
            && page.sub_reference() == Ok(0)
        {
            self.free_page(frame, Order::ZERO);
        }
    }

    /// Takes several references away; the last one frees the page.
    pub(crate) fn put_references(&self, frame: Frame, count: u32) {
        if self.slot(frame).sub_count(count) == Ok(0) {
            self.free_page(frame, Order::ZERO);
        }
    }

    #[inline]
    pub(crate) fn user(&self, frame: Frame) -> UserSlot<'m> {
        match self.slot(frame).as_user() {
            Some(page) => page,
            None => unreachable!("I1: a mapped frame is a user page"),
        }
    }

    pub(crate) fn free_page(&self, frame: Frame, order: Order) {
        self.slot(frame).release();
        // SAFETY: O1: the last reference is gone; O2: the frame was allocated with this order; O3: the last mapping
        // was flushed before it was given to `put`.
        let owned = unsafe { OwnedFrame::from_raw(frame, order) };
        self.env.paging().frames().free(owned);
    }

    /// Reads the bytes of a frame that the caller keeps referenced.
    pub(crate) fn read_frame(&self, frame: Frame, offset: usize, to: &mut [u8]) {
        Self::read_frame_of(self.env, frame, offset, to);
    }

    /// As [`read_frame`](Self::read_frame), of an environment's frame.
    pub(crate) fn read_frame_of(env: &E, frame: Frame, offset: usize, to: &mut [u8]) {
        let (start, length) = clip(offset, to.len());
        let pointer = env.paging().map().to_ptr(frame.start());
        // SAFETY: E2 and P1: the frame's bytes are valid; `clip` keeps to the page.
        unsafe {
            core::ptr::copy_nonoverlapping(pointer.add(start).cast_const(), to.as_mut_ptr(), length)
        }
    }

    /// Writes the bytes of a frame that the caller keeps referenced and may write.
    pub(crate) fn write_frame(&self, frame: Frame, offset: usize, from: &[u8]) {
        let (start, length) = clip(offset, from.len());
        let pointer = self.env.paging().map().to_ptr(frame.start());
        // SAFETY: as in `read_frame`, and the caller may write.
        unsafe { core::ptr::copy_nonoverlapping(from.as_ptr(), pointer.add(start), length) }
    }

    /// Fills part of a frame with zeros.
    pub(crate) fn zero_frame(&self, frame: Frame, offset: usize, length: usize) {
        let (start, length) = clip(offset, length);
        let pointer = self.env.paging().map().to_ptr(frame.start());
        // SAFETY: as in `write_frame`.
        unsafe { pointer.add(start).write_bytes(0, length) }
    }

    /// Fills a frame with zeros from an offset on.
    pub(crate) fn zero_frame_from(&self, frame: Frame, offset: usize) {
        self.zero_frame(frame, offset, kmem_hal::PAGE_SIZE as usize);
    }

    /// The frames that all spaces may be told to use: what the map reaches.
    #[must_use]
    pub fn reach(&self) -> FrameRange {
        self.env.paging().map().reach()
    }
}

/// Finds the slots of frames one after the other, faster where they lie together. Who copies a table counts 512 pages, and what leads to a slot
/// waits for the locked instruction of the one before.
pub(crate) struct NearSlots<'m> {
    first: u64,
    slots: &'m [FrameSlot],
}

impl<'m> NearSlots<'m> {
    pub const fn new() -> Self {
        Self {
            first: 0,
            slots: &[],
        }
    }

    #[inline(always)]
    fn of<E: Env>(&mut self, mm: &Mm<'m, E>, frame: Frame) -> Option<&'m FrameSlot> {
        let at = frame.number().wrapping_sub(self.first);
        match usize::try_from(at).ok().and_then(|at| self.slots.get(at)) {
            Some(slot) => Some(slot),
            None => self.find(mm, frame),
        }
    }

    #[cold]
    #[inline(never)]
    fn find<E: Env>(&mut self, mm: &Mm<'m, E>, frame: Frame) -> Option<&'m FrameSlot> {
        let (first, slots) = mm.env.paging().slots().slots_around(frame)?;
        (self.first, self.slots) = (first.number(), slots);
        mm.env.paging().slots().slot(frame)
    }
}

const fn clip(offset: usize, length: usize) -> (usize, usize) {
    let page = kmem_hal::PAGE_SIZE as usize;
    let start = if offset < page { offset } else { page };
    let room = page - start;
    (start, if length < room { length } else { room })
}
