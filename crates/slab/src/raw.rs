//! A cache without its type: what kmalloc's classes and typed caches have in common.
//!
//! Invariants
//! - `I1`: the plain fields are written before the cache is published (its pointer stored with release) and never after.
//! - `I2`: `all` lists every descriptor the cache ever had; it only grows until the cache is destroyed.

use core::ptr;

use kmem_hal::sync::{AtomicPtr, AtomicU64, LocalPtr, LocalU32, Ordering};
use kmem_hal::{NodeId, RawLock};

use crate::geometry::Geometry;
use crate::harden::bytes_behind;
use crate::head::Row;
use crate::node::{CacheNode, NodeRow};
use crate::policy::Features;
use crate::row::RowOf;
use crate::slab::Slab;
use crate::users::Users;

/// What runs once for each object of a new slab, and before a slab goes back.
#[derive(Clone, Copy)]
pub struct Hooks {
    /// Builds an object in place; the context word is the cache's.
    pub construct: unsafe fn(context: *const (), object: *mut u8),
    /// Takes a built object apart.
    pub destruct: unsafe fn(object: *mut u8),
    /// Passed to `construct`.
    pub context: *const (),
}

// SAFETY: the context is the address of a function; it is passed on and never read through.
unsafe impl Send for Hooks {}
// SAFETY: as above.
unsafe impl Sync for Hooks {}

/// How a cache is set up.
#[derive(Clone, Copy)]
pub struct Setup {
    pub name: &'static str,
    pub geometry: Geometry,
    /// Slabs never go back while the cache lives (type-stable memory).
    pub stable: bool,
    pub hooks: Option<Hooks>,
    /// What the cache's policy switches on.
    pub features: Features,
}

/// A cache without its type.
#[repr(C, align(64))]
pub struct RawCache<L> {
    /// The row of head pages, and the cache's number among all (I1): modulo the number of columns that is the column in the pages of the row.
    pub row: *const Row,
    pub index: u32,
    pub setup: Setup,
    /// The system that the cache belongs to, to be compared only.
    pub owner: *const (),
    all: AtomicPtr<Slab>,
    /// How many nodes have depots (I1).
    pub nodes: u16,
    /// The row's places for the pages of the nodes behind the first (I1).
    pub others: *const NodeRow<L>,
    /// What the first node has of the cache, or all there is of it where there is one node.
    pub first: CacheNode<L>,
    /// The colour of the next slab, modulo the number of colours. Two CPUs that make slabs at once may use one twice.
    colour: LocalU32,
    /// Objects that went past the arrays of CPUs.
    pub direct_allocs: AtomicU64,
    pub direct_frees: AtomicU64,
    pub failures: AtomicU64,
    pub misuses: AtomicU64,
    /// Contexts that look at the cache by way of the registry.
    pub users: Users,
    /// The next cache of the registry, under its lock.
    pub next: LocalPtr<RawCache<L>>,
}

// SAFETY: the plain fields never change after publication (I1); everything else is atomic or behind a lock.
unsafe impl<L: Send + Sync> Sync for RawCache<L> {}
// SAFETY: as above.
unsafe impl<L: Send + Sync> Send for RawCache<L> {}

impl<L: RawLock> RawCache<L> {
    pub fn new(setup: Setup, row: &RowOf<L>, index: u32, owner: *const ()) -> Self {
        Self {
            row: row.heads,
            nodes: row.nodes,
            others: row.others,
            index,
            setup,
            owner,
            all: AtomicPtr::new(ptr::null_mut()),
            first: CacheNode::new(NodeId::ZERO, setup.geometry),
            colour: LocalU32::new(0),
            direct_allocs: AtomicU64::new(0),
            direct_frees: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            misuses: AtomicU64::new(0),
            users: Users::new(),
            next: LocalPtr::new(ptr::null_mut()),
        }
    }

    /// The geometry.
    #[inline]
    pub fn geometry(&self) -> Geometry {
        self.setup.geometry
    }

    /// Bytes of an object with so many in front of it: up to its record, or to the end of the slot.
    pub(crate) fn room(&self, front: usize) -> usize {
        let beside = front + bytes_behind(self.setup.features);
        self.geometry().size().saturating_sub(beside)
    }

    /// Bytes in front of each object of a typed cache.
    pub(crate) fn front(&self) -> usize {
        self.setup.features.front(self.geometry().align())
    }

    /// The pointer that descriptors carry.
    pub fn opaque(&self) -> *mut () {
        ptr::from_ref(self).cast_mut().cast()
    }

    /// Adds a new descriptor to the list of all.
    pub fn remember(&self, slab: &Slab) {
        let pointer = ptr::from_ref(slab).cast_mut();
        let mut head = self.all.load(Ordering::Relaxed);
        loop {
            slab.all_next.set(head);
            match self
                .all
                .compare_exchange(head, pointer, Ordering::Release, Ordering::Relaxed)
            {
                Ok(_) => return,
                Err(found) => head = found,
            }
        }
    }

    /// Calls `each` with every descriptor, live or dead, until it says `false`.
    pub fn for_each_slab(&self, mut each: impl FnMut(&Slab) -> bool) {
        let mut at = self.all.load(Ordering::Acquire);
        // SAFETY: descriptors live as long as the cache (I2), and the push released them.
        while let Some(slab) = unsafe { at.as_ref() } {
            at = slab.all_next.get();
            if !each(slab) {
                return;
            }
        }
    }

    /// Bytes in front of the first object of the next slab, which has so many pages.
    pub fn next_colour(&self, pages: u64) -> usize {
        let geometry = self.geometry();
        let (colours, turn) = (geometry.colours(pages), self.colour.get());
        self.colour.set(turn.wrapping_add(1));
        turn as usize % colours * geometry.colour_step()
    }

    /// How many empty slabs a node keeps before they go back.
    pub fn keep_empty(&self) -> usize {
        1
    }
}
