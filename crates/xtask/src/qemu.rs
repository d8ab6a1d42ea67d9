//! `cargo xtask qemu`: builds the demo kernel and boots a scenario through PVH.
//!
//! Success is status 33 alone, which only the kernel's write to the exit device makes. A triple fault ends QEMU
//! with 0, a hang ends with the time limit's 124: both are failures.

use std::path::Path;
use std::process::{Command, ExitCode};

use clap::Args;

use crate::EXIT_MISSING;
use crate::sh::{Shell, Stop, fail};

const QEMU: &str = "qemu-system-x86_64";
/// `(0x10 << 1) | 1`.
const SUCCESS: i32 = 33;
/// Seconds for one scenario; the longest takes one.
const LIMIT: &str = "30";

/// Scenarios that must pass, with the number of CPUs and the memory they run on.
pub const SCENARIOS: &[(&str, u32, &str)] = &[
    ("boot", 1, "64M"),
    ("boot", 1, "6G"),
    ("fault", 1, "64M"),
    ("smp", 1, "64M"),
    ("smp", 4, "64M"),
    ("heap", 1, "64M"),
    ("heap", 4, "6G"),
    ("paging", 1, "64M"),
    ("paging", 4, "64M"),
];
/// Scenarios that must not pass: they prove that the runner, the leak count and QEMU's TLB can tell.
pub const BROKEN: &[(&str, u32)] = &[
    ("fail", 1),
    ("panic", 1),
    ("triple", 1),
    ("leak", 1),
    ("stale", 4),
    ("no-such-scenario", 1),
];

/// What to boot.
#[derive(Args)]
pub struct Options {
    /// The scenario's name; all of the gate's scenarios when there is none.
    scenario: Option<String>,
    /// CPUs.
    #[arg(long, default_value_t = 1)]
    smp: u32,
    /// Memory, as QEMU's -m takes it.
    #[arg(long, default_value = "64M")]
    mem: String,
    /// Build with optimisations.
    #[arg(long)]
    release: bool,
}

/// The subcommand.
pub fn main(root: &Path, options: &Options) -> ExitCode {
    let mut shell = Shell::terminal(root);
    let result = match &options.scenario {
        Some(name) => build(&mut shell, options.release)
            .and_then(|()| boot(&mut shell, options.release, name, options.smp, &options.mem)),
        None => all(&mut shell, options.release),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Stop::Missing(why)) => {
            eprintln!("qemu: SKIPPED: {why}; NOTHING was booted");
            ExitCode::from(EXIT_MISSING)
        }
        Err(Stop::Failed(why)) => {
            eprintln!("qemu: FAILED: {why}");
            ExitCode::FAILURE
        }
    }
}

/// Builds the image, boots every scenario that must pass, and every one that must not.
///
/// # Errors
/// At the first scenario that ends otherwise than it must, or when QEMU is missing.
pub fn all(shell: &mut Shell, release: bool) -> Result<(), Stop> {
    build(shell, release)?;
    for (name, smp, memory) in SCENARIOS {
        boot(shell, release, name, *smp, memory)?;
    }
    for (name, smp) in BROKEN {
        match boot(shell, release, name, *smp, "64M") {
            Err(Stop::Failed(_)) => {}
            Err(missing) => return Err(missing),
            Ok(()) => return fail(format!("{name} must fail, and passed")),
        }
    }
    Ok(())
}

/// Builds the demo kernel.
///
/// # Errors
/// When it does not build, or QEMU is missing (before anything is built).
pub fn build(shell: &mut Shell, release: bool) -> Result<(), Stop> {
    let found = Command::new(QEMU).arg("--version").output();
    if found.is_err() {
        return Err(Stop::Missing(format!(
            "{QEMU} is not installed (apt-get install qemu-system-x86)"
        )));
    }
    let mut cargo = shell.cargo(["build", "--bin", "demo-kernel"]);
    cargo.current_dir(shell.root().join("crates/demo-kernel"));
    if release {
        cargo.arg("--release");
    }
    shell.run(&mut cargo)
}

fn boot(
    shell: &mut Shell,
    release: bool,
    scenario: &str,
    smp: u32,
    memory: &str,
) -> Result<(), Stop> {
    let profile = if release { "release" } else { "debug" };
    let image = shell
        .root()
        .join("crates/demo-kernel/target/x86_64-unknown-linux-gnu")
        .join(profile);
    let mut command = shell.command("timeout");
    command.args([
        LIMIT, QEMU, "-machine", "q35", "-accel", "tcg", "-cpu", "max",
    ]);
    command.args(["-m", memory, "-smp", &smp.to_string()]);
    command.arg("-kernel").arg(image.join("demo-kernel"));
    command.args(["-append", &format!("scenario={scenario} cpus={smp}")]);
    command.args([
        "-display",
        "none",
        "-serial",
        "stdio",
        "-monitor",
        "none",
        "-no-reboot",
        "-nodefaults",
    ]);
    command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"]);
    let status = shell.status(&mut command)?;
    let meaning = match status.code() {
        Some(SUCCESS) => return Ok(()),
        Some(35) => "the kernel reported a failure",
        Some(0) => "the machine was reset (triple fault)",
        Some(124) => "no end within the time limit",
        _ => "QEMU itself failed",
    };
    fail(format!(
        "scenario {scenario}, {smp} CPU(s), {memory}: {meaning} ({status})"
    ))
}
