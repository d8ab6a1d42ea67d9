//! Overcommit: how much memory programs may be promised together.
//!
//! ```text
//!   mode 0  Guess   one call may ask for as much as the machine has         (the default; no sum is held against it)
//!   mode 1  Always  anything
//!   mode 2  Never   all promises together stay below the commit limit:
//!                   RAM * ratio / 100 + swap, less a reserve for the administrator and one for each user's other programs
//! ```
//!
//! Counted are private writable mappings without `MAP_NORESERVE` (which mode 2 ignores) and shared memory. The sum is
//! `Committed_AS`, the bound `CommitLimit` of `/proc/meminfo`.
//!
//! Invariants
//! - `I1`: the sum is the pages of all VMAs with `ACCOUNT`, of all spaces, plus the pages of shared memory that is counted.
//!
//! Source: Linux `Documentation/mm/overcommit-accounting.rst`, `mm/util.c` (`__vm_enough_memory`).

use core::fmt;
use core::ops::ControlFlow;

use kmem_hal::PAGE_SIZE;
use kmem_hal::sync::{AtomicU32, AtomicU64, Ordering};

use crate::env::Env;
use crate::errno::Errno;
use crate::flags::VmFlags;
use crate::mm::Mm;

/// How promises are held against what there is: `vm.overcommit_memory`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Overcommit {
    /// Refuse a single call that asks for more than all of memory and swap.
    #[default]
    Guess = 0,
    /// Refuse nothing.
    Always = 1,
    /// Refuse what passes the commit limit.
    Never = 2,
}

/// The mode, and what there is. All in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommitPolicy {
    /// The mode.
    pub mode: Overcommit,
    /// RAM that programs may have (`totalram_pages`).
    pub ram: u64,
    /// Swap space.
    pub swap: u64,
    /// How much of the RAM counts, in percent (`vm.overcommit_ratio`).
    pub ratio: u64,
    /// Kept for who administers the machine (`vm.admin_reserve_kbytes`).
    pub admin_reserve: u64,
    /// Kept from each program, so that a user can still end it (`vm.user_reserve_kbytes`).
    pub user_reserve: u64,
}

impl Default for CommitPolicy {
    /// Mode 0 without a bound, until the kernel says how much memory there is; the reserves are Linux's 8 MiB and 128 MiB.
    fn default() -> Self {
        Self {
            mode: Overcommit::Guess,
            ram: u64::MAX / 128,
            swap: 0,
            ratio: 50,
            admin_reserve: (8 << 20) / PAGE_SIZE,
            user_reserve: (128 << 20) / PAGE_SIZE,
        }
    }
}

impl CommitPolicy {
    /// How much mode 2 lets be promised: `CommitLimit`.
    #[doc(alias = "vm_commit_limit")]
    #[must_use]
    pub const fn limit(&self) -> u64 {
        (self.ram.saturating_mul(self.ratio) / 100).saturating_add(self.swap)
    }
}

/// The account of all spaces.
#[derive(Debug)]
pub(crate) struct Commit {
    committed: AtomicU64,
    mode: AtomicU32,
    ram: AtomicU64,
    swap: AtomicU64,
    ratio: AtomicU64,
    admin_reserve: AtomicU64,
    user_reserve: AtomicU64,
}

impl Commit {
    pub fn new() -> Self {
        let commit = Self {
            committed: AtomicU64::new(0),
            mode: AtomicU32::new(0),
            ram: AtomicU64::new(0),
            swap: AtomicU64::new(0),
            ratio: AtomicU64::new(0),
            admin_reserve: AtomicU64::new(0),
            user_reserve: AtomicU64::new(0),
        };
        commit.set(&CommitPolicy::default());
        commit
    }

    fn set(&self, policy: &CommitPolicy) {
        self.mode.store(policy.mode as u32, Ordering::Relaxed);
        for (to, from) in [
            (&self.ram, policy.ram),
            (&self.swap, policy.swap),
            (&self.ratio, policy.ratio),
            (&self.admin_reserve, policy.admin_reserve),
            (&self.user_reserve, policy.user_reserve),
        ] {
            to.store(from, Ordering::Relaxed);
        }
    }

