//! The slow paths: refill, flush, and slabs that come and go.
//!
//! ```text
//!   alloc: loaded empty?  spare -> depot: exchange whole arrays -> slabs: claim words -> a new slab
//!   free:  loaded full?   spare -> depot: exchange whole arrays -> slabs: give words back -> empty slabs go
//! ```
//!
//! Contexts. A context that finds the head busy has interrupted its owner and goes *direct*: it tries the depot's lock
//! once, and otherwise works on the bit words alone and leaves a note on the pending stack.
//!
//! Invariants
//! - `I1`: whoever waits for a depot's lock has set the busy flag of its CPU's head of that cache first. So what interrupts the
//!   holder on the same CPU sees the flag and never waits.
//! - `I2`: no lock is held across a call of the page source that allocates. Frames go back without the lock as well.
//! - `I3`: every object is at any time in exactly one of: a user's hands, a CPU's array, an array of the depot, its slab's bits, a
//!   local variable of one of these functions.

use core::ptr::{self, NonNull};

use kmem_hal::sync::Ordering;
use kmem_hal::{AllocError, Cpu, FrameRequest, FrameTag, Order, TraceEvent};

use crate::array::Array;
use crate::block;
use crate::depot::Depot;
use crate::head::{Busy, Head};
use crate::misuse::Misuse;
use crate::platform::Platform;
use crate::raw::RawCache;
use crate::slab::{Slab, WORDS};
use crate::system::SlabSystem;

/// Slabs that one refill looks at: bounds the time under the lock.
const VISITS: usize = 16;

/// Descriptors that a context without the lock looks at.
const DIRECT_VISITS: usize = 64;

impl<P: Platform> SlabSystem<P> {
    /// An object of `cache`, when the loaded array had none.
    #[cold]
    #[inline(never)]
    pub(crate) fn alloc_slow(
        &self,
        cache: &RawCache<P::Lock>,
        request: &FrameRequest,
    ) -> Result<NonNull<u8>, AllocError> {
        if let Some(object) = self.alloc_cached(cache) {
            return Ok(object);
        }
        let refused = match self.grow(cache, request) {
            Ok(object) => return Ok(object),
            Err(refused) => refused,
        };
        // Memory is short: what other caches hold in empty slabs and depots may serve, here or to the page source.
        if self.shrink() > 0
            && let Ok(object) = self.grow(cache, request)
        {
            return Ok(object);
        }
        // Objects of this very cache may have come back meanwhile.
        self.alloc_cached(cache).ok_or_else(|| {
            cache.failures.fetch_add(1, Ordering::Relaxed);
            refused
        })
    }

    /// An object that the cache holds already.
    fn alloc_cached(&self, cache: &RawCache<P::Lock>) -> Option<NonNull<u8>> {
        // SAFETY: a cache exists, so the system is ready.
        let pin = unsafe { self.platform_unchecked() }.cpu().pin();
        match self.head(cache, &pin).and_then(Head::enter) {
            Some(busy) => NonNull::new(self.refill(cache, &busy)?),
            None => self.alloc_direct(cache),
        }
    }

    /// Fills the loaded array from spare, depot or slabs, and takes one object.
    fn refill(&self, cache: &RawCache<P::Lock>, busy: &Busy<'_>) -> Option<*mut u8> {
        self.answer_drain(cache, busy);
        if let Some(object) = busy.pop() {
            return Some(object);
        }
        let head = busy.head();
        if head.cap.get() == 0 && !self.install(cache, head) {
            // No memory for arrays: one object straight from a slab.
            let mut one = ptr::null_mut();
            let mut depot = cache.depot.lock();
            settle(cache, &mut depot);
            let got = fill(cache, &mut depot, &raw mut one, 1);
            drop(depot);
            cache.direct_allocs.fetch_add(got as u64, Ordering::Relaxed);
            return (got == 1).then_some(one);
        }
        if head.spare_n.get() > 0 {
            busy.swap();
            return busy.pop();
        }
        {
            let mut depot = cache.depot.lock(); // I1: busy is set
            settle(cache, &mut depot);
            if let Some(full) = depot.full.pop() {
                cache.full.set(depot.full.len() as u32);
                depot.exchanges += 1;
                if let Some(empty) = NonNull::new(head.loaded.get()) {
                    // SAFETY: the head owned its empty array and gives it to the depot.
                    unsafe { depot.spare.push(empty) };
                }
                // SAFETY: the array was the depot's and is this head's now.
                let (n, cap) = unsafe { (full.as_ref().len(), full.as_ref().capacity()) };
                head.loaded.set(full.as_ptr());
                head.n.set(n as u32);
                head.cap.set(cap as u32);
                head.add_taken(n);
            } else {
                // SAFETY: the head's array has `cap` slots and is empty.
                let slots = unsafe { Array::slots(head.loaded.get()) };
                let n = fill(cache, &mut depot, slots, head.cap.get() as usize);
                head.n.set(n as u32);
                head.add_taken(n);
            }
        }
        busy.pop()
    }

