//! One slab: a block of frames cut into objects, and the words that say which are free.
//!
//! The descriptor lies outside the slab, so no byte of a free object belongs to the allocator, and a write after a
//! free cannot corrupt it.
//!
//! ```text
//!   descriptor, 80 bytes                                           slab, 1 to 16 pages or a block
//!   bits: bit i = object i is free
//!   remote: freed without the lock, not yet merged               [colour][obj 0][obj 1] ... tail
//!   base, list links, cache, counts, more -> words of objects 64 to 511, where there are so many
//! ```
//!
//! Most objects come and go many at a time under the depot's lock, which is one locked instruction for all of them: their bits are
//! plain words. A context that cannot have the lock (it interrupted its holder) uses the remote words, whose bits are set and cleared
//! by locked instructions; the next holder of the lock merges them.
//!
//! Invariants
//! - `I1`: a set bit means that the object belongs to the slab. `bits` and `free` belong to the holder of the depot's lock. Of the remote
//!   words: whoever clears a bit by a read-modify-write and sees that it was set owns the object; whoever sets it gives the object back.
//! - `I2`: a bit that was set already when an object comes back, or that is set in both words when they are merged, is a double free: found
//!   at no extra cost, though only when the object reaches its slab.
//! - `I3`: `base`, `objects` and `pages` change only while every bit is clear and none is out (the slab is dead), and are
//!   written before the first bit is set (release), read after a bit was cleared (acquire).
//! - `I4`: a descriptor belongs to one cache until that cache is destroyed (type-stable): a context without the lock may
//!   look at a dead one and finds no bit.
//! - `I5`: list links, `bucket` and `free` belong to the holder of the depot's lock; `free` counts the set bits of `bits`. The links and
//!   `bucket` of a retired slab, and of a descriptor on its way to new memory, belong to whoever took it out, until that one buries it
//!   under the lock or gives it up.
//!
//! Costs: taking or giving any number of objects under the lock is no locked instruction of its own; without it, one a word.

use kmem_hal::NodeId;
use kmem_hal::sync::{
    AtomicBool, AtomicU64, LocalPtr, LocalU8, LocalU16, LocalU64, Ordering, fence,
};

/// Words of free bits in a descriptor.
pub const WORDS: usize = 8;

/// Objects of which a descriptor keeps the bits itself.
pub const OWN_OBJECTS: usize = 64;

/// Up to here a slab may have any number of pages; above it is a block.
const SINGLY: u8 = 16;

/// The most objects a slab can hold.
pub const MAX_OBJECTS: usize = WORDS * 64;

/// The free bits of 64 objects.
#[derive(Debug)]
#[repr(C)]
pub struct Word {
    bits: LocalU64,
    remote: AtomicU64,
}

impl Word {
    fn new() -> Self {
        Self {
            bits: LocalU64::new(0),
            remote: AtomicU64::new(0),
        }
    }
}

/// The free bits of objects 64 to 511.
#[derive(Debug)]
#[repr(C, align(16))]
pub struct MoreWords([Word; WORDS - 1]);

impl MoreWords {
    /// Words without a set bit.
    #[must_use]
    pub fn new() -> Self {
        Self(core::array::from_fn(|_| Word::new()))
    }
}

impl Default for MoreWords {
    fn default() -> Self {
        Self::new()
    }
}

/// The descriptor of a slab.
#[derive(Debug)]
#[repr(C, align(16))]
pub struct Slab {
    word: Word,
    base: LocalPtr<u8>,
    cache: LocalPtr<()>,
    /// The words of objects from number 64; null where the cache's slabs have fewer. Never changes.
    more: LocalPtr<MoreWords>,
    pub(crate) next: LocalPtr<Slab>,
    pub(crate) previous: LocalPtr<Slab>,
    /// The next of all descriptors of the cache; never changes after the descriptor was published.
    pub(crate) all_next: LocalPtr<Slab>,
    pub(crate) pending_next: LocalPtr<Slab>,
    objects: LocalU16,
    free: LocalU16,
    /// Up to 16 the pages, above it 16 and the order of the block.
    pages: LocalU8,
    /// Never changes.
    node: LocalU8,
    pub(crate) bucket: LocalU8,
    pub(crate) pending: AtomicBool,
}

#[cfg(all(target_pointer_width = "64", not(any(loom, shuttle))))]
const _: () = assert!(size_of::<Slab>() == 80 && size_of::<MoreWords>() == 112);

/// `bucket` of a slab that is on no list: full, or not yet published.
pub const UNLISTED: u8 = 0xff;

