//! /proc/pagetypeinfo: free blocks and page blocks by migrate type.

use core::fmt;

use kmem_hal::RawLock;

use super::Look;
use crate::zone::bits::{BLOCK_FRAMES, BLOCK_ORDER, ORDERS};
use crate::zone::kind::MigrateType;

/// Free blocks by type, printed as Linux's /proc/pagetypeinfo prints them (mm/vmstat.c).
///
/// Blocks that are being emptied are on no list, as in Linux they are on a list of their own: their free frames show
/// under `Isolate`.
pub struct PageTypeInfo<'a, L: 'static> {
    pub(super) look: Option<Look<'a, L>>,
}

impl<L: RawLock> fmt::Display for PageTypeInfo<'_, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(look) = self.look else {
            return Ok(());
        };
        writeln!(f, "Page block order: {BLOCK_ORDER}")?;
        writeln!(f, "Pages per block:  {BLOCK_FRAMES}")?;
        writeln!(f)?;
        write!(f, "{:<43} ", "Free pages count per migrate type at order")?;
        for order in 0..ORDERS {
            write!(f, "{order:>6} ")?;
        }
        writeln!(f)?;
        for zone in look.state.zones {
            for migrate in MigrateType::ALL {
                let counts = look.at(zone, |core| core.counts(Some(migrate)));
                write!(
                    f,
                    "Node {:>4}, zone {:>8}, type {migrate:>12} ",
                    zone.node, zone.kind
                )?;
                for count in counts {
                    write!(f, "{count:>6} ")?;
                }
                writeln!(f)?;
            }
        }
        writeln!(f)?;
        write!(f, "{:<23}", "Number of blocks type ")?;
        for migrate in MigrateType::ALL {
            write!(f, "{migrate:>12} ")?;
        }
        writeln!(f)?;
        for zone in look.state.zones {
            write!(f, "Node {}, zone {:>8} ", zone.node, zone.kind)?;
            for migrate in MigrateType::ALL {
                let count = look.at(zone, |core| {
                    (0..core.types.len())
                        .filter(|&block| core.type_of(block) == migrate)
                        .count()
                });
                write!(f, "{count:>12} ")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

impl<L: RawLock> fmt::Debug for PageTypeInfo<'_, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
