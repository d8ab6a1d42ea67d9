//! Slabs that come from the page source and go back to it.
//!
//! The invariants are those of `refill`.

use core::ptr::{self, NonNull};

use kmem_hal::sync::Ordering;
use kmem_hal::{
    AllocError, Context, Cpu, Frame, FrameRequest, FrameSource, FrameTag, NodeId, NodePolicy,
    Order, PhysMap, TraceEvent,
};

use crate::block;
use crate::depot::Depot;
use crate::direct::settle;
use crate::head::Head;
use crate::node::within;
use crate::platform::Platform;
use crate::raw::RawCache;
use crate::slab::Slab;
use crate::system::SlabSystem;

impl<P: Platform> SlabSystem<P> {
    /// A new slab; its first object goes to the caller, the next into this CPU's array where that is empty, the others to everybody.
    pub(crate) fn grow(
        &self,
        cache: &RawCache<P::Lock>,
        request: &FrameRequest,
    ) -> Result<NonNull<u8>, AllocError> {
        let slab = self.new_slab(cache, request)?;
        let object = object_at(cache, slab, 0);
        // SAFETY: a cache exists, so the system is ready.
        let pin = unsafe { self.platform_unchecked() }.cpu().pin();
        let node = cache.node(slab.node());
        let local = request.node == NodePolicy::Local;
        let asked = match request.node {
            NodePolicy::Local => Some(self.node_of_cpu(cache, pin.id())),
            NodePolicy::Preferred(id) => Some(cache.node(id)),
            _ => None,
        };
        if let Some(asked) = asked {
            asked.served_by(node.id, slab.objects());
        }
        let busy = self.head(cache, &pin).and_then(Head::enter);
        let depot = match &busy {
            Some(_) => Some(node.depot.lock()), // refill I1
            None => node.depot.try_lock(),
        };
        if let Some(mut depot) = depot {
            settle(cache, node, &mut depot);
            slab.release_from(1);
            depot.relist(slab);
            // The next calls are served without another look at the depot.
            if let Some(busy) = &busy
                && local
                && busy.head().capacity() > 0
                && busy.head().loaded_len() == 0
            {
                Self::fill_loaded(cache, busy, depot);
            }
        } else {
            slab.release_from_remote(1);
            node.pending.push(slab);
        }
        match busy {
            Some(busy) => busy.count_alloc(),
            None => {
                cache.direct_allocs.fetch_add(1, Ordering::Relaxed);
            }
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
        // Large slabs waste less; a fragmented machine still gets small ones. For more than the smallest nobody reclaims, takes from the reserves or
        // empties caches (Linux, mm/slub.c, allocate_slab).
        let least = geometry.least_order();
        let mut order = geometry.order();
        let (frame, memory) = loop {
            let mut request = FrameRequest {
                order,
                zeroed: false,
                ..*request
            };
            if order > least {
                request.context = request.context.min(Context::NoReclaim);
                request.reserve = false;
                request.optional = true;
            }
            match block::take_for(platform, &request, FrameTag::Slab) {
                Ok(block) => break block,
                Err(error) if order <= least => return Err(error),
                Err(_) => order = Order::new(order.get() - 1).unwrap_or(least),
            }
        };
        let slab = match self.descriptor_for(cache, frame) {
            Ok(slab) => slab,
            Err(error) => {
                // SAFETY: taken above, and nobody else knows it.
                unsafe { block::give(platform, frame, order) };
                return Err(error);
            }
        };
        let pages = geometry.pages().min(order.frames());
        block::trim(platform, frame, order, pages);
        let owner = ptr::from_ref(slab).expose_provenance() as u64;
        for offset in 0..pages {
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
        let objects = geometry.objects_in(pages);
        let base = memory.as_ptr().wrapping_add(cache.next_colour(pages));
        slab.set_memory(base, pages, objects);
        self.harden_slab(cache, slab);
        if let Some(hooks) = cache.setup.hooks {
            for index in 0..objects {
                // SAFETY: the object is memory of the cache's size and alignment that belongs to this call.
                unsafe {
                    let object = object_at(cache, slab, index).add(cache.front());
                    (hooks.construct)(hooks.context, object);
                }
            }
        }
        platform.trace(TraceEvent::Slab(frame, order, true));
        Ok(slab)
    }

    /// A descriptor without memory, which is the caller's, of the node that `frame` lies in.
    fn descriptor_for(&self, cache: &RawCache<P::Lock>, frame: Frame) -> Result<&Slab, AllocError> {
        let mut node = NodeId::ZERO;
        if cache.nodes > 1 {
            // SAFETY: a cache exists, so the system is ready.
            let frames = unsafe { self.platform_unchecked() }.frames();
            node = within(cache.nodes, frames.node_of_frame(frame));
        }
        let dead = self.with_depot(cache, cache.node(node), Depot::exhume);
        let slab = match dead.flatten() {
            Some(slab) => slab,
            None => self.new_descriptor(cache, node)?,
        };
        // SAFETY: descriptors live as long as their cache.
        Ok(unsafe { slab.as_ref() })
    }

    /// Gives a chain of a node's retired slabs back to the page source; `locked` runs its argument under the lock of its depot and says `true`, or `false`
    /// where it cannot.
    ///
    /// Answers how many frames went back.
    pub(crate) fn give_slabs_back(
        &self,
        cache: &RawCache<P::Lock>,
        chain: *mut Slab,
        locked: impl FnOnce(&mut dyn FnMut(&mut Depot)) -> bool,
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
                    unsafe { (hooks.destruct)(object_at(cache, slab, index).add(cache.front())) };
                }
            }
            let pages = slab.pages();
            let first = Frame::containing(platform.map().to_phys(slab.base()));
            slab.clear_memory();
            let order = Order::for_frames(pages).unwrap_or(Order::ZERO);
            platform.trace(TraceEvent::Slab(first, order, false));
            // SAFETY: the pages came from `new_slab`; every object of them was claimed.
            unsafe { block::give_pages(platform, first, pages) };
            frames += pages;
        }
        if !locked(&mut |depot| each_of(chain, |slab| depot.bury(slab))) {
            each_of(chain, |slab| {
                slab.give_up();
                cache.node(slab.node()).pending.push(slab);
            });
        }
        frames
    }
}