    /// Takes an object back when the loaded array had no room.
    #[cold]
    #[inline(never)]
    pub(crate) fn free_slow(&self, cache: &RawCache<P::Lock>, object: NonNull<u8>) {
        // SAFETY: a cache exists, so the system is ready.
        let pin = unsafe { self.platform_unchecked() }.cpu().pin();
        match self.head(cache, &pin).and_then(Head::enter) {
            Some(busy) => self.put(cache, &busy, object),
            None => self.free_direct(cache, object),
        }
    }

    /// Puts an object into the loaded array after making room.
    fn put(&self, cache: &RawCache<P::Lock>, busy: &Busy<'_>, object: NonNull<u8>) {
        self.answer_drain(cache, busy);
        let head = busy.head();
        if busy.push(object.as_ptr()) {
            return;
        }
        if head.cap.get() == 0 {
            if self.install(cache, head) && busy.push(object.as_ptr()) {
                return;
            }
            return self.free_locked(cache, object);
        }
        if head.spare_n.get() == 0 {
            busy.swap();
        } else if !self.exchange_full(cache, head) {
            let spare = head.spare.get();
            let n = head.spare_n.get() as usize;
            head.spare_n.set(0);
            head.add_given(n);
            // SAFETY: the head owns the spare array, whose first `n` slots hold objects.
            unsafe { self.flush(cache, Array::slots(spare), n) };
            busy.swap();
        } else {
            busy.swap();
        }
        let pushed = busy.push(object.as_ptr());
        debug_assert!(pushed, "an empty array has room");
    }

    /// Exchanges the full spare array for an empty one at the depot; `false` where the depot is full or has none.
    fn exchange_full(&self, cache: &RawCache<P::Lock>, head: &Head) -> bool {
        let limit = cache.depot_limit();
        let exchange = |depot: &mut Depot, empty: NonNull<Array>| {
            let n = head.spare_n.get() as usize;
            if let Some(spare) = NonNull::new(head.spare.get()) {
                // SAFETY: the head owns its spare array and gives it to the depot.
                unsafe {
                    spare.as_ref().set_len(n);
                    depot.full.push(spare);
                }
            }
            head.spare.set(empty.as_ptr());
            head.spare_n.set(0);
            head.add_given(n);
            cache.full.set(depot.full.len() as u32);
            depot.exchanges += 1;
        };
        if cache.full.get() as usize >= limit {
            return false;
        }
        {
            let mut depot = cache.depot.lock(); // I1: busy is set
            if let Some(empty) = depot.spare.pop() {
                exchange(&mut depot, empty);
                return true;
            }
        }
        // I2: memory without the lock.
        let Ok(empty) = self.new_array(cache.geometry().array()) else {
            return false;
        };
        exchange(&mut cache.depot.lock(), empty);
        true
    }

    /// Gives a head its two arrays; `false` where there is no memory for them.
    fn install(&self, cache: &RawCache<P::Lock>, head: &Head) -> bool {
        let slots = cache.geometry().array();
        let take = || {
            let spare = cache.depot.lock().spare.pop(); // slow I1: busy is set
            spare.or_else(|| self.new_array(slots).ok())
        };
        let Some(loaded) = take() else { return false };
        let Some(spare) = take() else {
            // SAFETY: the array was just taken and nobody else knows it.
            unsafe { cache.depot.lock().spare.push(loaded) };
            return false;
        };
        head.loaded.set(loaded.as_ptr());
        head.spare.set(spare.as_ptr());
        head.n.set(0);
        head.spare_n.set(0);
        head.cap.set(slots as u32);
        true
    }

