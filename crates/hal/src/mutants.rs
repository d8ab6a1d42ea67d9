//! Which fault on purpose is on, for the crates above: only in builds with `--cfg kmem_mutants`, and no part of the interface.
//!
//! A crate keeps a list of its faults and asks for each by name, with a macro of its own that is the constant `false` in every
//! other build.
//!
//! Invariants
//! - `I1`: a name that is not in a crate's list does not compile.
//!
//! Does not handle: more than one fault at a time in a crate.

// One word of the process, not of a model: a real atomic whatever the facade is.
use core::sync::atomic::{AtomicUsize, Ordering};

/// Faults: the name of each, and what it does.
pub type List = &'static [(&'static str, &'static str)];

/// The choice among a crate's faults.
#[derive(Debug)]
pub struct Choice {
    list: List,
    /// 1 + the place of the chosen fault, 0 for none.
    chosen: AtomicUsize,
}

impl Choice {
    /// No fault of these is on.
    #[must_use]
    pub const fn new(list: List) -> Self {
        Self {
            list,
            chosen: AtomicUsize::new(0),
        }
    }

    /// Turns the fault of this name on, and every other one off; `""` turns all off.
    ///
    /// # Panics
    ///
    /// Where there is no such fault.
    pub fn select(&self, name: &str) {
        let chosen = if name.is_empty() {
            0
        } else {
            let place = self.list.iter().position(|mutant| mutant.0 == name);
            1 + place.unwrap_or_else(|| panic!("no mutant {name:?}"))
        };
        self.chosen.store(chosen, Ordering::SeqCst);
    }

    /// Whether the fault of this [`number`] is on.
    #[inline]
    #[must_use]
    pub fn is(&self, number: usize) -> bool {
        self.chosen.load(Ordering::Relaxed) == number
    }
}

/// 1 + the place of a name in a list.
///
/// # Panics
///
/// Where it has none: the compiler says so, in a constant (`I1`).
#[must_use]
pub const fn number(list: List, name: &str) -> usize {
    let mut place = 0;
    while place < list.len() {
        if same(list[place].0.as_bytes(), name.as_bytes()) {
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
