//! The steps of the gate, in the order in which they run: cheap ones first.

use std::path::Path;

use crate::gate::Gate;
use crate::sh::{Stop, fail};
use crate::{
    book, counts, golden, image, models, mutants, oracle, package, qemu, tools, workspace,
};

/// One named check.
pub struct Step {
    /// Its name, for `--only` and `--skip`.
    pub name: &'static str,
    /// What it proves, in a few words.
    pub what: &'static str,
    /// Runs it; the text is for the summary.
    pub run: fn(&mut Gate) -> Result<String, Stop>,
}

/// Folders with a workspace of their own.
const OTHER_WORKSPACES: [&str; 2] = ["crates/demo-kernel", "fuzz"];

/// Every step.
pub const STEPS: &[Step] = &[
    step("fmt", "rustfmt changes nothing", fmt),
    step("clippy", "no warning in any target", clippy),
    step("test", "cargo test --workspace", test),
    step("doc", "rustdoc has no warning", doc),
    step("book", "the book builds", book),
    step("no-std", "no std, vector registers, deep stack", no_std),
    step("qemu", "the demo kernel in QEMU", qemu_scenarios),
    step("boot", "cargo run --release ends with 0", boot),
    step("oracle", "recorded runs of Linux, replayed", oracle_runs),
    step(
        "counts",
        "instruction counts, by callgrind",
        instruction_counts,
    ),
    step("compare", "the benches run, quickly", compare),
    step("features", "each set of features builds", features),
    step("golden", "the public API is as in docs/api", golden_files),
    step("package", "each package builds by itself", packages),
    step("counting", "counts of locked instructions", counting),
    step("loom", "all interleavings of small models", loom),
    step("shuttle", "random schedules of large models", shuttle),
    step("mutants", "each planted fault is noticed", planted_faults),
    step("asan", "the tests under AddressSanitizer", asan),
    step("fuzz", "each fuzz target for a while", fuzz),
];

const fn step(
    name: &'static str,
    what: &'static str,
    run: fn(&mut Gate) -> Result<String, Stop>,
) -> Step {
    Step { name, what, run }
}

fn fmt(gate: &mut Gate) -> Result<String, Stop> {
    let mut command = gate.shell.cargo(["fmt", "--all", "--check"]);
    gate.shell.run(&mut command)?;
    for folder in OTHER_WORKSPACES {
        if folder == "fuzz" && fuzz_targets(gate.shell.root()).is_empty() {
            continue; // cargo takes no package without a target
        }
        let mut command = gate.shell.cargo(["fmt", "--all", "--check"]);
        command.current_dir(gate.shell.root().join(folder));
        gate.shell.run(&mut command)?;
    }
    Ok(String::new())
}

/// The names of the fuzz targets, sorted.
fn fuzz_targets(root: &Path) -> Vec<String> {
    let files = std::fs::read_dir(root.join("fuzz/fuzz_targets"))
        .into_iter()
        .flatten()
        .flatten();
    let mut names: Vec<String> = files
        .filter_map(|file| Some(file.file_name().to_str()?.strip_suffix(".rs")?.to_owned()))
        .collect();
    names.sort();
    names
}

fn clippy(gate: &mut Gate) -> Result<String, Stop> {
    let mut command = gate.shell.cargo([
        "clippy",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]);
    gate.shell.run(&mut command)?;
    let mut command = gate
        .shell
        .cargo(["clippy", "--workspace", "--", "-D", "warnings"]);
    command.current_dir(gate.shell.root().join("crates/demo-kernel"));
    gate.shell.run(&mut command)?;
    Ok(String::new())
}

fn test(gate: &mut Gate) -> Result<String, Stop> {
    let mut command = gate.shell.cargo(["test", "--workspace"]);
    gate.shell.run(&mut command)?;
    let passed = models::count_passed(&gate.shell.text());
    Ok(format!("{passed} tests"))
}

fn doc(gate: &mut Gate) -> Result<String, Stop> {
    let mut command = gate.shell.cargo(["doc", "--workspace", "--no-deps"]);
    command.env("RUSTDOCFLAGS", "-D warnings");
    gate.shell.run(&mut command)?;
    Ok(String::new())
}

fn book(gate: &mut Gate) -> Result<String, Stop> {
    book::check(&mut gate.shell)
}

fn no_std(gate: &mut Gate) -> Result<String, Stop> {
    image::gate(&mut gate.shell)
}

fn boot(gate: &mut Gate) -> Result<String, Stop> {
    let mut command = gate.shell.cargo(["run", "--release"]);
    gate.shell.run(&mut command)?;
    Ok(String::new())
}

fn oracle_runs(gate: &mut Gate) -> Result<String, Stop> {
    oracle::check(&mut gate.shell, false)
}

