//! `PageOwner`: who allocated each frame, and who holds how much.
//!
//! ```text
//!   entries[frame] = site << 8 | order + 1          sites[site] = where, blocks, frames
//! ```
//!
//! Sites are found by hashing the address of the caller's `Location`; they are never removed. What finds no free site is counted
//! with the last one. Source: Linux Documentation/mm/page_owner.rst.

use core::fmt;
use core::panic::Location;

use kmem_hal::sync::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

use super::{Watch, sealed};
use crate::carve::{Carving, room};
use crate::error::FreeError;

/// Places in programs that are told apart.
const SITES: usize = 1024;
/// The site of callers for which there was no room.
const OTHERS: usize = SITES - 1;
/// How many sites `show_mem` prints.
const SHOWN: usize = 16;

/// A place in the program that holds frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Where the frames were asked for; `None` for all that found no room in the table.
    pub location: Option<&'static Location<'static>>,
    /// Blocks that it holds.
    pub blocks: u64,
    /// Frames in them.
    pub frames: u64,
}

/// Knows who allocated each frame, by `#[track_caller]`: [`WatchedBuddy::owner_of`](super::WatchedBuddy::owner_of) and
/// [`owners`](super::WatchedBuddy::owners); `show_mem` prints who holds most.
///
/// # Examples
///
/// ```
/// # use kmem_buddy::{BootMap, Config, PageOwner, RegionKind, WatchedBuddy, ZoneLimits};
/// # use kmem_hal::{FrameRequest, FrameSink, FrameSource, OffsetMap, Order, PhysAddr, SingleCpu};
/// # let arena = Box::leak(vec![0u8; 5 << 20].into_boxed_slice());
/// # let base = (arena.as_mut_ptr().expose_provenance() + 0xf_ffff) & !0xf_ffff;
/// # let mut map: BootMap = BootMap::new();
/// # map.push(PhysAddr::new(0), 4 << 20, RegionKind::Usable)?;
/// # let (memory, cpu) = unsafe { (OffsetMap::new(base, 1024), SingleCpu::new()) };
/// let buddy: WatchedBuddy<_, _, PageOwner> = WatchedBuddy::new(memory, cpu);
/// // SAFETY: X1: nobody else uses the memory of the map.
/// unsafe { buddy.init(&mut map, &Config::new().limits(ZoneLimits::NORMAL_ONLY))? };
///
/// let (frame, line) = (buddy.alloc(&FrameRequest::new(Order::new(3).unwrap()))?, line!());
/// assert_eq!(buddy.owner_of(frame.first()).unwrap().line(), line);
/// print!("{}", buddy.show_mem());
/// # buddy.free(frame);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "page_owner")]
#[derive(Debug)]
pub struct PageOwner {
    entries: &'static [AtomicU32],
    sites: &'static [Site],
}

#[derive(Debug)]
struct Site {
    location: AtomicPtr<Location<'static>>,
    blocks: AtomicU64,
    frames: AtomicU64,
}

impl Site {
    fn owner(&self) -> Owner {
        // SAFETY: null, or from a `&'static Location` in `site`.
        let location = unsafe { self.location.load(Ordering::Acquire).as_ref() };
        Owner {
            location,
            blocks: self.blocks.load(Ordering::Relaxed),
            frames: self.frames.load(Ordering::Relaxed),
        }
    }
}

impl sealed::Sealed for PageOwner {}

impl PageOwner {
    /// The number of the site of a caller.
    fn site(&self, by: &'static Location<'static>) -> usize {
        let wanted = core::ptr::from_ref(by).cast_mut();
        // Locations are values of three words: their low bits say little.
        let start = (wanted.addr() >> 3).wrapping_mul(0x9e37_79b1) % OTHERS;
        for step in 0..OTHERS {
            let number = (start + step) % OTHERS;
            let Some(site) = self.sites.get(number) else {
                break;
            };
            let free = core::ptr::null_mut();
            let found =
                site.location
                    .compare_exchange(free, wanted, Ordering::AcqRel, Ordering::Acquire);
            match found {
                Ok(_) => return number,
                Err(taken) if taken == wanted => return number,
                Err(_) => {}
            }
        }
        OTHERS
    }

    fn count(&self, number: usize, frames: u64, taken: bool) {
        let Some(site) = self.sites.get(number) else {
            return;
        };
        if taken {
            site.blocks.fetch_add(1, Ordering::Relaxed);
            site.frames.fetch_add(frames, Ordering::Relaxed);
        } else {
            site.blocks.fetch_sub(1, Ordering::Relaxed);
            site.frames.fetch_sub(frames, Ordering::Relaxed);
        }
    }

