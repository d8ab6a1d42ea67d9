//! Refusing honestly: a call says that memory is out only if there was an instant during it at which no fitting run was free.
//!
//! Looking at one zone after the other, and at arrays in between, proves nothing by itself: a run may always be where the look is
//! not. So whoever is about to refuse says so first, and looks until nothing came back meanwhile:
//!
//! ```text
//!   refusing += 1      from now on arrays are not filled: neither by frees nor by refills
//!   drain              the arrays of all CPUs are emptied and closed, each by its own CPU
//!   before = gives     frees go to the zones, and count
//!   look at all zones
//!   pool empty?        no block that a nested call left is on its way to a zone: one that left the pool before has been counted
//!   gives == before?   nothing came since before the first zone was looked at: at this instant no zone has a run
//!   refusing -= 1      arrays open again at the next call that finds them closed
//! ```
//!
//! Invariants
//! - `R1`: a free that gave its frames to a zone counts after that and before it returns, if a refusal is under way. So a free that
//!   the look missed and the counter does not show has not returned: it comes after the instant.
//! - `R2`: a CPU that was drained sees `refusing` from then on (`R3` of hal's `CpuCall`), and keeps its arrays empty.
//! - `R3`: a block counts before it leaves the pool of blocks that wait. So the pool is looked at before the counter, or a block
//!   that goes to its zone between the two would be in neither.
//!
//! Costs: nothing where nobody refuses but a load in calls that reach a zone. A refusal that is overtaken by frees each time gives up
//! after some looks and says [`OutOfMemoryHere`](kmem_hal::AllocError::OutOfMemoryHere).
//!
//! Source: the double collect of Afek et al., Atomic snapshots of shared memory, 1993.

use kmem_hal::sync::Ordering;
use kmem_hal::{Cpu, CpuCall, PhysMap, Pressure, RawLock};

use crate::buddy::Buddy;
use crate::cpus::Drained;
use crate::state::State;

/// Looks that frees may overtake.
const LOOKS: u32 = 16;

impl<L: RawLock + 'static> State<L> {
    /// Whether arrays must stay empty now.
    pub fn is_refusing(&self) -> bool {
        self.refusing.load(Ordering::Relaxed) > 0
    }

    /// Frames came to a zone (`R1`).
    pub fn gave(&self) {
        if self.is_refusing() {
            self.gives.fetch_add(1, Ordering::Release);
        }
    }
}

impl<M: PhysMap, C: Cpu, L: RawLock + 'static, K: CpuCall, P: Pressure> Buddy<M, C, L, K, P> {
    /// Empties all arrays and looks until `look` finds something or nothing came back meanwhile. `look` is told whose arrays are empty,
    /// and stay so until it returns.
    ///
    /// # Errors
    ///
    /// Whose arrays were empty throughout: with [`Drained::All`] there was an instant at which `look` could have found nothing.
    pub(crate) fn look_honestly<R>(
        &self,
        state: &State<L>,
        mut look: impl FnMut(Drained) -> Option<R>,
    ) -> Result<R, Drained> {
        state.refusing.fetch_add(1, Ordering::SeqCst);
        let drained = self.drain();
        let mut result = Err(Drained::Here);
        for _ in 0..LOOKS {
            let before = state.gives.load(Ordering::Acquire);
            if let Some(found) = look(drained) {
                result = Ok(found);
                break;
            }
            // What a nested call left to those it interrupted is in no zone (R3).
            let all = state.pending.is_empty();
            if state.gives.load(Ordering::Acquire) == before {
                result = Err(if all { drained } else { Drained::Here });
                break;
            }
        }
        state.refusing.fetch_sub(1, Ordering::SeqCst);
        result
    }
}
