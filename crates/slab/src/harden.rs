//! What policies do to objects on their way out and back.
//!
//! ```text
//!   slot of a cache   [ .. tag | object .......... | red zone ...... | record: size, source line ]
//!                      8 bytes   0x6b while free     0xbb
//!                  all that check  Poison            Redzone           Redzone, Owner
//! ```
//!
//! The tag is a function of the slot's address, of its cache's index and of the size that was asked for: one value while the object is in use, its
//! complement while it is free. So a free compares one word with what it must be, without looking anything up: a second free finds the complement; an
//! address inside an object, or one of another cache, class, alignment or size, finds another object's tag or none.
//!
//! ```text
//!   tag = salt ^ [ size: 16 bits | index: 10 bits | 0: 38 bits ] ^ (address of the object - what is in front of it)
//! ```
//!
//! The tag stands in front of the object, on the line that its next user writes first: the free of a cold object brings the line that the allocation
//! after it needs. What is in front of an object, its *front*, is the tag's 8 bytes, or the object's alignment where that is more. A
//! write behind an object shows in the tag of the one behind it.
//!
//! Arrays, depots and slabs know slots only; here a slot becomes an object and the other way round.
//!
//! Invariants
//! - `I1`: of a cache that checks, the word before an object in use is its tag, written by whoever owns the object. A front is one of [`fronts`].
//! - `I2`: a tag says "in use" exactly while the object is in a user's hands and nobody wrote over it. No word of a slot says so otherwise.
//! - `I3`: with `Poison`, the bytes of a free slot before the record are all `FREED`, but for the tag of the object that was there last.
//!
//! What it does not find: a free of an address before which somebody wrote the very tag (one in 2^64 by accident; one in 2^48 for a free by the pointer
//! alone, where any size will do), a free of one object by two CPUs at the same moment, and, without `Redzone`, a write behind the last object of a slab, or
//! one that reaches no further than the bytes between an object and the tag of the next, which alignment leaves there.
//!
//! Nothing here runs in a build without policies.

use core::panic::Location;
use core::ptr::NonNull;

use kmem_hal::sync::Ordering;
use kmem_hal::{Frame, PAGE_SIZE, PhysMap, RawLock};

use crate::class::{CLASSES, LARGEST_ALIGN, LARGEST_CLASS};
use crate::grow::object_at;
use crate::head::COLUMNS;
use crate::misuse::{Misuse, SlabRange};
use crate::platform::Platform;
use crate::policy::{Features, RECORD, TAG};
use crate::raw::RawCache;
use crate::registry::CHUNKS;
use crate::slab::Slab;
use crate::system::SlabSystem;

/// What fills freed objects, new ones, and red zones (Linux's `POISON_FREE`, `POISON_INUSE`, `SLUB_RED_ACTIVE` in spirit).
const FREED: u8 = 0x6b;
const FRESH: u8 = 0x5a;
const ZONE: u8 = 0xbb;

/// The record behind an object.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Record {
    pub place: Option<&'static Location<'static>>,
    pub size: u32,
}

const _: () = assert!(size_of::<Record>() <= RECORD);

/// Tells a tag from what programs write.
const SALT: u64 = 0x00a5_b1c3_96d7_2e4f;

/// Where the tag has the cache's index, and above it the size that was asked for (its low 16 bits, which are all of it in classes).
const INDEX: u32 = 38;
const SIZE: u32 = 48;

// None reaches into the next: tags that may be before one object differ wherever the index, the size or what is in front of it does.
const _: () = {
    assert!((LARGEST_ALIGN as u64) < 1 << INDEX);
    assert!(((CHUNKS * COLUMNS - 1) as u64) << INDEX < 1 << SIZE);
    assert!((LARGEST_CLASS as u64) < 1 << (u64::BITS - SIZE));
};

/// The slot of an object with so many bytes in front of it.
#[inline(always)]
fn slot_of(object: NonNull<u8>, front: usize) -> Option<NonNull<u8>> {
    NonNull::new(object.as_ptr().wrapping_sub(front))
}

/// The tag of an object in use with so many bytes in front of it, of the cache with this index and of so many bytes; that of a free one is its complement.
#[inline(always)]
fn in_use(object: NonNull<u8>, index: u32, front: usize, size: usize) -> u64 {
    let slot = object.as_ptr().wrapping_sub(front).addr() as u64;
    slot ^ SALT ^ u64::from(index) << INDEX ^ (size as u64) << SIZE
}

