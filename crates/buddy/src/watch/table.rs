//! Which entry of the table a frame has.

use kmem_hal::sync::AtomicPtr;

/// A run of usable frames and the place of its first one in the table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    pub first: u64,
    pub end: u64,
    pub place: usize,
}

/// A policy's table and what finds a frame in it.
pub(super) struct Table<W: 'static> {
    pub runs: &'static [Run],
    pub watch: W,
}

impl<W> Table<W> {
    /// The place of frame `first`, if `count` frames from there are in one run.
    pub fn place(&self, first: u64, count: u64) -> Option<usize> {
        let after = self.runs.partition_point(|run| run.first <= first);
        let run = self.runs.get(after.checked_sub(1)?)?;
        let fits = first < run.end && count <= run.end - first;
        fits.then(|| run.place + (first - run.first) as usize)
    }
}

/// A table that may not be there yet.
pub(super) type Slot<W> = AtomicPtr<Table<W>>;
