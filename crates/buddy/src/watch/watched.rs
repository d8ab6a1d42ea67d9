//! The watched allocator: the plain one's calls under the same names, each told to the policy.

use core::fmt;
use core::ops::Deref;
use core::panic::Location;
use core::ptr::NonNull;

use kmem_hal::sync::Ordering;
use kmem_hal::{
    AllocError, Cpu, CpuCall, Frame, FrameRange, FrameRequest, FrameSink, FrameSource, IrqSafe,
    Migrate, MigrateError, NoCpuCall, NoPressure, Order, OwnedFrame, PhysMap, Pressure, RawLock,
};

use super::table::{Run, Slot, Table};
use super::{Owner, Watch};
use crate::boot::{BootMap, EarlyAllocator};
use crate::buddy::Buddy;
use crate::carve::{Carving, LINE, room};
use crate::claim::{ClaimError, CmaArea};
use crate::compact::Compacted;
use crate::config::Config;
use crate::error::{FreeError, InitError, PlaceError};
use crate::range::OwnedRange;
use crate::view::ShowMem;

/// A [`Buddy`] with a policy: [`Audit`](super::Audit), [`PageOwner`](super::PageOwner) or both as a pair.
///
/// Has the allocator's calls under the same names; views and whatever else only looks come by `Deref`. What is freed here must have
/// been taken here.
pub struct WatchedBuddy<
    M,
    C,
    W: 'static,
    L: RawLock + 'static = IrqSafe,
    K = NoCpuCall,
    P = NoPressure,
> {
    buddy: Buddy<M, C, L, K, P>,
    table: Slot<W>,
}

// SAFETY: the table is shared by `Watch`'s bound; the allocator by its own.
unsafe impl<M, C, W: Sync, L: RawLock, K, P> Sync for WatchedBuddy<M, C, W, L, K, P> where
    Buddy<M, C, L, K, P>: Sync
{
}

impl<M, C, W, L: RawLock + 'static> WatchedBuddy<M, C, W, L> {
    kmem_hal::const_new! {
        /// An allocator that cannot call other CPUs and tells nobody when memory is short.
        pub fn new(memory: M, cpu: C) -> Self {
            Self::watching(Buddy::new(memory, cpu))
        }
    }
}

impl<M, C, W, L: RawLock + 'static, K, P> WatchedBuddy<M, C, W, L, K, P> {
    kmem_hal::const_new! {
        /// Watches an allocator that has not been initialised.
        pub fn watching(buddy: Buddy<M, C, L, K, P>) -> Self {
            Self {
                buddy,
                table: Slot::new(core::ptr::null_mut()),
            }
        }
    }

    fn table(&self) -> Option<&'static Table<W>> {
        // SAFETY: a non-null pointer came from a `&'static Table` in `init`.
        unsafe { self.table.load(Ordering::Acquire).as_ref() }
    }
}

impl<M, C, W, L: RawLock + 'static, K, P> Deref for WatchedBuddy<M, C, W, L, K, P> {
    type Target = Buddy<M, C, L, K, P>;

    fn deref(&self) -> &Self::Target {
        &self.buddy
    }
}