/// Where the tag of an object is.
#[inline(always)]
fn tag_of(object: NonNull<u8>) -> *mut u64 {
    object.as_ptr().wrapping_sub(TAG).cast()
}

/// The size that a tag says, if it is that of this object in use.
#[inline(always)]
fn size_in(tag: u64, object: NonNull<u8>, index: u32, front: usize) -> Option<usize> {
    let rest = tag ^ in_use(object, index, front, 0);
    (rest << (64 - SIZE) == 0).then_some((rest >> SIZE) as usize)
}

/// Bytes that may be in front of an object of a cache that checks: the object's alignment, and no less than a tag.
fn fronts<L: RawLock>(cache: &RawCache<L>) -> impl Iterator<Item = usize> {
    let (slot, most) = (cache.geometry().size(), cache.geometry().align());
    // A class serves all alignments that its slots have.
    let least = if (cache.index as usize) < CLASSES {
        TAG
    } else {
        most
    };
    core::iter::successors(Some(least), |front| Some(front * 2))
        .take_while(move |&front| front <= most && front < slot)
}

/// What a tag says of its object.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    InUse,
    Free,
}

/// What is in front of the object in a slot whose tag says that it is in this state, where `is` holds of that.
///
/// # Safety
///
/// A slot of a live slab of `cache`.
pub(crate) unsafe fn front_in<L: RawLock>(
    cache: &RawCache<L>,
    slot: NonNull<u8>,
    state: State,
    is: impl Fn(usize) -> bool,
) -> Option<usize> {
    fronts(cache).filter(|&front| is(front)).find(|&front| {
        // SAFETY: inside the slot, and so is the word before (I1).
        let (object, tag) = unsafe { (slot.add(front), tag_of(slot.add(front)).read()) };
        let tag = if state == State::Free { !tag } else { tag };
        size_in(tag, object, cache.index, front).is_some()
    })
}

impl<P: Platform> SlabSystem<P> {
    #[inline(always)]
    fn is_mapped(&self, tag: *mut u64) -> bool {
        let first = self.mapped_first.load(Ordering::Acquire);
        let end = self.mapped_end.load(Ordering::Acquire);
        let inside = (first..end).contains(&tag.addr());
        inside || self.is_mapped_meanwhile(tag)
    }

    /// Looks the first time, and again where memory may have been added since. Pointers to mapped memory are contiguous (hal `P1`), and
    /// there is only ever more of it (`P4`): of two reaches one is inside the other, and the lowest start and the highest end that were ever seen
    /// are those of the latest of them. Each moves outwards by itself, so that between any two of their values all is mapped.
    #[cold]
    #[inline(never)]
    fn is_mapped_meanwhile(&self, tag: *mut u64) -> bool {
        let Some(platform) = self.platform() else {
            return false;
        };
        let address = platform.map().to_phys(tag.cast());
        let reach = platform.map().reach();
        if !reach.contains(Frame::containing(address)) {
            return false;
        }
        // Both ends are computed, not asked for: the first frame in reach need not be memory.
        let bytes =
            |from: u64, to: u64| usize::try_from(to.saturating_sub(from)).unwrap_or(usize::MAX);
        let (start, at) = (reach.first().start().as_u64(), address.as_u64());
        let below = bytes(start, at);
        let above = bytes(
            at,
            start.saturating_add(reach.count().saturating_mul(PAGE_SIZE)),
        );
        let (first, end) = (
            tag.addr().saturating_sub(below),
            tag.addr().saturating_add(above),
        );
        self.mapped_first.fetch_min(first, Ordering::Release);
        self.mapped_end.fetch_max(end, Ordering::Release);
        true
    }

    /// Turns the tag of an object in use into that of a free one; `false`, and nothing is changed, where it is not that of an object in use, of so many bytes
    /// where the caller knows.
    ///
    /// # Safety
    ///
    /// The caller gives up the object, if it is one in use of the cache with this index.
    #[inline(always)]
    unsafe fn take_tag(
        &self,
        index: u32,
        front: usize,
        object: NonNull<u8>,
        size: Option<usize>,
    ) -> bool {
        let tag = tag_of(object);
        // Objects are aligned to 8 bytes, so that a tag lies in one frame. What is not mapped cannot be looked at.
        if !object.as_ptr().addr().is_multiple_of(TAG) || !self.is_mapped(tag) {
            return false;
        }
        // SAFETY: mapped memory; whose it is, what is found there tells. Where it is the tag of an object in use, that is the caller's (I2).
        unsafe {
            let seen = tag.read();
            let expected = match size {
                Some(size) => in_use(object, index, front, size),
                None if size_in(seen, object, index, front).is_some() => seen,
                None => return false,
            };
            let is_ours = seen == expected;
            if is_ours {
                tag.write(!expected);
            }
            is_ours
        }
    }

