//! How a kernel reaches physical memory: `__va` and `__pa`.
//!
//! kmem reads and writes frames (page tables, zeroing, copying on write) through a [`PhysMap`]. A kernel that maps
//! all memory at an offset uses [`OffsetMap`] and implements nothing; a 32-bit kernel with high memory implements the
//! two temporary methods as well.
//!
//! ```text
//!  physical   0 ........ low memory ........ | ... high memory ...
//!                 | + offset                        map_temporary
//!  linear     OFFSET ... reach().end             a window per CPU
//! ```

use core::ptr::NonNull;

use crate::addr::{PAGE_SIZE, PhysAddr};
use crate::frame::{Frame, FrameRange};
use crate::sync::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

/// Where physical memory can be read and written.
///
/// # Safety
///
/// The implementer promises:
/// - `P1`: for every frame in [`reach`](Self::reach), [`to_ptr`](Self::to_ptr) gives a pointer that is valid for reads
///   and writes to the end of that frame, and stays valid while the frame is in reach. Frames that follow each
///   other and are in reach are contiguous there as well.
/// - `P2`: two different physical addresses never share a pointer, and the memory type is write-back.
/// - `P3`: [`to_phys`](Self::to_phys) is the inverse of `to_ptr`.
/// - `P4`: `reach` only grows.
/// - `P5`: a temporary mapping is private to the caller until it is unmapped, and no other mapping of the frame
///   has another memory type.
/// - `P6`: [`words`](Self::words), [`words32`](Self::words32), [`zero`](Self::zero) and [`copy`](Self::copy), where they are
///   overridden, reach the same bytes as [`to_ptr`](Self::to_ptr).
pub unsafe trait PhysMap {
    /// The frames that are mapped now. Frames outside stay unfree until the allocator is extended.
    ///
    /// The default says that all memory is mapped.
    #[inline]
    fn reach(&self) -> FrameRange {
        FrameRange::from_numbers(0, Frame::LIMIT).unwrap_or(FrameRange::EMPTY)
    }

    /// The pointer to physical address `address` (`__va`). Meaningful only inside `reach`.
    #[doc(alias = "__va")]
    #[doc(alias = "phys_to_virt")]
    fn to_ptr(&self, address: PhysAddr) -> *mut u8;

    /// The physical address behind a pointer that `to_ptr` gave (`__pa`).
    #[doc(alias = "__pa")]
    #[doc(alias = "virt_to_phys")]
    fn to_phys(&self, pointer: *const u8) -> PhysAddr;

    /// Maps one frame, in reach or not, for a short time (`kmap_local_page`).
    ///
    /// `None` where no window is free or the frame cannot be mapped. The default serves the frames in reach.
    ///
    /// Context: any, interrupts included. The caller stays on its CPU until it unmaps (pinned, or preemption off), and code that
    /// interrupts it has unmapped its own by the time it returns.
    #[doc(alias = "kmap_local_page")]
    #[doc(alias = "kmap_atomic")]
    fn map_temporary(&self, frame: Frame) -> Option<NonNull<u8>> {
        if self.reach().contains(frame) {
            NonNull::new(self.to_ptr(frame.start()))
        } else {
            None
        }
    }

    /// Ends a mapping of `map_temporary`. The default has nothing to do.
    ///
    /// # Safety
    ///
    /// `pointer` came from `map_temporary`, and is not used afterwards.
    #[doc(alias = "kunmap_local")]
    unsafe fn unmap_temporary(&self, pointer: NonNull<u8>) {
        let _ = pointer;
    }

    /// The frame's 512 words of 64 bits as atomics: a page table of every 64-bit format.
    ///
    /// Atomics, because the hardware and other CPUs write a live table.
    ///
    /// # Safety
    ///
    /// The frame is in reach, holds initialised bytes, and for the lifetime of the reference nobody accesses it
    /// through anything but atomics (the MMU counts as one).
    #[cfg(not(loom))]
    #[inline]
    unsafe fn words(&self, frame: Frame) -> &[AtomicU64] {
        const COUNT: usize = PAGE_SIZE as usize / 8;
        let pointer = self.to_ptr(frame.start()).cast::<AtomicU64>().cast_const();
        // SAFETY: P1 makes 4096 bytes valid and page-aligned; atomics have the size of their integer in this
        // backend (sync I2); the caller keeps other access away.
        unsafe { core::slice::from_raw_parts(pointer, COUNT) }
    }

    /// The frame's words as atomics: served from a constructed arena, since loom's atomics have another size.
    ///
    /// # Panics
    ///
    /// Where the map has no such arena: no model can use it for tables.
    ///
    /// # Safety
    ///
    /// As in the other builds.
    #[cfg(loom)]
    unsafe fn words(&self, frame: Frame) -> &[AtomicU64] {
        panic!("no constructed arena for {frame:?}: give the model a map of its own")
    }

    /// The frame's 1024 words of 32 bits as atomics: a table of x86's two-level format.
    ///
    /// # Safety
    ///
    /// As [`words`](Self::words).
    #[cfg(not(loom))]
    #[inline]
    unsafe fn words32(&self, frame: Frame) -> &[AtomicU32] {
        const COUNT: usize = PAGE_SIZE as usize / 4;
        let pointer = self.to_ptr(frame.start()).cast::<AtomicU32>().cast_const();
        // SAFETY: as in `words`.
        unsafe { core::slice::from_raw_parts(pointer, COUNT) }
    }

    /// The frame's words as atomics: served from a constructed arena.
    ///
    /// # Panics
    ///
    /// As [`words`](Self::words).
    ///
    /// # Safety
    ///
    /// As in the other builds.
    #[cfg(loom)]
    unsafe fn words32(&self, frame: Frame) -> &[AtomicU32] {
        panic!("no constructed arena for {frame:?}: give the model a map of its own")
    }

