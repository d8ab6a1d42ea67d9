//! The size classes of kmalloc.
//!
//! ```text
//!   8 16 24 32 40 48 56 64 | 80 96 112 128 | 160 .. 256 | .. 512 | .. 1024 | 1152 .. 2048 | .. 4096 | .. 8192
//!      steps of 8        |     four classes a doubling               |    eight classes a doubling
//! ```
//!
//! Powers of two, as most kernels have them, give away 38 % on a log-uniform mix of sizes; these classes
//! give away about 5.5 % (4 a doubling below 1 KiB, 8 above, where a percent is worth more bytes).
//!
//! Invariants
//! - `I1`: in each doubling the classes are the multiples of one power of two, the *step*.
//! - `I2`: objects lie at multiples of their size from a page-aligned base. With `I1`: a size that was rounded up
//!   to a multiple of an alignment (a power of two up to a page) falls into a class whose objects have that alignment. Either
//!   the step is a multiple of the alignment and so is every class, or the rounded size is itself a class.
//!
//! Costs: one byte of a table of 1 KiB for a size that is not known when the program is built, nothing for one that is.
//!
//! Sources: Linux `mm/slab_common.c` (`kmalloc_info`); jemalloc's and mimalloc's size classes (4 and 8 a doubling).

/// How many size classes there are.
pub const CLASSES: usize = 48;

/// The largest class, in bytes; larger requests get whole pages.
#[doc(alias = "KMALLOC_MAX_CACHE_SIZE")]
pub const LARGEST_CLASS: usize = 8192;

/// The largest alignment that a class serves: a page.
pub(crate) const LARGEST_ALIGN: usize = 4096;

const fn sizes() -> [u16; CLASSES] {
    let mut sizes = [0; CLASSES];
    let mut class = 0;
    let mut size = 8;
    while size <= LARGEST_CLASS {
        sizes[class] = size as u16;
        class += 1;
        size += if size < 64 {
            8
        } else if size < 1024 {
            1 << (size.ilog2() - 2)
        } else {
            1 << (size.ilog2() - 3)
        };
    }
    assert!(class == CLASSES);
    sizes
}

const SIZES: [u16; CLASSES] = sizes();

/// The class of a size, by the eighth that its last byte is in: `(size - 1) / 8`.
///
/// One table for all sizes: with two a branch would tell which, and a branch on the size of an object whose layout was just read from memory is
/// mispredicted as often as not, which costs the loads behind it that had begun.
const BY_EIGHTH: [u8; LARGEST_CLASS / 8] = {
    let mut table = [0; LARGEST_CLASS / 8];
    let sizes = sizes();
    let (mut eighth, mut class) = (0, 0);
    while eighth < table.len() {
        while (sizes[class] as usize) < (eighth + 1) * 8 {
            class += 1;
        }
        table[eighth] = class as u8;
        eighth += 1;
    }
    table
};

/// The size in bytes of the objects of class number `class`; `None` at [`CLASSES`] and above.
#[must_use]
pub const fn class_size(class: usize) -> Option<usize> {
    if class < CLASSES {
        Some(SIZES[class] as usize)
    } else {
        None
    }
}

/// The smallest class whose objects have `size` bytes and lie at multiples of `align` (a power of two).
///
/// `None` where no class does: no bytes, more than [`LARGEST_CLASS`], or an alignment beyond a page.
///
/// # Examples
///
/// ```
/// use kmem_slab::{class_of, class_size};
///
/// let class = class_of(65, 8).unwrap();
/// assert_eq!(class_size(class), Some(80));
/// // 80-byte objects lie at multiples of 16; for 32 the next class that does is taken.
/// assert_eq!(class_of(65, 32).and_then(class_size), Some(96));
/// assert_eq!(class_of(8193, 8), None);
/// ```
#[doc(alias = "kmalloc_slab")]
#[inline(always)]
#[must_use]
pub const fn class_of(size: usize, align: usize) -> Option<usize> {
    // The last byte of the size rounded up to the alignment; no size overflows, and no bytes have one beyond every class.
    let last = size.wrapping_sub(1) | (align - 1);
    if align > LARGEST_ALIGN || last >= LARGEST_CLASS {
        return None;
    }
    Some(BY_EIGHTH[last >> 3] as usize)
}

