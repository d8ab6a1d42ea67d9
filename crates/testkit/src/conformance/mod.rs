//! The conformance suite: does a kernel keep hal's contracts?
//!
//! A kernel author runs it against the own implementation of each trait, on a host, under the mock machine, or in a kernel's
//! test image. Each module checks one trait; each failure names the clause that was broken, as the trait's documentation and
//! the book number it.
//!
//! ```
//! use kmem_testkit::conformance::{HostThreads, Report, phys_map, raw_lock};
//! use kmem_testkit::Arena;
//! use kmem_hal::Spin;
//!
//! let report = Report::new();
//! let arena = Arena::new(16);
//! // SAFETY: the arena's frames are ours.
//! unsafe { phys_map::check(&report, &arena, arena.range()) };
//! raw_lock::check::<Spin>(&report, &HostThreads::new(2), None);
//! report.assert_ok();
//! println!("{report}");
//! ```
//!
//! What a suite cannot see it does not claim: [`Report::not_checked`] lists those clauses. A pass is evidence, not proof; the
//! clauses about memory order (`C5`, `K2`, `R3`, `S2`, `G3`) show on strongly ordered hosts only in builds with `--cfg loom`,
//! where the suite runs as it is.

pub mod clock;
pub mod contexts;
pub mod cpu;
pub mod cpu_call;
pub mod frame_handle;
pub mod frame_source;
pub mod grace;
pub mod large_source;
pub mod mmu;
pub mod object_alloc;
pub mod pages;
pub mod phys_map;
pub mod raw_lock;
pub mod raw_sleep_lock;
pub mod user_access;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

#[cfg(loom)]
pub use contexts::LoomThreads;
pub use contexts::{Contexts, HostThreads};

/// A clause that was found broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The trait, such as `Cpu`.
    pub subject: &'static str,
    /// The clause, such as `C2`.
    pub contract: &'static str,
    /// What was seen.
    pub found: String,
    /// How often.
    pub times: u64,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ({}", self.contract, self.found, self.subject)?;
        if self.times > 1 {
            write!(f, ", {} times", self.times)?;
        }
        f.write_str(")")
    }
}

type Clause = (&'static str, &'static str);

#[derive(Debug, Default)]
struct Results {
    checks: BTreeMap<Clause, u64>,
    failures: Vec<Failure>,
    skipped: Vec<(Clause, &'static str)>,
}

/// What the checks found. Shared by the contexts of a check.
#[derive(Debug, Default)]
pub struct Report {
    results: Mutex<Results>,
}

impl Report {
    /// A report of nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn results(&self) -> MutexGuard<'_, Results> {
        self.results.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that clause `contract` of `subject` was checked, and where `holds` is false, what was found.
    ///
    /// Gives `holds`. Public, so that a kernel can add checks of its own.
    pub fn check(
        &self,
        subject: &'static str,
        contract: &'static str,
        holds: bool,
        found: impl FnOnce() -> String,
    ) -> bool {
        let mut results = self.results();
        *results.checks.entry((subject, contract)).or_default() += 1;
        if !holds {
            let known = results
                .failures
                .iter_mut()
                .find(|failure| failure.subject == subject && failure.contract == contract);
            if let Some(failure) = known {
                failure.times += 1;
            } else {
                results.failures.push(Failure {
                    subject,
                    contract,
                    found: found(),
                    times: 1,
                });
            }
        }
        holds
    }

    /// Notes that a clause was not checked, and why.
    pub fn skip(&self, subject: &'static str, contract: &'static str, why: &'static str) {
        self.results().skipped.push(((subject, contract), why));
    }

    /// The clauses found broken, each once.
    #[must_use]
    pub fn failures(&self) -> Vec<Failure> {
        self.results().failures.clone()
    }

    /// Whether this clause of this trait was found broken.
    #[must_use]
    pub fn fails(&self, subject: &str, contract: &str) -> bool {
        self.results()
            .failures
            .iter()
            .any(|failure| failure.subject == subject && failure.contract == contract)
    }

    /// The clauses that were put to the test, with how many checks.
    #[must_use]
    pub fn checked(&self) -> Vec<(&'static str, &'static str, u64)> {
        self.results()
            .checks
            .iter()
            .map(|(&(subject, contract), &times)| (subject, contract, times))
            .collect()
    }

    /// The clauses that were not, and why.
    #[must_use]
    pub fn not_checked(&self) -> Vec<(&'static str, &'static str, &'static str)> {
        self.results()
            .skipped
            .iter()
            .map(|&((subject, contract), why)| (subject, contract, why))
            .collect()
    }

    /// Panics with every broken clause, if there is one.
    ///
    /// # Panics
    ///
    /// Where a clause was found broken.
    #[track_caller]
    pub fn assert_ok(&self) {
        let broken = !self.results().failures.is_empty();
        assert!(!broken, "broken contracts:\n{self}");
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let results = self.results();
        for failure in &results.failures {
            writeln!(f, "{failure}")?;
        }
        for (&(subject, contract), times) in &results.checks {
            let broken = results
                .failures
                .iter()
                .any(|failure| (failure.subject, failure.contract) == (subject, contract));
            if !broken {
                writeln!(f, "{contract}: holds ({subject}, {times} checks)")?;
            }
        }
        for ((subject, contract), why) in &results.skipped {
            writeln!(f, "{contract}: not checked, {why} ({subject})")?;
        }
        Ok(())
    }
}
