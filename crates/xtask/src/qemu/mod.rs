//! `cargo xtask qemu`: builds the demo kernel and boots scenarios through PVH.
//!
//! Success is status 33 alone, which only the kernel's write to the exit device makes. A triple fault ends QEMU
//! with 0, a hang ends with the time limit's 124: both are failures. A scenario that cannot run here is counted as
//! skipped, and a summary with one is never a success: it ends with 77.
//!
//! The gate runs under QEMU's emulation alone, which is the same on every machine and has no PCID. Under KVM, with the processor's own TLB, the
//! scenarios run where somebody asks for it (`--kvm`): there another machine's processor has a say, which must not decide over the gate.

mod differential;
mod linux;
mod machine;
mod table;

use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use clap::Args;

use self::machine::{End, Machine, QEMU};
use crate::EXIT_MISSING;
use crate::sh::{Shell, Stop, fail};

/// What to boot.
#[derive(Args)]
pub struct Options {
    /// The scenario's name; all of the gate's runs when there is none, or with --kvm all that run under KVM.
    scenario: Option<String>,
    /// CPUs.
    #[arg(long, default_value_t = 1)]
    smp: u32,
    /// Memory, as QEMU's -m takes it.
    #[arg(long, default_value = "64M")]
    mem: String,
    /// Five levels of page tables.
    #[arg(long)]
    la57: bool,
    /// Under KVM, with the host's processor.
    #[arg(long)]
    kvm: bool,
    /// What the CPU shall not have, by QEMU's names: pcid,invpcid.
    #[arg(long, value_delimiter = ',')]
    without: Vec<String>,
    /// A fault to plant, which the scenario should report (src/plant.rs names them).
    #[arg(long)]
    plant: Option<String>,
    /// Print every system call.
    #[arg(long)]
    trace: bool,
    /// Boot each run so many times.
    #[arg(long, default_value_t = 1)]
    repeat: u32,
    /// Print the scenarios and what they prove.
    #[arg(long)]
    list: bool,
    /// Build without optimisations.
    #[arg(long)]
    debug: bool,
}

/// The subcommand.
pub fn main(root: &Path, options: &Options) -> ExitCode {
    if options.list {
        for (name, what) in table::SCENARIOS {
            println!("{name:<14} {what}");
        }
        return ExitCode::SUCCESS;
    }
    let mut shell = Shell::terminal(root);
    let result = build(&mut shell, options.debug).and_then(|images| match &options.scenario {
        Some(name) => one(&mut shell, &images, name, options),
        None if options.kvm => under_kvm(&mut shell, &images, options.repeat),
        None => everything(&mut shell, &images, options.repeat),
    });
    match result {
        Ok(note) => {
            println!("qemu: {note}");
            ExitCode::SUCCESS
        }
        Err(Stop::Missing(why)) => {
            eprintln!("qemu: SKIPPED: {why}");
            ExitCode::from(EXIT_MISSING)
        }
        Err(Stop::Failed(why)) => {
            eprintln!("qemu: FAILED: {why}");
            ExitCode::FAILURE
        }
    }
}

/// For the gate: every run, twice.
///
/// # Errors
/// As for the subcommand.
pub fn gate(shell: &mut Shell) -> Result<String, Stop> {
    let images = build(shell, false)?;
    everything(shell, &images, 2)
}

/// Further boots of a machine with a planted fault whose first boots reported none.
const PLANT_TRIES: u32 = 4;

/// Where what was built lies.
struct Images {
    kernel: std::path::PathBuf,
    programs: std::path::PathBuf,
    oracle: std::path::PathBuf,
}

fn build(shell: &mut Shell, debug: bool) -> Result<Images, Stop> {
    if Command::new(QEMU).arg("--version").output().is_err() {
        return Err(Stop::Missing(format!(
            "{QEMU} is not installed (apt-get install qemu-system-x86); NOTHING was booted"
        )));
    }
    let folder = shell.root().join("crates/demo-kernel");
    let mut cargo = shell.cargo(["build", "--bin", "demo-kernel"]);
    cargo.current_dir(&folder);
    let mut oracle = shell.cargo(["build", "-p", "kmem-demo-oracle"]);
    oracle.current_dir(&folder);
    if !debug {
        cargo.arg("--release");
        oracle.arg("--release");
    }
    shell.run(&mut cargo)?;
    shell.run(&mut oracle)?;
    let profile = if debug { "debug" } else { "release" };
    let target = std::env::var_os("CARGO_TARGET_DIR");
    let target = target.map_or_else(|| folder.join("target"), |target| folder.join(target));
    let built = target.join("x86_64-unknown-linux-gnu").join(profile);
    Ok(Images {
        kernel: built.join("demo-kernel"),
        programs: built.join("programs"),
        oracle: built.join("demo-oracle"),
    })
}

/// Boots one scenario with the terminal as its serial port.
fn one(shell: &mut Shell, images: &Images, name: &str, options: &Options) -> Result<String, Stop> {
    let machine = Machine {
        scenario: name.to_owned(),
        cpus: options.smp,
        memory: options.mem.clone(),
        five_levels: options.la57,
        kvm: options.kvm,
        without: options.without.clone(),
        plant: options.plant.clone(),
        trace: options.trace,
    };
    for _ in 0..options.repeat {
        let run = machine.boot(&images.kernel)?;
        shell.say(run.text.trim_end());
        match judge(images, &machine, &run.end, &run.text) {
            End::Passed => {}
            End::Skipped(why) => return Err(Stop::Missing(why)),
            End::Failed(why) => return fail(format!("{machine}: {why}")),
        }
    }
    Ok(format!("{machine}: passed"))
}

