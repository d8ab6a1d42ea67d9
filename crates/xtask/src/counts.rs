//! `cargo xtask counts`: instructions per workload, counted by callgrind, against the committed figures.
//!
//! The counts are the same from run to run, and they depend on the compiler: the file names the one it was made with.
//! With another one the comparison is skipped, loudly.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use clap::Args;

use crate::EXIT_MISSING;
use crate::sh::{Shell, Stop, fail};

const FIGURES: &str = "docs/figures/instructions.txt";
/// By how much a count may grow, in per cent.
const TOLERANCE: u64 = 2;

/// What to do with the figures.
#[derive(Args)]
pub struct Options {
    /// Write the figures instead of comparing.
    #[arg(long)]
    bless: bool,
}

/// The subcommand.
pub fn main(root: &Path, options: &Options) -> ExitCode {
    match check(&mut Shell::terminal(root), options.bless) {
        Ok(note) => {
            println!("counts: {note}");
            ExitCode::SUCCESS
        }
        Err(Stop::Missing(why)) => {
            eprintln!("counts: SKIPPED: {why}");
            ExitCode::from(EXIT_MISSING)
        }
        Err(Stop::Failed(why)) => {
            eprintln!("counts: FAILED: {why}");
            ExitCode::FAILURE
        }
    }
}

/// Counts every workload and compares, or writes the figures.
///
/// # Errors
/// When a count grew beyond the tolerance, a workload is not in the file or the file names one that is gone; when
/// valgrind is missing or the compiler is another one.
pub fn check(shell: &mut Shell, bless: bool) -> Result<String, Stop> {
    shell.run(shell.command("valgrind").arg("--version"))?;
    shell.run(&mut shell.cargo([
        "build",
        "--release",
        "-p",
        "kmem-benches",
        "--bin",
        "counts",
    ]))?;
    let program = shell.root().join("target/release/counts");
    let names = shell.output(&mut shell.command(&program))?;
    let compiler = shell
        .output(shell.command("rustc").arg("--version"))?
        .trim()
        .to_owned();
    let mut now = BTreeMap::new();
    for name in names.lines() {
        now.insert(name.to_owned(), count(shell, &program, name)?);
    }
    let path = shell.root().join(FIGURES);
    if bless {
        let mut text = format!(
            "# Instructions for 1000 operations, counted by callgrind; made with {compiler}\n"
        );
        for (name, count) in &now {
            text += &format!("{name:<24} {count:>9}\n");
        }
        std::fs::create_dir_all(path.parent().expect("a file in a folder"))?;
        std::fs::write(path, text)?;
        return Ok(format!("{} workloads written", now.len()));
    }
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    let Some(made_with) = text
        .lines()
        .next()
        .and_then(|line| line.split_once("made with "))
    else {
        return fail(format!("{FIGURES} is missing (cargo xtask counts --bless)"));
    };
    let before: BTreeMap<String, u64> = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(row)
        .collect();
    let mut wrong = Vec::new();
    for (name, count) in &now {
        let note = match before.get(name) {
            None => "not in the file",
            Some(old) if *count * 100 > old * (100 + TOLERANCE) => "grew",
            Some(old) if *count * (100 + TOLERANCE) < old * 100 => "fell (bless it)",
            Some(_) => "",
        };
        let old = before.get(name).map_or(String::new(), u64::to_string);
        shell.say(format_args!("{name:<24} {count:>9}  was {old:>9}  {note}"));
        if matches!(note, "grew" | "not in the file") {
            wrong.push(format!("{name} {note}"));
        }
    }
    wrong.extend(
        before
            .keys()
            .filter(|name| !now.contains_key(*name))
            .map(|name| format!("{name} is gone")),
    );
    if made_with.1 != compiler {
        return Err(Stop::Missing(format!(
            "{FIGURES} was made with {}, this is {compiler}",
            made_with.1
        )));
    }
    if wrong.is_empty() {
        Ok(format!("{} workloads within {TOLERANCE} %", now.len()))
    } else {
        fail(wrong.join(", "))
    }
}

fn row(line: &str) -> Option<(String, u64)> {
    let (name, count) = line.trim().rsplit_once(' ')?;
    Some((name.trim().to_owned(), count.parse().ok()?))
}

/// Instructions below `measured` in one run of the workload.
fn count(shell: &mut Shell, program: &Path, name: &str) -> Result<u64, Stop> {
    let out = shell.root().join("target/callgrind.out");
    let _ = std::fs::remove_file(&out);
    let mut valgrind = shell.command("valgrind");
    valgrind.args(["--quiet", "--tool=callgrind", "--toggle-collect=measured"]);
    valgrind
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(program)
        .arg(name);
    shell.run(&mut valgrind)?;
    let text = std::fs::read_to_string(&out)?;
    let total = text.lines().find_map(|line| {
        line.strip_prefix("totals: ")
            .or_else(|| line.strip_prefix("summary: "))
    });
    match total.and_then(|total| total.trim().parse().ok()) {
        Some(count) if count > 0 => Ok(count),
        _ => fail(format!("{name}: nothing was counted")),
    }
}
