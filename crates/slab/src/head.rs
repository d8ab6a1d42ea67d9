//! What a CPU keeps of a cache: two arrays and a busy flag, on one cache line.
//!
//! ```text
//!   rows[index / 64] -> row: one pointer per CPU -> page: 64 heads of 64 bytes
//!                                                   head[index % 64]: busy n cap spare_n loaded spare counts
//! ```
//!
//! Invariants
//! - `I1`: a head is touched only by its CPU under a pin, and by interrupts and NMIs on that CPU that finish first (hal `C2`);
//!   or by whoever drains a CPU that runs nothing.
//! - `I2`: while `busy` is set, the context that set it owns everything else in the head; a nested context changes nothing in it
//!   and takes another way. `busy` is 0 again when the nested context returns, so that the flag is only ever seen set by
//!   contexts that interrupted its owner.
//! - `I3`: `n` counts the loaded array, `spare_n` the spare one. `cap` is 0 exactly while there are no arrays.
//! - `I4`: `allocs - frees` of a head is `taken - given - n - spare_n`: objects that came from depot and slabs, minus those that went
//!   there, minus those still here. So one counter on the fast path is enough.

use core::mem::MaybeUninit;
use core::ptr::NonNull;

use kmem_hal::sync::{AtomicPtr, LocalPtr, LocalU32, LocalU64, Ordering, compiler_fence};

use crate::array::Array;

/// Heads in a page of heads.
pub const COLUMNS: usize = 64;

/// One CPU's share of one cache.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Head {
    busy: LocalU32,
    pub(crate) n: LocalU32,
    pub(crate) cap: LocalU32,
    pub(crate) spare_n: LocalU32,
    pub(crate) loaded: LocalPtr<Array>,
    pub(crate) spare: LocalPtr<Array>,
    pub(crate) allocs: LocalU64,
    pub(crate) taken: LocalU64,
    pub(crate) given: LocalU64,
    /// The drain request that the CPU has answered last.
    pub(crate) drained: LocalU64,
}

// The fast path reads one line of the head and one slot.
#[cfg(not(any(loom, shuttle)))]
const _: () = {
    assert!(size_of::<Head>() == 64);
    assert!(core::mem::offset_of!(Head, allocs) < 64);
};

impl Head {
    pub(crate) fn new() -> Self {
        Self {
            busy: LocalU32::new(0),
            n: LocalU32::new(0),
            cap: LocalU32::new(0),
            spare_n: LocalU32::new(0),
            loaded: LocalPtr::new(core::ptr::null_mut()),
            spare: LocalPtr::new(core::ptr::null_mut()),
            allocs: LocalU64::new(0),
            taken: LocalU64::new(0),
            given: LocalU64::new(0),
            drained: LocalU64::new(0),
        }
    }

    /// Sets the busy flag; `None` where the interrupted context has it.
    #[inline(always)]
    pub fn enter(&self) -> Option<Busy<'_>> {
        if self.busy.get() != 0 {
            return None;
        }
        self.busy.set(1);
        // Nothing of what follows may move above the flag: an interrupt must see it first (I2).
        compiler_fence(Ordering::SeqCst);
        Some(Busy(self))
    }

    /// Objects in both arrays; exact only for the CPU itself or where it is quiet.
    pub fn cached(&self) -> usize {
        (self.n.get() + self.spare_n.get()) as usize
    }

    /// Frees counted on this CPU, derived (`I4`); exact only where the CPU is quiet.
    pub fn frees(&self) -> u64 {
        self.allocs
            .get()
            .wrapping_add(self.given.get())
            .wrapping_add(self.cached() as u64)
            .wrapping_sub(self.taken.get())
    }

    /// As new, for another cache: nobody uses the head, and it has no arrays.
    pub(crate) fn reset(&self) {
        for word in [&self.n, &self.cap, &self.spare_n] {
            word.set(0);
        }
        for word in [&self.allocs, &self.taken, &self.given] {
            word.set(0);
        }
    }

    /// Adds to the objects that came from depot and slabs.
    pub(crate) fn add_taken(&self, objects: usize) {
        self.taken
            .set(self.taken.get().wrapping_add(objects as u64));
    }

    /// Adds to the objects that went to depot and slabs.
    pub(crate) fn add_given(&self, objects: usize) {
        self.given
            .set(self.given.get().wrapping_add(objects as u64));
    }
}

