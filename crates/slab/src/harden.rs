//! What policies do to objects on their way out and back.
//!
//! ```text
//!   slot of a cache        [ object .......... | red zone ...... | record: size, source line ]      Redzone, Owner
//!                            0x6b while free     0xbb
//!   frame slot of a page   index word -> 256 state bytes, one per 16 bytes of the page
//!                            0 no object starts here, 1 free, 0x80 | column of its cache: in use
//! ```
//!
//! Invariants
//! - `I1`: of a cache that checks, the index word of every frame of a live slab is the address of the page's states, which belong to the
//!   slab until it goes back. The state of an object is written by whoever owns the object.
//! - `I2`: a state says "in use" exactly while the object is in a user's hands. So the state alone tells a double free, a pointer
//!   into an object and, by the column, a free to the wrong cache.
//! - `I3`: with `Poison`, the bytes before the record of a free object are all `FREED`.
//!
//! Nothing here runs in a build without policies.

use core::panic::Location;
use core::ptr::{self, NonNull};

use kmem_hal::sync::{LocalU8, Ordering};
use kmem_hal::{Cpu, FrameTag, PAGE_SIZE};

use crate::array::{Array, MAX_SLOTS};
use crate::head::Head;
use crate::misuse::Misuse;
use crate::platform::Platform;
use crate::policy::{Features, RECORD};
use crate::raw::RawCache;
use crate::slab::Slab;
use crate::system::SlabSystem;

/// Bytes of a page that one state stands for.
pub(crate) const GRAIN: usize = 16;

/// States of a page.
pub(crate) const STATES: usize = PAGE_SIZE as usize / GRAIN;

const FREE: u8 = 1;
const IN_USE: u8 = 0x80;

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

impl<P: Platform> SlabSystem<P> {
    /// The state of the object at `address`; `None` where the address lies in no slab that checks, or no object can start there.
    #[inline(always)]
    fn state_of(&self, address: *mut u8) -> Option<&LocalU8> {
        let (_, slot) = Self::slot_of(self.platform()?, address)?;
        let states = slot.index().load(Ordering::Relaxed) as usize;
        if slot.tag() != FrameTag::Slab || states == 0 || !address.addr().is_multiple_of(8) {
            return None;
        }
        let at = (address.addr() % PAGE_SIZE as usize) / GRAIN;
        // SAFETY: the index word of a slab's frame is the exposed address of the page's states (I1).
        Some(unsafe { &*ptr::with_exposed_provenance::<LocalU8>(states).add(at) })
    }

    /// Marks an object that is about to be given, and prepares its bytes.
    #[inline(always)]
    pub(crate) fn on_alloc(
        &self,
        features: Features,
        cache: impl FnOnce() -> Option<NonNull<RawCache<P::Lock>>>,
        column: u32,
        object: NonNull<u8>,
        size: usize,
        place: &'static Location<'static>,
    ) {
        if !features.check {
            return;
        }
        if let Some(state) = self.state_of(object.as_ptr()) {
            state.set(IN_USE | column as u8);
        }
        if features.more()
            && let Some(cache) = cache()
        {
            // SAFETY: caches live as long as their objects.
            self.prepare(features, unsafe { cache.as_ref() }, object, size, place);
        }
    }

