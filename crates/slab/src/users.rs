//! Who looks at a cache by way of the registry, and who takes a cache apart whose owner has let go.
//!
//! ```text
//!   0  <->  1  <->  2 ..      walks look at the cache
//!   |       |
//!   v       v                 its owner lets go
//!   L  <-  L+1  <- L+2 ..     no new walk comes; whoever brings the count to 0 has the cache alone
//!   |       ^
//!   v       |                 the registry could not be had: it is left to the next walk
//!   A  ->   A+1 <-> A+2 ..     whoever is the last makes it L, and has the cache alone
//! ```
//!
//! Invariants
//! - `U1`: while the word counts no walk and says `LEAVING`, one context has the cache to itself: its owner where it waits (`WAITING`), else the one
//!   that made it so. It sees what every walk wrote.
//! - `U2`: nobody waits who did not ask to: the last walk takes the cache apart where its owner came while walks looked at it.

use kmem_hal::sync::{AtomicU32, Ordering};

/// The owner has let go.
const LEAVING: u32 = 1 << 31;
/// The owner waits for the walks, and takes the cache apart itself.
const WAITING: u32 = 1 << 30;

/// The owner has gone, and the next walk takes the cache apart.
const ABANDONED: u32 = 1 << 29;

/// The count of a cache's walks, and whether its owner has let go.
#[derive(Debug)]
pub struct Users(AtomicU32);

impl Users {
    kmem_hal::const_new! {
        /// Nobody looks, and the owner is there.
        pub fn new() -> Self {
            Self(AtomicU32::new(0))
        }
    }

    /// Counts the caller as a walk; `false` where the owner has let go.
    #[must_use]
    pub fn enter(&self) -> bool {
        let one_more = |users: u32| (users & LEAVING == 0).then_some(users + 1);
        self.0
            .fetch_update(Ordering::Acquire, Ordering::Relaxed, one_more)
            .is_ok()
    }

    /// Counts a walk off; `true` where the owner has let go meanwhile and the caller now has the cache alone (`U1`).
    #[must_use]
    pub fn exit(&self) -> bool {
        // Changes only while nobody is counted.
        if self.0.load(Ordering::Relaxed) & ABANDONED == 0 {
            return self.0.fetch_sub(1, Ordering::AcqRel) == LEAVING + 1;
        }
        // In one step: between two, another walk might come, go and take the cache apart.
        let last = ABANDONED + 1;
        let one_less = |users| Some(if users == last { LEAVING } else { users - 1 });
        self.0
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, one_less)
            == Ok(last)
    }

    /// The owner lets go; `true` where it has the cache alone (`U1`), otherwise the last walk will.
    #[must_use]
    pub fn let_go(&self) -> bool {
        self.0.fetch_or(LEAVING, Ordering::AcqRel) == 0
    }

    /// The owner lets go: no new walk comes, and it has the cache alone (`U1`) afterwards. Waits for the walks that look.
    pub fn wait_and_let_go(&self) {
        self.0.fetch_or(LEAVING | WAITING, Ordering::AcqRel);
        while self.0.load(Ordering::Acquire) != LEAVING | WAITING {
            kmem_hal::sync::spin_loop();
        }
    }

    /// Whoever had the cache alone leaves it in the registry; walks may come again.
    pub fn stay(&self) {
        self.0.store(0, Ordering::Release);
    }

    /// As [`stay`](Self::stay), until a walk has looked: that one has it alone then.
    pub fn abandon(&self) {
        self.0.store(ABANDONED, Ordering::Release);
    }
}

impl Default for Users {
    fn default() -> Self {
        Self::new()
    }
}