    /// Notes that an object in use has another size from now on; `false`, and nothing is changed, where it is none of `old` bytes.
    ///
    /// # Safety
    ///
    /// As `take_tag`, but that the caller keeps the object.
    pub(crate) unsafe fn retag(
        &self,
        index: u32,
        front: usize,
        object: NonNull<u8>,
        old: Option<usize>,
        new: usize,
    ) -> bool {
        // SAFETY: the caller's promise; where it is the tag of an object in use, it is the caller's to write.
        unsafe {
            let is_ours = self.take_tag(index, front, object, old);
            if is_ours {
                tag_of(object).write(in_use(object, index, front, new));
            }
            is_ours
        }
    }

    /// Makes a slot an object that is about to be given, and prepares its bytes.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn on_alloc(
        &self,
        features: Features,
        cache: impl FnOnce() -> Option<NonNull<RawCache<P::Lock>>>,
        index: u32,
        front: usize,
        slot: NonNull<u8>,
        size: usize,
        place: &'static Location<'static>,
    ) -> NonNull<u8> {
        if !features.check {
            return slot;
        }
        // SAFETY: the front is inside the slot.
        let object = unsafe { slot.add(front) };
        if features.more()
            && let Some(cache) = cache()
        {
            // SAFETY: caches live as long as their objects.
            self.prepare(unsafe { cache.as_ref() }, front, slot, size, place);
        }
        // SAFETY: the word before the object (I1), inside its slot, which belongs to this call.
        unsafe { tag_of(object).write(in_use(object, index, front, size)) };
        object
    }

    #[inline(never)]
    fn prepare(
        &self,
        cache: &RawCache<P::Lock>,
        front: usize,
        slot: NonNull<u8>,
        size: usize,
        place: &'static Location<'static>,
    ) {
        let (features, room) = (cache.setup.features, cache.room(front));
        if features.poison {
            self.verify_poison(cache, slot);
        }
        // SAFETY: the slot belongs to this call; the object has `room` bytes of it, and the record, where there is one, lies behind them.
        unsafe {
            let object = slot.add(front);
            if features.poison {
                object.write_bytes(FRESH, room);
            }
            if features.redzone {
                object.add(size).write_bytes(ZONE, room - size);
            }
            if features.redzone || features.owner {
                let record = Record {
                    place: features.owner.then_some(place),
                    size: size as u32,
                };
                object.add(room).cast::<Record>().write_unaligned(record);
            }
        }
    }

    /// Bytes in front of the object at `object` in its slot, 0 without tags; `None` where no object of the slab's cache can be.
    pub(crate) fn front_of(
        &self,
        cache: &RawCache<P::Lock>,
        slab: &Slab,
        object: NonNull<u8>,
    ) -> Option<usize> {
        let start = SlabRange::new(cache, slab).slot_of(cache, object.as_ptr())?;
        let front = object.as_ptr().addr() - start.as_ptr().addr();
        if cache.setup.features.check {
            fronts(cache).find(|&possible| possible == front)
        } else {
            (front == 0).then_some(0)
        }
    }

    /// The bytes of the object of a live slab of `cache` at `object` that its owner may use; `None` where none begins there or, where the cache checks, it is free.
    pub(crate) fn usable(
        &self,
        cache: &RawCache<P::Lock>,
        slab: &Slab,
        object: NonNull<u8>,
    ) -> Option<usize> {
        let front = self.front_of(cache, slab, object)?;
        let room = cache.room(front);
        if !cache.setup.features.check {
            return Some(room);
        }
        // SAFETY: the word before what may be an object of a live slab of this cache.
        let tag = unsafe { tag_of(object).read() };
        size_in(tag, object, cache.index, front)?;
        if !cache.setup.features.keeps_size() {
            return Some(room);
        }
        // SAFETY: an object in use has a record.
        let record = unsafe { object.add(room).cast::<Record>().read_unaligned() };
        Some((record.size as usize).min(room))
    }

    /// Reports a free slot that was written to.
    fn verify_poison(&self, cache: &RawCache<P::Lock>, slot: NonNull<u8>) {
        // SAFETY: a slot of a live slab, which belongs to the caller.
        let front = unsafe { front_in(cache, slot, State::Free, |_| true) };
        let changed = match front {
            Some(front) => {
                // SAFETY: the slot belongs to the caller, and all its bytes were written when the slab was made.
                let (object, before, bytes) = unsafe {
                    let object = slot.add(front);
                    let before = core::slice::from_raw_parts(slot.as_ptr(), front - TAG);
                    let bytes = core::slice::from_raw_parts(object.as_ptr(), cache.room(front));
                    (object, before, bytes)
                };
                let in_object = first_changed(bytes).map(|offset| (object, offset));
                in_object.or_else(|| first_changed(before).map(|offset| (slot, offset)))
            }
            // The tag itself is gone.
            None => Some((slot, 0)),
        };
        if let Some((start, offset)) = changed {
            self.report(
                cache,
                Misuse::UseAfterFree {
                    cache: cache.setup.name,
                    address: start.as_ptr().addr(),
                    offset,
                },
            );
        }
    }

    /// Checks an object that comes back to `cache`; `size` is what the caller says it asked for.
    ///
    /// Answers the slot to be put away now: none where the free is refused or the object waits, an older one where that has waited enough.
    ///
    /// # Safety
    ///
    /// The caller gives `object` up, if it is an object in use of the cache.
    #[inline(always)]
    pub(crate) unsafe fn on_free(
        &self,
        features: Features,
        cache: impl FnOnce() -> Option<NonNull<RawCache<P::Lock>>>,
        index: u32,
        front: usize,
        object: NonNull<u8>,
        size: Option<usize>,
    ) -> Option<NonNull<u8>> {
        if !features.check {
            return Some(object);
        }
        // SAFETY: the caller's promise.
        if !unsafe { self.take_tag(index, front, object, size) } {
            if let Some(cache) = cache() {
                // SAFETY: caches live as long as the system or their owner, which is in this call.
                self.refuse(unsafe { cache.as_ref() }, object, front, size);
            }
            return None;
        }
        if !features.more() {
            return slot_of(object, front);
        }
        // SAFETY: as above.
        cache().and_then(|cache| unsafe { self.put_away(cache.as_ref(), front, object) })
    }

    /// Says what is wrong with a free, by a caller who takes so many bytes to be in front and who may know the size, that was refused.
    #[cold]
    #[inline(never)]
    pub(crate) fn refuse(
        &self,
        cache: &RawCache<P::Lock>,
        object: NonNull<u8>,
        said: usize,
        size: Option<usize>,
    ) {
        // Whatever lies in no slab of the cache is reported there.
        let Some(slab) = self.slab_for(cache, object.as_ptr()) else {
            return;
        };
        let (name, address) = (cache.setup.name, object.as_ptr().addr());
        let mut misuse = Misuse::InvalidFree {
            cache: name,
            address,
        };
        let range = SlabRange::new(cache, slab);
        if let Some(front) = self.front_of(cache, slab, object)
            && let Some(slot) = range.slot_of(cache, object.as_ptr())
        {
            // SAFETY: the word before what may be an object of a live slab of this cache.
            let tag = unsafe { tag_of(object).read() };
            let has = |state, is: &dyn Fn(usize) -> bool| {
                // SAFETY: a slot of a live slab of this cache.
                unsafe { front_in(cache, slot, state, is) }.is_some()
            };
            if has(State::InUse, &|other| other != front) {
                // Inside the object in use, or before it.
            } else if has(State::Free, &|other| other == front) {
                misuse = Misuse::DoubleFree {
                    cache: name,
                    address,
                };
            } else if let Some(allocated) = size_in(tag, object, cache.index, front) {
                misuse = match size {
                    Some(freed) if freed != allocated => Misuse::WrongSize {
                        cache: name,
                        address,
                        allocated,
                        freed,
                    },
                    _ => Misuse::WrongAlign {
                        cache: name,
                        address,
                        allocated: front,
                        freed: said,
                    },
                };
            } else if !has(State::Free, &|other| other < front) {
                misuse = Self::overrun_into(cache, &range, slot, front);
            }
        }
        self.report(cache, misuse);
    }

    /// Whose end was written behind, where the tag `front` bytes from the start of a slot is gone: that of the object in the slot before, if there is one.
    /// The object in the slot is in use or free: the tag that would tell is gone, and it stays where it is.
    fn overrun_into(
        cache: &RawCache<P::Lock>,
        range: &SlabRange<'_>,
        slot: NonNull<u8>,
        front: usize,
    ) -> Misuse {
        let before = slot.as_ptr().wrapping_sub(cache.geometry().size());
        let writer = range.slot_of(cache, before).and_then(|before| {
            // SAFETY: a slot of a live slab of this cache, and inside it.
            unsafe {
                let front = front_in(cache, before, State::InUse, |_| true)?;
                Some(before.add(front))
            }
        });
        let (tag, writer) = (slot.as_ptr().addr() + front - TAG, writer.unwrap_or(slot));
        Misuse::Overrun {
            cache: cache.setup.name,
            address: writer.as_ptr().addr(),
            offset: tag - writer.as_ptr().addr(),
        }
    }

    /// Looks at the red zone, fills the object, and lets it wait; answers a slot.
    ///
    /// # Safety
    ///
    /// As [`on_free`](Self::on_free); the object was in use, and its tag says that it is free.
    #[inline(never)]
    unsafe fn put_away(
        &self,
        cache: &RawCache<P::Lock>,
        front: usize,
        object: NonNull<u8>,
    ) -> Option<NonNull<u8>> {
        let (features, room) = (cache.setup.features, cache.room(front));
        let slot = slot_of(object, front)?;
        if features.redzone {
            // SAFETY: the object is in use, so its record was written; every byte before it was written too.
            let (record, bytes) = unsafe {
                (
                    object.add(room).cast::<Record>().read_unaligned(),
                    core::slice::from_raw_parts(object.as_ptr(), room),
                )
            };
            let asked = record.size as usize;
            let zone = bytes.get(asked..).unwrap_or(&[]);
            if asked > room || zone.iter().any(|&byte| byte != ZONE) {
                let offset = zone.iter().position(|&byte| byte != ZONE);
                self.report(
                    cache,
                    Misuse::Overrun {
                        cache: cache.setup.name,
                        address: object.as_ptr().addr(),
                        offset: asked.saturating_add(offset.unwrap_or(0)),
                    },
                );
            }
        }
        // SAFETY: the caller gave the object up.
        unsafe { Self::wipe(cache, front, object) };
        if features.quarantine == 0 {
            return Some(slot);
        }
        let left = self.quarantine(cache, features, slot)?;
        if features.poison {
            self.verify_poison(cache, left);
        }
        Some(left)
    }

    /// Fills a slot that is free where the policy wants it; its tag stays.
    ///
    /// # Safety
    ///
    /// The caller owns the slot of the object.
    unsafe fn wipe(cache: &RawCache<P::Lock>, front: usize, object: NonNull<u8>) {
        if cache.setup.features.poison {
            // SAFETY: the caller's slot.
            unsafe {
                object.sub(front).write_bytes(FREED, front - TAG);
                object.write_bytes(FREED, cache.room(front));
            }
        }
    }

    /// Makes an object that nobody got in the end a free slot again. It says nothing and waits nowhere.
    ///
    /// # Safety
    ///
    /// An object of `cache`, which checks, in use and the caller's, who gives it up.
    pub(crate) unsafe fn take_back(
        &self,
        cache: &RawCache<P::Lock>,
        front: usize,
        object: NonNull<u8>,
    ) -> Option<NonNull<u8>> {
        // SAFETY: the caller's object, and the word before it (I1).
        unsafe {
            let tag = tag_of(object);
            tag.write(!tag.read());
            Self::wipe(cache, front, object);
        }
        slot_of(object, front)
    }

    /// Tags and fills the objects of a new slab, which belongs to the caller.
    pub(crate) fn harden_slab(&self, cache: &RawCache<P::Lock>, slab: &Slab) {
        let features = cache.setup.features;
        if !features.check {
            return;
        }
        for number in 0..slab.objects() {
            let Some(slot) = NonNull::new(object_at(cache, slab, number)) else {
                continue;
            };
            // SAFETY: the whole slab belongs to this call.
            unsafe {
                if features.poison {
                    slot.write_bytes(FREED, cache.geometry().size());
                }
                // One tag of a free object, and no word that says "in use" (I2, I3).
                for front in fronts(cache).take(if features.poison { 1 } else { usize::MAX }) {
                    let object = slot.add(front);
                    tag_of(object).write(!in_use(object, cache.index, front, 0));
                }
            }
        }
    }
}

/// The first byte that is not as those of free objects are.
fn first_changed(bytes: &[u8]) -> Option<usize> {
    bytes.iter().position(|&byte| byte != FREED)
}

/// Bytes of the record behind the objects of a cache.
pub(crate) const fn bytes_behind(features: Features) -> usize {
    if features.redzone || features.owner {
        RECORD
    } else {
        0
    }
}
