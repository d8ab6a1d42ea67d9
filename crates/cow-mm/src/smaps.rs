//! `/proc/PID/smaps` and `/proc/PID/smaps_rollup`, in Linux's format.
//!
//! Lines about what kmem has not (same-page merging, huge pages) are there and say 0, as on a Linux that does not use them.
//!
//! Source: proc_pid_smaps(5); Linux 6.18 `fs/proc/task_mmu.c` (`show_smap`, `show_smap_vma_flags`, `show_smaps_rollup`).

use core::fmt;

use kmem_hal::PAGE_SIZE;
use kmem_paging::format::Format;

use crate::env::Env;
use crate::flags::VmFlags;
use crate::maps::{line, padded};
use crate::space::AddressSpace;
use crate::usage::Resident;
use crate::vma::Vma;

/// Prints a space's mappings and what of them is in memory; see [`AddressSpace::smaps`].
pub struct Smaps<'s, 'm, E: Env>(&'s AddressSpace<'m, E>);

/// Prints what of a space is in memory, in sum; see [`AddressSpace::smaps_rollup`].
pub struct SmapsRollup<'s, 'm, E: Env>(&'s AddressSpace<'m, E>);

impl<'m, E: Env> AddressSpace<'m, E> {
    /// The mappings and what of them is in memory, as `/proc/PID/smaps` prints it; under the space's lock, as [`maps`](Self::maps).
    #[doc(alias = "show_smap")]
    #[must_use]
    pub fn smaps(&self) -> Smaps<'_, 'm, E> {
        Smaps(self)
    }

    /// What of the space is in memory, as `/proc/PID/smaps_rollup` prints it.
    #[must_use]
    pub fn smaps_rollup(&self) -> SmapsRollup<'_, 'm, E> {
        SmapsRollup(self)
    }
}

impl<E: Env> fmt::Display for Smaps<'_, '_, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let heap = self.0.heap();
        let mut outcome = Ok(());
        self.0.for_each_vma(|vma| {
            outcome = line(f, self.0, vma, heap).and_then(|()| mapping(f, self.0, vma));
            outcome.is_ok()
        });
        outcome
    }
}

impl<E: Env> fmt::Display for SmapsRollup<'_, '_, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut whole: Option<(u64, u64)> = None;
        self.0.for_each_vma(|vma| {
            let (start, end) = vma.bounds();
            whole = Some((whole.map_or(start, |(start, _)| start), end));
            true
        });
        let (start, end) = whole.unwrap_or((0, 0));
        let prefix = format_args!("{start:08x}-{end:08x} ---p 00000000 00:00 0 ");
        padded(f, prefix, format_args!("[rollup]"))?;
        amounts(f, &self.0.resident_in_all(), true)
    }
}

impl<E: Env> fmt::Debug for Smaps<'_, '_, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<E: Env> fmt::Debug for SmapsRollup<'_, '_, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn kib(f: &mut fmt::Formatter<'_>, name: &str, bytes: u64) -> fmt::Result {
    writeln!(f, "{name:<16}{:>8} kB", bytes / 1024)
}

fn mapping<E: Env>(
    f: &mut fmt::Formatter<'_>,
    space: &AddressSpace<'_, E>,
    vma: &Vma,
) -> fmt::Result {
    kib(f, "Size:", vma.range.count() * PAGE_SIZE)?;
    kib(f, "KernelPageSize:", PAGE_SIZE)?;
    kib(f, "MMUPageSize:", PAGE_SIZE)?;
    amounts(f, &space.resident(vma), false)?;
    writeln!(f, "{:<16}{:>8}", "THPeligible:", 0)?;
    if E::Format::PROTECTION_KEYS > 1 {
        writeln!(f, "{:<16}{:>8}", "ProtectionKey:", vma.flags.key())?;
    }
    f.write_str("VmFlags: ")?;
    for (flag, letters) in LETTERS {
        if vma.flags.contains(flag) {
            write!(f, "{letters} ")?;
        }
    }
    f.write_str("\n")
}

fn amounts(f: &mut fmt::Formatter<'_>, resident: &Resident, rollup: bool) -> fmt::Result {
    kib(f, "Rss:", resident.rss)?;
    kib(f, "Pss:", resident.pss())?;
    kib(f, "Pss_Dirty:", resident.pss_dirty())?;
    if rollup {
        kib(f, "Pss_Anon:", resident.pss_anon())?;
        kib(f, "Pss_File:", resident.pss_file())?;
        kib(f, "Pss_Shmem:", resident.pss_shmem())?;
    }
    for (name, bytes) in [
        ("Shared_Clean:", resident.shared.clean),
        ("Shared_Dirty:", resident.shared.dirty),
        ("Private_Clean:", resident.private.clean),
        ("Private_Dirty:", resident.private.dirty),
        ("Referenced:", resident.referenced),
        ("Anonymous:", resident.anonymous),
        ("KSM:", 0),
        ("LazyFree:", resident.lazy_free),
        ("AnonHugePages:", 0),
        ("ShmemPmdMapped:", 0),
        ("FilePmdMapped:", 0),
        ("Shared_Hugetlb:", 0),
        ("Private_Hugetlb:", 0),
        ("Swap:", resident.swap),
        ("SwapPss:", resident.swap_pss()),
        ("Locked:", resident.locked()),
    ] {
        kib(f, name, bytes)?;
    }
    Ok(())
}

/// The letters of `VmFlags`, in the order of Linux's bits.
const LETTERS: [(VmFlags, &str); 27] = [
    (VmFlags::READ, "rd"),
    (VmFlags::WRITE, "wr"),
    (VmFlags::EXEC, "ex"),
    (VmFlags::SHARED, "sh"),
    (VmFlags::MAYREAD, "mr"),
    (VmFlags::MAYWRITE, "mw"),
    (VmFlags::MAYEXEC, "me"),
    (VmFlags::MAYSHARE, "ms"),
    (VmFlags::GROWSDOWN, "gd"),
    (VmFlags::PFNMAP, "pf"),
    (VmFlags::MAYBE_GUARD, "gu"),
    (VmFlags::LOCKED, "lo"),
    (VmFlags::IO, "io"),
    (VmFlags::SEQ_READ, "sr"),
    (VmFlags::RAND_READ, "rr"),
    (VmFlags::DONTCOPY, "dc"),
    (VmFlags::DONTEXPAND, "de"),
    (VmFlags::LOCKONFAULT, "lf"),
    (VmFlags::ACCOUNT, "ac"),
    (VmFlags::NORESERVE, "nr"),
    (VmFlags::WIPEONFORK, "wf"),
    (VmFlags::DONTDUMP, "dd"),
    (VmFlags::HUGEPAGE, "hg"),
    (VmFlags::NOHUGEPAGE, "nh"),
    (VmFlags::MERGEABLE, "mg"),
    (VmFlags::DROPPABLE, "dp"),
    (VmFlags::SEALED, "sl"),
];
