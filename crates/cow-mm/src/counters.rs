//! What a space remembers of its mappings, in pages, and what of it is charged against the commit limit.
//!
//! Every write of a VMA goes through [`Ledger`], so the sums are right after every step of a call; limits are checked against them
//! without a walk. [`AddressSpace::recount`](crate::AddressSpace::recount) counts the same from scratch.
//!
//! Invariants
//! - `I1`: each field is the sum over the VMAs in the set.
//! - `I2`: between calls, what is charged to the commit account is `accounted`.
//!
//! Source: Linux `mm/mmap.c` (`vm_stat_account`), `include/linux/mm_types.h` (`total_vm`, `locked_vm`, `data_vm`, `exec_vm`, `stack_vm`).

use crate::commit::Commit;
use crate::flags::VmFlags;
use crate::object::Ended;
use crate::vma::Vma;

/// Pages in mappings, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// In all mappings.
    #[doc(alias = "total_vm")]
    pub total: u64,
    /// In locked mappings.
    #[doc(alias = "locked_vm")]
    pub locked: u64,
    /// In private writable mappings other than stacks.
    #[doc(alias = "data_vm")]
    pub data: u64,
    /// In mappings that may be executed and not written.
    #[doc(alias = "exec_vm")]
    pub exec: u64,
    /// In stacks.
    #[doc(alias = "stack_vm")]
    pub stack: u64,
    /// In mappings that count against the commit limit (`VM_ACCOUNT`).
    pub accounted: u64,
}

impl Counters {
    /// Adds a mapping.
    pub fn add(&mut self, vma: &Vma) {
        self.each(vma, |counter, pages| *counter = counter.wrapping_add(pages));
    }

    /// Takes a mapping away that was added.
    pub fn remove(&mut self, vma: &Vma) {
        self.each(vma, |counter, pages| *counter = counter.wrapping_sub(pages));
    }

    fn each(&mut self, vma: &Vma, change: impl Fn(&mut u64, u64)) {
        let pages = vma.range.count();
        change(&mut self.total, pages);
        for (counter, counts) in [
            (&mut self.locked, vma.flags.contains(VmFlags::LOCKED)),
            (&mut self.data, is_data(vma.flags)),
            (&mut self.exec, is_exec(vma.flags)),
            (&mut self.stack, vma.flags.contains(VmFlags::GROWSDOWN)),
            (&mut self.accounted, vma.flags.contains(VmFlags::ACCOUNT)),
        ] {
            change(counter, if counts { pages } else { 0 });
        }
    }
}

/// The counters of a set of VMAs, and what the set has charged.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    pub counters: Counters,
    charged: u64,
    /// The largest `total` ever.
    pub peak: u64,
    /// One bit for each object ever mapped, by its number modulo 64.
    pub objects: u64,
    /// Objects whose last mapping went: whoever lets the space's lock go ends them.
    pub ended: Ended,
}

impl Ledger {
    /// Notes pages that were charged ahead of the change that needs them.
    pub fn note_charge(&mut self, pages: u64) {
        self.charged += pages;
    }

    /// Brings the charge to what the VMAs say (`I2`).
    pub fn settle(&mut self, commit: &Commit) {
        commit.adjust(self.charged, self.counters.accounted);
        self.charged = self.counters.accounted;
        self.peak = self.peak.max(self.counters.total);
    }
}

/// Private writable memory that is no stack: what `RLIMIT_DATA` limits (`is_data_mapping`).
pub(crate) fn is_data(flags: VmFlags) -> bool {
    let kind = VmFlags::WRITE | VmFlags::SHARED | VmFlags::GROWSDOWN;
    flags & kind == VmFlags::WRITE
}

/// Code (`is_exec_mapping`).
fn is_exec(flags: VmFlags) -> bool {
    let kind = VmFlags::EXEC | VmFlags::WRITE | VmFlags::GROWSDOWN;
    flags & kind == VmFlags::EXEC
}
