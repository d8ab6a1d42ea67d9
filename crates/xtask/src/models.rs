//! The builds that check concurrency and cost: loom, shuttle, counting, AddressSanitizer.
//!
//! Each is a build of its own, in a target folder of its own, because its flags reach every crate. A crate takes part
//! by holding tests for it, and the gate finds them by these rules:
//!
//! * `tests/loom*.rs` (`shuttle*.rs`, `counting*.rs`): every test of such a file;
//! * a module whose path contains `loom` (`shuttle`, `counting`) under `src/`: the tests of that module.
//!
//! A build that finds a file and runs no test from it is a failure: the tests were configured out.

use std::path::Path;

use crate::book::files_with;
use crate::sh::{Shell, Stop, fail};
use crate::tools;
use crate::workspace::{self, Package};

/// A kind of test build.
pub struct Build {
    /// The name in files and modules.
    pub word: &'static str,
    /// What rustc is told.
    pub flags: &'static str,
}

/// Every interleaving and reordering of small models.
pub const LOOM: Build = Build {
    word: "loom",
    flags: "--cfg loom",
};
/// Random schedules of larger models.
pub const SHUTTLE: Build = Build {
    word: "shuttle",
    flags: "--cfg shuttle",
};
/// Locked instructions and stores to shared lines, counted.
pub const COUNTING: Build = Build {
    word: "counting",
    flags: "--cfg kmem_counting",
};

/// Runs the tests of one build; gives how many passed.
///
/// # Errors
/// When one fails, or a file's tests are all configured out.
pub fn run(shell: &mut Shell, build: &Build) -> Result<String, Stop> {
    let (mut tests, mut crates) = (0, Vec::new());
    for package in workspace::members(shell)? {
        let files = test_files(&package, build.word);
        let module = has_module(&package.folder.join("src"), build.word);
        if !files.is_empty() {
            let mut command = command(shell, build, &package);
            for file in &files {
                command.args(["--test", file]);
            }
            tests += passed(shell, &mut command, &package)?;
        }
        if module {
            let mut command = command(shell, build, &package);
            command.args(["--lib", build.word]);
            tests += passed(shell, &mut command, &package)?;
        }
        if module || !files.is_empty() {
            crates.push(package.name);
        }
    }
    if crates.is_empty() {
        return Err(Stop::Missing(format!(
            "no crate has {} tests yet",
            build.word
        )));
    }
    Ok(format!("{tests} tests of {}", crates.join(" ")))
}

fn command(shell: &Shell, build: &Build, package: &Package) -> std::process::Command {
    let mut command = shell.cargo(["test", "--release", "-p", &package.name, "--target-dir"]);
    command
        .arg(format!("target/{}", build.word))
        .env("RUSTFLAGS", build.flags);
    // Models run for seconds with optimisations and for minutes without; line tables are enough for a report.
    command.env("CARGO_PROFILE_RELEASE_DEBUG", "line-tables-only");
    command.env("CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS", "true");
    command
}

fn passed(
    shell: &mut Shell,
    command: &mut std::process::Command,
    package: &Package,
) -> Result<u32, Stop> {
    let text = shell.output(command)?;
    match count_passed(&text) {
        0 => fail(format!("{}: no test ran", package.name)),
        n => Ok(n),
    }
}

/// The sum of what cargo's test harnesses say passed.
pub fn count_passed(text: &str) -> u32 {
    let counts = text
        .lines()
        .filter_map(|line| line.strip_prefix("test result: ok. ")?.split(' ').next());
    counts.filter_map(|count| count.parse::<u32>().ok()).sum()
}

fn test_files(package: &Package, word: &str) -> Vec<String> {
    let files = std::fs::read_dir(package.folder.join("tests"))
        .into_iter()
        .flatten()
        .flatten();
    let names =
        files.filter_map(|file| Some(file.file_name().to_str()?.strip_suffix(".rs")?.to_owned()));
    let mut names: Vec<String> = names.filter(|name| name.starts_with(word)).collect();
    names.sort();
    names
}

/// Whether a module below `folder` has tests of the kind: its file has the word in its path, or it declares a module
/// of such a name, and somewhere in the file stands `#[test]`.
fn has_module(folder: &Path, word: &str) -> bool {
    files_with(folder, "rs").iter().any(|path| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let inside = path
            .strip_prefix(folder)
            .unwrap_or(path)
            .to_string_lossy()
            .contains(word);
        let declared = text.lines().any(|line| {
            let line = line
                .trim_start()
                .trim_start_matches("pub ")
                .trim_start_matches("pub(crate) ");
            line.strip_prefix("mod ")
                .is_some_and(|name| name.contains(word) && name.contains('{'))
        });
        text.contains("#[test]") && (inside || declared)
    })
}

/// Runs the unit and integration tests of the library crates under AddressSanitizer.
///
/// # Errors
/// When a test fails or nightly is missing.
pub fn address_sanitizer(shell: &mut Shell) -> Result<String, Stop> {
    tools::nightly(shell)?;
    // An explicit target keeps the flag away from build scripts and procedural macros.
    let mut command = shell.cargo([
        "+nightly",
        "test",
        "--target",
        "x86_64-unknown-linux-gnu",
        "--lib",
        "--tests",
    ]);
    for package in workspace::published(shell)? {
        command.args(["-p", &package.name]);
    }
    command
        .args(["--target-dir", "target/asan"])
        .env("RUSTFLAGS", "-Zsanitizer=address --cfg kmem_asan");
    // Lines are what a report names; whole debug information takes a third of the build's time.
    command.env("CARGO_PROFILE_DEV_DEBUG", "line-tables-only");
    // Leaks are counted by the tests themselves, frame by frame; LeakSanitizer would need ptrace.
    command.env("ASAN_OPTIONS", "detect_leaks=0");
    let text = shell.output(&mut command)?;
    match count_passed(&text) {
        0 => fail("no test ran"),
        n => Ok(format!("{n} tests")),
    }
}