impl<M: PhysMap, C: Cpu, W: Watch, L: RawLock + 'static, K: CpuCall, P: Pressure>
    WatchedBuddy<M, C, W, L, K, P>
{
    /// Carves the policy's table and initialises the allocator: see [`Buddy::init`].
    ///
    /// # Errors
    ///
    /// [`InitError`]; the boot map is as it was.
    ///
    /// # Safety
    ///
    /// `X1` of [`EarlyAllocator::new`]: the memory that `map` calls usable is in use by nobody where it is not reserved in
    /// `map`, and no other allocator is started on it.
    pub unsafe fn init<const N: usize>(
        &self,
        map: &mut BootMap<N>,
        config: &Config,
    ) -> Result<(), InitError> {
        if self.table().is_some() {
            return Err(InitError::Twice);
        }
        let (mut runs, mut frames) = (0, 0);
        for range in map.present() {
            runs += 1;
            frames += range.count();
        }
        let count = usize::try_from(frames).map_err(|_| InitError::TooMany { count: frames })?;
        let bytes = room::<Run>(runs) + room::<Table<W>>(1) + W::bytes(count);
        // SAFETY: X1, by contract.
        let base = unsafe { EarlyAllocator::new(map, self.buddy.memory()) }
            .for_tables()
            .alloc(bytes, LINE)
            .map_err(|reason| InitError::Metadata { bytes, reason })?;
        let memory = NonNull::new(self.buddy.memory().to_ptr(base)).ok_or(InitError::NoMemory)?;
        // SAFETY: an early allocation of that many bytes and that alignment, in reach, given back only below.
        let mut memory = unsafe { Carving::new(memory, bytes) };
        let mut place = 0;
        let mut present = map.present();
        let runs = memory.slice(runs, |_| {
            let range = present.next().unwrap_or(FrameRange::EMPTY);
            let run = Run {
                first: range.first().number(),
                end: range.end_number(),
                place,
            };
            place += range.count() as usize;
            run
        });
        drop(present);
        let watch = W::build(&mut memory, count);
        let mut table = Some(Table { runs, watch });
        let table = memory.slice(1, |_| table.take().expect("one table"));
        let table = table.first().ok_or(InitError::NoMemory)?;
        // Before the allocator gives anything.
        let pointer = core::ptr::from_ref(table).cast_mut();
        self.table.store(pointer, Ordering::Release);
        // SAFETY: X1, by contract; the table's memory is reserved in `map`.
        unsafe { self.buddy.init(map, config) }.inspect_err(|_| {
            self.table.store(core::ptr::null_mut(), Ordering::Release);
            // SAFETY: X1, by contract: the allocator that was to follow has not started.
            let mut early = unsafe { EarlyAllocator::new(map, self.buddy.memory()) }.for_tables();
            // SAFETY: nothing was allocated, and so nobody has looked at the table.
            let _ = unsafe { early.free(base, bytes) };
        })
    }

    /// Says that a block was taken.
    fn taken(&self, frame: &OwnedFrame, by: &'static Location<'static>) {
        self.note(frame.range(), Some(frame.order()), by);
    }

    fn note(&self, range: FrameRange, order: Option<Order>, by: &'static Location<'static>) {
        let Some(table) = self.table() else { return };
        if let Some(at) = table.place(range.first().number(), range.count()) {
            match order {
                Some(order) => table.watch.taken(at, order.index(), by),
                None => table.watch.taken_loose(at, range.count() as usize, by),
            }
        }
    }

    /// Whether a block may come back; it is not in use any more as far as the policy knows.
    fn give(&self, first: Frame, order: Order) -> Result<(), FreeError> {
        let range = FrameRange::of_order(first, order).ok_or(FreeError::Foreign)?;
        if !first.is_aligned(order) {
            return Err(FreeError::Misaligned);
        }
        self.give_by(range, |table, at| table.watch.give(at, order.index()))
    }

    fn give_by(
        &self,
        range: FrameRange,
        give: impl FnOnce(&'static Table<W>, usize) -> Result<(), FreeError>,
    ) -> Result<(), FreeError> {
        let table = self.table().ok_or(FreeError::NotInitialised)?;
        let place = table.place(range.first().number(), range.count());
        match give(table, place.ok_or(FreeError::Foreign)?) {
            // Nothing is live there: free already, or never the allocator's.
            Err(FreeError::DoubleFree) if !self.buddy.is_own(range) => Err(FreeError::Foreign),
            result => result,
        }
    }

    /// Notes a wrong free; the block is left alone.
    fn refuse(&self, error: FreeError, first: Frame, order: Order) {
        if let Some(state) = self.buddy.state() {
            self.buddy
                .note_misuse(state, error, first.number(), order.index());
        }
    }

    /// Frees one block, or says what is wrong with it.
    ///
    /// # Errors
    ///
    /// [`FreeError`] with the block. With [`Audit`](super::Audit) that is every wrong free, and nothing has changed.
    pub fn try_free(&self, frame: OwnedFrame) -> Result<(), (FreeError, OwnedFrame)> {
        match self.give(frame.first(), frame.order()) {
            Ok(()) => self.buddy.try_free(frame),
            Err(error) => Err((error, frame)),
        }
    }

    /// Cuts a block into its halves: [`OwnedFrame::split`], told to the policy.
    ///
    /// # Errors
    ///
    /// The block itself, where it is a single frame or was not taken here as this block.
    #[doc(alias = "split_page")]
    pub fn split(&self, frame: OwnedFrame) -> Result<(OwnedFrame, OwnedFrame), OwnedFrame> {
        let (first, order) = (frame.first(), frame.order());
        let told = self.give_by(frame.range(), |table, at| {
            table.watch.split(at, order.index())
        });
        match told {
            Ok(()) => frame.split(),
            Err(error) => {
                self.refuse(error, first, order);
                Err(frame)
            }
        }
    }

    /// As [`Buddy::alloc_bulk`].
    ///
    /// # Errors
    ///
    /// [`AllocError`] where not even the first block could be given.
    #[track_caller]
    pub fn alloc_bulk(
        &self,
        request: &FrameRequest,
        count: usize,
        mut give: impl FnMut(OwnedFrame),
    ) -> Result<usize, AllocError> {
        let by = Location::caller();
        self.buddy.alloc_bulk(request, count, |frame| {
            self.taken(&frame, by);
            give(frame);
        })
    }

    /// As [`Buddy::free_bulk`]; a wrong free is noted and changes nothing.
    pub fn free_bulk(&self, blocks: impl IntoIterator<Item = OwnedFrame>) {
        let right = |block: &OwnedFrame| {
            let given = self.give(block.first(), block.order());
            given
                .inspect_err(|&error| self.refuse(error, block.first(), block.order()))
                .is_ok()
        };
        self.buddy.free_bulk(blocks.into_iter().filter(right));
    }

    /// As [`Buddy::alloc_range`].
    ///
    /// # Errors
    ///
    /// [`AllocError`].
    #[track_caller]
    pub fn alloc_range(
        &self,
        frames: u64,
        align: Order,
        request: &FrameRequest,
    ) -> Result<OwnedRange, AllocError> {
        let range = self.buddy.alloc_range(frames, align, request)?;
        self.note(range.range(), None, Location::caller());
        Ok(range)
    }

    /// As [`Buddy::free_range`].
    ///
    /// # Errors
    ///
    /// [`FreeError`] with the range, unchanged.
    pub fn free_range(&self, range: OwnedRange) -> Result<(), (FreeError, OwnedRange)> {
        let count = range.range().count() as usize;
        let frames = range.range();
        match self.give_by(frames, |table, at| table.watch.give_run(at, count)) {
            Ok(()) => self.buddy.free_range(range),
            Err(error) => Err((error, range)),
        }
    }

    /// As [`Buddy::alloc_at`].
    ///
    /// # Errors
    ///
    /// [`PlaceError`].
    #[track_caller]
    pub fn alloc_at(&self, first: Frame, order: Order) -> Result<OwnedFrame, PlaceError> {
        let frame = self.buddy.alloc_at(first, order)?;
        self.taken(&frame, Location::caller());
        Ok(frame)
    }

    /// As [`Buddy::alloc_range_at`].
    ///
    /// # Errors
    ///
    /// [`PlaceError`].
    #[track_caller]
    pub fn alloc_range_at(&self, range: FrameRange) -> Result<OwnedRange, PlaceError> {
        let range = self.buddy.alloc_range_at(range)?;
        self.note(range.range(), None, Location::caller());
        Ok(range)
    }

    /// As [`Buddy::get_free_pages`].
    ///
    /// # Errors
    ///
    /// [`AllocError`].
    #[track_caller]
    pub fn get_free_pages(&self, request: &FrameRequest) -> Result<NonNull<u8>, AllocError> {
        let pages = self.buddy.get_free_pages(request)?;
        let first = Frame::containing(self.buddy.memory().to_phys(pages.as_ptr()));
        if let Some(range) = FrameRange::of_order(first, request.order) {
            self.note(range, Some(request.order), Location::caller());
        }
        Ok(pages)
    }

    /// As [`Buddy::get_free_page`].
    ///
    /// # Errors
    ///
    /// [`AllocError`].
    #[track_caller]
    pub fn get_free_page(&self, request: &FrameRequest) -> Result<NonNull<u8>, AllocError> {
        self.get_free_pages(&FrameRequest {
            order: Order::ZERO,
            ..*request
        })
    }

    /// As [`Buddy::get_zeroed_page`].
    ///
    /// # Errors
    ///
    /// [`AllocError`].
    #[track_caller]
    pub fn get_zeroed_page(&self, request: &FrameRequest) -> Result<NonNull<u8>, AllocError> {
        self.get_free_page(&request.zeroed())
    }

    /// As [`Buddy::free_pages`]; a wrong free is noted and changes nothing.
    ///
    /// # Safety
    ///
    /// As [`Buddy::free_pages`].
    pub unsafe fn free_pages(&self, address: NonNull<u8>, order: Order) {
        let physical = self.buddy.memory().to_phys(address.as_ptr());
        let first = Frame::containing(physical);
        if physical.page_offset() == 0
            && let Err(error) = self.give(first, order)
        {
            return self.refuse(error, first, order);
        }
        // SAFETY: the caller's promise, which the policy has looked at.
        unsafe { self.buddy.free_pages(address, order) }
    }

    /// As [`Buddy::free_page`].
    ///
    /// # Safety
    ///
    /// As [`Buddy::free_page`].
    pub unsafe fn free_page(&self, address: NonNull<u8>) {
        // SAFETY: the caller's promise.
        unsafe { self.free_pages(address, Order::ZERO) }
    }

    /// As [`Buddy::claim`].
    ///
    /// # Errors
    ///
    /// [`ClaimError`].
    #[track_caller]
    pub fn claim(
        &self,
        range: FrameRange,
        migrate: &impl Migrate,
    ) -> Result<OwnedRange, ClaimError> {
        let by = Location::caller();
        let range = self.buddy.claim(range, &Moving(self, migrate, by))?;
        self.note(range.range(), None, by);
        Ok(range)
    }

    /// As [`Buddy::cma_claim`].
    ///
    /// # Errors
    ///
    /// [`ClaimError`].
    #[track_caller]
    pub fn cma_claim(
        &self,
        area: &CmaArea,
        frames: u64,
        align: Order,
        migrate: &impl Migrate,
    ) -> Result<OwnedRange, ClaimError> {
        let by = Location::caller();
        let moving = Moving(self, migrate, by);
        let range = self.buddy.cma_claim(area, frames, align, &moving)?;
        self.note(range.range(), None, by);
        Ok(range)
    }

    /// As [`Buddy::compact`].
    #[track_caller]
    pub fn compact(&self, blocks: u64, migrate: &impl Migrate) -> Compacted {
        self.buddy
            .compact(blocks, &Moving(self, migrate, Location::caller()))
    }

    /// Who allocated the block that the frame is in; `None` where it is free or the policy does not say.
    pub fn owner_of(&self, frame: Frame) -> Option<&'static Location<'static>> {
        let table = self.table()?;
        table.watch.owner(table.place(frame.number(), 1)?)
    }

    /// Hands every place in the program that holds frames to `give`, the most frames first.
    pub fn owners(&self, mut give: impl FnMut(Owner)) {
        if let Some(table) = self.table() {
            table.watch.owners(&mut give);
        }
    }

    /// As [`Buddy::show_mem`], and with [`PageOwner`](super::PageOwner) who holds what.
    pub fn show_mem(&self) -> impl fmt::Display + use<'_, M, C, W, L, K, P> {
        Shown {
            plain: self.buddy.show_mem(),
            table: self.table(),
        }
    }
}