    pub fn mode(&self) -> Overcommit {
        match self.mode.load(Ordering::Relaxed) {
            1 => Overcommit::Always,
            2 => Overcommit::Never,
            _ => Overcommit::Guess,
        }
    }

    pub fn policy(&self) -> CommitPolicy {
        let load = |field: &AtomicU64| field.load(Ordering::Relaxed);
        CommitPolicy {
            mode: self.mode(),
            ram: load(&self.ram),
            swap: load(&self.swap),
            ratio: load(&self.ratio),
            admin_reserve: load(&self.admin_reserve),
            user_reserve: load(&self.user_reserve),
        }
    }

    /// Promises `pages` more to a space of `total` pages, or answers ENOMEM and promises nothing.
    #[doc(alias = "security_vm_enough_memory_mm")]
    #[doc(alias = "__vm_enough_memory")]
    pub fn charge(&self, pages: u64, total: u64, admin: bool) -> Result<(), Errno> {
        if pages == 0 {
            return Ok(());
        }
        let now = self
            .committed
            .fetch_add(pages, Ordering::Relaxed)
            .wrapping_add(pages);
        let fits = match self.mode() {
            Overcommit::Always => true,
            Overcommit::Guess => {
                let policy = self.policy();
                pages <= policy.ram.saturating_add(policy.swap)
            }
            Overcommit::Never => {
                let policy = self.policy();
                let admin = if admin { 0 } else { policy.admin_reserve };
                let user = policy.user_reserve.min(total / 32);
                now < policy.limit().saturating_sub(admin).saturating_sub(user)
            }
        };
        if fits {
            return Ok(());
        }
        self.committed.fetch_sub(pages, Ordering::Relaxed);
        Err(Errno::ENOMEM)
    }

    /// Replaces a charge by another, unasked.
    pub fn adjust(&self, before: u64, after: u64) {
        if after > before {
            self.committed.fetch_add(after - before, Ordering::Relaxed);
        } else if before > after {
            self.committed.fetch_sub(before - after, Ordering::Relaxed);
        }
    }
}

impl<E: Env> Mm<'_, E> {
    /// Says how promises are held against what there is: `vm.overcommit_memory` and its companions.
    ///
    /// What was promised before stays promised.
    pub fn set_commit_policy(&self, policy: &CommitPolicy) {
        self.commit().set(policy);
    }

    /// How promises are held against what there is.
    #[must_use]
    pub fn commit_policy(&self) -> CommitPolicy {
        self.commit().policy()
    }

    /// Pages that are promised to all programs together: `Committed_AS`.
    #[doc(alias = "vm_committed_as")]
    #[must_use]
    pub fn committed(&self) -> u64 {
        self.commit().committed.load(Ordering::Relaxed)
    }

    /// Counts what is promised from scratch: the mappings of all spaces, and shared memory. Equal to [`committed`](Self::committed) while nobody
    /// is in a call.
    ///
    /// Context: no lock of a space held.
    #[must_use]
    pub fn recount_committed(&self) -> u64 {
        let mut pages = self.promised_to_objects();
        let spaces = self.registry().lock();
        let _ = self.for_each_space(
            &spaces,
            |_| true,
            |space| {
                let state = space.read();
                let accounted = state.vmas.iter();
                let accounted = accounted.filter(|vma| vma.flags.contains(VmFlags::ACCOUNT));
                pages += accounted.map(|vma| vma.range.count()).sum::<u64>();
                ControlFlow::Continue(())
            },
        );
        pages
    }

    /// The two lines of `/proc/meminfo` about promises.
    #[must_use]
    pub fn commit_lines(&self) -> CommitLines {
        CommitLines {
            limit: self.commit_policy().limit(),
            committed: self.committed(),
        }
    }
}

/// `CommitLimit` and `Committed_AS`, in pages; prints as in `/proc/meminfo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommitLines {
    /// `CommitLimit`.
    pub limit: u64,
    /// `Committed_AS`.
    pub committed: u64,
}

impl fmt::Display for CommitLines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kib = |pages: u64| pages.saturating_mul(PAGE_SIZE / 1024);
        writeln!(f, "CommitLimit:    {:>8} kB", kib(self.limit))?;
        writeln!(f, "Committed_AS:   {:>8} kB", kib(self.committed))
    }
}
