//! Figures held against a recount, and what did not hold.
//!
//! Invariants: I1: every check that was made is printed, equal or not. I2: [`Checks::all_held`] is true only if every one
//! of them held. I3: a figure and its recount come from different places; the caller names both.

use super::units::grouped;
use core::fmt::Write;

/// One check, as it is printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// What is checked.
    pub what: String,
    /// What the figure is, and where from.
    pub figure: String,
    /// What the recount gives.
    pub recount: String,
    /// Where the recount comes from.
    pub from: String,
    /// Whether it held.
    pub held: bool,
}

/// All checks of a run.
#[derive(Debug, Default)]
pub struct Checks {
    all: Vec<Check>,
    quiet: bool,
}

impl Checks {
    /// Starts without any; prints each check as it is made.
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts without any; prints nothing.
    pub fn quiet() -> Self {
        Self {
            all: Vec::new(),
            quiet: true,
        }
    }

    /// Holds a number against its recount.
    pub fn equal(&mut self, what: &str, figure: u64, recount: u64, unit: &str, from: &str) -> bool {
        let unit = if unit.is_empty() {
            String::new()
        } else {
            format!(" {unit}")
        };
        self.push(
            what,
            format!("{}{unit}", grouped(figure)),
            format!("{}{unit}", grouped(recount)),
            from,
            figure == recount,
        )
    }

    /// Holds an address against what it should be.
    pub fn address(&mut self, what: &str, figure: u64, wanted: u64, from: &str) -> bool {
        self.push(
            what,
            format!("{figure:#x}"),
            format!("{wanted:#x}"),
            from,
            figure == wanted,
        )
    }

    /// Notes whether something that is no number held.
    pub fn holds(&mut self, what: &str, held: bool, expected: &str, found: &str) -> bool {
        self.push(what, found.to_string(), expected.to_string(), "", held)
    }

    fn push(
        &mut self,
        what: &str,
        figure: String,
        recount: String,
        from: &str,
        held: bool,
    ) -> bool {
        let check = Check {
            what: what.into(),
            figure,
            recount,
            from: from.into(),
            held,
        };
        if !self.quiet {
            say!("{}", line(&check));
        }
        self.all.push(check);
        held
    }

    /// Returns whether every check held.
    pub fn all_held(&self) -> bool {
        self.all.iter().all(|c| c.held)
    }

    /// Returns the checks in the order in which they were made.
    pub fn all(&self) -> &[Check] {
        &self.all
    }

    /// Returns how many checks did not hold.
    pub fn broken(&self) -> usize {
        self.all.iter().filter(|c| !c.held).count()
    }
}

/// Prints a check on one line.
pub fn line(c: &Check) -> String {
    let verdict = if c.held { "equal" } else { "DIFFERS" };
    let mut out = format!(
        "        {:<36} {:>18}  recount {:>18}  {verdict}",
        c.what, c.figure, c.recount
    );
    if !c.from.is_empty() {
        let _ = write!(out, "  ({})", c.from);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_differs_spoils_all() {
        let mut c = Checks::quiet();
        assert!(c.equal("MemTotal", 1000, 1000, "kB", "zones"));
        assert!(c.all_held());
        assert!(!c.equal("MemFree", 1000, 999, "kB", "free lists"));
        assert!(!c.all_held());
        assert_eq!(c.broken(), 1);
        assert!(line(&c.all()[1]).ends_with("DIFFERS  (free lists)"));
        assert!(line(&c.all()[0]).contains("1 000 kB"));
        assert!(!c.holds("bytes", false, "equal to the file", "page 7 differs"));
    }
}
