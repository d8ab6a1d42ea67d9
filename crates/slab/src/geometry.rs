//! How objects of one size are laid out: slab order, objects in a slab, slots of a per-CPU array.
//!
//! Invariants
//! - `I1`: a slab holds at least one object and at most [`MAX_OBJECTS`].
//! - `I2`: of slabs of 1 to 16 pages the preferred one wastes least, by [`waste`]: tail, descriptor, rest of the block, and the holes that objects of
//!   one slab leave when they are freed at different times. The more objects a slab has, the longer it waits for its last one.
//! - `I3`: `index(offset)` is `offset / size` for every offset inside a slab of any size that is used.
//! - `I4`: a slab of any colour ends with its tail, and its first object lies in its first page.
//!
//! A slab need not be a power of two: it is cut from a block, and the pages behind it go back at once. The classes from 1 KiB
//! are `m` times a power of two with `m` from 9 to 16, so that `m` pages hold them without any tail.
//!
//! Source: Bonwick, USENIX 1994, section 4.1 (1/8 as the bound for the tail); Linux `calculate_order`, `alloc_pages_exact`.

use kmem_hal::{Order, PAGE_SIZE};

use crate::array::{MAX_SLOTS, SMALL_SLOTS};
use crate::slab::MAX_OBJECTS;

/// The most pages that slabs prefer: 64 KiB. Larger objects get the smallest block that holds one.
const PREFERRED_PAGES: u64 = 16;

/// A cache line, in bytes.
const LINE: usize = 64;

/// Bytes of objects that one array of a CPU may hold at the start, and after it grew, roughly.
const ARRAY_BYTES: usize = 16 << 10;
const GROWN_BYTES: usize = 64 << 10;

/// The layout of objects of one size.
///
/// # Examples
///
/// ```
/// use kmem_slab::Geometry;
///
/// let g = Geometry::new(64, 64).unwrap();
/// assert_eq!((g.pages(), g.objects(), g.array()), (2, 128, 64));
/// // Three pages hold four objects of 3 KiB without a tail.
/// assert_eq!(Geometry::new(3072, 8).unwrap().pages(), 3);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    size: u32,
    align: u32,
    /// `2^32 / size` rounded up; 0 = divide.
    reciprocal: u32,
    objects: u16,
    pages: u16,
    array: u16,
    grown: u16,
}

impl Geometry {
    /// The layout for objects of `size` bytes aligned to `align` bytes (a power of two up to 4096).
    ///
    /// `None` where no block of the page-frame allocator holds one, or for a wrong alignment.
    #[must_use]
    pub const fn new(size: usize, align: usize) -> Option<Self> {
        if !align.is_power_of_two() || align as u64 > PAGE_SIZE {
            return None;
        }
        let align = if align < 8 { 8 } else { align };
        let size = if size < 8 { 8 } else { size };
        if size as u64 > Order::MAX_BUDDY.bytes() {
            return None;
        }
        let size = (size + align - 1) & !(align - 1);
        let pages = preferred(size);
        Some(Self {
            size: size as u32,
            align: align as u32,
            reciprocal: if size < (1 << 16) && pages <= PREFERRED_PAGES {
                ((1u64 << 32).div_ceil(size as u64)) as u32
            } else {
                0
            },
            objects: objects(size, pages * PAGE_SIZE),
            pages: pages as u16,
            array: slots(ARRAY_BYTES / size, 64),
            grown: match GROWN_BYTES / size {
                MAX_SLOTS.. => MAX_SLOTS as u16,
                count => slots(count, SMALL_SLOTS),
            },
        })
    }

    /// Bytes from one object to the next.
    #[must_use]
    pub const fn size(self) -> usize {
        self.size as usize
    }

    /// The alignment of every object, in bytes.
    #[must_use]
    pub const fn align(self) -> usize {
        self.align as usize
    }

    /// Pages of a slab, where the page source has a block that it can be cut from.
    #[must_use]
    pub const fn pages(self) -> u64 {
        self.pages as u64
    }

