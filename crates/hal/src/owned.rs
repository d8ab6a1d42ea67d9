//! Frames as affine values: who may free a frame, said by types.
//!
//! ```text
//!            alloc                 map                   unmap             commit
//!  FrameSource --> OwnedFrame --------> (a table entry) -------> Gather ----------> OwnedFrame --> FrameSink
//!                  can be freed         no value at all          not freeable       can be freed
//! ```
//!
//! An `OwnedFrame` can be freed or mapped, once. Mapping consumes it; while an entry or a TLB may still
//! translate to the frame, **no value exists** that could free it. Only a committed flush gives one back.
//! Decision record 004 tells the whole protocol.
//!
//! Invariants
//! - `I1`: at most one handle for a frame's ownership exists at a time: the type is neither `Copy` nor `Clone`,
//!   and every way to make one out of nothing is `unsafe`.
//! - `I2`: the block is naturally aligned: `frame.is_aligned(order)`.
//! - `I3`: dropping the value frees nothing: the block is leaked, never reused. That is sound, and the
//!   allocators' counts show it.

use core::fmt;

use crate::frame::{Frame, FrameRange, Order};

/// The sole ownership of a naturally aligned block of `2^order` frames.
///
/// # Examples
///
/// Freeing twice does not compile:
///
/// ```compile_fail,E0382
/// fn twice(sink: &impl kmem_hal::FrameSink, frame: kmem_hal::OwnedFrame) {
///     sink.free(frame);
///     sink.free(frame);
/// }
/// ```
#[must_use = "dropping an owned frame leaks it; free it or map it"]
#[derive(PartialEq, Eq)]
pub struct OwnedFrame {
    first: Frame,
    order: Order,
}

impl OwnedFrame {
    /// Makes an owner out of a block's number.
    ///
    /// # Safety
    ///
    /// - `O1`: the caller owns the block: nobody else holds a handle to it, maps it, or accesses it.
    /// - `O2`: `first` is aligned to `order`, and the block ends inside the frame space.
    /// - `O3`: no TLB of any CPU holds a translation to the block.
    #[inline]
    pub const unsafe fn from_raw(first: Frame, order: Order) -> Self {
        debug_assert!(first.is_aligned(order));
        Self { first, order }
    }

    /// Gives up ownership without freeing: the caller keeps the numbers and the duty.
    #[must_use = "the block is leaked unless the numbers are kept"]
    #[inline]
    pub const fn into_raw(self) -> (Frame, Order) {
        (self.first, self.order)
    }

    /// The first frame of the block.
    #[must_use]
    #[inline]
    pub const fn first(&self) -> Frame {
        self.first
    }

    /// The block's order.
    #[must_use]
    #[inline]
    pub const fn order(&self) -> Order {
        self.order
    }

    /// The frames of the block.
    #[must_use]
    pub const fn range(&self) -> FrameRange {
        match FrameRange::of_order(self.first, self.order) {
            Some(range) => range,
            // O2 keeps the block inside the space.
            None => FrameRange::EMPTY,
        }
    }

    /// Cuts the block into its lower and its upper half; gives it back at order 0.
    ///
    /// # Errors
    ///
    /// The block itself, where it is a single frame.
    pub const fn split(self) -> Result<(Self, Self), Self> {
        let Some(order) = self.order.get().checked_sub(1) else {
            return Err(self);
        };
        let (first, _) = self.into_raw();
        let Some(order) = Order::new(order) else {
            unreachable!()
        };
        let upper = Frame::from_number(first.number() + order.frames());
        Ok((
            Self { first, order },
            Self {
                first: upper,
                order,
            },
        ))
    }
}

impl fmt::Debug for OwnedFrame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "OwnedFrame({:#x}, order {})",
            self.first.number(),
            self.order
        )
    }
}

/// A value that a page-table entry can stand for while the frame is mapped.
///
/// A table maps one kind of handle. A kernel table maps [`OwnedFrame`]s; a user table of cow-mm maps counted
/// references to pages; a device window maps [`DeviceFrame`]s, which nobody owns. Mapping turns the handle into
/// numbers in an entry, and only a committed flush turns them back into the handle.
///
/// # Safety
///
/// - `H1`: `into_entry` gives up whatever the value stood for without releasing it, and the numbers are those of
///   a naturally aligned block.
/// - `H2`: `from_entry` applied to numbers that `into_entry` gave, once, makes an equal value.
pub unsafe trait FrameHandle: Sized {
    /// Turns the handle into the numbers that an entry holds.
    fn into_entry(self) -> (Frame, Order);

    /// Turns the numbers back into the handle.
    ///
    /// # Safety
    ///
    /// The numbers came from `into_entry` of this type, the entry that held them is gone, and every TLB that may
    /// have cached it has been flushed (`O3`). One handle is made for each entry.
    unsafe fn from_entry(first: Frame, order: Order) -> Self;
}

// SAFETY: H1, H2: ownership passes through the numbers, nothing is freed on the way.
unsafe impl FrameHandle for OwnedFrame {
    #[inline]
    fn into_entry(self) -> (Frame, Order) {
        self.into_raw()
    }

    #[inline]
    unsafe fn from_entry(first: Frame, order: Order) -> Self {
        // SAFETY: O1 and O2 hold since `into_entry` gave these numbers up; O3 is this function's contract.
        unsafe { Self::from_raw(first, order) }
    }
}

/// A block of physical addresses that nobody owns: device registers, firmware tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceFrame {
    first: Frame,
    order: Order,
}

impl DeviceFrame {
    /// The block at `first`; `None` if `first` is not aligned to `order`.
    #[must_use]
    #[inline]
    pub const fn new(first: Frame, order: Order) -> Option<Self> {
        if first.is_aligned(order) {
            Some(Self { first, order })
        } else {
            None
        }
    }

    /// The first frame of the block.
    #[must_use]
    #[inline]
    pub const fn first(self) -> Frame {
        self.first
    }

    /// The block's order.
    #[must_use]
    #[inline]
    pub const fn order(self) -> Order {
        self.order
    }
}

// SAFETY: H1, H2: the value is its numbers; nothing is owned.
unsafe impl FrameHandle for DeviceFrame {
    #[inline]
    fn into_entry(self) -> (Frame, Order) {
        (self.first, self.order)
    }

    #[inline]
    unsafe fn from_entry(first: Frame, order: Order) -> Self {
        Self { first, order }
    }
}
