//! vmalloc as the slab system's source of large memory, connected after both have started.
//!
//! ```text
//!   Memory::init_with(.., &LATE) ── frames work ── the kernel's table ── Vmalloc ── LATE.set(vmalloc)
//!                                                                                   from here on: kvmalloc
//! ```
//!
//! vmalloc needs frames, and frames start together with the slab system, which wants to know where large sizes come from. So it
//! is given a place in which vmalloc appears later; before that large sizes are refused as they are without vmalloc.

use core::fmt;
use core::marker::PhantomData;
use core::ptr::NonNull;

use kmem_hal::sync::{AtomicPtr, Ordering};
use kmem_hal::{AllocError, LargeSource};

/// A [`LargeSource`] that is set once, later.
///
/// The tests of this crate show the whole order: `tests/kvmalloc.rs`.
///
/// Whoever has the place has the source, so that it is shared between CPUs only where the source may be:
///
/// ```
/// fn shared<T: Sync + Send>() {}
/// shared::<kmem::LateLarge<kmem_hal::NoLarge>>();
/// ```
///
/// ```compile_fail,E0277
/// fn shared<T: Sync>() {}
/// shared::<kmem::LateLarge<core::cell::Cell<u8>>>();
/// ```
#[doc(alias = "kvmalloc")]
pub struct LateLarge<V: 'static>(AtomicPtr<V>, PhantomData<&'static V>);

impl<V> LateLarge<V> {
    kmem_hal::const_new! {
        /// A place without a source.
        pub fn new() -> Self {
            Self(AtomicPtr::new(core::ptr::null_mut()), PhantomData)
        }
    }

    /// Connects the source; what it gave is its own for ever, so it is set once. Gives `false` where it was set before.
    pub fn set(&self, source: &'static V) -> bool {
        let source = core::ptr::from_ref(source).cast_mut();
        self.0
            .compare_exchange(
                core::ptr::null_mut(),
                source,
                Ordering::Release,
                Ordering::Relaxed,
            )
            .is_ok()
    }

    fn get(&self) -> Option<&'static V> {
        // SAFETY: null, or a reference that `set` was given for ever.
        unsafe { self.0.load(Ordering::Acquire).as_ref() }
    }
}

impl<V> Default for LateLarge<V> {
    fn default() -> Self {
        Self::new()
    }
}

// SAFETY: V1 to V3: the source's, which is the same for ever; before it is there nothing is given.
unsafe impl<V: LargeSource> LargeSource for &'static LateLarge<V> {
    fn in_any_context(&self) -> bool {
        self.get().is_some_and(LargeSource::in_any_context)
    }

    fn alloc_large(&self, size: usize, align: usize) -> Result<NonNull<u8>, AllocError> {
        match self.get() {
            Some(source) => source.alloc_large(size, align),
            None => Err(AllocError::Unsatisfiable),
        }
    }

    unsafe fn free_large(&self, memory: NonNull<u8>) {
        if let Some(source) = self.get() {
            // SAFETY: the caller's promise is passed on.
            unsafe { source.free_large(memory) }
        }
    }

    fn contains(&self, address: *const u8) -> bool {
        self.get().is_some_and(|source| source.contains(address))
    }

    fn size_of(&self, memory: NonNull<u8>) -> Option<usize> {
        self.get()?.size_of(memory)
    }
}

impl<V> fmt::Debug for LateLarge<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LateLarge(set: {})", self.get().is_some())
    }
}
