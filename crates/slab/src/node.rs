//! What a memory node has of a cache: a depot, so that memory stays near the CPUs that use it.
//!
//! ```text
//!   CPU of node 0 ─> arrays ─┐                        ┌─ arrays <─ CPU of node 1
//!                            v                        v
//!                   CacheNode 0: depot        CacheNode 1: depot          one lock each
//!                   arrays and slabs          arrays and slabs
//!                   of node 0's memory        of node 1's memory
//! ```
//!
//! A CPU's own arrays hold what was freed there, wherever it came from: to look would cost every call. When an array leaves the CPU, its objects
//! are looked at and go to the node that they came from, as a whole array where they are all of one node, else to their slabs.
//! A CPU takes from its own node first: arrays, slabs, new slabs. Where the page source answers from another node, because that one is short, objects that
//! are free on other nodes come first, the nearest node's before others', and the page source is asked again now and then.
//! A call that prefers a node goes the same way from that node, one by one and past the CPU's arrays; one that insists on a node has no other.
//!
//! Invariants
//! - `N1`: a descriptor belongs to one node for ever, that of all memory it ever has; its links, its bits and its notes on the pending stack belong to that
//!   node's depot.
//! - `N2`: arrays of a depot hold objects of its node, those apart that are no objects of the cache (found when they are flushed).
//! - `N3`: one depot's lock at a time.
//!
//! Cost: on a machine with one node a branch in the slow paths; the node lies in the cache itself. With more, two loads an object when an
//! array leaves a CPU. The fast paths are the same.

use core::ptr::NonNull;

use kmem_hal::sync::{AtomicPtr, LocalU32, Ordering};
use kmem_hal::{Cpu, CpuId, FrameSource, Lock, NodeId, NodePolicy, RawLock};

use crate::array::Slot;
use crate::depot::Depot;
use crate::geometry::Geometry;
use crate::head::{Busy, COLUMNS};
use crate::pending::Pending;
use crate::platform::Platform;
use crate::raw::RawCache;
use crate::system::SlabSystem;

/// The most nodes that have depots of their own: a descriptor keeps the number in a byte. Memory and CPUs of nodes beyond count as the first's.
const MAX_NODES: u16 = 256;

/// How many arrays are borrowed from other nodes before the page source is asked for memory of this one again. One by one, as many objects are
/// borrowed as the slab has that it gave instead: no more slabs than the objects fill.
const BORROWS: u32 = 16;

/// What a node has of a cache.
#[doc(alias = "kmem_cache_node")]
#[doc(alias = "node_barn")]
#[repr(C, align(64))]
pub struct CacheNode<L> {
    pub id: NodeId,
    pub pending: Pending,
    pub depot: Lock<Depot, L>,
    /// Objects in full arrays of the depot, as its lock's holder last wrote: saves taking the lock in vain.
    pub held: LocalU32,
    /// Objects that the depot may hold now: grows while the cache streams, shrinks while it does not.
    pub limit: LocalU32,
    /// The page source last answered this node's CPUs from another: what is left to be borrowed before it is asked again.
    borrows: LocalU32,
}

/// The nodes behind the first, of the caches of one row.
pub type NodePage<L> = [CacheNode<L>; COLUMNS];

/// One page of nodes for each node behind the first.
pub type NodeRow<L> = AtomicPtr<NodePage<L>>;

impl<L: RawLock> CacheNode<L> {
    pub fn new(id: NodeId, geometry: Geometry) -> Self {
        Self {
            id,
            pending: Pending::new(),
            depot: Lock::new(Depot::new()),
            held: LocalU32::new(0),
            limit: LocalU32::new(geometry.array() as u32),
            borrows: LocalU32::new(0),
        }
    }

    /// The depot overflowed or ran dry, after `streak` events close to each other: it may keep more where the cache streams,
    /// and fewer where it does not.
    pub fn adapt_limit(&self, geometry: Geometry, streak: u32, slots: usize) {
        /// Events close to each other that make a stream.
        const STREAM: u32 = 3;
        /// The most bytes of objects that a depot ever keeps in full arrays.
        const DEPOT_BYTES: usize = 256 << 10;
        let (limit, slots) = (self.limit.get(), slots as u32);
        let least = geometry.array() as u32;
        let wanted = if streak >= STREAM {
            let most = (DEPOT_BYTES / geometry.size()).max(geometry.array());
            (limit + slots).min(most as u32)
        } else if streak == 0 {
            limit.saturating_sub(slots)
        } else {
            limit
        };
        self.limit.set(wanted.max(least));
    }

    /// A new slab of so many objects for a CPU of this node, or for a call that prefers it, came from `node`.
    pub fn served_by(&self, node: NodeId, objects: usize) {
        let away = BORROWS.max(objects as u32);
        self.borrows.set(if node == self.id { 0 } else { away });
    }