    /// Fills `range` with zeros.
    ///
    /// # Safety
    ///
    /// The caller owns the frames, and they are in reach.
    unsafe fn zero(&self, range: FrameRange) {
        if range.is_empty() {
            return;
        }
        let bytes = (range.count() * PAGE_SIZE) as usize;
        // SAFETY: P1: the frames are contiguous and valid; the caller owns them.
        unsafe { self.to_ptr(range.first().start()).write_bytes(0, bytes) }
    }

    /// Copies the bytes of frame `from` to frame `to`.
    ///
    /// # Safety
    ///
    /// Both are in reach and differ; the caller owns `to`, and nothing writes to `from` meanwhile.
    unsafe fn copy(&self, from: Frame, to: Frame) {
        let source = self.to_ptr(from.start()).cast_const();
        let target = self.to_ptr(to.start());
        // SAFETY: P1 and P2: both are valid for a page and do not overlap, since the frames differ.
        unsafe { core::ptr::copy_nonoverlapping(source, target, PAGE_SIZE as usize) }
    }
}

// SAFETY: a reference forwards to a map that keeps the contract.
unsafe impl<M: PhysMap + ?Sized> PhysMap for &M {
    #[inline]
    fn reach(&self) -> FrameRange {
        (**self).reach()
    }
    #[inline]
    fn to_ptr(&self, address: PhysAddr) -> *mut u8 {
        (**self).to_ptr(address)
    }
    #[inline]
    fn to_phys(&self, pointer: *const u8) -> PhysAddr {
        (**self).to_phys(pointer)
    }
    fn map_temporary(&self, frame: Frame) -> Option<NonNull<u8>> {
        (**self).map_temporary(frame)
    }
    unsafe fn unmap_temporary(&self, pointer: NonNull<u8>) {
        // SAFETY: the caller's promise is passed on.
        unsafe { (**self).unmap_temporary(pointer) }
    }
    #[inline]
    unsafe fn words(&self, frame: Frame) -> &[AtomicU64] {
        // SAFETY: the caller's promise is passed on.
        unsafe { (**self).words(frame) }
    }
    #[inline]
    unsafe fn words32(&self, frame: Frame) -> &[AtomicU32] {
        // SAFETY: the caller's promise is passed on.
        unsafe { (**self).words32(frame) }
    }
    unsafe fn zero(&self, range: FrameRange) {
        // SAFETY: the caller's promise is passed on.
        unsafe { (**self).zero(range) }
    }
    unsafe fn copy(&self, from: Frame, to: Frame) {
        // SAFETY: the caller's promise is passed on.
        unsafe { (**self).copy(from, to) }
    }
}

/// All of physical memory mapped at one offset, known at run time.
///
/// A `static` starts [unset](Self::unset), reaches nothing, and is set once by the boot code.
#[derive(Debug)]
pub struct OffsetMap {
    offset: AtomicUsize,
    /// The first frame in reach, and the one behind the last: none is in reach while that is 0.
    first: u64,
    end: AtomicU64,
}

impl OffsetMap {
    crate::const_new! {
        /// A map that reaches nothing yet.
        pub fn unset() -> Self {
            Self { offset: AtomicUsize::new(0), first: 0, end: AtomicU64::new(0) }
        }
    }

    crate::const_new! {
        /// Physical address `a` is at pointer `offset + a`, for all frames below number `frames`.
        ///
        /// # Safety
        ///
        /// `P1` and `P2` hold for that offset and those frames.
        pub unsafe fn new(offset: usize, frames: u64) -> Self {
            Self { offset: AtomicUsize::new(offset), first: 0, end: AtomicU64::new(frames) }
        }
    }

    crate::const_new! {
        /// As [`new`](Self::new), for the frames of `range` alone: where memory does not begin at address 0.
        ///
        /// # Safety
        ///
        /// As [`new`](Self::new).
        pub unsafe fn over(offset: usize, range: FrameRange) -> Self {
            let first = range.first().number();
            Self { offset: AtomicUsize::new(offset), first, end: AtomicU64::new(range.end_number()) }
        }
    }

    /// Sets the offset of an unset map, or extends the reach of a set one up to frame number `frames` (`P4`).
    ///
    /// # Safety
    ///
    /// As [`new`](Self::new); on a set map `offset` is the same as before. No other CPU uses the map meanwhile
    /// unless it was set before.
    pub unsafe fn set(&self, offset: usize, frames: u64) {
        self.offset.store(offset, Ordering::Relaxed);
        let now = self.end.load(Ordering::Relaxed);
        self.end.store(now.max(frames), Ordering::Release);
    }
}

// SAFETY: P1 and P2 are promised to `new`, `over` and `set`; P3: subtraction undoes addition; P4: `set` only raises the end, which nothing else
// changes.
unsafe impl PhysMap for OffsetMap {
    #[inline]
    fn reach(&self) -> FrameRange {
        let end = self.end.load(Ordering::Acquire).min(Frame::LIMIT);
        FrameRange::from_numbers(self.first, end).unwrap_or(FrameRange::EMPTY)
    }

    #[inline]
    fn to_ptr(&self, address: PhysAddr) -> *mut u8 {
        let offset = self.offset.load(Ordering::Relaxed);
        core::ptr::with_exposed_provenance_mut(offset.wrapping_add(address.as_u64() as usize))
    }

    #[inline]
    fn to_phys(&self, pointer: *const u8) -> PhysAddr {
        let offset = self.offset.load(Ordering::Relaxed);
        PhysAddr::new(pointer.expose_provenance().wrapping_sub(offset) as u64)
    }
}