    /// Empties both arrays into the slabs if a drain was asked for since the last time.
    fn answer_drain(&self, cache: &RawCache<P::Lock>, busy: &Busy<'_>) {
        let asked = self.drain.load(Ordering::Relaxed);
        if busy.head().drained.get() != asked {
            busy.head().drained.set(asked);
            self.drain_head(cache, busy);
        }
    }

    /// Empties both arrays of a head into the slabs.
    pub(crate) fn drain_head(&self, cache: &RawCache<P::Lock>, busy: &Busy<'_>) {
        let head = busy.head();
        for (array, count) in [(&head.loaded, &head.n), (&head.spare, &head.spare_n)] {
            let n = count.get() as usize;
            if n > 0 {
                count.set(0);
                head.add_given(n);
                // SAFETY: the head owns its arrays, and the first `n` slots hold objects.
                unsafe { self.flush(cache, Array::slots(array.get()), n) };
            }
        }
    }

    /// Gives `n` objects back to their slabs, and slabs that became empty to the page source.
    ///
    /// The slots are used as scratch space.
    ///
    /// # Safety
    ///
    /// The first `n` slots (at most 64) hold objects that the caller gives up; the caller has set this CPU's busy flag
    /// for the cache, or runs where nothing can interrupt it that uses the cache (`I1`).
    pub(crate) unsafe fn flush(&self, cache: &RawCache<P::Lock>, slots: *mut *mut u8, n: usize) {
        // SAFETY: the caller's promise.
        let slabs = unsafe { self.scatter(cache, slots, n) };
        let retired = {
            let mut depot = cache.depot.lock();
            settle(cache, &mut depot);
            for index in 0..slabs {
                // SAFETY: `scatter` left that many pointers to descriptors of this cache.
                depot.relist(unsafe { &*(*slots.add(index)).cast::<Slab>() });
            }
            retire_surplus(cache, &mut depot)
        };
        self.give_slabs_back(cache, retired, |bury| bury(&mut cache.depot.lock()));
    }

    /// Sets the free bits of `n` objects, one locked instruction a word, and leaves the slabs concerned in the slots.
    ///
    /// Answers how many slabs that are. What is not an object in use of this cache is reported and dropped.
    ///
    /// # Safety
    ///
    /// The first `n` slots (at most 64) hold pointers that the caller gives up.
    pub(crate) unsafe fn scatter(
        &self,
        cache: &RawCache<P::Lock>,
        slots: *mut *mut u8,
        n: usize,
    ) -> usize {
        // SAFETY: a cache exists, so the system is ready.
        let platform = unsafe { self.platform_unchecked() };
        let geometry = cache.geometry();
        let mut todo = if n >= 64 { u64::MAX } else { (1 << n) - 1 };
        let mut slabs = 0;
        while todo != 0 {
            let first = todo.trailing_zeros() as usize;
            // SAFETY: below `n`.
            let pointer = unsafe { *slots.add(first) };
            let slab = match Self::slab_of(platform, pointer) {
                Some(slab) if slab.cache() == cache.opaque() => slab,
                other => {
                    self.report_stranger(cache, pointer, other);
                    todo &= todo - 1;
                    continue;
                }
            };
            let base = slab.base().addr();
            let span = slab.objects() * geometry.size();
            let mut masks = [0u64; WORDS];
            let mut rest = todo;
            while rest != 0 {
                let at = rest.trailing_zeros() as usize;
                rest &= rest - 1;
                // SAFETY: below `n`.
                let address = unsafe { *slots.add(at) }.addr();
                let offset = address.wrapping_sub(base);
                if offset >= span {
                    if at == first {
                        // In the slab's block and behind its last object.
                        todo &= !(1 << at);
                        self.report(
                            cache,
                            Misuse::InvalidFree {
                                cache: cache.setup.name,
                                address,
                            },
                        );
                    }
                    continue;
                }
                todo &= !(1 << at);
                let index = geometry.index(offset);
                if index * geometry.size() != offset {
                    self.report(
                        cache,
                        Misuse::InvalidFree {
                            cache: cache.setup.name,
                            address,
                        },
                    );
                    continue;
                }
                let bit = 1 << (index % 64);
                if masks[index / 64] & bit != 0 {
                    self.report(
                        cache,
                        Misuse::DoubleFree {
                            cache: cache.setup.name,
                            address,
                        },
                    );
                }
                masks[index / 64] |= bit;
            }
            for (word, &mask) in masks.iter().enumerate() {
                if mask == 0 {
                    continue;
                }
                let mut twice = slab.give_back(word, mask);
                while twice != 0 {
                    let index = word * 64 + twice.trailing_zeros() as usize;
                    twice &= twice - 1;
                    let address = base + index * geometry.size();
                    self.report(
                        cache,
                        Misuse::DoubleFree {
                            cache: cache.setup.name,
                            address,
                        },
                    );
                }
            }
            // SAFETY: `slabs <= first`, whose pointer has been used.
            unsafe { *slots.add(slabs) = ptr::from_ref(slab).cast_mut().cast() };
            slabs += 1;
        }
        slabs
    }

