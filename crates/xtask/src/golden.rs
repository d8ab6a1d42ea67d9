//! `cargo xtask golden`: the public API of every published crate as a text file under `docs/api/`.
//!
//! A change of an API is thus a diff that a reviewer sees. rustdoc's JSON, which the list is made from, needs
//! nightly.

use std::path::Path;
use std::process::ExitCode;

use clap::Args;

use crate::EXIT_MISSING;
use crate::sh::{Shell, Stop, fail};
use crate::{tools, workspace};

/// What to do with the files.
#[derive(Args)]
pub struct Options {
    /// Write the files instead of comparing.
    #[arg(long)]
    bless: bool,
    /// Only these packages.
    packages: Vec<String>,
}

/// The subcommand.
pub fn main(root: &Path, options: &Options) -> ExitCode {
    match check(&mut Shell::terminal(root), options.bless, &options.packages) {
        Ok(packages) => {
            println!(
                "golden: {packages} crates {}",
                if options.bless { "written" } else { "agree" }
            );
            ExitCode::SUCCESS
        }
        Err(Stop::Missing(why)) => {
            eprintln!("golden: SKIPPED: {why}");
            ExitCode::from(EXIT_MISSING)
        }
        Err(Stop::Failed(why)) => {
            eprintln!("golden: FAILED: {why}");
            ExitCode::FAILURE
        }
    }
}

/// Compares (or writes) the files of the named packages, of all published ones when none is named; gives their
/// number.
///
/// # Errors
/// When a file differs, or nightly or the tool is missing.
pub fn check(shell: &mut Shell, bless: bool, only: &[String]) -> Result<usize, Stop> {
    tools::nightly(shell)?;
    let program = tools::PUBLIC_API.path(shell)?;
    let folder = shell.root().join("docs/api");
    std::fs::create_dir_all(&folder)?;
    let mut different = Vec::new();
    let mut checked = 0;
    for package in workspace::published(shell)? {
        if !only.is_empty() && !only.contains(&package.name) {
            continue;
        }
        checked += 1;
        let mut command = shell.command(&program);
        command.env("RUSTUP_TOOLCHAIN", "nightly");
        command.env("CARGO_TARGET_DIR", shell.root().join("target/public-api"));
        // Without blanket, automatic and derived implementations: they follow from the rest.
        command.args([
            "public-api",
            "--simplified",
            "--simplified",
            "--simplified",
            "-p",
            &package.name,
        ]);
        let now = shell.output(&mut command)?;
        let file = folder.join(format!("{}.txt", package.name));
        let before = std::fs::read_to_string(&file).unwrap_or_default();
        if bless {
            std::fs::write(&file, &now)?;
        } else if before != now {
            shell.say(format_args!("{} differs:", file.display()));
            for line in before
                .lines()
                .filter(|line| !now.lines().any(|other| other == *line))
            {
                shell.say(format_args!("- {line}"));
            }
            for line in now
                .lines()
                .filter(|line| !before.lines().any(|other| other == *line))
            {
                shell.say(format_args!("+ {line}"));
            }
            different.push(package.name);
        }
    }
    if different.is_empty() {
        return Ok(checked);
    }
    fail(format!(
        "the public API of {} changed (cargo xtask golden --bless, then review the diff)",
        different.join(", ")
    ))
}
