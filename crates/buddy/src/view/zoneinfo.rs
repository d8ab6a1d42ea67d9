//! /proc/zoneinfo: sizes, watermarks, reserves and CPU caches of each zone.

use core::fmt;

use kmem_hal::{CpuId, RawLock};

use super::{Look, figures};
use crate::zone::bits::{BLOCK_ORDER, ORDERS};

/// Everything about each zone, printed as Linux 6.18's /proc/zoneinfo prints it (mm/vmstat.c, `zoneinfo_show_print`).
///
/// Lines about what this crate knows nothing of (page cache, swap, NUMA hits) are left out.
pub struct ZoneInfo<'a, L: 'static> {
    pub(super) look: Option<Look<'a, L>>,
}

impl<L: RawLock> fmt::Display for ZoneInfo<'_, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(look) = self.look else {
            return Ok(());
        };
        for (index, zone) in look.state.zones.iter().enumerate() {
            let limit = zone.limits[0].load(kmem_hal::sync::Ordering::Relaxed);
            let boost = zone.boost();
            let zone = figures(look, index, zone);
            writeln!(f, "Node {}, zone {:>8}", zone.node, zone.kind)?;
            writeln!(f, "  pages free     {}", zone.free)?;
            writeln!(f, "        boost    {boost}")?;
            let [min, low, high] = zone.marks;
            let lines = [
                ("min", min),
                ("low", low),
                ("high", high),
                ("promo", high + (high - low)),
                ("spanned", zone.spanned),
                ("present", zone.present),
                ("managed", zone.managed),
                ("cma", zone.cma),
            ];
            for (name, frames) in lines {
                writeln!(f, "        {name:<8} {frames}")?;
            }
            write!(f, "        protection: (")?;
            for (at, frames) in zone.protection.iter().enumerate() {
                write!(f, "{}{frames}", if at == 0 { "" } else { ", " })?;
            }
            writeln!(f, ")")?;
            writeln!(f, "      {:<12} {}", "nr_free_pages", zone.free)?;
            let whole: u64 = (BLOCK_ORDER..ORDERS)
                .map(|order| zone.blocks[order] << order)
                .sum();
            for (name, frames) in [
                ("nr_free_pages_blocks", whole),
                ("nr_free_cma", zone.free_cma),
            ] {
                writeln!(f, "      {name:<12} {frames}")?;
            }
            writeln!(f, "  pagesets")?;
            for cpu in 0..look.state.cpus.len() as u32 {
                let Some(area) = look.state.area(CpuId::new(cpu)) else {
                    continue;
                };
                let count = super::cached_by(look.state, area, index);
                writeln!(f, "    cpu: {cpu}")?;
                writeln!(f, "              count:    {count}")?;
                writeln!(f, "              high:     {limit}")?;
                writeln!(f, "              batch:    {}", limit / 2)?;
                writeln!(f, "              high_min: {limit}")?;
                writeln!(f, "              high_max: {limit}")?;
            }
            writeln!(f, "  node_unreclaimable:  0")?;
            writeln!(f, "  start_pfn:           {}", zone.start)?;
        }
        Ok(())
    }
}

impl<L: RawLock> fmt::Debug for ZoneInfo<'_, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
