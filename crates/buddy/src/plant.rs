//! Faults on purpose: orderings that a loom model may leave out, to see that it would notice. Nothing of this is in any other build.

extern crate std;

use core::cell::Cell;

/// An ordering that is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plant {
    /// Whoever changes the reserved list does not say so before the change.
    ReservedWriterUnfenced,
    /// Whoever looks at the reserved list looks at its version too early.
    ReservedReaderUnfenced,
    /// The reserved list's version is even while it changes.
    ReservedVersionEven,
}

std::thread_local! {
    // The threads of a model are coroutines of one thread of the host.
    static PLANTED: Cell<Option<Plant>> = const { Cell::new(None) };
}

/// Plants a fault in all models that this thread runs from now on.
pub fn plant(fault: Plant) {
    PLANTED.set(Some(fault));
}

/// Whether the fault is planted.
pub(crate) fn is(fault: Plant) -> bool {
    PLANTED.get() == Some(fault)
}