    #[inline(never)]
    fn prepare(
        &self,
        features: Features,
        cache: &RawCache<P::Lock>,
        object: NonNull<u8>,
        size: usize,
        place: &'static Location<'static>,
    ) {
        let end = cache.geometry().size() - record_bytes(features);
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
            if record_bytes(features) > 0 {
                let record = Record {
                    place: features.owner.then_some(place),
                    size: size as u32,
                };
                object.add(end).cast::<Record>().write_unaligned(record);
            }
        }
    }

    /// The bytes of an object in use that its owner may use.
    pub(crate) fn usable(&self, cache: &RawCache<P::Lock>, object: NonNull<u8>) -> usize {
        let features = cache.setup.features;
        let end = cache.geometry().size() - record_bytes(features);
        if !features.redzone {
            return end;
        }
        // SAFETY: an object in use has a record.
        let record = unsafe { object.add(end).cast::<Record>().read_unaligned() };
        (record.size as usize).min(end)
    }

    /// Reports a free object that was written to.
    fn verify_poison(&self, cache: &RawCache<P::Lock>, object: NonNull<u8>) {
        let end = cache.geometry().size() - record_bytes(cache.setup.features);
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
        let state = self
            .state_of(object.as_ptr())
            .filter(|state| state.get() == IN_USE | column as u8)
            .filter(|_| self.starts_here(slot, object));
        let Some(state) = state else {
            if let Some(cache) = cache() {
                // SAFETY: caches live as long as the system or their owner, which is in this call.
                self.refuse(unsafe { cache.as_ref() }, object.as_ptr());
            }
            return None;
        };
        if !features.more() {
            state.set(FREE);
            return Some(object);
        }
        // SAFETY: as above; the state says that the object is in use and the caller gives it up.
        cache().and_then(|cache| unsafe { self.put_away(features, cache.as_ref(), object, size) })
    }

    /// Whether an object of `slot` bytes, one of which starts in this grain, starts at this very address.
    #[inline(always)]
    fn starts_here(&self, slot: usize, object: NonNull<u8>) -> bool {
        if slot.is_multiple_of(GRAIN) {
            return object.as_ptr().addr().is_multiple_of(GRAIN);
        }
        self.platform()
            .and_then(|platform| Self::slab_of(platform, object.as_ptr()))
            .is_some_and(|slab| (object.as_ptr().addr() - slab.base().addr()).is_multiple_of(slot))
    }

    /// Says what is wrong with a free that was refused.
    #[cold]
    #[inline(never)]
    fn refuse(&self, cache: &RawCache<P::Lock>, pointer: *mut u8) {
        // Whatever is no object of the cache is reported there.
        if self.check_object(cache, pointer).is_some() {
            self.report(
                cache,
                Misuse::DoubleFree {
                    cache: cache.setup.name,
                    address: pointer.addr(),
                },
            );
        }
    }

    /// Looks at red zone and size, fills the object, and lets it wait.
    ///
    /// # Safety
    ///
    /// As [`on_free`](Self::on_free); the object is in use.
    #[inline(never)]
    unsafe fn put_away(
        &self,
        features: Features,
        cache: &RawCache<P::Lock>,
        object: NonNull<u8>,
        size: Option<usize>,
    ) -> Option<NonNull<u8>> {
        let address = object.as_ptr().addr();
        let end = cache.geometry().size() - record_bytes(features);
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
        if let Some(state) = self.state_of(object.as_ptr()) {
            state.set(FREE);
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

    /// Lets an object wait; answers the one that has waited longest, where the quarantine is full. A context that cannot have the lock, and one
    /// without memory for the quarantine, get theirs back at once.
    fn quarantine(
        &self,
        cache: &RawCache<P::Lock>,
        features: Features,
        object: NonNull<u8>,
    ) -> Option<NonNull<u8>> {
        let ready = self.with_depot(cache, |depot| !depot.waiting.is_null());
        if ready != Some(true) {
            // I2 of refill: memory without the lock.
            let Ok(array) = self.new_array(MAX_SLOTS) else {
                return Some(object);
            };
            let kept = self.with_depot(cache, |depot| {
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
        let parked = self.with_depot(cache, |depot| {
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

    /// Gives the objects in quarantine to their slabs.
    pub(crate) fn end_quarantine(&self, cache: &RawCache<P::Lock>) {
        if cache.setup.features.quarantine == 0 {
            return;
        }
        // SAFETY: a cache exists, so the system is ready.
        let pin = unsafe { self.platform_unchecked() }.cpu().pin();
        let Some(_busy) = self.head(cache, &pin).and_then(Head::enter) else {
            return;
        };
        let waiting = {
            let mut depot = cache.depot.lock(); // refill I1: busy is set
            depot.oldest = 0;
            core::mem::replace(&mut depot.waiting, ptr::null_mut())
        };
        if let Some(array) = NonNull::new(waiting) {
            // SAFETY: the array left the depot and is this call's; its first `len` slots hold objects; the flag is set.
            unsafe {
                let n = array.as_ref().len();
                cache.direct_frees.fetch_add(n as u64, Ordering::Relaxed);
                self.flush(cache, Array::slots(waiting), n);
                self.free_array(array);
            }
        }
    }

    /// Gives a new slab of a cache that checks its states and fills; `false` where there is no memory for them.
    pub(crate) fn harden_slab(&self, cache: &RawCache<P::Lock>, slab: &Slab) -> bool {
        let features = cache.setup.features;
        if !features.check {
            return true;
        }
        // SAFETY: a cache exists, so the system is ready.
        let platform = unsafe { self.platform_unchecked() };
        for page in 0..slab.pages() as usize {
            let start = slab.base().wrapping_add(page * PAGE_SIZE as usize);
            let Ok(states) = self.states.alloc(platform) else {
                self.unharden_slab(cache, slab);
                return false;
            };
            // SAFETY: the pool's objects have room for the states of a page, which belong to this call; all-zero is "no object".
            unsafe { states.write_bytes(0, STATES) };
            if let Some((_, slot)) = Self::slot_of(platform, start) {
                let word = states.as_ptr().expose_provenance() as u64;
                slot.index().store(word, Ordering::Relaxed);
            }
        }
        let size = cache.geometry().size();
        for number in 0..slab.objects() {
            let object = slab.base().wrapping_add(number * size);
            if let Some(state) = self.state_of(object) {
                state.set(FREE);
            }
            if features.poison {
                // SAFETY: the whole slab belongs to this call.
                unsafe { object.write_bytes(FREED, size) };
            }
        }
        true
    }

    /// Takes the states of a slab that goes back.
    pub(crate) fn unharden_slab(&self, cache: &RawCache<P::Lock>, slab: &Slab) {
        if !cache.setup.features.check {
            return;
        }
        // SAFETY: a cache exists, so the system is ready.
        let platform = unsafe { self.platform_unchecked() };
        for page in 0..slab.pages() as usize {
            let start = slab.base().wrapping_add(page * PAGE_SIZE as usize);
            let Some((_, slot)) = Self::slot_of(platform, start) else {
                continue;
            };
            let word = slot.index().swap(0, Ordering::Relaxed) as usize;
            if let Some(states) = NonNull::new(ptr::with_exposed_provenance_mut::<u8>(word)) {
                // SAFETY: the states came from this pool, and the word that named them is gone.
                unsafe { self.states.free(states) };
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
            let end = cache.geometry().size() - record_bytes(features);
            cache.for_each_slab(|slab| {
                for number in 0..slab.objects() {
                    let object = slab.base().wrapping_add(number * cache.geometry().size());
                    let state = self.state_of(object).map_or(FREE, LocalU8::get);
                    if state & IN_USE != 0 {
                        // SAFETY: an object in use has a record, which nobody changes meanwhile.
                        let record = unsafe { object.add(end).cast::<Record>().read_unaligned() };
                        each(&Owned {
                            cache: cache.setup.name,
                            address: object.addr(),
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

/// Bytes of the record behind the objects of a cache.
const fn record_bytes(features: Features) -> usize {
    if features.redzone || features.owner {
        RECORD
    } else {
        0
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
