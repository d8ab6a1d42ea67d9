//! Frees when the loaded array is full, and drains: arrays to the depot, objects to their slabs.
//!
//! ```text
//!   loaded full?   spare -> depot: exchange whole arrays -> slabs: set free bits -> empty slabs go
//! ```
//!
//! The invariants are those of `refill`.
//!
//! A flush first finds slab and number of every object, without a lock: loads that do not wait for each other, and none where an object lies
//! in the slab of the one before. Then it sets the bits under the lock, those of one word that follow each other at once, and lists a slab again when it has seen
//! the last of a row of its objects.

use core::ptr::{self, NonNull};

use kmem_hal::sync::Ordering;
use kmem_hal::{Cpu, RawLock};

use crate::array::{Array, Slot};
use crate::depot::Depot;
use crate::direct::settle;
use crate::grow::{object_at, retire};
use crate::head::{Busy, Head};
use crate::misuse::{Misuse, SlabRange};
use crate::node::CacheNode;
use crate::platform::Platform;
use crate::raw::RawCache;
use crate::slab::Slab;
use crate::system::SlabSystem;

/// Objects that are given to their slabs under one lock.
const BATCH: usize = 64;

impl<P: Platform> SlabSystem<P> {
    /// Takes an object back when the loaded array had no room.
    #[cold]
    #[inline(never)]
    pub(crate) fn free_slow(&self, cache: &RawCache<P::Lock>, object: NonNull<u8>) {
        // SAFETY: a cache exists, so the system is ready.
        let pin = unsafe { self.platform_unchecked() }.cpu().pin();
        match self.head(cache, &pin).and_then(Head::enter) {
            Some(busy) => self.put(cache, self.node_of_cpu(cache, pin.id()), &busy, object),
            None => self.free_direct(cache, object),
        }
    }

    /// Puts an object into the loaded array after making room.
    fn put(
        &self,
        cache: &RawCache<P::Lock>,
        own: &CacheNode<P::Lock>,
        busy: &Busy<'_>,
        object: NonNull<u8>,
    ) {
        self.answer_drain(cache, own, busy);
        let head = busy.head();
        if busy.push(object) {
            return;
        }
        if head.capacity() == 0 {
            if self.install(cache, own, busy) && busy.push(object) {
                return;
            }
            return self.free_locked(cache, object);
        }
        let mut flushed = None;
        if head.spare_len() > 0 {
            let streak = busy.note_event();
            let node = self.send_home(cache, own, busy);
            if head.spare_len() > 0 && !self.exchange_full(cache, node, busy, streak) {
                node.adapt_limit(cache.geometry(), streak, head.capacity());
                self.flush_spare(cache, busy);
                flushed = Some(streak);
            }
        }
        busy.swap();
        // The array that went to the slabs is empty now: where a CPU mostly frees, no refill comes by that would exchange it.
        if let Some(streak) = flushed {
            self.resize(cache, busy, streak);
        }
        let pushed = busy.push(object);
        debug_assert!(pushed, "an empty array has room");
    }

    /// Exchanges the full spare array for an empty one at the node's depot; `false` where the depot is full or has none.
    fn exchange_full(
        &self,
        cache: &RawCache<P::Lock>,
        node: &CacheNode<P::Lock>,
        busy: &Busy<'_>,
        streak: u32,
    ) -> bool {
        let n = busy.head().spare_len();
        if node.held.get() as usize + n > node.limit.get() as usize {
            return false;
        }
        let wanted = Self::wanted_slots(cache, busy, streak);
        let exchange = |depot: &mut Depot, empty: NonNull<Array>| {
            if let Some(full) = NonNull::new(busy.replace_spare(empty.as_ptr())) {
                // SAFETY: the head owned its spare array, whose count is noted, and gives it to the depot.
                unsafe { depot.full.push(full) };
            }
            busy.add_given(n);
            node.held.set(depot.full.objects() as u32);
            depot.exchanges += 1;
        };
        let mut other = None;
        {
            let mut depot = node.depot.lock(); // I1: busy is set
            if let Some(empty) = depot.spare.pop() {
                // SAFETY: the array was the depot's and is this call's now.
                if unsafe { empty.as_ref() }.capacity() == wanted {
                    exchange(&mut depot, empty);
                    return true;
                }
                other = Some(empty);
            }
        }
        // I2: memory without the lock.
        let empty = match (self.new_array(wanted), other) {
            (Ok(empty), other) => {
                if let Some(other) = other {
                    // SAFETY: empty, taken from the depot above, and nobody else knows it.
                    unsafe { self.free_array(other) };
                }
                empty
            }
            (Err(_), Some(other)) => other,
            (Err(_), None) => return false,
        };
        exchange(&mut node.depot.lock(), empty);
        true
    }

    /// Empties the spare array into the slabs.
    fn flush_spare(&self, cache: &RawCache<P::Lock>, busy: &Busy<'_>) {
        let (slots, n) = (busy.spare_slots(), busy.head().spare_len());
        busy.set_spare_len(0);
        busy.add_given(n);
        // SAFETY: the first `n` slots held the head's objects, which are this call's now; nobody looks at the slots while the flag is set.
        unsafe { self.flush(cache, slots, n) };
    }

