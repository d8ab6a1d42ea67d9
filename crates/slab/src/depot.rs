//! The depot of a cache: whole arrays, and the lists of slabs by fullness. All of it under one lock.
//!
//! ```text
//!   full arrays   [64][64][64]      <- a CPU whose two arrays are full pushes one, takes an empty one
//!   empty arrays  [ ][ ]            <- a CPU whose two arrays are empty pushes one, takes a full one
//!   slabs         by eighths: fewest free objects ... most free objects, EMPTY            (full ones: no list)
//! ```
//!
//! Refills take from the fullest slabs first, so that emptier ones drain and go back to the page source.
//!
//! Invariants
//! - `I1`: a slab with a free bit is on the list of its fullness as of the last time the lock's holder looked, or on the
//!   pending stack, or about to be put there by whoever set the bit.
//! - `I2`: a slab with no free bit, seen under the lock, is on no list. No list of full slabs exists that a search could walk.
//! - `I3`: dead descriptors are on `dead` and on no other list, or their holder's, or given up and on the pending stack (slab I5).
//! - `I4`: `slabs`, `objects` and `frames` count live slabs, from the first time that the lock's holder sees one until it is retired.

use core::ptr::{self, NonNull};

use crate::array::{Array, ArrayStack};
use crate::slab::{BURIED, NEW, RETIRED, Slab, UNLISTED};

/// Lists by fullness; the last holds slabs with every object free.
pub const BUCKETS: usize = 9;

/// The list of slabs with every object free.
pub const EMPTY: usize = BUCKETS - 1;

/// What the depot's lock guards.
#[derive(Debug)]
pub struct Depot {
    pub(crate) full: ArrayStack,
    pub(crate) spare: ArrayStack,
    lists: [*mut Slab; BUCKETS],
    dead: *mut Slab,
    /// Objects in quarantine: a ring, and its oldest place.
    pub(crate) waiting: *mut Array,
    pub(crate) oldest: usize,
    /// Where `Shuffle` is.
    pub(crate) random: u64,
    /// Live slabs, the objects in them, and their frames.
    pub(crate) slabs: u64,
    pub(crate) objects: u64,
    pub(crate) frames: u64,
    /// Slabs on the `EMPTY` list.
    pub(crate) empty: usize,
    /// Arrays exchanged with CPUs, refills from slabs, flushes to slabs.
    pub(crate) exchanges: u64,
    pub(crate) refills: u64,
    pub(crate) flushes: u64,
}

// SAFETY: the pointers are to descriptors and arrays that the depot owns; they may be used from any CPU under its lock.
unsafe impl Send for Depot {}

impl Depot {
    /// A depot without arrays or slabs.
    pub const fn new() -> Self {
        Self {
            full: ArrayStack::new(),
            spare: ArrayStack::new(),
            lists: [ptr::null_mut(); BUCKETS],
            dead: ptr::null_mut(),
            waiting: ptr::null_mut(),
            oldest: 0,
            random: 0,
            slabs: 0,
            objects: 0,
            frames: 0,
            empty: 0,
            exchanges: 0,
            refills: 0,
            flushes: 0,
        }
    }

    /// Lets an object wait in the ring of up to `most`; answers the one that has waited longest, where it was full. `None` where there is no ring yet.
    pub(crate) fn park(&mut self, object: NonNull<u8>, most: usize) -> Option<Option<NonNull<u8>>> {
        // SAFETY: the depot owns the array, and `self` is borrowed exclusively.
        let array = unsafe { self.waiting.as_ref() }?;
        let n = array.len();
        let place = if n < most {
            n
        } else {
            let oldest = self.oldest;
            self.oldest = (oldest + 1) % most;
            oldest
        };
        // SAFETY: `most` is at most the array's capacity, and `place` is below it; slots below `n` hold objects.
        let oldest = unsafe {
            let slot = Array::slots(self.waiting).add(place);
            let oldest = if n < most { None } else { NonNull::new(*slot) };
            *slot = object.as_ptr();
            oldest
        };
        if n < most {
            array.set_len(n + 1);
        }
        Some(oldest)
    }

