//! One slab: a block of frames cut into objects, and the words that say which are free.
//!
//! The descriptor lies outside the slab, so no byte of a free object belongs to the allocator, and a write after a
//! free cannot corrupt it.
//!
//! ```text
//!   descriptor, 128 bytes                       slab, 4 KiB << order
//!   line 0  bits[0..8]: bit i = object i free    [obj 0][obj 1][obj 2] ... tail
//!   line 1  base, frame, list links, cache
//! ```
//!
//! Invariants
//! - `I1`: a set bit means that the object belongs to the slab. Whoever clears a bit by a read-modify-write and sees
//!   that it was set owns the object; whoever sets it gives the object back.
//! - `I2`: a bit that was set already when an object comes back is a double free: found at no extra cost, though only when
//!   the object reaches its slab.
//! - `I3`: `base`, `objects` and `frame` change only while every bit is clear and none is out (the slab is dead), and are
//!   written before the first bit is set (release), read after a bit was cleared (acquire).
//! - `I4`: a descriptor belongs to one cache until that cache is destroyed (type-stable): a context without the lock may
//!   look at a dead one and finds no bit.
//! - `I5`: list links and `bucket` belong to the holder of the depot's lock.
//!
//! Costs: claiming up to 64 objects is one locked instruction, and so is giving back up to 64 of one word.

use kmem_hal::sync::{
    AtomicBool, AtomicPtr, AtomicU64, LocalPtr, LocalU8, LocalU16, LocalU64, Ordering,
};
use kmem_hal::{Frame, Order};

/// Words of free bits in a descriptor.
pub const WORDS: usize = 8;

/// The most objects a slab can hold.
pub const MAX_OBJECTS: usize = WORDS * 64;

/// The descriptor of a slab.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Slab {
    bits: [AtomicU64; WORDS],
    base: LocalPtr<u8>,
    frame: LocalU64,
    cache: LocalPtr<()>,
    pub(crate) next: LocalPtr<Slab>,
    pub(crate) previous: LocalPtr<Slab>,
    /// The next of all descriptors of the cache; never changes after the descriptor was published.
    pub(crate) all_next: LocalPtr<Slab>,
    pending_next: LocalPtr<Slab>,
    objects: LocalU16,
    order: LocalU8,
    pub(crate) bucket: LocalU8,
    pending: AtomicBool,
}

#[cfg(all(target_pointer_width = "64", not(any(loom, shuttle))))]
const _: () = assert!(size_of::<Slab>() == 128);

/// `bucket` of a slab that is on no list: full, or not yet published.
pub const UNLISTED: u8 = 0xff;

/// `bucket` of a slab that the depot has not counted yet.
pub const NEW: u8 = 0xfc;

/// `bucket` of a slab whose memory is on its way back to the page source.
pub const RETIRED: u8 = 0xfe;

/// `bucket` of a dead descriptor that waits for its next slab.
pub const BURIED: u8 = 0xfd;

impl Slab {
    /// A dead descriptor of `cache`.
    #[must_use]
    pub fn new(cache: *mut ()) -> Self {
        Self {
            bits: core::array::from_fn(|_| AtomicU64::new(0)),
            base: LocalPtr::new(core::ptr::null_mut()),
            frame: LocalU64::new(0),
            cache: LocalPtr::new(cache),
            next: LocalPtr::new(core::ptr::null_mut()),
            previous: LocalPtr::new(core::ptr::null_mut()),
            all_next: LocalPtr::new(core::ptr::null_mut()),
            pending_next: LocalPtr::new(core::ptr::null_mut()),
            objects: LocalU16::new(0),
            order: LocalU8::new(0),
            bucket: LocalU8::new(NEW),
            pending: AtomicBool::new(false),
        }
    }

    /// The first byte of the slab.
    pub fn base(&self) -> *mut u8 {
        self.base.get()
    }

    /// The first frame and the order of the slab's block.
    pub fn block(&self) -> (Frame, Order) {
        let order = Order::new(self.order.get()).unwrap_or(Order::ZERO);
        (Frame::from_number(self.frame.get()), order)
    }

