//! `Audit`: every wrong free is found at the call, and changes nothing.
//!
//! One byte a frame: what the live block that starts there is. A free exchanges the byte for 0, so that a second free, on this
//! CPU or another, finds 0; a wrong order finds another byte. The plain allocator finds the same when a block reaches its
//! zone, but an array may have given it to a second owner before.

use core::panic::Location;

use kmem_hal::sync::{AtomicU8, Ordering};

use super::{Watch, sealed};
use crate::carve::{Carving, room};
use crate::error::FreeError;

/// No live block starts here.
const NONE: u8 = 0;
/// A frame of a range, which may come back in any pieces.
const LOOSE: u8 = u8::MAX;

/// Finds foreign frames, holes, wrong zones, double frees and wrong orders at the call, with memory intact.
///
/// What was cut with [`OwnedFrame::split`](kmem_hal::OwnedFrame::split) has two orders, and is refused as a wrong one: cut with
/// [`WatchedBuddy::split`](super::WatchedBuddy::split).
///
/// # Examples
///
/// ```
/// # use kmem_buddy::{Audit, BootMap, Config, FreeError, RegionKind, WatchedBuddy, ZoneLimits};
/// # use kmem_hal::{FrameRequest, FrameSink, FrameSource, OffsetMap, Order, OwnedFrame, PhysAddr, SingleCpu};
/// # let arena = Box::leak(vec![0u8; 5 << 20].into_boxed_slice());
/// # let base = (arena.as_mut_ptr().expose_provenance() + 0xf_ffff) & !0xf_ffff;
/// # let mut map: BootMap = BootMap::new();
/// # map.push(PhysAddr::new(0), 4 << 20, RegionKind::Usable)?;
/// # let (memory, cpu) = unsafe { (OffsetMap::new(base, 1024), SingleCpu::new()) };
/// let buddy: WatchedBuddy<_, _, Audit> = WatchedBuddy::new(memory, cpu);
/// // SAFETY: X1: nobody else uses the memory of the map.
/// unsafe { buddy.init(&mut map, &Config::new().limits(ZoneLimits::NORMAL_ONLY))? };
///
/// let frame = buddy.alloc(&FrameRequest::ONE)?;
/// let first = frame.first();
/// buddy.free(frame);
/// // SAFETY: none: the wrong free is what is shown.
/// let again = unsafe { OwnedFrame::from_raw(first, Order::ZERO) };
/// let (error, _) = buddy.try_free(again).unwrap_err();
/// assert_eq!(error, FreeError::DoubleFree);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Audit {
    blocks: &'static [AtomicU8],
}

impl sealed::Sealed for Audit {}

impl Audit {
    fn byte(&self, at: usize) -> u8 {
        let byte = self.blocks.get(at);
        byte.map_or(NONE, |byte| byte.load(Ordering::Relaxed))
    }

    fn set(&self, at: usize, byte: u8) {
        if let Some(block) = self.blocks.get(at) {
            block.store(byte, Ordering::Release);
        }
    }

    /// Exchanges the byte, if it is `from`.
    fn change(&self, at: usize, from: u8, to: u8) -> bool {
        self.blocks.get(at).is_some_and(|block| {
            block
                .compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        })
    }

    /// What is wrong with freeing `count` frames from `at`, where no such block is.
    fn wrong(&self, at: usize, count: usize) -> FreeError {
        // A live block that starts in it or that it starts in.
        let inside = (at..at + count).any(|at| self.byte(at) != NONE);
        let before = (at.saturating_sub(1 << 20)..at)
            .rev()
            .find(|&start| self.byte(start) != NONE);
        let covered = before.is_some_and(|start| {
            let byte = self.byte(start);
            byte != LOOSE && (at - start) >> (byte - 1).min(63) == 0
        });
        if inside || covered {
            FreeError::WrongOrder
        } else {
            FreeError::DoubleFree
        }
    }

    /// Takes `count` loose frames back, all or none.
    fn give_loose(&self, at: usize, count: usize) -> Result<(), FreeError> {
        let given = (at..at + count)
            .take_while(|&at| self.change(at, LOOSE, NONE))
            .count();
        if given == count {
            return Ok(());
        }
        for at in at..at + given {
            self.set(at, LOOSE);
        }
        Err(self.wrong(at, count))
    }
}

/// The byte of a block of this order.
const fn byte_of(order: usize) -> u8 {
    order as u8 + 1
}

impl Watch for Audit {
    fn bytes(frames: usize) -> u64 {
        room::<AtomicU8>(frames)
    }

    fn build(memory: &mut Carving, frames: usize) -> Self {
        Self {
            blocks: memory.slice(frames, |_| AtomicU8::new(NONE)),
        }
    }

    fn taken(&self, at: usize, order: usize, _by: &'static Location<'static>) {
        self.set(at, byte_of(order));
    }

    fn taken_loose(&self, at: usize, count: usize, _by: &'static Location<'static>) {
        (at..at + count).for_each(|at| self.set(at, LOOSE));
    }

    fn give(&self, at: usize, order: usize) -> Result<(), FreeError> {
        if self.change(at, byte_of(order), NONE) {
            return Ok(());
        }
        match self.byte(at) {
            LOOSE => self.give_loose(at, 1 << order),
            _ => Err(self.wrong(at, 1 << order)),
        }
    }

    fn give_run(&self, at: usize, count: usize) -> Result<(), FreeError> {
        self.give_loose(at, count)
    }

    fn split(&self, at: usize, order: usize) -> Result<(), FreeError> {
        let Some(half) = order.checked_sub(1) else {
            return Err(FreeError::WrongOrder);
        };
        if self.byte(at) == LOOSE {
            return Ok(());
        }
        if !self.change(at, byte_of(order), byte_of(half)) {
            return Err(self.wrong(at, 1 << order));
        }
        self.set(at + (1 << half), byte_of(half));
        Ok(())
    }
}