    /// Puts a live slab, counted first where it is new, on the list that its free bits say (`I1`, `I2`). Nothing for a dead or retired one.
    pub fn relist(&mut self, slab: &Slab) {
        let objects = slab.objects();
        if objects == 0 || slab.bucket.get() == RETIRED {
            return;
        }
        if slab.bucket.get() == NEW {
            slab.bucket.set(UNLISTED);
            self.count(slab, u64::wrapping_add);
        }
        let free = slab.free();
        let bucket = match free {
            0 => UNLISTED,
            _ if free == objects => EMPTY as u8,
            _ => (free as u32 * EMPTY as u32 / objects as u32) as u8,
        };
        if bucket != slab.bucket.get() {
            self.unlist(slab);
            self.list(slab, bucket);
        }
    }

    fn count(&mut self, slab: &Slab, step: fn(u64, u64) -> u64) {
        self.slabs = step(self.slabs, 1);
        self.objects = step(self.objects, slab.objects() as u64);
        self.frames = step(self.frames, slab.pages());
    }

    fn list(&mut self, slab: &Slab, bucket: u8) {
        slab.bucket.set(bucket);
        let Some(head) = self.lists.get_mut(usize::from(bucket)) else {
            return;
        };
        let pointer = ptr::from_ref(slab).cast_mut();
        slab.previous.set(ptr::null_mut());
        slab.next.set(*head);
        // SAFETY: descriptors on the lists live as long as the cache (slab I4).
        if let Some(next) = unsafe { head.as_ref() } {
            next.previous.set(pointer);
        }
        *head = pointer;
        if usize::from(bucket) == EMPTY {
            self.empty += 1;
        }
    }

    fn unlist(&mut self, slab: &Slab) {
        let bucket = usize::from(slab.bucket.get());
        slab.bucket.set(UNLISTED);
        let Some(head) = self.lists.get_mut(bucket) else {
            return;
        };
        let (previous, next) = (slab.previous.get(), slab.next.get());
        // SAFETY: neighbours on a list are descriptors of the cache (slab I4).
        match unsafe { previous.as_ref() } {
            Some(previous) => previous.next.set(next),
            None => *head = next,
        }
        // SAFETY: as above.
        if let Some(next) = unsafe { next.as_ref() } {
            next.previous.set(previous);
        }
        if bucket == EMPTY {
            self.empty -= 1;
        }
    }

    /// Objects in quarantine.
    pub(crate) fn waiting_len(&self) -> u64 {
        // SAFETY: the depot owns the array.
        unsafe { self.waiting.as_ref() }.map_or(0, |array| array.len() as u64)
    }

    /// The fullest slab that has a free object.
    pub fn fullest(&self) -> Option<&Slab> {
        // SAFETY: descriptors on the lists live as long as the cache (slab I4).
        self.lists.iter().find_map(|&head| unsafe { head.as_ref() })
    }

    /// Takes one slab out whose objects are all free and now belong to the caller; `None` where there is none.
    pub fn take_empty(&mut self) -> Option<NonNull<Slab>> {
        loop {
            // SAFETY: as in `fullest`; the reference does not borrow the depot, whose lists change below.
            let slab: &Slab = unsafe { self.lists[EMPTY].as_ref() }?;
            if slab.claim_all() {
                self.unlist(slab);
                slab.bucket.set(RETIRED);
                self.count(slab, u64::wrapping_sub);
                return Some(NonNull::from(slab));
            }
            // Not empty after all: it is relisted, and if that does not move it, there is none.
            self.relist(slab);
            if usize::from(slab.bucket.get()) == EMPTY {
                return None;
            }
        }
    }

    /// Keeps a dead descriptor, which was the caller's, for the next slab of the cache (`I3`).
    pub fn bury(&mut self, slab: &Slab) {
        debug_assert!(slab.objects() == 0);
        slab.bucket.set(BURIED);
        slab.next.set(self.dead);
        self.dead = ptr::from_ref(slab).cast_mut();
    }

    /// As [`bury`](Self::bury), for what was found on the pending stack: nothing where somebody holds it, it was buried, or it is live. A late
    /// mention there changes nothing.
    pub fn bury_given_up(&mut self, slab: &Slab) {
        if slab.is_given_up() {
            self.bury(slab);
        }
    }

    /// A dead descriptor, if one is left.
    pub fn exhume(&mut self) -> Option<NonNull<Slab>> {
        let pointer = NonNull::new(self.dead)?;
        // SAFETY: dead descriptors belong to the depot.
        let slab = unsafe { pointer.as_ref() };
        self.dead = slab.next.get();
        slab.bucket.set(NEW);
        Some(pointer)
    }
}

impl Default for Depot {
    fn default() -> Self {
        Self::new()
    }
}