    /// Gives one object back under the depot's lock, with the busy flag set.
    fn free_locked(&self, cache: &RawCache<P::Lock>, object: NonNull<u8>) {
        let mut one = object.as_ptr();
        cache.direct_frees.fetch_add(1, Ordering::Relaxed);
        // SAFETY: one object that the caller gave up; the caller has set the busy flag.
        unsafe { self.flush(cache, &raw mut one, 1) };
    }

    /// An object without the head: for a nested context, and for a CPU without heads.
    fn alloc_direct(&self, cache: &RawCache<P::Lock>) -> Option<NonNull<u8>> {
        let mut one = ptr::null_mut();
        let got = match cache.depot.try_lock() {
            Some(mut depot) => {
                settle(cache, &mut depot);
                let mut got = fill(cache, &mut depot, &raw mut one, 1);
                if got == 0
                    && let Some(full) = depot.full.pop()
                {
                    // SAFETY: the depot owns the array; its last object goes to the caller.
                    unsafe {
                        let n = full.as_ref().len();
                        if n > 0 {
                            one = *Array::slots(full.as_ptr()).add(n - 1);
                            full.as_ref().set_len(n - 1);
                            got = 1;
                        }
                        if n > 1 {
                            depot.full.push(full);
                        } else {
                            depot.spare.push(full);
                        }
                        cache.full.set(depot.full.len() as u32);
                    }
                }
                got
            }
            None => {
                // Bits only: descriptors never vanish, and a claimed bit keeps its slab alive (slab I1, I4).
                let mut got = 0;
                let mut visits = 0;
                cache.for_each_slab(|slab| {
                    got = slab.claim(1, |word, mask| {
                        one = object_at(cache, slab, word * 64 + mask.trailing_zeros() as usize);
                    });
                    visits += 1;
                    got == 0 && visits < DIRECT_VISITS
                });
                got
            }
        };
        cache.direct_allocs.fetch_add(got as u64, Ordering::Relaxed);
        if got == 1 { NonNull::new(one) } else { None }
    }

    /// Takes an object back without the head.
    fn free_direct(&self, cache: &RawCache<P::Lock>, object: NonNull<u8>) {
        let mut one = object.as_ptr();
        cache.direct_frees.fetch_add(1, Ordering::Relaxed);
        // SAFETY: one object that the caller gave up.
        if unsafe { self.scatter(cache, &raw mut one, 1) } == 0 {
            return;
        }
        // SAFETY: `scatter` left a pointer to a descriptor of this cache.
        let slab = unsafe { &*one.cast::<Slab>() };
        match cache.depot.try_lock() {
            Some(mut depot) => {
                settle(cache, &mut depot);
                depot.relist(slab);
            }
            // The next holder of the lock finds it.
            None => cache.pending.push(slab),
        }
    }

    /// Runs `f` under the depot's lock, from any context; `None` where this CPU was interrupted while it used the cache.
    pub(crate) fn with_depot<R>(
        &self,
        cache: &RawCache<P::Lock>,
        f: impl FnOnce(&mut Depot) -> R,
    ) -> Option<R> {
        // SAFETY: a cache exists, so the system is ready.
        let pin = unsafe { self.platform_unchecked() }.cpu().pin();
        let Some(head) = self.head(cache, &pin) else {
            return cache.depot.try_lock().map(|mut depot| f(&mut depot));
        };
        match head.enter() {
            Some(_busy) => {
                let mut depot = cache.depot.lock(); // I1
                settle(cache, &mut depot);
                Some(f(&mut depot))
            }
            None => cache.depot.try_lock().map(|mut depot| {
                settle(cache, &mut depot);
                f(&mut depot)
            }),
        }
    }

