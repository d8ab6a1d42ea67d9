//! What a CPU keeps of a cache: two arrays and a busy flag, on one cache line.
//!
//! ```text
//!   rows[index / 64] -> row: one pointer per CPU -> page: 64 heads of 64 bytes
//!                                                   head[index % 64]: busy  top base end  spare  counts
//!
//!   loaded array   [ o ][ o ][ o ][   ][   ]
//!                  ^base          ^top      ^end        full: top = end; empty: top = base; no array: all three null
//! ```
//!
//! Invariants
//! - `I1`: a head is touched only by its CPU under a pin, and by interrupts and NMIs on that CPU that finish first (hal `C2`);
//!   or by whoever drains a CPU that runs nothing.
//! - `I2`: while `busy` is set, the context that set it owns everything else in the head; a nested context changes nothing in it
//!   and takes another way. `busy` is 0 again when the nested context returns, so that the flag is only ever seen set by
//!   contexts that interrupted its owner.
//! - `I3`: `top` is between `base` and `end`, which are the first slot of the loaded array and the one behind its last. The count of the
//!   spare array is in the head as well, as other CPUs read it, and nobody but the owner may look into an array. There is a spare array exactly while there is a loaded one,
//!   also while something is called that may unwind (a report of a misuse): what is on its way to the slabs is counted out of an array first.
//! - `I4`: `allocs - frees` of a head is `net - cached`: objects that came from depot and slabs minus those that went there, minus
//!   those still here. So one counter on the fast path is enough.

use core::mem::MaybeUninit;
use core::ptr::{self, NonNull};

use kmem_hal::sync::{AtomicPtr, LocalPtr, LocalU16, LocalU32, LocalU64, Ordering, compiler_fence};

use crate::array::{Array, Slot};

/// Heads in a page of heads.
pub const COLUMNS: usize = 64;

/// One CPU's share of one cache.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Head {
    /// 0 or 1. A whole word: processors forward a store to the next load at once where both are words, and not where they are
    /// bytes (Zen 3: a pair of calls took 4.9 ns with a byte here and takes 3.0 ns).
    busy: LocalU32,
    /// The drain request that the CPU has answered last, its low half.
    pub(crate) drained: LocalU32,
    top: LocalPtr<Slot>,
    base: LocalPtr<Slot>,
    end: LocalPtr<Slot>,
    spare: LocalPtr<Array>,
    pub(crate) allocs: LocalU64,
    /// Objects that came from depot and slabs, minus those that went there (modulo 2^64).
    net: LocalU64,
    /// Allocations and frees at the last event, modulo 2^32.
    stamp: LocalU32,
    /// Events (exchanges, refills, flushes) in a row that followed the one before at once: the cache streams.
    streak: LocalU16,
    /// Objects in the spare array (`I3`).
    spare_len: LocalU16,
}

// The fast path reads one line of the head and one slot.
#[cfg(not(any(loom, shuttle)))]
const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<Head>() == 64 && align_of::<Head>() == 64);
    assert!(offset_of!(Head, busy) == 0);
    assert!(offset_of!(Head, allocs) + size_of::<u64>() <= 64);
    assert!(size_of::<HeadPage>() == COLUMNS * 64);
};

