//! Arrays of object pointers (Bonwick's magazines, Linux's sheaves), and stacks of them.
//!
//! ```text
//!   [ next | n | cap ][ slot 0 ][ slot 1 ] ... [ slot cap-1 ]
//! ```
//!
//! An array has one owner at a time: a CPU's head, or the depot. It changes hands whole, by pointer.
//!
//! Invariants
//! - `I1`: slots `0..n` hold objects that belong to the array; the others mean nothing.
//! - `I2`: while a CPU's head has the array loaded, the head keeps the count, and `n` is stale.
//! - `I3`: only the owner touches an array: a CPU under its busy flag, the depot under its lock.

use core::ptr::{self, NonNull};

use kmem_hal::sync::{LocalPtr, LocalU32};

use crate::meta::LARGEST;

/// The most slots an array can have: it fills a page of the pool.
pub const MAX_SLOTS: usize = (LARGEST - size_of::<Array>()) / size_of::<Slot>();

/// The most slots of arrays that are smaller than a page; up to here their sizes are powers of two.
pub const SMALL_SLOTS: usize = 128;

/// The next larger size of arrays.
pub const fn larger(slots: usize) -> usize {
    if slots < SMALL_SLOTS {
        slots * 2
    } else {
        MAX_SLOTS
    }
}

/// The next smaller size of arrays.
pub const fn smaller(slots: usize) -> usize {
    if slots > SMALL_SLOTS {
        SMALL_SLOTS
    } else {
        slots / 2
    }
}

/// A place for one object's pointer.
pub type Slot = *mut u8;

/// The head of an array; the slots follow it.
#[derive(Debug)]
#[repr(C, align(16))]
pub struct Array {
    next: LocalPtr<Array>,
    n: LocalU32,
    cap: LocalU32,
}

impl Array {
    /// Bytes of an array with `slots` slots.
    pub const fn bytes(slots: usize) -> usize {
        size_of::<Self>() + slots * size_of::<Slot>()
    }

    /// Makes an empty array in `memory`.
    ///
    /// # Safety
    ///
    /// `memory` is valid for `bytes(slots)` bytes, aligned to 16, and belongs to the caller.
    pub unsafe fn construct(memory: NonNull<u8>, slots: usize) -> NonNull<Self> {
        debug_assert!(slots <= MAX_SLOTS);
        let array = memory.cast::<Self>();
        // SAFETY: the memory is valid for the header by contract.
        unsafe {
            array.write(Self {
                next: LocalPtr::new(ptr::null_mut()),
                n: LocalU32::new(0),
                cap: LocalU32::new(slots as u32),
            });
        }
        array
    }

    /// The first slot.
    ///
    /// # Safety
    ///
    /// `array` was made by [`construct`](Self::construct) and its memory still belongs to it.
    #[inline(always)]
    pub unsafe fn slots(array: *mut Self) -> *mut Slot {
        // SAFETY: the slots follow the header in the same memory.
        unsafe { array.add(1).cast() }
    }

    /// The array whose first slot this is; null for null.
    #[inline]
    pub fn of_slots(slots: *mut Slot) -> *mut Self {
        if slots.is_null() {
            return ptr::null_mut();
        }
        slots.cast::<Self>().wrapping_sub(1)
    }

    /// How many objects it held when it last changed hands (`I2`).
    #[inline]
    pub fn len(&self) -> usize {
        self.n.get() as usize
    }

    /// Notes how many objects it holds.
    #[inline]
    pub fn set_len(&self, n: usize) {
        self.n.set(n as u32);
    }

    /// How many slots it has.
    #[inline]
    pub fn capacity(&self) -> usize {
        self.cap.get() as usize
    }
}

/// A stack of arrays, kept under the depot's lock.
#[derive(Debug)]
pub struct ArrayStack {
    top: *mut Array,
    objects: u32,
}

impl ArrayStack {
    /// An empty stack.
    pub const fn new() -> Self {
        Self {
            top: ptr::null_mut(),
            objects: 0,
        }
    }

    /// Puts an array on top.
    ///
    /// # Safety
    ///
    /// The caller owns the array and gives it to the stack (`I3`); its length is right.
    #[inline]
    pub unsafe fn push(&mut self, array: NonNull<Array>) {
        // SAFETY: the caller owns the array.
        let header = unsafe { array.as_ref() };
        header.next.set(self.top);
        self.top = array.as_ptr();
        self.objects += header.len() as u32;
    }

    /// Takes the top array.
    #[inline]
    pub fn pop(&mut self) -> Option<NonNull<Array>> {
        let array = NonNull::new(self.top)?;
        // SAFETY: the stack owns the arrays on it.
        let header = unsafe { array.as_ref() };
        self.top = header.next.get();
        self.objects -= header.len() as u32;
        Some(array)
    }

    /// Objects in all arrays of the stack.
    pub const fn objects(&self) -> usize {
        self.objects as usize
    }
}

impl Default for ArrayStack {
    fn default() -> Self {
        Self::new()
    }
}