fn instruction_counts(gate: &mut Gate) -> Result<String, Stop> {
    counts::check(&mut gate.shell, false)
}

/// Times are not judged here: the step proves that every area still runs beside its peers.
fn compare(gate: &mut Gate) -> Result<String, Stop> {
    let json = gate.shell.root().join("target/compare.json");
    let _ = std::fs::remove_file(&json);
    let mut command = gate.shell.cargo([
        "run",
        "--release",
        "-p",
        "kmem-benches",
        "--bin",
        "compare",
        "--",
    ]);
    command.args(["all", "--quick", "--json"]).arg(&json);
    gate.shell.run(&mut command)?;
    let text = std::fs::read_to_string(&json)?;
    let rows = serde_json::from_str::<serde_json::Value>(&text).ok();
    match rows.as_ref().and_then(|rows| rows.as_array()) {
        Some(rows) if !rows.is_empty() => Ok(format!("{} figures", rows.len())),
        _ => fail(format!("{} has no figures", json.display())),
    }
}

fn counting(gate: &mut Gate) -> Result<String, Stop> {
    models::run(&mut gate.shell, &models::COUNTING)
}

fn loom(gate: &mut Gate) -> Result<String, Stop> {
    models::run(&mut gate.shell, &models::LOOM)
}

fn planted_faults(gate: &mut Gate) -> Result<String, Stop> {
    mutants::check(&mut gate.shell)
}

fn shuttle(gate: &mut Gate) -> Result<String, Stop> {
    models::run(&mut gate.shell, &models::SHUTTLE)
}

fn asan(gate: &mut Gate) -> Result<String, Stop> {
    models::address_sanitizer(&mut gate.shell)
}

/// Every subset of the features of a crate with up to four; none, all, and each alone and left out of a crate with
/// more.
fn features(gate: &mut Gate) -> Result<String, Stop> {
    let mut built = 0;
    for package in workspace::published(&mut gate.shell)? {
        for set in feature_sets(&package.features) {
            let mut command =
                gate.shell
                    .cargo(["check", "-p", &package.name, "--no-default-features"]);
            if !set.is_empty() {
                command.arg("--features").arg(set.join(","));
            }
            if set.contains(&"nightly") {
                // What the language has not settled yet.
                tools::nightly(&mut gate.shell)?;
                command.env("RUSTUP_TOOLCHAIN", "nightly");
            }
            gate.shell.run(&mut command)?;
            built += 1;
        }
    }
    Ok(format!("{built} combinations"))
}

fn feature_sets(features: &[String]) -> Vec<Vec<&str>> {
    let n = features.len();
    let all: u64 = (1 << n) - 1;
    let masks: Vec<u64> = if n <= 4 {
        (0..=all).collect()
    } else {
        let one = |i: usize| 1 << i;
        [0, all]
            .into_iter()
            .chain((0..n).map(one))
            .chain((0..n).map(|i| all & !one(i)))
            .collect()
    };
    let chosen = |mask: u64| {
        features
            .iter()
            .enumerate()
            .filter(move |(i, _)| mask >> i & 1 == 1)
    };
    masks
        .into_iter()
        .map(|mask| chosen(mask).map(|(_, name)| name.as_str()).collect())
        .collect()
}

fn golden_files(gate: &mut Gate) -> Result<String, Stop> {
    golden::check(&mut gate.shell, false, &[]).map(|crates| format!("{crates} crates"))
}

fn packages(gate: &mut Gate) -> Result<String, Stop> {
    package::check(&mut gate.shell)
}

fn fuzz(gate: &mut Gate) -> Result<String, Stop> {
    let targets = fuzz_targets(gate.shell.root());
    if targets.is_empty() {
        return Err(Stop::Missing("there is no fuzz target yet".into()));
    }
    tools::nightly(&mut gate.shell)?;
    let program = tools::FUZZ.path(&mut gate.shell)?;
    for target in &targets {
        // What is found goes to the first folder; the committed seeds stay as they are.
        let found = gate.shell.root().join("target/fuzz-corpus").join(target);
        std::fs::create_dir_all(&found)?;
        let mut command = gate.shell.command(&program);
        command.env("RUSTUP_TOOLCHAIN", "nightly");
        command.args(["fuzz", "run", target]).arg(found);
        command
            .arg(gate.shell.root().join("fuzz/corpus").join(target))
            .arg("--");
        command.arg(format!("-max_total_time={}", gate.fuzz_seconds));
        command.args(["-print_final_stats=1", "-timeout=20", "-rss_limit_mb=4096"]);
        gate.shell.run(&mut command)?;
    }
    Ok(format!(
        "{} for {} s each",
        targets.join(" "),
        gate.fuzz_seconds
    ))
}

fn qemu_scenarios(gate: &mut Gate) -> Result<String, Stop> {
    qemu::gate(&mut gate.shell)
}
