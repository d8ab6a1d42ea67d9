//! `/proc/vmallocinfo`, in Linux's format as far as the facts are known.
//!
//! Source: Linux `mm/vmalloc.c` (`vmalloc_info_show`): range, size with guards, pages, physical address, kind.

use core::fmt;

use kmem_hal::{ObjectAlloc, PAGE_SIZE, RawLock};
use kmem_paging::Env;
use kmem_paging::format::Format;
use kmem_vma_tree::Node;

use crate::area::AreaKind;
use crate::vmalloc::Vmalloc;

/// Prints the areas in use, a line each; see [`Vmalloc::info`].
pub struct VmallocInfo<'v, 'a, F: Format, E: Env, N: ObjectAlloc<Node>, L: RawLock>(
    &'v Vmalloc<'a, F, E, N, L>,
);

impl<'a, F: Format, E: Env, N: ObjectAlloc<Node>, L: RawLock> Vmalloc<'a, F, E, N, L> {
    /// The areas in use, as `/proc/vmallocinfo` prints them.
    #[must_use]
    pub fn info(&self) -> VmallocInfo<'_, 'a, F, E, N, L> {
        VmallocInfo(self)
    }

    /// Areas in use and their mapped pages: what meminfo calls `VmallocUsed`.
    #[doc(alias = "VmallocUsed")]
    #[must_use]
    pub fn used(&self) -> (u64, u64) {
        let state = self.state.lock();
        let mut used = (0, 0);
        for entry in state
            .tree
            .iter()
            .filter(|entry| !state.lazy.contains(entry.range))
        {
            used.0 += 1;
            used.1 += entry
                .value
                .usable(entry.range)
                .map_or(0, |range| range.count());
        }
        used
    }
}

impl<F: Format, E: Env, N: ObjectAlloc<Node>, L: RawLock> fmt::Display
    for VmallocInfo<'_, '_, F, E, N, L>
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.0.state.lock();
        for entry in state
            .tree
            .iter()
            .filter(|entry| !state.lazy.contains(entry.range))
        {
            let start = entry.range.start().as_u64();
            let bytes = entry.range.count() * PAGE_SIZE;
            let Some(usable) = entry.value.usable(entry.range) else {
                continue;
            };
            write!(f, "{start:#018x}-{:#018x} {bytes:7}", start + bytes)?;
            match entry.value.kind() {
                AreaKind::Ioremap => {
                    let frame = self
                        .0
                        .table
                        .query(usable.first())
                        .leaf()
                        .map_or(0, |leaf| leaf.frame.number());
                    write!(f, " phys={:#018x}", frame * PAGE_SIZE)?;
                }
                _ => write!(f, " pages={}", usable.count())?,
            }
            writeln!(f, " {}", entry.value.kind().as_str())?;
        }
        Ok(())
    }
}

impl<F: Format, E: Env, N: ObjectAlloc<Node>, L: RawLock> fmt::Debug
    for VmallocInfo<'_, '_, F, E, N, L>
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
