//! Why there is no memory, and who holds what, in words.

use core::fmt;

use kmem_hal::{Cpu, PhysMap, RawLock};

use crate::memory::Memory;

/// The state of a heap; print it.
pub struct Explanation<'h, M, C, L>
where
    M: PhysMap + 'static,
    C: Cpu + 'static,
    L: RawLock + 'static,
{
    memory: &'h Memory<M, C, L>,
    refusals: u64,
    size: usize,
    align: usize,
}

/// Caches that are named one by one.
const NAMED: usize = 5;

impl<'h, M: PhysMap, C: Cpu, L: RawLock> Explanation<'h, M, C, L> {
    pub(crate) fn new(
        memory: &'h Memory<M, C, L>,
        refusals: u64,
        size: usize,
        align: usize,
    ) -> Self {
        Self {
            memory,
            refusals,
            size,
            align,
        }
    }

    /// How many allocations were refused so far.
    #[must_use]
    pub fn refusals(&self) -> u64 {
        self.refusals
    }

    fn refusal(&self, f: &mut fmt::Formatter<'_>, free: u64) -> fmt::Result {
        if self.refusals == 0 {
            return writeln!(f, "No allocation was refused so far.");
        }
        let frames = (self.size as u64).div_ceil(4096).max(1).next_power_of_two();
        write!(
            f,
            "{} allocations were refused; the last asked for {} bytes aligned to {}",
            self.refusals, self.size, self.align
        )?;
        if self.size as u64 > 4 << 20 {
            writeln!(
                f,
                ": more than the largest block of 4 MiB, and there is no source of larger sizes (vmalloc)."
            )
        } else if free < frames {
            writeln!(f, ": memory is exhausted.")
        } else {
            writeln!(
                f,
                ": {frames} frames in one piece, which no zone could spare (its blocks are below)."
            )
        }
    }
}

impl<M: PhysMap, C: Cpu, L: RawLock> fmt::Display for Explanation<'_, M, C, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let frames = self.memory.frames();
        let slab = self.memory.slab();
        if !frames.is_initialised() {
            return writeln!(
                f,
                "The heap is not initialised: call init with the memory map before the first allocation ({} were \
                 refused so far).",
                self.refusals
            );
        }
        if !slab.is_ready() {
            return writeln!(
                f,
                "The page-frame allocator works, the slab system does not: it found no memory for its first page."
            );
        }
        let info = frames.mem_info();
        self.refusal(f, info.free)?;
        let allocated = info.total.saturating_sub(info.free + info.cached);
        writeln!(
            f,
            "Of {} KiB, {} are free, {} in CPUs' caches of frames, {} allocated:",
            info.total * 4,
            info.free * 4,
            info.cached * 4,
            allocated * 4
        )?;
        let totals = slab.totals();
        let known = totals.slab_frames + totals.page_frames + totals.overhead_frames;
        writeln!(
            f,
            "  {:>8} KiB in slabs of {} caches, of which {} KiB are in use",
            totals.slab_frames * 4,
            totals.caches,
            totals.active_bytes / 1024
        )?;
        writeln!(
            f,
            "  {:>8} KiB in {} large allocations",
            totals.page_frames * 4,
            totals.page_blocks
        )?;
        writeln!(
            f,
            "  {:>8} KiB of the slab system's own",
            totals.overhead_frames * 4
        )?;
        writeln!(
            f,
            "  {:>8} KiB taken from the page-frame allocator directly",
            allocated.saturating_sub(known) * 4
        )?;
        self.largest(f)?;
        write!(f, "{}", frames.buddy_info())
    }
}

impl<M: PhysMap, C: Cpu, L: RawLock> Explanation<'_, M, C, L> {
    /// The caches that hold most.
    fn largest(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut largest = [("", 0u64, 0u64, 0usize); NAMED];
        let _ = self.memory.slab().caches(|cache| {
            let mut entry = (
                cache.name,
                cache.frames,
                cache.active_objects,
                cache.object_size,
            );
            for place in &mut largest {
                if entry.1 > place.1 {
                    core::mem::swap(place, &mut entry);
                }
            }
        });
        for (name, frames, objects, size) in largest {
            if frames > 0 {
                writeln!(
                    f,
                    "  {:>8} KiB hold {objects} objects of {size} bytes of cache {name}",
                    frames * 4
                )?;
            }
        }
        Ok(())
    }
}

impl<M: PhysMap, C: Cpu, L: RawLock> fmt::Debug for Explanation<'_, M, C, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
