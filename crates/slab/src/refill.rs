//! Allocation when the loaded array has no object: spare, depot, slabs, a new slab.
//!
//! ```text
//!   loaded empty?  spare -> depot: exchange whole arrays -> slabs: take free bits -> a new slab
//! ```
//!
//! A context that finds the head busy has interrupted its owner and goes another way (`direct`).
//!
//! Invariants, of this module, `flush`, `direct` and `grow`
//! - `I1`: whoever waits for a depot's lock has set the busy flag of its CPU's head of that cache first. So what interrupts the
//!   holder on the same CPU sees the flag and never waits. A caller who is alone with the cache needs no flag.
//! - `I2`: no lock is held across a call of the page source. Frames go back without the lock as well.
//! - `I3`: every object is at any time in exactly one of: a user's hands, a CPU's array, an array of the depot, its slab's bits, a
//!   local variable of one of these functions.

use core::ptr::{self, NonNull};

use kmem_hal::sync::Ordering;
use kmem_hal::{AllocError, Cpu, FrameRequest, LockGuard, NodePolicy};

use crate::array::{Array, Slot, larger, smaller};
use crate::depot::Depot;
use crate::direct::{settle, take_from_depot};
use crate::head::{Busy, Head};
use crate::node::CacheNode;
use crate::platform::Platform;
use crate::raw::RawCache;
use crate::slab::Slab;
use crate::system::SlabSystem;

/// Slabs that one refill looks at: bounds the time under the lock.
const VISITS: usize = 16;

/// Events close to each other after which a CPU's arrays grow.
const GROW_AFTER: u32 = 8;

impl<P: Platform> SlabSystem<P> {
    /// An object of `cache`, when the loaded array had none, or where the request names a node.
    #[cold]
    #[inline(never)]
    pub(crate) fn alloc_slow(
        &self,
        cache: &RawCache<P::Lock>,
        request: &FrameRequest,
    ) -> Result<NonNull<u8>, AllocError> {
        let node = request.node;
        if let Some(object) = self.alloc_held(cache, node) {
            return Ok(object);
        }
        if let Some(object) = self.borrow(cache, node, false) {
            return Ok(object);
        }
        let refused = match self.grow(cache, request) {
            Ok(object) => return Ok(object),
            Err(refused) => refused,
        };
        if let Some(object) = self.borrow(cache, node, true) {
            return Ok(object);
        }
        // Memory is short: what other caches hold in empty slabs and depots may serve, here or to the page source.
        if self.shrink_for(request.context) > 0
            && let Ok(object) = self.grow(cache, request)
        {
            return Ok(object);
        }
        // Objects of this very cache may have come back meanwhile, to whichever node they are of.
        self.alloc_held(cache, node)
            .or_else(|| self.borrow(cache, node, true))
            .ok_or_else(|| {
                cache.failures.fetch_add(1, Ordering::Relaxed);
                refused
            })
    }

    /// An object that is there already of the node that a request is for: past the CPU's arrays where it names one.
    #[inline]
    fn alloc_held(&self, cache: &RawCache<P::Lock>, node: NodePolicy) -> Option<NonNull<u8>> {
        match node {
            NodePolicy::Preferred(id) | NodePolicy::Strict(id) if id.get() < cache.nodes => {
                self.alloc_from_depot(cache, cache.node(id))
            }
            NodePolicy::Strict(_) => None,
            _ => self.alloc_cached(cache),
        }
    }

    /// An object that the cache holds already, on this CPU or its node.
    pub(crate) fn alloc_cached(&self, cache: &RawCache<P::Lock>) -> Option<NonNull<u8>> {
        // SAFETY: a cache exists, so the system is ready.
        let pin = unsafe { self.platform_unchecked() }.cpu().pin();
        let node = self.node_of_cpu(cache, pin.id());
        match self.head(cache, &pin).and_then(Head::enter) {
            Some(busy) => self.refill(cache, node, &busy),
            None => self.alloc_direct(cache, node),
        }
    }