/// `bucket` of a slab that the depot has not counted yet.
pub const NEW: u8 = 0xfc;

/// `bucket` of a slab that whoever emptied it has in a chain: its memory is on its way back to the page source.
pub const RETIRED: u8 = 0xfe;

/// `bucket` of a descriptor without memory, given up by its holder, who could not have the lock: to be buried by who finds it.
const GIVEN_UP: u8 = 0xfb;

/// `bucket` of a dead descriptor that waits for its next slab.
pub const BURIED: u8 = 0xfd;

impl Slab {
    /// A dead descriptor of `cache` for memory of node `node`, below 256. `more` is null or stays with the descriptor.
    #[must_use]
    pub fn new(cache: *mut (), node: NodeId, more: *mut MoreWords) -> Self {
        let null = || LocalPtr::new(core::ptr::null_mut());
        Self {
            word: Word::new(),
            base: LocalPtr::new(core::ptr::null_mut()),
            cache: LocalPtr::new(cache),
            more: LocalPtr::new(more),
            next: null(),
            previous: null(),
            all_next: null(),
            pending_next: null(),
            objects: LocalU16::new(0),
            free: LocalU16::new(0),
            pages: LocalU8::new(0),
            node: LocalU8::new(node.get() as u8),
            bucket: LocalU8::new(NEW),
            pending: AtomicBool::new(false),
        }
    }

    /// The first byte of the first object: in the slab's first page, behind its colour.
    pub fn base(&self) -> *mut u8 {
        self.base.get()
    }

    /// How many pages the slab has.
    pub fn pages(&self) -> u64 {
        match self.pages.get() {
            pages @ ..=SINGLY => u64::from(pages),
            order => 1 << (order - SINGLY),
        }
    }

    /// The node that all memory comes from which the descriptor ever has.
    pub fn node(&self) -> NodeId {
        NodeId::new(u16::from(self.node.get()))
    }

    /// The words beyond the descriptor's own.
    pub fn more(&self) -> *mut MoreWords {
        self.more.get()
    }

    /// The word of objects from `number * 64`. The slab has so many.
    #[inline(always)]
    fn word(&self, number: usize) -> &Word {
        if number == 0 {
            return &self.word;
        }
        // SAFETY: a cache whose slabs have more than 64 objects gives its descriptors the words (see `set_memory`), which live
        // as long as the descriptor.
        match unsafe { self.more.get().as_ref() } {
            Some(more) => &more.0[(number - 1) % (WORDS - 1)],
            None => &self.word,
        }
    }

    /// The words that have bits of objects, with their numbers.
    fn words(&self) -> impl Iterator<Item = (usize, &Word)> {
        (0..self.objects().div_ceil(64)).map(|number| (number, self.word(number)))
    }

    /// How many objects the slab holds; 0 where it is dead.
    #[inline]
    pub fn objects(&self) -> usize {
        usize::from(self.objects.get())
    }

