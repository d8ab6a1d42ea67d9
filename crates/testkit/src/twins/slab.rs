//! Bonwick's slab allocator: objects of one type, built once, in slabs that are empty, partial or full.
//!
//! ```text
//!  cache ──> full     [■■■■■■]
//!        ──> partial  [■■□■□□]   objects come from here first
//!        ──> empty    [□□□□□□]   and go back to the frame source from here
//!
//!  a slab, one block of frames:
//!  | colour | object | object | ... | object | rest |      free: numbers of the free objects, a stack
//! ```
//!
//! The two ideas of the paper: an object keeps its *constructed state* while it is free, so that a constructor runs once for
//! each object of a slab and not at each allocation; and slabs begin their objects at different offsets (*colours*), so
//! that the first objects of all slabs do not fight for the same cache lines.
//!
//! Invariants
//! - `I1`: an object's number is on its slab's stack exactly while nobody holds the object.
//! - `I2`: a slab is on the list that its number of free objects says.
//!
//! Source: Bonwick, "The Slab Allocator: An Object-Caching Kernel Memory Allocator", USENIX Summer 1994.

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kmem_hal::{
    AllocError, FrameRequest, FrameSink, FrameSource, ObjectAlloc, Order, OwnedFrame, PhysMap,
};

/// Bytes between two colours: a cache line.
const COLOUR: usize = 64;

#[derive(Debug)]
struct Slab {
    block: OwnedFrame,
    /// Address of object 0.
    base: NonNull<u8>,
    free: Vec<u32>,
}

// SAFETY: a slab owns its frames; whoever holds an object owns its bytes.
unsafe impl Send for Slab {}

#[derive(Debug, Default)]
struct Slabs {
    /// By the address of the slab's first byte: where an object's address leads.
    all: BTreeMap<usize, Slab>,
    /// The lists of the paper, by the same key.
    full: Vec<usize>,
    partial: Vec<usize>,
    empty: Vec<usize>,
    next_colour: usize,
}

/// A cache of objects of type `T`.
///
/// # Examples
///
/// ```
/// use kmem_hal::{ObjectAlloc, Order};
/// use kmem_testkit::{Arena, ArenaSource, twins::BonwickCache};
///
/// let arena = Arena::new(16);
/// let frames = ArenaSource::new(&arena);
/// // The constructor runs once for each object of a slab.
/// let inodes = BonwickCache::<[u64; 8], _, _>::new(&frames, &arena, Order::ZERO, || [7; 8]);
/// let inode = inodes.alloc().unwrap();
/// // SAFETY: the object is ours, and constructed.
/// assert_eq!(unsafe { inode.read() }, [7; 8]);
/// // SAFETY: from this cache, freed once.
/// unsafe { inodes.free(inode) };
/// assert_eq!((inodes.slabs(), inodes.reap(), inodes.slabs()), (1, 1, 0));
/// frames.assert_all_free();
/// ```
pub struct BonwickCache<'a, T, S: FrameSink, M> {
    source: &'a S,
    map: &'a M,
    order: Order,
    construct: fn() -> T,
    slabs: Mutex<Slabs>,
}

impl<T, S: FrameSink, M> std::fmt::Debug for BonwickCache<'_, T, S, M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BonwickCache<{}>", std::any::type_name::<T>())
    }
}

impl<'a, T, S: FrameSource + FrameSink, M: PhysMap> BonwickCache<'a, T, S, M> {
    /// A cache whose slabs are blocks of `order` frames of `source`.
    #[must_use]
    pub fn new(source: &'a S, map: &'a M, order: Order, construct: fn() -> T) -> Self {
        Self {
            source,
            map,
            order,
            construct,
            slabs: Mutex::default(),
        }
    }

    /// Objects in a slab.
    #[must_use]
    pub fn objects_per_slab(&self) -> usize {
        self.order.bytes() as usize / size_of::<T>().max(1)
    }

    /// Slabs that hold frames.
    #[must_use]
    pub fn slabs(&self) -> usize {
        self.lock().all.len()
    }

    /// Objects in somebody's hands.
    #[must_use]
    pub fn in_use(&self) -> usize {
        let per_slab = self.objects_per_slab();
        let slabs = self.lock();
        slabs
            .all
            .values()
            .map(|slab| per_slab - slab.free.len())
            .sum()
    }

    /// Gives the empty slabs back to the frame source; how many there were.
    #[doc(alias = "kmem_cache_shrink")]
    pub fn reap(&self) -> usize {
        let mut slabs = self.lock();
        let empty = std::mem::take(&mut slabs.empty);
        for key in &empty {
            if let Some(slab) = slabs.all.remove(key) {
                self.destroy(slab);
            }
        }
        empty.len()
    }