    /// The site and order of the block that starts at `at`.
    fn entry(&self, at: usize) -> Option<(usize, usize)> {
        let entry = self.entries.get(at)?.load(Ordering::Relaxed);
        let order = (entry as u8).checked_sub(1)?;
        Some(((entry >> 8) as usize, usize::from(order)))
    }

    fn enter(&self, at: usize, order: usize, site: usize) {
        if let Some(entry) = self.entries.get(at) {
            let value = (site as u32) << 8 | (order as u32 + 1);
            self.count(site, 1 << order, true);
            // What a wrong free left here is somebody's no more.
            self.leave(entry.swap(value, Ordering::AcqRel));
        }
    }

    /// An entry was taken out.
    fn leave(&self, entry: u32) {
        if let Some(order) = (entry as u8).checked_sub(1) {
            self.count((entry >> 8) as usize, 1 << order, false);
        }
    }

    /// Forgets the blocks that start in `count` frames from `at`.
    fn forget(&self, at: usize, count: usize) {
        for entry in self.entries.get(at..at + count).unwrap_or(&[]) {
            if entry.load(Ordering::Relaxed) != 0 {
                self.leave(entry.swap(0, Ordering::AcqRel));
            }
        }
    }
}

impl Watch for PageOwner {
    fn bytes(frames: usize) -> u64 {
        room::<AtomicU32>(frames) + room::<Site>(SITES)
    }

    fn build(memory: &mut Carving, frames: usize) -> Self {
        Self {
            entries: memory.slice(frames, |_| AtomicU32::new(0)),
            sites: memory.slice(SITES, |_| Site {
                location: AtomicPtr::new(core::ptr::null_mut()),
                blocks: AtomicU64::new(0),
                frames: AtomicU64::new(0),
            }),
        }
    }

    fn taken(&self, at: usize, order: usize, by: &'static Location<'static>) {
        self.enter(at, order, self.site(by));
    }

    fn taken_loose(&self, at: usize, count: usize, by: &'static Location<'static>) {
        let site = self.site(by);
        (at..at + count).for_each(|at| self.enter(at, 0, site));
    }

    fn give(&self, at: usize, order: usize) -> Result<(), FreeError> {
        match self.entry(at) {
            Some((_, own)) if own >= order => self.forget(at, 1),
            _ => self.forget(at, 1 << order),
        }
        Ok(())
    }

    fn give_run(&self, at: usize, count: usize) -> Result<(), FreeError> {
        self.forget(at, count);
        Ok(())
    }

    fn split(&self, at: usize, order: usize) -> Result<(), FreeError> {
        if let (Some((site, own)), Some(half)) = (self.entry(at), order.checked_sub(1))
            && own == order
        {
            self.forget(at, 1);
            self.enter(at, half, site);
            self.enter(at + (1 << half), half, site);
        }
        Ok(())
    }

    fn owner(&self, at: usize) -> Option<&'static Location<'static>> {
        let last = at.saturating_sub(1 << 20);
        let start = (last..=at)
            .rev()
            .find(|&start| self.entry(start).is_some())?;
        let (site, order) = self.entry(start)?;
        let covers = at - start < 1 << order;
        covers.then(|| self.sites.get(site)?.owner().location)?
    }

    fn owners(&self, give: &mut dyn FnMut(Owner)) {
        // The most frames first, by looking for the next smaller one: no memory to sort in.
        let mut before = (u64::MAX, 0);
        loop {
            let next = (0..self.sites.len())
                .map(|number| (self.sites[number].owner(), number))
                .filter(|(owner, number)| {
                    owner.frames > 0
                        && (owner.frames, usize::MAX - number) < (before.0, usize::MAX - before.1)
                })
                .max_by_key(|(owner, number)| (owner.frames, usize::MAX - number));
            let Some((owner, number)) = next else { return };
            give(owner);
            before = (owner.frames, number);
        }
    }

    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut result = writeln!(f, "Page owners:");
        let mut shown = 0;
        self.owners(&mut |owner| {
            shown += 1;
            if shown > SHOWN || result.is_err() {
                return;
            }
            result = write!(
                f,
                "{:>10}kB in {:>6} blocks  ",
                owner.frames * 4,
                owner.blocks
            )
            .and_then(|()| match owner.location {
                Some(location) => writeln!(f, "{location}"),
                None => writeln!(f, "others"),
            });
        });
        result?;
        if shown > SHOWN {
            writeln!(f, "{:>10} more", shown - SHOWN)?;
        }
        Ok(())
    }
}