    /// The order of the block that a slab is cut from.
    #[must_use]
    pub const fn order(self) -> Order {
        match Order::for_frames(self.pages()) {
            Some(order) => order,
            None => Order::ZERO,
        }
    }

    /// The smallest order that holds an object.
    #[must_use]
    pub const fn least_order(self) -> Order {
        match Order::for_bytes(self.size as u64) {
            Some(order) => order,
            None => Order::ZERO,
        }
    }

    /// Objects in a slab of the preferred size.
    #[must_use]
    pub const fn objects(self) -> usize {
        self.objects as usize
    }

    /// Objects in a slab of `pages`, at most as many as in one of the preferred size.
    #[must_use]
    pub const fn objects_in(self, pages: u64) -> usize {
        let fit = objects(self.size as usize, pages * PAGE_SIZE);
        if fit < self.objects {
            fit as usize
        } else {
            self.objects as usize
        }
    }

    /// Bytes from one colour to the next: a cache line, or the alignment where that is more.
    #[must_use]
    pub const fn colour_step(self) -> usize {
        if self.align() > LINE {
            self.align()
        } else {
            LINE
        }
    }

    /// How many colours slabs of `pages` have: as many as fit into the tail, and into a page. At least one.
    ///
    /// The first object of a slab of colour `c` lies `c * colour_step()` bytes behind the slab's start, so that
    /// what is used most of the objects of many slabs does not fall into the same few sets of a cache.
    ///
    /// Source: Bonwick, USENIX 1994, section 4.3.
    #[doc(alias = "colour_off")]
    #[must_use]
    pub const fn colours(self, pages: u64) -> usize {
        let bytes = (pages * PAGE_SIZE) as usize;
        let tail = bytes.saturating_sub(self.objects_in(pages) * self.size());
        let step = self.colour_step();
        let room = (PAGE_SIZE as usize).saturating_sub(step);
        1 + (if tail < room { tail } else { room }) / step
    }

    /// Slots of a per-CPU array at the start.
    #[must_use]
    pub const fn array(self) -> usize {
        self.array as usize
    }

    /// Slots of a per-CPU array of a cache that streams.
    #[must_use]
    pub const fn array_max(self) -> usize {
        self.grown as usize
    }

    /// The number of the object that contains the byte at `offset` from the slab's base.
    #[inline]
    #[must_use]
    pub const fn index(self, offset: usize) -> usize {
        if self.reciprocal == 0 {
            offset / self.size as usize
        } else {
            // The error of the product is below offset * size / 2^32 < 1 object, since both are at most 2^16.
            ((offset as u64 * self.reciprocal as u64) >> 32) as usize
        }
    }
}

/// The largest power of two up to `count` and `most`, and at least 8.
const fn slots(count: usize, most: usize) -> u16 {
    let mut slots = 8;
    while slots * 2 <= count && slots * 2 <= most {
        slots *= 2;
    }
    slots as u16
}

const fn objects(size: usize, bytes: u64) -> u16 {
    let fit = bytes / size as u64;
    if fit > MAX_OBJECTS as u64 {
        MAX_OBJECTS as u16
    } else {
        fit as u16
    }
}

/// What a slab of so many pages wastes, in millionths of the slab: the tail, the descriptor, the holes, and some of the rest of its block.
///
/// The rest goes back at once, but only as pieces that are smaller than the slab. A kernel has use for them; a program whose memory is in one class
/// has none, and touches a block for each slab. So it counts as if one such block in 32 were of that kind.
///
/// Holes: with objects that die at random, a cache of `k` objects a slab holds about 1.1 % more memory for every doubling
/// of `k`, since a slab goes back with its last object (simulated for 1400 live objects, and
/// rounded up for what arrays hold back; decision 005).
pub const fn waste(size: usize, pages: u64) -> u64 {
    const DESCRIPTOR: u64 = 96;
    const HOLES: u64 = 11_000;
    const REST: u64 = 32;
    let (bytes, count) = (pages * PAGE_SIZE, objects(size, pages * PAGE_SIZE) as u64);
    let block = pages.next_power_of_two();
    let rest = (block - pages) * 1_000_000 / block / REST;
    let unused = bytes - count * size as u64 + DESCRIPTOR;
    let doublings = (count.ilog2() as u64) * HOLES
        + HOLES * (count - (1 << count.ilog2())) / (1 << count.ilog2());
    unused * 1_000_000 / bytes + doublings + rest
}

