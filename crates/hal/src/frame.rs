//! Page frames by number, orders, and ranges that cannot overflow.
//!
//! A [`Frame`] is a number: frame `n` is the 4 KiB of physical memory at `n * 4096`.
//! Linux calls it the page frame number. The highest frame of a 64-bit physical space
//! is `2^52 - 1`, so a count or an exclusive end always fits in a `u64`.
//!
//! Invariants
//! - `I1`: `Frame(n)` has `n < 2^52`, so that `n << 12` fits in 64 bits.
//! - `I2`: a [`FrameRange`] has `first + count <= 2^52`, so its end never overflows, not
//!   even for the range that ends with the last frame of the space.
//! - `I3`: natural alignment is that of the absolute frame number, never of an index in a zone.

use core::fmt;

use crate::addr::{PAGE_SHIFT, PAGE_SIZE, PhysAddr};

/// The number of a 4 KiB page frame.
///
/// # Examples
///
/// ```
/// use kmem_hal::{Frame, PhysAddr};
///
/// let frame = Frame::containing(PhysAddr::new(0x5fff));
/// assert_eq!(frame.number(), 5);
/// assert_eq!(frame.start(), PhysAddr::new(0x5000));
/// assert_eq!(Frame::MAX.checked_add(1), None);
/// ```
#[doc(alias = "pfn")]
#[doc(alias = "page_to_pfn")]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Frame(u64);

impl Frame {
    /// Frames in a 64-bit physical address space.
    pub const LIMIT: u64 = 1 << (64 - PAGE_SHIFT);
    /// The last frame of the space.
    pub const MAX: Self = Self(Self::LIMIT - 1);
    /// Frame 0.
    pub const ZERO: Self = Self(0);

    /// The frame with this number; `None` at 2^52 and above (`I1`).
    #[must_use]
    pub const fn new(number: u64) -> Option<Self> {
        if number < Self::LIMIT {
            Some(Self(number))
        } else {
            None
        }
    }

    /// The frame with this number modulo 2^52: for numbers that were frames before.
    #[must_use]
    pub const fn from_number(number: u64) -> Self {
        Self(number & (Self::LIMIT - 1))
    }

    /// The frame that contains `address`.
    #[must_use]
    pub const fn containing(address: PhysAddr) -> Self {
        Self(address.as_u64() >> PAGE_SHIFT)
    }

    /// The frame that starts at `address`; `None` if `address` is not a multiple of 4096.
    #[must_use]
    pub const fn starting_at(address: PhysAddr) -> Option<Self> {
        if address.is_aligned(PAGE_SIZE) {
            Some(Self::containing(address))
        } else {
            None
        }
    }

    /// The frame's number.
    #[must_use]
    pub const fn number(self) -> u64 {
        self.0
    }

    /// The address of the frame's first byte.
    #[must_use]
    pub const fn start(self) -> PhysAddr {
        PhysAddr::new(self.0 << PAGE_SHIFT)
    }

    /// The frame `frames` higher; `None` above the last one.
    #[must_use]
    pub const fn checked_add(self, frames: u64) -> Option<Self> {
        match self.0.checked_add(frames) {
            Some(number) => Self::new(number),
            None => None,
        }
    }

    /// The frame `frames` lower; `None` below 0.
    #[must_use]
    pub const fn checked_sub(self, frames: u64) -> Option<Self> {
        match self.0.checked_sub(frames) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }

    /// Whether the frame's number is a multiple of the order's frames (`I3`).
    #[must_use]
    pub const fn is_aligned(self, order: Order) -> bool {
        self.0 & (order.frames() - 1) == 0
    }

