//! Objects from the host's heap: the simplest [`ObjectAlloc`], counted and checked.
//!
//! Invariant `I1`: an address is in `out` exactly while its object is in somebody's hands.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::collections::BTreeSet;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Mutex;

use kmem_hal::{AllocError, ObjectAlloc};

use crate::arena::{JUNK_FREED, JUNK_GIVEN};

/// Memory for objects of type `T` from the host's heap.
///
/// What is given is filled with junk; freeing twice, freeing a stranger, and leaving objects out are panics. Memory is not
/// type-stable: it goes back to the host when the allocator is dropped or the object is freed.
///
/// # Examples
///
/// ```
/// use kmem_hal::ObjectAlloc;
/// use kmem_testkit::HeapObjects;
///
/// let nodes = HeapObjects::<[u64; 32]>::new();
/// let node = nodes.alloc().unwrap();
/// assert_eq!(nodes.used(), 1);
/// // SAFETY: from this allocator, freed once.
/// unsafe { nodes.free(node) };
/// nodes.assert_all_free();
/// ```
#[derive(Debug)]
pub struct HeapObjects<T> {
    state: Mutex<State>,
    limit: usize,
    _type: PhantomData<fn() -> T>,
}

#[derive(Debug, Default)]
struct State {
    out: BTreeSet<usize>,
    most_used: usize,
    allocations: u64,
}

impl<T> HeapObjects<T> {
    const LAYOUT: Layout = {
        assert!(size_of::<T>() > 0, "objects of no size need no allocator");
        Layout::new::<T>()
    };

    /// An allocator without a limit.
    #[must_use]
    pub fn new() -> Self {
        Self::with_limit(usize::MAX)
    }

    /// An allocator that gives at most `limit` objects at a time.
    #[must_use]
    pub fn with_limit(limit: usize) -> Self {
        Self {
            state: Mutex::default(),
            limit,
            _type: PhantomData,
        }
    }

    /// Objects in somebody's hands.
    #[must_use]
    pub fn used(&self) -> usize {
        self.lock().out.len()
    }

    /// The most objects that were out at once.
    #[must_use]
    pub fn most_used(&self) -> usize {
        self.lock().most_used
    }

    /// Objects given so far.
    #[must_use]
    pub fn allocations(&self) -> u64 {
        self.lock().allocations
    }

    /// Panics unless every object is back.
    ///
    /// # Panics
    ///
    /// Where objects are out.
    #[track_caller]
    pub fn assert_all_free(&self) {
        let used = self.used();
        assert!(
            used == 0,
            "leaked {used} objects of {}",
            std::any::type_name::<T>()
        );
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl<T> Default for HeapObjects<T> {
    fn default() -> Self {
        Self::new()
    }
}

// SAFETY: B1: the host's heap gives memory to one owner; B2: the limit is checked first; B3: not promised.
unsafe impl<T> ObjectAlloc<T> for HeapObjects<T> {
    const TYPE_STABLE: bool = false;

    fn alloc(&self) -> Result<NonNull<T>, AllocError> {
        let mut state = self.lock();
        if state.out.len() >= self.limit {
            return Err(AllocError::OutOfMemory);
        }
        // SAFETY: the layout is not empty, which is checked when it is computed.
        let memory = unsafe { alloc(Self::LAYOUT) };
        let Some(object) = NonNull::new(memory) else {
            handle_alloc_error(Self::LAYOUT);
        };
        // SAFETY: fresh memory of this layout.
        unsafe { memory.write_bytes(JUNK_GIVEN, Self::LAYOUT.size()) };
        state.out.insert(memory.addr());
        state.allocations += 1;
        state.most_used = state.most_used.max(state.out.len());
        Ok(object.cast())
    }

    #[track_caller]
    unsafe fn free(&self, object: NonNull<T>) {
        let memory = object.cast::<u8>().as_ptr();
        assert!(
            self.lock().out.remove(&memory.addr()),
            "freed {memory:p} twice, or without owning it"
        );
        // SAFETY: it was out, so it is allocated with this layout; the caller gave it up.
        unsafe {
            memory.write_bytes(JUNK_FREED, Self::LAYOUT.size());
            dealloc(memory, Self::LAYOUT);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn limit_is_a_refusal_that_ends() {
        let objects = HeapObjects::<u64>::with_limit(1);
        let a = objects.alloc().unwrap();
        assert_eq!(objects.alloc(), Err(AllocError::OutOfMemory));
        // SAFETY: from this allocator, freed once.
        unsafe { objects.free(a) };
        let b = objects.alloc().unwrap();
        // SAFETY: as above.
        unsafe { objects.free(b) };
        objects.assert_all_free();
        assert_eq!((objects.most_used(), objects.allocations()), (1, 2));
    }

    #[test]
    #[should_panic(expected = "twice")]
    fn double_free_is_caught() {
        let objects = HeapObjects::<u64>::new();
        let a = objects.alloc().unwrap();
        // SAFETY: the second call is the misuse that must be caught.
        unsafe {
            objects.free(a);
            objects.free(a);
        }
    }
}
