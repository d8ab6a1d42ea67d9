//! Calls without the head: of a context that interrupted the head's owner, and on a CPU without heads.
//!
//! Such a context tries the depot's lock once, and otherwise works on the remote words alone and leaves a note on the pending stack.
//! It never waits. The invariants are those of `refill`.

use core::ptr::{self, NonNull};

use kmem_hal::Cpu;
use kmem_hal::sync::Ordering;

use crate::array::{Array, Slot};
use crate::depot::Depot;
use crate::grow::object_at;
use crate::misuse::Misuse;
use crate::node::CacheNode;
use crate::platform::Platform;
use crate::raw::RawCache;
use crate::refill::fill;
use crate::slab::{RETIRED, Slab};
use crate::system::SlabSystem;

/// Descriptors that a context without the lock looks at.
const VISITS: usize = 64;

impl<P: Platform> SlabSystem<P> {
    /// An object of a node without the head; of any node where the depot's lock cannot be had.
    pub(crate) fn alloc_direct(
        &self,
        cache: &RawCache<P::Lock>,
        node: &CacheNode<P::Lock>,
    ) -> Option<NonNull<u8>> {
        let object = match node.depot.try_lock() {
            Some(mut depot) => {
                settle(cache, node, &mut depot);
                take_from_depot(cache, node, &mut depot)
            }
            None => {
                // Remote words only: descriptors never vanish, and a claimed bit keeps its slab alive (slab I1, I4).
                let (mut got, mut visits) = (ptr::null_mut(), 0);
                cache.for_each_slab(|slab| {
                    if let Some(number) = slab.claim_remote() {
                        got = object_at(cache, slab, number);
                    }
                    visits += 1;
                    got.is_null() && visits < VISITS
                });
                NonNull::new(got)
            }
        };
        if object.is_some() {
            cache.direct_allocs.fetch_add(1, Ordering::Relaxed);
        }
        object
    }

    /// An object of a node from its slabs or arrays, past the head.
    pub(crate) fn alloc_from_depot(
        &self,
        cache: &RawCache<P::Lock>,
        node: &CacheNode<P::Lock>,
    ) -> Option<NonNull<u8>> {
        let object = self
            .with_depot(cache, node, |depot| take_from_depot(cache, node, depot))
            .flatten()?;
        cache.direct_allocs.fetch_add(1, Ordering::Relaxed);
        Some(object)
    }

    /// Takes an object back without the head.
    pub(crate) fn free_direct(&self, cache: &RawCache<P::Lock>, object: NonNull<u8>) {
        cache.direct_frees.fetch_add(1, Ordering::Relaxed);
        let Some((range, number)) = self.check_object(cache, object.as_ptr()) else {
            return;
        };
        let slab = range.slab;
        let (number, node) = (usize::from(number), cache.node(slab.node()));
        let given = match node.depot.try_lock() {
            Some(mut depot) => {
                settle(cache, node, &mut depot);
                let given = slab.give_back(number);
                depot.relist(slab);
                given
            }
            None => {
                let given = slab.give_back_remote(number);
                // The next holder of the lock merges it.
                node.pending.push(slab);
                given
            }
        };
        if !given {
            self.report(
                cache,
                Misuse::DoubleFree {
                    cache: cache.setup.name,
                    address: object.as_ptr().addr(),
                },
            );
        }
    }

    /// Runs `f` under the lock of a node's depot, from any context; `None` where this CPU was interrupted while it used the cache.
    pub(crate) fn with_depot<R>(
        &self,
        cache: &RawCache<P::Lock>,
        node: &CacheNode<P::Lock>,
        f: impl FnOnce(&mut Depot) -> R,
    ) -> Option<R> {
        // SAFETY: a cache exists, so the system is ready.
        let pin = unsafe { self.platform_unchecked() }.cpu().pin();
        let busy = match self.head(cache, &pin) {
            Some(head) => head.enter(),
            None => None,
        };
        let mut depot = match &busy {
            Some(_) => node.depot.lock(), // refill I1
            None => node.depot.try_lock()?,
        };
        settle(cache, node, &mut depot);
        Some(f(&mut depot))
    }
}

/// One object from the slabs, or else from an array of the depot.
pub(crate) fn take_from_depot<L: kmem_hal::RawLock>(
    cache: &RawCache<L>,
    node: &CacheNode<L>,
    depot: &mut Depot,
) -> Option<NonNull<u8>> {
    let mut one: Slot = ptr::null_mut();
    // SAFETY: room for one.
    if unsafe { fill(cache, depot, &raw mut one, 1) } == 1 {
        return NonNull::new(one);
    }
    let full = depot.full.pop()?;
    // SAFETY: the depot owned the array, and it is this call's now; its first `len` slots hold objects.
    unsafe {
        let n = full.as_ref().len();
        if n > 0 {
            one = *Array::slots(full.as_ptr()).add(n - 1);
            full.as_ref().set_len(n - 1);
        }
        if n > 1 {
            depot.full.push(full);
        } else {
            depot.spare.push(full);
        }
    }
    node.held.set(depot.full.objects() as u32);
    NonNull::new(one)
}

/// Merges and lists what contexts without the lock have freed into, and buries what they gave up.
pub(crate) fn settle<L: kmem_hal::RawLock>(
    cache: &RawCache<L>,
    node: &CacheNode<L>,
    depot: &mut Depot,
) {
    if !node.pending.any() {
        return;
    }
    node.pending.take(|slab: &Slab| {
        if slab.is_live() && slab.bucket.get() != RETIRED {
            let twice = slab.merge();
            cache.misuses.fetch_add(twice as u64, Ordering::Relaxed);
            depot.relist(slab);
        }
        depot.bury_given_up(slab);
    });
}