/// What the kernel said of itself, and what its output says when it is held against another machine's.
fn judge(images: &Images, machine: &Machine, end: &End, text: &str) -> End {
    let compared = match (end, machine.scenario.as_str()) {
        (End::Passed, "maps") => linux::compare_maps(&images.programs.join("maps"), text),
        (End::Passed, "differential") => differential::compare(&images.oracle, text),
        _ => return end.clone(),
    };
    match compared {
        Ok(()) => End::Passed,
        Err(Stop::Missing(why)) => End::Skipped(why),
        Err(Stop::Failed(why)) => End::Failed(why),
    }
}

/// Boots every run that must pass `repeat` times, and every one that must not once.
fn everything(shell: &mut Shell, images: &Images, repeat: u32) -> Result<String, Stop> {
    linux::run_programs(shell, &images.programs)?;
    let note = boot_all(shell, images, &table::good(), &table::bad(), repeat)?;
    Ok(format!("{note}; KVM was not asked for"))
}

/// Boots every run under KVM, if it boots the kernel at all.
fn under_kvm(shell: &mut Shell, images: &Images, repeat: u32) -> Result<String, Stop> {
    let text = match table::kvm_probe().boots(&images.kernel)? {
        Ok(text) => text,
        Err(why) => {
            return Err(Stop::Missing(format!(
                "KVM does not boot the kernel: {why}; NOTHING ran under it"
            )));
        }
    };
    let found = text.lines().find(|line| line.starts_with("X86Tlb"));
    let found = found.unwrap_or("a kernel that does not say what it found");
    let note = boot_all(shell, images, &table::kvm(), &[], repeat)?;
    Ok(format!("{note}; under KVM: {found}"))
}

/// Boots `good`, which must pass, `repeat` times, and `bad`, which must not, once.
fn boot_all(
    shell: &mut Shell,
    images: &Images,
    good: &[Machine],
    bad: &[Machine],
    repeat: u32,
) -> Result<String, Stop> {
    let begin = Instant::now();
    let runs: Vec<(&Machine, bool)> = (0..repeat)
        .flat_map(|_| good.iter().map(|machine| (machine, true)))
        .chain(bad.iter().map(|machine| (machine, false)))
        .collect();
    let next = AtomicUsize::new(0);
    let counts = Mutex::new((0, 0, Vec::new()));
    let shared = Mutex::new(shell);
    // Two machines at a time: most have two CPUs, and a host has at least two.
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((machine, good)) = runs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let begin = Instant::now();
                    let boot = || match machine.boot(&images.kernel) {
                        Ok(run) => (judge(images, machine, &run.end, &run.text), run.text),
                        Err(stop) => (End::Failed(stop.to_string()), String::new()),
                    };
                    let (mut end, mut text) = boot();
                    // A race that is planted needs two CPUs at the right places: not every boot brings them there.
                    for _ in 0..PLANT_TRIES {
                        if *good || !matches!(end, End::Passed) {
                            break;
                        }
                        (end, text) = boot();
                    }
                    let took = begin.elapsed().as_secs_f32();
                    let mut shell = shared.lock().expect("no panic");
                    let mut counts = counts.lock().expect("no panic");
                    match (end, good) {
                        (End::Passed, true) => {
                            shell.say(format_args!("passed   {took:5.2} s  {machine}"));
                            counts.0 += 1;
                        }
                        (End::Failed(why), false) => {
                            shell.say(format_args!("caught   {took:5.2} s  {machine}: {why}"));
                            counts.1 += 1;
                        }
                        (End::Skipped(why), _) => {
                            shell.say(format_args!("SKIPPED  {took:5.2} s  {machine}: {why}"));
                            counts.2.push((false, format!("{machine}: {why}")));
                        }
                        (end, _) => {
                            let why = match end {
                                End::Failed(why) => why,
                                _ => "must fail, and passed".to_owned(),
                            };
                            shell.say(format_args!(
                                "FAILED   {took:5.2} s  {machine}: {why}\n{}",
                                text.trim_end()
                            ));
                            counts.2.push((true, format!("{machine}: {why}")));
                        }
                    }
                }
            });
        }
    });
    let (passed, caught, others) = counts.into_inner().expect("no panic");
    let failed = others.iter().filter(|(failed, _)| *failed).count();
    let skipped = others.len() - failed;
    let seconds = begin.elapsed().as_secs();
    let note = format!(
        "{passed} runs of {} scenarios passed, {caught} planted faults caught, {failed} failed, {skipped} skipped, {seconds} s",
        table::SCENARIOS.len()
    );
    match others.into_iter().max_by_key(|(failed, _)| *failed) {
        None => Ok(note),
        Some((true, first)) => fail(format!("{note}; {first}")),
        Some((false, first)) => Err(Stop::Missing(format!("{note}; {first}"))),
    }
}
