//! The `Allocator` traits: of the crate `allocator-api2` in its two current versions, and of `core` on nightly.
//!
//! `&SlabSystem` is an allocator for collections that take one. Growing and shrinking stay in place within a class; a size of zero costs nothing.

use core::alloc::Layout;
use core::ptr::NonNull;

use crate::kmalloc::Flags;
use crate::platform::Platform;
use crate::system::SlabSystem;

impl<P: Platform> SlabSystem<P> {
    /// Memory for the layout, as a slice of the bytes that may be used.
    fn slice(&self, layout: Layout, flags: Flags) -> Option<NonNull<[u8]>> {
        let memory = self.kmalloc_layout(layout, flags).ok()?;
        Some(NonNull::slice_from_raw_parts(memory, layout.size()))
    }

    /// The memory with another size; bytes beyond the old one are zero where that is asked for.
    ///
    /// # Safety
    ///
    /// `memory` came from this system with `old` and is not used afterwards where the call succeeds; the alignment stays the same.
    unsafe fn change_layout(
        &self,
        memory: NonNull<u8>,
        old: Layout,
        new: Layout,
        zeroed: bool,
    ) -> Option<NonNull<[u8]>> {
        let resized = if old.size() == 0 || new.size() == 0 || old.align() != new.align() {
            let fresh = self.kmalloc_layout(new, Flags::empty()).ok()?;
            // SAFETY: both are valid for the smaller size and differ; the caller gives the old one up.
            unsafe {
                let bytes = old.size().min(new.size());
                core::ptr::copy_nonoverlapping(memory.as_ptr(), fresh.as_ptr(), bytes);
                self.kfree_layout(memory, old);
            }
            fresh
        } else {
            // SAFETY: the caller's promise; neither size is 0.
            NonNull::new(unsafe { self.realloc(memory.as_ptr(), old, new.size()) })?
        };
        if zeroed && new.size() > old.size() {
            // SAFETY: `new.size()` bytes belong to this call.
            unsafe {
                resized
                    .add(old.size())
                    .write_bytes(0, new.size() - old.size());
            }
        }
        Some(NonNull::slice_from_raw_parts(resized, new.size()))
    }
}

#[allow(unused_macros, reason = "used by each feature")]
macro_rules! allocator {
    ($(#[$meta:meta])* $path:ident :: $($rest:ident)::*) => {
        $(#[$meta])*
        // SAFETY: memory is given once until it is given back, fits its layout, and stays where it is however the reference is copied.
        unsafe impl<P: Platform> $path::$($rest)::*::Allocator for &SlabSystem<P> {
            #[inline]
            fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>, $path::$($rest)::*::AllocError> {
                self.slice(layout, Flags::empty()).ok_or($path::$($rest)::*::AllocError)
            }

            #[inline]
            fn allocate_zeroed(&self, layout: Layout) -> Result<NonNull<[u8]>, $path::$($rest)::*::AllocError> {
                self.slice(layout, Flags::ZERO).ok_or($path::$($rest)::*::AllocError)
            }

            #[inline]
            unsafe fn deallocate(&self, memory: NonNull<u8>, layout: Layout) {
                // SAFETY: the caller's promise.
                unsafe { self.kfree_layout(memory, layout) }
            }

            unsafe fn grow(
                &self,
                memory: NonNull<u8>,
                old: Layout,
                new: Layout,
            ) -> Result<NonNull<[u8]>, $path::$($rest)::*::AllocError> {
                // SAFETY: the caller's promise.
                unsafe { self.change_layout(memory, old, new, false) }.ok_or($path::$($rest)::*::AllocError)
            }

            unsafe fn grow_zeroed(
                &self,
                memory: NonNull<u8>,
                old: Layout,
                new: Layout,
            ) -> Result<NonNull<[u8]>, $path::$($rest)::*::AllocError> {
                // SAFETY: the caller's promise.
                unsafe { self.change_layout(memory, old, new, true) }.ok_or($path::$($rest)::*::AllocError)
            }

            unsafe fn shrink(
                &self,
                memory: NonNull<u8>,
                old: Layout,
                new: Layout,
            ) -> Result<NonNull<[u8]>, $path::$($rest)::*::AllocError> {
                // SAFETY: the caller's promise.
                unsafe { self.change_layout(memory, old, new, false) }.ok_or($path::$($rest)::*::AllocError)
            }
        }
    };
}

#[cfg(feature = "allocator-api2-02")]
allocator!(allocator_api2_02::alloc);

#[cfg(feature = "allocator-api2-04")]
allocator!(allocator_api2_04::alloc);

#[cfg(feature = "nightly")]
allocator!(core::alloc);
