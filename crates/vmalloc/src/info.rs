//! `/proc/vmallocinfo`, in Linux's format.
//!
//! ```text
//! 0xffffc90000000000-0xffffc90000005000   20480 kernel/src/fork.rs:41 pages=4 stack
//! 0xffffc90000005000-0xffffc90000007000    8192 kernel/src/apic.rs:17 phys=0x00000000fee00000 ioremap
//! 0xffffc90000007000-0xffffc90000009000    8192 unpurged vm_area
//! ```
//!
//! Range and size include the guard above, as in Linux, and guards below. Where Linux has the caller's symbol, a line has
//! the place in the source that asked.
//!
//! Source: Linux `mm/vmalloc.c` (`vmalloc_info_show`, `show_purge_info`).

use core::fmt;

use kmem_hal::{ObjectAlloc, PAGE_SIZE, Page, PageRange, RawLock};
use kmem_paging::Env;
use kmem_paging::format::Format;
use kmem_vma_tree::Node;

use crate::area::{Area, AreaKind, Stage};
use crate::vmalloc::Vmalloc;

/// Prints the areas, a line each; see [`Vmalloc::info`].
pub struct VmallocInfo<'v, 'a, F: Format, E: Env, N: ObjectAlloc<Node>, L: RawLock>(
    &'v Vmalloc<'a, F, E, N, L>,
);

/// An area in use; see [`Vmalloc::for_each`].
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct AreaInfo {
    /// The pages that it takes, guards included.
    pub range: PageRange,
    /// Its mapped pages.
    pub mapped: PageRange,
    /// What it is for.
    pub kind: AreaKind,
    /// The place in the source that asked for it, where it could be kept.
    pub caller: Option<&'static core::panic::Location<'static>>,
    /// Whether it was freed and waits for a purge.
    pub freed: bool,
}

impl AreaInfo {
    fn of(area: &Area) -> Option<Self> {
        (area.stage != Stage::Ready).then_some(Self {
            range: area.range,
            mapped: area.usable()?,
            kind: area.kind,
            caller: area.caller,
            freed: area.stage == Stage::Freed,
        })
    }
}

impl<'a, F: Format, E: Env, N: ObjectAlloc<Node>, L: RawLock> Vmalloc<'a, F, E, N, L> {
    /// The areas, as `/proc/vmallocinfo` prints them.
    #[must_use]
    pub fn info(&self) -> VmallocInfo<'_, 'a, F, E, N, L> {
        VmallocInfo(self)
    }

    /// Shows every area in ascending order, freed ones included. The lock is not held while `show` runs, so areas may come
    /// and go meanwhile.
    pub fn for_each(&self, mut show: impl FnMut(AreaInfo)) {
        let mut next = Some(self.window().first());
        while let Some(page) = next {
            let Some(area) = self.area_from(page) else {
                return;
            };
            next = area.range.last().checked_add(1);
            if let Some(area) = AreaInfo::of(&area) {
                show(area);
            }
        }
    }

    fn area_from(&self, page: Page) -> Option<Area> {
        let state = self.state.lock();
        let at = state.tree.first_at_or_after(page)?.value;
        Some(state.areas.get(at))
    }

    /// Areas in use and their mapped pages: what meminfo calls `VmallocUsed`.
    #[doc(alias = "VmallocUsed")]
    #[must_use]
    pub fn used(&self) -> (u64, u64) {
        let mut used = (0, 0);
        self.for_each(|area| {
            if !area.freed {
                used.0 += 1;
                used.1 += area.mapped.count();
            }
        });
        used
    }

    /// Frames that hold descriptions of areas and the batch of a purge, mapped nowhere: they go back when this is dropped.
    #[must_use]
    pub fn overhead_frames(&self) -> u64 {
        self.state.lock().areas.frame_count() + self.batch.frame_count()
    }

    /// The physical address of the first leaf that maps something at or after the area's first page.
    fn physical(&self, area: &AreaInfo) -> u64 {
        let first = area.mapped.first();
        self.table
            .query(first)
            .leaf()
            .and_then(|leaf| leaf.frame_of(first))
            .map_or(0, |frame| frame.number() * PAGE_SIZE)
    }
}

impl<F: Format, E: Env, N: ObjectAlloc<Node>, L: RawLock> fmt::Display
    for VmallocInfo<'_, '_, F, E, N, L>
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Linux pads addresses to a pointer's width: 8 digits where the window ends below 4 GiB.
        let narrow = self.0.window().last().number() < 1 << 20;
        let width = if narrow { 10 } else { 18 };
        let mut result = Ok(());
        self.0.for_each(|area| {
            if result.is_ok() {
                result = self.line(f, &area, width);
            }
        });
        result
    }
}

impl<F: Format, E: Env, N: ObjectAlloc<Node>, L: RawLock> VmallocInfo<'_, '_, F, E, N, L> {
    fn line(&self, f: &mut fmt::Formatter<'_>, area: &AreaInfo, width: usize) -> fmt::Result {
        // The end of an area at the top of the space is 2^64.
        let start = u128::from(area.range.start().as_u64());
        let bytes = u128::from(area.range.count()) * u128::from(PAGE_SIZE);
        write!(f, "{start:#0width$x}-{:#0width$x} {bytes:7}", start + bytes)?;
        if area.freed {
            return writeln!(f, " unpurged vm_area");
        }
        if let Some(caller) = area.caller {
            write!(f, " {}:{}", caller.file(), caller.line())?;
        }
        match area.kind {
            AreaKind::Ioremap => write!(f, " phys={:#018x}", self.0.physical(area))?,
            _ => write!(f, " pages={}", area.mapped.count())?,
        }
        writeln!(f, " {}", area.kind.as_str())
    }
}

impl<F: Format, E: Env, N: ObjectAlloc<Node>, L: RawLock> fmt::Debug
    for VmallocInfo<'_, '_, F, E, N, L>
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