    /// Empties both arrays into the slabs if a drain was asked for since the last time.
    pub(crate) fn answer_drain(
        &self,
        cache: &RawCache<P::Lock>,
        own: &CacheNode<P::Lock>,
        busy: &Busy<'_>,
    ) {
        let asked = self.drain.load(Ordering::Relaxed) as u32;
        if busy.head().drained.get() != asked {
            busy.head().drained.set(asked);
            self.drain_head(cache, own, busy);
        }
    }

    /// Empties both arrays of a head into the slabs; grown arrays go as well, the others to the depot of the CPU's node.
    pub(crate) fn drain_head(
        &self,
        cache: &RawCache<P::Lock>,
        own: &CacheNode<P::Lock>,
        busy: &Busy<'_>,
    ) {
        let head = busy.head();
        let cached = head.cached();
        if cached == 0 && head.capacity() <= cache.geometry().array() {
            return;
        }
        let arrays = busy.unload();
        busy.add_given(cached);
        for array in arrays.into_iter().filter_map(NonNull::new) {
            // SAFETY: the head owned the array, and it is this call's now; the flag is set.
            unsafe {
                self.flush_array(cache, array);
                self.drop_array(cache, own, array);
            }
        }
        own.limit.set(cache.geometry().array() as u32);
    }

    /// Keeps an empty array for the next head of the node that needs one, or frees it where it had grown.
    ///
    /// # Safety
    ///
    /// The array belongs to the caller, who gives it up, and who has set this CPU's busy flag for the cache or is alone with it (`I1`).
    pub(crate) unsafe fn drop_array(
        &self,
        cache: &RawCache<P::Lock>,
        node: &CacheNode<P::Lock>,
        array: NonNull<Array>,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            if array.as_ref().capacity() > cache.geometry().array() {
                self.free_array(array);
            } else {
                node.depot.lock().spare.push(array); // I1: busy is set, or alone
            }
        }
    }

    /// Empties an array into the slabs; answers how many objects it held.
    ///
    /// # Safety
    ///
    /// The array belongs to the caller, and its length is right; the rest as [`flush`](Self::flush).
    pub(crate) unsafe fn flush_array(
        &self,
        cache: &RawCache<P::Lock>,
        array: NonNull<Array>,
    ) -> usize {
        // SAFETY: the caller's promise; the first `n` slots hold objects (array I1).
        unsafe {
            let n = array.as_ref().len();
            array.as_ref().set_len(0);
            self.flush(cache, Array::slots(array.as_ptr()), n);
            n
        }
    }

    /// Gives `n` objects back to their slabs, and slabs that became empty to the page source.
    ///
    /// The slots are used as scratch space.
    ///
    /// # Safety
    ///
    /// The first `n` slots hold pointers that the caller gives up; the caller has set this CPU's busy flag for the cache, or is
    /// alone with it: nobody else uses the cache meanwhile, an interrupt neither (`I1`).
    pub(crate) unsafe fn flush(&self, cache: &RawCache<P::Lock>, slots: *mut Slot, n: usize) {
        let mut done = 0;
        while done < n {
            let count = (n - done).min(BATCH);
            // SAFETY: the next `count` slots hold pointers that the caller gives up.
            unsafe { self.flush_batch(cache, slots.add(done), count) };
            done += count;
        }
    }

    /// As [`flush`](Self::flush), for at most `BATCH` objects.
    ///
    /// # Safety
    ///
    /// As `flush`.
    unsafe fn flush_batch(&self, cache: &RawCache<P::Lock>, slots: *mut Slot, n: usize) {
        let mut numbers = [0u16; BATCH];
        // SAFETY: the caller's promise.
        let n = unsafe { self.resolve(cache, slots, &mut numbers[..n]) };
        let mut done = 0;
        while done < n {
            // SAFETY: `resolve` left `n` pointers to descriptors of this cache, of which `done` are dealt with.
            unsafe {
                let (slots, numbers) = (slots.add(done), &mut numbers[done..n]);
                let (node, count) = of_one_node(cache, slots, numbers);
                self.flush_resolved(cache, node, slots, &numbers[..count]);
                done += count;
            }
        }
    }

    /// Sets the bits of objects of one node.
    ///
    /// # Safety
    ///
    /// As many slots as numbers hold pointers to descriptors of this cache and node; the rest as `flush`.
    unsafe fn flush_resolved(
        &self,
        cache: &RawCache<P::Lock>,
        node: &CacheNode<P::Lock>,
        slots: *mut Slot,
        numbers: &[u16],
    ) {
        let mut twice = 0;
        let retired = {
            let mut depot = node.depot.lock(); // I1: busy is set, or alone
            settle(cache, node, &mut depot);
            depot.flushes += 1;
            let mut at = 0;
            while at < numbers.len() {
                // SAFETY: the caller's promise.
                let run = unsafe { run_at(slots, numbers, at) };
                at = run.end;
                let mut again = run.slab.give_back_many(run.word, run.mask);
                while again != 0 {
                    let number = run.word * 64 + again.trailing_zeros() as usize;
                    again &= again - 1;
                    // SAFETY: `twice < at`: a slot whose content has been used.
                    unsafe { *slots.add(twice) = object_at(cache, run.slab, number) };
                    twice += 1;
                }
                // SAFETY: as above.
                if at == numbers.len() || unsafe { !ptr::eq(slab_at(slots, at), run.slab) } {
                    depot.relist(run.slab);
                }
            }
            if cache.setup.stable {
                ptr::null_mut()
            } else {
                retire(&mut depot, cache.keep_empty())
            }
        };
        self.give_slabs_back(cache, retired, |bury| {
            bury(&mut node.depot.lock()); // I1: busy is set, or alone
            true
        });
        // Last, as a report may unwind.
        for at in 0..twice {
            // SAFETY: written above.
            let address = unsafe { *slots.add(at) }.addr();
            self.report(
                cache,
                Misuse::DoubleFree {
                    cache: cache.setup.name,
                    address,
                },
            );
        }
    }

    /// Replaces each pointer by its slab's descriptor and writes its number there to `numbers`; answers how many are left.
    ///
    /// What is not the start of an object of this cache is reported and dropped.
    ///
    /// # Safety
    ///
    /// As many slots as there are numbers hold pointers that the caller gives up.
    pub(crate) unsafe fn resolve(
        &self,
        cache: &RawCache<P::Lock>,
        slots: *mut Slot,
        numbers: &mut [u16],
    ) -> usize {
        let mut kept = 0;
        let mut last: Option<SlabRange<'_>> = None;
        for at in 0..numbers.len() {
            // SAFETY: as many slots as numbers.
            let pointer = unsafe { *slots.add(at) };
            let near = last
                .as_ref()
                .and_then(|last| Some((last.slab, last.number_at(cache, pointer)?)));
            let found = near.or_else(|| {
                let found = self.check_object(cache, pointer)?;
                last = Some(SlabRange::new(cache, found.0));
                Some(found)
            });
            if let Some((slab, number)) = found {
                numbers[kept] = number;
                // SAFETY: `kept <= at`.
                unsafe { *slots.add(kept) = ptr::from_ref(slab).cast_mut().cast() };
                kept += 1;
            }
        }
        kept
    }

    /// Gives one object back under the depot's lock, with the busy flag set.
    fn free_locked(&self, cache: &RawCache<P::Lock>, object: NonNull<u8>) {
        let mut one = object.as_ptr();
        cache.direct_frees.fetch_add(1, Ordering::Relaxed);
        // SAFETY: one object that the caller gave up; the caller has set the busy flag.
        unsafe { self.flush(cache, &raw mut one, 1) };
    }
}

