//! The machine that the tests run on: which kernel it has, and what a test says that it cannot ask of it.

use std::io::Write as _;

/// Writes to the standard error past the test harness, which shows nothing of tests that pass.
pub fn say(text: &str) {
    // That nobody hears it is no reason to fail.
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Says what is not tested here, and why.
pub fn skipped(why: &str) {
    say(&format!("SKIPPED: {why}\n"));
}

/// The running kernel's release as numbers.
#[cfg(target_os = "linux")]
pub fn release() -> (u32, u32) {
    let text = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = text
        .split(|c: char| !c.is_ascii_digit())
        .map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}
