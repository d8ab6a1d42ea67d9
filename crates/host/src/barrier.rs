//! A barrier whose readers pay nothing: the host makes every running thread of the process execute a fence.
//!
//! Source: membarrier(2), `MEMBARRIER_CMD_PRIVATE_EXPEDITED`.

use std::sync::atomic::{Ordering, compiler_fence, fence};

use kmem_hal::Barrier;

const QUERY: libc::c_int = 0;
const PRIVATE_EXPEDITED: libc::c_int = 1 << 3;
const REGISTER_PRIVATE_EXPEDITED: libc::c_int = 1 << 4;

fn membarrier(command: libc::c_int) -> libc::c_long {
    // SAFETY: no memory is passed.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) }
}

/// [`Barrier`] between the threads of this process, by `membarrier(2)`: for [`EpochGrace`](kmem_hal::EpochGrace).
///
/// Where the host does not have the call, both sides execute fences.
///
/// # Examples
///
/// ```
/// use kmem_hal::{EpochGrace, Grace, Spin};
/// use kmem_host::{HostBarrier, ThreadCpu};
///
/// let grace: EpochGrace<'_, _, Spin, 32, _> = EpochGrace::with_barrier(ThreadCpu, HostBarrier::new());
/// drop(grace.read());
/// grace.synchronize();
/// ```
#[derive(Clone, Copy, Debug)]
pub struct HostBarrier {
    expedited: bool,
}

impl HostBarrier {
    /// Registers the process with its host, as often as one likes.
    #[must_use]
    pub fn new() -> Self {
        let has = membarrier(QUERY) & libc::c_long::from(PRIVATE_EXPEDITED) != 0;
        Self {
            expedited: has && membarrier(REGISTER_PRIVATE_EXPEDITED) == 0,
        }
    }

    /// Whether readers are free of fences on this host.
    #[must_use]
    pub fn is_asymmetric(self) -> bool {
        self.expedited
    }
}

impl Default for HostBarrier {
    fn default() -> Self {
        Self::new()
    }
}

// SAFETY: B1: with the call, every thread of the process that runs executes a fence during `writer`, and one that does not run executed
// one when it stopped; without it both sides are sequentially consistent fences. B2: compiler fences at least.
unsafe impl Barrier for HostBarrier {
    #[inline]
    fn reader(&self) {
        if self.expedited {
            compiler_fence(Ordering::SeqCst);
        } else {
            fence(Ordering::SeqCst);
        }
    }

    fn writer(&self) {
        fence(Ordering::SeqCst);
        if self.expedited {
            let made = membarrier(PRIVATE_EXPEDITED);
            assert_eq!(made, 0, "the process is registered");
            fence(Ordering::SeqCst);
        }
    }
}