impl Head {
    /// A head without arrays.
    pub fn new() -> Self {
        Self {
            busy: LocalU32::new(0),
            drained: LocalU32::new(0),
            top: LocalPtr::new(ptr::null_mut()),
            base: LocalPtr::new(ptr::null_mut()),
            end: LocalPtr::new(ptr::null_mut()),
            spare: LocalPtr::new(ptr::null_mut()),
            allocs: LocalU64::new(0),
            net: LocalU64::new(0),
            stamp: LocalU32::new(0),
            streak: LocalU16::new(0),
            spare_len: LocalU16::new(0),
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

    /// Objects in the loaded array.
    #[inline]
    pub fn loaded_len(&self) -> usize {
        slots_between(self.base.get(), self.top.get())
    }

    /// Objects in the spare array.
    #[inline]
    pub fn spare_len(&self) -> usize {
        usize::from(self.spare_len.get())
    }

    /// Slots of the loaded array; 0 where there are no arrays.
    #[inline]
    pub fn capacity(&self) -> usize {
        slots_between(self.base.get(), self.end.get())
    }

    /// Objects in both arrays; exact only for the CPU itself or where it is quiet.
    #[inline]
    pub fn cached(&self) -> usize {
        self.loaded_len() + self.spare_len()
    }

    /// Frees counted on this CPU, derived (`I4`); exact only where the CPU is quiet.
    #[inline]
    pub fn frees(&self) -> u64 {
        self.allocs
            .get()
            .wrapping_add(self.cached() as u64)
            .wrapping_sub(self.net.get())
    }

    /// As new, for another cache: nobody uses the head, and it has no arrays.
    pub(crate) fn reset(&self) {
        for word in [&self.allocs, &self.net] {
            word.set(0);
        }
        self.stamp.set(0);
        self.streak.set(0);
    }
}

impl Default for Head {
    fn default() -> Self {
        Self::new()
    }
}

/// Slots from `from` to `to` of one array, or 0 where a reader without the flag sees words of two.
#[inline]
fn slots_between(from: *mut Slot, to: *mut Slot) -> usize {
    let slots = to.addr().wrapping_sub(from.addr()) / size_of::<Slot>();
    if slots <= crate::array::MAX_SLOTS {
        slots
    } else {
        0
    }
}

/// The ownership of a head's arrays (`I2`); lets go when dropped.
#[derive(Debug)]
pub struct Busy<'h>(&'h Head);

impl Busy<'_> {
    /// Takes an object from the loaded array.
    #[inline(always)]
    pub fn pop(&self) -> Option<NonNull<u8>> {
        let head = self.0;
        let top = head.top.get();
        if top == head.base.get() {
            return None;
        }
        // SAFETY: `top` is above `base` (I3), so the slot below it is the loaded array's, which the head owns while busy (I2).
        let at = unsafe { top.sub(1) };
        // SAFETY: as above; slots below `top` hold objects, which are not null (array I1).
        let object = unsafe { NonNull::new_unchecked(*at) };
        head.top.set(at);
        head.allocs.set(head.allocs.get().wrapping_add(1));
        Some(object)
    }

    /// Puts an object into the loaded array; `false` where it is full.
    #[inline(always)]
    #[must_use]
    pub fn push(&self, object: NonNull<u8>) -> bool {
        let head = self.0;
        let top = head.top.get();
        if top == head.end.get() {
            return false;
        }
        // SAFETY: `top` is below `end` (I3): a slot of the loaded array, which the head owns while busy (I2).
        unsafe { *top = object.as_ptr() };
        // SAFETY: at most `end`.
        head.top.set(unsafe { top.add(1) });
        true
    }

    /// Takes up to `out.len()` objects from the loaded array; answers how many.
    pub fn pop_many<T>(&self, out: &mut [MaybeUninit<NonNull<T>>]) -> usize {
        let head = self.0;
        let count = head.loaded_len().min(out.len());
        let mut at = head.top.get();
        for place in &mut out[..count] {
            // SAFETY: there are `count` objects below `top`, in the array that the head owns while busy (I2, I3).
            at = unsafe { at.sub(1) };
            // SAFETY: as above; slots below `top` hold objects, which are not null (array I1).
            place.write(unsafe { NonNull::new_unchecked((*at).cast()) });
        }
        head.top.set(at);
        head.allocs
            .set(head.allocs.get().wrapping_add(count as u64));
        count
    }

    /// Puts as many of `objects` into the loaded array as there is room for; answers how many.
    pub fn push_many<T>(&self, objects: &[NonNull<T>]) -> usize {
        let head = self.0;
        let room = slots_between(head.top.get(), head.end.get());
        let count = room.min(objects.len());
        let mut at = head.top.get();
        for object in &objects[..count] {
            // SAFETY: there is room for `count` in the array that the head owns while busy (I2, I3).
            unsafe {
                *at = object.as_ptr().cast();
                at = at.add(1);
            }
        }
        head.top.set(at);
        count
    }

    /// Exchanges the loaded array and the spare one, if there are arrays.
    #[inline]
    pub fn swap(&self) {
        let head = self.0;
        let (loaded, n) = (self.loaded(), head.loaded_len());
        let spare = NonNull::new(head.spare.get());
        // SAFETY: the head owns both arrays while busy (I2).
        if let (Some(array), Some(spare)) = (unsafe { loaded.as_ref() }, spare) {
            array.set_len(n);
            self.load(spare);
            head.spare.set(loaded);
            head.spare_len.set(n as u16);
        }
    }

    /// The loaded array, null where there is none; the head keeps its count.
    #[inline]
    pub fn loaded(&self) -> *mut Array {
        Array::of_slots(self.0.base.get())
    }

    /// Makes `array`, which the caller owns, the loaded one. Whatever was loaded is the caller's.
    #[inline]
    pub fn load(&self, array: NonNull<Array>) {
        let head = self.0;
        // SAFETY: the caller owns the array.
        let (n, capacity) = unsafe { (array.as_ref().len(), array.as_ref().capacity()) };
        // SAFETY: as above.
        let base = unsafe { Array::slots(array.as_ptr()) };
        head.base.set(base);
        // SAFETY: the array has `capacity` slots, of which the first `n <= capacity` are used.
        unsafe {
            head.end.set(base.add(capacity));
            head.top.set(base.add(n));
        }
    }

