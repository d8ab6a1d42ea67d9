//! Short memory: the slab system gives back what its caches hold beyond need, before the kernel's own hook is asked.
//!
//! ```text
//!   page-frame allocator ── Low ──────> kernel
//!                        ── Min ──────> slab, kernel
//!                        ── Refusing ─> slab; the kernel too where the slab had nothing, or more than a frame is wanted
//! ```
//!
//! Invariants
//! - `I1`: `system` is null, or the slab system that `shrink` was made for; that lives for ever.
//!
//! The hook is a call through a pointer, since the type of the slab system names that of the page-frame allocator, which names this one. It needs
//! the stack of [`SlabSystem::shrink`] beneath that of the allocation.

use core::fmt;
use core::ptr;

use kmem_hal::sync::{AtomicPtr, Ordering};
use kmem_hal::{FrameRequest, NodeId, Order, Pressure, PressureLevel};
use kmem_slab::{Platform, SlabSystem};

type Hook = unsafe fn(*const (), NodeId, PressureLevel, &FrameRequest) -> bool;

/// The hook of a [`Memory`](crate::Memory)'s page-frame allocator: the slab system's caches, then the kernel's own hook `P`.
pub struct Shrinkers<P> {
    system: AtomicPtr<()>,
    shrink: Hook,
    kernel: P,
}

/// Asks the slab system.
///
/// # Safety
///
/// `system` points to a `SlabSystem<S>`.
unsafe fn ask<S: Platform>(
    system: *const (),
    node: NodeId,
    level: PressureLevel,
    request: &FrameRequest,
) -> bool {
    // SAFETY: the caller's promise.
    unsafe { &*system.cast::<SlabSystem<S>>() }.pressure(node, level, request)
}

impl<P> Shrinkers<P> {
    kmem_hal::const_new! {
        /// The kernel's hook alone, until a slab system of this platform is [connected](Self::connect).
        pub(crate) fn of<S: Platform>(kernel: P) -> Self {
            Self {
                system: AtomicPtr::new(ptr::null_mut()),
                shrink: ask::<S>,
                kernel,
            }
        }
    }

    /// Asks `system` from now on.
    ///
    /// # Safety
    ///
    /// The hook was made for slab systems of this platform.
    pub(crate) unsafe fn connect<S: Platform>(&self, system: &'static SlabSystem<S>) {
        let system = ptr::from_ref(system).cast_mut().cast();
        self.system.store(system, Ordering::Release);
    }

    /// The kernel's own hook.
    pub const fn kernel(&self) -> &P {
        &self.kernel
    }
}

impl<P: Pressure> Pressure for Shrinkers<P> {
    fn pressure(&self, node: NodeId, level: PressureLevel, request: &FrameRequest) -> bool {
        let system = self.system.load(Ordering::Acquire);
        // SAFETY: I1.
        let freed = !system.is_null() && unsafe { (self.shrink)(system, node, level, request) };
        // Who is told of short memory reclaims for others too; who is asked before a refusal may have to kill for it.
        // What the slab system frees is single slabs, which may not make a block.
        if freed && level == PressureLevel::Refusing && request.order == Order::ZERO {
            return true;
        }
        self.kernel.pressure(node, level, request) || freed
    }
}

impl<P> fmt::Debug for Shrinkers<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let connected = !self.system.load(Ordering::Relaxed).is_null();
        write!(f, "Shrinkers(connected: {connected})")
    }
}
