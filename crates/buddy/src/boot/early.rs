//! The early allocator: memory before there is an allocator (Linux's memblock).
//!
//! Gives pieces of what the boot map has free, from the top down, so that low memory stays for devices that need it. What it
//! gives is a reservation of kind [`Early`](crate::Reservation::Early) in the map, and so the zones that are built
//! from the map later know it as allocated. The page-frame allocator's own tables are carved with it, as
//! [`Tables`](crate::Reservation::Tables): sized by the memory that is usable, never by the highest address.
//!
//! A boot map says which memory there is, not who has it: it can be copied, or filled twice. So whoever starts an allocator on
//! one, this or one that takes the map over, promises that nobody else does (`X1` of [`EarlyAllocator::new`]).
//!
//! Invariants
//! - `I1`: a piece given is present memory, in reach of the [`PhysMap`], in no reservation, and is reserved when the call returns.
//! - `I2`: memory from `alloc_slice` is initialised before a reference to it exists.

use core::mem::size_of;
use core::ptr::NonNull;

use kmem_hal::{FrameRange, PAGE_SIZE, PhysAddr, PhysMap};

use super::error::EarlyError;
use super::kind::Reservation;
use super::map::BootMap;

/// Carves memory out of a boot map.
///
/// # Examples
///
/// ```
/// use kmem_buddy::{BootMap, EarlyAllocator, RegionKind};
/// use kmem_hal::{OffsetMap, PhysAddr};
///
/// let mut map: BootMap = BootMap::new();
/// map.push(PhysAddr::new(0), 1 << 20, RegionKind::Usable)?;
/// // SAFETY: only addresses are computed here, and nothing is accessed.
/// let memory = unsafe { OffsetMap::new(0, 256) };
/// // SAFETY: X1: the memory of this map is nobody's.
/// let mut early = unsafe { EarlyAllocator::new(&mut map, &memory) };
/// assert_eq!(early.alloc(4096, 4096).unwrap(), PhysAddr::new(0xff000)); // from the top down
/// # Ok::<(), kmem_buddy::BootMapError>(())
/// ```
///
/// A map is a list that anyone can copy, and so safe code cannot start an allocator on one:
///
/// ```compile_fail,E0133
/// use kmem_buddy::{BootMap, EarlyAllocator};
/// use kmem_hal::OffsetMap;
///
/// fn two(map: &mut BootMap, memory: &OffsetMap) {
///     let mut copy = map.clone();
///     let one = EarlyAllocator::new(map, memory).alloc_slice(1, |_| 0_u64);
///     let other = EarlyAllocator::new(&mut copy, memory).alloc_slice(1, |_| 0_u64);
/// }
/// ```
#[doc(alias = "memblock_alloc")]
#[derive(Debug)]
pub struct EarlyAllocator<'a, M, const N: usize = 256> {
    map: &'a mut BootMap<N>,
    memory: &'a M,
    limit: u64,
    why: Reservation,
}

impl<'a, M: PhysMap, const N: usize> EarlyAllocator<'a, M, N> {
    /// Allocates from what `map` has free inside the reach of `memory`.
    ///
    /// # Safety
    ///
    /// - `X1`: the memory that `map` calls usable is in use by nobody where it is not reserved in `map`, and no allocator is
    ///   started on it but through this map: none from a copy of the map, or from another map with the same memory.
    #[must_use]
    pub unsafe fn new(map: &'a mut BootMap<N>, memory: &'a M) -> Self {
        Self {
            map,
            memory,
            limit: u64::MAX,
            why: Reservation::Early,
        }
    }

    /// Allocates tables of the allocator that follows, which it never frees.
    pub(crate) fn for_tables(mut self) -> Self {
        self.why = Reservation::Tables;
        self
    }

    /// Allocates below `limit` (bytes, exclusive) only.
    #[must_use]
    pub fn below(mut self, limit: PhysAddr) -> Self {
        self.limit = limit.as_u64();
        self
    }

    /// The map that is carved.
    #[must_use]
    pub fn map(&self) -> &BootMap<N> {
        self.map
    }

