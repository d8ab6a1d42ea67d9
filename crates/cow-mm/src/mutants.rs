//! Faults on purpose: `mutant!("name")` is `true` where a test has chosen that fault, and the constant `false` in every build
//! without `--cfg kmem_mutants`, so that nothing of it is left there.
//!
//! A fault is one line of logic turned: a flush forgotten, a frame given back early, a bit lost. The tests choose one at run
//! time (`select`), run, and must notice. The list, and who notices what, is in docs/mutants.md.
//!
//! Invariants
//! - `I1`: every name that the sources ask for is in `ALL`: another one does not compile.
//!
//! Does not handle: more than one fault at a time.

/// Whether the fault of this name is on.
#[cfg(not(kmem_mutants))]
macro_rules! mutant {
    ($name:literal) => {
        $crate::mutants::OFF
    };
}

/// A constant, and no literal for the lints to fold.
#[cfg(not(kmem_mutants))]
pub(crate) const OFF: bool = false;

/// Whether the fault of this name is on.
#[cfg(kmem_mutants)]
macro_rules! mutant {
    ($name:literal) => {
        $crate::mutants::CHOICE.is(const { kmem_hal::mutants::number($crate::mutants::ALL, $name) })
    };
}

pub(crate) use mutant;

/// Every fault: its name, and what it does.
#[cfg(kmem_mutants)]
pub const ALL: kmem_hal::mutants::List = include!("mutants.in");

#[cfg(kmem_mutants)]
pub(crate) static CHOICE: kmem_hal::mutants::Choice = kmem_hal::mutants::Choice::new(ALL);

/// Turns the fault of this name on, and every other one off; `""` turns all off.
///
/// # Panics
///
/// Where there is no such fault.
#[cfg(kmem_mutants)]
pub fn select(name: &str) {
    CHOICE.select(name);
}
