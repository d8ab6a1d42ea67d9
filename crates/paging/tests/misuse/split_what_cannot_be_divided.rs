//! Unmapping may cut a huge leaf, so the handle must say that it can be divided.
//~ error[E0599]
//~ `Whole: Divisible`
use kmem_hal::{Frame, FrameHandle, Order, PageRange};
use kmem_paging::{Cursor, Env, Gather, format::X86_64};

struct Whole(Frame, Order);

// SAFETY: numbers in, numbers out.
unsafe impl FrameHandle for Whole {
    fn into_entry(self) -> (Frame, Order) {
        (self.0, self.1)
    }
    unsafe fn from_entry(first: Frame, order: Order) -> Self {
        Self(first, order)
    }
}

fn misuse<E: Env>(cursor: &mut Cursor<'_, X86_64, E, Whole>, range: PageRange, gather: &mut Gather<'_, X86_64, E, Whole>) {
    let _ = cursor.unmap(range, gather);
}

fn main() {}