struct Shown<'a, L: RawLock + 'static, W: 'static> {
    plain: ShowMem<'a, L>,
    table: Option<&'static Table<W>>,
}

impl<L: RawLock, W: Watch> fmt::Display for Shown<'_, L, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.plain.fmt(f)?;
        self.table.map_or(Ok(()), |table| table.watch.show(f))
    }
}

/// Tells the policy what a claim moves: the new frame is who the old one was.
struct Moving<'a, M, C, W: 'static, L: RawLock + 'static, K, P, I>(
    &'a WatchedBuddy<M, C, W, L, K, P>,
    &'a I,
    &'static Location<'static>,
);

impl<M: PhysMap, C: Cpu, W: Watch, L: RawLock + 'static, K: CpuCall, P: Pressure, I: Migrate>
    Migrate for Moving<'_, M, C, W, L, K, P, I>
{
    fn migrate(
        &self,
        from: Frame,
        to: OwnedFrame,
    ) -> Result<OwnedFrame, (MigrateError, OwnedFrame)> {
        let Self(watched, inner, by) = self;
        watched.taken(&to, watched.owner_of(from).unwrap_or(by));
        let forget = |frame: &OwnedFrame| {
            if let Err(error) = watched.give(frame.first(), frame.order()) {
                watched.refuse(error, frame.first(), frame.order());
            }
        };
        inner
            .migrate(from, to)
            .inspect(forget)
            .inspect_err(|(_, to)| forget(to))
    }
}