    /// A new slab; its first object goes to the caller, the others to everybody.
    fn grow(
        &self,
        cache: &RawCache<P::Lock>,
        request: &FrameRequest,
    ) -> Result<NonNull<u8>, AllocError> {
        let slab = self.new_slab(cache, request)?;
        let object = object_at(cache, slab, 0);
        slab.release_from(1);
        cache.direct_allocs.fetch_add(1, Ordering::Relaxed);
        if self.with_depot(cache, |depot| depot.relist(slab)).is_none() {
            cache.pending.push(slab);
        }
        NonNull::new(object).ok_or(AllocError::OutOfMemory)
    }

    /// A new slab whose objects all belong to the caller.
    fn new_slab(
        &self,
        cache: &RawCache<P::Lock>,
        request: &FrameRequest,
    ) -> Result<&Slab, AllocError> {
        // SAFETY: a cache exists, so the system is ready.
        let platform = unsafe { self.platform_unchecked() };
        let geometry = cache.geometry();
        let dead = self.with_depot(cache, Depot::exhume).flatten();
        let slab = match dead {
            Some(slab) => slab,
            None => self.new_descriptor(cache)?,
        };
        // SAFETY: descriptors live as long as their cache.
        let slab: &Slab = unsafe { slab.as_ref() };
        // Large slabs are cheaper; a fragmented machine still gets small ones.
        let mut order = geometry.order().get();
        let (frame, memory) = loop {
            let size = Order::new(order).unwrap_or(Order::ZERO);
            let request = FrameRequest {
                order: size,
                zeroed: false,
                ..*request
            };
            match block::take_for(platform, &request, FrameTag::Slab) {
                Ok(block) => break block,
                Err(error) if order == geometry.least_order().get() => {
                    self.bury(cache, slab);
                    return Err(error);
                }
                Err(_) => order -= 1,
            }
        };
        let order = Order::new(order).unwrap_or(Order::ZERO);
        let owner = ptr::from_ref(slab).expose_provenance() as u64;
        for offset in 0..order.frames() {
            let slot = frame
                .checked_add(offset)
                .and_then(|frame| platform.table().slot(frame));
            // `take_for` has checked that the table covers the block.
            if let Some(slot) = slot {
                if offset > 0 {
                    slot.claim(FrameTag::Slab, Order::ZERO);
                }
                slot.owner().store(owner, Ordering::Relaxed);
            }
        }
        let objects = geometry.objects_in(order);
        slab.set_memory(memory.as_ptr(), frame, order, objects);
        if let Some(hooks) = cache.setup.hooks {
            for index in 0..objects {
                // SAFETY: the object is memory of the cache's size and alignment that belongs to this call.
                unsafe { (hooks.construct)(hooks.context, object_at(cache, slab, index)) };
            }
        }
        platform.trace(TraceEvent::Slab(frame, order, true));
        Ok(slab)
    }

    /// Puts a descriptor without memory where the next slab finds it.
    fn bury(&self, cache: &RawCache<P::Lock>, slab: &Slab) {
        slab.bucket.set(crate::slab::RETIRED);
        if self.with_depot(cache, |depot| depot.bury(slab)).is_none() {
            cache.pending.push(slab);
        }
    }

    /// Gives a chain of retired slabs back to the page source; `locked` runs its argument under the depot's lock, if it can.
    ///
    /// Answers how many frames went back.
    pub(crate) fn give_slabs_back(
        &self,
        cache: &RawCache<P::Lock>,
        chain: *mut Slab,
        locked: impl FnOnce(&mut dyn FnMut(&mut Depot)),
    ) -> u64 {
        if chain.is_null() {
            return 0;
        }
        // SAFETY: a cache exists, so the system is ready.
        let platform = unsafe { self.platform_unchecked() };
        let mut frames = 0;
        let mut at = chain;
        // SAFETY: the chain holds descriptors of this cache, which live as long as it.
        while let Some(slab) = unsafe { at.as_ref() } {
            at = slab.next.get();
            if let Some(hooks) = cache.setup.hooks {
                for index in 0..slab.objects() {
                    // SAFETY: every object belongs to this call and was built when the slab was made.
                    unsafe { (hooks.destruct)(object_at(cache, slab, index)) };
                }
            }
            let (first, order) = slab.block();
            slab.clear_memory();
            platform.trace(TraceEvent::Slab(first, order, false));
            // SAFETY: the block came from `new_slab`; every object of it was claimed.
            unsafe { block::give(platform, first, order) };
            frames += order.frames();
        }
        locked(&mut |depot| {
            let mut at = chain;
            // SAFETY: as above; `bury` changes the link of the one before.
            while let Some(slab) = unsafe { at.as_ref() } {
                at = slab.next.get();
                depot.bury(slab);
            }
        });
        frames
    }