    /// An object that a node holds, be it another's than the calling CPU's, after [`alloc_cached`](Self::alloc_cached) had none.
    pub(crate) fn alloc_from(
        &self,
        cache: &RawCache<P::Lock>,
        node: &CacheNode<P::Lock>,
    ) -> Option<NonNull<u8>> {
        // SAFETY: a cache exists, so the system is ready.
        let pin = unsafe { self.platform_unchecked() }.cpu().pin();
        let Some(busy) = self.head(cache, &pin).and_then(Head::enter) else {
            return self.alloc_direct(cache, node);
        };
        // An interrupt may have put something there.
        if let Some(object) = busy.pop() {
            return Some(object);
        }
        match busy.head().capacity() {
            0 => self.take_one(cache, node),
            _ => self.refill_from(cache, node, &busy, busy.streak()),
        }
    }

    /// Fills the loaded array from spare, depot or slabs, and takes one object.
    fn refill(
        &self,
        cache: &RawCache<P::Lock>,
        node: &CacheNode<P::Lock>,
        busy: &Busy<'_>,
    ) -> Option<NonNull<u8>> {
        self.answer_drain(cache, node, busy);
        if let Some(object) = busy.pop() {
            return Some(object);
        }
        let head = busy.head();
        if head.capacity() == 0 && !self.install(cache, node, busy) {
            return self.take_one(cache, node);
        }
        if head.spare_len() > 0 {
            busy.swap();
            return busy.pop();
        }
        self.refill_from(cache, node, busy, busy.note_event())
    }

    /// Fills the loaded array, which is empty, from what a node has, and takes one object.
    fn refill_from(
        &self,
        cache: &RawCache<P::Lock>,
        node: &CacheNode<P::Lock>,
        busy: &Busy<'_>,
        streak: u32,
    ) -> Option<NonNull<u8>> {
        let head = busy.head();
        let mut depot = node.depot.lock(); // I1: busy is set
        settle(cache, node, &mut depot);
        if let Some(full) = depot.full.pop() {
            node.held.set(depot.full.objects() as u32);
            depot.exchanges += 1;
            if let Some(empty) = NonNull::new(busy.loaded()) {
                // SAFETY: the head owned its array, which is empty, and gives it to the depot.
                unsafe {
                    empty.as_ref().set_len(0);
                    depot.spare.push(empty);
                }
            }
            busy.load(full);
            busy.add_taken(head.loaded_len());
            drop(depot);
            return busy.pop();
        }
        if Self::wanted_slots(cache, busy, streak) != head.capacity() {
            drop(depot);
            self.resize(cache, busy, streak); // I2: memory without the lock
            depot = node.depot.lock(); // I1: busy is set
        }
        Self::fill_loaded(cache, busy, depot);
        node.adapt_limit(cache.geometry(), streak, head.capacity());
        busy.pop()
    }

    /// Fills the loaded array, which is empty, from the slabs.
    pub(crate) fn fill_loaded(
        cache: &RawCache<P::Lock>,
        busy: &Busy<'_>,
        mut depot: LockGuard<'_, Depot, P::Lock>,
    ) {
        let capacity = busy.head().capacity();
        // SAFETY: there are arrays: the loaded one, owned by the head, has `capacity` slots and is empty.
        let n = unsafe {
            let slots = Array::slots(busy.loaded());
            fill(cache, &mut depot, slots, capacity)
        };
        drop(depot);
        busy.set_loaded_len(n);
        busy.add_taken(n);
    }

    /// One object straight from a slab or from an array of the depot, where there is no memory for arrays. The busy flag is set.
    fn take_one(
        &self,
        cache: &RawCache<P::Lock>,
        node: &CacheNode<P::Lock>,
    ) -> Option<NonNull<u8>> {
        let mut depot = node.depot.lock(); // I1: busy is set
        settle(cache, node, &mut depot);
        let object = take_from_depot(cache, node, &mut depot)?;
        drop(depot);
        cache.direct_allocs.fetch_add(1, Ordering::Relaxed);
        Some(object)
    }

