//! How objects of one size are laid out: slab order, objects in a slab, slots of a per-CPU array.
//!
//! Invariants
//! - `I1`: a slab holds at least one object and at most [`MAX_OBJECTS`].
//! - `I2`: at the preferred order the tail of a slab that holds no object is below 1/16 of the slab, unless no order up to
//!   the largest gives that.
//! - `I3`: `index(offset)` is `offset / size` for every offset inside a slab of any order that is used.
//!
//! Source: Bonwick, USENIX 1994, section 4.1 (1/8 as the bound for the tail); Linux `calculate_order`.

use kmem_hal::{Order, PAGE_SIZE};

use crate::slab::MAX_OBJECTS;

/// The largest order that slabs prefer: 64 KiB. Larger objects get the smallest order that holds one.
const PREFERRED_MAX: u8 = 4;

/// Bytes that one array of a CPU may hold, roughly.
const ARRAY_BYTES: usize = 16 << 10;

/// The layout of objects of one size.
///
/// # Examples
///
/// ```
/// use kmem_slab::Geometry;
///
/// let g = Geometry::new(64, 64).unwrap();
/// assert_eq!((g.order().get(), g.objects(), g.array()), (1, 128, 64));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    size: u32,
    align: u32,
    /// `2^32 / size` rounded up; 0 = divide.
    reciprocal: u32,
    objects: u16,
    order: u8,
    array: u8,
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
        let order = preferred(size);
        let bytes = Order::bytes(order);
        let array = match ARRAY_BYTES / size {
            64.. => 64,
            32.. => 32,
            8.. => 16,
            _ => 8,
        };
        Some(Self {
            size: size as u32,
            align: align as u32,
            reciprocal: if size < (1 << 16) && order.get() <= PREFERRED_MAX {
                ((1u64 << 32).div_ceil(size as u64)) as u32
            } else {
                0
            },
            objects: objects(size, bytes),
            order: order.get(),
            array,
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

    /// The order of a slab, where the page source has such a block.
    #[must_use]
    pub const fn order(self) -> Order {
        match Order::new(self.order) {
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

    /// Objects in a slab of the preferred order.
    #[must_use]
    pub const fn objects(self) -> usize {
        self.objects as usize
    }

    /// Objects in a slab of `order`, at most `MAX_OBJECTS`.
    #[must_use]
    pub const fn objects_in(self, order: Order) -> usize {
        objects(self.size as usize, order.bytes()) as usize
    }

    /// Slots of a per-CPU array at the start.
    #[must_use]
    pub const fn array(self) -> usize {
        self.array as usize
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

const fn objects(size: usize, bytes: u64) -> u16 {
    let fit = bytes / size as u64;
    if fit > MAX_OBJECTS as u64 {
        MAX_OBJECTS as u16
    } else {
        fit as u16
    }
}

/// The smallest order with enough objects to be worth a lock, and a small tail.
const fn preferred(size: usize) -> Order {
    let Some(least) = Order::for_bytes(size as u64) else {
        return Order::MAX_BUDDY;
    };
    let enough = match size {
        0..=128 => 128,
        129..=256 => 64,
        257..=4096 => 16,
        _ => 8,
    };
    let mut best = least;
    let mut best_tail = u64::MAX;
    let mut n = least.get();
    while n <= PREFERRED_MAX {
        let Some(order) = Order::new(n) else { break };
        let count = objects(size, order.bytes());
        let tail = order.bytes() - count as u64 * size as u64;
        // Compare tails as fractions of the slab: scale to the largest order.
        let scaled = tail << (PREFERRED_MAX - n);
        if tail * 16 <= order.bytes() && count >= enough {
            return order;
        }
        if scaled < best_tail {
            best = order;
            best_tail = scaled;
        }
        n += 1;
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::class::{CLASSES, class_size};

    #[test]
    fn tails_of_all_classes_are_small() {
        for class in 0..CLASSES {
            let size = class_size(class).unwrap();
            let g = Geometry::new(size, 8).unwrap();
            let bytes = g.order().bytes() as usize;
            assert!(g.objects() >= 1 && g.objects() <= MAX_OBJECTS);
            let tail = bytes - g.objects() * size;
            let best = (0..=PREFERRED_MAX).filter_map(Order::new).map(|order| {
                let tail = order.bytes() as usize - g.objects_in(order) * size;
                tail << (PREFERRED_MAX - order.get())
            });
            let scaled = tail << (PREFERRED_MAX - g.order().get());
            assert!(
                tail * 16 <= bytes || Some(scaled) == best.min(),
                "size {size}: tail {tail} of {bytes}"
            );
        }
    }

    #[test]
    fn index_is_the_quotient_everywhere() {
        for size in (8..9000usize)
            .step_by(8)
            .chain([16384, 40000, 65528, 70000, 1 << 20])
        {
            let g = Geometry::new(size, 8).unwrap();
            let bytes = (g.order().bytes() as usize).min(1 << 17);
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
    fn odd_requests() {
        assert_eq!(Geometry::new(8, 3), None);
        assert_eq!(Geometry::new(8, 8192), None);
        assert_eq!(Geometry::new((4 << 20) + 1, 8), None);
        let page = Geometry::new(1, 4096).unwrap();
        assert_eq!(page.size(), 4096);
        assert_eq!(Geometry::new(4 << 20, 8).unwrap().objects(), 1);
    }
}
