//! What no program can do without: copies of entries, counts and frames, in flat arrays.

use std::sync::atomic::{AtomicU64, Ordering};

use super::GIB;
use crate::clock::Watch;
use crate::harness::{Competitor, Slice};
use crate::platform::Region;

/// Copies entries, clears write bits on both sides, and counts a reference for each frame: what an eager fork has to do.
pub(super) fn eager_copy() -> impl Competitor {
    let mut parent = vec![0u64; GIB as usize];
    let mut child = vec![0u64; GIB as usize];
    let mut counts = vec![1u32; GIB as usize];
    for (number, entry) in parent.iter_mut().enumerate() {
        *entry = (number as u64) << 12 | 0x67;
    }
    move |_: u64, watch: &mut Watch| {
        watch.time(|| {
            for (parent, child) in parent.iter_mut().zip(&mut child) {
                *parent &= !2;
                *child = *parent;
                counts[(*parent >> 12) as usize] += 1;
            }
        });
        std::hint::black_box((&parent, &child, &counts));
        Slice::limit(1)
    }
}

pub(super) fn copy_tables() -> impl Competitor {
    let from = vec![1u64; GIB as usize];
    let mut to = vec![2u64; GIB as usize];
    move |_: u64, watch: &mut Watch| {
        watch.time(|| to.copy_from_slice(std::hint::black_box(&from)));
        std::hint::black_box(&to);
        Slice::limit(1)
    }
}

/// Copies the entries of tables and counts a reference for each frame, in slots of 32 bytes, as other spaces' forks may too.
pub(super) struct FlatTables {
    from: Vec<u64>,
    to: Vec<u64>,
    counts: Vec<[AtomicU64; 4]>,
}

impl FlatTables {
    /// Tables of so many pages.
    pub fn new(pages: u64) -> Self {
        Self {
            from: (0..pages).map(|frame| frame << 12 | 0x67).collect(),
            to: vec![0u64; pages as usize],
            counts: (0..pages).map(|_| Default::default()).collect(),
        }
    }

    #[inline]
    pub fn copy(&mut self, table: u64) {
        let first = (table * 512 % self.to.len() as u64) as usize;
        let words = self.from.iter().zip(&mut self.to).skip(first).take(512);
        for (from, to) in words {
            *to = *from;
            self.counts[(*from >> 12) as usize][1].fetch_add(1 << 32, Ordering::AcqRel);
        }
    }
}

pub(super) fn copy_one_table() -> impl Competitor {
    let mut tables = FlatTables::new(GIB);
    move |index: u64, watch: &mut Watch| {
        watch.time(|| (index * 64..(index + 1) * 64).for_each(|table| tables.copy(table)));
        std::hint::black_box((&tables.to, &tables.counts));
        Slice::limit(64)
    }
}

/// One table of a process of so many pages copied, and one frame, in turn: what a first write cannot do without.
pub(super) fn copy_table_and_frame(pages: u64) -> impl Competitor {
    let mut tables = FlatTables::new(pages);
    let mut frames = ColdFrames::new(pages);
    move |index: u64, watch: &mut Watch| {
        watch.time(|| {
            for table in index * 64..(index + 1) * 64 {
                tables.copy(table);
                frames.copy();
            }
        });
        std::hint::black_box((&tables.to, &tables.counts));
        Slice::limit(64)
    }
}

/// Frames of as much memory as a process has, one after the other.
pub(super) struct ColdFrames {
    region: Region,
    pages: usize,
    at: usize,
    locks: AtomicU64,
}

impl ColdFrames {
    pub fn new(pages: u64) -> Self {
        Self {
            region: Region::new(2 * pages).touched(),
            pages: pages as usize,
            at: 0,
            locks: AtomicU64::new(0),
        }
    }

    /// The next frame of the lower half, and one of the upper.
    #[inline]
    pub fn next(&mut self) -> (*mut u8, *mut u8) {
        self.at = (self.at + 1) % self.pages;
        let frame = |number| self.region.base().wrapping_add(number * 4096);
        (frame(self.at), frame(self.at + self.pages))
    }

    #[inline]
    pub fn zero(&mut self) {
        // SAFETY: a frame of the region, which this value owns.
        unsafe { self.next().0.write_bytes(0, 4096) };
    }

    #[inline]
    pub fn copy(&mut self) {
        let (low, high) = self.next();
        // SAFETY: two frames of the region, which this value owns.
        unsafe { high.copy_from_nonoverlapping(low, 4096) };
    }

    /// The locked instructions of a fault that finds its page's table: a mapping and a table are locked and let go.
    #[inline]
    pub fn lock(&self) {
        for _ in 0..4 {
            self.locks.fetch_add(1, Ordering::AcqRel);
        }
    }
}

/// Zeroes frames of a process of so many pages, or copies them: one behind the other, or with a fault's locked instructions in between.
pub(super) fn cold_frames(pages: u64, copies: bool, locks: bool) -> impl Competitor {
    let mut frames = ColdFrames::new(pages);
    move |_: u64, watch: &mut Watch| {
        watch.time(|| {
            for _ in 0..256 {
                if locks {
                    frames.lock();
                }
                if copies {
                    frames.copy();
                } else {
                    frames.zero();
                }
            }
        });
        Slice::limit(256)
    }
}
