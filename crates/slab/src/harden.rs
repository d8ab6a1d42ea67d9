//! What policies do to objects on their way out and back.
//!
//! ```text
//!   slot of a cache   [ object .......... | red zone ...... | record: size, source line | tag ]
//!                       0x6b while free     0xbb                                          8 bytes
//!                       Poison              Redzone           Redzone, Owner              all that check
//! ```
//!
//! The tag is a function of the object's address and of its cache's column: one value while the object is in use, its complement while it is free.
//! So a free compares one word with what it must be, without looking anything up: a second free finds the complement, an
//! address inside an object, or one of another cache or class, finds another object's tag or none.
//!
//! Invariants
//! - `I1`: of a cache that checks, the last word of every slot of a live slab is a tag. It is written by whoever owns the object.
//! - `I2`: a tag says "in use" exactly while the object is in a user's hands and nobody wrote behind it.
//! - `I3`: with `Poison`, the bytes before the record of a free object are all `FREED`.
//!
//! What it does not find: a free of an address at whose slot somebody wrote the very tag (one in 2^64 by accident), nor a free
//! of one object by two CPUs at the same moment.
//!
//! Nothing here runs in a build without policies.

use core::panic::Location;
use core::ptr::{self, NonNull};

use kmem_hal::sync::Ordering;
use kmem_hal::{Cpu, Frame, PAGE_SIZE, PhysMap};

use crate::array::{Array, SMALL_SLOTS};
use crate::grow::object_at;
use crate::head::Head;
use crate::misuse::Misuse;
use crate::platform::Platform;
use crate::policy::{Features, RECORD, TAG};
use crate::raw::RawCache;
use crate::slab::Slab;
use crate::system::SlabSystem;

/// What fills freed objects, new ones, and red zones (Linux's `POISON_FREE`, `POISON_INUSE`, `SLUB_RED_ACTIVE` in spirit).
const FREED: u8 = 0x6b;
const FRESH: u8 = 0x5a;
const ZONE: u8 = 0xbb;

/// The record behind an object.
#[derive(Clone, Copy)]
#[repr(C)]
struct Record {
    place: Option<&'static Location<'static>>,
    size: u32,
}

const _: () = assert!(size_of::<Record>() <= RECORD);

/// Tells a tag from what programs write.
const SALT: u64 = 0x00a5_b1c3_96d7_2e4f;

/// The tag of an object in use; that of a free one is its complement.
#[inline(always)]
fn in_use(object: NonNull<u8>, column: u32) -> u64 {
    object.as_ptr().addr() as u64 ^ SALT ^ u64::from(column) << 56
}

/// Where the tag of an object is, in a slot of so many bytes.
#[inline(always)]
fn tag_of(object: NonNull<u8>, slot: usize) -> *mut u64 {
    object.as_ptr().wrapping_add(slot - TAG).cast()
}

impl<P: Platform> SlabSystem<P> {
    #[inline(always)]
    fn is_mapped(&self, tag: *mut u64) -> bool {
        let bytes = self.mapped_bytes.load(Ordering::Acquire);
        let inside = tag
            .addr()
            .wrapping_sub(self.mapped_from.load(Ordering::Relaxed))
            < bytes;
        inside || self.is_mapped_meanwhile(tag)
    }