    /// Whether other nodes' objects come before a new slab now; counts down by `cost`.
    fn borrows(&self, cost: u32) -> bool {
        let left = self.borrows.get();
        self.borrows.set(left.saturating_sub(cost));
        left > 0
    }
}

/// How many nodes get depots of their own.
pub fn count<P: Platform>(platform: &P) -> u16 {
    platform.frames().node_count().clamp(1, MAX_NODES)
}

impl<L: RawLock> RawCache<L> {
    /// What a node has of the cache.
    #[inline]
    pub fn node(&self, id: NodeId) -> &CacheNode<L> {
        if self.nodes == 1 || id == NodeId::ZERO {
            return &self.first;
        }
        debug_assert!(id.get() < self.nodes);
        // SAFETY: a row has a place for every node behind the first, whose page was made with the row and lives as long as the system; the
        // cache's column of it was written before the cache was published (raw I1).
        unsafe {
            let page = (*self.others.add(id.index() - 1)).load(Ordering::Acquire);
            &(*page)[self.index as usize % COLUMNS]
        }
    }

    /// All nodes of the cache.
    pub fn nodes(&self) -> impl Iterator<Item = &CacheNode<L>> {
        (0..self.nodes).map(|id| self.node(NodeId::new(id)))
    }

    /// Writes the nodes behind the first of a cache that is about to be published.
    ///
    /// # Safety
    ///
    /// The cache's column belongs to the caller; nobody looks at it yet.
    pub unsafe fn write_nodes(&self) {
        for id in 1..self.nodes {
            // SAFETY: as in `node`: the page is memory for 64 of them, and nobody else's in this column by contract.
            unsafe {
                let page = (*self.others.add(usize::from(id) - 1)).load(Ordering::Acquire);
                let place = page
                    .cast::<CacheNode<L>>()
                    .add(self.index as usize % COLUMNS);
                place.write(CacheNode::new(NodeId::new(id), self.geometry()));
            }
        }
    }
}