/// Names as Linux spells them.
pub(crate) const NAMES: [&str; CLASSES] = [
    "kmalloc-8",
    "kmalloc-16",
    "kmalloc-24",
    "kmalloc-32",
    "kmalloc-40",
    "kmalloc-48",
    "kmalloc-56",
    "kmalloc-64",
    "kmalloc-80",
    "kmalloc-96",
    "kmalloc-112",
    "kmalloc-128",
    "kmalloc-160",
    "kmalloc-192",
    "kmalloc-224",
    "kmalloc-256",
    "kmalloc-320",
    "kmalloc-384",
    "kmalloc-448",
    "kmalloc-512",
    "kmalloc-640",
    "kmalloc-768",
    "kmalloc-896",
    "kmalloc-1k",
    "kmalloc-1152",
    "kmalloc-1280",
    "kmalloc-1408",
    "kmalloc-1536",
    "kmalloc-1664",
    "kmalloc-1792",
    "kmalloc-1920",
    "kmalloc-2k",
    "kmalloc-2304",
    "kmalloc-2560",
    "kmalloc-2816",
    "kmalloc-3k",
    "kmalloc-3328",
    "kmalloc-3584",
    "kmalloc-3840",
    "kmalloc-4k",
    "kmalloc-4608",
    "kmalloc-5k",
    "kmalloc-5632",
    "kmalloc-6k",
    "kmalloc-6656",
    "kmalloc-7k",
    "kmalloc-7680",
    "kmalloc-8k",
];

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::string::String;

    #[test]
    fn every_size_gets_the_smallest_class_that_fits() {
        for size in 1..=LARGEST_CLASS {
            let class = class_of(size, 1).unwrap();
            assert!(class_size(class).unwrap() >= size);
            if class > 0 {
                assert!(
                    class_size(class - 1).unwrap() < size,
                    "size {size} fits a smaller class"
                );
            }
        }
        for size in [0, LARGEST_CLASS + 1, usize::MAX] {
            for align in [1, 8, 4096] {
                assert_eq!(class_of(size, align), None, "size {size} align {align}");
            }
        }
    }

    #[test]
    fn classes_keep_every_alignment_up_to_a_page() {
        for shift in 0..=12 {
            let align = 1 << shift;
            for size in 1..=LARGEST_CLASS {
                match class_of(size, align) {
                    Some(class) => {
                        assert_eq!(
                            class_size(class).unwrap() % align,
                            0,
                            "size {size} align {align}"
                        )
                    }
                    None => assert!(size.next_multiple_of(align) > LARGEST_CLASS),
                }
            }
        }
        assert_eq!(class_of(1, 8192), None);
    }

    #[test]
    fn names_say_the_size() {
        for (class, name) in NAMES.iter().enumerate() {
            let digits: String = name["kmalloc-".len()..].into();
            let size = match digits.strip_suffix('k') {
                Some(kib) => kib.parse::<usize>().unwrap() * 1024,
                None => digits.parse().unwrap(),
            };
            assert_eq!(class_size(class), Some(size));
        }
    }

    #[test]
    fn rounding_gives_away_less_than_six_percent() {
        // Log-uniform sizes 8..4096: equal weight to equal ratios.
        let (mut asked, mut given) = (0.0f64, 0.0f64);
        let steps = 20_000;
        for step in 0..steps {
            let size = 8.0 * 512.0f64.powf(f64::from(step) / f64::from(steps));
            asked += size;
            given += class_size(class_of(size as usize, 1).unwrap()).unwrap() as f64;
        }
        assert!(given / asked < 1.06, "{}", given / asked);
    }
}
