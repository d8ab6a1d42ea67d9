//! The lines about memory of `/proc/PID/status`, and `/proc/PID/statm`, in Linux's format.
//!
//! Source: proc_pid_status(5), proc_pid_statm(5); Linux `fs/proc/task_mmu.c` (`task_mem`, `task_statm`).

use core::fmt;

use kmem_hal::PAGE_SIZE;

use crate::env::Env;
use crate::space::AddressSpace;

/// What a process uses, in bytes; prints the lines of `/proc/PID/status` about memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// The most that was ever mapped (`VmPeak`).
    pub peak: u64,
    /// Mapped (`VmSize`).
    pub size: u64,
    /// In locked mappings (`VmLck`).
    pub locked: u64,
    /// The most that was ever found in memory (`VmHWM`).
    pub rss_peak: u64,
    /// Anonymous pages in memory (`RssAnon`).
    pub rss_anon: u64,
    /// Files' pages in memory (`RssFile`).
    pub rss_file: u64,
    /// Shared memory in memory (`RssShmem`).
    pub rss_shmem: u64,
    /// Private writable mappings (`VmData`).
    pub data: u64,
    /// Stacks (`VmStk`).
    pub stack: u64,
    /// The image's code (`VmExe`).
    pub code: u64,
    /// Other code (`VmLib`).
    pub libraries: u64,
    /// Page tables (`VmPTE`).
    pub tables: u64,
    /// Written out to swap (`VmSwap`).
    pub swap: u64,
}

impl Status {
    /// In memory (`VmRSS`).
    #[must_use]
    pub const fn rss(&self) -> u64 {
        self.rss_anon + self.rss_file + self.rss_shmem
    }

    /// The same numbers as the seven of `/proc/PID/statm`, in pages.
    #[must_use]
    pub const fn statm(&self) -> Statm {
        Statm([
            self.size / PAGE_SIZE,
            self.rss() / PAGE_SIZE,
            (self.rss_file + self.rss_shmem) / PAGE_SIZE,
            self.code / PAGE_SIZE,
            0,
            (self.data + self.stack) / PAGE_SIZE,
            0,
        ])
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, bytes) in [
            ("VmPeak", self.peak),
            ("VmSize", self.size),
            ("VmLck", self.locked),
            ("VmPin", 0),
            ("VmHWM", self.rss_peak),
            ("VmRSS", self.rss()),
            ("RssAnon", self.rss_anon),
            ("RssFile", self.rss_file),
            ("RssShmem", self.rss_shmem),
            ("VmData", self.data),
            ("VmStk", self.stack),
            ("VmExe", self.code),
            ("VmLib", self.libraries),
            ("VmPTE", self.tables),
            ("VmSwap", self.swap),
            ("HugetlbPages", 0),
        ] {
            writeln!(f, "{name}:\t{:>8} kB", bytes / 1024)?;
        }
        Ok(())
    }
}

/// Size, resident, shared, text, library (0), data, dirty (0): pages, on one line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statm(pub [u64; 7]);

impl fmt::Display for Statm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, pages) in self.0.iter().enumerate() {
            let space = if index == 0 { "" } else { " " };
            write!(f, "{space}{pages}")?;
        }
        f.write_str("\n")
    }
}

impl<E: Env> AddressSpace<'_, E> {
    /// What the process uses: looks at every page that is in memory.
    ///
    /// `rss_peak` is the most that any such look found.
    #[doc(alias = "task_mem")]
    #[must_use]
    pub fn status(&self) -> Status {
        let usage = self.recount();
        let bytes = |pages: u64| pages * PAGE_SIZE;
        let rss = bytes(usage.rss_anon + usage.rss_file + usage.rss_shmem);
        let (segments, peak, rss_peak) = {
            let mut state = self.lock();
            state.rss_peak = state.rss_peak.max(rss);
            (state.segments, state.vmas.peak(), state.rss_peak)
        };
        let exec = bytes(usage.exec);
        let code = segments.code_pages().min(exec);
        Status {
            peak: bytes(peak.max(usage.total)),
            size: bytes(usage.total),
            locked: bytes(usage.locked),
            rss_peak,
            rss_anon: bytes(usage.rss_anon),
            rss_file: bytes(usage.rss_file),
            rss_shmem: bytes(usage.rss_shmem),
            data: bytes(usage.data),
            stack: bytes(usage.stack),
            code,
            libraries: exec - code,
            tables: bytes(usage.tables),
            swap: bytes(self.swapped()),
        }
    }
}
