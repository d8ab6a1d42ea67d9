//! Faults on purpose: a build of the page tables in which a test chooses one fault at a time, and the trials on the mock
//! machine that must notice each.

use std::path::Path;
use std::process::ExitCode;

use clap::Args;

use crate::sh::{Shell, Stop, fail};

/// What `cargo xtask mutants` is told.
#[derive(Args)]
pub struct Options {
    /// Also runs the trials on a machine without TLBs, to see what they would have missed.
    #[arg(long)]
    compare: bool,
}

/// `cargo xtask mutants`.
pub fn main(root: &Path, options: &Options) -> ExitCode {
    let mut shell = Shell::terminal(root);
    let done = check(&mut shell).and_then(|summary| {
        shell.say(summary);
        if options.compare {
            let mut command = tests(&shell);
            command.args(["--ignored", "--exact", "without_stale_translations"]);
            shell.run(&mut command)?;
        }
        Ok(())
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(stop) => {
            eprintln!("{stop}");
            ExitCode::FAILURE
        }
    }
}

fn tests(shell: &Shell) -> std::process::Command {
    let mut command = shell.cargo([
        "test",
        "--release",
        "-p",
        "kmem-paging",
        "-p",
        "kmem-cow-mm",
        "--test",
        "mutants",
    ]);
    command
        .args(["--target-dir", "target/mutants", "--", "--nocapture"])
        .args(["--test-threads", "1"])
        .env("RUSTFLAGS", "--cfg kmem_mutants");
    command
}

/// Every fault must be noticed.
pub fn check(shell: &mut Shell) -> Result<String, Stop> {
    let mut command = tests(shell);
    let text = shell.output(&mut command)?;
    let summaries: Vec<_> = text
        .lines()
        .filter(|line| line.contains("mutants noticed in"))
        .map(str::trim)
        .collect();
    match summaries.len() {
        2 => Ok(summaries.join("; ")),
        _ => fail("the trials of a crate ran no mutant"),
    }
}
