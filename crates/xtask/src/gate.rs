//! `cargo xtask gate`: runs the steps of [`steps`](crate::steps), each timed and named, and says at the end what
//! passed, what failed and, loudly, what was skipped.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;

use crate::sh::{Shell, Stop};
use crate::steps::{STEPS, Step};

/// Lines of a failed step's log that are printed.
const TAIL: usize = 60;

/// What to run.
#[derive(Args)]
pub struct Options {
    /// Run only these steps.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Leave out these steps.
    #[arg(long, value_delimiter = ',')]
    skip: Vec<String>,
    /// Stop at the first failure.
    #[arg(long)]
    fail_fast: bool,
    /// Count a skipped step as a failure.
    #[arg(long)]
    strict: bool,
    /// List the steps and end.
    #[arg(long)]
    list: bool,
    /// Seconds for each fuzz target.
    #[arg(long, default_value_t = 10)]
    fuzz_seconds: u32,
}

/// What a step is given.
pub struct Gate {
    /// Runs commands, logging them.
    pub shell: Shell,
    /// Seconds for each fuzz target.
    pub fuzz_seconds: u32,
}

/// How a step ended.
enum Outcome {
    Passed(String),
    Failed(String),
    Skipped(String),
}

/// Runs the gate.
pub fn run(root: &Path, options: &Options) -> ExitCode {
    if options.list {
        for step in STEPS {
            println!("{:<10} {}", step.name, step.what);
        }
        return ExitCode::SUCCESS;
    }
    for name in options.only.iter().chain(&options.skip) {
        if !STEPS.iter().any(|step| step.name == name) {
            eprintln!("gate: there is no step {name}; see --list");
            return ExitCode::from(2);
        }
    }
    let logs = root.join("target/gate");
    let begin = Instant::now();
    let mut done: Vec<(&Step, Outcome, Duration)> = Vec::new();
    for step in STEPS {
        let left_out = options.skip.iter().any(|name| name == step.name);
        if left_out
            || !(options.only.is_empty() || options.only.iter().any(|name| name == step.name))
        {
            if left_out {
                done.push((
                    step,
                    Outcome::Skipped("asked for with --skip".into()),
                    Duration::ZERO,
                ));
            }
            continue;
        }
        println!("gate: {} ({})", step.name, step.what);
        let start = Instant::now();
        let outcome = one(
            root,
            &logs.join(format!("{}.log", step.name)),
            step,
            options,
        );
        let took = start.elapsed();
        match &outcome {
            Outcome::Passed(note) => println!(
                "gate: {} passed in {:.1} s {note}",
                step.name,
                took.as_secs_f32()
            ),
            Outcome::Skipped(why) => println!("gate: {} SKIPPED: {why}", step.name),
            Outcome::Failed(why) => println!("gate: {} FAILED: {why}", step.name),
        }
        let failed = matches!(outcome, Outcome::Failed(_));
        done.push((step, outcome, took));
        if failed && options.fail_fast {
            break;
        }
    }
    summary(&done, begin.elapsed(), options.strict)
}

fn one(root: &Path, log: &Path, step: &Step, options: &Options) -> Outcome {
    let shell = match Shell::logged(root, log) {
        Ok(shell) => shell,
        Err(error) => return Outcome::Failed(format!("{}: {error}", log.display())),
    };
    let mut gate = Gate {
        shell,
        fuzz_seconds: options.fuzz_seconds,
    };
    match (step.run)(&mut gate) {
        Ok(note) => Outcome::Passed(note),
        Err(Stop::Missing(why)) => Outcome::Skipped(why),
        Err(Stop::Failed(why)) => {
            let text = gate.shell.text();
            let lines: Vec<&str> = text.lines().collect();
            for line in &lines[lines.len().saturating_sub(TAIL)..] {
                println!("    | {line}");
            }
            println!("    the whole log: {}", log.display());
            Outcome::Failed(why)
        }
    }
}

fn summary(done: &[(&Step, Outcome, Duration)], took: Duration, strict: bool) -> ExitCode {
    println!("\ngate: summary");
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for (step, outcome, took) in done {
        let (word, note) = match outcome {
            Outcome::Passed(note) => {
                passed += 1;
                ("passed", note)
            }
            Outcome::Failed(why) => {
                failed += 1;
                ("FAILED", why)
            }
            Outcome::Skipped(why) => {
                skipped += 1;
                ("SKIPPED", why)
            }
        };
        println!(
            "  {:<10} {word:<8} {:>7.1} s  {note}",
            step.name,
            took.as_secs_f32()
        );
    }
    println!(
        "gate: {passed} passed, {failed} failed, {skipped} skipped in {:.0} s",
        took.as_secs_f32()
    );
    if skipped > 0 {
        println!(
            "gate: WARNING: {skipped} step(s) did not run; what they check is NOT known to hold"
        );
    }
    if failed > 0 || strict && skipped > 0 {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}