// SAFETY: the allocator's; what is given is only looked at.
unsafe impl<M: PhysMap, C: Cpu, W: Watch, L: RawLock + 'static, K: CpuCall, P: Pressure> FrameSource
    for WatchedBuddy<M, C, W, L, K, P>
{
    #[track_caller]
    fn alloc(&self, request: &FrameRequest) -> Result<OwnedFrame, AllocError> {
        let frame = self.buddy.alloc(request)?;
        self.taken(&frame, Location::caller());
        Ok(frame)
    }

    #[track_caller]
    fn alloc_batch(
        &self,
        request: &FrameRequest,
        count: usize,
        give: &mut dyn FnMut(OwnedFrame),
    ) -> Result<usize, AllocError> {
        self.alloc_bulk(request, count, give)
    }

    kmem_hal::forward_nodes!(buddy);
}

impl<M: PhysMap, C: Cpu, W: Watch, L: RawLock + 'static, K: CpuCall, P: Pressure> FrameSink
    for WatchedBuddy<M, C, W, L, K, P>
{
    fn free(&self, frame: OwnedFrame) {
        match self.give(frame.first(), frame.order()) {
            Ok(()) => self.buddy.free(frame),
            Err(error) => self.refuse(error, frame.first(), frame.order()),
        }
    }

    fn free_batch(&self, next: &mut dyn FnMut() -> Option<OwnedFrame>) {
        self.free_bulk(core::iter::from_fn(next));
    }
}

impl<M, C, W, L: RawLock + 'static, K, P> fmt::Debug for WatchedBuddy<M, C, W, L, K, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Watched{:?}", self.buddy)
    }
}
