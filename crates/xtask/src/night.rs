//! `cargo xtask night`: the tests that have a longer form, each in it, in release builds.
//!
//! The gate runs the same tests for seconds; their long forms are for a machine that is left alone for an hour. Each run is told
//! how long to be by the variable that its own first page names.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;

use crate::sh::{Shell, Stop};

/// What to run.
#[derive(Args)]
pub struct Options {
    /// Run only these.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// List the runs and end.
    #[arg(long)]
    list: bool,
}

/// A test in its long form.
struct Run {
    name: &'static str,
    what: &'static str,
    package: &'static str,
    test: &'static str,
    /// Compiler's `--cfg` that the test is built with, `""` for none.
    cfg: &'static str,
    length: (&'static str, &'static str),
    /// Whether it is a test that the short runs leave out.
    ignored: bool,
}

const RUNS: &[Run] = &[
    Run {
        name: "paging",
        what: "10^8 accesses and frames on the adversarial machine",
        package: "kmem-paging",
        test: "hostile",
        cfg: "",
        length: ("KMEM_STEPS", "100000000"),
        ignored: true,
    },
    Run {
        name: "buddy",
        what: "10^8 operations against a map of owners",
        package: "kmem-buddy",
        test: "long",
        cfg: "",
        length: ("KMEM_LONG_OPS", "100000000"),
        ignored: false,
    },
    Run {
        name: "vma-tree",
        what: "10^7 operations against a list",
        package: "kmem-vma-tree",
        test: "model",
        cfg: "",
        length: ("KMEM_LONG", "1"),
        ignored: false,
    },
    Run {
        name: "processes",
        what: "10^6 steps of families of processes against a model of every byte",
        package: "kmem-cow-mm",
        test: "processes",
        cfg: "",
        length: ("KMEM_STEPS", "1000000"),
        ignored: false,
    },
    Run {
        name: "live",
        what: "600 seeds of random calls on the running Linux and on kmem",
        package: "kmem-cow-mm",
        test: "live",
        cfg: "",
        length: ("KMEM_LIVE_SEEDS", "600"),
        ignored: false,
    },
    Run {
        name: "pairs",
        what: "100 schedules of each pair of calls on one space",
        package: "kmem-cow-mm",
        test: "shuttle_pairs",
        cfg: "shuttle",
        length: ("KMEM_PAIRS", "100"),
        ignored: false,
    },
];

/// `cargo xtask night`.
pub fn main(root: &Path, options: &Options) -> ExitCode {
    if let Some(name) = options
        .only
        .iter()
        .find(|name| !RUNS.iter().any(|run| run.name == **name))
    {
        eprintln!("night: there is no run {name}; see --list");
        return ExitCode::from(2);
    }
    let asked =
        |run: &&Run| options.only.is_empty() || options.only.iter().any(|name| name == run.name);
    let mut failed = 0;
    for run in RUNS.iter().filter(asked) {
        println!("night: {} ({})", run.name, run.what);
        if options.list {
            continue;
        }
        let start = Instant::now();
        let ended = long(&mut Shell::terminal(root), run);
        let took = start.elapsed().as_secs_f32();
        match ended {
            Ok(()) => println!("night: {} passed in {took:.0} s", run.name),
            Err(why) => {
                println!("night: {} FAILED in {took:.0} s: {why}", run.name);
                failed += 1;
            }
        }
    }
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn long(shell: &mut Shell, run: &Run) -> Result<(), Stop> {
    let mut command = shell.cargo(["test", "--release", "-p", run.package, "--test", run.test]);
    if !run.cfg.is_empty() {
        // A folder of its own: the other runs would otherwise build everything again after it.
        command
            .arg("--target-dir")
            .arg(format!("target/{}", run.cfg))
            .env("RUSTFLAGS", format!("--cfg {}", run.cfg));
    }
    command.args(["--", "--nocapture"]);
    if run.ignored {
        command.arg("--ignored");
    }
    command.env(run.length.0, run.length.1);
    shell.run(&mut command)
}