    fn grow(&self, slabs: &mut Slabs) -> Result<usize, AllocError> {
        let block = self.source.alloc(&FrameRequest::new(self.order))?;
        let start = self.map.to_ptr(block.first().start());
        let count = self.objects_per_slab();
        let spare = self.order.bytes() as usize - count * size_of::<T>();
        let step = COLOUR.max(align_of::<T>());
        let colours = spare / step + 1;
        let colour = slabs.next_colour % colours * step;
        slabs.next_colour += 1;
        // SAFETY: the colour leaves room for all objects.
        let base = unsafe { start.add(colour) };
        let Some(base) = NonNull::new(base) else {
            self.source.free(block);
            return Err(AllocError::OutOfMemory);
        };
        for index in 0..count {
            // SAFETY: inside the block, which is owned; aligned, since a page is and colours are.
            unsafe {
                base.cast::<T>().add(index).write((self.construct)());
            }
        }
        let key = start.addr();
        // The lowest number is on top of the stack.
        let free = (0..count as u32).rev().collect();
        slabs.all.insert(key, Slab { block, base, free });
        slabs.empty.push(key);
        Ok(key)
    }

    fn destroy(&self, slab: Slab) {
        for index in 0..self.objects_per_slab() {
            // SAFETY: the slab is empty, so every object is constructed and nobody's.
            unsafe { slab.base.cast::<T>().add(index).drop_in_place() };
        }
        self.source.free(slab.block);
    }
}

impl<T, S: FrameSink, M> BonwickCache<'_, T, S, M> {
    fn lock(&self) -> MutexGuard<'_, Slabs> {
        self.slabs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T, S: FrameSink, M> Drop for BonwickCache<'_, T, S, M> {
    fn drop(&mut self) {
        let slabs = std::mem::take(&mut *self.lock());
        for key in slabs.empty {
            // Objects of an empty slab are nobody's; those of others are leaked with it.
            if let Some(slab) = slabs.all.get(&key) {
                let (first, order) = (slab.block.first(), slab.block.order());
                // SAFETY: the map is dropped right after, and its blocks with it: one owner.
                self.source
                    .free(unsafe { OwnedFrame::from_raw(first, order) });
            }
        }
    }
}

// SAFETY: B1: an object's number is taken off its stack (`I1`); B2: growing fails before anything changes; B3: empty
// slabs go back to the frame source, so nothing is promised.
unsafe impl<T, S: FrameSource + FrameSink, M: PhysMap> ObjectAlloc<T>
    for BonwickCache<'_, T, S, M>
{
    const TYPE_STABLE: bool = false;

    fn alloc(&self) -> Result<NonNull<T>, AllocError> {
        if size_of::<T>() == 0 || self.objects_per_slab() == 0 {
            return Err(AllocError::Unsatisfiable);
        }
        let mut slabs = self.lock();
        let key = match slabs.partial.last().or(slabs.empty.last()) {
            Some(&key) => key,
            None => self.grow(&mut slabs)?,
        };
        let Some(slab) = slabs.all.get_mut(&key) else {
            return Err(AllocError::OutOfMemory);
        };
        let Some(index) = slab.free.pop() else {
            return Err(AllocError::OutOfMemory);
        };
        // SAFETY: inside the slab.
        let object = unsafe { slab.base.cast::<T>().add(index as usize) };
        let left = slab.free.len();
        slabs.file_under(key, left, self.objects_per_slab());
        Ok(object)
    }

    unsafe fn free(&self, object: NonNull<T>) {
        let address = object.addr().get();
        let mut slabs = self.lock();
        let Some((&key, slab)) = slabs.all.range_mut(..=address).next_back() else {
            panic!("{object:p} is not of this cache");
        };
        let offset = address - slab.base.addr().get();
        let index = (offset / size_of::<T>()) as u32;
        assert!(
            offset.is_multiple_of(size_of::<T>()) && !slab.free.contains(&index),
            "{object:p} is no object, or free already"
        );
        slab.free.push(index);
        let left = slab.free.len();
        slabs.file_under(key, left, self.objects_per_slab());
    }
}

impl Slabs {
    /// Moves a slab to the list that its number of free objects says (`I2`).
    fn file_under(&mut self, key: usize, free: usize, all: usize) {
        for list in [&mut self.full, &mut self.partial, &mut self.empty] {
            list.retain(|&other| other != key);
        }
        match free {
            0 => self.full.push(key),
            n if n == all => self.empty.push(key),
            _ => self.partial.push(key),
        }
    }
}