    /// How many objects the slab holds; 0 where it is dead.
    #[inline]
    pub fn objects(&self) -> usize {
        usize::from(self.objects.get())
    }

    /// The cache that the descriptor belongs to, as an opaque pointer.
    #[inline]
    pub fn cache(&self) -> *mut () {
        self.cache.get()
    }

    /// The bits of word `word` that stand for objects.
    fn valid(&self, word: usize) -> u64 {
        let objects = self.objects().saturating_sub(word * 64);
        if objects >= 64 {
            u64::MAX
        } else {
            (1 << objects) - 1
        }
    }

    /// Gives a dead descriptor its slab; every object still belongs to the caller (`I3`).
    pub fn set_memory(&self, base: *mut u8, frame: Frame, order: Order, objects: usize) {
        debug_assert!(objects <= MAX_OBJECTS);
        // A late double free may have left a bit in the dead descriptor.
        for word in &self.bits {
            word.store(0, Ordering::Relaxed);
        }
        self.base.set(base);
        self.frame.set(frame.number());
        self.order.set(order.get());
        self.objects.set(objects as u16);
    }

    /// Makes the descriptor dead; the caller has claimed every object.
    pub fn clear_memory(&self) {
        self.objects.set(0);
    }

    /// Sets the bits of the objects from number `first`: they belong to the slab from now on.
    pub fn release_from(&self, first: usize) {
        for word in 0..self.objects().div_ceil(64) {
            let taken = first.saturating_sub(word * 64);
            let mask = if taken >= 64 {
                0
            } else {
                self.valid(word) & (u64::MAX << taken)
            };
            if mask != 0 {
                self.bits[word].fetch_or(mask, Ordering::Release);
            }
        }
    }

    /// Claims up to `want` free objects, lowest first; `give` gets the numbers of those of one word as a mask.
    ///
    /// One locked instruction a word. Answers how many were claimed.
    pub fn claim(&self, want: usize, mut give: impl FnMut(usize, u64)) -> usize {
        let mut got = 0;
        for (number, word) in self
            .bits
            .iter()
            .enumerate()
            .take(self.objects().div_ceil(64))
        {
            if got == want {
                break;
            }
            let seen = word.load(Ordering::Relaxed);
            if seen == 0 {
                continue;
            }
            let mask = lowest(seen, want - got);
            // Acquire: what the last owner wrote to an object happens before the next owner's use (I1).
            let mine = word.fetch_and(!mask, Ordering::Acquire) & mask;
            if mine != 0 {
                got += mine.count_ones() as usize;
                give(number, mine);
            }
        }
        got
    }

    /// Gives back the objects of `mask` in word `word`; answers those that were free already (`I2`).
    #[must_use = "a bit that was set already is a double free"]
    pub fn give_back(&self, word: usize, mask: u64) -> u64 {
        self.bits[word].fetch_or(mask, Ordering::Release) & mask
    }

    /// How many objects are free now.
    pub fn free(&self) -> usize {
        let words = self.objects().div_ceil(64);
        let free = |word: &AtomicU64| word.load(Ordering::Acquire).count_ones() as usize;
        self.bits.iter().take(words).map(free).sum()
    }

    /// Claims every object, or none where one of them is out.
    pub fn claim_all(&self) -> bool {
        let words = self.objects().div_ceil(64);
        for word in 0..words {
            let all = self.valid(word);
            let claimed =
                self.bits[word].compare_exchange(all, 0, Ordering::Acquire, Ordering::Relaxed);
            if claimed.is_err() {
                for back in 0..word {
                    self.bits[back].fetch_or(self.valid(back), Ordering::Release);
                }
                return false;
            }
        }
        words > 0
    }
}

/// The lowest `count` set bits of `bits`.
fn lowest(bits: u64, count: usize) -> u64 {
    if bits.count_ones() as usize <= count {
        return bits;
    }
    let mut rest = bits;
    for _ in 0..count {
        rest &= rest - 1;
    }
    bits & !rest
}

