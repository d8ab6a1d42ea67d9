//! /proc/buddyinfo: free blocks by order.

use core::fmt;

use kmem_hal::RawLock;

use super::figures;
use crate::state::State;

/// Free blocks by order, printed as Linux's /proc/buddyinfo prints them (mm/vmstat.c, `frag_show_print`).
pub struct BuddyInfo<L: 'static> {
    pub(super) state: Option<&'static State<L>>,
}

impl<L: RawLock> fmt::Display for BuddyInfo<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(state) = self.state else {
            return Ok(());
        };
        for (index, zone) in state.zones.iter().enumerate() {
            let zone = figures(state, index, zone);
            write!(f, "Node {}, zone {:>8} ", zone.node, zone.kind)?;
            for count in zone.blocks {
                write!(f, "{count:>6} ")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

impl<L: RawLock> fmt::Debug for BuddyInfo<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
