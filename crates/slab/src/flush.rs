//! Frees when the loaded array is full, and drains: arrays to the depot, objects to their slabs.
//!
//! ```text
//!   loaded full?   spare -> depot: exchange whole arrays -> slabs: set free bits -> empty slabs go
//! ```
//!
//! The invariants are those of `refill`.
//!
//! A flush first makes runs of the objects, without a lock: loads that do not wait for each other, and none where an object lies in the slab of the one
//! before. Then it sets the bits under the lock, those of a run at once, and lists a slab again when it has seen the last of a row of its runs.

use core::ptr::{self, NonNull};

use kmem_hal::sync::Ordering;
use kmem_hal::{Cpu, RawLock};

use crate::array::{Array, Slot};
use crate::depot::Depot;
use crate::direct::settle;
use crate::grow::retire;
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
        let empty = match (self.another_array(wanted), other) {
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
        let mut runs = [Run::NONE; BATCH];
        // SAFETY: the caller's promise.
        let count = unsafe { self.resolve(cache, slots, n, &mut runs) };
        let mut done = 0;
        while done < count {
            // SAFETY: `resolve` left `count` pointers to descriptors of this cache, of which `done` are dealt with.
            unsafe {
                let (slots, runs) = (slots.add(done), &mut runs[done..count]);
                let (node, count) = of_one_node(cache, slots, runs);
                self.flush_resolved(cache, node, slots, &mut runs[..count]);
                done += count;
            }
        }
    }

    /// Sets the bits of runs of one node.
    ///
    /// # Safety
    ///
    /// As many slots as runs hold pointers to the runs' descriptors, of this cache and node; the rest as `flush`.
    unsafe fn flush_resolved(
        &self,
        cache: &RawCache<P::Lock>,
        node: &CacheNode<P::Lock>,
        slots: *mut Slot,
        runs: &mut [Run],
    ) {
        let (mut any_twice, last) = (false, runs.len() - 1);
        let retired = {
            let mut depot = node.depot.lock(); // I1: busy is set, or alone
            settle(cache, node, &mut depot);
            depot.flushes += 1;
            for (at, run) in runs.iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                let slab = unsafe { slab_at(slots, at) };
                run.mask = slab.give_back_many(usize::from(run.word), run.mask);
                // SAFETY: as above.
                if at == last || unsafe { !ptr::eq(slab_at(slots, at + 1), slab) } {
                    depot.relist(slab);
                }
                if run.mask != 0 {
                    any_twice = true;
                    // The slab's memory may be gone before the report is made.
                    // SAFETY: a slot whose descriptor has been used.
                    unsafe { *slots.add(at) = slab.base() };
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
        if any_twice {
            // SAFETY: the loop left it so.
            unsafe { self.report_twice(cache, slots, runs) };
        }
    }

    /// Reports objects that were free already. Last in a flush, as a report may unwind.
    ///
    /// # Safety
    ///
    /// The slots of runs whose mask is not empty hold the bases of their slabs.
    #[cold]
    unsafe fn report_twice(&self, cache: &RawCache<P::Lock>, slots: *mut Slot, runs: &[Run]) {
        for (at, run) in runs.iter().enumerate() {
            let mut twice = run.mask;
            while twice != 0 {
                let number = usize::from(run.word) * 64 + twice.trailing_zeros() as usize;
                twice &= twice - 1;
                // SAFETY: the caller's promise.
                let base = unsafe { *slots.add(at) };
                let misuse = Misuse::DoubleFree {
                    cache: cache.setup.name,
                    address: base.addr() + number * cache.geometry().size(),
                };
                self.report(cache, misuse);
            }
        }
    }

    /// Makes runs of `n` pointers: answers how many there are, whose descriptors are in the first slots.
    ///
    /// What is not the start of an object of this cache is reported and dropped.
    ///
    /// # Safety
    ///
    /// The first `n` slots hold pointers that the caller gives up; there is room for as many runs.
    unsafe fn resolve(
        &self,
        cache: &RawCache<P::Lock>,
        slots: *mut Slot,
        n: usize,
        runs: &mut [Run; BATCH],
    ) -> usize {
        let (mut at, mut count) = (0, 0);
        let mut near: Option<SlabRange<'_>> = None;
        while at < n {
            // SAFETY: one of the `n` slots.
            let pointer = unsafe { *slots.add(at) };
            at += 1;
            let number = near.and_then(|near| near.number_at(cache, pointer));
            let found = match (near, number) {
                (Some(near), Some(number)) => Some((near, number)),
                _ => self.check_object(cache, pointer),
            };
            let Some((range, number)) = found else {
                continue;
            };
            near = Some(range);
            let word = number / 64;
            let objects = range.word(cache, word);
            let mut mask = 1 << (number % 64);
            while at < n {
                // SAFETY: as above.
                let next = objects.number_at(cache, unsafe { *slots.add(at) });
                // An object that comes twice begins a run of its own, so that its bit is looked at twice.
                let Some(bit) = next.map(|next| 1 << next).filter(|bit| mask & bit == 0) else {
                    break;
                };
                mask |= bit;
                at += 1;
            }
            runs[count] = Run { word, mask };
            // SAFETY: `count < at`.
            unsafe { *slots.add(count) = ptr::from_ref(range.slab).cast_mut().cast() };
            count += 1;
        }
        count
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
#[derive(Clone, Copy)]
struct Run {
    word: u16,
    mask: u64,
}

impl Run {
    const NONE: Self = Self { word: 0, mask: 0 };
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

/// Moves the runs that are of the first one's node to the front, with their descriptors; answers the node and how many.
///
/// # Safety
///
/// As many slots as runs, at least one, hold pointers to descriptors of this cache.
#[inline]
unsafe fn of_one_node<'c, L: RawLock>(
    cache: &'c RawCache<L>,
    slots: *mut Slot,
    runs: &mut [Run],
) -> (&'c CacheNode<L>, usize) {
    if cache.nodes == 1 {
        return (&cache.first, runs.len());
    }
    // SAFETY: the caller's promise.
    let node_at = |at: usize| unsafe { slab_at(slots, at) }.node();
    let id = node_at(0);
    let mut count = 0;
    for at in 0..runs.len() {
        if node_at(at) == id {
            runs.swap(count, at);
            // SAFETY: both are below the number of slots.
            unsafe { ptr::swap(slots.add(count), slots.add(at)) };
            count += 1;
        }
    }
    (cache.node(id), count)
}