/// Calls `each` with every slab of a chain of retired ones, whose descriptors are then somebody else's.
fn each_of(chain: *mut Slab, mut each: impl FnMut(&Slab)) {
    let mut at = chain;
    // SAFETY: descriptors live as long as their cache; this one's is the holder of the chain until `each` has given it away (slab I5).
    while let Some(slab) = unsafe { at.as_ref() } {
        at = slab.next.get();
        each(slab);
    }
}

/// The address of object `index` of `slab`.
pub fn object_at<L: kmem_hal::RawLock>(cache: &RawCache<L>, slab: &Slab, index: usize) -> *mut u8 {
    slab.base().wrapping_add(index * cache.geometry().size())
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

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    extern crate alloc;
    use super::*;
    use crate::direct::settle;
    use crate::geometry::Geometry;
    use crate::policy::{Plain, Policy};
    use crate::raw::Setup;
    use crate::row::RowOf;
    use kmem_hal::Spin;

    /// A cache, and a chain of its `COUNT` slabs, retired and without memory.
    fn chain() -> (RawCache<Spin>, [&'static Slab; COUNT], *mut Slab) {
        let setup = Setup {
            name: "chain",
            geometry: Geometry::new(64, 8).unwrap(),
            stable: false,
            hooks: None,
            features: Plain::FEATURES,
        };
        let row = RowOf {
            heads: ptr::null(),
            nodes: 1,
            others: ptr::null(),
        };
        let cache = RawCache::new(setup, &row, 0, ptr::null());
        let slabs = core::array::from_fn(|_| {
            let slab: &Slab = alloc::boxed::Box::leak(alloc::boxed::Box::new(Slab::new(
                ptr::null_mut(),
                NodeId::ZERO,
                ptr::null_mut(),
            )));
            slab.set_memory(ptr::null_mut(), 1, 8);
            slab.release_from(0);
            cache.first.depot.lock().relist(slab);
            slab
        });
        let chain = retire(&mut cache.first.depot.lock(), 0);
        each_of(chain, Slab::clear_memory);
        (cache, slabs, chain)
    }

    const COUNT: usize = 4;

    /// A note that a context without the lock left late, and the lock's next holder, on another CPU.
    fn late_note(cache: &RawCache<Spin>, slab: &Slab) {
        cache.first.pending.push(slab);
        settle(cache, &cache.first, &mut cache.first.depot.lock());
    }

    fn buried(cache: &RawCache<Spin>) -> usize {
        let mut depot = cache.first.depot.lock();
        settle(cache, &cache.first, &mut depot);
        core::iter::from_fn(|| depot.exhume())
            .take(2 * COUNT)
            .count()
    }

    #[test]
    fn a_late_note_does_not_cut_the_chain_that_its_slab_is_in() {
        for late in 0..COUNT {
            let (cache, slabs, chain) = chain();
            late_note(&cache, slabs[late]);
            each_of(chain, |slab| cache.first.depot.lock().bury(slab));
            late_note(&cache, slabs[late]);
            assert_eq!(buried(&cache), COUNT, "late {late}");
        }
    }

    #[test]
    fn a_chain_is_buried_where_its_holder_cannot_have_the_lock() {
        for late in 0..COUNT {
            let (cache, slabs, chain) = chain();
            late_note(&cache, slabs[late]);
            each_of(chain, |slab| {
                slab.give_up();
                // Another note may come first, and what was given up be used again at once.
                if ptr::eq(slab, slabs[late]) {
                    late_note(&cache, slab);
                    assert!(cache.first.depot.lock().exhume().is_some());
                }
                cache.first.pending.push(slab);
            });
            assert_eq!(buried(&cache), COUNT - 1, "late {late}");
        }
    }
}