    /// Notes that the loaded array holds its first `n` slots.
    #[inline]
    pub fn set_loaded_len(&self, n: usize) {
        debug_assert!(n <= self.0.capacity());
        self.0.top.set(self.0.base.get().wrapping_add(n));
    }

    /// The first slot of the spare array; null where there is none.
    #[inline]
    pub fn spare_slots(&self) -> *mut Slot {
        let spare = self.0.spare.get();
        if spare.is_null() {
            return ptr::null_mut();
        }
        // SAFETY: the head owns the array while busy (I2).
        unsafe { Array::slots(spare) }
    }

    /// Notes that the spare array, if there is one, holds its first `n` slots.
    #[inline]
    pub fn set_spare_len(&self, n: usize) {
        // SAFETY: the head owns the array while busy (I2).
        if let Some(spare) = unsafe { self.0.spare.get().as_ref() } {
            debug_assert!(n <= spare.capacity());
            spare.set_len(n);
            self.0.spare_len.set(n as u16);
        }
    }

    /// Exchanges the spare array for another that the caller owns, null or its count noted; the old one, its count noted, is the caller's.
    #[inline]
    pub fn replace_spare(&self, array: *mut Array) -> *mut Array {
        let old = self.0.spare.get();
        // SAFETY: the caller owns the array.
        let n = unsafe { array.as_ref() }.map_or(0, Array::len);
        self.0.spare.set(array);
        self.0.spare_len.set(n as u16);
        old
    }

    /// Takes both arrays away, if there are any: the head is without arrays, and they are the caller's.
    pub fn unload(&self) -> [*mut Array; 2] {
        let head = self.0;
        let (loaded, n) = (self.loaded(), head.loaded_len());
        // SAFETY: the head owns the array while busy (I2).
        if let Some(loaded) = unsafe { loaded.as_ref() } {
            loaded.set_len(n);
        }
        for word in [&head.top, &head.base, &head.end] {
            word.set(ptr::null_mut());
        }
        head.streak.set(0);
        [loaded, self.replace_spare(ptr::null_mut())]
    }

    /// Adds to the objects that came from depot and slabs.
    #[inline]
    pub fn add_taken(&self, objects: usize) {
        self.0
            .net
            .set(self.0.net.get().wrapping_add(objects as u64));
    }

    /// Counts an object that goes from a slab to its user without a stay in an array.
    #[inline]
    pub fn count_alloc(&self) {
        let allocs = &self.0.allocs;
        allocs.set(allocs.get().wrapping_add(1));
        self.add_taken(1);
    }

    /// Adds to the objects that went to depot and slabs.
    #[inline]
    pub fn add_given(&self, objects: usize) {
        self.0
            .net
            .set(self.0.net.get().wrapping_sub(objects as u64));
    }

    /// Notes an exchange, refill or flush; answers how many in a row followed the one before within about an array's worth of calls.
    #[inline]
    pub fn note_event(&self) -> u32 {
        let head = self.0;
        let calls = head.allocs.get().wrapping_add(head.frees());
        let since = (calls as u32).wrapping_sub(head.stamp.get());
        head.stamp.set(calls as u32);
        let capacity = head.capacity() as u32;
        let streak = if since <= 2 * capacity + 2 {
            head.streak.get().saturating_add(1)
        } else if since <= 4 * capacity {
            // Neither: arrays that are just large enough do not shrink.
            head.streak.get()
        } else {
            0
        };
        head.streak.set(streak);
        u32::from(streak)
    }

    /// How many events in a row followed the one before, as of the last [`note_event`](Self::note_event).
    pub fn streak(&self) -> u32 {
        u32::from(self.0.streak.get())
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

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    extern crate alloc;
    use super::*;

    /// Arrays that are just large enough for a program's swings stay as they are.
    #[test]
    fn a_stream_goes_on_or_stands_still_or_ends() {
        let head = Head::new();
        let busy = head.enter().unwrap();
        let memory = alloc::vec![0u128; Array::bytes(8) / 16].leak();
        // SAFETY: leaked memory of that size and alignment.
        let array = unsafe { Array::construct(NonNull::from(memory).cast(), 8) };
        busy.load(array);
        // An event after so many allocations, of which none came back.
        let after = |calls: usize| {
            head.allocs.set(head.allocs.get() + calls as u64);
            busy.add_taken(calls);
            assert_eq!(head.frees(), 0);
            busy.note_event()
        };
        let events = [1, 18, 19, 32, 10, 33, 18];
        assert_eq!(events.map(after), [1, 2, 2, 2, 3, 0, 1]);
    }
}
