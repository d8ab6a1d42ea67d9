//! Small things a kernel may offer: user memory, a clock, random numbers, a trace.
//!
//! All optional: every place that takes one has a default that does without.

use core::fmt;

use crate::addr::VirtAddr;
use crate::cpu::CpuId;
use crate::frame::{Frame, Order};
use crate::mmu::FlushRequest;
use crate::page::PageRange;

/// An access to user memory that could not be made, nor fixed up by the fault handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserFault {
    /// The first address that could not be accessed.
    pub address: VirtAddr,
    /// Bytes that were copied before it.
    pub copied: usize,
}

impl fmt::Display for UserFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "bad user address {} after {} bytes",
            self.address, self.copied
        )
    }
}

impl core::error::Error for UserFault {}

/// Copies between kernel and user memory through the MMU, with fix-up of faults (on x86 between STAC and CLAC).
///
/// # Safety
///
/// - `U1`: user memory is accessed with the user's rights as the tables give them, never beyond.
/// - `U2`: a fault that the handler cannot resolve ends the copy with an error; nothing else happens.
pub unsafe trait UserAccess {
    /// Copies from user address `from` to `to`.
    ///
    /// # Errors
    ///
    /// [`UserFault`] with what was copied before the fault.
    fn copy_from_user(&self, to: &mut [u8], from: VirtAddr) -> Result<(), UserFault>;

    /// Copies `from` to user address `to`.
    ///
    /// # Errors
    ///
    /// [`UserFault`] with what was copied before the fault.
    fn copy_to_user(&self, to: VirtAddr, from: &[u8]) -> Result<(), UserFault>;
}

/// A clock that never goes back.
///
/// - `N1`: no CPU reads an instant before one that it knows another CPU has read.
pub trait Clock {
    /// Nanoseconds since some fixed instant.
    fn now(&self) -> u64;
}

/// A clock that stands still.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoClock;

impl Clock for NoClock {
    fn now(&self) -> u64 {
        0
    }
}

/// Random numbers, for address-space layout and for hardening.
pub trait Rng {
    /// The next 64 random bits.
    fn next_u64(&self) -> u64;
}

/// No randomness: layouts are the same at every start.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoRng;

impl Rng for NoRng {
    fn next_u64(&self) -> u64 {
        0
    }
}

/// Something worth telling a log, a test or `kmem top`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TraceEvent {
    /// A block of frames was given out.
    FrameAllocated(Frame, Order),
    /// A block of frames came back.
    FrameFreed(Frame, Order),
    /// A frame became a page table of this level (1 = leaf).
    TableMade(Frame, u8),
    /// A page table was detached and will be reused after flush and grace period.
    TableFreed(Frame, u8),
    /// Leaves were written for these pages, the first of them for this frame.
    Mapped(PageRange, Frame),
    /// Leaves of these pages were cleared.
    Unmapped(PageRange),
    /// Rights of these pages were taken away.
    Restricted(PageRange),
    /// A flush was committed: nobody holds the translations any more.
    Flushed(FlushRequest),
    /// An object cache took (`true`) or gave back (`false`) a slab that begins with this frame and was cut from a block of this order. Told once for each, while the frames are the slab's.
    Slab(Frame, Order, bool),
    /// A CPU came online or went offline.
    CpuOnline(CpuId, bool),
}

/// A hook for log, defmt, the mock's detector, `kmem top`.
///
/// Called on slow paths and wherever a test build asks for it; must not call back into kmem.
pub trait Trace {
    /// Notes an event.
    fn event(&self, event: TraceEvent);
}

/// Nobody listens; the calls compile to nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoTrace;

impl Trace for NoTrace {
    #[inline(always)]
    fn event(&self, _event: TraceEvent) {}
}

impl<T: Trace + ?Sized> Trace for &T {
    #[inline]
    fn event(&self, event: TraceEvent) {
        (**self).event(event);
    }
}

impl<T: Clock + ?Sized> Clock for &T {
    fn now(&self) -> u64 {
        (**self).now()
    }
}

impl<T: Rng + ?Sized> Rng for &T {
    fn next_u64(&self) -> u64 {
        (**self).next_u64()
    }
}
