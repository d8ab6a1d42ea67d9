//! The suite itself under test: implementations that keep a contract pass, and for each clause one that breaks it
//! fails, with a message that names the clause.
#![cfg(not(any(loom, shuttle)))]

mod concurrent;
mod frames;
mod memory;
mod mmu;

use kmem_testkit::conformance::Report;

/// The clause is among those found broken, and its message says so.
#[track_caller]
fn names(report: &Report, subject: &str, contract: &str) {
    let failures = report.failures();
    let found = failures
        .iter()
        .find(|failure| failure.subject == subject && failure.contract == contract);
    let Some(failure) = found else {
        panic!("{subject} {contract} was broken and not found:\n{report}");
    };
    let message = failure.to_string();
    assert!(
        message.starts_with(&format!("{contract}: ")) && message.contains(subject),
        "{message}"
    );
    assert!(report.to_string().contains(&message));
}

#[test]
#[should_panic(expected = "C2: two contexts")]
fn assert_ok_panics_with_the_clause() {
    let report = Report::new();
    report.check("Cpu", "C1", true, String::new);
    report.check("Cpu", "C2", false, || "two contexts".into());
    report.assert_ok();
}

#[test]
fn a_report_counts_and_lists_what_was_not_checked() {
    let report = Report::new();
    for _ in 0..3 {
        report.check("Cpu", "C2", false, || "first message".into());
    }
    report.skip("Grace", "G4", "because");
    assert_eq!(report.failures()[0].times, 3);
    assert_eq!(report.checked(), [("Cpu", "C2", 3)]);
    assert_eq!(report.not_checked(), [("Grace", "G4", "because")]);
    assert_eq!(
        report.to_string(),
        "C2: first message (Cpu, 3 times)\nG4: not checked, because (Grace)\n"
    );
}