    /// Whether the descriptor has memory; what is read of that afterwards is no older. For who came by a late note and has no object of the slab.
    pub fn is_live(&self) -> bool {
        let live = self.objects() > 0;
        if live {
            fence(Ordering::Acquire);
        }
        live
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
    pub fn set_memory(&self, base: *mut u8, pages: u64, objects: usize) {
        let room = if self.more.get().is_null() {
            OWN_OBJECTS
        } else {
            MAX_OBJECTS
        };
        debug_assert!(objects <= room);
        let objects = objects.min(room);
        // A late double free may have left a bit in the dead descriptor.
        for number in 0..objects.div_ceil(64) {
            let word = self.word(number);
            word.bits.set(0);
            word.remote.store(0, Ordering::Relaxed);
        }
        self.free.set(0);
        self.base.set(base);
        let singly = pages <= u64::from(SINGLY);
        debug_assert!(singly || pages.is_power_of_two());
        self.pages.set(if singly {
            pages as u8
        } else {
            SINGLY + pages.ilog2() as u8
        });
        // Last: a late note on the pending stack has the descriptor counted as soon as it has objects.
        fence(Ordering::Release);
        self.objects.set(objects as u16);
    }

    /// Makes the descriptor dead; the caller has claimed every object.
    pub fn clear_memory(&self) {
        self.objects.set(0);
    }

    /// Gives a descriptor without memory up, without the lock (`I5`): whoever has the lock and finds it buries it.
    pub fn give_up(&self) {
        // What the holder read of the links comes before the write of whoever buries it.
        fence(Ordering::Release);
        self.bucket.set(GIVEN_UP);
    }

    /// Whether the descriptor is to be buried by the caller, who has the depot's lock.
    pub fn is_given_up(&self) -> bool {
        let given_up = self.bucket.get() == GIVEN_UP;
        if given_up {
            fence(Ordering::Acquire);
        }
        given_up
    }

    /// Objects number `first` and above belong to the slab from now on. Under the depot's lock.
    pub fn release_from(&self, first: usize) {
        self.each_mask_from(first, |word, mask| self.word(word).bits.set(mask));
        self.free.set(self.objects().saturating_sub(first) as u16);
    }

    /// As [`release_from`](Self::release_from), without the lock.
    pub fn release_from_remote(&self, first: usize) {
        self.each_mask_from(first, |word, mask| {
            self.word(word).remote.fetch_or(mask, Ordering::Release);
        });
    }

    fn each_mask_from(&self, first: usize, mut each: impl FnMut(usize, u64)) {
        for word in 0..self.objects().div_ceil(64) {
            let taken = first.saturating_sub(word * 64);
            let mask = if taken >= 64 {
                0
            } else {
                self.valid(word) & (u64::MAX << taken)
            };
            if mask != 0 {
                each(word, mask);
            }
        }
    }

    /// Takes up to `want` free objects, lowest first; `give` gets the numbers of those of one word as a mask. Under the depot's lock.
    ///
    /// Answers how many were taken.
    pub fn claim(&self, want: usize, mut give: impl FnMut(usize, u64)) -> usize {
        let want = want.min(usize::from(self.free.get()));
        let mut got = 0;
        for (number, word) in self.words() {
            if got == want {
                break;
            }
            let seen = word.bits.get();
            if seen == 0 {
                continue;
            }
            let mine = lowest(seen, want - got);
            word.bits.set(seen & !mine);
            got += mine.count_ones() as usize;
            give(number, mine);
        }
        self.free.set(self.free.get() - got as u16);
        got
    }

    /// Takes one object that was freed without the lock; for a context that cannot have the lock either.
    pub fn claim_remote(&self) -> Option<usize> {
        for (number, word) in self.words() {
            let mut seen = word.remote.load(Ordering::Relaxed);
            while seen != 0 {
                let bit = seen & seen.wrapping_neg();
                // Acquire: what the last owner wrote to an object happens before the next owner's use (I1).
                seen = word.remote.fetch_and(!bit, Ordering::Acquire);
                if seen & bit != 0 {
                    return Some(number * 64 + bit.trailing_zeros() as usize);
                }
                seen &= !bit;
            }
        }
        None
    }

    /// Gives the objects of word `number` that `mask` says back; answers those of them that were free already (`I2`). Under the depot's lock.
    #[inline]
    #[must_use = "what it answers are double frees"]
    pub fn give_back_many(&self, number: usize, mask: u64) -> u64 {
        let word = self.word(number);
        let seen = word.bits.get();
        let twice = (seen | word.remote.load(Ordering::Relaxed)) & mask;
        word.bits.set(seen | (mask & !twice));
        let given = (mask & !twice).count_ones() as u16;
        self.free.set(self.free.get() + given);
        twice
    }

    /// Gives object `index` back; `false` where it was free already (`I2`). Under the depot's lock.
    #[inline]
    #[must_use = "false is a double free"]
    pub fn give_back(&self, index: usize) -> bool {
        self.give_back_many(index / 64, 1 << (index % 64)) == 0
    }

    /// Gives object `index` back without the lock; `false` where it was free already (`I2`).
    #[must_use = "false is a double free"]
    pub fn give_back_remote(&self, index: usize) -> bool {
        let (word, bit) = (self.word(index / 64), 1 << (index % 64));
        word.bits.get() & bit == 0 && word.remote.fetch_or(bit, Ordering::Release) & bit == 0
    }

    /// Merges what was freed without the lock into the slab's bits; answers how many objects were free twice. Under the depot's lock.
    pub fn merge(&self) -> usize {
        let (mut twice, mut free) = (0, self.free.get());
        for (_, word) in self.words() {
            if word.remote.load(Ordering::Relaxed) != 0 {
                let (came, seen) = (word.remote.swap(0, Ordering::Acquire), word.bits.get());
                twice += (came & seen).count_ones() as usize;
                free += (came & !seen).count_ones() as u16;
                word.bits.set(came | seen);
            }
        }
        self.free.set(free);
        twice
    }

    /// How many objects are free in the slab's own words: exact under the depot's lock after a [`merge`](Self::merge).
    #[inline]
    pub fn free(&self) -> usize {
        usize::from(self.free.get())
    }

    /// How many objects are free, those included that wait to be merged. Exact where nobody uses the cache.
    pub fn free_in_all(&self) -> usize {
        let waiting =
            |(_, word): (usize, &Word)| word.remote.load(Ordering::Relaxed).count_ones() as usize;
        self.free() + self.words().map(waiting).sum::<usize>()
    }

    /// Takes every object, or none where one of them is out. Under the depot's lock.
    pub fn claim_all(&self) -> bool {
        if self.objects() == 0 || self.free() != self.objects() {
            return false;
        }
        for (_, word) in self.words() {
            word.bits.set(0);
        }
        self.free.set(0);
        true
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

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    extern crate alloc;
    use super::*;
    use alloc::vec::Vec;

    /// A slab whose objects all belong to the caller.
    fn taken(objects: usize) -> Slab {
        let more = alloc::boxed::Box::leak(alloc::boxed::Box::new(MoreWords::new()));
        let more = if objects > OWN_OBJECTS {
            core::ptr::from_mut(more)
        } else {
            core::ptr::null_mut()
        };
        let slab = Slab::new(core::ptr::null_mut(), NodeId::ZERO, more);
        slab.set_memory(core::ptr::null_mut(), 1, objects);
        slab
    }

    fn slab(objects: usize) -> Slab {
        let slab = taken(objects);
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
    fn a_second_give_back_is_told_whichever_way_the_first_went() {
        for first_remote in [false, true] {
            for second_remote in [false, true] {
                let slab = slab(100);
                claim(&slab, 100);
                let give = |remote| {
                    if remote {
                        slab.give_back_remote(70)
                    } else {
                        slab.give_back(70)
                    }
                };
                assert!(give(first_remote));
                assert!(!give(second_remote), "{first_remote} {second_remote}");
                assert_eq!(slab.free_in_all(), 1);
                assert_eq!(slab.merge(), 0);
                assert_eq!(slab.free(), 1);
            }
        }
    }

    #[test]
    fn of_many_given_back_those_that_were_free_are_told_and_the_others_count() {
        let slab = slab(100);
        claim(&slab, 100);
        assert!(slab.give_back(65) && slab.give_back_remote(66));
        assert_eq!(slab.give_back_many(1, 0b1111), 0b0110);
        assert_eq!(slab.free(), 3);
        assert_eq!(slab.merge(), 0);
        assert_eq!(claim(&slab, 100), (64..68).collect::<Vec<_>>());
    }

    #[test]
    fn a_double_free_that_raced_is_found_by_the_merge() {
        let slab = slab(10);
        claim(&slab, 10);
        assert!(slab.give_back_remote(3));
        // As if both contexts had looked before either wrote.
        slab.word.bits.set(1 << 3);
        slab.free.set(1);
        assert_eq!(slab.merge(), 1);
        assert_eq!(slab.free(), 1);
    }

    #[test]
    fn an_empty_slab_is_claimed_whole_or_not_at_all() {
        let slab = slab(130);
        let one = claim(&slab, 1);
        assert!(!slab.claim_all());
        assert_eq!(slab.free(), 129);
        assert!(slab.give_back_remote(one[0]));
        assert!(!slab.claim_all(), "not merged yet");
        assert_eq!(slab.merge(), 0);
        assert!(slab.claim_all());
        assert_eq!(slab.free(), 0);
        slab.clear_memory();
        assert!(!slab.claim_all());
    }

    #[test]
    fn part_of_a_new_slab_can_be_kept() {
        for keep in [0, 1, 64, 70, 128] {
            for remote in [false, true] {
                let slab = taken(128);
                if remote {
                    slab.release_from_remote(keep);
                    assert_eq!(slab.free(), 0);
                    assert_eq!(slab.merge(), 0);
                } else {
                    slab.release_from(keep);
                }
                assert_eq!(slab.free(), 128 - keep);
                assert_eq!(claim(&slab, 512), (keep..128).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn what_was_freed_without_the_lock_can_be_had_without_it() {
        let slab = slab(100);
        claim(&slab, 100);
        assert_eq!(slab.claim_remote(), None);
        assert!(slab.give_back_remote(64) && slab.give_back_remote(2));
        assert_eq!(slab.claim_remote(), Some(2));
        assert_eq!(slab.claim_remote(), Some(64));
        assert_eq!(slab.claim_remote(), None);
    }
}
