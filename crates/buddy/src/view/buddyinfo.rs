//! /proc/buddyinfo: free blocks by order.

use core::fmt;

use kmem_hal::RawLock;

use super::Look;

/// Free blocks by order, printed as Linux's /proc/buddyinfo prints them (mm/vmstat.c, `frag_show_print`).
pub struct BuddyInfo<'a, L: 'static> {
    pub(super) look: Option<Look<'a, L>>,
}

impl<L: RawLock> fmt::Display for BuddyInfo<'_, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(look) = self.look else {
            return Ok(());
        };
        for zone in look.zones() {
            write!(f, "Node {}, zone {:>8} ", zone.node, zone.kind)?;
            for count in zone.blocks {
                write!(f, "{count:>6} ")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

impl<L: RawLock> fmt::Debug for BuddyInfo<'_, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
