//! Checks of [`FrameHandle`], clauses `H1` and `H2`.

use kmem_hal::FrameHandle;

use super::Report;

const NAME: &str = "FrameHandle";

/// Checks a kind of handle with what `make` makes; `release` takes it back, and `alive` counts the handles whose frames are
/// not released.
pub fn check<H: FrameHandle>(
    report: &Report,
    make: impl Fn() -> H,
    release: impl Fn(H),
    alive: impl Fn() -> usize,
) {
    let before = alive();
    let handle = make();
    let made = alive();
    let (first, order) = handle.into_entry();
    report.check(NAME, "H1", first.is_aligned(order), || {
        format!("{first:?} is not aligned to order {order}")
    });
    report.check(NAME, "H1", alive() == made, || {
        "into_entry released what the handle stood for".into()
    });
    // SAFETY: the numbers are from `into_entry`, used once, and no entry or TLB ever held them.
    let handle = unsafe { H::from_entry(first, order) };
    report.check(NAME, "H2", alive() == made, || {
        "from_entry made another handle than the one that was given up".into()
    });
    let numbers = handle.into_entry();
    report.check(NAME, "H2", numbers == (first, order), || {
        format!(
            "the numbers changed from {:?} to {numbers:?} on the way",
            (first, order)
        )
    });
    // SAFETY: as above.
    release(unsafe { H::from_entry(numbers.0, numbers.1) });
    report.check(NAME, "H2", alive() == before, || {
        "one handle went in and out of an entry; releasing it did not release one".into()
    });
}
