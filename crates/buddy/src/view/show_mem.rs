//! What a kernel prints when memory runs out: every zone against its marks, and its free blocks by order and type.
//!
//! Source: Linux mm/show_mem.c, `show_free_areas` and `__show_mem`; lines about what this crate knows nothing of (page cache,
//! slab, swap) are left out.

use core::fmt;

use kmem_hal::RawLock;

use super::{Look, MemInfo};
use crate::zone::bits::ORDERS;
use crate::zone::kind::{MigrateType, ZoneKind};

const KIB_PER_FRAME: u64 = 4;

/// The allocator's state in the form in which Linux logs it when an allocation fails.
#[doc(alias = "show_mem")]
#[doc(alias = "show_free_areas")]
pub struct ShowMem<'a, L: 'static> {
    pub(super) look: Option<Look<'a, L>>,
}

/// The letter of a type behind a count of blocks.
const fn letter(migrate: MigrateType) -> char {
    match migrate {
        MigrateType::Unmovable => 'U',
        MigrateType::Movable => 'M',
        MigrateType::Reclaimable => 'E',
        MigrateType::HighAtomic => 'H',
        MigrateType::Cma => 'C',
        MigrateType::Isolate => 'I',
    }
}

impl<L: RawLock> fmt::Display for ShowMem<'_, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(look) = self.look else {
            return writeln!(f, "Mem-Info: not initialised");
        };
        let zones = || look.zones();
        let info = MemInfo::of(zones());
        writeln!(f, "Mem-Info:")?;
        writeln!(
            f,
            "free:{} free_pcp:{} free_cma:{}",
            info.free, info.cached, info.cma_free
        )?;
        for zone in zones() {
            write!(f, "Node {} {}", zone.node, zone.kind)?;
            let [min, low, high] = zone.marks;
            for (name, frames) in [
                ("free", zone.free),
                ("min", min),
                ("low", low),
                ("high", high),
                ("present", zone.present),
                ("managed", zone.managed),
                ("free_pcp", zone.cached),
                ("free_cma", zone.free_cma),
            ] {
                write!(f, " {name}:{}kB", frames * KIB_PER_FRAME)?;
            }
            write!(f, "\nlowmem_reserve[]:")?;
            for frames in zone.protection {
                write!(f, " {frames}")?;
            }
            writeln!(f)?;
        }
        for zone in look.state.zones {
            let by_type = MigrateType::ALL
                .map(|migrate| (migrate, look.at(zone, |core| core.counts(Some(migrate)))));
            write!(f, "Node {} {}: ", zone.node, zone.kind)?;
            let mut total = 0;
            for order in 0..ORDERS {
                let count: u64 = by_type.iter().map(|(_, counts)| counts[order]).sum();
                total += count << order;
                write!(f, "{count}*{}kB ", KIB_PER_FRAME << order)?;
                if count > 0 {
                    f.write_str("(")?;
                    for (migrate, counts) in &by_type {
                        if counts[order] > 0 {
                            write!(f, "{}", letter(*migrate))?;
                        }
                    }
                    f.write_str(") ")?;
                }
            }
            writeln!(f, "= {}kB", total * KIB_PER_FRAME)?;
        }
        let (mut present, mut high) = (0, 0);
        for zone in zones() {
            present += zone.present;
            if zone.kind >= ZoneKind::HighMem {
                high += zone.present;
            }
        }
        writeln!(f, "{present} pages RAM")?;
        writeln!(f, "{high} pages HighMem/MovableOnly")?;
        writeln!(f, "{} pages reserved", present - info.total)?;
        writeln!(f, "{} pages cma reserved", info.cma_total)?;
        let lost = look.state.pending.lost();
        let misuse = look
            .state
            .misuse_count
            .load(kmem_hal::sync::Ordering::Relaxed);
        if lost + misuse > 0 {
            writeln!(f, "{lost} pages lost, {misuse} wrong frees")?;
        }
        Ok(())
    }
}

impl<L: RawLock> fmt::Debug for ShowMem<'_, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
