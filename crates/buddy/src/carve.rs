//! Carving: parts of one piece of memory, each on lines of its own.

use core::mem::MaybeUninit;
use core::ptr::NonNull;

/// Hands out parts of one piece of memory, each on lines of its own.
pub(crate) struct Carver {
    pub next: NonNull<u8>,
    pub left: usize,
}

const LINE: usize = 64;

/// Bytes that `count` values of `T` take in a carver.
pub(crate) const fn room<T>(count: usize) -> u64 {
    (size_of::<T>() as u64 * count as u64).next_multiple_of(LINE as u64)
}

impl Carver {
    /// `count` values made by `make`. The plan has counted them, so that they fit.
    pub fn slice<T: 'static>(
        &mut self,
        count: usize,
        mut make: impl FnMut(usize) -> T,
    ) -> &'static mut [T] {
        // SAFETY: every place is written to.
        unsafe {
            self.places(count, |place, index| {
                place.write(make(index));
            })
        }
    }

    /// `count` values, each made in its place by `build`.
    ///
    /// # Safety
    ///
    /// `build` leaves a value in the place.
    pub unsafe fn places<T: 'static>(
        &mut self,
        count: usize,
        mut build: impl FnMut(&mut MaybeUninit<T>, usize),
    ) -> &'static mut [T] {
        const { assert!(align_of::<T>() <= LINE) };
        let bytes = room::<T>(count) as usize;
        if bytes == 0 || bytes > self.left {
            debug_assert!(bytes == 0, "the plan and the build disagree");
            return &mut [];
        }
        let first = self.next.cast::<MaybeUninit<T>>();
        for index in 0..count {
            // SAFETY: the carver owns `left` bytes from `next`, aligned to a line, and `bytes` fit.
            build(unsafe { first.add(index).as_mut() }, index);
        }
        // SAFETY: as above: `bytes` is at most `left`.
        self.next = unsafe { self.next.add(bytes) };
        self.left -= bytes;
        // SAFETY: `count` values were just built; the memory is the allocator's for ever and nobody else's.
        unsafe { core::slice::from_raw_parts_mut(first.cast().as_ptr(), count) }
    }
}
