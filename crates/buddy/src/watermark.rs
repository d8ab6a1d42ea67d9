//! Watermarks and low-memory reserves: how much is kept, and for whom.
//!
//! ```text
//!   free   high   nobody is woken
//!          low    first tries stop here; reclaim is told; this and high are raised for a while when types mix
//!          min    ordinary requests stop here
//!          min/2  requests that cannot wait stop here
//!          0      requests with `reserve`
//! ```
//!
//! Source of the formulas: Linux mm/page_alloc.c, `__setup_per_zone_wmarks`, `calculate_min_free_kbytes` and
//! `setup_per_zone_lowmem_reserve`; Documentation/admin-guide/sysctl/vm.rst.

use kmem_hal::RawLock;
use kmem_hal::sync::Ordering;

use crate::state::State;
use crate::zone::Zone;
use crate::zone::kind::ZoneKind;

const KIB_PER_FRAME: u64 = 4;

fn is_low<L: RawLock + 'static>(zone: &Zone<L>) -> bool {
    zone.kind <= ZoneKind::Normal
}

/// Sets the marks and reserves of all zones from what they manage now.
pub(crate) fn set_up<L: RawLock + 'static>(state: &State<L>) {
    let low: u64 = state
        .zones
        .iter()
        .filter(|zone| is_low(zone))
        .map(Zone::managed)
        .sum();
    let all: u64 = state.zones.iter().map(Zone::managed).sum();
    let default = (low * KIB_PER_FRAME * 16).isqrt().clamp(128, 262_144);
    let kib = state.min_free_kib.unwrap_or(default);
    // More than there is keeps no more than all.
    let min_frames = (kib / KIB_PER_FRAME).min(all);
    // A machine without low memory shares out by all of it.
    let base = if low == 0 { all } else { low }.max(1);
    for zone in state.zones {
        let managed = zone.managed();
        let share = (u128::from(min_frames) * u128::from(managed) / u128::from(base)) as u64;
        let min = match (kib, is_low(zone)) {
            (0, _) => 0,
            (_, true) => share,
            (_, false) => (managed / 1024).clamp(32, 128).min(managed),
        };
        let step = if kib == 0 {
            0
        } else {
            (share / 4).max(managed / 1000)
        };
        for (mark, frames) in zone.marks.iter().zip([min, min + step, min + 2 * step]) {
            mark.store(frames, Ordering::Relaxed);
        }
        reserve(state, zone, kib == 0);
    }
}

/// Sets what `zone` keeps from requests that could also use higher zones of its node.
fn reserve<L: RawLock + 'static>(state: &State<L>, zone: &Zone<L>, off: bool) {
    let ratio = u64::from(state.reserve_ratio[zone.kind as usize]);
    let mut above = 0;
    for kind in ZoneKind::ALL {
        let reserve = if kind <= zone.kind {
            0
        } else {
            let upper = state
                .zones
                .iter()
                .filter(|upper| upper.node == zone.node && upper.kind == kind);
            above += upper.map(Zone::managed).sum::<u64>();
            if off {
                0
            } else {
                above.checked_div(ratio).unwrap_or(0)
            }
        };
        zone.protection[kind as usize].store(reserve, Ordering::Relaxed);
    }
}
