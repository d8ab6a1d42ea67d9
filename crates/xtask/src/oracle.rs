//! `cargo xtask oracle`: replays the recorded runs of Linux and holds the result against a list.
//!
//! The list names the files that passed when it was written. A file on it that fails is a failure; one that passes and
//! is not on it is said, so that `--bless` can add it. The list never shrinks by itself.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::ExitCode;

use clap::Args;

use crate::book::files_with;
use crate::sh::{Shell, Stop, fail};

const DATA: &str = "crates/kmem-cli/data/oracle";
const LIST: &str = "crates/kmem-cli/data/oracle/expected-pass.txt";

/// What to do with the list.
#[derive(Args)]
pub struct Options {
    /// Add what passes now to the list.
    #[arg(long)]
    bless: bool,
}

/// The subcommand.
pub fn main(root: &Path, options: &Options) -> ExitCode {
    match check(&mut Shell::terminal(root), options.bless) {
        Ok(note) => {
            println!("oracle: {note}");
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("oracle: FAILED: {why}");
            ExitCode::FAILURE
        }
    }
}

/// Replays every file.
///
/// # Errors
/// When a file on the list does not pass.
pub fn check(shell: &mut Shell, bless: bool) -> Result<String, Stop> {
    let root = shell.root().to_owned();
    let mut files = files_with(&root.join(DATA), "gz");
    files.extend(files_with(&root.join(DATA), "txt"));
    let list = root.join(LIST);
    files.retain(|file| *file != list);
    shell.run(&mut shell.cargo(["build", "--release", "-p", "kmem-cli"]))?;
    let mut replay = shell.command(root.join("target/release/kmem"));
    replay.arg("replay").args(&files);
    let (status, text) = shell.outcome(&mut replay)?;
    // 1: some file failed. Anything else than 0 and 1 means that the replay itself broke.
    if !matches!(status.code(), Some(0 | 1)) {
        return fail(format!("kmem replay: {status}"));
    }
    let passed: BTreeSet<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("PASS ")?.split(' ').next())
        .collect();
    let before = std::fs::read_to_string(&list).unwrap_or_default();
    let expected: BTreeSet<&str> = before
        .lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty())
        .collect();
    let lost: Vec<&str> = expected.difference(&passed).copied().collect();
    let gained: Vec<&str> = passed.difference(&expected).copied().collect();
    if !lost.is_empty() {
        return fail(format!("passed before and not now: {}", lost.join(" ")));
    }
    if bless {
        let mut now = String::from(
            "# Recorded runs that kmem reproduces; `cargo xtask oracle --bless` adds to it.\n",
        );
        for name in &passed {
            now += name;
            now.push('\n');
        }
        std::fs::write(&list, now)?;
    }
    let news = match gained.len() {
        0 => String::new(),
        n if bless => format!(", {n} of them new on the list"),
        n => format!("; {n} of them are not on the list yet (cargo xtask oracle --bless)"),
    };
    Ok(format!(
        "{} of {} recorded runs reproduced{news}",
        passed.len(),
        files.len()
    ))
}
