//! How broken up free memory is: Linux's two indices, for each zone and order.
//!
//! ```text
//!   order      0     1     2     3 ..
//!   unusable 0.000 0.125 0.375 1.000     which part of free memory lies in blocks too small for the order
//!   extfrag -1.000 -1.000 0.731 0.998    a request would fail: towards 0 for lack of memory, towards 1 since it is broken up
//! ```
//!
//! Source: Linux mm/vmstat.c, `fill_contig_page_info`, `unusable_free_index`, `__fragmentation_index`, and the formats of
//! debugfs' extfrag/unusable_index and extfrag/extfrag_index; Documentation/admin-guide/sysctl/vm.rst, extfrag_threshold.

use core::fmt;

use kmem_hal::{Order, RawLock};

use super::{Look, ZoneFree};
use crate::zone::bits::ORDERS;

impl ZoneFree {
    /// How many blocks of `order` the free blocks contain. 0 above order 10.
    #[must_use]
    pub fn suitable(&self, order: Order) -> u64 {
        let order = order.index();
        let blocks = self.blocks.iter().enumerate().skip(order);
        blocks.map(|(own, count)| count << (own - order)).sum()
    }

    /// Which part of free memory a request of `order` cannot use, in thousandths: 0 all of it can be used, 1000 none of it.
    ///
    /// # Examples
    ///
    /// ```
    /// # use kmem_buddy::{BootMap, Buddy, Config, RegionKind, ZoneLimits};
    /// # use kmem_hal::{OffsetMap, Order, PhysAddr, SingleCpu};
    /// # let arena = Box::leak(vec![0u8; 5 << 20].into_boxed_slice());
    /// # let base = (arena.as_mut_ptr().expose_provenance() + 0xf_ffff) & !0xf_ffff;
    /// # let mut map: BootMap = BootMap::new();
    /// # map.push(PhysAddr::new(0), 4 << 20, RegionKind::Usable)?;
    /// # let (memory, cpu) = unsafe { (OffsetMap::new(base, 1024), SingleCpu::new()) };
    /// # let buddy: Buddy<_, _> = Buddy::new(memory, cpu);
    /// # // SAFETY: X1: nobody else uses the memory of the map.
    /// # unsafe { buddy.init(&mut map, &Config::new().limits(ZoneLimits::NORMAL_ONLY))? };
    /// let zone = buddy.zones().next().unwrap();
    /// assert_eq!(zone.unusable_index(Order::ZERO), 0);
    /// // Nothing is broken up yet, but no block of 4 MiB is whole: the allocator's own tables lie in it.
    /// assert_eq!(zone.unusable_index(Order::new(10).unwrap()), 1000);
    /// print!("{}{}", buddy.unusable_index(), buddy.fragmentation_index());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn unusable_index(&self, order: Order) -> u32 {
        let free = self.sum();
        if free == 0 {
            return 1000;
        }
        let usable = self.suitable(order) << order.index().min(ORDERS);
        ((free - usable) * 1000 / free) as u32
    }

    /// Why a request of `order` would fail, in thousandths: near 0 for lack of memory, near 1000 since memory is broken up;
    /// -1000 where it would not fail.
    ///
    /// Linux compacts rather than reclaims above its `extfrag_threshold` of 500.
    #[must_use]
    pub fn fragmentation_index(&self, order: Order) -> i32 {
        let blocks: u64 = self.blocks.iter().sum();
        if order > Order::MAX_BUDDY || blocks == 0 {
            return 0;
        }
        if self.suitable(order) > 0 {
            return -1000;
        }
        1000 - ((1000 + self.sum() * 1000 / order.frames()) / blocks) as i32
    }
}

/// Which part of free memory is unusable, by zone and order, printed as debugfs' extfrag/unusable_index.
pub struct UnusableIndex<'a, L: 'static> {
    pub(super) look: Option<Look<'a, L>>,
}

/// Why requests would fail, by zone and order, printed as debugfs' extfrag/extfrag_index.
pub struct FragmentationIndex<'a, L: 'static> {
    pub(super) look: Option<Look<'a, L>>,
}

fn lines<L: RawLock>(
    look: Option<Look<'_, L>>,
    f: &mut fmt::Formatter<'_>,
    mut one: impl FnMut(&mut fmt::Formatter<'_>, &ZoneFree, Order) -> fmt::Result,
) -> fmt::Result {
    for zone in look.into_iter().flat_map(Look::zones) {
        write!(f, "Node {}, zone {:>8} ", zone.node, zone.kind)?;
        for order in (0..ORDERS as u8).filter_map(Order::new) {
            one(f, &zone, order)?;
        }
        writeln!(f)?;
    }
    Ok(())
}

impl<L: RawLock> fmt::Display for UnusableIndex<'_, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        lines(self.look, f, |f, zone, order| {
            let index = zone.unusable_index(order);
            write!(f, "{}.{:03} ", index / 1000, index % 1000)
        })
    }
}

impl<L: RawLock> fmt::Display for FragmentationIndex<'_, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        lines(self.look, f, |f, zone, order| {
            let index = zone.fragmentation_index(order);
            write!(f, "{:>2}.{:03} ", index / 1000, (index % 1000).abs())
        })
    }
}

impl<L: RawLock> fmt::Debug for UnusableIndex<'_, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<L: RawLock> fmt::Debug for FragmentationIndex<'_, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