    /// The first frame of the order-sized block that contains this frame.
    #[must_use]
    pub const fn align_down(self, order: Order) -> Self {
        Self(self.0 & !(order.frames() - 1))
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Frame({:#x})", self.0)
    }
}

impl fmt::Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// log2 of a number of frames: order 0 is one frame, order 9 is 2 MiB.
///
/// Buddy serves orders up to [`Order::MAX_BUDDY`]; page tables also speak of order 18 (1 GiB).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Order(u8);

impl Order {
    /// One frame, 4 KiB.
    pub const ZERO: Self = Self(0);
    /// 512 frames, 2 MiB: a huge page of x86-64, PAE and LA57.
    pub const HUGE_2M: Self = Self(9);
    /// 1024 frames, 4 MiB: a huge page of 32-bit x86 with PSE.
    pub const HUGE_4M: Self = Self(10);
    /// 2^18 frames, 1 GiB: a gigantic page of x86-64.
    pub const HUGE_1G: Self = Self(18);
    /// The top order of the buddy system, as Linux has it.
    #[doc(alias = "MAX_PAGE_ORDER")]
    pub const MAX_BUDDY: Self = Self(10);
    /// The top order that fits in the frame space.
    pub const MAX: Self = Self(51);

    /// The order `n`; `None` above [`Order::MAX`].
    #[must_use]
    pub const fn new(n: u8) -> Option<Self> {
        if n <= Self::MAX.0 {
            Some(Self(n))
        } else {
            None
        }
    }

    /// The smallest order of at least `bytes` bytes; `None` above [`Order::MAX`].
    #[doc(alias = "get_order")]
    #[must_use]
    pub const fn for_bytes(bytes: u64) -> Option<Self> {
        Self::for_frames(bytes.div_ceil(PAGE_SIZE))
    }

    /// The smallest order of at least `frames` frames; `None` above [`Order::MAX`].
    #[must_use]
    pub const fn for_frames(frames: u64) -> Option<Self> {
        match frames.checked_next_power_of_two() {
            Some(power) => Self::new(power.trailing_zeros() as u8),
            None => None,
        }
    }

    /// The exponent.
    #[must_use]
    pub const fn get(self) -> u8 {
        self.0
    }

    /// The exponent as an index into a table of orders.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// Frames in a block of this order: `2^order`.
    #[must_use]
    pub const fn frames(self) -> u64 {
        1 << self.0
    }

    /// Bytes in a block of this order.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        PAGE_SIZE << self.0
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// A run of frames: a first frame and a count. May be empty.
///
/// # Examples
///
/// ```
/// use kmem_hal::{Frame, FrameRange};
///
/// let top = FrameRange::new(Frame::MAX, 1).unwrap();
/// assert_eq!(top.end_number(), 1 << 52); // does not overflow
/// assert_eq!(FrameRange::new(Frame::MAX, 2), None);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct FrameRange {
    first: Frame,
    count: u64,
}

impl FrameRange {
    /// The empty range at frame 0.
    pub const EMPTY: Self = Self {
        first: Frame::ZERO,
        count: 0,
    };

    /// `count` frames from `first`; `None` where that passes the end of the space (`I2`).
    #[must_use]
    pub const fn new(first: Frame, count: u64) -> Option<Self> {
        match first.0.checked_add(count) {
            Some(end) if end <= Frame::LIMIT => Some(Self { first, count }),
            _ => None,
        }
    }

    /// The frames of an order-sized block; `None` past the end of the space.
    #[must_use]
    pub const fn of_order(first: Frame, order: Order) -> Option<Self> {
        Self::new(first, order.frames())
    }

    /// The frames from number `first` up to but not including number `end`.
    ///
    /// Empty where `end <= first`; `None` where `first` or `end` is outside the space.
    #[must_use]
    pub const fn from_numbers(first: u64, end: u64) -> Option<Self> {
        match Frame::new(first) {
            Some(frame) => Self::new(frame, end.saturating_sub(first)),
            None => None,
        }
    }

    /// The frames that lie wholly inside `length` bytes at `base`: for usable memory.
    ///
    /// A range that passes the end of the physical space is cut off there.
    #[must_use]
    pub const fn inside(base: PhysAddr, length: u64) -> Self {
        let end = (base.as_u64() as u128) + (length as u128);
        let first = (base.as_u64() as u128).div_ceil(PAGE_SIZE as u128);
        let end = end >> PAGE_SHIFT;
        Self::cut(first, end)
    }

    /// The frames that `length` bytes at `base` touch: for reserved memory.
    ///
    /// A range that passes the end of the physical space is cut off there.
    #[must_use]
    pub const fn touching(base: PhysAddr, length: u64) -> Self {
        let end = (base.as_u64() as u128) + (length as u128);
        let first = (base.as_u64() >> PAGE_SHIFT) as u128;
        let end = if length == 0 {
            first
        } else {
            end.div_ceil(PAGE_SIZE as u128)
        };
        Self::cut(first, end)
    }

    const fn cut(first: u128, end: u128) -> Self {
        let limit = Frame::LIMIT as u128;
        let end = if end > limit { limit } else { end };
        if first >= end {
            Self::EMPTY
        } else {
            Self {
                first: Frame(first as u64),
                count: (end - first) as u64,
            }
        }
    }

    /// The first frame; meaningless where the range is empty.
    #[must_use]
    pub const fn first(self) -> Frame {
        self.first
    }

    /// The number of frames.
    #[must_use]
    pub const fn count(self) -> u64 {
        self.count
    }

    /// Whether there are no frames.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.count == 0
    }

    /// One past the last frame's number: at most 2^52 (`I2`).
    #[must_use]
    pub const fn end_number(self) -> u64 {
        self.first.0 + self.count
    }

    /// The last frame; `None` where the range is empty.
    #[must_use]
    pub const fn last(self) -> Option<Frame> {
        match self.count {
            0 => None,
            n => Some(Frame(self.first.0 + n - 1)),
        }
    }

    /// Whether `frame` is in the range.
    #[must_use]
    pub const fn contains(self, frame: Frame) -> bool {
        frame.0 >= self.first.0 && frame.0 < self.end_number()
    }

    /// Whether every frame of `other` is in the range (an empty one always is).
    #[must_use]
    pub const fn contains_range(self, other: Self) -> bool {
        other.count == 0
            || (other.first.0 >= self.first.0 && other.end_number() <= self.end_number())
    }

    /// The frames in both ranges; empty where there are none.
    #[must_use]
    pub const fn intersection(self, other: Self) -> Self {
        let first = if self.first.0 > other.first.0 {
            self.first.0
        } else {
            other.first.0
        };
        let end = if self.end_number() < other.end_number() {
            self.end_number()
        } else {
            other.end_number()
        };
        if first >= end {
            Self::EMPTY
        } else {
            Self {
                first: Frame(first),
                count: end - first,
            }
        }
    }

    /// Cuts the range at frame number `at`: what is below, and what is at or above.
    #[must_use]
    pub const fn split_at(self, at: u64) -> (Self, Self) {
        let below = at.saturating_sub(self.first.0);
        let below = if below > self.count {
            self.count
        } else {
            below
        };
        (
            Self {
                first: self.first,
                count: below,
            },
            Self {
                first: Frame::from_number(self.first.0 + below),
                count: self.count - below,
            },
        )
    }

    /// The frames one by one, ascending.
    pub fn iter(self) -> impl DoubleEndedIterator<Item = Frame> + Clone {
        (self.first.0..self.end_number()).map(Frame)
    }

    /// The largest naturally aligned blocks that tile the range, ascending, orders <= `top`.
    #[must_use]
    pub fn blocks(self, top: Order) -> Blocks {
        Blocks { rest: self, top }
    }
}

impl fmt::Debug for FrameRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "FrameRange({:#x}..{:#x})",
            self.first.0,
            self.end_number()
        )
    }
}

/// Iterator over the naturally aligned blocks of a range; see [`FrameRange::blocks`].
#[derive(Clone, Debug)]
pub struct Blocks {
    rest: FrameRange,
    top: Order,
}

impl Iterator for Blocks {
    type Item = (Frame, Order);

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let first = self.rest.first;
        let aligned = first.0.trailing_zeros();
        let fits = self.rest.count.ilog2();
        let order = Order(aligned.min(fits).min(u32::from(self.top.0)) as u8);
        self.rest = self.rest.split_at(first.0 + order.frames()).1;
        Some((first, order))
    }
}