/// Slabs into which something was freed without the depot's lock: a stack that is pushed to by anybody
/// and taken whole by the lock's holder, so that no ABA problem exists.
///
/// Invariant `P1`: a slab is on the stack at most once: its flag is set by the pusher before and cleared by the taker
/// **before** it looks at the bits, so that a later free pushes it again.
#[derive(Debug)]
pub struct Pending {
    head: AtomicPtr<Slab>,
}

impl Pending {
    kmem_hal::const_new! {
        /// An empty stack.
        pub fn new() -> Self {
            Self { head: AtomicPtr::new(core::ptr::null_mut()) }
        }
    }

    /// Puts the slab on the stack unless it is there.
    pub fn push(&self, slab: &Slab) {
        if slab.pending.swap(true, Ordering::AcqRel) {
            return;
        }
        let pointer = core::ptr::from_ref(slab).cast_mut();
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            slab.pending_next.set(head);
            match self
                .head
                .compare_exchange(head, pointer, Ordering::Release, Ordering::Relaxed)
            {
                Ok(_) => return,
                Err(found) => head = found,
            }
        }
    }

    /// Whether something may be on the stack.
    #[inline]
    pub fn any(&self) -> bool {
        !self.head.load(Ordering::Relaxed).is_null()
    }

    /// Takes the whole stack and hands over each slab, its flag cleared. Under the depot's lock.
    pub fn take(&self, mut each: impl FnMut(&Slab)) {
        let mut at = self.head.swap(core::ptr::null_mut(), Ordering::Acquire);
        // SAFETY: descriptors of a cache are type-stable (I4), and this call alone holds this chain (P1).
        while let Some(slab) = unsafe { at.as_ref() } {
            at = slab.pending_next.get();
            slab.pending.swap(false, Ordering::AcqRel);
            each(slab);
        }
    }
}

impl Default for Pending {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    extern crate std;
    use super::*;
    use std::vec::Vec;

    fn slab(objects: usize) -> Slab {
        let slab = Slab::new(core::ptr::null_mut());
        slab.set_memory(core::ptr::null_mut(), Frame::ZERO, Order::ZERO, objects);
        slab.release_from(0);
        slab
    }

    fn claim(slab: &Slab, want: usize) -> Vec<usize> {
        let mut got = Vec::new();
        slab.claim(want, |word, mask| {
            got.extend(
                (0..64)
                    .filter(|b| mask >> b & 1 == 1)
                    .map(|b| word * 64 + b),
            );
        });
        got
    }

    #[test]
    fn claims_lowest_first_and_never_twice() {
        for objects in [1, 63, 64, 65, 341, 512] {
            let slab = slab(objects);
            assert_eq!(slab.free(), objects);
            let first = claim(&slab, 10);
            assert_eq!(first, (0..objects.min(10)).collect::<Vec<_>>());
            let rest = claim(&slab, usize::MAX);
            assert_eq!(rest, (first.len()..objects).collect::<Vec<_>>());
            assert_eq!(slab.free(), 0);
            assert!(claim(&slab, 1).is_empty());
        }
    }

    #[test]
    fn a_second_give_back_is_told() {
        let slab = slab(100);
        claim(&slab, 100);
        assert_eq!(slab.give_back(1, 0b1010), 0);
        assert_eq!(slab.give_back(1, 0b0110), 0b0010);
        assert_eq!(slab.free(), 3);
    }

    #[test]
    fn an_empty_slab_is_claimed_whole_or_not_at_all() {
        let slab = slab(130);
        let one = claim(&slab, 1);
        assert!(!slab.claim_all());
        assert_eq!(slab.free(), 129);
        assert_eq!(slab.give_back(one[0] / 64, 1 << (one[0] % 64)), 0);
        assert!(slab.claim_all());
        assert_eq!(slab.free(), 0);
        slab.clear_memory();
        assert!(!slab.claim_all());
    }

    #[test]
    fn part_of_a_new_slab_can_be_kept() {
        for keep in [0, 1, 64, 70, 128] {
            let slab = Slab::new(core::ptr::null_mut());
            slab.set_memory(core::ptr::null_mut(), Frame::ZERO, Order::ZERO, 128);
            slab.release_from(keep);
            assert_eq!(claim(&slab, 512), (keep..128).collect::<Vec<_>>());
        }
    }
}
