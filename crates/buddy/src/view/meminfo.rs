//! The page-frame allocator's lines of /proc/meminfo.

use core::fmt;

use super::ZoneFree;
use crate::zone::kind::ZoneKind;

/// Memory by frames; printed in kB as Linux's /proc/meminfo (fs/proc/meminfo.c).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemInfo {
    /// Frames of the allocator.
    pub total: u64,
    /// Free frames.
    pub free: u64,
    /// Frames in CPUs' caches.
    pub cached: u64,
    /// Free frames above all reserves.
    pub available: u64,
    /// Frames of HIGHMEM.
    pub high_total: u64,
    /// Free frames of HIGHMEM.
    pub high_free: u64,
    /// Frames in CMA areas.
    pub cma_total: u64,
    /// Free frames in CMA areas.
    pub cma_free: u64,
}

impl MemInfo {
    pub(super) fn of(zones: impl Iterator<Item = ZoneFree>) -> Self {
        let mut info = Self::default();
        let mut kept = 0;
        for zone in zones {
            info.total += zone.managed;
            info.free += zone.free;
            info.cached += zone.cached;
            info.cma_total += zone.cma;
            info.cma_free += zone.free_cma;
            if zone.kind == ZoneKind::HighMem {
                info.high_total += zone.managed;
                info.high_free += zone.free;
            }
            // Linux mm/page_alloc.c, `calculate_totalreserve_pages`.
            let most = zone.protection.iter().copied().max().unwrap_or(0);
            kept += (most + zone.marks[2]).min(zone.managed);
        }
        info.available = info.free.saturating_sub(kept);
        info
    }
}

impl fmt::Display for MemInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |name: &str, frames: u64| writeln!(f, "{name:<15} {:>8} kB", frames * 4);
        line("MemTotal:", self.total)?;
        line("MemFree:", self.free)?;
        line("MemAvailable:", self.available)?;
        if self.high_total > 0 {
            line("HighTotal:", self.high_total)?;
            line("HighFree:", self.high_free)?;
            line("LowTotal:", self.total - self.high_total)?;
            line("LowFree:", self.free - self.high_free)?;
        }
        if self.cma_total > 0 {
            line("CmaTotal:", self.cma_total)?;
            line("CmaFree:", self.cma_free)?;
        }
        Ok(())
    }
}