impl<P: Platform> SlabSystem<P> {
    /// What the node of a CPU has of the cache.
    #[inline]
    pub(crate) fn node_of_cpu<'c>(
        &self,
        cache: &'c RawCache<P::Lock>,
        cpu: CpuId,
    ) -> &'c CacheNode<P::Lock> {
        if cache.nodes == 1 {
            return &cache.first;
        }
        // SAFETY: a cache exists, so the system is ready.
        let platform = unsafe { self.platform_unchecked() };
        cache.node(within(cache.nodes, platform.frames().node_of_cpu(cpu)))
    }

    /// As [`node_of_cpu`](Self::node_of_cpu), of the CPU that runs this: which may be another at once, where nobody has pinned it.
    pub(crate) fn node_here<'c>(&self, cache: &'c RawCache<P::Lock>) -> &'c CacheNode<P::Lock> {
        // SAFETY: a cache exists, so the system is ready.
        let pin = unsafe { self.platform_unchecked() }.cpu().pin();
        self.node_of_cpu(cache, pin.id())
    }

    /// The node of a request for an object, where it names one that has a depot: [`NodePolicy::Interleave`] names each in turn. One that is preferred
    /// and has none says nothing of where objects lie: as [`NodePolicy::Local`].
    pub(crate) fn depot_policy(&self, node: NodePolicy) -> NodePolicy {
        let nodes = self.nodes();
        match node {
            NodePolicy::Interleave => {
                let turn = self.turns.fetch_add(1, Ordering::Relaxed);
                NodePolicy::Preferred(NodeId::new((turn % u64::from(nodes)) as u16))
            }
            NodePolicy::Preferred(id) if id.get() >= nodes => NodePolicy::Local,
            named => named,
        }
    }

    /// An object that another node has than the one that a request is for, where memory of that was not to be had lately, or `now` is.
    #[inline]
    pub(crate) fn borrow(
        &self,
        cache: &RawCache<P::Lock>,
        node: NodePolicy,
        now: bool,
    ) -> Option<NonNull<u8>> {
        if cache.nodes == 1 && node == NodePolicy::Local {
            return None;
        }
        match node {
            NodePolicy::Strict(_) => None,
            NodePolicy::Preferred(id) => self.borrow_past_arrays(cache, cache.node(id), now),
            _ => {
                let home = self.node_here(cache);
                // An array of objects for each: as many as a slab has would be borrowed for too long.
                let cost = cache.geometry().objects().div_ceil(BORROWS as usize);
                (now || home.borrows(cost as u32)).then(|| {
                    self.borrow_by_distance(cache, home, |node| self.alloc_from(cache, node))
                })?
            }
        }
    }

    /// As [`borrow`](Self::borrow) for a node that is preferred; in need, what this CPU and its node hold is as good as any.
    fn borrow_past_arrays(
        &self,
        cache: &RawCache<P::Lock>,
        home: &CacheNode<P::Lock>,
        now: bool,
    ) -> Option<NonNull<u8>> {
        if now {
            // SAFETY: the row of a cache of this system.
            let loaded = unsafe { self.pop_local(cache.row, cache.index) };
            if let Some(object) = loaded.or_else(|| self.alloc_cached(cache)) {
                return Some(object);
            }
        }
        (now || home.borrows(1)).then(|| {
            self.borrow_by_distance(cache, home, |node| self.alloc_from_depot(cache, node))
        })?
    }

    /// What `take` gets from the nearest other node than `home` that has an object.
    #[cold]
    fn borrow_by_distance<'c>(
        &self,
        cache: &'c RawCache<P::Lock>,
        home: &CacheNode<P::Lock>,
        take: impl Fn(&'c CacheNode<P::Lock>) -> Option<NonNull<u8>>,
    ) -> Option<NonNull<u8>> {
        // SAFETY: a cache exists, so the system is ready.
        let frames = unsafe { self.platform_unchecked() }.frames();
        let nodes = cache.nodes;
        // Nodes at equal distance in turn from here, so that they share the load.
        let key = |node: u16| {
            let turn = (node + nodes - home.id.get()) % nodes;
            (frames.node_distance(home.id, NodeId::new(node)), turn)
        };
        let mut last = None;
        loop {
            let next = (0..nodes)
                .filter(|&node| node != home.id.get() && Some(key(node)) > last)
                .min_by_key(|&node| key(node))?;
            last = Some(key(next));
            if let Some(object) = take(cache.node(NodeId::new(next))) {
                return Some(object);
            }
        }
    }

    /// Sends those objects of the spare array home that the depot at which it will be exchanged has no business with; answers that depot's node.
    ///
    /// It is the CPU's own where half of the objects or more come from there, and otherwise that of the first which does not. The busy flag is set.
    #[inline]
    pub(crate) fn send_home<'c>(
        &self,
        cache: &'c RawCache<P::Lock>,
        own: &'c CacheNode<P::Lock>,
        busy: &Busy<'_>,
    ) -> &'c CacheNode<P::Lock> {
        if cache.nodes == 1 {
            return own;
        }
        self.sort_spare(cache, own, busy)
    }

    #[cold]
    fn sort_spare<'c>(
        &self,
        cache: &'c RawCache<P::Lock>,
        own: &'c CacheNode<P::Lock>,
        busy: &Busy<'_>,
    ) -> &'c CacheNode<P::Lock> {
        // SAFETY: a cache exists, so the system is ready.
        let platform = unsafe { self.platform_unchecked() };
        let (slots, n) = (busy.spare_slots(), busy.head().spare_len());
        if slots.is_null() {
            return own;
        }
        // SAFETY: the first `n` slots hold objects, and nobody else looks into the head's array while the flag is set.
        let objects = unsafe { core::slice::from_raw_parts_mut(slots, n) };
        // What is no object of the cache stays where it is: the flush tells.
        let node_of = |&object: &Slot| match Self::slab_of(platform, object) {
            Some(slab) if slab.cache() == cache.opaque() => slab.node(),
            _ => own.id,
        };
        let id = node_of_most(objects.iter().map(node_of), own.id);
        let kept = partition(objects, |object| node_of(object) == id);
        let foreign = &mut objects[kept..];
        busy.set_spare_len(kept);
        busy.add_given(foreign.len());
        // SAFETY: the slots hold pointers that left the array; the busy flag is set.
        unsafe { self.flush(cache, foreign.as_mut_ptr(), foreign.len()) };
        cache.node(id)
    }
}

/// `own` where at least half of the nodes are, else the first that is not.
fn node_of_most(nodes: impl Iterator<Item = NodeId>, own: NodeId) -> NodeId {
    let (mut ours, mut others, mut first) = (0, 0, own);
    for node in nodes {
        if node == own {
            ours += 1;
        } else {
            if others == 0 {
                first = node;
            }
            others += 1;
        }
    }
    if ours >= others { own } else { first }
}

/// The node itself where it has a depot of its own, else the first.
pub fn within(nodes: u16, node: NodeId) -> NodeId {
    if node.get() < nodes {
        node
    } else {
        NodeId::ZERO
    }
}

/// Moves the objects of which `first` holds to the front; answers how many.
pub fn partition<T>(objects: &mut [T], mut first: impl FnMut(&T) -> bool) -> usize {
    let mut count = 0;
    for at in 0..objects.len() {
        if first(&objects[at]) {
            objects.swap(count, at);
            count += 1;
        }
    }
    count
}
