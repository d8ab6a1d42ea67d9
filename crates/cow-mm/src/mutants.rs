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
        $crate::mutants::is(const { $crate::mutants::number($name) })
    };
}

pub(crate) use mutant;

#[cfg(kmem_mutants)]
pub use selector::{ALL, select};
#[cfg(kmem_mutants)]
pub(crate) use selector::{is, number};

#[cfg(kmem_mutants)]
mod selector {
    // One word of the process, not of a model: a real atomic whatever the facade is.
    use core::sync::atomic::{AtomicUsize, Ordering};

    /// Every fault: its name, and what it does.
    pub const ALL: &[(&str, &str)] = include!("mutants.in");

    /// 1 + the place of the chosen fault, 0 for none.
    static CHOSEN: AtomicUsize = AtomicUsize::new(0);

    /// Turns the fault of this name on, and every other one off; `""` turns all off.
    ///
    /// # Panics
    ///
    /// Where there is no such fault.
    pub fn select(name: &str) {
        let chosen = if name.is_empty() {
            0
        } else {
            let place = ALL.iter().position(|mutant| mutant.0 == name);
            1 + place.unwrap_or_else(|| panic!("no mutant {name:?}"))
        };
        CHOSEN.store(chosen, Ordering::SeqCst);
    }

    #[inline]
    pub(crate) fn is(number: usize) -> bool {
        CHOSEN.load(Ordering::Relaxed) == number
    }

    /// 1 + the place of a name in `ALL`; does not compile where it has none (`I1`).
    pub(crate) const fn number(name: &str) -> usize {
        let mut place = 0;
        while place < ALL.len() {
            if same(ALL[place].0.as_bytes(), name.as_bytes()) {
                return 1 + place;
            }
            place += 1;
        }
        panic!("this mutant is not in the list")
    }

    const fn same(a: &[u8], b: &[u8]) -> bool {
        if a.len() != b.len() {
            return false;
        }
        let mut at = 0;
        while at < a.len() {
            if a[at] != b[at] {
                return false;
            }
            at += 1;
        }
        true
    }
}