/// The pages of the slab that wastes least, or of the smallest block for objects beyond the preferred sizes.
const fn preferred(size: usize) -> u64 {
    let least = (size as u64).div_ceil(PAGE_SIZE);
    if least > PREFERRED_PAGES {
        return match Order::for_bytes(size as u64) {
            Some(order) => order.frames(),
            None => Order::MAX_BUDDY.frames(),
        };
    }
    let (mut best, mut pages) = (least, least);
    while pages <= PREFERRED_PAGES {
        if waste(size, pages) < waste(size, best) {
            best = pages;
        }
        pages += 1;
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::class::{CLASSES, class_size};

    #[test]
    fn tails_of_all_classes_are_small() {
        let (mut tails, mut bytes) = (0, 0);
        for class in 0..CLASSES {
            let size = class_size(class).unwrap();
            let g = Geometry::new(size, 8).unwrap();
            let tail = g.pages() as usize * 4096 - g.objects() * size;
            assert!(
                tail * 16 <= g.pages() as usize * 4096,
                "size {size}: {g:?} has a tail of {tail}"
            );
            tails += tail;
            bytes += g.pages() as usize * 4096;
        }
        assert!(tails * 100 < bytes, "{tails} of {bytes}");
    }

    #[test]
    fn no_other_slab_wastes_less() {
        for size in [16, 64, 100, 1152, 3072, 3840, 8192, 20_000, 65_536] {
            let best = preferred(size);
            let least = (size as u64).div_ceil(PAGE_SIZE);
            for pages in least..=PREFERRED_PAGES {
                assert!(waste(size, best) <= waste(size, pages), "size {size}");
            }
        }
        // 4 KiB: one object a page would cost a descriptor a page.
        assert!(preferred(4096) > 1);
    }

    #[test]
    fn index_is_the_quotient_everywhere() {
        for size in (8..9000usize)
            .step_by(8)
            .chain([16384, 40000, 65528, 70000, 1 << 20])
        {
            let g = Geometry::new(size, 8).unwrap();
            let bytes = (g.pages() as usize * 4096).min(1 << 17);
            for offset in (0..bytes).step_by(if size < 512 { 1 } else { 61 }) {
                assert_eq!(
                    g.index(offset),
                    offset / size,
                    "offset {offset} size {size}"
                );
            }
        }
    }

    #[test]
    fn colours_fit_into_the_tail_and_keep_alignments() {
        for size in (8..20_000usize).step_by(24) {
            for align in [8, 64, 128, 4096] {
                let g = Geometry::new(size, align).unwrap();
                for pages in [g.pages(), g.least_order().frames()] {
                    let last = (g.colours(pages) - 1) * g.colour_step();
                    assert!(last.is_multiple_of(align) && last < 4096);
                    assert!(last + g.objects_in(pages) * g.size() <= pages as usize * 4096);
                }
            }
        }
        // 7 pages hold 8 objects of 3520 bytes and 512 bytes more.
        assert_eq!(Geometry::new(3520, 64).unwrap().colours(7), 9);
        assert_eq!(Geometry::new(64, 64).unwrap().colours(2), 1);
    }

    #[test]
    fn odd_requests() {
        assert_eq!(Geometry::new(8, 3), None);
        assert_eq!(Geometry::new(8, 8192), None);
        assert_eq!(Geometry::new((4 << 20) + 1, 8), None);
        let page = Geometry::new(1, 4096).unwrap();
        assert_eq!(page.size(), 4096);
        assert_eq!(Geometry::new(4 << 20, 8).unwrap().objects(), 1);
    }
}