/// The ownership of a head's arrays (`I2`); lets go when dropped.
#[derive(Debug)]
pub struct Busy<'h>(&'h Head);

impl Busy<'_> {
    /// Takes an object from the loaded array.
    #[inline(always)]
    pub fn pop(&self) -> Option<*mut u8> {
        let head = self.0;
        let n = head.n.get().checked_sub(1)?;
        // SAFETY: the head owns the array while busy (I2), and slots below `n + 1` hold objects (array I1).
        let object = unsafe { *Array::slots(head.loaded.get()).add(n as usize) };
        head.n.set(n);
        head.allocs.set(head.allocs.get().wrapping_add(1));
        Some(object)
    }

    /// Puts an object into the loaded array; `false` where it is full.
    #[inline(always)]
    #[must_use]
    pub fn push(&self, object: *mut u8) -> bool {
        let head = self.0;
        let n = head.n.get();
        if n >= head.cap.get() {
            return false;
        }
        // SAFETY: the head owns the array while busy (I2), and `n` is below its capacity.
        unsafe { *Array::slots(head.loaded.get()).add(n as usize) = object };
        head.n.set(n + 1);
        true
    }

    /// Takes up to `out.len()` objects from the loaded array; answers how many.
    pub fn pop_many<T>(&self, out: &mut [MaybeUninit<NonNull<T>>]) -> usize {
        let head = self.0;
        let n = head.n.get() as usize;
        let count = n.min(out.len());
        if count == 0 {
            return 0;
        }
        // SAFETY: the head owns the array while busy (I2).
        let slots = unsafe { Array::slots(head.loaded.get()) };
        for (place, at) in out.iter_mut().zip((n - count..n).rev()) {
            // SAFETY: slots below `n` hold objects, which are not null (array I1).
            place.write(unsafe { NonNull::new_unchecked((*slots.add(at)).cast()) });
        }
        head.n.set((n - count) as u32);
        head.allocs
            .set(head.allocs.get().wrapping_add(count as u64));
        count
    }

    /// Puts as many of `objects` into the loaded array as there is room for; answers how many.
    pub fn push_many<T>(&self, objects: &[NonNull<T>]) -> usize {
        let head = self.0;
        let n = head.n.get() as usize;
        let count = (head.cap.get() as usize - n).min(objects.len());
        if count == 0 {
            return 0;
        }
        // SAFETY: the head owns the array while busy (I2).
        let slots = unsafe { Array::slots(head.loaded.get()) };
        for (at, object) in (n..n + count).zip(objects) {
            // SAFETY: `at` is below the capacity.
            unsafe { *slots.add(at) = object.as_ptr().cast() };
        }
        head.n.set((n + count) as u32);
        count
    }

    /// Exchanges the loaded array and the spare one.
    pub fn swap(&self) {
        let head = self.0;
        let (loaded, spare) = (head.loaded.get(), head.spare.get());
        let (n, spare_n) = (head.n.get(), head.spare_n.get());
        head.loaded.set(spare);
        head.spare.set(loaded);
        head.n.set(spare_n);
        head.spare_n.set(n);
    }

    /// The head.
    pub fn head(&self) -> &Head {
        self.0
    }
}

impl Drop for Busy<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        // Nothing of what came before may move below the flag (I2).
        compiler_fence(Ordering::SeqCst);
        self.0.busy.set(0);
    }
}

/// A page of heads of one CPU.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct HeadPage {
    heads: [Head; COLUMNS],
}

impl HeadPage {
    /// Writes a page of unused heads to `place`, head by head: the value itself is too large for a kernel's stack.
    ///
    /// # Safety
    ///
    /// `place` is valid for writes of a `HeadPage`, aligned for it, and the caller's alone.
    pub(crate) unsafe fn write_to(place: NonNull<Self>) {
        for column in 0..COLUMNS {
            // SAFETY: the caller's promise; the column is inside the page.
            unsafe { (&raw mut (*place.as_ptr()).heads[column]).write(Head::new()) };
        }
    }

    /// The head in `column` (taken modulo the number of columns).
    #[inline(always)]
    pub fn head(&self, column: u32) -> &Head {
        &self.heads[column as usize % COLUMNS]
    }
}

/// One page pointer per CPU.
pub type Row = AtomicPtr<HeadPage>;