    /// The map, to add regions or reservations between allocations.
    ///
    /// # Safety
    ///
    /// `X1` of [`new`](Self::new) holds for the map as it is changed.
    pub unsafe fn map_mut(&mut self) -> &mut BootMap<N> {
        self.map
    }

    /// Gives `bytes` bytes aligned to `align`, not zeroed, at the highest place.
    ///
    /// # Errors
    ///
    /// [`EarlyError`]; nothing has changed then.
    #[doc(alias = "memblock_phys_alloc")]
    pub fn alloc(&mut self, bytes: u64, align: u64) -> Result<PhysAddr, EarlyError> {
        if bytes == 0 || !align.is_power_of_two() {
            return Err(EarlyError::BadRequest { bytes, align });
        }
        let reach = self.memory.reach();
        let low = reach.first().start().as_u64();
        let high = self.limit.min(
            reach
                .last()
                .map_or(low, |last| last.start().as_u64() | (PAGE_SIZE - 1))
                .saturating_add(1),
        );
        let mut best = None;
        self.map.for_each_gap(|start, end| {
            let (start, end) = (start.max(low), end.min(high));
            if let Some(at) = end.checked_sub(bytes).map(|at| at & !(align - 1))
                && at >= start
            {
                best = Some(at);
            }
        });
        let at = best.ok_or(EarlyError::NoSpace { bytes, limit: high })?;
        self.map
            .insert_taken(at, at + bytes, self.why)
            .map_err(|_| EarlyError::Full { capacity: N })?;
        Ok(PhysAddr::new(at))
    }

    /// Gives `frames` whole frames aligned to `align` frames.
    ///
    /// # Errors
    ///
    /// [`EarlyError`].
    pub fn alloc_frames(&mut self, frames: u64, align: u64) -> Result<FrameRange, EarlyError> {
        let bytes = frames.checked_mul(PAGE_SIZE).ok_or(EarlyError::NoSpace {
            bytes: u64::MAX,
            limit: self.limit,
        })?;
        let at = self.alloc(bytes, align.saturating_mul(PAGE_SIZE))?;
        Ok(FrameRange::inside(at, bytes))
    }

    /// Gives a slice of `count` values, each made by `make` from its index. It lives for ever.
    ///
    /// # Errors
    ///
    /// [`EarlyError`].
    pub fn alloc_slice<T: 'static>(
        &mut self,
        count: usize,
        mut make: impl FnMut(usize) -> T,
    ) -> Result<&'static mut [T], EarlyError> {
        let bytes = (size_of::<T>() as u64)
            .checked_mul(count as u64)
            .filter(|&bytes| isize::try_from(bytes).is_ok())
            .ok_or(EarlyError::NoSpace {
                bytes: u64::MAX,
                limit: self.limit,
            })?;
        let align = align_of::<T>() as u64;
        let first = if bytes == 0 {
            NonNull::dangling().as_ptr()
        } else {
            let at = self.alloc(bytes, align.max(8))?;
            self.memory.to_ptr(at).cast::<T>()
        };
        for index in 0..count {
            // SAFETY: I1: the memory is in reach, so by P1 valid for writes and contiguous, and by X1 nobody else's;
            // `alloc` aligned it (pages are aligned in both spaces, P1). Values without bytes need an aligned pointer only.
            unsafe { first.add(index).write(make(index)) };
        }
        // SAFETY: I2: all `count` values were just written; the reservation keeps the memory for ever.
        Ok(unsafe { core::slice::from_raw_parts_mut(first, count) })
    }

    /// Takes back what `alloc` gave.
    ///
    /// Bytes that no early allocation holds are left as they are.
    ///
    /// # Errors
    ///
    /// [`EarlyError::Full`] where a piece would have to be cut in two and the list is full.
    ///
    /// # Safety
    ///
    /// Nobody uses the bytes any more, or will.
    #[doc(alias = "memblock_phys_free")]
    pub unsafe fn free(&mut self, base: PhysAddr, bytes: u64) -> Result<(), EarlyError> {
        let start = base.as_u64();
        self.map
            .remove_taken(start, start.saturating_add(bytes), self.why)
            .map_err(|_| EarlyError::Full { capacity: N })
    }
}