/// Objects of one word of a slab that lie in a row of slots, none of them twice.
struct Run<'c> {
    slab: &'c Slab,
    word: usize,
    mask: u64,
    /// The slot behind them.
    end: usize,
}

/// The longest run from slot `at`.
///
/// # Safety
///
/// As many slots as numbers, more than `at`, hold pointers to descriptors of a cache that lives.
#[inline]
unsafe fn run_at<'c>(slots: *mut Slot, numbers: &[u16], at: usize) -> Run<'c> {
    // SAFETY: the caller's promise.
    let slab = unsafe { slab_at(slots, at) };
    let word = usize::from(numbers[at]) / 64;
    let (mut mask, mut end) = (0, at);
    while let Some(&number) = numbers.get(end) {
        let bit = 1 << (number % 64);
        // SAFETY: as above.
        let same = unsafe { ptr::eq(slab_at(slots, end), slab) };
        if !same || usize::from(number) / 64 != word || mask & bit != 0 {
            break;
        }
        mask |= bit;
        end += 1;
    }
    Run {
        slab,
        word,
        mask,
        end,
    }
}

/// The descriptor that a slot points to.
///
/// # Safety
///
/// There is such a slot, and it holds a pointer to a descriptor of a cache that lives.
#[inline(always)]
unsafe fn slab_at<'c>(slots: *mut Slot, at: usize) -> &'c Slab {
    // SAFETY: the caller's promise; descriptors live as long as their cache.
    unsafe { &*(*slots.add(at)).cast::<Slab>() }
}

/// Moves the descriptors that are of the first one's node to the front, with their numbers; answers the node and how many.
///
/// # Safety
///
/// As many slots as numbers, at least one, hold pointers to descriptors of this cache.
#[inline]
unsafe fn of_one_node<'c, L: RawLock>(
    cache: &'c RawCache<L>,
    slots: *mut Slot,
    numbers: &mut [u16],
) -> (&'c CacheNode<L>, usize) {
    if cache.nodes == 1 {
        return (&cache.first, numbers.len());
    }
    // SAFETY: the caller's promise.
    let node_at = |at: usize| unsafe { slab_at(slots, at) }.node();
    let id = node_at(0);
    let mut count = 0;
    for at in 0..numbers.len() {
        if node_at(at) == id {
            numbers.swap(count, at);
            // SAFETY: both are below the number of slots.
            unsafe { ptr::swap(slots.add(count), slots.add(at)) };
            count += 1;
        }
    }
    (cache.node(id), count)
}
