//! Limits of one process, and whether a call stays within them.
//!
//! | limit | held against | a call beyond it answers |
//! |---|---|---|
//! | `address_space` | all mappings | ENOMEM; `brk` the old break |
//! | `data` | private writable memory | ENOMEM, also from mprotect; `brk` the old break |
//! | `stack` | the stack's mapping, when it grows | SIGSEGV |
//! | `locked` | locked mappings | mlock ENOMEM, 0: EPERM; mmap and mremap EAGAIN; a stack SIGSEGV |
//! | `mappings` | the number of VMAs, before one is made, moved or cut | ENOMEM; madvise and names EAGAIN |
//!
//! Source: getrlimit(2), mlock(2); Linux `mm/mmap.c` (`may_expand_vm`, `mlock_future_ok`), `mm/mlock.c` (`can_do_mlock`),
//! `mm/vma.c` (`split_vma`, `vms_gather_munmap_vmas`), `mm/mremap.c` (`prep_move_vma`), `mm/madvise.c` (`madvise_vma_behavior`).

use kmem_hal::{PAGE_SIZE, PageRange};

use crate::counters::is_data;
use crate::env::Env;
use crate::errno::Errno;
use crate::flags::VmFlags;
use crate::layout::MAX_MAP_COUNT;
use crate::space::State;
use crate::vma::Vma;

/// Limits that a process sets on itself (`setrlimit`), and what it may do beyond them. Bytes; `u64::MAX` is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// All mappings together (`RLIMIT_AS`).
    pub address_space: u64,
    /// Private writable memory (`RLIMIT_DATA`).
    pub data: u64,
    /// What `data` may be raised to: where `data` is 0, this limits in its place, as in Linux.
    pub data_hard: u64,
    /// The stack (`RLIMIT_STACK`): that of the [layout](crate::Layout::stack_limit) at first.
    pub stack: u64,
    /// Locked memory (`RLIMIT_MEMLOCK`).
    pub locked: u64,
    /// How many mappings there may be. Linux has one for all processes (`vm.max_map_count`).
    pub mappings: usize,
    /// May lock beyond `locked` (`CAP_IPC_LOCK`).
    pub may_lock_all: bool,
    /// May use what is kept for administrators (`CAP_SYS_ADMIN`): see [`CommitPolicy`](crate::CommitPolicy).
    pub is_admin: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            address_space: u64::MAX,
            data: u64::MAX,
            data_hard: u64::MAX,
            stack: 8 << 20,
            locked: u64::MAX,
            mappings: MAX_MAP_COUNT,
            may_lock_all: false,
            is_admin: false,
        }
    }
}

impl<E: Env> State<'_, E> {
    /// How many mappings more there may be.
    pub(crate) fn room(&self) -> usize {
        self.limits.mappings.saturating_sub(self.vmas.len())
    }

    /// Whether a range may be cleared: cutting the middle out of one mapping makes two, and all that is in it may go
    /// (`vms_gather_munmap_vmas`).
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`]; those of [`check_all_may_go`](Self::check_all_may_go).
    pub(crate) fn check_clear(&mut self, range: PageRange) -> Result<(), Errno> {
        let sticks_out =
            |vma: Vma| vma.range.first() < range.first() && vma.range.last() > range.last();
        match self.room() == 0 && self.vmas.get(range.first()).is_some_and(sticks_out) {
            true => Err(Errno::ENOMEM),
            false => self.check_all_may_go(range),
        }
    }

    /// Whether `pages` more pages of a mapping with `flags` stay within the limits on size.
    #[doc(alias = "may_expand_vm")]
    pub(crate) fn may_expand(&self, pages: u64, flags: VmFlags) -> bool {
        let (limits, counters) = (&self.limits, self.vmas.counters());
        if counters.total.saturating_add(pages) > limits.address_space / PAGE_SIZE {
            return false;
        }
        let data = counters.data.saturating_add(pages);
        !is_data(flags)
            || data <= limits.data / PAGE_SIZE
            || limits.data == 0 && data <= limits.data_hard / PAGE_SIZE
    }

    /// Whether the process may lock memory at all.
    #[doc(alias = "can_do_mlock")]
    pub(crate) fn may_lock(&self) -> bool {
        self.limits.locked != 0 || self.limits.may_lock_all
    }

    /// Whether `pages` more pages of a mapping with `flags` stay within the limit on locked memory.
    #[doc(alias = "mlock_future_ok")]
    pub(crate) fn may_lock_more(&self, pages: u64, flags: VmFlags) -> bool {
        !flags.contains(VmFlags::LOCKED)
            || self.limits.may_lock_all
            || self.vmas.counters().locked.saturating_add(pages) <= self.limits.locked / PAGE_SIZE
    }
}