    /// Counts and tells a misuse.
    #[cold]
    pub(crate) fn report(&self, cache: &RawCache<P::Lock>, misuse: Misuse) {
        cache.misuses.fetch_add(1, Ordering::Relaxed);
        // SAFETY: a cache exists, so the system is ready.
        unsafe { self.platform_unchecked() }.misuse(&misuse);
    }

    #[cold]
    fn report_stranger(&self, cache: &RawCache<P::Lock>, pointer: *mut u8, slab: Option<&Slab>) {
        let address = pointer.addr();
        // SAFETY: a descriptor's cache is a cache of some system with the same lock type as long as the descriptor lives; only
        // the owner word is read before it is known to be ours.
        let other =
            slab.and_then(|slab| unsafe { slab.cache().cast::<RawCache<P::Lock>>().as_ref() });
        let misuse = match other {
            Some(other) if ptr::eq(other.owner, cache.owner) => Misuse::WrongCache {
                cache: cache.setup.name,
                belongs_to: other.setup.name,
                address,
            },
            _ => {
                self.foreign.fetch_add(1, Ordering::Relaxed);
                Misuse::ForeignFree { address }
            }
        };
        self.report(cache, misuse);
    }
}

/// The address of object `index` of `slab`.
pub fn object_at<L: kmem_hal::RawLock>(cache: &RawCache<L>, slab: &Slab, index: usize) -> *mut u8 {
    slab.base().wrapping_add(index * cache.geometry().size())
}

/// Lists what contexts without the lock have freed into, and buries what they had retired.
pub fn settle<L: kmem_hal::RawLock>(cache: &RawCache<L>, depot: &mut Depot) {
    if cache.pending.any() {
        cache.pending.take(|slab| {
            depot.relist(slab);
            depot.bury(slab);
        });
    }
}

/// Claims up to `want` objects from the fullest slabs into `slots`; answers how many.
///
/// Of one word the lowest address ends in the highest slot, so that objects leave the array by ascending address.
fn fill<L: kmem_hal::RawLock>(
    cache: &RawCache<L>,
    depot: &mut Depot,
    slots: *mut *mut u8,
    want: usize,
) -> usize {
    let mut n = 0;
    for _ in 0..VISITS {
        let Some(slab) = depot.fullest().map(NonNull::from) else {
            break;
        };
        // SAFETY: descriptors live as long as their cache.
        let slab: &Slab = unsafe { slab.as_ref() };
        slab.claim(want - n, |word, mut mask| {
            let count = mask.count_ones() as usize;
            for place in (n..n + count).rev() {
                let index = word * 64 + mask.trailing_zeros() as usize;
                mask &= mask - 1;
                // SAFETY: `place` is below `want`, and the caller's slots have room for that many.
                unsafe { *slots.add(place) = object_at(cache, slab, index) };
            }
            n += count;
        });
        depot.relist(slab);
        if n == want {
            break;
        }
    }
    if n > 0 {
        depot.refills += 1;
    }
    n
}

/// Takes empty slabs beyond those that are kept, as a chain; their objects belong to the caller.
fn retire_surplus<L: kmem_hal::RawLock>(cache: &RawCache<L>, depot: &mut Depot) -> *mut Slab {
    if cache.setup.stable {
        return ptr::null_mut();
    }
    retire(depot, cache.keep_empty())
}

/// Takes empty slabs until `keep` are left, as a chain; their objects belong to the caller.
pub fn retire(depot: &mut Depot, keep: usize) -> *mut Slab {
    let mut chain = ptr::null_mut();
    while depot.empty > keep {
        let Some(slab) = depot.take_empty() else {
            break;
        };
        // SAFETY: descriptors live as long as their cache; a retired one's link is free.
        unsafe { slab.as_ref() }.next.set(chain);
        chain = slab.as_ptr();
    }
    chain
}