    /// Looks the first time, and again where memory may have been added since. Pointers to mapped memory are contiguous (hal `P1`), and
    /// there is only ever more of it (`P4`), so what is found holds for all later looks.
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
        // The first pointer is computed, not asked for: the first frame in reach need not be memory.
        let above = address.as_u64() - reach.first().start().as_u64();
        let bytes = usize::try_from(reach.count().saturating_mul(PAGE_SIZE)).unwrap_or(usize::MAX);
        let from = tag.addr().wrapping_sub(above as usize);
        self.mapped_from.store(from, Ordering::Relaxed);
        self.mapped_bytes.store(bytes, Ordering::Release);
        true
    }

    /// Turns the tag of an object in use into that of a free one; `false`, and nothing is changed, where it is not that of an object in use.
    ///
    /// # Safety
    ///
    /// The caller gives up the object, if it is one in use of the cache with this column and slots of this size.
    #[inline(always)]
    unsafe fn take_tag(&self, column: u32, slot: usize, object: NonNull<u8>) -> bool {
        let (tag, expected) = (tag_of(object, slot), in_use(object, column));
        // Objects are aligned to 8 bytes, so that a tag lies in one frame. What is not mapped cannot be looked at.
        if !object.as_ptr().addr().is_multiple_of(TAG) || !self.is_mapped(tag) {
            return false;
        }
        // SAFETY: mapped memory; whose it is, what is found there tells. Where it is the tag of an object in use, that is the caller's (I2).
        unsafe {
            let is_ours = tag.read() == expected;
            if is_ours {
                tag.write(!expected);
            }
            is_ours
        }
    }

    /// Marks an object that is about to be given, and prepares its bytes. A slot of its cache has `slot` bytes.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn on_alloc(
        &self,
        features: Features,
        cache: impl FnOnce() -> Option<NonNull<RawCache<P::Lock>>>,
        column: u32,
        slot: usize,
        object: NonNull<u8>,
        size: usize,
        place: &'static Location<'static>,
    ) {
        if !features.check {
            return;
        }
        if features.more()
            && let Some(cache) = cache()
        {
            // SAFETY: caches live as long as their objects.
            self.prepare(unsafe { cache.as_ref() }, object, size, place);
        }
        // SAFETY: the last word of the object's slot (I1), which belongs to this call.
        unsafe { tag_of(object, slot).write(in_use(object, column)) };
    }

    #[inline(never)]
    fn prepare(
        &self,
        cache: &RawCache<P::Lock>,
        object: NonNull<u8>,
        size: usize,
        place: &'static Location<'static>,
    ) {
        let features = cache.setup.features;
        let end = cache.geometry().size() - bytes_behind(features);
        if features.poison {
            self.verify_poison(cache, object);
            // SAFETY: the object belongs to this call; `end` bytes of it are before the record.
            unsafe { object.write_bytes(FRESH, end) };
        }
        // SAFETY: as above; the record lies behind `end`, inside the slot.
        unsafe {
            if features.redzone {
                object.add(size).write_bytes(ZONE, end - size);
            }
            if features.redzone || features.owner {
                let record = Record {
                    place: features.owner.then_some(place),
                    size: size as u32,
                };
                object.add(end).cast::<Record>().write_unaligned(record);
            }
        }
    }

    /// Whether an object of a live slab of `cache` begins at `object`; where the cache checks, also whether it is in use.
    pub(crate) fn is_object_in_use(&self, cache: &RawCache<P::Lock>, object: NonNull<u8>) -> bool {
        if !self.begins_object(cache, object.as_ptr()) {
            return false;
        }
        let slot = cache.geometry().size();
        // SAFETY: the tag of an object of a live slab of this cache (I1).
        !cache.setup.features.check
            || unsafe { tag_of(object, slot).read() } == in_use(object, cache.column)
    }

    /// The bytes of an object in use that its owner may use.
    pub(crate) fn usable(&self, cache: &RawCache<P::Lock>, object: NonNull<u8>) -> usize {
        let features = cache.setup.features;
        let end = cache.geometry().size() - bytes_behind(features);
        if !features.redzone {
            return end;
        }
        // SAFETY: an object in use has a record.
        let record = unsafe { object.add(end).cast::<Record>().read_unaligned() };
        (record.size as usize).min(end)
    }

    /// Reports a free object that was written to.
    fn verify_poison(&self, cache: &RawCache<P::Lock>, object: NonNull<u8>) {
        let end = cache.geometry().size() - bytes_behind(cache.setup.features);
        // SAFETY: the object belongs to the caller, and all its bytes were written when the slab was made.
        let bytes = unsafe { core::slice::from_raw_parts(object.as_ptr(), end) };
        if let Some(offset) = bytes.iter().position(|&byte| byte != FREED) {
            self.report(
                cache,
                Misuse::UseAfterFree {
                    cache: cache.setup.name,
                    address: object.as_ptr().addr(),
                    offset,
                },
            );
        }
    }

    /// Checks an object that comes back to `cache`; `size` is what the caller says it asked for.
    ///
    /// Answers the object to be put away now: none where the free is refused or the object waits, an older one where that has waited enough.
    ///
    /// # Safety
    ///
    /// The caller gives `object` up, if it is an object in use of the cache.
    #[inline(always)]
    pub(crate) unsafe fn on_free(
        &self,
        features: Features,
        cache: impl FnOnce() -> Option<NonNull<RawCache<P::Lock>>>,
        column: u32,
        slot: usize,
        object: NonNull<u8>,
        size: Option<usize>,
    ) -> Option<NonNull<u8>> {
        if !features.check {
            return Some(object);
        }
        // SAFETY: the caller's promise.
        if !unsafe { self.take_tag(column, slot, object) } {
            if let Some(cache) = cache() {
                // SAFETY: caches live as long as the system or their owner, which is in this call.
                self.refuse(unsafe { cache.as_ref() }, object.as_ptr());
            }
            return None;
        }
        if !features.more() {
            return Some(object);
        }
        // SAFETY: as above.
        cache().and_then(|cache| unsafe { self.put_away(cache.as_ref(), object, size) })
    }

    /// Says what is wrong with a free that was refused.
    #[cold]
    #[inline(never)]
    fn refuse(&self, cache: &RawCache<P::Lock>, pointer: *mut u8) {
        // Whatever is no object of the cache is reported there.
        let (true, Some(object)) = (
            self.check_object(cache, pointer).is_some(),
            NonNull::new(pointer),
        ) else {
            return;
        };
        let slot = cache.geometry().size();
        // SAFETY: the tag of an object of a live slab of this cache (I1).
        let tag = unsafe { tag_of(object, slot).read() };
        let (cache_name, address) = (cache.setup.name, pointer.addr());
        let misuse = if tag == !in_use(object, cache.column) {
            Misuse::DoubleFree {
                cache: cache_name,
                address,
            }
        } else {
            // In use or free: the tag that would tell is gone, and the object stays where it is.
            Misuse::Overrun {
                cache: cache_name,
                address,
                offset: slot - TAG,
            }
        };
        self.report(cache, misuse);
    }

    /// Looks at red zone and size, fills the object, and lets it wait.
    ///
    /// # Safety
    ///
    /// As [`on_free`](Self::on_free); the object was in use, and its tag says that it is free.
    #[inline(never)]
    unsafe fn put_away(
        &self,
        cache: &RawCache<P::Lock>,
        object: NonNull<u8>,
        size: Option<usize>,
    ) -> Option<NonNull<u8>> {
        let (features, address) = (cache.setup.features, object.as_ptr().addr());
        let end = cache.geometry().size() - bytes_behind(features);
        if features.redzone {
            // SAFETY: the object is in use, so its record was written; every byte before it was written too.
            let (record, bytes) = unsafe {
                (
                    object.add(end).cast::<Record>().read_unaligned(),
                    core::slice::from_raw_parts(object.as_ptr(), end),
                )
            };
            let asked = record.size as usize;
            let zone = bytes.get(asked..).unwrap_or(&[]);
            if asked > end || zone.iter().any(|&byte| byte != ZONE) {
                let offset = zone.iter().position(|&byte| byte != ZONE);
                self.report(
                    cache,
                    Misuse::Overrun {
                        cache: cache.setup.name,
                        address,
                        offset: asked.saturating_add(offset.unwrap_or(0)),
                    },
                );
            }
            if let Some(freed) = size
                && freed != asked
            {
                self.report(
                    cache,
                    Misuse::WrongSize {
                        cache: cache.setup.name,
                        address,
                        allocated: asked,
                        freed,
                    },
                );
            }
        }
        if features.poison {
            // SAFETY: the caller gave the object up.
            unsafe { object.write_bytes(FREED, end) };
        }
        if features.quarantine == 0 {
            return Some(object);
        }
        let left = self.quarantine(cache, features, object)?;
        if features.poison {
            self.verify_poison(cache, left);
        }
        Some(left)
    }

    /// Lets an object wait, at the first node whatever node it is of; answers the one that has waited longest, where the quarantine is full. A context that cannot have the lock, and one
    /// without memory for the quarantine, get theirs back at once.
    fn quarantine(
        &self,
        cache: &RawCache<P::Lock>,
        features: Features,
        object: NonNull<u8>,
    ) -> Option<NonNull<u8>> {
        let ready = self.with_depot(cache, &cache.first, |depot| !depot.waiting.is_null());
        if ready != Some(true) {
            // I2 of refill: memory without the lock.
            let Ok(array) = self.new_array(SMALL_SLOTS) else {
                return Some(object);
            };
            let kept = self.with_depot(cache, &cache.first, |depot| {
                let first = depot.waiting.is_null();
                if first {
                    depot.waiting = array.as_ptr();
                }
                first
            });
            if kept != Some(true) {
                // SAFETY: just made, and nobody else knows it.
                unsafe { self.free_array(array) };
            }
        }
        let parked = self.with_depot(cache, &cache.first, |depot| {
            // SAFETY: the depot's array, under its lock.
            let array = unsafe { depot.waiting.as_ref() }?;
            // SAFETY: as above.
            let slots = unsafe { Array::slots(depot.waiting) };
            let (n, most) = (array.len(), usize::from(features.quarantine));
            let place = if n < most {
                array.set_len(n + 1);
                n
            } else {
                depot.oldest = (depot.oldest + 1) % most;
                (depot.oldest + most - 1) % most
            };
            // SAFETY: `place` is below `quarantine`, which is at most the array's capacity; slots below `len` hold objects.
            unsafe {
                let old = if n < most {
                    None
                } else {
                    NonNull::new(*slots.add(place))
                };
                *slots.add(place) = object.as_ptr();
                Some(old)
            }
        });
        match parked.flatten() {
            Some(oldest) => oldest,
            None => Some(object),
        }
    }

    /// Gives the objects in quarantine to their slabs. Nothing where this CPU has no head or was interrupted there, unless the caller is `alone`
    /// with the cache.
    pub(crate) fn end_quarantine(&self, cache: &RawCache<P::Lock>, alone: bool) {
        if cache.setup.features.quarantine == 0 {
            return;
        }
        // SAFETY: a cache exists, so the system is ready.
        let pin = unsafe { self.platform_unchecked() }.cpu().pin();
        let busy = self.head(cache, &pin).and_then(Head::enter);
        if busy.is_none() && !alone {
            return;
        }
        let waiting = {
            let mut depot = cache.first.depot.lock(); // refill I1: busy is set, or alone
            depot.oldest = 0;
            core::mem::replace(&mut depot.waiting, ptr::null_mut())
        };
        if let Some(array) = NonNull::new(waiting) {
            // SAFETY: the array left the depot and is this call's; the flag is set, or the caller is alone with the cache.
            unsafe {
                let n = self.flush_array(cache, array);
                cache.direct_frees.fetch_add(n as u64, Ordering::Relaxed);
                self.free_array(array);
            }
        }
    }

    /// Tags and fills the objects of a new slab, which belongs to the caller.
    pub(crate) fn harden_slab(&self, cache: &RawCache<P::Lock>, slab: &Slab) {
        let features = cache.setup.features;
        if !features.check {
            return;
        }
        let size = cache.geometry().size();
        for number in 0..slab.objects() {
            let Some(object) = NonNull::new(object_at(cache, slab, number)) else {
                continue;
            };
            // SAFETY: the whole slab belongs to this call.
            unsafe {
                if features.poison {
                    object.write_bytes(FREED, size);
                }
                tag_of(object, size).write(!in_use(object, cache.column));
            }
        }
    }

    /// Calls `each` with every object in use of caches with the [`Owner`](crate::Owner) policy.
    ///
    /// # Safety
    ///
    /// Nobody allocates or frees meanwhile, nor writes behind an object.
    pub unsafe fn owners_shared(&self, mut each: impl FnMut(&Owned)) {
        // On Busy, and before `init`, there is nothing to tell.
        let _ = self.for_each_cache(|cache| {
            let features = cache.setup.features;
            if !features.owner {
                return;
            }
            // A class that is smaller than the record is never used.
            let Some(end) = cache.geometry().size().checked_sub(bytes_behind(features)) else {
                return;
            };
            cache.for_each_slab(|slab| {
                for number in 0..slab.objects() {
                    let Some(object) = NonNull::new(object_at(cache, slab, number)) else {
                        continue;
                    };
                    // SAFETY: the tag of an object of a live slab (I1), which nobody changes meanwhile.
                    let tag = unsafe { tag_of(object, cache.geometry().size()).read() };
                    if tag == in_use(object, cache.column) {
                        // SAFETY: an object in use has a record, which nobody changes meanwhile.
                        let record = unsafe { object.add(end).cast::<Record>().read_unaligned() };
                        each(&Owned {
                            cache: cache.setup.name,
                            address: object.as_ptr().addr(),
                            size: record.size as usize,
                            place: record.place,
                        });
                    }
                }
                true
            });
        });
    }

    /// Calls `each` with every object in use of caches with the [`Owner`](crate::Owner) policy.
    pub fn owners(&mut self, each: impl FnMut(&Owned)) {
        // SAFETY: the exclusive borrow keeps every call away.
        unsafe { self.owners_shared(each) }
    }
}

/// Bytes of record and tag behind the objects of a cache.
pub(crate) const fn bytes_behind(features: Features) -> usize {
    let tag = if features.check { TAG } else { 0 };
    if features.redzone || features.owner {
        RECORD + tag
    } else {
        tag
    }
}

/// An object in use, and who allocated it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owned {
    /// The name of its cache.
    pub cache: &'static str,
    /// Its address.
    pub address: usize,
    /// The bytes asked for.
    pub size: usize,
    /// The source line of the call.
    pub place: Option<&'static Location<'static>>,
}

impl core::fmt::Display for Owned {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(
            f,
            "{}: {} bytes at {:#x}",
            self.cache, self.size, self.address
        )?;
        match self.place {
            Some(place) => write!(f, " from {place}"),
            None => Ok(()),
        }
    }
}