    /// Gives a head its two arrays; `false` where there is no memory for them.
    pub(crate) fn install(
        &self,
        cache: &RawCache<P::Lock>,
        node: &CacheNode<P::Lock>,
        busy: &Busy<'_>,
    ) -> bool {
        let slots = cache.geometry().array();
        let take = || {
            let spare = node.depot.lock().spare.pop(); // I1: busy is set
            spare.or_else(|| self.new_array(slots).ok())
        };
        let Some(loaded) = take() else { return false };
        let Some(spare) = take() else {
            // SAFETY: the array was just taken and nobody else knows it.
            unsafe { node.depot.lock().spare.push(loaded) };
            return false;
        };
        busy.load(loaded);
        busy.replace_spare(spare.as_ptr());
        true
    }

    /// Exchanges the loaded array, which is empty, for one of [`wanted_slots`](Self::wanted_slots), if there is memory.
    pub(crate) fn resize(&self, cache: &RawCache<P::Lock>, busy: &Busy<'_>, streak: u32) {
        let wanted = Self::wanted_slots(cache, busy, streak);
        if wanted == busy.head().capacity() {
            return;
        }
        let Ok(other) = self.another_array(wanted) else {
            return;
        };
        let old = busy.loaded();
        busy.load(other);
        if let Some(old) = NonNull::new(old) {
            // SAFETY: the head owned the array, which is empty, and nobody knows it any more.
            unsafe { self.free_array(old) };
        }
    }

    /// How many slots the next array of a CPU should have: more while the cache streams, fewer when it does not.
    pub(crate) fn wanted_slots(cache: &RawCache<P::Lock>, busy: &Busy<'_>, streak: u32) -> usize {
        let (slots, geometry) = (busy.head().capacity(), cache.geometry());
        let wanted = match streak {
            0 => smaller(slots),
            GROW_AFTER.. => larger(slots),
            _ => slots,
        };
        wanted.clamp(geometry.array(), geometry.array_max())
    }
}

/// Takes up to `want` objects from the fullest slabs into `slots`; answers how many.
///
/// Of one word the lowest address ends in the highest slot, so that objects leave the array by ascending address.
///
/// # Safety
///
/// There is room for `want` objects at `slots`.
pub(crate) unsafe fn fill<L: kmem_hal::RawLock>(
    cache: &RawCache<L>,
    depot: &mut Depot,
    slots: *mut Slot,
    want: usize,
) -> usize {
    let mut n = 0;
    for _ in 0..VISITS {
        let Some(slab) = depot.fullest().map(NonNull::from) else {
            break;
        };
        // SAFETY: descriptors live as long as their cache.
        let slab: &Slab = unsafe { slab.as_ref() };
        // Read once: a compiler must think that each store to a slot may change them.
        let (base, size) = (slab.base(), cache.geometry().size());
        slab.claim(want - n, |word, mut mask| {
            let first = base.wrapping_add(word * 64 * size);
            n += mask.count_ones() as usize;
            let mut place = n;
            while mask != 0 {
                let index = mask.trailing_zeros() as usize;
                mask &= mask - 1;
                place -= 1;
                // SAFETY: `place` is below `want`, and the caller's slots have room for that many.
                unsafe { *slots.add(place) = first.wrapping_add(index * size) };
            }
        });
        depot.relist(slab);
        if n == want {
            break;
        }
    }
    depot.refills += u64::from(n > 0);
    if cache.setup.features.shuffle {
        // SAFETY: the first `n` slots hold objects.
        shuffle(&mut depot.random, unsafe {
            core::slice::from_raw_parts_mut(slots, n)
        });
    }
    n
}

/// Puts objects into an order that is hard to guess (Fisher and Yates, with xorshift).
fn shuffle(random: &mut u64, slots: &mut [Slot]) {
    if *random == 0 {
        // Where things lie is as random as the kernel's layout; a platform with a random source sets the seed.
        *random = (ptr::from_mut(random).addr() as u64 ^ 0x9e37_79b9_7f4a_7c15) | 1;
    }
    for last in (1..slots.len()).rev() {
        *random ^= *random << 13;
        *random ^= *random >> 7;
        *random ^= *random << 17;
        slots.swap(last, (*random % (last as u64 + 1)) as usize);
    }
}
